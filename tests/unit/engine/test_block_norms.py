"""Norms of the gradient by block, on the CPU alone; the engines are compared in tests/distributed."""

from __future__ import annotations

import pytest
import torch

from ijepa_scale.config import ModelConfig
from ijepa_scale.engine.block_norms import BlockNorms
from ijepa_scale.models.registry import build_jepa

MODEL = ModelConfig(name="vit_tiny", image_size=32, patch_size=4, width=24, depth=3, heads=2, predictor_width=12,
                    predictor_depth=2)  # fmt: skip


def test_every_parameter_counts_in_one_block() -> None:
    module = build_jepa(MODEL, seed=0)
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(p.shape, generator=generator) for p in module.parameters()]
    norms = BlockNorms(module, torch.device("cpu"))(gradients)
    blocks = {f"encoder_{n}" for n in range(3)} | {"predictor_0", "predictor_1", "encoder_rest", "predictor_rest"}
    assert set(norms) == blocks
    names = [name for name, _ in module.named_parameters()]
    second = [g for name, g in zip(names, gradients, strict=True) if name.startswith("encoder.blocks.1.")]
    assert norms["encoder_1"].item() == pytest.approx(torch.cat([g.flatten() for g in second]).norm().item(), rel=1e-6)
    rest = [g for n, g in zip(names, gradients, strict=True) if n.startswith("predictor.") and "blocks" not in n]
    assert norms["predictor_rest"].item() == pytest.approx(
        torch.cat([g.flatten() for g in rest]).norm().item(), rel=1e-6
    )
    total = torch.stack(list(norms.values())).norm()
    assert total.item() == pytest.approx(torch.cat([g.flatten() for g in gradients]).norm().item(), rel=1e-6)


def test_parts_of_two_processes_add_up_and_missing_ones_are_zero() -> None:
    module = build_jepa(MODEL, seed=0)
    norms = BlockNorms(module, torch.device("cpu"))
    gradients = [torch.ones_like(p) for p in module.parameters()]
    halves = [[g.flatten()[: g.numel() // 3] for g in gradients], [g.flatten()[g.numel() // 3 :] for g in gradients]]
    whole = norms.norms(norms.squares(halves[0]) + norms.squares(halves[1]))
    for name, norm in norms(gradients).items():
        assert whole[name].item() == pytest.approx(norm.item())
    none = norms([None] * len(gradients))
    assert all(norm == 0 for norm in none.values())
    module.predictor.requires_grad_(False)
    assert set(BlockNorms(module, torch.device("cpu")).names) == {"encoder_rest", "encoder_0", "encoder_1", "encoder_2"}
