"""A GPU that this PyTorch can't use stops `device: auto`, unless the user hides it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ijepa_scale import environment
from ijepa_scale.config import EngineConfig
from ijepa_scale.engine import world
from ijepa_scale.engine.gpus import gpu_in_machine, why_unusable
from ijepa_scale.engine.world import choose_device
from ijepa_scale.environment import Launch
from ijepa_scale.errors import ConfigError
from ijepa_scale.train import processes

ALONE = Launch()


def driver_too_old() -> None:
    raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update it.")


@pytest.fixture(autouse=True)
def no_usable_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "init", driver_too_old)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "gpu_in_machine", lambda: "an NVIDIA GPU (/dev/nvidia0)")


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("dev/nvidia0", "an NVIDIA GPU (/dev/nvidia0)"),
        ("proc/driver/nvidia/gpus/0000:3b:00.0", "an NVIDIA GPU (/proc/driver/nvidia/gpus/0000:3b:00.0)"),
        ("dev/kfd", None),  # also of graphics in a processor, and this PyTorch isn't built for ROCm
        ("dev/nvidiactl", None),  # the driver's own, also without a GPU
        ("dev/null", None),
    ],
)
def test_gpus_are_found_without_cuda(tmp_path: Path, path: str, found: str | None) -> None:
    assert gpu_in_machine(tmp_path) is None
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).touch()
    assert gpu_in_machine(tmp_path) == found


def test_an_amd_gpu_counts_for_a_pytorch_for_rocm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/kfd").touch()
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert gpu_in_machine(tmp_path) == "an AMD GPU (/dev/kfd)"


def test_auto_takes_the_cpu_of_a_machine_without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "gpu_in_machine", lambda: None)
    assert choose_device(EngineConfig(), ALONE) == torch.device("cpu")


def test_auto_refuses_a_machine_whose_gpu_cannot_be_used(with_gpu: None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped, processes.user_errors(0):
        choose_device(EngineConfig(), ALONE)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "engine.device is auto and this machine has an NVIDIA GPU (/dev/nvidia0), but torch " in said
    assert "built for CUDA 13.0 and says: The NVIDIA driver on your system is too old (found version 11040);" in said
    assert "or set engine.device=cpu to use the CPU" in said
    assert choose_device(EngineConfig(device="cpu"), ALONE) == torch.device("cpu")


def test_a_build_for_cpus_is_the_reason(with_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    with pytest.raises(
        ConfigError, match="is built for CPUs only; install the build for your GPU from pytorch.org, or"
    ):
        choose_device(EngineConfig(), ALONE)
    with pytest.raises(ConfigError, match="process 0 needs cuda:0 but torch .* is built for CPUs only"):
        choose_device(EngineConfig(device="cuda"), ALONE)


def test_the_allocator_is_set_up_before_a_gpu_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    done = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(environment, "export_allocator", lambda: done.append("allocator"))
    monkeypatch.setattr(torch.cuda, "set_device", done.append)
    chosen = choose_device(EngineConfig(), Launch(local_rank=1))
    assert done == ["allocator", chosen] and chosen == torch.device("cuda", 1)


@pytest.mark.parametrize("value", ["", " ", "-1", "NoDevFiles", "none"])
def test_hidden_gpus_leave_the_cpu_and_the_log_says_so(
    with_gpu: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, value: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert choose_device(EngineConfig(), ALONE) == torch.device("cpu")
    assert f"CUDA_VISIBLE_DEVICES={value!r} hides an NVIDIA GPU (/dev/nvidia0): this run uses the CPU" in caplog.text
    with pytest.raises(ConfigError, match="needs cuda:0 but CUDA_VISIBLE_DEVICES='.*' hides all GPUs; unset it"):
        choose_device(EngineConfig(device="cuda"), ALONE)


@pytest.mark.parametrize("value", ["0,1", "GPU-8932f937", "MIG-4a5"])
def test_chosen_gpus_are_not_hidden(with_gpu: None, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    with pytest.raises(ConfigError, match="too old"):
        choose_device(EngineConfig(), ALONE)


def test_a_driver_that_starts_without_a_gpu_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    assert "says: it found no GPU; update the driver" in why_unusable()
