"""How the ranks of a group find out that they share a host, and map each other's memory (see `shared_memory`).

No host names are compared. Each rank listens on a socket in Linux's abstract namespace, under a random name that it
sends to the others through their existing group; ranks on other hosts, or in other containers or network namespaces,
cannot reach it. Over the connection each rank hands the other its memory and one end of a pipe, and checks that the
memory it receives holds the peer's secret. After each step all ranks exchange the outcome: if one failed, for whatever
reason, none shares memory.
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
"""Time-out for a message that the peer has sent already, or is about to send."""


def share_memory(
    rank: int, ranks: Sequence[int], exchange: Callable[[bytes], list[bytes]], *, timeout_seconds: float
) -> SharedMemory | None:
    """For rank `rank` of a group whose global ranks are `ranks`; None, on all of them, if one cannot share memory.

    All call it at once. `exchange` returns what every rank passed to it, in rank order; all pass the same number of
    bytes. `timeout_seconds` is for the collectives.
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
    """One rank's sockets, pipes and memory until it is connected to all others; `stack` closes what it opens.

    A card is a socket's name and a secret. Higher ranks call, lower ranks answer.
    """

    arena: mmap.mmap
    cards: list[bytes]

    def __init__(self, rank: int, ranks: Sequence[int], stack: ExitStack) -> None:
        self._rank, self._ranks, self._stack = rank, ranks, stack
        self._lines: dict[int, socket.socket] = {}
        self._writers: dict[int, int] = {}
        self._met: dict[int, tuple[mmap.mmap, int]] = {}
        """memory of each peer, and the pipe from it"""

    def open(self) -> bytes:
        """Opens this rank's socket, and its memory with the secret in it; returns the rank's card."""
        if not hasattr(os, "memfd_create"):
            raise OSError("anonymous shared memory (memfd_create) needs Linux")
        name, secret = os.urandom(TOKEN_BYTES), os.urandom(TOKEN_BYTES)
        self._listener = self._socket()
        self._listener.bind(_address(name))
        self._listener.listen(len(self._ranks))
        self._memory = self._owned(os.memfd_create("megacoder"))
        # As much as could ever be used; pages exist only once touched.
        size = os.sysconf("SC_PHYS_PAGES") // len(self._ranks) * os.sysconf("SC_PAGE_SIZE")
        os.ftruncate(self._memory, size)
        self.arena = mmap.mmap(self._memory, size)
        self.arena[:TOKEN_BYTES] = secret
        return name + secret

    def call(self) -> bytes:
        """Connects to all lower ranks, whose sockets are open by now."""
        for rank in range(self._rank):
            line = self._socket()
            line.connect(_address(self.cards[rank][:TOKEN_BYTES]))
            self._introduce(rank, line)
        return YES

    def answer(self) -> bytes:
        """Accepts all higher ranks, which have called by now; any other caller is ignored."""
        while len(self._met) < len(self._ranks) - 1 - self._rank:
            line, _ = self._listener.accept()
            self._stack.enter_context(line)
            line.settimeout(STEP_SECONDS)
            rank = self._meet(line)
            if rank is not None:
                self._introduce(rank, line)
        return YES

    def listen(self) -> bytes:
        """Receives what lower ranks have answered."""
        for rank, line in self._lines.items():
            if rank < self._rank and self._meet(line) != rank:
                raise ConnectionError(f"the answer is not from rank {rank}")
        return YES

    def links(self) -> list[Link]:
        """Links to all others in rank order, with duplicated descriptors."""
        return [
            Link(
                rank=self._ranks[rank], arena=arena,
                reader=os.dup(reader), writer=os.dup(self._writers[rank]),
            )
            for rank, (arena, reader) in sorted(self._met.items())
        ]  # fmt: skip

    def _introduce(self, rank: int, line: socket.socket) -> None:
        """Hands over this rank's secret, its memory, and the reading end of the pipe to the peer."""
        reader, writer = map(self._owned, os.pipe())
        os.set_blocking(writer, False)
        self._lines[rank], self._writers[rank] = line, writer
        socket.send_fds(line, [self.cards[self._rank][TOKEN_BYTES:]], [self._memory, reader])

    def _meet(self, line: socket.socket) -> int | None:
        """Receives the same from a peer, and returns its rank; None if it is not a rank of the group."""
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
