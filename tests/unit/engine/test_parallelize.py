"""What selective checkpointing keeps, in PyTorch with and without oneDNN, and when blocks are compiled."""

from __future__ import annotations

import importlib.util
import re
import runpy
import shutil
import sysconfig

import pytest
import torch

from ijepa_kernels.linear import onednn
from ijepa_scale.config import EngineConfig
from ijepa_scale.engine import parallelize
from ijepa_scale.engine.parallelize import choose_compile
from ijepa_scale.errors import ConfigError

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)

PRODUCT = torch.ops.mkldnn._linear_pointwise.default if onednn.is_available() else None


@pytest.mark.skipif(PRODUCT is None, reason="needs a PyTorch with oneDNN")
def test_onednn_operations_are_kept_if_they_exist(monkeypatch) -> None:
    assert PRODUCT in parallelize._kept_operations()
    monkeypatch.setattr(onednn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", object())  # as in a PyTorch built without oneDNN
    kept = runpy.run_path(parallelize.__file__)["_kept_operations"]()
    assert kept and PRODUCT not in kept


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A machine with a GPU of compute capability 8.0, gcc and Python's headers, as `choose_compile` sees it."""
    (tmp_path / "Python.h").touch()
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name == "gcc" else None)
    monkeypatch.setattr(sysconfig, "get_path", lambda *names: str(tmp_path))


def test_auto_compiles_on_gpus_only_and_says_why(gpu, caplog):
    with caplog.at_level("INFO"):
        assert choose_compile(EngineConfig(), CUDA) == EngineConfig(compile=True)
        assert choose_compile(EngineConfig(compile_cache="kernels"), CPU) == EngineConfig(compile=False)
    assert "engine.compile is true: compiled blocks read and write less memory on a GPU" in caplog.text
    assert "engine.compile is false: compiled blocks gain nothing on the CPU" in caplog.text


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_a_named_value_stays_and_nothing_is_logged(gpu, caplog, value, device):
    with caplog.at_level("INFO"):
        assert choose_compile(EngineConfig(compile=value), device) == EngineConfig(compile=value)
    assert not caplog.text


def test_an_fp8_target_is_refused_on_a_gpu_unless_its_blocks_are_compiled(gpu, monkeypatch):
    fp8 = EngineConfig(target_precision="fp8")
    assert choose_compile(fp8, CUDA).compile is True
    assert choose_compile(fp8.replace(compile=False), CPU).target_precision == "fp8"
    text = "target_precision is fp8 but engine.compile is {}: .* reads each input twice.*; set engine.compile=auto, or"
    with pytest.raises(ConfigError, match=text.format(r"false \(as configured\)")):
        choose_compile(fp8.replace(compile=False), CUDA)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=text.format(r"auto \(Triton needs a C compiler .*\)")):
        choose_compile(fp8, CUDA)


@pytest.mark.parametrize(
    ("missing", "problem"),
    [
        ("capability", "needs a GPU of compute capability 7.0 and a GPU has 6.1; use a newer GPU"),
        ("triton", "torch.compile needs Triton, which isn't installed; install the triton"),
        ("compiler", "Triton needs a C compiler and finds none; install gcc, or set CC"),
        ("headers", "Triton needs Python's headers and .*Python.h doesn't exist; install python3-dev"),
    ],
)
def test_where_a_gpu_cannot_compile_auto_is_off_and_true_is_refused(
    gpu, monkeypatch, tmp_path, caplog, missing, problem
):
    if missing == "capability":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    elif missing == "triton":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    elif missing == "compiler":
        monkeypatch.setattr(shutil, "which", lambda name: None)
    else:
        (tmp_path / "Python.h").unlink()
    with caplog.at_level("INFO"):
        assert choose_compile(EngineConfig(), CUDA).compile is False
    with pytest.raises(ConfigError, match=f"engine.compile is true but .*{problem}.*, or set engine.compile=false"):
        choose_compile(EngineConfig(compile=True), CUDA)
    pattern = f"engine.compile is false: .*{problem}"
    assert re.search(pattern, caplog.text)
    if missing == "compiler":
        monkeypatch.setenv("CC", "/opt/cc")
        assert choose_compile(EngineConfig(), CUDA).compile is True
