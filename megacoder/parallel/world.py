"""The ranks of a run: how a process joins them, the groups that they are divided into, and what they must agree on.

A `World` is made once and passed to whoever needs it. `group=None` is a world of one, in which nothing is exchanged.
"""

import datetime
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from megacoder.core.errors import AlikeOnAllRanks, ConfigError, MegacoderError, RankLost
from megacoder.parallel.attempt import agree_on_attempt
from megacoder.parallel.collectives import all_gather_into, gather_bytes, journal_of, note_of
from megacoder.parallel.journal import Operation
from megacoder.parallel.one_host import share_memory

__all__ = [
    "World",
    "connect_store",
    "failing_together",
    "from_torchrun",
    "gather_json",
    "launched_ranks",
    "new_group",
    "start_world",
]

MEETING = datetime.timedelta(seconds=60)
"""Time that ranks have, at least, to connect to each other once all are there."""

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


def launched_ranks() -> int | None:
    """How many ranks torchrun has started, including this one; None for a process that is not a torchrun rank.

    ConfigError where torchrun's environment variables are incomplete, as when a job script sets some of them by hand.
    """
    env = os.environ
    if "WORLD_SIZE" not in env:
        return None
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR") if not env.get(name)]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE = {env['WORLD_SIZE']!r} is set, but not {', '.join(missing)}: start ranks with torchrun, "
            "which sets them all, or unset WORLD_SIZE"
        )
    size, rank, *_ = (from_torchrun(name, 0) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT"))
    if rank >= size:
        raise ConfigError(f"RANK = {rank}, but WORLD_SIZE = {size}: ranks are counted from 0")
    return size


def from_torchrun(name: str, otherwise: int) -> int:
    """The number in one of torchrun's environment variables, `otherwise` where it is not set; ConfigError if it is set
    to anything else."""
    text = os.environ.get(name)
    if text is None:
        return otherwise
    if not text.isdecimal():
        raise ConfigError(f"{name} = {text!r}: expected a number, as torchrun sets it")
    return int(text)


def start_world(
    device_type: str, *, timeout_seconds: float = 600.0, join_seconds: float = 60.0, shared_memory: bool = True
) -> World:
    """Joins the ranks that torchrun started (its environment variables), or makes a world of one without them.

    Other ranks may start up to `join_seconds` later, even if that is more than `timeout_seconds`, the collectives'
    time-out. ConfigError as `launched_ranks`.
    """
    num_launched = launched_ranks()
    local_rank = from_torchrun("LOCAL_RANK", 0)
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
    # Every rank would warn that its transfers run in turn: programs are built for that (see `schedules.program`).
    os.environ.setdefault("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "false")
    margin = NCCL_MARGIN_SECONDS if device_type == "cuda" else 0.0
    timeout = datetime.timedelta(seconds=timeout_seconds + margin)
    try:
        join_timeout = max(timeout, datetime.timedelta(seconds=join_seconds))
        store, rank, size = next(dist.rendezvous("env://", timeout=join_timeout))
        attempt = agree_on_attempt(
            dist.PrefixStore("megacoder/start", store), rank, size, timeout_seconds=join_timeout.total_seconds()
        )
        store.set_timeout(max(timeout, MEETING))  # from here on all ranks are there
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
    with Operation(f"creation of the {name} groups", None, note_of(world.group)):
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


def _share_memory(group: dist.ProcessGroup, world: World) -> None:
    """Sets up shared memory if the ranks of `group`, which all call it at once, are on one host."""
    note = note_of(group)
    if not world.shared_memory or note.memory is not None or len(note.ranks) == 1 or note.backend != "gloo":
        return
    seconds = (world.timeout or default_pg_timeout).total_seconds()
    with Operation("set-up of shared memory", None, note):
        exchange = partial(gather_bytes, group=group)
        note.memory = share_memory(dist.get_rank(group), note.ranks, exchange, timeout_seconds=seconds)


def _cannot_join(error: RuntimeError) -> str:
    """The error line for a rank that could not join the others."""
    env, reason = os.environ, str(error).partition("\n")[0]
    return (
        f"rank {env.get('RANK')} of {env['WORLD_SIZE']} could not join the others at {env.get('MASTER_ADDR')}:"
        f"{env.get('MASTER_PORT')}: {reason}; every host must reach that address and the other hosts (set "
        "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the network that connects them)"
    )


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
