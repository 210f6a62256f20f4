"""`megacoder checkpoint`: what a checkpoint holds, and whether every byte of it is as it was written."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from megacoder.checkpoint.folders import checkpoints_in, find_checkpoint, latest_fault, step_folders
from megacoder.checkpoint.reader import CheckpointReader, verify_checkpoint
from megacoder.checkpoint.tensor_file import DTYPES
from megacoder.core.config import parse_args
from megacoder.core.console import table
from megacoder.core.errors import CheckpointError

__all__ = ["InspectArgs", "VerifyArgs", "inspect", "verify"]


@dataclass(frozen=True, kw_only=True)
class InspectArgs:
    """What is in a checkpoint."""

    dir: Positional[Path]
    """a checkpoint, or a run or a folder of checkpoints: then its newest complete one"""
    json: bool = False
    """print JSON instead of a table"""


@dataclass(frozen=True, kw_only=True)
class VerifyArgs:
    """Checks every byte of a checkpoint. Prints a line for each damaged file or tensor; exit code 1 if there is any."""

    dir: Positional[Path]
    """a checkpoint, or a run or a folder of checkpoints: then all of them"""


def inspect(argv: Sequence[str]) -> None:
    """Prints a checkpoint's step, layout, tensors by kind and files."""
    args = parse_args(InspectArgs, argv, prog="megacoder checkpoint inspect")
    reader = CheckpointReader(args.dir)
    by_kind: dict[str, dict[str, int]] = {}
    for (kind, _), entry in reader.tensors().items():
        totals = by_kind.setdefault(kind, {"tensors": 0, "elements": 0, "bytes": 0, "pieces": 0})
        elements = math.prod(entry.shape)
        totals["tensors"] += 1
        totals["elements"] += elements
        totals["bytes"] += elements * DTYPES[entry.dtype].itemsize
        totals["pieces"] += len(entry.pieces)
    if args.json:
        tensors = [
            {"kind": kind, "name": name, "shape": entry.shape, "dtype": entry.dtype, "pieces": len(entry.pieces)}
            for (kind, name), entry in reader.tensors().items()
        ]
        whole = {
            "folder": str(reader.folder), "step": reader.step, "layout": reader.layout, "state": reader.state,
            "kinds": by_kind, "files": reader.files, "tensors": tensors,
        }  # fmt: skip
        print(json.dumps(whole, indent=2, ensure_ascii=False))
        return
    layout = ", ".join(f"{key} {value}" for key, value in reader.layout.items())
    rows = [[kind, *(f"{total:,}" for total in totals.values())] for kind, totals in by_kind.items()]
    table(f"{reader.folder}: step {reader.step:,}; {layout}", ["kind", "tensors", "elements", "bytes", "pieces"], rows)
    table("files", ["file", "bytes"], [[name, f"{size:,}"] for name, size in reader.files.items()])


def verify(argv: Sequence[str]) -> None:
    """Prints what is wrong, a line each, and raises CheckpointError; or says that all is as it was written."""
    args = parse_args(VerifyArgs, argv, prog="megacoder checkpoint verify")
    root = checkpoints_in(args.dir)
    steps = [folder for _, folder in step_folders(root)]
    faults = []
    for folder in steps or [find_checkpoint(args.dir)]:
        found = verify_checkpoint(folder)
        if steps and not folder.is_dir():
            print(f"{folder}: removed meanwhile, by the run that writes here")
            continue
        faults += found
        print("\n".join(found or [f"{folder}: every byte is as it was written"]))
    if steps and (fault := latest_fault(root)) is not None:
        faults.append(fault)
        print(fault)
    if faults:
        raise CheckpointError(
            f"{args.dir}: damaged, as listed above; restore those files, or move the checkpoints that hold them away"
        )
