"""A shuffled order that is a function: position -> item, keyed by (seed, epoch), with nothing to build or store.

A Feistel network is a bijection on pairs of half-words whatever its round function is, so that a hash of (key, half)
makes a keyed permutation of [0, 4^k). Numbers below any other n stay in the range by cycle walking: apply the
permutation until the result is below n, at most four times on average. Every rank computes the item at any position
alone; a shuffled array would take 8 bytes per item, a pass to build, and agreement on who builds it.

Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (2002); mixing constants of splitmix64 (Steele et
al. 2014).
"""

import numpy as np

__all__ = ["permute"]

_ROUNDS = 8


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


def _mix(x: np.ndarray | np.uint64) -> np.ndarray:
    """splitmix64's output function: every input bit changes every output bit with a probability near one half."""
    x = np.asarray(x) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))
