"""The engine selects and logs the attention kernel of each network, or refuses it with a reason."""

from __future__ import annotations

import logging
from typing import get_args

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ijepa_kernels.attention import SequenceLayout
from ijepa_kernels.attention.backend import BACKENDS
from ijepa_scale.config import EngineConfig, ModelConfig, schema
from ijepa_scale.engine import attention as engine_attention
from ijepa_scale.engine.attention import head_shapes, require_packed, use_attention
from ijepa_scale.engine.parallelize import checkpoint_blocks
from ijepa_scale.engine.world import World
from ijepa_scale.errors import ConfigError
from ijepa_scale.models.layers import Attention
from ijepa_scale.models.registry import build_jepa, build_target

WORLD = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
MODEL = ModelConfig(name="vit_tiny", image_size=32, patch_size=8, width=48, depth=2, heads=3, predictor_width=24)


def kernels_of(network):
    """Returns the kernels of a network's attention layers, without repetitions."""
    return tuple({part.kernel for part in network.modules() if isinstance(part, Attention)})


@pytest.fixture
def networks():
    module = build_jepa(MODEL, seed=0)
    return module, build_target(module)


def test_the_config_lists_all_kernels():
    assert get_args(schema.Attention) == BACKENDS
    with pytest.raises(ConfigError, match="engine.attention is 'flahs'; choose one of auto, flash"):
        EngineConfig(attention="flahs")


def test_each_network_gives_a_shape(networks):
    shapes = {shape.role: shape for shape in head_shapes(*networks)}
    assert list(shapes) == ["target", "context", "predictor"]
    assert [(s.heads, s.head_dim, s.tokens, s.trained) for s in shapes.values()] == [
        (3, 16, 16, False), (3, 16, 16, True), (3, 8, 16, True),
    ]  # fmt: skip


@pytest.mark.parametrize("name,kernel", [("auto", "flash"), ("math", "math")])
def test_the_kernels_are_set_returned_and_logged(networks, caplog, name, kernel):
    with caplog.at_level(logging.INFO):
        found = use_attention(EngineConfig(attention=name, precision="fp32"), *networks, WORLD)
    assert found == dict.fromkeys(("target", "context", "predictor"), kernel)
    assert caplog.messages == [f"{name}: {kernel} (target, context, predictor)"]
    assert {kernels_of(network) for network in networks} == {(None if name == "auto" else name,)}


@given(st.tuples(*[st.sampled_from(BACKENDS[1:])] * 3), st.sampled_from(BACKENDS))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_line_on_kernels_fits_100_characters(networks, caplog, kernels, name):
    """Whichever kernels the networks get, and with the prefix of the terminal."""
    caplog.clear()
    roles = ("target", "context", "predictor")
    with caplog.at_level(logging.INFO), pytest.MonkeyPatch.context() as patch:
        for found in ("activate", "choose_backend"):
            patch.setattr(engine_attention, found, lambda *_: "flash")
        patch.setattr(engine_attention, "backend_for", lambda shape, *_: kernels[roles.index(shape.role)])
        use_attention(EngineConfig(attention=name, precision="fp32"), *networks, WORLD)
    (record,) = caplog.records
    assert len(f"[0] {record.name}: {record.getMessage()}") <= 100
    assert all(kernel in record.getMessage() for kernel in kernels)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["flash", "math"])
def test_the_layers_run_in_their_kernel(networks, name, packed):
    use_attention(EngineConfig(attention=name, precision="fp32"), *networks, WORLD)
    encoder, layout = networks[0].encoder, SequenceLayout.of((4, 3))
    with torch.no_grad(), torch.profiler.profile() as profile:
        encoder.blocks[0](torch.zeros(7, 48), layout) if packed else encoder.blocks[0](torch.zeros(1, 7, 48))
    ran = {event.key for event in profile.key_averages()}
    assert ("aten::_scaled_dot_product_flash_attention_for_cpu" in ran) == (name == "flash")


def test_each_network_has_its_own_kernel(networks, monkeypatch, caplog):
    """As on a GPU whose flash kernel doesn't take the predictor's heads."""
    tried = []

    def choose(name, shapes, dtype, device):
        tried.extend(shapes)
        return "math" if shapes[0].role == "predictor" else "flash"

    monkeypatch.setattr(engine_attention, "choose_backend", choose)
    module, target = networks
    found = use_attention(EngineConfig(precision="fp32"), module, target, WORLD)
    assert found == {"target": "flash", "context": "flash", "predictor": "math"}
    assert kernels_of(target) == kernels_of(module.encoder) == ("flash",)
    assert kernels_of(module.predictor) == ("math",)
    assert [(each.queries, each.tokens) for each in tried if each.role == "target"] == [(16, 16), (8, 16)]
    context = [(each.queries, each.tokens) for each in tried if each.role == "context"]
    assert context == [(16, 16), (8, 16), (6, 13), (13, 13)]  # odd numbers too, as masks leave them
    checkpoint_blocks(module, "selective")
    assert kernels_of(module.predictor) == ("math",)


def test_an_unavailable_kernel_is_refused(networks):
    with pytest.raises(ConfigError, match="engine.attention cudnn needs a CUDA device.*set engine.attention=auto"):
        use_attention(EngineConfig(attention="cudnn"), *networks, WORLD)


def test_packed_contexts_need_a_kernel_too(networks, caplog):
    module, _ = networks
    checkpoint_blocks(module, "full")  # as the engine does
    config = EngineConfig(attention="math")
    with caplog.at_level(logging.INFO):
        require_packed(config, module, WORLD)
    assert "packed sequences: one dense call for each run of equal lengths" in caplog.text
    for part in module.predictor.modules():
        if isinstance(part, Attention):
            part.kernel = "cudnn"
    message = "is math and masks.context is packed, but packed predictor.* on cpu.*set masks.context=truncate"
    with pytest.raises(ConfigError, match=message):
        require_packed(config, module, WORLD)
