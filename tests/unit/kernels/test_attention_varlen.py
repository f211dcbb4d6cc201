"""The wrapper of `varlen_attn`, against stand-ins with the signatures of torch 2.10, 2.11 and 2.12 to 2.15."""

import inspect

import pytest
import torch
from torch.nn.attention.varlen import varlen_attn

from ijepa_kernels.attention import SequenceLayout
from ijepa_kernels.attention.reference import attention_reference
from ijepa_kernels.attention.varlen import VarlenCall


def _attend(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, scale):
    queries, keys = (SequenceLayout.of(bounds.diff().tolist()) for bounds in (cu_seq_q, cu_seq_k))
    assert queries.longest <= max_q and keys.longest <= max_k
    return attention_reference(q * (scale * q.shape[-1] ** 0.5), k, v, keys, queries)


def torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    return _attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, query.shape[-1] ** -0.5)


def torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    return _attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale or query.shape[-1] ** -0.5)


def torch_2_12(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    return torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale)


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("release", [torch_2_10, torch_2_11, torch_2_12])
def test_each_release_computes_the_same(release, padding):
    """A padded head dim keeps the scale of the true one, also where the release takes no scale."""
    layout, queries = SequenceLayout.of((5, 2, 9)), SequenceLayout.of((1, 2, 4))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, 2, 13, generator=generator) for n in (queries.total, layout.total, layout.total))
    expected = attention_reference(q, k, v, layout, queries)
    padded = [torch.nn.functional.pad(x, (0, padding)) for x in (q, k, v)]
    got = VarlenCall(release)(*padded, layout, queries, scale=13**-0.5)
    torch.testing.assert_close(got[..., :13], expected, atol=2e-6, rtol=2e-6)


def test_the_installed_release_is_one_of_them():
    minor = int(torch.__version__.split(".")[1])
    release = {10: torch_2_10, 11: torch_2_11}.get(minor, torch_2_12)
    assert list(inspect.signature(varlen_attn).parameters) == list(inspect.signature(release).parameters)
