"""Makes PyTorch believe in a GPU that isn't there, for tracing and lowering. Nothing is ever computed.

Changes the process for good: use it in child processes only. Written for torch 2.11, whose internals it replaces.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch._dynamo.device_interface as device_interface
import torch._subclasses.fake_tensor as fake_tensor
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._triton import has_triton
from triton.backends.compiler import GPUTarget

# What torch.cuda.get_device_properties returns: NVIDIA's white papers of the two generations, table "comparison".
PROPERTIES: dict[int, dict[str, Any]] = {
    80: {"name": "NVIDIA A100-SXM4-80GB", "multi_processor_count": 108, "L2_cache_size": 40 << 20,
         "shared_memory_per_block_optin": 166912, "shared_memory_per_multiprocessor": 167936},
    90: {"name": "NVIDIA H100 80GB HBM3", "multi_processor_count": 132, "L2_cache_size": 50 << 20,
         "shared_memory_per_block_optin": 232448, "shared_memory_per_multiprocessor": 233472},
}  # fmt: skip
_COMMON = {
    "max_threads_per_multi_processor": 2048, "max_threads_per_block": 1024, "warp_size": 32, "gcnArchName": "",
    "regs_per_multiprocessor": 65536, "shared_memory_per_block": 49152, "total_memory": 80 << 30,
}  # fmt: skip


class Gpu:
    """A pretended GPU. It is there only inside `present`, since PyTorch would otherwise try to start it."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self._present = False
        properties = SimpleNamespace(**_COMMON, **PROPERTIES[capability], major=capability // 10, minor=capability % 10)
        cuda = torch.cuda
        replaced: dict[str, Any] = {
            "is_available": lambda: self._present, "is_initialized": lambda: self._present, "device_count": lambda: 1,
            "current_device": lambda: 0, "get_device_properties": lambda device=None: properties,
            "get_device_capability": lambda device=None: divmod(capability, 10), "_lazy_init": lambda: None,
            "get_device_name": lambda device=None: properties.name, "synchronize": lambda device=None: None,
            "is_bf16_supported": lambda *args, **kwargs: True, "_exchange_device": lambda index: 0,
            "_maybe_exchange_device": lambda index: 0, "set_rng_state": lambda *args, **kwargs: None,
            "get_rng_state": lambda device="cuda": torch.zeros(16, dtype=torch.uint8),
        }  # fmt: skip
        for name, value in replaced.items():
            setattr(cuda, name, value)
        torch._C._cuda_getDevice = lambda: 0
        fake_tensor.init_gpu_context = lambda device: None
        device_interface.caching_worker_device_properties["cuda"] = [properties]
        interface = device_interface.get_interface_for_device("cuda")
        for kind in (interface, interface.Worker):
            kind.get_device_properties = staticmethod(lambda device=None: properties)
            kind.current_device = staticmethod(lambda: 0)
        interface.get_compute_capability = staticmethod(lambda device=None: capability)
        interface.is_triton_capable = staticmethod(lambda device=None: True)
        interface.raise_if_triton_unavailable = staticmethod(lambda device=None: None)

    @contextlib.contextmanager
    def present(self) -> Iterator[None]:
        """Makes `torch.cuda.is_available()` true."""
        self._present = True
        has_triton.cache_clear()
        try:
            yield
        finally:
            self._present = False

    def autocast(self) -> torch.autocast:
        """Returns autocast to bf16 as on the GPU; without a GPU it would turn itself off."""
        with self.present():
            return torch.autocast("cuda", dtype=torch.bfloat16)

    def activate_triton(self) -> None:
        """Makes Triton generate code for the GPU."""
        target = GPUTarget("cuda", self.capability, 32)
        triton.runtime.driver.set_active(
            SimpleNamespace(
                get_current_target=lambda: target,
                get_current_device=lambda: 0,
                get_active_torch_device=lambda: torch.device("cuda", 0),
                get_device_interface=lambda: torch.cuda,
            )
        )


def fake_mode() -> FakeTensorMode:
    """Returns a mode in which tensors have shapes, dtypes and devices, but no memory."""
    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
