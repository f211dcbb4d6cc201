"""The loss against normalised, gathered target features; the Triton kernel computes the gradient in the same pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ijepa_kernels.choice import check_implementation, triton_missing
from ijepa_kernels.target_loss.reference import target_loss as target_loss_reference

IMPLEMENTATIONS = ("auto", "reference", "triton")
LOSSES = ("smooth_l1", "l2")


def target_loss(
    prediction: Tensor,
    tokens: Tensor,
    lookup: Tensor,
    weights: Tensor | None = None,
    *,
    beta: float = 1.0,
    eps: float = 1e-5,
    loss: str = "smooth_l1",
    implementation: str = "auto",
) -> Tensor:
    """Returns sum_r w_r * mean_d f(prediction[r] - layer_norm(tokens[lookup[r]])), () fp32; 0 for no rows.

    The norm has no affine part. Only `prediction` gets a gradient. Doesn't synchronise; sums in a fixed order.

    "auto" is the reference: plain PyTorch, which torch.compile fuses. Triton runs on request only, until a benchmark
    shows that it is faster. Triton's backward scales the gradient in place, so it can run only once: a second call
    with retain_graph fails. With Triton an index outside `tokens` makes the loss NaN; with the reference PyTorch
    raises.

    Args:
        prediction: (R, D) fp32 or bf16; its gradient has the same dtype.
        tokens: (S, D) fp32 or bf16, all the target encoder's features.
        lookup: (R,) int64, the row of `tokens` that each row predicts.
        weights: (R,) fp32 w_r; by default 1 / R each.
        beta: where smooth_l1 turns from quadratic to linear, above 0.
        eps: added to the variance.
        loss: the function f: smooth_l1, or l2 (the squared error).
        implementation: auto, reference or triton.

    Raises:
        ValueError: shapes, dtypes, devices or names don't fit, or Triton isn't available.

    Source: arXiv 2301.08243, equation 1 (l2); the norm, eps and smooth_l1 with beta 1 come from the released code.
    """
    _check(prediction, tokens, lookup, weights)
    if loss not in LOSSES:
        raise ValueError(f"loss {loss!r} is unknown; choose one of {', '.join(LOSSES)}")
    if not beta > 0:
        raise ValueError(f"beta is {beta}; give a number above 0")
    check_implementation(implementation, IMPLEMENTATIONS)
    run = _triton() if implementation == "triton" else target_loss_reference
    return run(prediction, tokens, lookup, weights, beta=beta, eps=eps, loss=loss)


def _triton() -> Callable[..., Tensor]:
    """Returns the Triton kernel's function."""
    try:
        from ijepa_kernels.target_loss.triton import target_loss as kernel
    except ImportError as error:
        raise triton_missing("target_loss", error, "reference") from None
    return kernel


def cost(rows: int, width: int, *, prediction_bytes: int, token_bytes: int, weighted: bool = True) -> dict[str, float]:
    """Returns the bytes that must move and the FLOPs of loss and gradient of (rows, width) values.

    Counts reading the prediction, its token and its index once, and writing the gradient once. An upstream gradient
    other than 1 would read and write the gradient once more. A value takes about 12 operations: 5 for the norm, 4 for
    the loss, 3 for the gradient. Bandwidth is the limit.
    """
    values = rows * width
    read = values * (prediction_bytes + token_bytes) + rows * (12 if weighted else 8)
    return {
        "read_bytes": float(read),
        "written_bytes": float(values * prediction_bytes + 4 * rows),
        "flops": 12.0 * values,
    }


def _check(prediction: Tensor, tokens: Tensor, lookup: Tensor, weights: Tensor | None) -> None:
    floating = (torch.float32, torch.bfloat16)
    if prediction.dim() != 2 or tokens.dim() != 2 or prediction.shape[1] != tokens.shape[1] or not tokens.shape[1]:
        raise ValueError(
            f"prediction {tuple(prediction.shape)} and tokens {tuple(tokens.shape)} don't fit; give (R, D) and (S, D)"
        )
    if prediction.dtype not in floating or tokens.dtype not in floating:
        raise ValueError(
            f"prediction is {prediction.dtype} and tokens are {tokens.dtype}; give float32 or bfloat16 for each"
        )
    rows = prediction.shape[0]
    if lookup.shape != (rows,) or lookup.dtype != torch.int64:
        raise ValueError(f"lookup is {tuple(lookup.shape)} {lookup.dtype}; give ({rows},) int64")
    if weights is not None and (weights.shape != (rows,) or weights.dtype != torch.float32):
        raise ValueError(f"weights are {tuple(weights.shape)} {weights.dtype}; give ({rows},) float32")
    devices = {x.device for x in (prediction, tokens, lookup, weights) if x is not None}
    if len(devices) > 1:
        raise ValueError(f"the tensors are on {', '.join(sorted(map(str, devices)))}; move them to one device")


__all__ = ["IMPLEMENTATIONS", "LOSSES", "cost", "target_loss", "target_loss_reference"]
