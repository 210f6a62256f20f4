"""Checks that a layout equals one process: trains a tiny model both ways, compares losses, norms, gradients, weights.

    python tools/layout_parity.py --layouts "tp=2,pp=2,dp=2" "pp=4,schedule=zbv,recompute=full"
    python tools/layout_parity.py --random 20 --seed 7 --world 8
    python tools/layout_parity.py --pairwise

A layout is written as `key=value` pairs, on and off for switches; the keys, each with a default:
tp cp pp dp, schedule, chunks, sequence-parallel, block (scheduled, plain), recompute (none, norms, selective, full),
and of the model kv-heads (1, 2, 4), tied, bias (of queries, keys and values), qk-norm, layers, vocab; packed
(documents within a sequence do not see each other) and sequences (of an update, two of them a microbatch);
shared-memory=off sends layers', stages' and gradients' tensors through sockets, as between hosts.

Every rank starts from the seed's weights and takes its share of the same batches, on gloo. After each step its slices
of the gradients, and at the end its slices of the weights, are compared with those of one process. A difference is
|found - expected| / |expected|, norms over one weight; NaN counts as infinitely different. In fp32 the loss must
agree within 1e-5 and every gradient within 1e-4; in bf16 errors against one process in fp32 must be at most twice those
of one process in bf16. For loss and gradient norm, half a unit in the last place of bf16 is allowed too: a single
number of the one process may be right by chance.
"""

import dataclasses
import functools
import itertools
import json
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from bench_common import run_tool
from ranks import RankFailed, RankPool

from megacoder.core.config import did_you_mean, from_dict, parse_args
from megacoder.core.errors import ConfigError
from megacoder.data.stream import Batch
from megacoder.model.config import ModelConfig
from megacoder.model.partition import ExecutionConfig
from megacoder.ops.adamw import AdamWConfig
from megacoder.ops.cross_entropy import IGNORE_INDEX
from megacoder.parallel.config import ParallelConfig
from megacoder.parallel.mesh import Mesh
from megacoder.parallel.schedules.generators import SCHEDULES
from megacoder.parallel.world import World
from megacoder.train.engine import Engine
from megacoder.train.fragments import state_fragments
from megacoder.train.layout import LayoutRequest

__all__ = ["Case", "Difference", "compare", "train_case"]

