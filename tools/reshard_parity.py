"""Checks that changing the layout mid-run changes nothing: saves in one layout, loads in another, trains on.

    python tools/reshard_parity.py --random 30 --seed 1
    python tools/reshard_parity.py --pairs "tp=2,pp=2 > dp=3,pp=2" "pp=7 > tp=4,kv-heads=1"

A pair is two layouts of 1 to 8 ranks and one model (written with the first; see `layout_parity.py` for the keys). Both
directions are tried. For each, ranks in the first layout train and save; ranks in the second, initialized with
different weights, load. Then

- every element of weights and both moments must be, bit for bit, what the first ranks had in memory;
- two more updates must give the losses, norms, gradients and weights of one process that was never interrupted, within
  the tolerances of `layout_parity.py`.
"""

import dataclasses
import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import layout_parity
import torch
from bench_common import run_tool
from layout_parity import (
    Case,
    Slice,
    Trained,
    batches,
    case_of,
    compare,
    draw_row,
    make_engine,
    one_process,
    pipelines,
    slices,
    train,
    works,
)
from ranks import RankFailed, RankPool

from megacoder.checkpoint.reader import CheckpointReader
from megacoder.checkpoint.writer import CheckpointConfig, CheckpointWriter
from megacoder.core.config import parse_args
from megacoder.core.errors import ConfigError
from megacoder.parallel.world import World
from megacoder.train.engine import Engine
from megacoder.train.fragments import state_fragments

__all__ = ["Pair", "Report", "measure", "random_pairs"]

STEPS = 2
"""Updates before the change, and as many after it."""
MODEL = ("kv_heads", "tied", "bias", "qk_norm", "layers", "vocab", "packed", "sequences")
"""What both layouts of a pair have in common."""
CHOICES = {key: values for key, values in layout_parity.CHOICES.items() if key != "shared_memory"} | {
    "pipeline": pipelines(range(2, 9)), "dp": (1, 2, 3, 4, 6), "sequences": (24,),
}  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """Two layouts of one model."""

    first: Case
    second: Case

    @property
    def reversed(self) -> "Pair":
        """The other direction."""
        return Pair(self.second, self.first)

    @staticmethod
    def parse(text: str) -> "Pair":
        """From `tp=2,kv-heads=1 > dp=3`."""
        first, arrow, second = text.partition(">")
        if not arrow:
            raise ConfigError(f"pair {text!r}: expected two layouts with > between them")
        one = Case.parse(first)
        return Pair(one, dataclasses.replace(Case.parse(second), **{name: getattr(one, name) for name in MODEL}))

    def __str__(self) -> str:
        return f"{self.first} > {self.second}"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Changes layouts halfway and compares; exits with 1 where anything differs."""

    pairs: tuple[str, ...] = ()
    """pairs, such as "tp=2,pp=2 > dp=3\""""
    random: int = 0
    """this many random pairs besides"""
    seed: int = 0
    """of the random pairs, the weights and the tokens"""
    json: bool = False
    """print JSON instead of lines"""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What became of one direction."""

    pair: str
    elements: int
    """compared bit for bit, over weights and moments"""
    different: int
    """of them"""
    loss: float
    """largest relative difference from one process after the change"""
    gradient: float
    weight: float
    ok: bool


def random_pairs(count: int, *, seed: int) -> list[Pair]:
    """Pairs on 1 to 8 ranks each, drawn alike from all CHOICES."""
    draw = random.Random(seed)
    return [_random_pair(draw) for _ in range(count)]


def _random_pair(draw: random.Random) -> Pair:
    model = {key: draw.choice(CHOICES[key]) for key in MODEL}
    cases: list[Case] = []
    while len(cases) < 2:
        world = draw.randint(1, 8)
        for _ in range(1000):
            case = case_of({**draw_row(draw, CHOICES), **model})
            if case.world_size == world and works(case, world):
                cases.append(case)
                break
    return Pair(*cases)


def state_of(engine: Engine) -> dict[str, list[Slice]]:
    """By kind what this rank holds of weights and moments, copies included."""
    return {kind: list(slices(engine, values)) for kind, values in engine.optimizer.state().items()}


def save_case(world: World, case: Case, seed: int, root: Path) -> dict[str, list[Slice]]:
    """Trains and saves on this rank; returns what it then has in memory."""
    engine, mesh = make_engine(world, case, seed)
    train(engine, mesh, batches(case, STEPS, seed))
    engine.optimizer.traffic.wait_all()
    writer = CheckpointWriter(root, world, CheckpointConfig())
    optimizer = engine.optimizer
    fragments = list(state_fragments(engine.model, optimizer.owned, optimizer.state(), copies=False))
    writer.save(STEPS, fragments, state={"num_updates": optimizer.num_updates}, layout={"case": str(case)})
    writer.wait()
    return state_of(engine)


def load_case(world: World, case: Case, seed: int, root: Path) -> tuple[dict[str, list[Slice]], Trained]:
    """Loads on this rank over other weights, and trains on; returns what it loaded, and what it then saw."""
    engine, mesh = make_engine(world, case, seed + 1)
    reader, optimizer = CheckpointReader(root), engine.optimizer
    held = optimizer.state()
    reader.read_all(state_fragments(engine.model, optimizer.owned, held, copies=True))
    optimizer.publish_master(held["weight"])
    optimizer.num_updates = reader.state["num_updates"]
    return state_of(engine), train(engine, mesh, list(batches(case, 2 * STEPS, seed))[STEPS:])


def measure(pool: RankPool, pair: Pair, *, seed: int) -> Report:
    """One direction, on real ranks."""
    with tempfile.TemporaryDirectory(prefix="reshard-") as folder:
        saved = pool.run(pair.first.world_size, save_case, pair.first, seed, Path(folder), timeout_seconds=300.0)
        loaded = pool.run(pair.second.world_size, load_case, pair.second, seed, Path(folder), timeout_seconds=300.0)
    wholes = dict(_gather(saved))
    elements = different = 0
    covered = {key: torch.zeros(whole.shape, dtype=torch.bool) for key, whole in wholes.items()}
    for state, _ in loaded:
        for kind, parts in state.items():
            for part in parts:
                equal = part.data.view(torch.int32) == part.of(wholes[kind, part.name]).view(torch.int32)
                elements, different = elements + equal.numel(), different + int((~equal).sum())
                _put(covered[kind, part.name], part, torch.ones(part.data.shape, dtype=torch.bool))
    missing = sum(int((~mask).sum()) for mask in covered.values())
    whole_run = one_process(pair.first.alone, 2 * STEPS, seed, "float32")
    second_half = dataclasses.replace(
        whole_run, losses=whole_run.losses[STEPS:], norms=whole_run.norms[STEPS:],
        gradients=whole_run.gradients[STEPS:],
    )  # fmt: skip
    found = compare([trained for _, trained in loaded], second_half)
    return Report(
        pair=str(pair), elements=elements, different=different + missing, loss=found.loss,
        gradient=found.worst_gradient[1], weight=found.worst_weight[1],
        ok=different + missing == 0 and found.within(None),
    )  # fmt: skip


def _gather(ranks: Sequence[dict[str, list[Slice]]]) -> Iterator[tuple[tuple[str, str], torch.Tensor]]:
    """((kind, name), whole tensor) of all ranks' parts; NaN where none holds anything."""
    wholes: dict[tuple[str, str], torch.Tensor] = {}
    for state in ranks:
        for kind, parts in state.items():
            for part in parts:
                ends = [first + size for first, size in zip(part.offsets, part.sizes, strict=True)]
                known = wholes.get((kind, part.name), torch.empty([0] * len(ends)))
                shape = [max(pair) for pair in zip(ends, known.shape, strict=True)]
                if list(known.shape) != shape:
                    grown = torch.full(shape, float("nan"))
                    grown[tuple(map(slice, known.shape))] = known
                    wholes[kind, part.name] = known = grown
                _put(known, part, part.data)
    yield from wholes.items()


