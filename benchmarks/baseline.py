"""The baseline of the step benchmarks: the published recipe in plain eager PyTorch.

Written from the method's description as most people would write it. Softmax attention is explicit, and all predictor
sequences are computed whole. All target tokens are normalised before they are gathered. Norms, target update and
optimiser (PyTorch's default AdamW) loop over the parameters, and the host reads one value for each norm. The masks come
from a loop over images. Weights are interchangeable with ours, so both compute the same losses.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ijepa_scale.config import ModelConfig
from ijepa_scale.config.architectures import resolve
from ijepa_scale.masks import DenseMasks
from ijepa_scale.models import build_jepa
from ijepa_scale.optim.groups import parameter_groups


class Attention(nn.Module):
    """Self-attention with explicit attention weights."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the attended tokens (B, N, D)."""
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        weights = ((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    """Two linear layers around a GELU."""

    def __init__(self, width: int, mlp_width: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, mlp_width), nn.GELU(), nn.Linear(mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the tokens (B, N, D)."""
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm block."""

    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=1e-6), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width, eps=1e-6), Mlp(width, mlp_width)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the tokens (B, N, D)."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Embeds patches as tokens."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """Returns tokens (B, N, D)."""
        return self.proj(images).flatten(2).transpose(1, 2)


def take(tokens: Tensor, patches: list[Tensor]) -> Tensor:
    """Returns the tokens at each of the patch indices `patches` (B, K), concatenated along the batch."""
    return torch.cat([tokens.gather(1, p[..., None].repeat(1, 1, tokens.shape[-1])) for p in patches])


class Encoder(nn.Module):
    """The context or target encoder."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        sizes = resolve(config)
        self.patch_embed = PatchEmbed(sizes.patch_size, sizes.width)
        self.register_buffer("pos_embed", torch.zeros(1, sizes.num_patches, sizes.width))
        self.blocks = nn.ModuleList(Block(sizes.width, sizes.heads, sizes.mlp_width) for _ in range(sizes.depth))
        self.norm = nn.LayerNorm(sizes.width, eps=1e-6)

    def forward(self, images: Tensor, patches: list[Tensor] | None = None) -> Tensor:
        """Returns the tokens after the final norm, of all patches or of `patches`."""
        x = self.patch_embed(images) + self.pos_embed
        if patches is not None:
            x = take(x, patches)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Predictor(nn.Module):
    """Predicts the target's features, with one sequence per target block of an image."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        sizes = resolve(config)
        width = sizes.predictor_width
        self.predictor_embed = nn.Linear(sizes.width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("predictor_pos_embed", torch.zeros(1, sizes.num_patches, width))
        self.predictor_blocks = nn.ModuleList(
            Block(width, sizes.heads, sizes.predictor_mlp_width) for _ in range(sizes.predictor_depth)
        )
        self.predictor_norm = nn.LayerNorm(width, eps=1e-6)
        self.predictor_proj = nn.Linear(width, sizes.width)

    def forward(self, context: Tensor, patches: list[Tensor], targets: list[Tensor]) -> Tensor:
        """Returns the predictions (M * E * B, T, D)."""
        images = len(targets[0])
        positions = self.predictor_pos_embed.repeat(images, 1, 1)
        context = self.predictor_embed(context) + take(positions, patches)
        queries = take(positions, targets).view(len(targets), images, -1, context.shape[-1])
        queries = self.mask_token + queries[:, None].repeat(1, len(patches), 1, 1, 1).flatten(0, 2)
        x = torch.cat([context.repeat(len(targets), 1, 1), queries], dim=1)
        for block in self.predictor_blocks:
            x = block(x)
        return self.predictor_proj(self.predictor_norm(x)[:, context.shape[1] :])


class BaselineStep:
    """The published training step, starting from the weights of `module`, by default `build_jepa(config, seed)`.

    `wrap` wraps the trained encoder and predictor, for example to train on several processes.
    """

    def __init__(
        self,
        config: ModelConfig,
        seed: int,
        *,
        device: torch.device | str,
        bf16: bool,
        module: nn.Module | None = None,
        wrap: Callable[[nn.Module], nn.Module] | None = None,
    ) -> None:
        weights = (build_jepa(config, seed) if module is None else module).state_dict()
        with torch.device("meta"):
            self.module = nn.ModuleDict({"encoder": Encoder(config), "predictor": Predictor(config)})
        self.module.to_empty(device=device).load_state_dict(weights)
        self.target = copy.deepcopy(self.module["encoder"]).requires_grad_(False)
        groups: list[dict[str, Any]] = parameter_groups(self.module)
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.999), eps=1e-8)
        self._autocast = torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=bf16)
        self._encoder, self._predictor = (
            part if wrap is None else wrap(part) for part in (self.module["encoder"], self.module["predictor"])
        )

    def forward_backward(self, images: Tensor, masks: DenseMasks) -> Tensor:
        """Returns the loss and leaves its gradients in the parameters."""
        context, targets = list(masks.context.unbind(0)), list(masks.targets.unbind(0))
        with self._autocast:
            with torch.no_grad():
                features = F.layer_norm(self.target(images), (self.target.norm.normalized_shape[0],))
                expected = [take(features, [block]) for block in targets for _ in context]
            predicted = self._predictor(self._encoder(images, context), context, targets)
            loss = F.smooth_l1_loss(predicted, torch.cat(expected))
        loss.backward()
        return loss

    def optimize(self, lr: float, weight_decay: float) -> None:
        """Runs the optimiser's step."""
        for group in self.optimizer.param_groups:
            group["lr"], group["weight_decay"] = lr, weight_decay if group["decay"] else 0.0
        self.optimizer.step()

    def norms(self) -> dict[str, float]:
        """Returns the gradient norm of each weight, read on the host one by one."""
        return {
            name: float(parameter.grad.norm())
            for name, parameter in self.module.named_parameters()
            if parameter.grad is not None and parameter.ndim > 1
        }

    @torch.no_grad()
    def move_target(self, momentum: float) -> None:
        """Moves the target towards the encoder, parameter by parameter."""
        for mine, theirs in zip(self.target.parameters(), self.module["encoder"].parameters(), strict=True):
            mine.data.mul_(momentum).add_((1.0 - momentum) * theirs.detach().data)

    def update(self, lr: float, weight_decay: float, momentum: float) -> dict[str, float]:
        """Runs the optimiser's step and the target's update; returns the gradient norm of each weight."""
        self.optimize(lr, weight_decay)
        norms = self.norms()
        self.optimizer.zero_grad()
        self.move_target(momentum)
        return norms

    def __call__(self, images: Tensor, masks: DenseMasks, lr: float, weight_decay: float, momentum: float) -> float:
        """Runs one whole step and returns its loss, read on the host as for the published log."""
        loss = self.forward_backward(images, masks)
        self.update(lr, weight_decay, momentum)
        return float(loss.detach())
