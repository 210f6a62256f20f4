"""Collectives of ranks that share a host, through memory: what gloo sends through a socket is copied here, once.

Each rank of a group owns an arena, a memfd that all its peers map. To take part in a collective it copies its tensor
there and tells each peer, through a pipe, where the tensor is. A rank that waits for the result reads its peers' arenas
in rank order, so that all ranks and all runs get the same bits. A wait sleeps in the kernel; the pipe acts as the
memory barrier on any processor; when a peer dies, its pipe closes. Nothing has a name in any file system, so nothing
stays behind.

The invariant: what `start_*` has begun needs nothing more from this rank, even while it waits for something else. So
collectives may be started and waited for in any order that gloo allows (whose threads finish what was begun), without a
thread here.

The cost: an arena holds everything in flight, and what peers have not yet reported as read, which they do with their
next message. Sending large tensors piece by piece through a small arena would take less memory, but a piece could wait
for a rank that waits elsewhere; and it was no faster (64 MB: 12 to 25 ms of CPU time either way). An arena is a rank's
share of the machine's memory, so the machine is full when the arenas are. Pages are allocated when they are touched,
lowest first, and kept.
"""

import contextlib
import mmap
import os
import select
import struct
import time
import weakref
from bisect import insort
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

__all__ = ["Link", "SharedMemory", "Transfer", "add_up"]

ALIGNMENT = 128
"""Bytes; two cache lines, since processors fetch them in pairs."""
MESSAGE = struct.Struct("<4Q")
"""kind, offset in the sender's arena, bytes there, number of collectives whose posts the sender has read."""
POST, SEND, READ = range(3)
"""Kinds of messages: a part of a collective; a tensor for the receiver alone; such a tensor has been read."""
Finish = Callable[[list[Tensor]], None]
"""Receives what the peers have posted, in rank order."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """What connects this rank with one peer."""

    rank: int
    """global rank of the peer, for errors"""
    arena: mmap.mmap
    """the peer's"""
    reader: int
    """pipe from the peer; the file descriptor"""
    writer: int
    """pipe to the peer, which does not block"""


class Transfer:
    """An operation in flight; `wait` is like that of torch's Work."""

    __slots__ = ("_last", "_memory", "_peer")

    def __init__(self, memory: "SharedMemory", last: int, peer: "_Peer | None" = None) -> None:
        """Done when `last` collectives are, or, with a `peer`, `last` receives from it."""
        self._memory, self._last, self._peer = memory, last, peer

    def wait(self) -> None:
        """ConnectionError where a peer has died, TimeoutError where one does not answer in time."""
        if self._peer is None:
            self._memory._finish(self._last)
        else:
            self._memory._finish_receives(self._peer, self._last)


class _Peer:
    """One peer, and its messages that are not yet processed."""

    def __init__(self, link: Link) -> None:
        self.rank, self.arena, self.reader, self.writer = link.rank, link.arena, link.reader, link.writer
        self.poll = select.poll()
        self.poll.register(self.reader, select.POLLIN)
        self.has_left = False
        """whether its pipe is closed and read to the end"""
        self.posts: deque[tuple[int, int]] = deque()
        """(offset, bytes) of parts of collectives"""
        self.sends: deque[tuple[int, int]] = deque()
        """likewise, of tensors for this rank alone"""
        self.num_read = 0
        """how many of this rank's posts the peer has read"""
        self.sent: deque[int] = deque()
        """offsets of tensors that the peer has not read yet"""
        self.buffers: deque[Tensor] = deque()
        """buffers to be filled from the peer, in order"""
        self.num_received = 0
        self.num_receives = 0
        """receives started"""

    def view(self, place: tuple[int, int], like: Tensor) -> Tensor:
        """What the peer has put at `place`; RuntimeError unless it is as large as `like`."""
        offset, num_bytes = place
        if num_bytes != like.nbytes:
            raise RuntimeError(
                f"rank {self.rank} takes part with {num_bytes} bytes where this rank has {like.nbytes}: their calls "
                "differ in size or order"
            )
        return torch.frombuffer(self.arena, dtype=like.dtype, count=like.numel(), offset=offset)