SEQ_LENGTH, MICRO_BATCH = 16, 2
LOSS_TOLERANCE, TOLERANCE = 1e-5, 1e-4
BF16_ROUNDING = torch.finfo(torch.bfloat16).eps / 2
BUCKET_ELEMENTS = 10_000
"""A layer of the tiny model or two, so that gradients leave in several buckets."""
OPTIMIZER = AdamWConfig(eps=1e-4)
"""With the usual eps Adam's first update is the gradient's sign, so that an element that rounds about zero moves all
the way up here and down there: what a later step differs by then says nothing about the layout."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layout and the model in it."""

    tp: int = 1
    cp: int = 1
    pp: int = 1
    dp: int = 1
    schedule: str = "1f1b"
    chunks: int | None = None
    sequence_parallel: bool = True
    block: str = "scheduled"
    recompute: str = "none"
    kv_heads: int = 4
    tied: bool = False
    bias: bool = False
    qk_norm: bool = False
    layers: int = 8
    vocab: int = 93
    packed: bool = False
    sequences: int = 16
    shared_memory: bool = True

    @property
    def world_size(self) -> int:
        """Ranks that it takes."""
        return self.tp * self.cp * self.pp * self.dp

    @property
    def alone(self) -> "Case":
        """The same model on one process, in the plainest way: the layers' own forward under autograd."""
        return Case(
            block="plain", kv_heads=self.kv_heads, tied=self.tied, bias=self.bias, qk_norm=self.qk_norm,
            layers=self.layers, vocab=self.vocab, packed=self.packed, sequences=self.sequences,
        )  # fmt: skip

    def request(self) -> LayoutRequest:
        """What the library is asked for."""
        names = {spec.name for spec in dataclasses.fields(ParallelConfig)}
        table = {key: value for key, value in vars(self).items() if key in names and value is not None}
        return LayoutRequest(
            model=ModelConfig(
                vocab_size=self.vocab, vocab_multiple=32, hidden_size=32, intermediate_size=48, num_attention_heads=4,
                num_hidden_layers=self.layers, num_key_value_heads=self.kv_heads, head_dim=8, init_std=0.1,
                tie_word_embeddings=self.tied, qkv_bias=self.bias, qk_norm=self.qk_norm,
                max_position_embeddings=SEQ_LENGTH,
            ),
            parallel=from_dict(ParallelConfig, table, where=str(self)),
            seq_length=SEQ_LENGTH, global_batch_size=self.sequences, micro_batch_size=MICRO_BATCH,
            execution=self.execution(),
        )  # fmt: skip

    def execution(self) -> ExecutionConfig:
        """How layers run."""
        return from_dict(ExecutionConfig, {"block": self.block, "recompute": self.recompute}, where=str(self))

    def check(self) -> None:
        """ConfigError unless the library takes it."""
        self.request().layout(self.world_size)

    def __str__(self) -> str:
        words = []
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            if value != spec.default:
                shown = ("off", "on")[value] if isinstance(value, bool) else value
                words.append(f"{spec.name.replace('_', '-')}={shown}")
        return ",".join(words) or "dp=1"

    @staticmethod
    def parse(text: str) -> "Case":
        """From `tp=2,pp=2,tied=on`; ConfigError quotes what it does not know."""
        specs = {spec.name.replace("_", "-"): spec for spec in dataclasses.fields(Case)}
        values: dict[str, Any] = {}
        for word in filter(None, (word.strip() for word in text.split(","))):
            key, _, value = word.partition("=")
            if key not in specs:
                raise ConfigError(f"layout {text!r}: unknown key {key!r}{did_you_mean(key, specs)}")
            default = specs[key].default
            if isinstance(default, bool):
                if value not in ("on", "off"):
                    raise ConfigError(f"layout {text!r}: {key} = {value!r}: expected on or off")
                values[specs[key].name] = value == "on"
            elif isinstance(default, str):
                values[specs[key].name] = value
            elif value.isdecimal():
                values[specs[key].name] = int(value)
            else:
                raise ConfigError(f"layout {text!r}: {key} = {value!r}: expected a number")
        return Case(**values)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compares layouts with one process; exits with 1 where one differs."""

    layouts: tuple[str, ...] = ()
    """layouts, such as tp=2,pp=2,schedule=zbv"""
    random: int = 0
    """this many random layouts besides"""
    pairwise: bool = False
    """every two choices of options together at least once, on up to 16 ranks"""
    seed: int = 0
    """of the random layouts, the weights and the tokens"""
    world: int = 8
    """ranks of random layouts, at most 16"""
    steps: int = 3
    """updates"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """of weights and activations"""
    json: bool = False
    """print JSON instead of a table"""


@dataclass(frozen=True)
class Slice:
    """What a rank holds of one weight or of its gradient: elements [start, stop) of a box of it, flattened."""

    name: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int
    stop: int
    data: torch.Tensor

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """The same elements of a whole tensor."""
        box = whole[tuple(slice(first, first + size) for first, size in zip(self.offsets, self.sizes, strict=True))]
        return box.flatten()[self.start : self.stop]


@dataclass(frozen=True)
class Trained:
    """What one rank saw."""

    losses: list[float]
    norms: list[float]
    gradients: list[list[Slice]]
    """of each step"""
    weights: list[Slice]
    """at the end"""


@dataclass
class Difference:
    """The largest relative differences of a layout from one process."""

    loss: float = 0.0
    norm: float = 0.0
    gradients: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)

    @property
    def worst_gradient(self) -> tuple[str, float]:
        return max(self.gradients.items(), key=lambda item: item[1])

    @property
    def worst_weight(self) -> tuple[str, float]:
        return max(self.weights.items(), key=lambda item: item[1])

    def within(self, other: "Difference | None") -> bool:
        """Whether it is small enough: for fp32 as such, for bf16 beside what one process differs by."""
        if other is None:
            gradients = max(self.worst_gradient[1], self.worst_weight[1])
            return max(self.loss, self.norm) <= LOSS_TOLERANCE and gradients <= TOLERANCE
        pairs = [(total(self.gradients), total(other.gradients)), (total(self.weights), total(other.weights))]
        norm = max(other.norm, total(other.gradients) / 2)  # the norm alone may be met by chance
        numbers = [(self.loss, other.loss), (self.norm, norm)]
        return all(found <= 2 * alone for found, alone in pairs) and all(
            found <= max(2 * alone, BF16_ROUNDING) for found, alone in numbers
        )


def total(differences: dict[str, float]) -> float:
    """Root mean square over weights."""
    return (sum(value**2 for value in differences.values()) / len(differences)) ** 0.5


def batches(case: Case, steps: int, seed: int) -> Iterator[Batch]:
    """The global batches of all steps; labels are ignored here and there, as at the ends of documents."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        windows = torch.randint(0, case.vocab, (case.sequences, SEQ_LENGTH + 1), generator=generator)
        starts = torch.rand(case.sequences, SEQ_LENGTH + 1, generator=generator) < 0.2
        labels = windows[:, 1:].masked_fill(starts[:, 1:], IGNORE_INDEX)
        starts[:, 0] = True
        yield Batch(tokens=windows[:, :-1], labels=labels, starts=starts[:, :-1] if case.packed else None)


