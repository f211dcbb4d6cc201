"""The doctor's checks of one host: each with something that makes it wrong, and the same check when all is well."""

from __future__ import annotations

import os
import resource
import time
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ijepa_scale.doctor import gpu_health, limits, software
from ijepa_scale.doctor.finding import Finding, checked, size_text
from ijepa_scale.no_answer import NoAnswer, within

GIB, CPU = 2**30, torch.device("cpu")


def only(findings: object) -> Finding:
    (finding,) = findings  # type: ignore[misc]
    assert (finding.verdict == "wrong") == bool(finding.remedy), finding
    return finding


def write(root: Path, name: str, text: str) -> Path:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)
    return root


def test_this_machine_has_what_the_package_needs() -> None:
    finding = only(software.versions())
    assert finding.verdict == "ok" and f"torch {metadata.version('torch')}" in finding.found


@settings(max_examples=30, deadline=None)
@given(wanted=st.tuples(st.integers(2, 3), st.integers(0, 20)), found=st.tuples(st.integers(2, 3), st.integers(0, 20)))
def test_torchvision_for_another_torch_is_wrong(wanted: tuple[int, int], found: tuple[int, int]) -> None:
    needs, have = ".".join(map(str, (*wanted, 0))), ".".join(map(str, (*found, 0)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metadata, "requires", lambda name: [f"torch=={needs}"] if name == "torchvision" else [])
        patch.setattr(metadata, "version", lambda name: f"{have}+cu130" if name == "torch" else "9.9")
        finding = only(software.versions())
    assert (finding.verdict == "wrong") == (wanted != found)
    if wanted != found:
        assert f"torchvision needs torch=={needs}, and this is {have}+cu130" in finding.found


@pytest.mark.parametrize(
    ("requirement", "said"),
    [
        ("numpy>=99", "ijepa_scale needs numpy>=99, and this is"),
        ("no-such-package>=1", "ijepa_scale needs no-such-package, which isn't installed"),
        ('no-such-package>=1; extra == "test"', None),
    ],
)
def test_requirements_that_are_not_met_are_named(
    requirement: str, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "requires", lambda name: [requirement] if name == "ijepa_scale" else [])
    finding = only(software.versions())
    assert finding.verdict == ("wrong" if said else "ok") and (said or "Python") in finding.found


@settings(max_examples=50, deadline=None)
@given(
    major=st.integers(400, 999),
    built=st.sampled_from(["11.8", "12.1", "12.6", "13.0"]),
    form=st.sampled_from(["NVIDIA UNIX x86_64 Kernel Module", "NVIDIA UNIX Open Kernel Module for x86_64"]),
)
def test_a_driver_older_than_the_wheel_needs_is_wrong(
    major: int, built: str, form: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    text = f"NVRM version: {form}  {major}.54.15  Wed Mar  6 2024\nGCC version: gcc 12.3.0\n"
    root = write(tmp_path_factory.mktemp("root"), "proc/driver/nvidia/version", text)
    oldest = {"11": 450, "12": 525, "13": 580}[built[:2]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.version, "cuda", built)
        finding = only(software.driver(root))
    assert (finding.verdict == "wrong") == (major < oldest)
    assert finding.found.startswith(f"{major}.54.15, for PyTorch's CUDA {built} (from {oldest})")


def test_without_a_driver_nothing_is_checked(tmp_path: Path) -> None:
    assert only(software.driver(tmp_path)).verdict == "not checked"


def test_a_gpu_that_this_pytorch_cannot_use_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(software, "gpu_in_machine", lambda: None)
    assert only(software.usable_gpus()).verdict == "not checked"
    monkeypatch.setattr(software, "gpu_in_machine", lambda: "an NVIDIA GPU (/dev/nvidia0)")
    monkeypatch.setattr(software, "why_unusable", lambda: "torch says: too old; update the driver")
    monkeypatch.setattr(software.environment, "hidden_gpus", lambda: None)
    finding = only(software.usable_gpus())
    assert finding.found == "an NVIDIA GPU (/dev/nvidia0), but torch says: too old"
    assert finding.verdict == "wrong" and finding.remedy == "update the driver"
    monkeypatch.setattr(software.environment, "hidden_gpus", lambda: "CUDA_VISIBLE_DEVICES=''")
    assert only(software.usable_gpus()).verdict == "not checked"


def test_a_missing_compiler_is_wrong_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software.shutil, "which", lambda name: None)
    assert only(software.compilers(CPU, needs_ops=False)).verdict == "ok"
    finding = only(software.compilers(CPU, needs_ops=True))
    assert finding.verdict == "wrong" and finding.remedy == "install g++"
    problem = "Triton needs a C compiler and finds none; install gcc, or set CC"
    monkeypatch.setattr(software, "compile_problem", lambda device: problem)
    finding = only(software.compilers(torch.device("cuda"), needs_ops=False))
    assert finding.verdict == "wrong" and finding.remedy == "install gcc, or set CC"


def test_a_compile_cache_that_cannot_be_used_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    fresh = tmp_path / "new" / "cache"
    assert only(software.compile_cache(str(fresh))).found == f"{fresh} will be made" and not fresh.exists()
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    assert "chmod go-w" in only(software.compile_cache(str(tmp_path / "open"))).remedy
    (tmp_path / "file").write_text("")
    finding = only(software.compile_cache(str(tmp_path / "file" / "cache")))
    assert finding.verdict == "wrong" and finding.remedy == "set engine.compile_cache"


@settings(max_examples=50, deadline=None)
@given(free=st.integers(0, 4 * GIB), processes=st.integers(1, 16))
def test_a_small_dev_shm_is_wrong(free: int, processes: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        state = SimpleNamespace(f_frsize=1, f_blocks=4 * GIB, f_bavail=free)
        patch.setattr(os, "statvfs", lambda folder: state)
        finding = only(limits.shared_memory(processes))
    assert (finding.verdict == "wrong") == (free < processes * limits.SHARED_BYTES_PER_PROCESS)


@settings(max_examples=50, deadline=None)
@given(soft=st.one_of(st.just(resource.RLIM_INFINITY), st.integers(1, 4096)), adapters=st.sets(st.just("mlx5_0")))
def test_low_limits_are_wrong(soft: int, adapters: set[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("root")
    for name in adapters:
        write(root, f"sys/class/infiniband/{name}", "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resource, "getrlimit", lambda kind: (soft, resource.RLIM_INFINITY))
        files, locked = only(limits.open_files()), only(limits.locked_memory(root))
    unlimited = soft == resource.RLIM_INFINITY
    assert (files.verdict == "wrong") == (not unlimited and soft < limits.OPEN_FILES)
    assert (locked.verdict == "wrong") == (bool(adapters) and not unlimited)


@settings(max_examples=50, deadline=None)
@given(most=st.integers(1, 64 * GIB), quota=st.integers(1000, 900_000), processes=st.integers(1, 8))
def test_a_control_group_that_gives_too_little_is_wrong(
    most: int, quota: int, processes: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = write(tmp_path_factory.mktemp("root"), "proc/self/cgroup", "0::/job/task\n")
    write(root, "proc/meminfo", f"MemAvailable: {64 * GIB // 1024} kB\n")
    write(root, "sys/fs/cgroup/job/memory.max", str(most))
    write(root, "sys/fs/cgroup/job/memory.current", "0")
    write(root, "sys/fs/cgroup/job/cpu.max", f"{quota} 100000")
    memory, cores = only(limits.memory(processes, root)), only(limits.cores(processes, root))
    assert (memory.verdict == "wrong") == (most < limits.MEMORY_PER_PROCESS * processes)
    assert (cores.verdict == "wrong") == (min(quota / 100_000, len(os.sched_getaffinity(0))) < processes)


HEALTHY = {
    "index": "0", "name": "NVIDIA H100 80GB HBM3", "memory.total": "81559", "memory.used": "4",
    "temperature.gpu": "31", "ecc.errors.uncorrected.volatile.total": "0", "pcie.link.width.current": "16",
    "pcie.link.width.max": "16", "clocks_throttle_reasons.active": "0x0000000000000001",
}  # fmt: skip


def smi(changes: dict[str, str]) -> gpu_health.Query:
    told = HEALTHY | changes

    def query(fields: tuple[str, ...]) -> list[list[str]]:
        if any(field not in told for field in fields):
            raise OSError("nvidia-smi says: Field is not a valid field to query.")
        return [[told[field] for field in fields]]

    return query


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"ecc.errors.uncorrected.volatile.total": "[N/A]", "temperature.gpu": "[N/A]"}, None),
        ({"ecc.errors.uncorrected.volatile.total": "3"}, "3 uncorrected memory errors"),
        ({"clocks_throttle_reasons.active": "0x0000000000000008"}, "clocks lowered: hardware slowdown"),
        ({"clocks_throttle_reasons.active": "0x0000000000000060"}, "too hot (software); clocks lowered: too hot (hard"),
        ({"clocks_event_reasons.active": "0x0000000000000080"}, "clocks lowered: power brake"),
        ({"pcie.link.width.current": "8"}, "PCIe x8 of x16"),
        ({"memory.used": "40000"}, "other programs hold 41.9 GB"),
    ],
)
def test_an_unhealthy_gpu_is_wrong(changes: dict[str, str], said: str | None) -> None:
    finding = only(gpu_health.gpu_health(smi(changes)))
    assert finding.verdict == ("ok" if said is None else "wrong") and (said or "85.5 GB memory") in finding.found


def test_nvidia_smi_is_asked_as_it_is_called_and_may_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\necho "$1" > ' + str(tmp_path / "asked") + "\necho '0, NVIDIA H200, [N/A]'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert gpu_health.ask_nvidia_smi(("index", "name", "x")) == [["0", "NVIDIA H200", "[N/A]"]]
    assert (tmp_path / "asked").read_text() == "--query-gpu=index,name,x\n"
    program.write_text("#!/bin/sh\necho Unable to determine the device handle\nexit 15\n")
    with pytest.raises(OSError, match="nvidia-smi says: Unable to determine the device handle"):
        gpu_health.ask_nvidia_smi(("index",))
    program.write_text("#!/bin/sh\nexec sleep 30\n")
    monkeypatch.setattr(gpu_health, "LIMIT_S", 0.2)
    assert only(checked("GPU health", gpu_health.gpu_health, remedy="reset it")).found == "no answer in 0.2 s"


def test_a_check_that_fails_or_hangs_is_one_line() -> None:
    def fail() -> list[Finding]:
        raise RuntimeError("cannot\nat all")

    assert only(checked("a", fail, remedy="do b")) == Finding(check="a", found="cannot", verdict="wrong", remedy="do b")
    begin = time.monotonic()
    with pytest.raises(NoAnswer, match="no answer in 0.1 s"):
        within(0.1, lambda: time.sleep(60))
    assert time.monotonic() - begin < 30
    assert within(5.0, lambda: 7) == 7
    with pytest.raises(KeyError):
        within(5.0, lambda: {}["x"])


def test_sizes_are_told_in_decimal_units() -> None:
    assert [size_text(n) for n in (12, 4e3, 64e6, 1.5e9, 2e12)] == ["12 bytes", "4 kB", "64 MB", "1.5 GB", "2 TB"]
