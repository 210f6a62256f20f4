"""How fast checkpoints are saved and loaded, what a save costs training, and what resharding and export hold in memory.

    python tools/bench_checkpoint.py --folder /tmp/bench --out tools/results/checkpoint_cpu.json

Speed: the fp32 weights and moments of a model of `--layers` layers (4.8 GB by default) in one process, compared with
`cp` of the same bytes on the same disk and torch.distributed.checkpoint (DCP) with the same tensors; contenders
alternate, and medians are shown. A save ends when the bytes are on the device: ours and DCP flush their files, and what
`cp` wrote is flushed too. When saving, `cp` reads from the page cache. Loads begin with none of the files' bytes in
memory (they are dropped from the page cache before) and end when the tensors hold them; `cp` then copies into a file
system in memory, which is a load that nothing uses, and to the same disk, as copies are usually made. Ours verifies
checksums both ways; cp and DCP verify none.

Stall: how long an asynchronous save blocks training, compared with copying the tensors into allocated memory.

Memory: the commands `reshard`, `export` and `import` on that checkpoint, each under a limit of one layer's tensors plus
1 GiB that the kernel enforces on the process and its page cache (a memory cgroup; needs root), less than the weights
alone. The peak of each command's private memory is reported; without cgroups it is measured but not limited.
"""

import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from bench_common import machine, write_record

from megacoder.checkpoint.boxes import Box
from megacoder.checkpoint.rank_file import Fragment
from megacoder.checkpoint.reader import CheckpointReader
from megacoder.checkpoint.writer import CheckpointConfig, CheckpointWriter
from megacoder.core.config import parse_args, to_dict
from megacoder.core.console import say, table
from megacoder.model.config import ModelConfig
from megacoder.model.huggingface import weight_shapes
from megacoder.parallel.world import World

KINDS = ("weight", "exp_avg", "exp_avg_sq")
GIB = 1 << 30
CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Checkpoints beside cp and DCP, and under a memory limit."""

    folder: Path
    """where to write, on the disk that is measured; twice the state must fit, and all of it is removed again"""
    memory_folder: Path = Path("/dev/shm")
    """a file system in memory, for cp"""
    layers: int = 16
    """of a model with hidden size 1280: 19.8 million weights each, and 82.6 million in embedding and head"""
    rounds: int = 3
    """of everything that is timed"""
    threads: int = 2
    """intra-op threads, and DCP's writer threads"""
    parts: tuple[str, ...] = ("speed", "stall", "memory")
    """what to measure"""
    out: Path | None = None
    """JSON file to write"""


def model_config(options: Options) -> ModelConfig:
    """DeepSeek-Coder's proportions."""
    return ModelConfig(
        hidden_size=1280, intermediate_size=3456, num_hidden_layers=options.layers, num_attention_heads=10,
        num_key_value_heads=10,
    )  # fmt: skip


def make_state(config: ModelConfig) -> dict[tuple[str, str], torch.Tensor]:
    """(kind, name) -> fp32 tensor, no two pages alike."""
    generator = torch.Generator().manual_seed(0)
    return {
        (kind, name): torch.rand(shape, generator=generator)
        for kind in KINDS
        for name, shape in weight_shapes(config).items()
    }


def fragments_of(state: dict[tuple[str, str], torch.Tensor]) -> list[Fragment]:
    """All of it, as one rank owns it."""
    return [
        Fragment(
            name=name, kind=kind, global_shape=tuple(tensor.shape), region=Box.whole(tensor.shape), start=0,
            stop=tensor.numel(), data=tensor.view(-1),
        )
        for (kind, name), tensor in state.items()
    ]  # fmt: skip