def share(batch: Batch, mesh: Mesh) -> Batch:
    """The sequences of this rank's replica, dealt out as `megacoder.data.stream` does."""
    rows = slice(mesh.place.dp, None, mesh.dims.dp)
    starts = None if batch.starts is None else batch.starts[rows]
    return Batch(tokens=batch.tokens[rows], labels=batch.labels[rows], starts=starts)


def make_engine(world: World, case: Case, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Engine, Mesh]:
    """This rank's share of the model, drawn from `seed`."""
    request = case.request()
    layout = request.layout(world.size)
    world = World(
        world.rank, world.size, world.local_rank, world.device, world.group, shared_memory=case.shared_memory
    )  # fmt: skip
    mesh = Mesh(world, layout.dims, sequence_parallel=request.parallel.sequence_parallel)
    engine = Engine(
        request.model, layout, mesh,
        execution=case.execution(), bucket_elements=BUCKET_ELEMENTS, optimizer=OPTIMIZER, dtype=dtype, seed=seed,
    )  # fmt: skip
    return engine, mesh


def train_case(world: World, case: Case, steps: int, seed: int, dtype: str) -> Trained:
    """Trains on this rank; returns what it holds."""
    return train(*make_engine(world, case, seed, getattr(torch, dtype)), batches(case, steps, seed))


def train(engine: Engine, mesh: Mesh, global_batches: Iterable[Batch]) -> Trained:
    """An update on this rank's share of each."""
    losses, norms, gradients = [], [], []
    for batch in global_batches:
        part = engine.forward_backward(engine.microbatches(share(batch, mesh), MICRO_BATCH))
        loss, num_tokens = engine.sum_losses(part)
        gradients.append(list(slices(engine, engine.optimizer.gradients() / num_tokens)))
        norms.append(engine.update(lr=1e-3, num_tokens=int(num_tokens), max_grad_norm=1.0))
        losses.append(loss / num_tokens)
    return Trained(losses, norms, gradients, list(slices(engine, engine.optimizer.state()["weight"])))


def slices(engine: Engine, values: torch.Tensor) -> Iterator[Slice]:
    """This rank's part of every weight, copies included, from `values` of the optimizer's own elements."""
    for part in state_fragments(engine.model, engine.optimizer.owned, {"weight": values}, copies=True):
        yield Slice(part.name, part.region.offsets, part.region.sizes, part.start, part.stop, part.data.clone())


