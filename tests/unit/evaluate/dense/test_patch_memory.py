"""The memory of patches: shares of classes and nearest patches as computed one by one, and a bound that holds."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ijepa_scale.evaluate.dense.patch_memory import PatchMemory, patch_shares

GRID, SIZE, CLASSES = (2, 3), (8, 9), 4


def data(seed: int, images: int = 5) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    masks = generator.choice([0, 1, 2, 3, 255], (images, *SIZE)).astype(np.uint8)
    masks[0, :4, :3] = 255  # the first patch has no class
    return generator.normal(size=(images, 6, 7)).astype(np.float16), masks


def remembered(tokens: np.ndarray, masks: np.ndarray, limit: int = 1000, seed: int = 0) -> PatchMemory:
    return PatchMemory(tokens, masks, GRID, CLASSES, limit=limit, seed=seed, device=torch.device("cpu"))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_shares_are_those_of_the_labelled_pixels(seed):
    _, masks = data(seed)
    shares = patch_shares(masks[0], GRID, CLASSES)
    for patch in range(6):
        row, column = divmod(patch, 3)
        block = masks[0, 4 * row : 4 * row + 4, 3 * column : 3 * column + 3]
        known = block[block != 255]
        expected = [(known == index).mean() if len(known) else 0.0 for index in range(CLASSES)]
        assert np.allclose(shares[patch], expected)


def test_the_nearest_patches_vote_by_similarity():
    tokens, masks = data(0)
    memory = remembered(tokens, masks)
    queries = torch.randn(11, 7, generator=torch.Generator().manual_seed(0))
    found = memory(queries, neighbors=4, temperature=0.1)
    bank = tokens.reshape(-1, 7).astype(np.float64)
    shares = np.concatenate([patch_shares(mask, GRID, CLASSES) for mask in masks])
    bank, shares = bank[1:], shares[1:]  # the patch without a class isn't remembered
    for query, answer in zip(queries.double().numpy(), found.numpy(), strict=True):
        cosine = bank @ query / np.linalg.norm(bank, axis=1) / np.linalg.norm(query)
        best = np.argsort(-cosine)[:4]
        weights = np.exp(cosine[best] / 0.1)
        assert np.allclose(answer, weights @ shares[best] / weights.sum(), atol=1e-4)


def test_no_more_than_the_limit_is_remembered_and_the_seed_draws():
    tokens, masks = data(1, images=30)
    whole, few, again, other = (remembered(tokens, masks, *given) for given in ((999,), (40,), (40,), (40, 1)))
    assert len(whole.keys) == 179 and len(few.keys) == 40
    assert torch.equal(few.keys, again.keys) and not torch.equal(few.keys, other.keys)
    rows = {tuple(key): tuple(value) for key, value in zip(whole.keys.tolist(), whole.values.tolist(), strict=True)}
    assert all(
        rows[tuple(key)] == tuple(value) for key, value in zip(few.keys.tolist(), few.values.tolist(), strict=True)
    )
