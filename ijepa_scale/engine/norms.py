"""Replaces PyTorch's layer norm kernel in a model, from outside the model.

Only the class of each norm changes: parameters, their names and the model's code stay the same.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ijepa_scale.config import EngineConfig
from ijepa_scale.errors import ConfigError
from ijepa_scale.models.layers import LayerNorm


class ApexLayerNorm(LayerNorm):
    """A layer norm that runs the kernel of NVIDIA apex and returns fp32."""

    def forward(self, input: Tensor) -> Tensor:
        """Returns `input` normalised along the last dimension."""
        return _apex()(input.float(), self.weight.float(), self.bias.float(), self.normalized_shape, self.eps)


def use_layer_norm(config: EngineConfig, device: torch.device, *parts: nn.Module | None) -> None:
    """Makes every layer norm of the parts use the kernel that the configuration names: PyTorch's or apex's.

    On GPUs blocks are compiled, and Inductor fuses PyTorch's norm with the casts and additions next to it. Nothing
    could be fused with a kernel of our own.

    Raises:
        ConfigError: the kernel isn't installed, or the device isn't a GPU.
    """
    if config.layer_norm == "torch":
        return
    if device.type != "cuda":
        raise ConfigError(
            f"engine.layer_norm is {config.layer_norm} but the device is {device.type}; its kernel needs CUDA: "
            "set engine.layer_norm=torch"
        )
    _apex()
    for part in parts:
        for norm in () if part is None else part.modules():
            if type(norm) is LayerNorm:
                norm.__class__ = ApexLayerNorm


def _apex() -> Callable[..., Any]:
    """Returns apex's function, after checking that apex is NVIDIA's: apex on PyPI is another project."""
    try:
        importlib.import_module("fused_layer_norm_cuda")
        return importlib.import_module("apex.normalization.fused_layer_norm").fused_layer_norm_affine
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"engine.layer_norm is apex but NVIDIA's apex with its CUDA extensions isn't installed ({error}); build it "
            "from github.com/NVIDIA/apex (the PyPI package of that name is another project), or set "
            "engine.layer_norm=torch"
        ) from error
