"""How the ranks of a group find out that they share a host, and map each other's memory (see `shared_memory`).

Nobody is asked where it is. Each rank listens on a socket of Linux's abstract namespace, under a name that it draws and
tells the others through the group that they have; ranks of other hosts, containers or network namespaces cannot reach
it. Over the connection each hands the other its memory and the end of a pipe, and looks whether the memory holds what
it was told. After each step all ranks say how it went: if one cannot, for whatever reason, none does.
"""

import mmap
import os
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from megacoder.parallel.shared_memory import Link, SharedMemory

__all__ = ["share_memory"]

TOKEN_BYTES = 16
YES, NO = b"\1" * 2 * TOKEN_BYTES, b"\0" * 2 * TOKEN_BYTES
STEP_SECONDS = 10.0
"""For a message that the peer has sent already, or is about to."""


def share_memory(
    rank: int, ranks: Sequence[int], exchange: Callable[[bytes], list[bytes]], *, timeout_seconds: float
) -> SharedMemory | None:
    """For rank `rank` of a group, whose numbers in the run are `ranks`; None, on all of them, where one cannot.

    All call it at once. `exchange` returns what every rank gave it, in rank order; all give the same number of bytes.
    `timeout_seconds` is for the collectives.
    """
    with ExitStack() as stack:
        meeting = _Meeting(rank, ranks, stack)
        for step in (meeting.open, meeting.call, meeting.answer, meeting.listen):
            try:
                said = step()
            except OSError:
                said = NO
            heard = exchange(said)
            if NO in heard:
                return None
            if step == meeting.open:
                meeting.cards = heard
        return SharedMemory(rank, meeting.arena, meeting.links(), timeout_seconds=timeout_seconds)


class _Meeting:
    """One rank's sockets, pipes and memory until it is connected with all others; `stack` closes what it opens.

    A card is a name and a secret. Higher ranks call, lower ones answer.
    """

    arena: mmap.mmap
    cards: list[bytes]

    def __init__(self, rank: int, ranks: Sequence[int], stack: ExitStack) -> None:
        self._rank, self._ranks, self._stack = rank, ranks, stack
        self._lines: dict[int, socket.socket] = {}
        self._writers: dict[int, int] = {}
        self._met: dict[int, tuple[mmap.mmap, int]] = {}
        """memory of, and pipe from, each peer"""

    def open(self) -> bytes:
        """This rank's card, with a socket behind its name, and its memory, which holds its secret."""
        if not hasattr(os, "memfd_create"):
            raise OSError("only Linux has memory without a name")
        name, secret = os.urandom(TOKEN_BYTES), os.urandom(TOKEN_BYTES)
        self._listener = self._socket()
        self._listener.bind(_address(name))
        self._listener.listen(len(self._ranks))
        self._memory = self._owned(os.memfd_create("megacoder"))
        # As much as could ever be used; only what is touched exists.
        size = os.sysconf("SC_PHYS_PAGES") // len(self._ranks) * os.sysconf("SC_PAGE_SIZE")
        os.ftruncate(self._memory, size)
        self.arena = mmap.mmap(self._memory, size)
        self.arena[:TOKEN_BYTES] = secret
        return name + secret

    def call(self) -> bytes:
        """Connects with all lower ranks, whose sockets are there."""
        for rank in range(self._rank):
            line = self._socket()
            line.connect(_address(self.cards[rank][:TOKEN_BYTES]))
            self._introduce(rank, line)
        return YES

    def answer(self) -> bytes:
        """Accepts all higher ranks, who have called; whoever else calls is not heard."""
        while len(self._met) < len(self._ranks) - 1 - self._rank:
            line, _ = self._listener.accept()
            self._stack.enter_context(line)
            line.settimeout(STEP_SECONDS)
            rank = self._meet(line)
            if rank is not None:
                self._introduce(rank, line)
        return YES

    def listen(self) -> bytes:
        """Hears what lower ranks have answered."""
        for rank, line in self._lines.items():
            if rank < self._rank and self._meet(line) != rank:
                raise ConnectionError(f"rank {rank} is not what answers")
        return YES

    def links(self) -> list[Link]:
        """To all others in rank order, with descriptors of their own."""
        return [
            Link(
                rank=self._ranks[rank], arena=arena,
                reader=os.dup(reader), writer=os.dup(self._writers[rank]),
            )
            for rank, (arena, reader) in sorted(self._met.items())
        ]  # fmt: skip

    def _introduce(self, rank: int, line: socket.socket) -> None:
        """Hands over this rank's secret, its memory, and the pipe through which it will speak."""
        reader, writer = map(self._owned, os.pipe())
        os.set_blocking(writer, False)
        self._lines[rank], self._writers[rank] = line, writer
        socket.send_fds(line, [self.cards[self._rank][TOKEN_BYTES:]], [self._memory, reader])

    def _meet(self, line: socket.socket) -> int | None:
        """Receives the same from a peer, and returns its rank; None if it is none."""
        secret, descriptors, *_ = socket.recv_fds(line, TOKEN_BYTES, 2)
        for descriptor in descriptors:
            self._owned(descriptor)
            os.set_inheritable(descriptor, False)
        ranks = [rank for rank, card in enumerate(self.cards) if card[TOKEN_BYTES:] == secret]
        if not ranks or len(descriptors) != 2:
            return None
        memory, reader = descriptors
        arena = mmap.mmap(memory, os.fstat(memory).st_size)
        if arena[:TOKEN_BYTES] != secret:
            return None
        self._met[ranks[0]] = (arena, reader)
        return ranks[0]

    def _socket(self) -> socket.socket:
        created = self._stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        created.settimeout(STEP_SECONDS)
        return created

    def _owned(self, descriptor: int) -> int:
        self._stack.callback(os.close, descriptor)
        return descriptor


def _address(name: bytes) -> bytes:
    return b"\0megacoder-" + name.hex().encode()