def _put(whole: torch.Tensor, part: Slice, values: torch.Tensor) -> None:
    """Writes what `part` holds at its place."""
    box = whole[tuple(slice(first, first + size) for first, size in zip(part.offsets, part.sizes, strict=True))]
    flat = box.flatten()
    flat[part.start : part.stop] = values
    box.copy_(flat.view(box.shape))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the pairs, both ways; 1 where one differs or fails."""
    options = parse_args(Options, argv, prog="reshard_parity.py")
    pairs = [Pair.parse(text) for text in options.pairs] + random_pairs(options.random, seed=options.seed)
    if not pairs:
        raise ConfigError('no pairs; give --pairs "tp=2 > dp=2" ... or --random 30')
    for case in (case for pair in pairs for case in (pair.first, pair.second)):
        case.check()
    torch.set_num_threads(1)
    reports = []
    with RankPool() as pool:
        for way in (way for pair in pairs for way in (pair, pair.reversed)):
            reports.append(_try(pool, way, options.seed))
            if not options.json:
                print(_line(reports[-1]), flush=True)
    failed = sum(not report["ok"] for report in reports)
    summary = (
        f"{len(pairs)} pairs, both ways: {len(reports) - failed} of {len(reports)} go on as if nothing had changed"
    )
    print(json.dumps(reports, indent=2) if options.json else summary)
    return 1 if failed else 0


def _try(pool: RankPool, pair: Pair, seed: int) -> dict[str, Any]:
    try:
        return dataclasses.asdict(measure(pool, pair, seed=seed))
    except RankFailed as error:
        return {"pair": str(pair), "ok": False, "error": str(error).splitlines()[1]}


def _line(report: dict[str, Any]) -> str:
    """A report for people."""
    if "error" in report:
        return f"FAIL {report['error']}  {report['pair']}"
    return (
        f"{'ok  ' if report['ok'] else 'FAIL'} {report['elements']:,} elements, {report['different']} differ; then "
        f"loss {report['loss']:.0e}  gradient {report['gradient']:.0e}  weight {report['weight']:.0e}  {report['pair']}"
    )


if __name__ == "__main__":
    run_tool(main)
