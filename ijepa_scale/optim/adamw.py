"""AdamW with the kernels of PyTorch, apex or DeepSpeed, or with our own. Must not know processes."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from ijepa_kernels.choice import check_device
from ijepa_scale.config import AdamWConfig
from ijepa_scale.errors import ConfigError
from ijepa_scale.optim.fused_tail import FusedTailAdamW
from ijepa_scale.optim.kind import OptimizerKind


class AdamW(OptimizerKind):
    """AdamW. `impl: auto` uses PyTorch's fused kernel."""

    Config = AdamWConfig

    @staticmethod
    @override
    def build(groups: list[dict[str, Any]], config: AdamWConfig, *, offload: bool) -> torch.optim.Optimizer:
        settings: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "weight_decay": 0.0}
        if config.impl in ("auto", "torch"):
            return torch.optim.AdamW(groups, fused=True, **settings)
        if config.impl == "fused_tail":
            return _fused_tail(groups, config)
        if config.impl == "apex":
            return _apex_adam()(groups, adam_w_mode=True, **settings)
        try:
            adam = importlib.import_module("deepspeed.ops.adam")
        except ImportError as error:
            raise ConfigError(
                f"optimizer.impl is deepspeed, which can't be imported ({error}); set optimizer.impl=torch"
            ) from error
        if offload:
            return adam.DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
        return adam.FusedAdam(groups, adam_w_mode=True, **settings)

    @classmethod
    @override
    def new_state(cls, parameter: Tensor) -> dict[str, Tensor]:
        return {"step": torch.zeros((), device=parameter.device), **super().new_state(parameter)}

    @staticmethod
    @override
    def set_step(optimizer: torch.optim.Optimizer, step: int) -> None:
        # torch stores the step per parameter, apex per group
        for state in optimizer.state.values():
            counter = state.get("step")
            state["step"] = counter.fill_(step) if isinstance(counter, torch.Tensor) else step
        for group in optimizer.param_groups:
            if "step" in group or not isinstance(optimizer, (torch.optim.AdamW, FusedTailAdamW)):
                group["step"] = step

    @staticmethod
    @override
    def stopped_on_device(config: AdamWConfig) -> bool:
        return config.impl in ("auto", "torch", "fused_tail")

    @staticmethod
    @override
    def refusal(config: AdamWConfig, strategy: str) -> str | None:
        if strategy == "fsdp2" and config.impl in ("apex", "deepspeed"):
            kernels = f"optimizer.impl is {config.impl}, whose kernels don't support fsdp2's sharded tensors"
            return f"{kernels}; set optimizer.impl=torch"
        return OptimizerKind.refusal(config, strategy)


def _fused_tail(groups: list[dict[str, Any]], config: AdamWConfig) -> FusedTailAdamW:
    """Returns our optimiser, after checking that its kernel runs on the parameters' device."""
    if FusedTailAdamW.implementation == "triton":
        device = groups[0]["params"][0].device
        try:
            check_device("fused_tail", device, "eager")
        except ValueError as error:
            raise ConfigError(
                f"optimizer.impl is fused_tail but the device is {device}; its kernel needs CUDA: set "
                "optimizer.impl=torch"
            ) from error
        except ImportError as error:
            raise ConfigError(
                f"optimizer.impl is fused_tail, which needs Triton ({error}); install triton, or set "
                "optimizer.impl=torch"
            ) from error
    return FusedTailAdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, new_state=AdamW.new_state)


def _apex_adam() -> Any:
    """Returns apex's FusedAdam, after checking that apex is NVIDIA's: apex on PyPI is another project."""
    try:
        optimizers = importlib.import_module("apex.optimizers")
        importlib.import_module("amp_C")
        return optimizers.FusedAdam
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"optimizer.impl is apex but NVIDIA's apex with its CUDA extensions isn't installed ({error}); build "
            "it from github.com/NVIDIA/apex (the PyPI package of that name is another project), or set "
            "optimizer.impl=torch"
        ) from error
