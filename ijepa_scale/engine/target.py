"""The target encoder of engines that replicate it: fp32 values and their bf16 or fp8 copies.

Computing in bf16 from fp32 weights rounds each weight again in each forward. The target's weights change only once per
step, so this module keeps their bf16 or fp8 copies and renews them after each update. The update itself always uses the
fp32 values, since in bf16 it would vanish.
"""

from __future__ import annotations

import logging
from collections.abc import Collection

import torch
from torch import Tensor, nn

from ijepa_scale.engine.parallelize import blocks
from ijepa_scale.engine.world import World
from ijepa_scale.errors import ConfigError
from ijepa_scale.models.fp8 import Fp8Linear, cosine
from ijepa_scale.models.layers import Linear, PatchProjection

logger = logging.getLogger(__name__)

NO_FP8 = "sharded weights are gathered in bf16; set engine.target_precision=null, or use ddp or ZeRO-1/2"
LEAST_COSINE = 0.999  # between fp8 and bf16 features, mean over the tokens


class ReplicatedTarget:
    """A frozen module on this process's device, its fp32 values by name, and their bf16 or fp8 copies."""

    def __init__(self, module: nn.Module, *, precision: str, fast_accumulation: bool = False) -> None:
        """Changes `module`, which is on its device, to compute in `precision`: fp32, bf16 or fp8.

        `fast_accumulation` makes fp8 products on CUDA faster and less exact; see `ijepa_kernels.fp8_linear`.

        Raises:
            ValueError: `precision` is fp8, and the device or the widths don't support fp8 products.
        """
        self.module = module.requires_grad_(False).eval()
        self.values = {name: parameter.detach() for name, parameter in module.named_parameters()}
        self._copies: dict[str, Tensor] = {}
        self._quantised: dict[str, Fp8Linear] = {}
        self._fast_accumulation = fast_accumulation
        if precision in ("bf16", "fp8"):
            self._round(fp8=precision == "fp8")

    def _round(self, *, fp8: bool) -> None:
        """Replaces weights of linear and patch layers by bf16 copies; with `fp8`, those in blocks by fp8 copies."""
        names = {module: name for name, module in self.module.named_modules()}
        inside = {part for block in blocks(self.module) for part in block.modules() if isinstance(part, Linear)}
        for part, prefix in names.items():
            if not isinstance(part, (Linear, PatchProjection)):
                continue
            for name, parameter in part.named_parameters():
                if fp8 and part in inside and name == "weight":
                    continue
                parameter.data = parameter.data.to(torch.bfloat16)
                self._copies[f"{prefix}.{name}"] = parameter.detach()
            if fp8 and part in inside:
                outer, _, child = prefix.rpartition(".")
                quantised = Fp8Linear(part, fast_accumulation=self._fast_accumulation)
                setattr(self.module.get_submodule(outer), child, quantised)
                self._quantised[f"{prefix}.weight"] = quantised

    @property
    def shards(self) -> list[Tensor]:
        """The fp32 values, in the order of the encoder's parameters."""
        return list(self.values.values())

    @property
    def copies(self) -> list[Tensor | None]:
        """The bf16 copies of `shards`, which the target's update must renew; None for values without a copy."""
        return [self._copies.get(name) for name in self.values]

    @property
    def quantised(self) -> list[tuple[Tensor, Tensor] | None]:
        """The fp8 copies of `shards` with their scales; None for values without one."""
        parts = [self._quantised.get(name) for name in self.values]
        return [None if part is None else (part.weight, part.weight_scale) for part in parts]

    def updated(self, only: Collection[int] | None = None) -> None:
        """Renews the fp8 copies, or those of `only` these shards. Call after values and bf16 copies were updated."""
        for index, name in enumerate(self.values):
            if name in self._quantised and (only is None or index in only):
                self._quantised[name].refresh(self.values[name])

    def loaded(self) -> None:
        """Renews all copies. Call after the fp32 values were loaded."""
        for name, copy in self._copies.items():
            copy.copy_(self.values[name])
        self.updated()

    @torch.no_grad()
    def compare(self, images: Tensor) -> tuple[float, float]:
        """Returns mean and minimum cosine between the features of `images` (B, 3, H, W) and bf16 ones. Synchronises."""
        with torch.compiler.set_stance("force_eager"), torch.autocast(images.device.type, dtype=torch.bfloat16):
            return cosine(self.module(images), self._bf16_features(images))

    def _bf16_features(self, images: Tensor) -> Tensor:
        """Returns the features computed in bf16, with the quantised layers replaced for this call."""
        kept = dict(self._quantised)
        try:
            for name, part in kept.items():
                prefix = name.removesuffix(".weight")
                outer, _, child = prefix.rpartition(".")
                layer = Linear(part.weight.shape[1], part.weight.shape[0], device="meta")
                layer.weight = nn.Parameter(self.values[name], requires_grad=False)
                layer.bias = part.bias
                setattr(self.module.get_submodule(outer), child, layer)
            return self.module(images)
        finally:
            for name, part in kept.items():
                outer, _, child = name.removesuffix(".weight").rpartition(".")
                setattr(self.module.get_submodule(outer), child, part)


def check_fp8(target: ReplicatedTarget, images: Tensor, world: World) -> None:
    """Compares fp8 and bf16 features of each process's `images` (B, 3, H, W), and logs their cosine.

    Communicates two numbers and synchronises. Called once per run.

    Raises:
        ConfigError: the mean over all tokens of all processes is below 0.999; raised on every process.
    """
    each = world.gather(torch.tensor(target.compare(images), device=world.device))
    mean, least = each.T.cpu()  # host sync: once per run
    found = f"mean {mean.mean():.5f}, minimum {least.min():.5f}"
    if not mean.mean() >= LEAST_COSINE:
        raise ConfigError(
            f"the cosine between the target's fp8 and bf16 features is too low ({found}); expected a mean of at least "
            f"{LEAST_COSINE}; set engine.target_precision=null"
        )
    logger.info("cosine between the target's fp8 and bf16 features: %s (at least %g required)", found, LEAST_COSINE)
