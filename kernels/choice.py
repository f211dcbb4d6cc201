"""Errors that all kernels share, for an implementation that isn't available. No kernel falls back silently."""

from __future__ import annotations

import torch


def check_implementation(implementation: str, known: tuple[str, ...]) -> None:
    """Checks the name of an implementation.

    Raises:
        ValueError: the name is not in `known`.
    """
    if implementation not in known:
        raise ValueError(f"implementation {implementation!r} is unknown; choose one of {', '.join(known)}")


def triton_missing(kernel: str, error: ImportError, instead: str) -> ValueError:
    """Returns the error to raise when the Triton kernel was requested but can't be imported."""
    return ValueError(
        f"Triton is needed for {kernel} and can't be imported ({error}); install triton, "
        f"or choose implementation={instead!r}"
    )


def check_device(kernel: str, device: torch.device, instead: str) -> None:
    """Checks that Triton can run on the device: the device is CUDA, or Triton runs its interpreter.

    Raises:
        ValueError: Triton can't run there.
    """
    import triton

    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise ValueError(
            f"the Triton kernel of {kernel} needs CUDA tensors and these are on {device}; "
            f"choose implementation={instead!r}"
        )
