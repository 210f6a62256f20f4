"""Kills a training run with SIGKILL at random moments and checks that nothing is lost.

    python tools/kill_test.py                      # 50 kills, some minutes on 2 cores
    python tools/kill_test.py --kills 6 --seed 3 --json

A tiny model trains in three ways, and each way gets its share of the kills:
  alone    one process, killed and started again by the same command
  power    torchrun with two ranks; it and its ranks all die at once, and the same command is given again
  worker   torchrun --max-restarts with two ranks, one of which dies; torchrun starts both again

Moments: while the process starts, after some steps, while a checkpoint is being written. After each kill the newest
complete checkpoint must verify to the last checksum and be no older than the one before; the run must resume from
exactly that one and remove what the killed attempt left. At the end the run must equal an undisturbed one bit for bit:
every step's loss and gradient norm once and in order, every weight and moment, the number of updates and the position
in the data. No temporary file may be left.
"""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from bench_common import run_tool

from megacoder.checkpoint.folders import step_folders
from megacoder.checkpoint.reader import CheckpointReader, verify_checkpoint
from megacoder.core.config import parse_args
from megacoder.core.errors import CheckpointError, ConfigError, MegacoderError
from megacoder.train.metrics_log import read_metrics

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from train_cases import Case, make_case  # type: ignore[import-not-found]

Way = Literal["alone", "power", "worker"]
WAYS: dict[Way, int] = {"alone": 1, "power": 2, "worker": 2}
"""Ranks of each."""
MOMENTS = ("starting", "training", "training", "saving", "saving")
STEPS_A_LIFE = 6
"""Most steps that a life is let live before its kill is prepared."""
STEPS_A_KILL = 14
"""Steps of the run for each kill: more than a life makes before it is killed."""
PATIENCE_SECONDS = 600.0
"""For anything that a run should come to; far more than on a machine that has nothing else to do."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How often, and how it is told."""

    kills: int = 50
    """over all ways"""
    ways: tuple[Way, ...] = ("alone", "power", "worker")
    """which to try"""
    seed: int = 0
    """of the moments"""
    json: bool = False
    """print JSON"""

    def __post_init__(self) -> None:
        if self.kills < len(self.ways):
            raise ConfigError(f"kills = {self.kills}: at least one for each of {len(self.ways)} ways")


class Broken(MegacoderError):
    """Something that must hold did not."""