class _Arena:
    """This rank's memory; allocates at the lowest free address, so that the same pages are reused."""

    def __init__(self, memory: mmap.mmap) -> None:
        self.memory = memory
        self.num_bytes = 0
        """in use"""
        self._extents: list[tuple[int, int]] = []

    def put(self, flats: Sequence[Tensor]) -> list[int]:
        """Copies in 1-d tensors of equal size, one after the other; returns where each begins."""
        stride = -(-flats[0].nbytes // ALIGNMENT) * ALIGNMENT
        begin = self._take(stride * len(flats))
        offsets = [begin + stride * index for index in range(len(flats))]
        for offset, flat in zip(offsets, flats, strict=True):
            torch.frombuffer(self.memory, dtype=flat.dtype, count=flat.numel(), offset=offset).copy_(flat)
        return offsets

    def free(self, begin: int) -> None:
        """Frees what `put` has stored from `begin` on."""
        index = next(index for index, extent in enumerate(self._extents) if extent[0] == begin)
        begin, end = self._extents.pop(index)
        self.num_bytes -= end - begin

    def _take(self, num_bytes: int) -> int:
        begin = 0
        for taken, end in self._extents:
            if taken - begin >= num_bytes:
                break
            begin = end
        if begin + num_bytes > len(self.memory):
            raise RuntimeError(
                f"{num_bytes} more bytes do not fit beside collectives of {self.num_bytes} bytes in flight"
            )
        insort(self._extents, (begin, begin + num_bytes))
        self.num_bytes += num_bytes
        return begin


class SharedMemory:
    """The collectives of one group on one rank; all ranks start a group's collectives in the same order."""

    def __init__(self, rank: int, arena: mmap.mmap, links: Sequence[Link], *, timeout_seconds: float) -> None:
        """`rank` is the group's; `links` lead to all others in order, and this object owns their pipe descriptors."""
        self._rank, self._timeout = rank, timeout_seconds
        self._arena = _Arena(arena)
        self._others = [_Peer(link) for link in links]
        self._unfinished: deque[tuple[Tensor, Finish]] = deque()
        """collectives in flight: a tensor shaped like each peer's post, and what to do with the posts"""
        self._num_started = 0
        self._num_finished = 0
        self._unread: deque[int] = deque()
        """offsets of posts that not all peers have read"""
        self._num_freed = 0
        weakref.finalize(self, _close, [end for link in links for end in (link.reader, link.writer)])

    @property
    def size(self) -> int:
        """Ranks in the group."""
        return len(self._others) + 1

    def takes(self, *tensors: Tensor) -> bool:
        """Whether these tensors can go through shared memory; the answer is the same on ranks with equal tensors."""
        return all(tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.numel() for tensor in tensors)

    def takes_slices(self, full: Tensor, shard: Tensor) -> bool:
        """Likewise, where `full` must have a slice like `shard` for every rank."""
        fits = full.numel() == self.size * shard.numel() and full.dtype == shard.dtype
        return fits and self.takes(full, shard)

    def start_all_reduce(self, tensor: Tensor) -> Transfer:
        """Sums `tensor` over the ranks in place."""
        flat = tensor.detach().view(-1)
        return self._start([flat], partial(self._sum, flat, flat))

    def start_all_gather(self, full: Tensor, shard: Tensor) -> Transfer:
        """full = every rank's `shard` in rank order; `shard` may be this rank's slice of `full`."""
        slices, shard = list(full.detach().view(self.size, -1).unbind()), shard.detach().view(-1)
        own = slices.pop(self._rank)
        if own.data_ptr() != shard.data_ptr():
            own.copy_(shard)
        return self._start([shard], partial(_copy, slices))

    def start_reduce_scatter(self, shard: Tensor, full: Tensor) -> Transfer:
        """shard = this rank's slice of the sum of every rank's `full`; `shard` may be that slice of `full`."""
        slices = list(full.detach().view(self.size, -1).unbind())
        own = slices.pop(self._rank)
        return self._start(slices, partial(self._sum, shard.detach().view(-1), own))

    def start_send(self, tensor: Tensor, rank: int) -> Transfer:
        """Sends to that rank of the group; complete at once."""
        peer = self._peer(rank)
        self._hear_all()
        (offset,) = self._arena.put([tensor.detach().view(-1)])
        peer.sent.append(offset)
        self._tell(peer, SEND, offset, tensor.nbytes)
        return Transfer(self, 0)

    def start_receive(self, buffer: Tensor, rank: int) -> Transfer:
        """Fills `buffer` from that rank of the group."""
        peer = self._peer(rank)
        peer.buffers.append(buffer.detach().view(-1))
        peer.num_receives += 1
        return Transfer(self, peer.num_receives, peer)

    def _peer(self, rank: int) -> _Peer:
        return self._others[rank - (rank > self._rank)]

    def _start(self, outgoing: Sequence[Tensor], finish: Finish) -> Transfer:
        """Posts `outgoing`, flat tensors of equal size: one for each peer, or one for all."""
        self._hear_all()
        offsets = self._arena.put(outgoing)
        self._unread.append(offsets[0])
        self._unfinished.append((outgoing[0], finish))
        self._num_started += 1
        for index, peer in enumerate(self._others):
            self._tell(peer, POST, offsets[index if len(offsets) > 1 else 0], outgoing[0].nbytes)
        return Transfer(self, self._num_started)

    def _finish(self, last: int) -> None:
        """Returns when the first `last` collectives are done."""
        deadline = time.monotonic() + self._timeout
        while self._num_finished < last:
            like, finish = self._unfinished[0]
            rows = []
            for peer in self._others:
                while not peer.posts:
                    self._hear(peer, deadline)
                rows.append(peer.view(peer.posts.popleft(), like))
            finish(rows)
            self._unfinished.popleft()
            self._num_finished += 1

    def _finish_receives(self, peer: _Peer, last: int) -> None:
        deadline = time.monotonic() + self._timeout
        while peer.num_received < last:
            while not peer.sends:
                self._hear(peer, deadline)
            buffer = peer.buffers.popleft()
            buffer.copy_(peer.view(peer.sends.popleft(), buffer))
            peer.num_received += 1
            with contextlib.suppress(BrokenPipeError):  # the peer may have finished and left
                self._tell(peer, READ)

    def _sum(self, total: Tensor, own: Tensor, rows: list[Tensor]) -> None:
        add_up(total, [*rows[: self._rank], own, *rows[self._rank :]])

    def _tell(self, peer: _Peer, kind: int, offset: int = 0, num_bytes: int = 0) -> None:
        message = MESSAGE.pack(kind, offset, num_bytes, self._num_finished)
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                os.write(peer.writer, message)
                return
            except BlockingIOError:
                self._wait_for_space(peer, deadline)
            except BrokenPipeError:
                raise BrokenPipeError(f"rank {peer.rank} has closed the connection") from None

    def _wait_for_space(self, peer: _Peer, deadline: float) -> None:
        """Waits for space in the pipe, which holds two thousand messages; the peer may be blocked the same way."""
        poll = select.poll()
        poll.register(peer.writer, select.POLLOUT)
        for other in self._others:
            if not other.has_left:  # a closed pipe would end every poll at once
                poll.register(other.reader, select.POLLIN)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError(_timed_out(self._timeout, peer))
        self._hear_all()

    def _hear_all(self) -> None:
        """Reads the peers' pending messages, and frees what they have read."""
        for peer in self._others:
            if peer.poll.poll(0):
                self._take_in(peer)

    def _hear(self, peer: _Peer, deadline: float) -> None:
        """Waits for a message from `peer`."""
        if not peer.poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError(_timed_out(self._timeout, peer))
        if not self._take_in(peer):
            raise ConnectionError(f"rank {peer.rank} has closed the connection")

    def _take_in(self, peer: _Peer) -> bool:
        """Reads pending messages; False where the peer has closed its pipe."""
        data = os.read(peer.reader, 1 << 16)
        peer.has_left = not data
        for kind, offset, num_bytes, num_read in MESSAGE.iter_unpack(data):
            peer.num_read = num_read
            if kind == POST:
                peer.posts.append((offset, num_bytes))
            elif kind == SEND:
                peer.sends.append((offset, num_bytes))
            else:
                self._arena.free(peer.sent.popleft())
        num_read = min(peer.num_read for peer in self._others)
        while self._num_freed < num_read:
            self._arena.free(self._unread.popleft())
            self._num_freed += 1
        return bool(data)


def add_up(total: Tensor, rows: Sequence[Tensor]) -> None:
    """total = the sum of `rows`, first to last; `total` may be one of them. Narrow floats are summed in fp32."""
    if len(rows) == 2:  # the sum of two is rounded once in any dtype
        torch.add(*rows, out=total)
        return
    wide = torch.promote_types(total.dtype, torch.float32) if total.dtype.is_floating_point else total.dtype
    block = 1 << 16  # sums stay in the cache
    for part in (slice(start, start + block) for start in range(0, total.numel(), block)):
        sums = rows[0][part].to(wide, copy=True)
        for row in rows[1:]:
            sums += row[part]
        total[part] = sums


def _copy(targets: Sequence[Tensor], rows: Sequence[Tensor]) -> None:
    for target, row in zip(targets, rows, strict=True):
        target.copy_(row)


def _timed_out(seconds: float, peer: _Peer) -> str:
    return f"Timed out after {seconds:g} s waiting for rank {peer.rank}"


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
