"""Finds GPUs of this machine without CUDA, and the reason why this PyTorch can't use them.

So `device: auto` refuses such a machine instead of training on its CPU for days. Must not start CUDA where it works.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ijepa_scale import environment


def gpu_in_machine(root: Path = Path("/")) -> str | None:
    """Returns a GPU that Linux shows, in words such as "an NVIDIA GPU (/dev/nvidia0)"; None if it shows none.

    An AMD GPU counts only for a PyTorch built for ROCm, since graphics integrated in a processor have /dev/kfd too.
    In a container /proc shows the host's GPUs, even those that the container wasn't given.

    Sources: NVIDIA's driver README ("The NVIDIA /proc interface", device nodes) and the Linux kernel's amdkfd.
    """
    nodes = [*sorted(root.glob("dev/nvidia[0-9]*")), *sorted(root.glob("proc/driver/nvidia/gpus/*"))]
    if nodes:
        return f"an NVIDIA GPU (/{nodes[0].relative_to(root)})"
    kfd = torch.version.hip is not None and (root / "dev" / "kfd").exists()
    return "an AMD GPU (/dev/kfd)" if kfd else None


def why_unusable() -> str:
    """Returns why this PyTorch can use no GPU, with a remedy. Call only if `torch.cuda.is_available()` is false."""
    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is built for CPUs only; install the build for your GPU from pytorch.org"
    hidden = environment.hidden_gpus()
    if hidden is not None:
        return f"{hidden} hides all GPUs; unset it"
    built = f"CUDA {torch.version.cuda}" if torch.version.hip is None else f"ROCm {torch.version.hip}"
    try:
        torch.cuda.init()  # it fails, and says why
        said = "it found no GPU"
    except (RuntimeError, AssertionError) as error:
        said = str(error).splitlines()[0].rstrip(".")
    return (
        f"torch {torch.__version__} is built for {built} and says: {said}; update the driver, install the PyTorch that "
        "fits it, or give this job or container its GPUs"
    )
