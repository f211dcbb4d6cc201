"""Chooses the kernel of dense attention for each network: tries it with the network's shapes, and names it.

PyTorch's SDPA picks a kernel at each call and silently takes a slower one where a faster one can't run. Here the
kernel is chosen once, at the start, and passed to `attention`; a call that this kernel can't run is then an error.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import attention as torch_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from ijepa_kernels.attention import SequenceLayout, attention
from ijepa_kernels.attention.dense import SDPA_KERNELS

BACKENDS = ("auto", "flash", "cudnn", "efficient", "math", "fa3", "fa4")
ON_CPU = ("auto", "flash", "math")  # the kernels available on the CPU

# The order in which auto tries the kernels on CUDA, for each network by itself. None has been measured on a GPU yet, so
# the order claims no speed. Flash comes first because packed sequences run in the same kernel, so both layouts round
# alike. Efficient also takes fp32. Math holds all scores in memory. cuDNN, FA3 and FA4 run only when named: cuDNN plans
# anew for each shape, and the lengths of truncated contexts change with each step; FA3 and FA4 need packages of their
# own.
AUTO_ORDER = ("flash", "efficient", "math")

_NAMES = {
    SDPBackend.FLASH_ATTENTION: "flash",
    SDPBackend.CUDNN_ATTENTION: "cudnn",
    SDPBackend.EFFICIENT_ATTENTION: "efficient",
    SDPBackend.MATH: "math",
}
_IMPLEMENTATIONS = {"fa3": "FA3", "fa4": "FA4"}  # PyTorch's names for what replaces its flash kernel


@dataclass(frozen=True)
class HeadShape:
    """The attention shape of one network: `queries` of its `tokens` attend to all of them, in each head."""

    role: str
    heads: int
    head_dim: int
    queries: int
    tokens: int
    trained: bool = True  # has a backward pass

    def __str__(self) -> str:
        return f"{self.role} ({self.heads} heads of head_dim {self.head_dim}, {self.queries} of {self.tokens} tokens)"


def activate(name: str, device: torch.device | str) -> None:
    """Checks that the device has the kernel. Replaces PyTorch's flash kernel by FA3 or FA4, if named, or restores it.

    Raises:
        ValueError: the name is unknown, the CPU has no such kernel, or the package of FA3 or FA4 is missing.
    """
    if name not in BACKENDS:
        raise ValueError(f"attention {name!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if torch.device(device).type != "cuda" and name not in ON_CPU:
        raise ValueError(f"attention {name} needs a CUDA device and this one is {device}; choose {', '.join(ON_CPU)}")
    implementation = _IMPLEMENTATIONS.get(name)
    active = _current_implementation()
    if implementation == active:
        return
    if implementation is None:
        torch_attention.restore_flash_attention_impl()
        return
    known = (
        torch_attention.list_flash_attention_impls()
        if hasattr(torch_attention, "activate_flash_attention_impl")
        else []
    )
    if implementation not in known:
        raise ValueError(
            f"attention {implementation.lower()} isn't in torch {torch.__version__}, which knows "
            f"{', '.join(known) or 'no other flash kernels'}; choose flash"
        )
    try:
        torch_attention.activate_flash_attention_impl(implementation)
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"attention {implementation.lower()} can't be activated ({error}); install its package, or choose flash"
        ) from error


def _current_implementation() -> str | None:
    current: Callable[[], str | None] | None = getattr(torch_attention, "current_flash_attention_impl", None)
    return None if current is None else current()


def choose_backend(
    name: str, shapes: Sequence[HeadShape], dtype: torch.dtype, device: torch.device | str
) -> str | None:
    """Returns the kernel in which all `shapes`, those of one network, can run: `name`, or for auto the first that can.

    On the CPU auto returns None: PyTorch's own choice. Runs each shape once in each kernel that is tried, forward and,
    where it is trained, backward. Synchronises. Call `activate` first.

    Raises:
        ValueError: no such kernel can run these shapes in this dtype on this device.
    """
    names: Sequence[str | None] = (name,)
    if name == "auto":
        names = AUTO_ORDER if torch.device(device).type == "cuda" else (None,)
    problems: list[str] = []
    for kernel in names:
        problems = [each for shape in shapes if (each := _dense_problem(shape, dtype, device, kernel)) is not None]
        if not problems:
            return kernel
    raise ValueError(f"attention {name} can't run {'; nor '.join(problems)}")


def backend_for(shape: HeadShape, dtype: torch.dtype, device: torch.device | str, kernel: str | None = None) -> str:
    """Returns the name of the kernel in which SDPA runs this shape: `kernel`, or its own choice; "none" if it can't."""
    inputs = _dense(shape, dtype, device)
    forced = contextlib.nullcontext() if kernel is None else sdpa_kernel(SDPA_KERNELS[kernel])
    with warnings.catch_warnings(), forced:
        warnings.simplefilter("ignore")  # SDPA warns why other kernels can't run
        try:
            name = _NAMES[SDPBackend(torch._fused_sdp_choice(*inputs))]
        except RuntimeError:
            return "none"
    implementation = _current_implementation() if inputs[0].is_cuda else None
    return implementation.lower() if name == "flash" and implementation is not None else name


