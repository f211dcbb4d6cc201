"""What `engine.deterministic` sets in a process on a GPU, and what it refuses."""

from __future__ import annotations

import os

import pytest
import torch

from ijepa_scale.config import AdamWConfig, EngineConfig
from ijepa_scale.engine import build
from ijepa_scale.engine.determinism import make_deterministic
from ijepa_scale.engine.world import World
from ijepa_scale.errors import ConfigError

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
ON = EngineConfig(deterministic=True)


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    cudnn, filled = torch.backends.cudnn, torch.utils.deterministic.fill_uninitialized_memory
    before = cudnn.deterministic, cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    cudnn.deterministic, cudnn.benchmark = before
    torch.utils.deterministic.fill_uninitialized_memory = filled


def settings():
    names = os.environ.get("CUBLAS_WORKSPACE_CONFIG"), torch.backends.cudnn.deterministic
    return torch.are_deterministic_algorithms_enabled(), *names


def test_a_gpu_is_switched_to_deterministic_operations():
    make_deterministic(EngineConfig(), CUDA)
    assert settings() == (False, None, False)
    torch.backends.cudnn.benchmark = True
    make_deterministic(ON, CUDA)
    assert settings() == (True, ":4096:8", True) and not torch.backends.cudnn.benchmark
    assert not torch.is_deterministic_algorithms_warn_only_enabled()  # or flash's backward would stay as it is
    assert not torch.utils.deterministic.fill_uninitialized_memory


def test_the_cpu_stays_as_it_is_and_the_log_says_so(caplog):
    with caplog.at_level("INFO"):
        make_deterministic(ON, CPU)
    assert settings() == (False, None, False)
    assert "engine.deterministic is true: the CPU repeats results in any case" in caplog.text


def test_workspaces_of_the_user_are_kept_or_refused(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    make_deterministic(ON, CUDA)
    assert settings()[1] == ":16:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:2")
    with pytest.raises(
        ConfigError, match="CUBLAS_WORKSPACE_CONFIG is ':4096:2'; unset it, or set it to :4096:8 or :16:8"
    ):
        make_deterministic(ON, CUDA)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"layer_norm": "apex"},
            "engine.layer_norm is apex, whose kernel doesn't promise .*; set engine.layer_norm=torch",
        ),
        ({"attention": "cudnn"}, "engine.attention is cudnn, whose backward .*; set engine.attention=auto, flash or"),
    ],
)
def test_what_has_no_deterministic_form_is_refused_by_name(change, text):
    with pytest.raises(ConfigError, match=f"engine.deterministic is true but {text}"):
        make_deterministic(ON.replace(**change), CUDA)
    assert settings() == (False, None, False)


def test_engines_are_built_after_it(monkeypatch):
    seen = []
    monkeypatch.setattr(build, "make_deterministic", lambda config, device: seen.append((config.deterministic, device)))
    monkeypatch.setitem(build._ENGINES, "plain", lambda *given: seen.append("engine"))
    world = World(rank=0, size=1, local_rank=0, local_size=1, device=CPU)
    build.build_engine(world, ON.replace(strategy="plain"), AdamWConfig())
    assert seen == [(True, CPU), "engine"]
