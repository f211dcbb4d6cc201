"""Random numbers as pure functions of (seed, stream, step, sample). Must not import the rest of the package.

Nothing here keeps state, so neither resuming at a step nor splitting a batch over other processes or workers
changes a draw. Batches of draws come from Philox-4x32-10, evaluated for all samples at once.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

_ROUNDS = 10
_MIXED = 4  # after this many rounds each word depends on all counters, so it has the full broadcast shape
_MULTIPLIER_A = np.uint64(0xD2511F53)
_MULTIPLIER_B = np.uint64(0xCD9E8D57)
_WEYL_A = 0x9E3779B9
_WEYL_B = 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def key(seed: int, stream: str, step: int = 0, sample: int = 0) -> int:
    """Returns a 63-bit integer that depends on all four arguments, for seeding other generators."""
    digest = hashlib.blake2b(f"{seed}|{stream}|{step}|{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, stream: str, step: int = 0, sample: int = 0) -> torch.Generator:
    """Returns a CPU `torch.Generator` keyed by (seed, stream, step, sample)."""
    return torch.Generator().manual_seed(key(seed, stream, step, sample))


def permutation(count: int, seed: int, stream: str, step: int = 0) -> np.ndarray:
    """Returns a permutation of `range(count)`, int64, keyed by (seed, stream, step)."""
    return np.random.Generator(np.random.Philox(key=key(seed, stream, step))).permutation(count)


def uniform(seed: int, stream: str, step: int, samples: np.ndarray, count: int) -> np.ndarray:
    """Returns uniform numbers in [0, 1), float64, of shape (B, count): row b belongs to samples[b].

    A row depends on (seed, stream, step, samples[b]) alone, and its first numbers don't depend on `count`. `step` is
    below 2**32; samples (B,) are non-negative int64.

    Raises:
        ValueError: the step is outside [0, 2**32).

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Philox-4x32-10).
    """
    if not 0 <= step < 2**32:
        raise ValueError(f"step {step} is outside [0, 2**32): pass a step or epoch counter")
    samples = np.asarray(samples, dtype=np.int64).astype(np.uint64)
    num_blocks = (count + 1) // 2  # a block of 4 x 32 bits gives two doubles
    counter = [
        (samples & _LOW)[:, None],
        (samples >> _SHIFT)[:, None],
        np.full((1, 1), step, dtype=np.uint64),
        np.arange(num_blocks, dtype=np.uint64)[None],
    ]
    words = _philox(counter, key(seed, stream))
    doubles = np.empty((len(samples), num_blocks, 2))
    for half in range(2):
        bits = words[2 * half] >> np.uint64(5)
        bits <<= np.uint64(26)
        bits |= words[2 * half + 1] >> np.uint64(6)
        np.multiply(bits.view(np.int64), 1.0 / (1 << 53), out=doubles[:, :, half])  # below 2**53: exact
    return doubles.reshape(len(samples), 2 * num_blocks)[:, :count]


def _philox(counter: list[np.ndarray], key64: int) -> list[np.ndarray]:
    """Returns the four 32-bit output words (as uint64 arrays) of the counters, broadcast against each other."""
    c0, c1, c2, c3 = counter
    keys = [
        tuple(np.uint64((part + i * weyl) & 0xFFFFFFFF) for part, weyl in ((key64, _WEYL_A), (key64 >> 32, _WEYL_B)))
        for i in range(_ROUNDS)
    ]
    for k0, k1 in keys[:_MIXED]:
        product_a, product_b = c0 * _MULTIPLIER_A, c2 * _MULTIPLIER_B
        c0, c1, c2, c3 = (
            (product_b >> _SHIFT) ^ (c1 ^ k0),
            product_b & _LOW,
            (product_a >> _SHIFT) ^ (c3 ^ k1),
            product_a & _LOW,
        )
    product_a, product_b = np.empty_like(c0), np.empty_like(c0)
    for k0, k1 in keys[_MIXED:]:  # in place: a fifth faster without temporaries
        np.multiply(c0, _MULTIPLIER_A, out=product_a)
        np.multiply(c2, _MULTIPLIER_B, out=product_b)
        c1 ^= k0
        c3 ^= k1
        np.bitwise_xor(np.right_shift(product_b, _SHIFT, out=c0), c1, out=c0)
        np.bitwise_xor(np.right_shift(product_a, _SHIFT, out=c2), c3, out=c2)
        np.bitwise_and(product_b, _LOW, out=c1)
        np.bitwise_and(product_a, _LOW, out=c3)
    return [c0, c1, c2, c3]
