"""Compares the weights that several ranks hold, to find a rank with faulty memory or arithmetic.

ZeRO-1 gives every data-parallel rank the weights that their owners computed, so replicas are bitwise equal; nothing
else in training would notice if they were not. Every so many steps each rank computes a digest of each weight that it
holds; ranks that hold the same part of the same weight (over data and context parallel ranks; norms also over
tensor-parallel ones, but see `_digests`) must have the same digest. They are compared between a step's last backward
and its update: the update would replace a wrong copy, but not undo the effect of its gradients. (On a CPU the owner's
bf16 copy is half of its master weights, so a bit flipped there would reach all copies at the next update.)

Steps that end with a checkpoint are compared too. So a lasting fault is found before anything that it has touched is
saved, and a restart, by torchrun or by hand, goes back to weights that it never reached. A bit flip that is gone after
one step, or one in the owner's bf16 copy on a CPU, is seen only if that very step is compared; with
`compare_replicas_every = 1` all steps are.

A digest is the sum of the elements' bit patterns, each times its own odd number, modulo 2^64. It is in integers, so the
order of summation does not matter, and a difference in any single element is certain to show.
"""

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

from megacoder.model.transformer import weight_pieces
from megacoder.parallel.world import gather_json
from megacoder.train.engine import Engine
from megacoder.train.guard import RunStopped

__all__ = ["ReplicaCheck", "digest"]

_AT_ONCE = 1 << 24
"""Elements widened to 64 bits at a time."""


class ReplicaCheck:
    """Compares the weights of all ranks; every rank makes one and makes the same calls."""

    def __init__(self, engine: Engine, every: int, *, since: int) -> None:
        """`every`: steps between comparisons, 0 for none. `since`: the step that the run resumes from."""
        self.engine, self.every = engine, every
        self._last_equal = since

    def maybe_compare(self, step: int, *, saves: bool) -> None:
        """Compares if `step` is due or `saves` a checkpoint; RunStopped names the ranks and the weight that differ.

        Called before the update, which would replace a wrong copy before anyone saw it.
        """
        world = self.engine.mesh.world
        if self.every == 0 or world.group is None or not (saves or step % self.every == 0):
            return
        world.journal.at("comparing replicas")
        self.engine.optimizer.traffic.wait_all()
        faults = list(_faults(gather_json(dict(_digests(self.engine)), world)))
        if faults:
            more = f" (and {len(faults) - 1} more weights)" if len(faults) > 1 else ""
            raise RunStopped(
                f"step {step}: {faults[0]}{more}: a device, its memory or a link is faulty; leave that host out (but "
                "where you have changed a layer, see `weight_pieces` in model/transformer.py). The "
                f"same command resumes from the newest checkpoint, taken while replicas were equal (last in step "
                f"{self._last_equal})",
                restart_helps=True,
            )
        self._last_equal = step


@torch.no_grad()
def _digests(engine: Engine) -> Iterator[tuple[str, int]]:
    """(which part of which weight, its digest) for all that this rank holds.

    Copies along the tensor and pipeline axes are not replicas: each comes from its own group's sums of gradients. Those
    are equal if terms are added in rank order, as on CPUs, or if there are only two. NCCL may add three or more in a
    different order in each group, and copies then drift apart by rounding: each group is compared by itself.
    """
    mesh = engine.mesh
    adds_freely = mesh.world.device.type == "cuda" and mesh.dims.dp * mesh.dims.cp > 2
    group = f" (tp rank {mesh.place.tp}, pp rank {mesh.place.pp})" if adds_freely else ""
    pieces = list(weight_pieces(engine.model))
    values = torch.stack([digest(piece.view) for piece in pieces]).tolist()  # one wait for the device
    for piece, value in zip(pieces, values, strict=True):
        part = "" if piece.shard.local_shape == piece.shard.shape else f", part at {list(piece.shard.offsets)}"
        yield piece.hf_name + part + group, value


def digest(values: Tensor) -> Tensor:
    """int64 scalar on the device of `values` (fp32, bf16 or any other of 1 to 4 bytes; contiguous)."""
    bits = values.reshape(-1).view({1: torch.int8, 2: torch.int16, 4: torch.int32}[values.itemsize])
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for start in range(0, len(bits), _AT_ONCE):
        chunk = bits[start : start + _AT_ONCE].long()
        total += (torch.arange(start, start + len(chunk), device=values.device).mul_(2).add_(1).mul_(chunk)).sum()
    return total


def _faults(digests: list[dict[str, int]]) -> Iterator[str]:
    """A line per weight that ranks hold differently: those in the minority differ from the others."""
    holders: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, of_rank in enumerate(digests):
        for name, value in of_rank.items():
            holders[name][value].append(rank)
    for name, by_value in holders.items():
        right, *wrong = sorted(by_value.values(), key=lambda ranks: (-len(ranks), ranks))
        if wrong:
            odd = sorted(rank for ranks in wrong for rank in ranks)
            verdict = "differs from" if len(odd) == 1 else "differ from"
            yield f"{name} of {_ranks(odd)} {verdict} that of {_ranks(right)}"


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
