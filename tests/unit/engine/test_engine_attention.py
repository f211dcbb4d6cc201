"""The engine selects and logs the attention kernel of each network, or refuses it with a reason."""

from __future__ import annotations

import logging
from typing import get_args

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ijepa_kernels.attention.backend import BACKENDS, force_backend
from ijepa_scale.config import EngineConfig, ModelConfig
from ijepa_scale.config.schema import Attention
from ijepa_scale.engine.attention import head_shapes, require_packed, use_attention
from ijepa_scale.engine.parallelize import checkpoint_blocks
from ijepa_scale.engine.world import World
from ijepa_scale.errors import ConfigError
from ijepa_scale.models.registry import build_jepa, build_target

WORLD = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
MODEL = ModelConfig(name="vit_tiny", image_size=32, patch_size=8, width=48, depth=2, heads=3, predictor_width=24)


@pytest.fixture(autouse=True)
def restored():
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        yield
    force_backend("auto", "cpu")


@pytest.fixture
def networks():
    module = build_jepa(MODEL, seed=0)
    return module, build_target(module)


def test_the_config_lists_all_kernels():
    assert get_args(Attention) == BACKENDS
    with pytest.raises(ConfigError, match="engine.attention is 'flahs'; choose one of auto, flash"):
        EngineConfig(attention="flahs")


def test_each_network_gives_a_shape(networks):
    shapes = {shape.role: shape for shape in head_shapes(*networks)}
    assert list(shapes) == ["target", "context", "predictor"]
    assert [(s.heads, s.head_dim, s.tokens, s.trained) for s in shapes.values()] == [
        (3, 16, 16, False), (3, 16, 16, True), (3, 8, 16, True),
    ]  # fmt: skip


@pytest.mark.parametrize("name,kernel", [("auto", "flash"), ("math", "math")])
def test_the_kernels_are_logged(networks, caplog, name, kernel):
    with caplog.at_level(logging.INFO):
        use_attention(EngineConfig(attention=name, precision="fp32"), *networks, WORLD)
    assert f"engine.attention {name} is {name} on cpu: {kernel} for target (3 heads of head_dim 16" in caplog.text
    assert f"{kernel} for predictor (3 heads of head_dim 8" in caplog.text
    assert "packed sequences: one dense call for each run of equal lengths" in caplog.text


def test_an_unavailable_kernel_is_refused(networks):
    with pytest.raises(ConfigError, match="engine.attention cudnn needs a CUDA device.*set engine.attention=auto"):
        use_attention(EngineConfig(attention="cudnn"), *networks, WORLD)


def test_packed_contexts_need_a_kernel_too(networks):
    checkpoint_blocks(networks[0], "full")  # as the engine does
    config = EngineConfig(attention="math")
    require_packed(config, networks[0], WORLD)
    message = "is math and masks.context is packed, but packed context.* in bfloat16 on cpu.*set masks.context=truncate"
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION), pytest.raises(ConfigError, match=message):
        require_packed(config, networks[0], WORLD)
