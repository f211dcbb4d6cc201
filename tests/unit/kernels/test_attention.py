from types import SimpleNamespace

import pytest
import torch
import torch._dynamo.testing
import torch._inductor.config

from ijepa_kernels.attention import SequenceLayout, attention
from ijepa_kernels.attention.reference import attention_reference
from ijepa_kernels.attention.runs import _opaque_backward, opaque_attention_by_runs
from ijepa_kernels.attention.varlen import flash_packed

# fp32 against fp32 in another order of summation; bf16 keeps 8 bits of mantissa, on values of order 1.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
LENGTHS = [(5, 5, 5), (1,), (1, 7, 7, 1, 1, 3), (2, 9, 4)]


def tensors(shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for _ in range(4)]


def compare(function, reference, inputs, tolerance):
    """Forward and the gradients of `function` against `reference`."""
    *inputs, upstream = inputs
    got, expected = function(*inputs), reference(*inputs)
    assert got.shape == expected.shape and got.dtype == expected.dtype
    gradients = torch.autograd.grad(got, inputs, upstream.detach())
    wanted = torch.autograd.grad(expected, inputs, upstream.detach())
    for a, b in zip((got, *gradients), (expected, *wanted), strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.fixture(scope="module")
def varlen_on_cpu():
    """CPU kernels for PyTorch's variable-length op, which has none: so the code around it runs here."""

    def prepare(q, cu_q, cu_k, max_q, max_k, scale):
        layouts = []
        for bounds, longest in ((cu_k, max_k), (cu_q, max_q)):
            layouts.append(SequenceLayout.of(bounds.diff().tolist()))
            assert bounds.dtype == torch.int32 and longest >= layouts[-1].longest and q.shape[-1] % 8 == 0
        return layouts, scale * q.shape[-1] ** 0.5  # the stand-in scales by the padded head_dim

    def forward(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False, scale=None, window_size=None):
        assert not is_causal and all(x.stride(-1) == 1 for x in (q, k, v)), "what the flash kernel asks for"
        layouts, factor = prepare(q, cu_q, cu_k, max_q, max_k, scale)
        out = attention_reference(q * factor, k, v, *layouts)
        return out, q.new_zeros(q.shape[1], q.shape[0], dtype=torch.float32), torch.zeros(2, dtype=torch.uint64)

    def backward(gradient, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, causal, rng, scale=None, window_size=None):
        _, factor = prepare(q, cu_q, cu_k, max_q, max_k, scale)
        dq, dk, dv = _opaque_backward(gradient, q * factor, k, v, cu_q, cu_k)
        return dq * factor, dk, dv

    torch.library.register_kernel("torch_attn::_varlen_attn", "cpu", forward)
    torch.library.register_kernel("torch_attn::_varlen_attn_backward", "cpu", backward)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(2, 3, 7, 16), (1, 1, 1, 5), (2, 2, 4, 13)])