@functools.lru_cache(maxsize=64)
def one_process(case: Case, steps: int, seed: int, dtype: str) -> Trained:
    """The run that others are compared with; its slices are whole weights."""
    return train_case(World(0, 1, 0, torch.device("cpu"), None), case, steps, seed, dtype)


def compare(ranks: Sequence[Trained], expected: Trained) -> Difference:
    """All ranks' slices against one process's; ValueError where together they are not whole weights."""
    result = Difference()
    for found in ranks:
        for kind in ("loss", "norm"):
            pairs = zip(getattr(found, _PLURAL[kind]), getattr(expected, _PLURAL[kind]), strict=True)
            worst = max(_ratio(abs(value - other), abs(other)) for value, other in pairs)
            setattr(result, kind, max(getattr(result, kind), worst))
    for step, whole in enumerate(expected.gradients):
        for name, value in _relative([rank.gradients[step] for rank in ranks], whole).items():
            result.gradients[name] = max(result.gradients.get(name, 0.0), value)
    result.weights = _relative([rank.weights for rank in ranks], expected.weights)
    return result


_PLURAL = {"loss": "losses", "norm": "norms"}


def _relative(ranks: Sequence[Sequence[Slice]], expected: Sequence[Slice]) -> dict[str, float]:
    """By name, the error of all ranks' parts over the size of the whole, averaged where several ranks hold the same."""
    wholes = {part.name: part.data.view(part.sizes) for part in expected}
    squares = {name: torch.zeros(whole.shape, dtype=torch.float64) for name, whole in wholes.items()}
    holders = {name: torch.zeros(whole.shape, dtype=torch.int64) for name, whole in wholes.items()}
    for part in (part for rank in ranks for part in rank):
        box = tuple(slice(first, first + size) for first, size in zip(part.offsets, part.sizes, strict=True))
        error = torch.zeros(part.sizes, dtype=torch.float64)
        error.view(-1)[part.start : part.stop] = (part.data - part.of(wholes[part.name])).double().pow(2)
        squares[part.name][box] += error
        held = torch.zeros(part.sizes, dtype=torch.int64)
        held.view(-1)[part.start : part.stop] = 1
        holders[part.name][box] += held
    missing = [name for name, count in holders.items() if not count.all()]
    if missing:
        raise ValueError(f"no rank holds all of {', '.join(missing)}")
    return {
        name: _ratio((squares[name] / holders[name]).sum().item() ** 0.5, whole.double().norm().item())
        for name, whole in wholes.items()
    }


def _ratio(error: float, size: float) -> float:
    """error / size; infinite where it is no number, so that it passes no comparison and is no maximum's loser."""
    if error == 0.0:
        return 0.0
    return math.inf if math.isnan(error) or size == 0.0 else error / size


def pipelines(sizes: Iterable[int]) -> tuple[tuple[int, str], ...]:
    """No pipeline, or every schedule on so many stages."""
    return ((1, "1f1b"), *((pp, schedule) for pp in sizes for schedule in SCHEDULES))


CHOICES: dict[str, tuple[Any, ...]] = {
    "tp": (1, 2, 4),
    "pipeline": pipelines((2, 4)),
    "dp": (1, 2),
    "cp": (1, 2),
    "sequence_parallel": (False, True),
    "block": ("scheduled", "plain"),
    "recompute": ("none", "norms", "selective", "full"),
    "kv_heads": (1, 2, 4),
    "tied": (False, True),
    "bias": (False, True),
    "qk_norm": (False, True),
    "layers": (8, 7),
    "vocab": (93, 40),
    "packed": (False, True),
    "sequences": (16, 4),
    "shared_memory": (True, False),
}
"""What random and pairwise cases choose from. Seven layers divide into no number of stages; of 40 ids, padded to 64,
the last of four ranks has none; four sequences are fewer microbatches than stages, or one alone."""

Row = dict[str, Any]


def draw_row(draw: random.Random, choices: Mapping[str, Sequence[Any]] = CHOICES) -> Row:
    """One of each, all alike."""
    return {key: draw.choice(values) for key, values in choices.items()}


