"""Attention kernels, packed sequences, compiled blocks and the target's graph on one GPU. Run: pytest -m gpu."""

from __future__ import annotations

import functools

import pytest
import torch
import torch._dynamo
from torch.nn import attention as torch_attention

from ijepa_kernels.attention import SequenceLayout, attention
from ijepa_kernels.attention.backend import HeadShape, activate, backend_for, choose_backend, packed_problem
from ijepa_kernels.attention.reference import attention_reference
from ijepa_scale.config import AdamWConfig, EngineConfig
from ijepa_scale.engine import parallelize
from ijepa_scale.engine.graphs import GraphedTarget
from ijepa_scale.engine.world import World
from ijepa_scale.models.registry import build_encoder
from tests.distributed import training
from tests.distributed.test_compiled import BATCH, MASKS, CountingBackend
from tests.distributed.test_packed import differences
from tests.distributed.training import make, masks_config, part

pytestmark = pytest.mark.gpu
# The heads of ViT-H/14 and of its predictor: neither 80 nor 24 is a power of two.
TARGET = HeadShape(role="target", heads=16, head_dim=80, queries=256, tokens=256, trained=False)
PREDICTOR = HeadShape(role="predictor", heads=16, head_dim=24, queries=51, tokens=120)
BF16 = 2e-2  # 8 bits of mantissa, on values of order 1


@pytest.fixture(autouse=True)
def restored():
    yield
    activate("auto", "cuda")


def world() -> World:
    return World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cuda", 0))


def tensors(*shape: int, count: int, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    return [torch.randn(shape, generator=generator, device="cuda", dtype=dtype) for _ in range(count)]


@pytest.mark.parametrize("head_dim", [80, 24])
@pytest.mark.parametrize("name", ["flash", "cudnn", "efficient", "math"])
def test_each_forced_kernel_runs_and_agrees_with_the_reference(name: str, head_dim: int) -> None:
    assert choose_backend(name, [TARGET, PREDICTOR], torch.bfloat16, "cuda") == name
    assert {backend_for(shape, torch.bfloat16, "cuda", name) for shape in (TARGET, PREDICTOR)} == {name}
    q, k, v = (x.requires_grad_() for x in tensors(2, 16, 77, head_dim, count=3))
    (upstream,) = tensors(2, 16, 77, head_dim, count=1)
    got, expected = attention(q, k, v, kernel=name), attention_reference(q, k, v)
    torch.testing.assert_close(got, expected, atol=BF16, rtol=BF16)
    for ours, theirs in zip(*(torch.autograd.grad(out, (q, k, v), upstream) for out in (got, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=BF16, rtol=BF16)


def test_auto_chooses_flash_in_bf16_and_efficient_in_fp32() -> None:
    assert choose_backend("auto", [TARGET, PREDICTOR], torch.bfloat16, "cuda") == "flash"
    assert choose_backend("auto", [TARGET, PREDICTOR], torch.float32, "cuda") == "efficient"


def test_a_kernel_that_cannot_run_here_is_refused_and_never_replaced() -> None:
    with pytest.raises(ValueError, match="attention flash can't run target.* in float32 on cuda"):
        choose_backend("flash", [TARGET], torch.float32, "cuda")
    q = torch.zeros(1, 2, 3, 16, device="cuda")
    with pytest.raises(RuntimeError, match="No available kernel"):
        attention(q, q, q, kernel="flash")


@pytest.mark.parametrize("name", ["fa3", "fa4"])
def test_other_flash_kernels_if_installed(name: str) -> None:
    try:
        activate(name, "cuda")
    except ValueError as error:
        pytest.skip(str(error))
    assert torch_attention.current_flash_attention_impl() == name.upper()
    assert choose_backend(name, [TARGET, PREDICTOR], torch.bfloat16, "cuda") == name
    assert backend_for(TARGET, torch.bfloat16, "cuda", name) == name
    if name == "fa4" and torch.__version__.startswith("2.11"):
        assert "windowed attention not supported" in (packed_problem(PREDICTOR, torch.bfloat16, "cuda") or "")


@pytest.mark.parametrize("head_dim", [24, 80, 88, 20])
def test_packed_sequences_with_fewer_queries_than_keys(head_dim: int) -> None:
    layout, queries = SequenceLayout.of((17, 1, 68, 110), "cuda"), SequenceLayout.of((3, 1, 60, 20), "cuda")
    (q,) = tensors(queries.total, 4, head_dim, count=1)
    k, v = tensors(layout.total, 4, head_dim, count=2)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    got, expected = attention(q, k, v, layout, queries), attention_reference(q, k, v, layout, queries)
    torch.testing.assert_close(got, expected, atol=BF16, rtol=BF16)
    upstream = torch.ones_like(got)
    for ours, theirs in zip(*(torch.autograd.grad(out, (q, k, v), upstream) for out in (got, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=BF16, rtol=BF16)


def test_packed_equals_each_image_alone_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((parallelize, "compile_blocks"), (training, "build_jepa")):
        monkeypatch.setattr(module, name, getattr(module, name))  # restores what `differences` replaces
    torch.backends.cuda.matmul.allow_tf32 = False
    variants = [(mode, backend) for mode in ("none", "full", "selective") for backend in (None, "inductor")]
    results = differences(world(), {"strategy": "plain"}, variants)
    for variant, (prediction, loss, gradient, _) in zip(variants, results, strict=True):
        assert max(prediction, loss, gradient) <= 1e-4, variant  # different shapes run different kernels


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_two_graphs_per_role_in_bf16(monkeypatch: pytest.MonkeyPatch, checkpointing: str, masks: str) -> None:
    """On a GPU, packed sequences use the variable-length kernel, which doesn't exist on the CPU."""
    torch._dynamo.reset()
    backend = CountingBackend()
    compiled = functools.partial(parallelize.compile_blocks, backend=backend)  # type: ignore[arg-type]
    monkeypatch.setattr(parallelize, "compile_blocks", compiled)
    settings = EngineConfig(strategy="plain", compile=True, checkpointing=checkpointing)
    _, step = make(world(), settings, AdamWConfig(), masks_config(**MASKS[masks]))
    for index in range(12):
        step(part(index, world()))
    assert BATCH > 1 and max(backend.graphs.values()) <= 2, backend.graphs


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@torch.no_grad()
def test_the_graphed_target_equals_the_eager_one_before_and_after_an_update(precision: str) -> None:
    encoder = build_encoder("vit_tiny", image_size=32, patch_size=4, depth=4, seed=1).cuda().requires_grad_(False)
    target = GraphedTarget(encoder)
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=precision == "bf16"):
        for step, count in enumerate((30, 7, 50)):
            (images,) = tensors(8, 3, 32, 32, count=1, dtype=torch.float32)
            wanted = torch.arange(count, device="cuda").expand(8, -1).contiguous()
            expected = encoder(images + step, wanted=wanted)
            got = target(images + step, wanted=wanted)
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
            torch._foreach_mul_(list(encoder.parameters()), 1.1)


@pytest.mark.parametrize("change", [{}, {"compile": True}, {"accumulation": 2}], ids=str)
def test_training_with_a_graphed_target_stays_the_same(change: dict) -> None:
    plain = EngineConfig(**{"strategy": "plain", "precision": "bf16", "compile": False, **change})
    curves = []
    for settings in (plain, plain.replace(cuda_graphs=True)):
        _, step = make(world(), settings, AdamWConfig(), masks_config())
        curves.append([float(step(part(index, world())).loss) for index in range(10)])
    assert max(abs(a - b) for a, b in zip(*curves, strict=True)) <= 1e-3