def test_dense_equals_the_reference(shape, dtype):
    compare(attention, attention_reference, tensors(shape, dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("head_dim", [16, 13, 1])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_packed_equals_the_reference(lengths, head_dim, dtype):
    layout = SequenceLayout.of(lengths)
    compare(
        lambda *qkv: attention(*qkv, layout),
        lambda *qkv: attention_reference(*qkv, layout),
        tensors((layout.total, 3, head_dim), dtype),
        TOLERANCE[dtype],
    )


def test_packed_takes_the_strided_slices_of_a_fused_projection():
    layout = SequenceLayout.of((3, 4))
    fused = torch.randn(7, 3, 2, 8, generator=torch.Generator().manual_seed(1))
    q, k, v = fused.unbind(1)
    assert not q.is_contiguous()
    torch.testing.assert_close(attention(q, k, v, layout), attention_reference(q, k, v, layout))


def test_packed_sequences_of_one_length_equal_a_dense_batch():
    dense = tensors((4, 3, 6, 8))[:3]
    packed = [x.transpose(1, 2).flatten(0, 1) for x in dense]
    got = attention(*packed, SequenceLayout.of([6] * 4))
    torch.testing.assert_close(got, attention(*dense).transpose(1, 2).flatten(0, 1))


def test_a_token_alone_returns_its_value():
    q, k, v, _ = tensors((3, 2, 5))
    torch.testing.assert_close(attention(q, k, v, SequenceLayout.of((1, 1, 1))), v)


def test_no_sequence_sees_another():
    q, k, v, _ = tensors((9, 2, 4))
    layout = SequenceLayout.of((4, 5))
    before = attention(q, k, v, layout)
    with torch.no_grad():
        k[4:] += 100.0
        v[4:] -= 100.0
    assert torch.equal(attention(q, k, v, layout)[:4], before[:4])


def test_no_tokens_give_no_tokens():
    q, k, v, _ = tensors((0, 2, 4))
    assert attention(q, k, v, SequenceLayout.of(())).shape == (0, 2, 4)


def test_no_tokens_give_no_tokens_in_compiled_code():
    inputs = tensors((0, 2, 4))[:3]
    out = opaque_attention_by_runs(*inputs, *[SequenceLayout.of(()).cu_seqlens] * 2)
    assert out.shape == (0, 2, 4) and out is not inputs[0]
    assert [g.shape for g in torch.autograd.grad(out.sum(), inputs)] == [(0, 2, 4)] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_layouts_are_checked_whatever_the_device(dtype):
    """With stand-ins for tensors on a GPU, which have nothing that could be read."""
    tokens = SimpleNamespace(is_cuda=True, dtype=dtype, shape=(6, 2, 4))
    six = SequenceLayout.of((3, 3))
    with pytest.raises(ValueError, match="6 packed tokens but the layout's 2 sequences hold 7; pass the layout"):
        attention(tokens, tokens, tokens, SequenceLayout.of((3, 4)))
    with pytest.raises(ValueError, match="6 packed tokens but the layout's 2 sequences hold 5; pass the layout"):
        attention(tokens, tokens, tokens, six, SequenceLayout.of((3, 2)))
    with pytest.raises(ValueError, match="1 sequences of queries but 2 of keys; pass layouts of the same sequences"):
        attention(tokens, tokens, tokens, six, SequenceLayout.of((6,)))


def test_a_layout_of_other_tokens_is_refused():
    q, k, v, _ = tensors((6, 2, 4))
    with pytest.raises(ValueError, match="6 packed tokens but the layout's 2 sequences hold 7; pass the layout"):
        attention(q, k, v, SequenceLayout.of((3, 4)))


@pytest.mark.parametrize("head_dim", [16, 13, 80])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_the_call_to_the_variable_length_kernel(varlen_on_cpu, lengths, head_dim):
    layout = SequenceLayout.of(lengths)
    compare(
        lambda *qkv: flash_packed(*qkv, layout),
        lambda *qkv: attention_reference(*qkv, layout),
        tensors((layout.total, 2, head_dim)),
        TOLERANCE[torch.float32],
    )


@pytest.mark.parametrize("way", ["runs", "opaque", "varlen"])
@pytest.mark.parametrize("asked", [(1, 2, 3, 4), (5, 1, 1, 2)])
def test_some_tokens_ask_all_tokens_of_their_sequence(varlen_on_cpu, way, asked):
    """Queries of other lengths than keys; where the queries are all the tokens, it is self-attention."""
    layout, queries = SequenceLayout.of((5, 7, 7, 3)), SequenceLayout.of(asked)
    q = torch.randn(queries.total, 2, 8, generator=torch.Generator().manual_seed(3), requires_grad=True)
    _, k, v, _ = tensors((layout.total, 2, 8))
    function = {
        "runs": attention,
        "opaque": lambda q, k, v, *both: opaque_attention_by_runs(q, k, v, both[1].cu_seqlens, both[0].cu_seqlens),
        "varlen": flash_packed,
    }[way]
    upstream = torch.randn(q.shape, generator=torch.Generator().manual_seed(4))
    compare(
        lambda *qkv: function(*qkv, layout, queries),
        lambda *qkv: attention_reference(*qkv, layout, queries),
        (q, k, v, upstream),
        TOLERANCE[torch.float32],
    )
    one = SequenceLayout.of((layout.total,))
    torch.testing.assert_close(
        attention(k[:4], k, v, one, SequenceLayout.of((4,))), attention(k, k, v, one)[:4], atol=2e-6, rtol=2e-6
    )


def test_layouts_of_other_sequences_are_refused():
    q, k, v, _ = tensors((6, 2, 4))
    with pytest.raises(ValueError, match="2 sequences of queries but 1 of keys; pass layouts of the same sequences"):
        attention(q, k, v, SequenceLayout.of((6,)), SequenceLayout.of((3, 3)))
    with pytest.raises(ValueError, match="6 packed tokens but the layout's 1 sequences hold 4; pass the layout"):
        attention(q, k, v, SequenceLayout.of((6,)), SequenceLayout.of((4,)))


@pytest.mark.parametrize("way", ["runs", "varlen"])
def test_compiled_packed_attention_is_not_compiled_anew_for_other_lengths(varlen_on_cpu, way):
    counter = torch._dynamo.testing.CompileCounter()
    function = attention if way == "runs" else flash_packed

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def compiled(q, k, v, layout):
        return function(q * 1.0, k, v, layout)

    torch._dynamo.reset()
    for longest in (*range(9, 17), 30, 70, 9):  # the longest has another length and place each time, and other bounds
        lengths = [3, 5, 4, 8, 1]
        lengths.insert(longest % 5, longest)
        layout = SequenceLayout.of(lengths)
        q, k, v, upstream = tensors((layout.total, 2, 8))
        got, expected = compiled(q, k, v, layout), attention_reference(q, k, v, layout)
        torch.testing.assert_close(got, expected, atol=2e-6, rtol=2e-6)
        gradients = zip(*(torch.autograd.grad(x, (q, k, v), upstream) for x in (got, expected)), strict=True)
        for a, b in gradients:
            torch.testing.assert_close(a, b, atol=2e-6, rtol=2e-6)
    assert counter.frame_count <= 2


def test_the_bound_of_a_layout_is_the_next_power_of_two():
    layouts = [SequenceLayout.of(lengths) for lengths in [(), (1,), (2, 1), (5, 8), (9, 3), (128,), (129,)]]
    assert [layout.bound for layout in layouts] == [1, 1, 2, 8, 16, 128, 256]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("head_dim", [24, 64, 80, 88])
def test_packed_on_cuda_equals_the_reference(head_dim):
    layout = SequenceLayout.of((17, 1, 68, 110), "cuda")
    inputs = [x.detach().cuda().requires_grad_() for x in tensors((layout.total, 4, head_dim), torch.bfloat16)]
    compare(lambda *qkv: attention(*qkv, layout), lambda *qkv: attention_reference(*qkv, layout), inputs, 2e-2)


@pytest.mark.parametrize("kernel", [None, "math"])
def test_inductor_compiles_packed_attention(kernel):
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, dynamic=True)
    with torch._inductor.config.patch(force_disable_caches=True):
        for lengths in ((3, 5, 4), (2, 7)):
            layout = SequenceLayout.of(lengths)
            q, k, v, _ = tensors((layout.total, 2, 8))
            expected = attention_reference(q, k, v, layout)
            torch.testing.assert_close(compiled(q, k, v, layout, kernel=kernel), expected, atol=2e-6, rtol=2e-6)
