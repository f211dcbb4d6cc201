"""Layer norms with other kernels: only the class changes, and missing kernels are refused."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from ijepa_kernels.layer_norm import layer_norm
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


@pytest.mark.parametrize("name", ["triton", "apex"])
def test_the_model_gives_the_same_result_with_the_other_class(name, monkeypatch) -> None:
    """The kernels need CUDA, so stand-ins replace them here: this tests the arguments of the calls."""
    apex_stand_in(monkeypatch)
    monkeypatch.setattr(
        norms, "layer_norm", lambda *given, implementation, **rest: layer_norm(*given, implementation="auto", **rest)
    )
    jepa, images, masks = small_jepa(), images_of(2), random_masks(1, 2, 2)
    expected, names = jepa(images, masks), list(jepa.state_dict())
    norms.use_layer_norm(EngineConfig(layer_norm=name), CUDA, jepa, None)
    kinds = {type(part).__name__ for part in jepa.modules() if "Norm" in type(part).__name__}
    assert kinds == {"TritonLayerNorm" if name == "triton" else "ApexLayerNorm"}
    assert list(jepa.state_dict()) == names
    torch.testing.assert_close(jepa(images, masks), expected)


def test_unavailable_kernels_are_refused() -> None:
    jepa = small_jepa()
    norms.use_layer_norm(EngineConfig(), torch.device("cpu"), jepa)
    with pytest.raises(ConfigError, match="engine.layer_norm is triton but the device is cpu; its kernel needs CUDA"):
        norms.use_layer_norm(EngineConfig(layer_norm="triton"), torch.device("cpu"), jepa)
    with pytest.raises(ConfigError, match="NVIDIA's apex with its CUDA extensions isn't installed .* build it from"):
        norms.use_layer_norm(EngineConfig(layer_norm="apex"), CUDA, jepa)
    with pytest.raises(ConfigError, match="engine.layer_norm is 'fast'; choose one of torch, triton, apex"):
        EngineConfig(layer_norm="fast")
