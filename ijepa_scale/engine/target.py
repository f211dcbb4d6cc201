"""The target encoder of engines that hold the whole of it: fp32 values, and what computes from them.

Computing in bf16 from fp32 weights rounds each weight anew in each forward. The target's weights change once a
step, so their rounding (or their fp8 quantisation) is kept, and renewed by the update; the update itself always
acts on the fp32 values, since in bf16 it would vanish.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from ijepa_scale.engine.parallelize import blocks
from ijepa_scale.engine.world import World
from ijepa_scale.errors import ConfigError
from ijepa_scale.models.fp8 import Fp8Linear, cosine
from ijepa_scale.models.layers import Linear, PatchProjection

logger = logging.getLogger(__name__)

NO_FP8 = "weights that are sharded are gathered in bf16 each time; set engine.target_precision=null, or ddp or ZeRO-1/2"
LEAST_COSINE = 0.999  # of fp8 features with bf16 ones, mean over the tokens


class ReplicatedTarget:
    """A frozen module on this process's device, its fp32 values by name, and their roundings."""

    def __init__(self, module: nn.Module, *, precision: str) -> None:
        """Takes over `module`, on its device; `precision` is fp32, bf16 or fp8.

        Raises:
            ValueError: fp8 on a device or with widths that have no fp8 products.
        """
        self.module = module.requires_grad_(False).eval()
        self.values = {name: parameter.detach() for name, parameter in module.named_parameters()}
        self._copies: dict[str, Tensor] = {}
        self._quantised: dict[str, Fp8Linear] = {}
        if precision in ("bf16", "fp8"):
            self._round(fp8=precision == "fp8")

    def _round(self, *, fp8: bool) -> None:
        """Replaces the weights of products by bf16 copies, and those inside blocks by fp8 ones where asked."""
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
                quantised = Fp8Linear(part)
                setattr(self.module.get_submodule(outer), child, quantised)
                self._quantised[f"{prefix}.weight"] = quantised

    @property
    def shards(self) -> list[Tensor]:
        """The fp32 values, in the order of the encoder's parameters."""
        return list(self.values.values())

    @property
    def copies(self) -> list[Tensor | None]:
        """The bf16 roundings of `shards`, which the target's update must renew; None where there is none."""
        return [self._copies.get(name) for name in self.values]

    def updated(self) -> None:
        """Quantises the values that have an fp8 copy; is told that they, and the bf16 copies, have been renewed."""
        for name, part in self._quantised.items():
            part.refresh(self.values[name])

    def loaded(self) -> None:
        """Renews all copies from values that were written from outside."""
        for name, copy in self._copies.items():
            copy.copy_(self.values[name])
        self.updated()

    @torch.no_grad()
    def compare(self, images: Tensor) -> tuple[float, float]:
        """Returns mean and least cosine of the features of `images` (B, 3, H, W) with bf16 ones. Synchronises."""
        with torch.compiler.set_stance("force_eager"), torch.autocast(images.device.type, dtype=torch.bfloat16):
            return cosine(self.module(images), self._exactly(images))

    def _exactly(self, images: Tensor) -> Tensor:
        """Returns the features by bf16 products, with the quantised layers put aside for the moment."""
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
    """Compares the fp8 features of each process's `images` (B, 3, H, W) with bf16 ones, and logs the cosine.

    Communicates two numbers and synchronises: once per run.

    Raises:
        ConfigError: on every process, where the mean over all tokens is below 0.999.
    """
    each = world.gather(torch.tensor(target.compare(images), device=world.device))
    mean, least = each.T.cpu()  # host sync: once per run
    found = f"cosine {mean.mean():.5f} with bf16 ones in the mean, {least.min():.5f} at least"
    if not mean.mean() >= LEAST_COSINE:
        raise ConfigError(
            f"the fp8 target's features have {found}; expected {LEAST_COSINE} or more in the mean; "
            "set engine.target_precision=null"
        )
    logger.info("the fp8 target's features have %s (%g is asked for)", found, LEAST_COSINE)
