"""The kernels on a GPU: Triton against the references, no synchronisation, fp8, and NVIDIA's apex if installed."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F

from ijepa_kernels.fp8_linear import CAPABILITY, fp8_linear, quantise_rows
from ijepa_kernels.fused_tail import fused_tail
from ijepa_kernels.fused_tail import prepare as prepare_tail
from ijepa_kernels.target_loss import target_loss
from ijepa_kernels.target_update import prepare, target_update
from tests.unit.kernels.test_fp8_linear import layer
from tests.unit.kernels.test_fused_tail import LIMITS, RATES, WEIGHTS, check, clone, compare, gradients_of, weights_of
from tests.unit.kernels.test_target_loss import inputs as loss_inputs
from tests.unit.kernels.test_target_update import lists, ulps

pytestmark = pytest.mark.gpu
# fp32: sums are in another order. bf16: one rounds once, the other twice if the upstream gradient isn't 1.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 3 * 2**-8}


def on_gpu(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.detach().cuda().requires_grad_(x.requires_grad) for x in tensors]


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == expected.dtype and found.shape == expected.shape
    scale = expected.abs().max().float().item() if expected.numel() else 1.0
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(2000, 700, 1280), (333, 90, 1408), (50, 9, 384), (7, 3, 9001), (0, 4, 64)])
def test_target_loss(shape, dtype, compiled):
    given = on_gpu(*loss_inputs(*shape, dtype=dtype))
    for options, upstream in (({"loss": "smooth_l1", "beta": 0.5}, 1.0), ({"loss": "l2"}, 0.3)):
        pair = []
        for implementation in ("triton", "reference"):
            run = lambda *x, i=implementation, o=options: target_loss(*x, implementation=i, **o)  # noqa: E731
            run = torch.compile(run, fullgraph=True, dynamic=False) if compiled and implementation == "triton" else run
            loss = run(*given)
            pair.append((loss.detach(), torch.autograd.grad(loss * upstream, given[0])[0]))
        for found, expected in zip(*pair, strict=True):
            close(found, expected)


def test_target_loss_is_deterministic_and_checks_bounds():
    prediction, tokens, lookup, weights = on_gpu(*loss_inputs(3000, 700, 1280))
    values = [target_loss(prediction, tokens, lookup, weights, implementation="triton") for _ in range(3)]
    assert torch.equal(values[0], values[1]) and torch.equal(values[1], values[2])
    lookup[5] = 1 << 40
    assert target_loss(prediction, tokens, lookup, weights, implementation="triton").isnan()


@pytest.mark.parametrize("implementation", ["eager", "triton"])
@pytest.mark.parametrize("flag", [None, 0.0, 1.0, 3.0])
@pytest.mark.parametrize("momentum", [1.0, 0.9999, 0.996, 0.5, 0.0])
def test_target_update(momentum, flag, implementation):
    target, source, copies = (on_gpu(*x) for x in lists([(3, 5), (), (0, 4), (40000,), (1280, 1280), (16384,)]))
    old, expected = [x.clone() for x in target], [x.clone() for x in target]
    if not flag:
        torch._foreach_lerp_(expected, source, 1.0 - momentum)
    stop = None if flag is None else torch.full((), flag, device="cuda")
    target_update(target, source, momentum, copies=copies, found_nonfinite=stop, implementation=implementation)
    host = [[x.cpu() for x in tensors] for tensors in (target, expected, old, source)]
    assert ulps(*host) <= 1
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(copies, target, strict=True))


def tail_cases() -> list[tuple]:
    """Returns the weights of the CPU's tests and wide ones; without fp8 copies where Triton has no fp8."""
    cases = [*WEIGHTS, ((64, 5120), 0, "ct8"), ((1280, 588), 1, "ctb"), ((300, 1280), 2, "c")]
    if torch.cuda.get_device_capability() < CAPABILITY:
        return [(shape, group, has.replace("8", "")) for shape, group, has in cases]
    return cases


@pytest.mark.parametrize("scale", [None, 0.25])
@pytest.mark.parametrize("shift", [0, 1])
def test_fused_tail_equals_adamw_target_update_and_copies_over_fifty_steps(scale, shift):
    cases = [case for case in tail_cases() if not shift or "8" not in case[2]]
    check(compare("triton", cases, scale=scale, shift=shift, device="cuda"), LIMITS["reference"])


