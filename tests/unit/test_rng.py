import numpy as np
import pytest
import torch

from ijepa_scale import rng

# Source: the known-answer vectors of Random123 (Salmon et al., SC 2011) for philox4x32-10.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def philox_in_plain_integers(counter, key):
    """Philox-4x32-10 from its definition, on Python's integers."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(10):
        high_a, low_a = divmod(0xD2511F53 * a, 2**32)
        high_c, low_c = divmod(0xCD9E8D57 * c, 2**32)
        a, b, c, d = high_c ^ b ^ k0, low_c, high_a ^ d ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return a, b, c, d


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_known_answers(counter, key, words):
    arrays = [np.full((1, 1), word, dtype=np.uint64) for word in counter]
    got = rng._philox(arrays, key[0] | key[1] << 32)
    assert " ".join(f"{int(word[0, 0]):08x}" for word in got) == words
    assert " ".join(f"{word:08x}" for word in philox_in_plain_integers(counter, key)) == words


@pytest.mark.parametrize("sample", [0, 7, 2**32 + 5, 2**40])
@pytest.mark.parametrize("step", [0, 3, 2**32 - 1])
def test_uniform_is_philox_of_sample_step_and_block(sample, step):
    key = rng.key(11, "crops")
    expected = []
    for block in range(2):
        words = philox_in_plain_integers((sample % 2**32, sample >> 32, step, block), (key % 2**32, key >> 32))
        expected += [((a >> 5) * 2**26 + (b >> 6)) / 2**53 for a, b in (words[:2], words[2:])]
    assert rng.uniform(11, "crops", step, np.array([sample]), 3)[0].tolist() == expected[:3]


def test_uniform_rows_belong_to_their_samples():
    samples = np.array([5, 2**33, 0, 9])
    together = rng.uniform(0, "masks", 4, samples, 7)
    assert together.shape == (4, 7) and together.dtype == np.float64
    for row, sample in zip(together, samples, strict=True):
        assert np.array_equal(rng.uniform(0, "masks", 4, np.array([sample]), 7)[0], row)
    assert np.array_equal(rng.uniform(0, "masks", 4, samples, 2), together[:, :2])


def test_uniform_changes_with_each_argument_and_fills_the_unit_interval():
    samples = np.arange(20_000)
    base = rng.uniform(0, "a", 0, samples, 2)
    for other in (rng.uniform(1, "a", 0, samples, 2), rng.uniform(0, "b", 0, samples, 2)):
        assert not (other == base).any()
    assert not (rng.uniform(0, "a", 1, samples, 2) == base).any()
    assert base.min() >= 0.0 and base.max() < 1.0
    histogram = np.histogram(base, bins=10, range=(0, 1))[0]
    assert abs(histogram - 4000).max() < 5 * 4000**0.5
    assert abs(np.corrcoef(base.T)[0, 1]) < 5 / len(samples) ** 0.5


def test_no_samples_give_no_rows():
    assert rng.uniform(0, "a", 0, np.array([], dtype=np.int64), 3).shape == (0, 3)


@pytest.mark.parametrize("step", [-1, 2**32])
def test_a_step_outside_32_bits_is_refused(step):
    with pytest.raises(ValueError, match=rf"step {step} is outside \[0, 2\*\*32\): pass a step or epoch counter"):
        rng.uniform(0, "a", step, np.array([0]), 1)


def test_keys_are_63_bits_and_depend_on_every_argument():
    keys = {rng.key(*arguments) for arguments in [(0, "a", 0, 0), (1, "a", 0, 0), (0, "b", 0, 0), (0, "a", 1, 0)]}
    keys |= {rng.key(0, "a", 0, 1), rng.key(1, "a", 1, 1)}
    assert len(keys) == 6 and all(0 <= key < 2**63 for key in keys)
    assert rng.key(0, "a") == rng.key(0, "a", 0, 0) == 378623709570523527  # golden: stored runs depend on it


def test_permutations_and_generators_are_keyed():
    order = rng.permutation(100, 0, "order", 3)
    assert sorted(order.tolist()) == list(range(100)) and order.dtype == np.int64
    assert np.array_equal(order, rng.permutation(100, 0, "order", 3))
    assert not np.array_equal(order, rng.permutation(100, 0, "order", 4))
    draws = [torch.rand(4, generator=rng.generator(0, "init", step)) for step in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