@dataclass
class Story:
    """A run under fire."""

    case: Case
    way: Way
    kills: int
    random: random.Random
    whole_step: int = 0
    """step of the newest whole checkpoint at the last kill"""
    struck: Counter[str] = field(default_factory=Counter)
    """kills by what was under way"""
    repeated: int = 0
    """steps that were trained again, since no checkpoint had them"""
    leftovers: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.toml = self.case.toml(self.way, **settings(self.kills))
        self.folder = self.case.folder / self.way
        self.said = self.case.folder / f"{self.way}.stderr"
        self.said.touch()
        self.seconds_to_start = 3.0

    # ---- killing

    def run(self) -> None:
        """Kills so often, lets the run end, and compares; Broken at the first thing that does not hold."""
        self.start()
        try:
            for _ in range(self.kills):
                self.strike()
            self.wait(lambda: self.process.poll() is not None, "the end")
            if self.process.returncode:
                raise self.broken(f"the run ended with {self.process.returncode}")
        finally:
            kill_all([self.process.pid, *descendants(self.process.pid)])
            self.process.wait()

    def start(self) -> None:
        command = [sys.executable, "-m", "megacoder", "train", str(self.toml)]
        if self.way != "alone":
            command[1:2] = [
                "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                "--max-restarts", str(self.kills if self.way == "worker" else 0), "-m",
            ]  # fmt: skip
        with self.said.open("ab") as said:
            self.process = subprocess.Popen(command, stdout=said, stderr=said)

    def strike(self) -> None:
        """One kill at a random moment, and what must hold after it."""
        seen, began = self.log_identity(), time.monotonic()
        moment = self.random.choice(MOMENTS)
        if moment == "starting":
            time.sleep(self.random.uniform(0.0, self.seconds_to_start))
        else:
            self.wait(lambda: self.log_identity() != seen, "the log of a new life")
            self.seconds_to_start = time.monotonic() - began
            target = self.whole_step + self.random.randint(1, STEPS_A_LIFE)
            self.wait(lambda: self.last_step() >= target, f"step {target}")
            if left := self.leftovers & self.temporaries():
                raise self.broken(f"{min(left)} is still there after the next life has begun")
            if moment == "saving":
                self.wait(lambda: bool(self.temporaries()), "a checkpoint being written")
                time.sleep(self.random.uniform(0.0, 0.02))
            else:
                time.sleep(self.random.uniform(0.0, 0.05))
        if self.process.poll() is not None:
            raise self.broken(f"the run ended before kill {self.struck.total() + 1}; STEPS_A_KILL is too small")
        began_anew = self.log_identity() != seen
        if self.way == "worker":
            self.kill_one()
        else:
            kill_all([self.process.pid, *descendants(self.process.pid)])
            self.process.wait()
        self.struck["saving" if self.temporaries() else "training" if began_anew else "starting"] += 1
        self.check()
        if self.way != "worker":
            self.start()

    def kill_one(self) -> None:
        """Kills a rank and waits until none of its life is left."""
        self.wait(lambda: len(descendants(self.process.pid)) >= WAYS[self.way], "ranks to kill")
        ranks = descendants(self.process.pid)
        os.kill(self.random.choice(ranks), signal.SIGKILL)
        self.wait(lambda: not set(ranks) & set(descendants(self.process.pid)), "torchrun to end the other rank")

    # ---- what must hold

    def check(self) -> None:
        """After a kill: a whole checkpoint, no older than the last; a log without holes; the right point to go on."""
        root = self.folder / "checkpoints"
        step = 0
        if step_folders(root):
            try:
                reader = CheckpointReader(root)
            except CheckpointError as error:
                raise self.broken(f"no whole checkpoint: {error}") from None
            step = reader.step
            if faults := verify_checkpoint(reader.folder):
                raise self.broken(faults[0])
        if step < self.whole_step:
            raise self.broken(f"the newest whole checkpoint is of step {step}, it was {self.whole_step}")
        resumed = [int(found) for found in re.findall(r"resuming from step (\d+)", self.said.read_text())]
        if self.whole_step and resumed and resumed[-1] > step:
            raise self.broken(f"a life went on from step {resumed[-1]}, of which there is no checkpoint")
        steps = [row["step"] for row in read_metrics(self.folder / "metrics.jsonl")]
        if steps != list(range(1, len(steps) + 1)) or len(steps) < step:
            raise self.broken(f"the log has steps {steps[-5:]} at its end, the checkpoint is of {step}")
        self.repeated += len(steps) - step
        self.whole_step = step
        self.leftovers = self.temporaries()

    def compare(self, expected: Path) -> None:
        """The whole run with one that nobody disturbed."""
        if names := self.temporaries():
            raise self.broken(f"{min(names)} is left")
        ours, theirs = (rows_of(folder) for folder in (self.folder, expected))
        for row, other in zip(ours, theirs, strict=True):
            if row != other:
                raise self.broken(f"step {other['step']} was {row}, undisturbed {other}")
        reader, other_reader = (CheckpointReader(folder / "checkpoints") for folder in (self.folder, expected))
        if reader.step != other_reader.step or reader.tensors() != other_reader.tensors():
            raise self.broken("the last checkpoint is of another step, or holds other tensors")
        for kind, name in other_reader.tensors():
            if not torch.equal(reader.read_tensor(name, kind), other_reader.read_tensor(name, kind)):
                raise self.broken(f"{kind} of {name} differs")
        for part in ("num_updates", "data", "guard"):
            if reader.state[part] != other_reader.state[part]:
                raise self.broken(
                    f"{part} of the last checkpoint is {reader.state[part]}, not {other_reader.state[part]}"
                )

    # ---- looking

    def wait(self, done: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not done():
            if time.monotonic() > deadline:
                raise self.broken(f"waited {PATIENCE_SECONDS:g} s for {what}")
            if self.process.poll() is not None and not done():
                raise self.broken(f"the run ended with {self.process.returncode} before {what}")
            time.sleep(0.002)

    def log_identity(self) -> int:
        """Changes when a life has begun to log, since it writes the log anew."""
        try:
            return (self.folder / "metrics.jsonl").stat().st_ino
        except FileNotFoundError:
            return 0

    def last_step(self) -> int:
        rows = read_metrics(self.folder / "metrics.jsonl")
        return int(rows[-1]["step"]) if rows else 0

    def temporaries(self) -> set[str]:
        """Everything in the run's folder but what is meant to be there."""
        meant = re.compile(
            r"(\.lock|run\.toml|metrics\.jsonl|tensorboard(/events\.[^/]*)?|flight(/[^/]*\.json)?|checkpoints"
            r"(/latest|/step-\d{8}(/(manifest\.json|rank-\d{5}-of-\d{5}\.safetensors))?)?)"
        )
        walk = os.walk(self.folder)  # which does not mind that folders vanish
        paths = [Path(top, name) for top, folders, files in walk for name in (*folders, *files)]
        found = {str(path.relative_to(self.folder)) for path in paths}
        return {name for name in found if not meant.fullmatch(name)}

    def broken(self, what: str) -> Broken:
        said = self.said.read_text(errors="replace").strip().splitlines()[-4:]
        return Broken(f"{self.way}, after {self.struck.total()} kills: {what}; the run last said: {' | '.join(said)}")


def settings(kills: int) -> dict[str, Any]:
    """Of the run: saves are frequent, so that many kills meet one."""
    return {"steps": STEPS_A_KILL * kills + 10, "checkpoint_every": 2, "eval_every": 10**6, "log_every": 1}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The log, but for what depends on the time that things took."""
    names = ("step", "loss", "lr", "grad_norm", "tokens", "skipped_updates")
    return [{name: row[name] for name in names} for row in read_metrics(folder / "metrics.jsonl")]


def descendants(pid: int) -> list[int]:
    """Processes that `pid` has started, and those that they have."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    children = [int(word) for word in text.split()]
    return [found for child in children for found in (child, *descendants(child))]


def kill_all(pids: list[int]) -> None:
    """A power cut: nobody gets to notice that another is gone."""
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
    deadline = time.monotonic() + 10
    while any(is_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.002)


def is_alive(pid: int) -> bool:
    """Whether it runs: one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def undisturbed(case: Case, way: Way, kills: int) -> Path:
    """The folder of the same run that nobody kills."""
    toml = case.toml(f"{way}-undisturbed", **settings(kills))
    command = [sys.executable, "-m", "megacoder", "train", str(toml)]
    if WAYS[way] > 1:
        command += ["--nproc", str(WAYS[way])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Broken(f"the undisturbed run ended with {done.returncode}: {done.stderr[-500:]}")
    return case.folder / f"{way}-undisturbed"


def main(argv: list[str] | None = None) -> None:
    """Prints a line for each way; MegacoderError where something did not hold."""
    options = parse_args(Options, argv, prog="kill_test.py")
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["LOCAL_WORLD_SIZE"] = str(os.cpu_count())  # a thread for each process, however many there are
    rows = []
    with tempfile.TemporaryDirectory(prefix="kill-test-") as folder:
        case = make_case(Path(folder))
        for index, way in enumerate(options.ways):
            kills = len(range(index, options.kills, len(options.ways)))
            story = Story(case, way, kills, random.Random(f"{options.seed} {way}"))
            began = time.monotonic()
            story.run()
            story.compare(undisturbed(case, way, kills))
            row = {
                "way": way, "ranks": WAYS[way], "kills": story.struck.total(), **story.struck,
                "steps": settings(kills)["steps"], "steps_trained_again": story.repeated,
                "seconds": round(time.monotonic() - began, 1),
            }  # fmt: skip
            rows.append(row)
            if not options.json:
                print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    total = sum(row["kills"] for row in rows)
    verdict = f"{total} kills, nothing lost: checkpoints whole, steps once and in order, every bit as undisturbed"
    print(json.dumps(rows, indent=2) if options.json else verdict)


if __name__ == "__main__":
    run_tool(main)