class Bench:
    """The state, and one way each to save it and to load it again."""

    def __init__(self, options: Options, config: ModelConfig) -> None:
        self.options, self.config = options, config
        self.state = make_state(config)
        self.bytes = sum(tensor.nbytes for tensor in self.state.values())
        self.fragments = fragments_of(self.state)
        self.flat = {f"{kind}/{name}": tensor for (kind, name), tensor in self.state.items()}
        self.ours, self.theirs = options.folder / "ours", options.folder / "dcp"
        self.copy, self.in_memory = options.folder / "copy", options.memory_folder / f"bench-{os.getpid()}"

    def writer(self, *, asynchronous: bool) -> CheckpointWriter:
        """Of a run of one process."""
        world = World(0, 1, 0, torch.device("cpu"), None)
        return CheckpointWriter(self.ours, world, CheckpointConfig(asynchronous=asynchronous, keep_last=1))

    def save(self, writer: CheckpointWriter, step: int) -> float:
        """Returns what it held the caller up for."""
        state = {"config": {"model": to_dict(self.config)}}
        return writer.save(step, self.fragments, state=state, layout={"dp": 1})

    def save_ours(self) -> None:
        self.save(self.writer(asynchronous=False), 1)

    def save_dcp(self) -> None:
        writer = dcp.FileSystemWriter(self.theirs, thread_count=self.options.threads)
        dcp.save(self.flat, storage_writer=writer)

    def copy_to_disk(self) -> None:
        """What `cp -r` and a flush take."""
        subprocess.run(["cp", "-r", str(self.ours), str(self.copy)], check=True)
        for path in files(self.copy):
            flush(path)

    def copy_to_memory(self) -> None:
        subprocess.run(["cp", "-r", str(self.ours), str(self.in_memory)], check=True)

    def load_ours(self) -> None:
        CheckpointReader(self.ours).read_all(self.fragments)

    def load_dcp(self) -> None:
        dcp.load(self.flat, storage_reader=dcp.FileSystemReader(self.theirs))

    def clear(self, *folders: Path) -> None:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        os.sync()


def files(folder: Path) -> list[Path]:
    """All files below it."""
    return [path for path in folder.rglob("*") if path.is_file()]


def flush(path: Path) -> None:
    """To the device."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def forget(folder: Path) -> None:
    """Drops what the page cache holds of its files."""
    for path in files(folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def timed(action: Callable[[], object]) -> float:
    """Seconds."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def measure_speed(bench: Bench) -> dict[str, Any]:
    """GB/s of each way to save and to load."""
    saves: dict[str, list[float]] = {"megacoder": [], "cp": [], "DCP": []}
    loads: dict[str, list[float]] = {"megacoder": [], "cp to disk": [], "cp to memory": [], "DCP": []}
    for _ in range(bench.options.rounds):
        bench.clear(bench.ours, bench.theirs, bench.copy)
        saves["megacoder"].append(timed(bench.save_ours))
        os.sync()
        saves["cp"].append(timed(bench.copy_to_disk))
        bench.clear(bench.copy)
        saves["DCP"].append(timed(bench.save_dcp))
        os.sync()
        for name, action, folder in (
            ("megacoder", bench.load_ours, bench.ours), ("cp to memory", bench.copy_to_memory, bench.ours),
            ("cp to disk", bench.copy_to_disk, bench.ours), ("DCP", bench.load_dcp, bench.theirs),
        ):  # fmt: skip
            forget(folder)
            loads[name].append(timed(action))
            bench.clear(bench.copy, bench.in_memory)
    return {
        "bytes": bench.bytes,
        "save": {name: rate(bench, seconds) for name, seconds in saves.items()},
        "load": {name: rate(bench, seconds) for name, seconds in loads.items()},
    }


def rate(bench: Bench, seconds: Sequence[float]) -> dict[str, Any]:
    """The median's GB/s, and all times."""
    return {"gb_per_s": bench.bytes / statistics.median(seconds) / 1e9, "seconds": list(seconds)}


def measure_stall(bench: Bench) -> dict[str, Any]:
    """An asynchronous save's stall beside a plain copy, after one of each to have the memory."""
    bench.clear(bench.ours)
    writer = bench.writer(asynchronous=True)
    target = [torch.empty_like(fragment.data) for fragment in bench.fragments]

    def copy() -> None:
        for destination, fragment in zip(target, bench.fragments, strict=True):
            destination.copy_(fragment.data)

    copies, stalls, wholes = [], [], []
    for step in range(bench.options.rounds + 1):
        copies.append(timed(copy))
        began = time.perf_counter()
        stalls.append(bench.save(writer, step))
        writer.wait()
        wholes.append(time.perf_counter() - began)
    bench.clear(bench.ours)
    medians = {"copy": copies[1:], "stall": stalls[1:], "until on disk": wholes[1:]}
    return {
        **{name: {"seconds": statistics.median(values), "all": values} for name, values in medians.items()},
        "first stall": stalls[0], "ratio": statistics.median(stalls[1:]) / statistics.median(copies[1:]),
    }  # fmt: skip


@contextlib.contextmanager
def memory_group(limit: int) -> Iterator[Path | None]:
    """A memory cgroup of that many bytes, of either version; None where there is none to be had."""
    old, new = CGROUPS / "memory", CGROUPS
    root, name = (old, "memory.limit_in_bytes") if (old / "memory.limit_in_bytes").exists() else (new, "memory.max")
    group = root / f"megacoder-bench-{os.getpid()}"
    try:
        group.mkdir()
        (group / name).write_text(str(limit))
    except OSError as error:
        say(f"no memory cgroup ({error}); the limit is not enforced")
        with contextlib.suppress(OSError):
            group.rmdir()
        yield None
        return
    try:
        yield group
    finally:
        with contextlib.suppress(OSError):
            group.rmdir()


