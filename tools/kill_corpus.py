"""Kills corpus builds with SIGKILL at random moments, reruns the command, and compares the output.

    python tools/kill_corpus.py --kills 20 --scratch /tmp/killed

The corpus is the planted one. Every trial has a folder of its own and different numbers of workers; `--input` gives
other repositories. Exits with 1 if any output file, including `corpus.json` with its counts, differs by a byte.
"""

import argparse
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from planted_corpus import plant

_BOMB_BYTES = 300 << 20


def tree(out: Path) -> dict[str, bytes]:
    """All files below `out`."""
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def command(args: argparse.Namespace, out: Path, workers: int) -> list[str]:
    """One build."""
    words = [sys.executable, "-m", "megacoder", "corpus", "build", "--input", str(args.input), "--out", str(out)]
    return [*words, "--benchmarks", str(args.tests), "--shard-bytes", str(args.shard_bytes), "--workers", str(workers)]


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--scratch", type=Path, required=True, help="folder for the corpora; what is there is removed")
    parser.add_argument("--input", type=Path, help="repositories; by default the planted corpus")
    parser.add_argument("--shard-bytes", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    shutil.rmtree(args.scratch, ignore_errors=True)
    args.scratch.mkdir(parents=True)
    plant(args.scratch, bomb_bytes=_BOMB_BYTES)
    args.tests, args.input = args.scratch / "tests.jsonl", args.input or args.scratch / "repos"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command(args, args.scratch / "whole", 1), **quiet)  # type: ignore[call-overload]
    seconds = until_end(process, args.scratch / "whole")
    expected = tree(args.scratch / "whole")
    rng = random.Random(args.seed)
    killed = different = 0
    while killed < args.kills:
        out = args.scratch / "killed"
        shutil.rmtree(out, ignore_errors=True)
        process = subprocess.Popen(command(args, out, rng.choice([1, 2])), **quiet)  # type: ignore[call-overload]
        until_begun(process, out)
        time.sleep(rng.uniform(0, seconds))
        process.kill()
        if process.wait() != -signal.SIGKILL:
            continue  # it had ended: no kill
        killed += 1
        left = len(list((out / "work").glob("*")))
        subprocess.run(command(args, out, rng.choice([1, 2])), check=True, **quiet)  # type: ignore[call-overload]
        same = tree(out) == expected
        different += not same
        print(f"kill {killed}: {left} files of work were there; {'identical' if same else 'DIFFERENT'}", flush=True)
    print(f"{killed} kills, {killed - different} identical, {different} different; {len(expected)} files each")
    sys.exit(different > 0)


if __name__ == "__main__":
    main()
