"""Kills corpus builds with SIGKILL at random moments, reruns the command, and compares the output.

    python tools/kill_corpus.py --kills 20 --scratch /tmp/killed

The corpus is the planted one. Every trial has a folder of its own and different numbers of workers; `--input` gives
other repositories. Exits with 1 if any output file, including `corpus.json` with its counts, differs by a byte.
"""

import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from bench_common import run_tool
from planted_corpus import plant

from megacoder.core.config import parse_args

_BOMB_BYTES = 300 << 20


@dataclass(frozen=True, kw_only=True)
class Options:
    """Kills corpus builds, and compares what comes of them."""

    kills: int = 20
    """how many"""
    scratch: Path
    """folder for the corpora; what is there is removed"""
    input: Path | None = None
    """repositories; by default the planted corpus"""
    shard_bytes: int = 20_000
    """as for the build"""
    seed: int = 0
    """of the moments"""


def tree(out: Path) -> dict[str, bytes]:
    """All files below `out`."""
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def command(options: Options, out: Path, workers: int) -> list[str]:
    """One build."""
    repos, tests = options.input or options.scratch / "repos", options.scratch / "tests.jsonl"
    words = [sys.executable, "-m", "megacoder", "corpus", "build", "--input", str(repos), "--out", str(out)]
    return [*words, "--benchmarks", str(tests), "--shard-bytes", str(options.shard_bytes), "--workers", str(workers)]


def until_begun(process: subprocess.Popen[bytes], out: Path) -> None:
    """Waits until the build has its folder: before that there is nothing to go on from."""
    while process.poll() is None and not out.exists():
        time.sleep(0.005)


def until_end(process: subprocess.Popen[bytes], out: Path) -> float:
    """Seconds from the folder's appearance to the end of a build that must not fail."""
    until_begun(process, out)
    begun = time.monotonic()
    if process.wait():
        sys.exit("the uninterrupted build failed")
    return time.monotonic() - begun


def main() -> None:
    options = parse_args(Options, None, prog="kill_corpus.py")
    shutil.rmtree(options.scratch, ignore_errors=True)
    options.scratch.mkdir(parents=True)
    plant(options.scratch, bomb_bytes=_BOMB_BYTES)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command(options, options.scratch / "whole", 1), **quiet)  # type: ignore[call-overload]
    seconds = until_end(process, options.scratch / "whole")
    expected = tree(options.scratch / "whole")
    rng = random.Random(options.seed)
    killed = different = 0
    while killed < options.kills:
        out = options.scratch / "killed"
        shutil.rmtree(out, ignore_errors=True)
        process = subprocess.Popen(command(options, out, rng.choice([1, 2])), **quiet)  # type: ignore[call-overload]
        until_begun(process, out)
        time.sleep(rng.uniform(0, seconds))
        process.kill()
        if process.wait() != -signal.SIGKILL:
            continue  # it had ended: no kill
        killed += 1
        left = len(list((out / "work").glob("*")))
        subprocess.run(command(options, out, rng.choice([1, 2])), check=True, **quiet)  # type: ignore[call-overload]
        same = tree(out) == expected
        different += not same
        print(f"kill {killed}: {left} files of work were there; {'identical' if same else 'DIFFERENT'}", flush=True)
    print(f"{killed} kills, {killed - different} identical, {different} different; {len(expected)} files each")
    sys.exit(different > 0)


if __name__ == "__main__":
    run_tool(main)
