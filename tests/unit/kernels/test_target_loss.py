"""target_loss: the reference against the objective's own operations, and what is refused."""

import sys

import pytest
import torch
import torch.nn.functional as F

from ijepa_kernels.target_loss import cost, target_loss, target_loss_reference

CASES = [(6, 9, 24), (1, 1, 7), (5, 3, 13)]  # R, S, D


def inputs(rows, tokens, width, *, dtype=torch.float32, token_dtype=torch.float32):
    """Returns prediction, tokens, lookup with repetitions, weights; differences on both sides of beta."""
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randn(rows, width, generator=generator).mul(1.5).to(dtype).requires_grad_()
    features = (torch.randn(tokens, width, generator=generator) * 3 + 1).to(token_dtype)
    lookup = torch.randint(0, max(1, tokens), (rows,), generator=generator)
    return prediction, features, lookup, torch.rand(rows, generator=generator)


def plain(prediction, tokens, lookup, weights, kind, beta):
    """The same from elementary operations in float64."""
    values = tokens.double()
    centred = values - values.mean(dim=1, keepdim=True)
    target = (centred / (centred.square().mean(dim=1, keepdim=True) + 1e-5).sqrt())[lookup]
    off = prediction.double() - target
    linear = off.abs() - 0.5 * beta
    elements = off.square() if kind == "l2" else torch.where(off.abs() < beta, 0.5 * off.square() / beta, linear)
    weights = torch.full((len(lookup),), 1 / len(lookup)) if weights is None else weights
    return (elements.mean(dim=1) * weights.double()).sum()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("kind", "beta"), [("smooth_l1", 1.0), ("smooth_l1", 0.3), ("l2", 1.0)])
def test_reference_equals_elementary_operations(case, weighted, kind, beta):
    prediction, tokens, lookup, weights = inputs(*case)
    weights = weights if weighted else None
    loss = target_loss(prediction, tokens, lookup, weights, beta=beta, loss=kind)
    expected = plain(prediction, tokens, lookup, weights, kind, beta)
    assert loss.dtype == torch.float32 and loss.shape == ()
    # fp32 against float64
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-7)
    (gradient,) = torch.autograd.grad(loss, prediction)
    (wanted,) = torch.autograd.grad(expected, prediction)
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-7)


def test_without_weights_it_is_the_mean_of_the_objective():
    prediction, tokens, lookup, _ = inputs(6, 9, 24)
    target = F.layer_norm(tokens, (24,), eps=1e-5)[lookup]
    torch.testing.assert_close(target_loss(prediction, tokens, lookup), F.smooth_l1_loss(prediction, target))


def test_bf16_is_computed_in_fp32_and_the_gradient_is_bf16():
    prediction, tokens, lookup, weights = inputs(6, 9, 24, dtype=torch.bfloat16, token_dtype=torch.bfloat16)
    loss = target_loss(prediction, tokens, lookup, weights)
    loss.backward()
    assert prediction.grad.dtype == torch.bfloat16
    exact = target_loss(prediction.detach().float(), tokens.float(), lookup, weights)
    assert torch.equal(loss.detach(), exact)


def test_tokens_get_no_gradient_and_no_rows_no_loss():
    prediction, tokens, lookup, _ = inputs(3, 4, 8)
    tokens.requires_grad_()
    target_loss(prediction, tokens, lookup).backward()
    assert tokens.grad is None
    empty = prediction.detach()[:0].requires_grad_()
    loss = target_loss(empty, tokens, lookup[:0])
    loss.backward()
    assert loss.item() == 0 and empty.grad.shape == (0, 8)
    assert target_loss_reference(empty, tokens[:0], lookup[:0], torch.zeros(0)).item() == 0


def test_the_default_compiles_into_one_graph():
    prediction, tokens, lookup, weights = inputs(6, 9, 24)
    compiled = torch.compile(lambda *values: target_loss(*values), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(prediction, tokens, lookup, weights), target_loss(prediction, tokens, lookup, weights)
    )


def test_cost_counts_each_value_once():
    found = cost(10, 8, prediction_bytes=2, token_bytes=4)
    assert found == {"read_bytes": 10 * 8 * 6 + 120.0, "written_bytes": 10 * 8 * 2 + 40.0, "flops": 960.0}
    assert cost(10, 8, prediction_bytes=2, token_bytes=4, weighted=False)["read_bytes"] == 10 * 8 * 6 + 80.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(3, 5)}, r"prediction \(2, 4\) and tokens \(3, 5\) don't fit; give \(R, D\) and"),
        ({"tokens": torch.zeros(3, 4).half()}, "tokens are torch.float16; give float32 or bfloat16 for each"),
        ({"lookup": torch.zeros(3).long()}, r"lookup is \(3,\) torch.int64; give \(2,\) int64"),
        ({"weights": torch.zeros(2).double()}, r"weights are \(2,\) torch.float64; give \(2,\) float32"),
        ({"lookup": torch.zeros(2, device="meta").long()}, "the tensors are on cpu, meta; move them to one device"),
        ({"loss": "l1"}, "loss 'l1' is unknown; choose one of smooth_l1, l2"),
        ({"beta": 0.0}, "beta is 0.0; give a number above 0"),
        ({"implementation": "cuda"}, "implementation 'cuda' is unknown; choose one of auto, reference, triton"),
        ({"implementation": "triton"}, "target_loss needs CUDA tensors and these are on cpu; choose implementation="),
        (
            {"prediction": torch.zeros(2, 40000), "tokens": torch.zeros(3, 40000), "implementation": "triton"},
            "width 40000 is more than a program's registers hold, 32768; choose implementation='reference'",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    given = {"prediction": torch.zeros(2, 4), "tokens": torch.zeros(3, 4), "lookup": torch.zeros(2).long(), **change}
    with pytest.raises(ValueError, match=message):
        target_loss(given.pop("prediction"), given.pop("tokens"), given.pop("lookup"), **given)


def test_triton_missing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "ijepa_kernels.target_loss.triton", None)
    prediction, tokens, lookup, _ = inputs(2, 3, 4)
    with pytest.raises(ValueError, match="Triton is needed for target_loss .*or choose implementation='reference'"):
        target_loss(prediction, tokens, lookup, implementation="triton")