def case_of(row: Row) -> Case:
    """The case of one choice each."""
    pp, schedule = row["pipeline"]
    return Case(pp=pp, schedule=schedule, **{key: value for key, value in row.items() if key != "pipeline"})


def works(case: Case, world: int) -> bool:
    """Whether the library takes it on at most `world` ranks."""
    try:
        case.check()
    except ConfigError:
        return False
    return case.world_size <= world


def random_cases(count: int, *, seed: int, world: int) -> list[Case]:
    """Layouts of `world` ranks that work, drawn alike from all CHOICES."""
    draw = random.Random(seed)
    drawn = (case_of(draw_row(draw)) for _ in itertools.count())
    return list(itertools.islice((case for case in drawn if case.world_size == world and works(case, world)), count))


def pairwise_cases(world: int = 16, seed: int = 0) -> list[Case]:
    """Few cases in which every two choices that can go together meet at least once (greedy, the same every time)."""
    draw = random.Random(seed)
    missing = {
        ((one, first), (other, second))
        for one, other in itertools.combinations(CHOICES, 2)
        for first in CHOICES[one]
        for second in CHOICES[other]
    }
    cases = []
    while missing:
        (one, first), (other, second) = min(missing, key=repr)
        fixed = {one: first, other: second}
        rows = [{**draw_row(draw), **fixed} for _ in range(100)]
        rows = [row for row in rows if works(case_of(row), world)]
        if not rows:
            missing.remove(((one, first), (other, second)))
            continue
        best = max(rows, key=lambda row: len(missing & pairs(row)))
        missing -= pairs(best)
        cases.append(case_of(best))
    return cases


def pairs(row: Row) -> set[Any]:
    """Every two choices of a row."""
    return set(itertools.combinations(row.items(), 2))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the cases; 1 where a layout differs or fails."""
    options = parse_args(Options, argv, prog="layout_parity.py")
    cases = [Case.parse(text) for text in options.layouts]
    if options.random:
        cases += random_cases(options.random, seed=options.seed, world=options.world)
    if options.pairwise:
        cases += pairwise_cases()
    if not cases:
        raise ConfigError('no layouts; give --layouts "tp=2,pp=2" ..., --random 20 or --pairwise')
    for case in cases:  # what cannot work is said before anything runs
        case.check()
    torch.set_num_threads(1)
    rows = []
    with RankPool() as pool:
        for case in cases:
            rows.append(measure(pool, case, options))
            if not options.json:
                print(line(rows[-1]), flush=True)
    failed = sum(not row["ok"] for row in rows)
    print(json.dumps(rows, indent=2) if options.json else f"{len(rows) - failed} of {len(rows)} equal one process")
    return 1 if failed else 0


def measure(pool: RankPool, case: Case, options: Options) -> dict[str, Any]:
    """One row of the report."""
    settings = (options.steps, options.seed)
    exact = one_process(case.alone, *settings, "float32")
    try:
        ranks = pool.run(case.world_size, train_case, case, *settings, options.dtype, timeout_seconds=300.0)
    except RankFailed as error:
        return {"layout": str(case), "ok": False, "error": str(error).splitlines()[1]}
    found = compare(ranks, exact)
    limit = None
    if options.dtype == "bfloat16":
        limit = compare([one_process(case.alone, *settings, "bfloat16")], exact)
    return {
        "layout": str(case), "ok": found.within(limit), "loss": found.loss, "norm": found.norm,
        "gradient": found.worst_gradient[1], "worst_gradient": found.worst_gradient[0],
        "weight": found.worst_weight[1], "worst_weight": found.worst_weight[0],
    }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    if "error" in row:
        return f"FAIL {row['error']}  {row['layout']}"
    return (
        f"{'ok  ' if row['ok'] else 'FAIL'} loss {row['loss']:.0e}  norm {row['norm']:.0e}  gradient "
        f"{row['gradient']:.0e} ({row['worst_gradient']})  weight {row['weight']:.0e}  {row['layout']}"
    )


if __name__ == "__main__":
    run_tool(main)
