"""The machine's own limit: our ranks do their arithmetic at the same time and never communicate.

Our engine unchanged, on a process group without other ranks: each collective and transfer ends as it begins. A rank
receives its own tensors instead of the others', so that all values stay ordinary, although no model has them.
"""

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from contenders import megacoder
from contenders.job import Step
from megacoder.parallel import buckets, tensor
from megacoder.parallel.collectives import Pending

__all__ = ["build"]


def build(job_json: dict[str, Any]) -> Step:
    """As `contenders.megacoder`, whose variants it has; needs the backend `apart`."""
    for module in (buckets, tensor):  # where it is an exchange and a sum of one's own: neither is arithmetic of a step
        vars(module)["start_reduce_scatter_sum"] = _keep
    return megacoder.build(job_json)


def _keep(shard: Tensor, full: Tensor, group: dist.ProcessGroup) -> Pending:
    """In place of a reduce-scatter: this rank's own terms."""
    if shard.untyped_storage().data_ptr() != full.untyped_storage().data_ptr():
        shard.copy_(full.chunk(dist.get_world_size(group))[dist.get_rank(group)])
    return Pending(shard)


class _Done(dist.Work):
    """Work that was never any."""

    def wait(self, timeout: Any = None) -> bool:
        return True

    def get_future(self) -> Future:
        future: Future = Future()
        future.set_result(None)
        return future


class _Apart(dist.ProcessGroup):
    """A process group of ranks that do not know of each other."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]

    def getBackendName(self) -> str:
        return "apart"

    def allreduce(self, tensors: Any, options: Any = None) -> dist.Work:  # type: ignore[override]
        return _Done()

    def broadcast(self, tensors: Any, options: Any = None) -> dist.Work:  # type: ignore[override]
        return _Done()

    def barrier(self, options: Any = None) -> dist.Work:
        return _Done()

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> dist.Work:
        return _Done()

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> dist.Work:
        for received in tensors:
            received.fill_(0.01)
        return _Done()

    def _allgather_base(self, full: Tensor, part: Tensor, options: Any = None) -> dist.Work:
        if part.untyped_storage().data_ptr() != full.untyped_storage().data_ptr():
            for place in full.chunk(self.size()):
                place.copy_(part)
        return _Done()

    all_gather_single = _allgather_base  # type: ignore[assignment]  # torch 2.13 calls it so


dist.Backend.register_backend("apart", lambda store, rank, size, timeout: _Apart(rank, size), devices=["cpu"])