def packed_backend(dtype: torch.dtype, device: torch.device | str) -> str:
    """Returns a description of how packed sequences run."""
    if torch.device(device).type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        return f"variable-length {(_current_implementation() or 'flash').lower()}"
    return "one dense call for each run of equal lengths"


def packed_problem(
    shape: HeadShape, dtype: torch.dtype, device: torch.device | str, kernel: str | None = None
) -> str | None:
    """Returns why packed sequences of these heads can't run forward and backward; None if they can.

    `kernel` is that of dense calls. Tries a sequence of all tokens next to a shorter one.
    """
    layout, queries = (
        SequenceLayout.of((longest, max(1, longest // 2)), device) for longest in (shape.tokens, shape.queries)
    )
    q, k, v = (
        torch.zeros(each.total, shape.heads, shape.head_dim, dtype=dtype, device=device, requires_grad=shape.trained)
        for each in (queries, layout, layout)
    )
    return _problem(f"packed {shape}", (q, k, v), lambda: attention(q, k, v, layout, queries, kernel=kernel))


def _dense_problem(shape: HeadShape, dtype: torch.dtype, device: torch.device | str, kernel: str | None) -> str | None:
    q, k, v = _dense(shape, dtype, device)
    return _problem(str(shape), (q, k, v), lambda: attention(q, k, v, kernel=kernel))


def _dense(shape: HeadShape, dtype: torch.dtype, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
    """Returns q, k and v of one image, with the memory layout of `models.layers.Attention`."""
    q, k, v = (
        torch.zeros(1, length, shape.heads, shape.head_dim, dtype=dtype, device=device)
        .transpose(1, 2)
        .requires_grad_(shape.trained)
        for length in (shape.queries, shape.tokens, shape.tokens)
    )
    return q, k, v


def _problem(what: str, inputs: tuple[Tensor, ...], call: Callable[[], Tensor]) -> str | None:
    """Returns why `call` or its backward fails, with the reasons that SDPA gives as warnings; None if both work."""
    q = inputs[0]
    with warnings.catch_warnings(record=True) as reasons, torch.set_grad_enabled(q.requires_grad):
        warnings.simplefilter("always")
        try:
            out = call()
            if q.requires_grad:
                torch.autograd.grad(out.float().sum(), inputs)
            if q.is_cuda:
                torch.cuda.synchronize(q.device)  # host sync: so that a kernel's failure is raised here
        except RuntimeError as error:
            words = [str(error), *(str(reason.message) for reason in reasons)]
            lines = dict.fromkeys(word.splitlines()[0].partition(" (Triggered internally")[0] for word in words if word)
            return f"{what} in {str(q.dtype).removeprefix('torch.')} on {q.device}: {' '.join(lines)}"
    return None
