"""Layer norms with another kernel: only the class changes, and a missing kernel is refused."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from ijepa_scale.config import EngineConfig
from ijepa_scale.engine import norms
from ijepa_scale.errors import ConfigError
from tests.unit.models.packing_by_hand import images_of, random_masks, small_jepa

CUDA = torch.device("cuda")


def apex_stand_in(monkeypatch) -> None:
    module = types.ModuleType("apex.normalization.fused_layer_norm")
    module.fused_layer_norm_affine = lambda x, weight, bias, shape, eps: torch.nn.functional.layer_norm(
        x, shape, weight, bias, eps
    )
    names = ("fused_layer_norm_cuda", "apex", "apex.normalization")
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_the_model_gives_the_same_result_with_the_other_class(monkeypatch) -> None:
    """The kernel needs CUDA, so a stand-in replaces it here: this tests the arguments of the calls."""
    apex_stand_in(monkeypatch)
    jepa, images, masks = small_jepa(), images_of(2), random_masks(1, 2, 2)
    expected, names = jepa(images, masks), list(jepa.state_dict())
    norms.use_layer_norm(EngineConfig(layer_norm="apex"), CUDA, jepa, None)
    kinds = {type(part).__name__ for part in jepa.modules() if "Norm" in type(part).__name__}
    assert kinds == {"ApexLayerNorm"}
    assert list(jepa.state_dict()) == names
    torch.testing.assert_close(jepa(images, masks), expected)


def test_unavailable_kernels_are_refused() -> None:
    jepa = small_jepa()
    norms.use_layer_norm(EngineConfig(), torch.device("cpu"), jepa)
    with pytest.raises(ConfigError, match="engine.layer_norm is apex but the device is cpu; its kernel needs CUDA"):
        norms.use_layer_norm(EngineConfig(layer_norm="apex"), torch.device("cpu"), jepa)
    with pytest.raises(ConfigError, match="NVIDIA's apex with its CUDA extensions isn't installed .* build it from"):
        norms.use_layer_norm(EngineConfig(layer_norm="apex"), CUDA, jepa)
    with pytest.raises(ConfigError, match="engine.layer_norm is 'fast'; choose one of torch, apex"):
        EngineConfig(layer_norm="fast")
    with pytest.raises(ConfigError, match="layer_norm is apex but compile is true: torch.compile can't trace apex"):
        EngineConfig(layer_norm="apex", compile=True)
