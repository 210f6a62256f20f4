"""Chance as a function: a shuffled order and random bits, keyed by numbers, with nothing to build, store or advance.

A Feistel network is a bijection on pairs of half-words whatever its round function is, so that a hash of (key, half)
makes a keyed permutation of [0, 4^k). Numbers below any other n stay in the range by cycle walking: apply the
permutation until the result is below n, at most four times on average. Every rank computes the item at any position
alone; a shuffled array would take 8 bytes per item, a pass to build, and agreement on who builds it.

Random bits are the same hash of a key and a counter. They are pinned by a test: the examples of a run are part of its
record, and NumPy guarantees its generators' streams only within limits.

Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (2002); mixing constants of splitmix64 (Steele et
al. 2014).
"""

import numpy as np

__all__ = ["draw_bits", "draw_many_bits", "key_of", "permute", "stream_phase"]

_ROUNDS = 8
_MASK = 2**64 - 1


@np.errstate(over="ignore")  # the hash is arithmetic modulo 2^64
def permute(positions: np.ndarray, n: int, *, seed: int, epoch: np.ndarray | int) -> np.ndarray:
    """The items in [0, n) at `positions` of the order keyed by (seed, epoch).

    `positions` are int64 of any shape, each in [0, n); `epoch` is one number or an array of that shape. The result is
    int64 of the same shape.
    """
    half_bits = np.uint64(max(1, (max(n - 1, 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half_bits) - np.uint64(1)
    epoch_key = _mix(np.asarray(epoch, dtype=np.uint64) + _mix(np.uint64(seed % 2**64)))
    keys = [np.broadcast_to(_mix(epoch_key + np.uint64(i)), positions.shape).ravel() for i in range(1, _ROUNDS + 1)]
    items = positions.astype(np.uint64).ravel()
    pending = np.arange(items.size)
    while pending.size:
        left, right = items[pending] >> half_bits, items[pending] & low
        for key in keys:
            left, right = right, left ^ (_mix(right + key[pending]) & low)
        items[pending] = walked = (left << half_bits) | right
        pending = pending[walked >= np.uint64(n)]
    return items.astype(np.int64).reshape(positions.shape)


def key_of(*numbers: int) -> int:
    """A 64-bit key of these numbers in this order; other numbers, or more of them, give an unrelated one."""
    key = 0
    for number in numbers:
        key = _mix_one((key ^ number) & _MASK)
    return key


def draw_bits(key: int, count: int) -> list[int]:
    """`count` numbers in [0, 2^64) of a key."""
    return [_mix_one((key + index) & _MASK) for index in range(1, count + 1)]


@np.errstate(over="ignore")
def draw_many_bits(key: int, count: int) -> np.ndarray:
    """The same numbers as `draw_bits`, faster for hundreds: uint64 (count,)."""
    return _mix(np.uint64(key) + np.arange(1, count + 1, dtype=np.uint64))


def stream_phase(stream: int, num_streams: int, size: int) -> int:
    """Where in a round of `size` places a stream begins: spread over it, neighbours far apart (bit reversal).

    `num_streams` is a power of two; stream 0 begins at 0.
    """
    reversed_bits = int(f"{stream:0{num_streams.bit_length() - 1}b}"[::-1], 2)
    return reversed_bits * size // num_streams


def _mix(x: np.ndarray | np.uint64) -> np.ndarray:
    """splitmix64's output function: every input bit changes every output bit with a probability near one half."""
    x = np.asarray(x) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))


def _mix_one(x: int) -> int:
    """`_mix` of a Python number: for a few numbers, ten times as fast as an array of them."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
