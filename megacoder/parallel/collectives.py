"""The one module that talks to torch.distributed: NCCL on GPUs, gloo on CPUs, nothing at all in a world of one.

CPU ranks of one host share memory, and their most frequent operations go through it (`megacoder.parallel.
shared_memory`): all-reduce, all-gather, reduce-scatter, send and receive.

Every collective takes its group as an argument. `group=None` means a world of one: each function is then the identity,
so that callers have a single code path.

Each collective notes its start in the rank's journal (`megacoder.parallel.journal`); a network failure is raised as
RankLost.
"""

import datetime
import json
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.constants import default_pg_timeout

from megacoder.core.errors import AlikeOnAllRanks, ConfigError, MegacoderError, RankLost
from megacoder.parallel.attempt import agree_on_attempt
from megacoder.parallel.journal import GroupNote, Journal, Operation
from megacoder.parallel.one_host import share_memory
from megacoder.parallel.shared_memory import Transfer, add_up

__all__ = [
    "Pending",
    "World",
    "all_gather_into",
    "all_reduce_sum",
    "barrier",
    "broadcast_from_first",
    "connect_store",
    "failing_together",
    "flight_record",
    "gather_json",
    "group_rank",
    "group_size",
    "journal_of",
    "launched_ranks",
    "new_group",
    "reduce_scatter_sum",
    "start_all_gather",
    "start_all_reduce_sum",
    "start_receive",
    "start_reduce_scatter_sum",
    "start_send",
    "start_world",
    "sum_with_peer",
]


# torch 2.13 deprecates the `_tensor` names, the only ones that 2.11 has.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_notes: weakref.WeakKeyDictionary[dist.ProcessGroup, GroupNote] = weakref.WeakKeyDictionary()
"""Would be an attribute of each group, if torch's class allowed attributes."""

NCCL_MARGIN_SECONDS = 60.0
"""NCCL's own watchdog, which aborts the process without our error line, gets this much longer than the time-out."""


class World:
    """This process's place among the ranks of a run; `group` is None in a world of one."""

    def __init__(
        self,
        rank: int,
        size: int,
        local_rank: int,
        device: torch.device,
        group: dist.ProcessGroup | None,
        *,
        timeout: datetime.timedelta | None = None,
        shared_memory: bool = True,
        attempt: str = "",
    ) -> None:
        """All ranks of `group` call it at once.

        `timeout` is that of `group`, and of the groups made from its ranks; None is torch's default. Without
        `shared_memory` CPU ranks communicate through sockets even on one host. `attempt` names this start of the run
        (see `megacoder.parallel.attempt`).
        """
        self.rank, self.size, self.local_rank, self.device, self.group = rank, size, local_rank, device, group
        self.timeout, self.shared_memory, self.attempt = timeout, shared_memory, attempt
        self.journal = journal_of(group)
        """what this rank is doing; one journal for every World and group of the process"""
        if group is not None:
            _share_memory(group, self)

    @property
    def is_first(self) -> bool:
        """Whether this rank acts for the run: prints, logs, writes."""
        return self.rank == 0

    def close(self) -> None:
        """Leaves the process group; call at the end of a successful run."""
        if self.group is not None:
            dist.destroy_process_group()


class Pending:
    """A tensor still in use by a collective, send or receive in flight; compute meanwhile, then `wait` for it."""

    __slots__ = ("_finish", "_operation", "_result", "_work")

    def __init__(
        self,
        result: Tensor,
        work: dist.Work | Transfer | None = None,
        operation: Operation | None = None,
        finish: Callable[[], None] | None = None,
    ) -> None:
        """`operation` is what `work` does; `finish` is what remains to be computed once it is done."""
        self._result, self._work, self._operation, self._finish = result, work, operation, finish

    def wait(self) -> Tensor:
        """The result; on a GPU the current stream waits, not the host."""
        if self._work is not None:
            assert self._operation is not None
            with self._operation:
                self._work.wait()
            self._work = None
        if self._finish is not None:
            self._finish()
            self._finish = None
        return self._result