def run_limited(words: Sequence[str], limit: int) -> dict[str, Any]:
    """A `megacoder checkpoint` command: seconds, the most private memory it had, and whether it was held to `limit`."""
    with memory_group(limit) as group:

        def join() -> None:
            if group is not None:
                (group / "cgroup.procs").write_text(str(os.getpid()))

        began, peak = time.perf_counter(), 0
        process = subprocess.Popen([sys.executable, "-m", "megacoder", "checkpoint", *words], preexec_fn=join)
        while process.poll() is None:
            peak = max(peak, private_bytes(process.pid))
            time.sleep(0.02)
        seconds = time.perf_counter() - began
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(words)} ended with {process.returncode}")
    return {"seconds": seconds, "private_bytes": peak, "limit": limit, "enforced": group is not None}


def private_bytes(pid: int) -> int:
    """Memory of a process that is no file's; 0 when it has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


def measure_memory(bench: Bench) -> dict[str, Any]:
    """Every offline command on the checkpoint; they, not this process, do the work."""
    bench.clear(bench.ours)
    bench.save_ours()
    bench.state.clear()
    bench.flat.clear()
    bench.fragments.clear()
    config = bench.config
    limit = GIB + 4 * (config.num_layer_matmul_params + 2 * config.hidden_size)
    folder = bench.options.folder
    idle = run_limited(["inspect", str(bench.ours)], limit)["private_bytes"]
    results: dict[str, Any] = {"weights_bytes": 4 * config.num_params, "limit": limit, "inspect_private_bytes": idle}
    commands = {
        "reshard": ["reshard", str(bench.ours), str(folder / "resharded"), "--tp", "2", "--pp", "2", "--dp", "2"],
        "export": ["export", str(bench.ours), str(folder / "hf")],
        "import": ["import", str(folder / "hf"), str(folder / "start")],
    }
    for name, words in commands.items():
        forget(bench.ours)
        results[name] = run_limited(words, limit)
    bench.clear(folder / "resharded", folder / "hf", folder / "start", bench.ours)
    return results


def show(results: dict[str, Any]) -> None:
    """Tables for people."""
    speed = results.get("speed")
    if speed:
        for kind, unit in (("save", "cp"), ("load", "cp to memory")):
            base = speed[kind][unit]["gb_per_s"]
            rows = [
                [name, f"{row['gb_per_s']:.2f}", f"{row['gb_per_s'] / base:.0%}"] for name, row in speed[kind].items()
            ]
            table(f"{kind}, {speed['bytes'] / 1e9:.1f} GB", ["", "GB/s", f"of {unit}"], rows)
    stall = results.get("stall")
    if stall:
        rows = [[name, f"{stall[name]['seconds']:.3f} s"] for name in ("copy", "stall", "until on disk")]
        table(f"asynchronous save: stall {stall['ratio']:.2f}x a copy", ["", "median"], rows)
    memory = results.get("memory")
    if memory:
        rows = [
            [name, f"{memory[name]['private_bytes'] / 2**20:,.0f}", f"{memory[name]['seconds']:.1f}"]
            for name in ("reshard", "export", "import")
        ]
        enforced = "enforced" if memory["reshard"]["enforced"] else "not enforced"
        title = (
            f"limit {memory['limit'] / 2**20:,.0f} MiB, {enforced}; weights {memory['weights_bytes'] / 2**20:,.0f} MiB"
        )
        table(title, ["", "private MiB", "seconds"], rows)


MEASURES: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "speed": measure_speed, "stall": measure_stall, "memory": measure_memory,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints, and writes the record."""
    options = parse_args(Options, argv, prog="bench_checkpoint.py")
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    torch.set_num_threads(options.threads)
    options.folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(options, model_config(options))
    results: dict[str, Any] = {}
    try:
        for part in [part for part in MEASURES if part in options.parts]:  # memory last: it gives the state up
            results[part] = MEASURES[part](bench)
            say(f"{part} measured")
    finally:
        bench.clear(bench.ours, bench.theirs, bench.copy, bench.in_memory)
    show(results)
    if options.out is not None:
        write_record(options.out, machine=machine(), options=options, results=results)


if __name__ == "__main__":
    main()