@pytest.mark.parametrize("rows", [(300,), (2, 7), (1,), (0,)])
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_fp8_linear(rows, fast, biased):
    if torch.cuda.get_device_capability() < CAPABILITY:
        with pytest.raises(ValueError, match="fp8 products need 8.9 or higher; set precision bf16"):
            fp8_linear(torch.zeros(2, 16).cuda(), *quantise_rows(torch.zeros(16, 16).cuda()))
        return
    x, weight, bias = on_gpu(*layer(rows, 1280, 5120, torch.bfloat16))
    given = (x, *quantise_rows(weight), bias if biased else None)
    found = fp8_linear(*given, fast_accumulation=fast)
    expected = fp8_linear(*given, implementation="reference")
    assert found.dtype == torch.bfloat16 and found.shape == expected.shape
    # result and bias are rounded to bf16; sums of tensor cores have fewer bits with fast accumulation
    limit = (2e-2 if fast else 5e-3) * expected.float().norm()
    assert (found.float() - expected.float()).norm() <= limit


def test_nothing_synchronises():
    loss_given, x = on_gpu(*loss_inputs(64, 32, 256)), torch.ones(64, 256, device="cuda")
    target, source, copies = (on_gpu(*x) for x in lists([(256, 256)]))
    table, flag = prepare(target, source, copies), torch.zeros((), device="cuda")
    weights = clone(gradients_of(weights_of(tail_cases()), 0), "cuda")
    tail_table = prepare_tail(weights)

    def everything() -> None:
        target_loss(*loss_given, implementation="triton").backward()
        options = {"copies": copies, "found_nonfinite": flag}
        target_update(target, source, 0.9, table=table, implementation="triton", **options)
        target_update(target, source, 0.9, implementation="triton", **options)
        target_update(target, source, 0.9, implementation="eager", **options)
        tail = {"momentum": 0.9, "stopped": flag, "gradient_scale": flag, "implementation": "triton"}
        fused_tail(weights, RATES, table=tail_table, **tail)
        if torch.cuda.get_device_capability() >= CAPABILITY:
            fp8_linear(x, *quantise_rows(target[0].detach()))

    everything()  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def apex(module: str):
    """Returns a module of NVIDIA's apex, or skips the test if it isn't installed. apex on PyPI is another project."""
    try:
        importlib.import_module("amp_C")
        return importlib.import_module(module)
    except ImportError as error:
        pytest.skip(f"NVIDIA's apex with its CUDA extensions isn't installed ({error})")


def test_apex_adam_equals_torchs_adamw_over_ten_steps():
    adam = apex("apex.optimizers").FusedAdam
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((64, 33), (129,), (1, 2, 3))]
    gradients = [[torch.randn(x.shape, generator=generator).cuda() for x in start] for _ in range(10)]
    settings = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.05}
    ends = []
    for build in (
        lambda x: adam(x, adam_w_mode=True, **settings),
        lambda x: torch.optim.AdamW(x, fused=True, **settings),
    ):
        parameters = [x.cuda().requires_grad_() for x in start]
        optimizer = build(parameters)
        for step in gradients:
            for parameter, gradient in zip(parameters, step, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
        ends.append(parameters)
    for found, expected in zip(*ends, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # 10 steps of 1e-3 in fp32


def test_apex_layer_norm_equals_pytorchs():
    norm = apex("apex.normalization").FusedLayerNorm
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, upstream = (
        torch.randn(shape, generator=generator).cuda().requires_grad_()
        for shape in ((3, 50, 1280), (1280,), (1280,), (3, 50, 1280))
    )
    theirs = norm(1280, eps=1e-6).cuda()
    with torch.no_grad():
        theirs.weight.copy_(weight)
        theirs.bias.copy_(bias)
    expected = theirs(x)
    wanted = torch.autograd.grad(expected, (x, theirs.weight, theirs.bias), upstream)
    out = F.layer_norm(x, (1280,), weight, bias, 1e-6)
    close(out.detach(), expected.detach())
    for found, value in zip(torch.autograd.grad(out, (x, weight, bias), upstream), wanted, strict=True):
        close(found, value)