def launched_ranks() -> int | None:
    """How many ranks torchrun has started, including this one; None for a process that is not a torchrun rank.

    ConfigError where torchrun's environment variables are incomplete, as when a job script sets some of them by hand.
    """
    env = os.environ
    if "WORLD_SIZE" not in env:
        return None
    numbers = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")
    missing = [name for name in (*numbers, "MASTER_ADDR") if not env.get(name)]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE = {env['WORLD_SIZE']!r} is set, but not {', '.join(missing)}: start ranks with torchrun, "
            "which sets them all, or unset WORLD_SIZE"
        )
    for name in numbers:
        if not env[name].isdecimal():
            raise ConfigError(f"{name} = {env[name]!r}: expected a number, as torchrun sets it")
    size, rank = int(env["WORLD_SIZE"]), int(env["RANK"])
    if rank >= size:
        raise ConfigError(f"RANK = {rank}, but WORLD_SIZE = {size}: ranks are counted from 0")
    return size


def start_world(
    device_type: str, *, timeout_seconds: float = 600.0, join_seconds: float = 60.0, shared_memory: bool = True
) -> World:
    """Joins the ranks that torchrun started (its environment variables), or makes a world of one without them.

    Other ranks may start up to `join_seconds` later, even if that is more than `timeout_seconds`, the collectives'
    time-out. ConfigError as `launched_ranks`.
    """
    num_launched = launched_ranks()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if device_type == "cuda" else torch.device("cpu")
    if device_type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise MegacoderError(
                f"rank {local_rank} of this node has no GPU: {torch.cuda.device_count()} found; start fewer processes"
            )
        torch.cuda.set_device(device)
    if num_launched is None:
        return World(0, 1, 0, device, None)
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # the flight recorder is off by default in some versions
    margin = NCCL_MARGIN_SECONDS if device_type == "cuda" else 0.0
    timeout = datetime.timedelta(seconds=timeout_seconds + margin)
    try:
        join_timeout = max(timeout, datetime.timedelta(seconds=join_seconds))
        store, rank, size = next(dist.rendezvous("env://", timeout=join_timeout))
        store.set_timeout(join_timeout)
        attempt = agree_on_attempt(
            dist.PrefixStore("megacoder/start", store), rank, size, timeout_seconds=join_timeout.total_seconds()
        )
        dist.init_process_group(
            "nccl" if device_type == "cuda" else "gloo",
            store=dist.PrefixStore(f"megacoder/{attempt}", store),
            rank=rank,
            world_size=size,
            timeout=timeout,
            device_id=device if device_type == "cuda" else None,
        )
    except RuntimeError as error:  # DistError is one, too
        raise RankLost(_cannot_join(error)) from error
    return World(
        dist.get_rank(), dist.get_world_size(), local_rank, device, dist.group.WORLD,
        timeout=timeout, shared_memory=shared_memory, attempt=attempt,
    )  # fmt: skip


def new_group(partition: Sequence[Sequence[int]], world: World, *, name: str) -> dist.ProcessGroup | None:
    """This rank's group when all ranks are divided as `partition` says; every rank calls it with the same partition.

    None for a group of one. Even a group of all ranks gets its own communicator, so that operations of one axis never
    wait for those of another.
    """
    ours = next(list(members) for members in partition if world.rank in members)
    if len(ours) == 1:
        return None
    assert world.group is not None
    parts = [list(members) for members in partition]
    with Operation(f"making of the {name} groups", None, _note_of(world.group)):
        if world.device.type == "cuda":  # one split of the world's communicator makes all groups of the axis at once
            return dist.split_group(split_ranks=parts, timeout=world.timeout, group_desc=name)
        groups = [dist.new_group(members, timeout=world.timeout, group_desc=name) for members in parts]
    group = groups[parts.index(ours)]
    _share_memory(group, world)
    return group


def connect_store(attempt: str, timeout_seconds: float) -> dist.Store:
    """A separate connection to the ranks' rendezvous store, limited to keys of this start of the run.

    Raises torch's DistError where the store does not answer.
    """
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False,
        timeout=datetime.timedelta(seconds=timeout_seconds),
    )  # fmt: skip
    return dist.PrefixStore(f"megacoder/watch/{attempt}", store)


def flight_record() -> bytes | None:
    """What torch's flight recorder knows of the last collectives, as JSON; None where it has recorded nothing."""
    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):
        dump = getattr(torch._C._distributed_c10d, name, None)
        if dump is not None and b'"entries":[{' in (record := dump()):
            return bytes(record)
    return None


def journal_of(group: dist.ProcessGroup | None) -> Journal:
    """This rank's journal, one for all groups of the process; `group=None` is a group of this rank alone."""
    if group is not None:
        return _note_of(group).journal
    return _note_of(dist.group.WORLD).journal if dist.group.WORLD is not None else Journal()


