"""Checks versions, the driver, compilers and the folder of compiled kernels. Starts no CUDA and compiles nothing."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from ijepa_scale import environment
from ijepa_scale.doctor.finding import Finding
from ijepa_scale.engine.gpus import gpu_in_machine, why_unusable
from ijepa_scale.engine.parallelize import compile_problem
from ijepa_scale.errors import ConfigError
from ijepa_scale.host_memory import system_file

PACKAGE = "ijepa_scale"
_TOLD = ("torch", "torchvision", "deepspeed")
# The oldest driver on Linux by the major version of CUDA that a wheel was built with.
# Source: NVIDIA, "CUDA Compatibility", table of minor version compatibility.
_OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
_DRIVER = re.compile(r"\s(\d{3,})\.\d+(?:\.\d+)?\b")


def versions() -> Iterator[Finding]:
    """Yields the versions of this package's requirements, and those that don't fit together."""
    python = platform.python_version()
    told = [f"Python {python}", *(f"{name} {_version(name) or 'missing'}" for name in _TOLD)]
    problems = list(_unmet(PACKAGE)) + list(_unmet("torchvision"))
    wanted = metadata.distribution(PACKAGE).metadata["Requires-Python"] if _version(PACKAGE) else None
    if wanted and Version(python) not in SpecifierSet(wanted):
        problems.insert(0, f"{PACKAGE} needs Python {wanted}, and this is {python}")
    yield Finding(
        check="versions",
        found=", ".join(told) + "".join(f"; {problem}" for problem in dict.fromkeys(problems)),
        verdict="wrong" if problems else "ok",
        remedy="install the versions that it names, torchvision together with the torch that it is built for"
        if problems
        else "",
        values={"python": python, **{name: _version(name) for name in _TOLD}, "problems": problems},
    )


def _unmet(package: str) -> Iterator[str]:
    """Yields the requirements of an installed package, without its extras, that aren't met."""
    try:
        wanted = metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        yield f"{package} isn't installed"
        return
    for requirement in map(Requirement, wanted):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = _version(requirement.name)
        if found is None:
            yield f"{package} needs {requirement.name}, which isn't installed"
        elif not requirement.specifier.contains(found, prereleases=True):
            yield f"{package} needs {requirement.name}{requirement.specifier}, and this is {found}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def driver(root: Path = Path("/")) -> Iterator[Finding]:
    """Yields whether NVIDIA's driver is new enough for the CUDA that this PyTorch was built with, and NCCL's version.

    The driver's version is read from /proc, so that it is there even where CUDA can't start.
    """
    text = system_file(root / "proc/driver/nvidia/version")
    match = _DRIVER.search(text.partition("\n")[0])
    built = torch.version.cuda
    if match is None or built is None:
        why = "no NVIDIA driver" if match is None else f"torch {torch.__version__} isn't built for CUDA"
        yield Finding(check="driver", found=why, verdict="not checked")
        return
    found, major = match[0].strip(), int(built.partition(".")[0])
    oldest = _OLDEST_DRIVER.get(major)
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    wrong = oldest is not None and int(match[1]) < oldest
    yield Finding(
        check="driver",
        found=f"{found}, for PyTorch's CUDA {built} (from {oldest or 'unknown'}), NCCL {nccl}",
        verdict="wrong" if wrong else "ok",
        remedy=f"update the driver to {oldest} or newer, or install the PyTorch for an older CUDA" if wrong else "",
        values={"driver": found, "cuda": built, "oldest_driver": oldest, "nccl": nccl},
    )


def usable_gpus() -> Iterator[Finding]:
    """Yields whether this PyTorch can use the GPUs of the machine."""
    if torch.cuda.is_available():
        return
    gpu = gpu_in_machine()
    hidden = environment.hidden_gpus()
    if gpu is None:
        yield Finding(check="GPUs", found="this machine has none; runs use the CPU", verdict="not checked")
    elif hidden is not None:
        yield Finding(check="GPUs", found=f"{hidden} hides {gpu}; runs use the CPU", verdict="not checked")
    else:
        said, _, remedy = why_unusable().partition("; ")
        yield Finding(check="GPUs", found=f"{gpu}, but {said}", verdict="wrong", remedy=remedy)


def compilers(device: torch.device, *, needs_ops: bool) -> Iterator[Finding]:
    """Yields the C compiler, for Triton, and g++, with which DeepSpeed builds its ops (`needs_ops`)."""
    problem = compile_problem(device)
    c = environment.c_compiler() or "no C compiler"
    cxx = shutil.which("g++")
    needed = "for Triton" if device.type == "cuda" else "for Triton, which isn't used on a CPU"
    ops = "for DeepSpeed's ops" + ("" if needs_ops else ", which this run doesn't build")
    problems = [] if problem is None else [problem]
    if needs_ops and cxx is None:
        problems.append("DeepSpeed builds its ops with g++ and finds none; install g++")
    said = [problem.partition("; ") for problem in problems]
    yield Finding(
        check="compilers",
        found=f"{c} {needed}; {cxx or 'no g++'} {ops}" + "".join(f"; {what}" for what, _, _ in said),
        verdict="wrong" if problems else "ok",
        remedy="; ".join(remedy for _, _, remedy in said),
        values={"c": environment.c_compiler(), "cxx": cxx},
    )


def compile_cache(folder: str | None) -> Iterator[Finding]:
    """Yields whether compiled kernels can be kept in the folder that a run would use. Makes no folder."""
    chosen = environment.compile_cache_folder(folder)
    try:
        if chosen.exists():
            environment.export_compile_cache(folder)  # makes nothing then, and says whose it is
        else:
            near = next(path for path in chosen.parents if path.exists())
            if not os.access(near, os.W_OK | os.X_OK) or not near.is_dir():
                raise ConfigError(f"{chosen} can't be made, since nobody may write to {near}; set engine.compile_cache")
    except ConfigError as error:
        said, _, remedy = str(error).rpartition("; ")
        yield Finding(check="compile cache", found=said, verdict="wrong", remedy=remedy)
        return
    state = "is there" if chosen.exists() else "will be made"
    yield Finding(check="compile cache", found=f"{chosen} {state}", values={"folder": str(chosen)})


__all__ = ["compile_cache", "compilers", "driver", "usable_gpus", "versions"]
