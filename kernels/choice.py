"""What every kernel says when the chosen implementation isn't there. Nothing falls back by itself."""

from __future__ import annotations

import torch


def check_implementation(implementation: str, known: tuple[str, ...]) -> None:
    """Checks the name of an implementation.

    Raises:
        ValueError: it is none of `known`.
    """
    if implementation not in known:
        raise ValueError(f"implementation {implementation!r} is unknown; choose one of {', '.join(known)}")


def triton_missing(kernel: str, error: ImportError, instead: str) -> ValueError:
    """Returns the error to raise where the Triton kernel was asked for and can't be imported."""
    return ValueError(
        f"Triton is needed for {kernel} and can't be imported ({error}); install triton, "
        f"or choose implementation={instead!r}"
    )


def check_device(kernel: str, device: torch.device, instead: str) -> None:
    """Checks that Triton can run on the device: it is CUDA, or Triton interprets.

    Raises:
        ValueError: it can't.
    """
    import triton

    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise ValueError(
            f"the Triton kernel of {kernel} needs CUDA tensors and these are on {device}; "
            f"choose implementation={instead!r}"
        )