def _note_of(group: dist.ProcessGroup) -> GroupNote:
    note = _notes.get(group)
    if note is None:
        journal = Journal() if group is dist.group.WORLD else journal_of(dist.group.WORLD)
        note = GroupNote(journal, tuple(dist.get_process_group_ranks(group)), dist.get_backend(group))
        _notes[group] = note
    return note


def _share_memory(group: dist.ProcessGroup, world: World) -> None:
    """Sets up shared memory if the ranks of `group`, which all call it at once, are on one host."""
    note = _note_of(group)
    if not world.shared_memory or note.memory is not None or len(note.ranks) == 1 or note.backend != "gloo":
        return
    seconds = (world.timeout or default_pg_timeout).total_seconds()
    with Operation("sharing of memory", None, note):
        exchange = partial(_exchange, group=group)
        note.memory = share_memory(dist.get_rank(group), note.ranks, exchange, timeout_seconds=seconds)


def _exchange(data: bytes, group: dist.ProcessGroup) -> list[bytes]:
    """Every rank's `data`, in rank order; all have the same length."""
    own = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    rows = own.new_empty(dist.get_world_size(group), len(data))
    _all_gather(rows.view(-1), own, group=group)
    return [row.numpy().tobytes() for row in rows]


def _cannot_join(error: RuntimeError) -> str:
    """The error line for a rank that could not join the others."""
    env, reason = os.environ, str(error).partition("\n")[0]
    return (
        f"rank {env.get('RANK')} of {env['WORLD_SIZE']} could not join the others at {env.get('MASTER_ADDR')}:"
        f"{env.get('MASTER_PORT')}: {reason}; every host must reach that address and the other hosts (set "
        "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the network that connects them)"
    )


def all_reduce_sum(tensor: Tensor, group: dist.ProcessGroup | None) -> None:
    """Sums `tensor` over the group, in place, the same bits on every rank."""
    start_all_reduce_sum(tensor, group).wait()


def reduce_scatter_sum(shard: Tensor, full: Tensor, group: dist.ProcessGroup | None) -> None:
    """shard = this rank's slice of the sum of every rank's `full`; len(full) = group size * len(shard).

    `shard` may be this rank's slice of `full`, whose other slices are left as they were.
    """
    if group is None:
        if shard.data_ptr() != full.data_ptr():
            shard.copy_(full)
        return
    start_reduce_scatter_sum(shard, full, group).wait()


def all_gather_into(full: Tensor, shard: Tensor, group: dist.ProcessGroup | None) -> None:
    """full = every rank's `shard` in rank order; `shard` may be this rank's slice of `full`."""
    if group is None:
        if shard.data_ptr() != full.data_ptr():
            full.copy_(shard)
        return
    start_all_gather(full, shard, group).wait()


def start_all_reduce_sum(tensor: Tensor, group: dist.ProcessGroup | None) -> Pending:
    """`all_reduce_sum` without waiting; `tensor` receives the result and is in use until `wait`."""
    if group is None:
        return Pending(tensor)
    note = _note_of(group)
    with (operation := Operation("all-reduce", tensor, note)):
        if note.memory is not None and note.memory.takes(tensor):
            return Pending(tensor, note.memory.start_all_reduce(tensor), operation)
        return Pending(tensor, dist.all_reduce(tensor, group=group, async_op=True), operation)


def start_reduce_scatter_sum(shard: Tensor, full: Tensor, group: dist.ProcessGroup) -> Pending:
    """`reduce_scatter_sum` without waiting.

    Over gloo, ranks exchange slices and each adds up its own, in rank order: gloo's reduce-scatter sums everything on
    every rank and takes up to three times as long. As a result bf16 is summed in fp32 and rounded once.
    """
    note = _note_of(group)
    with (operation := Operation("reduce-scatter", full, note)):
        if note.memory is not None and note.memory.takes_slices(full, shard):
            return Pending(shard, note.memory.start_reduce_scatter(shard, full), operation)
        if note.backend != "gloo":
            return Pending(shard, _reduce_scatter(shard, full, group=group, async_op=True), operation)
        received = torch.empty_like(full)
        work = dist.all_to_all_single(received, full, group=group, async_op=True)
        rows = received.view(len(note.ranks), shard.numel())
        return Pending(shard, work, operation, lambda: add_up(shard.view(-1), rows.unbind()))


def start_all_gather(full: Tensor, shard: Tensor, group: dist.ProcessGroup) -> Pending:
    """`all_gather_into` without waiting."""
    note = _note_of(group)
    with (operation := Operation("all-gather", full, note)):
        if note.memory is not None and note.memory.takes_slices(full, shard):
            return Pending(full, note.memory.start_all_gather(full, shard), operation)
        return Pending(full, _all_gather(full, shard, group=group, async_op=True), operation)


def gather_json(value: Any, world: World) -> list[Any]:
    """Every rank's `value` in rank order, on every rank; as JSON, since unpickling could run code."""
    if world.group is None:
        return [value]
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(world.device)
    lengths = torch.zeros(world.size, dtype=torch.int64, device=world.device)
    all_gather_into(lengths, lengths.new_tensor([data.numel()]), world.group)
    padded = torch.zeros(int(lengths.max()), dtype=torch.uint8, device=world.device)
    padded[: data.numel()] = data
    gathered = padded.new_empty(world.size, padded.numel())
    all_gather_into(gathered.view(-1), padded, world.group)
    rows = zip(gathered.cpu().numpy(), lengths.tolist(), strict=True)
    return [json.loads(row[:length].tobytes()) for row, length in rows]


@contextmanager
def failing_together(world: World) -> Iterator[None]:
    """A block that every rank runs: if one fails, all raise AlikeOnAllRanks with the first failing rank's message."""
    if world.group is None:
        yield
        return
    failure: tuple[str, int] | None = None
    try:
        yield
    except RankLost:
        raise
    except MegacoderError as error:
        failure = str(error), error.exit_code
    except OSError as error:
        if error.errno is None:  # not from the operating system
            raise
        failure = f"{error.filename}: {error.strerror}" if error.filename else str(error), MegacoderError.exit_code
    for failed in filter(None, gather_json(failure, world)):
        alike = AlikeOnAllRanks(failed[0])
        alike.exit_code = failed[1]
        raise alike


def barrier(group: dist.ProcessGroup | None) -> None:
    """Returns once every rank of the group has called it."""
    if group is not None:
        with Operation("barrier", None, _note_of(group)):
            dist.barrier(group=group)


def broadcast_from_first(tensor: Tensor, group: dist.ProcessGroup | None) -> None:
    """Overwrites `tensor` with the first rank's."""
    if group is not None:
        with Operation("broadcast", tensor, _note_of(group)):
            dist.broadcast(tensor, group=group, group_src=0)


def group_rank(group: dist.ProcessGroup | None) -> int:
    """This process's place in the group."""
    return 0 if group is None else dist.get_rank(group)


def group_size(group: dist.ProcessGroup | None) -> int:
    """Ranks in the group."""
    return 1 if group is None else dist.get_world_size(group)


def start_send(tensor: Tensor, peer: int, group: dist.ProcessGroup) -> Pending:
    """Begins to send to rank `peer` of the group; two ranks must start their common transfers in the same order."""
    tensor = tensor.contiguous()  # as the receiver's buffer is
    note = _note_of(group)
    with (operation := Operation("send", tensor, note, peer)):
        if note.memory is not None and note.memory.takes(tensor):
            return Pending(tensor, note.memory.start_send(tensor, peer), operation)
        work = dist.isend(tensor, group=group, group_dst=peer)
    assert work is not None  # None is for processes outside the group
    return Pending(tensor, work, operation)


def start_receive(buffer: Tensor, peer: int, group: dist.ProcessGroup) -> Pending:
    """Begins to fill `buffer` from rank `peer` of the group."""
    note = _note_of(group)
    with (operation := Operation("receive", buffer, note, peer)):
        if note.memory is not None and note.memory.takes(buffer):
            return Pending(buffer, note.memory.start_receive(buffer, peer), operation)
        work = dist.irecv(buffer, group=group, group_src=peer)
    assert work is not None
    return Pending(buffer, work, operation)


def sum_with_peer(tensor: Tensor, peer: int, group: dist.ProcessGroup) -> None:
    """Adds rank `peer`'s tensor in place; both ranks call it and end with the same bits."""
    incoming = torch.empty_like(tensor)
    starts = [lambda: start_send(tensor, peer, group), lambda: start_receive(incoming, peer, group)]
    if group_rank(group) > peer:
        starts.reverse()  # one rank sends first and the other receives, since NCCL runs a pair's transfers in turn
    for transfer in [start() for start in starts]:
        transfer.wait()
    tensor += incoming
