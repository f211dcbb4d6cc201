"""Builds models from names and sizes, with weights drawn from a seed. config/architectures.py has the named sizes."""

from __future__ import annotations

import copy
import difflib
from typing import Any, TypeVar

import torch

from ijepa_scale import rng
from ijepa_scale.config.architectures import resolve
from ijepa_scale.config.schema import ModelConfig
from ijepa_scale.errors import ConfigError
from ijepa_scale.models.init import initialise
from ijepa_scale.models.jepa import JEPA
from ijepa_scale.models.pos_embed import positions
from ijepa_scale.models.predictor import Predictor
from ijepa_scale.models.vit import VisionTransformer

_Model = TypeVar("_Model", VisionTransformer, Predictor)
_ENCODER_SIZES = ("width", "depth", "heads", "mlp_ratio", "position_grid")
_POSITIONS = ("pos_embed", "predictor_pos_embed")  # the fixed embeddings: the only buffers
_PREDICTOR_SIZES = {
    "width": "predictor_width", "depth": "predictor_depth", "encoder_width": "width", "heads": "heads",
    "position_grid": "position_grid",
}  # fmt: skip


def build_encoder(
    name: str,
    *,
    image_size: int | tuple[int, int] = 224,
    patch_size: int = 16,
    channels: int = 3,
    rescale_residual: bool = False,
    seed: int = 0,
    device: torch.device | str | None = None,
    **sizes: Any,
) -> VisionTransformer:
    """Returns the named encoder (vit_tiny, small, base, large, huge, giant) with weights drawn from `seed`.

    `image_size` and `patch_size` are in pixels, `channels` are those of an image; `width`, `depth`, `heads` and
    `mlp_ratio` override those of the named architecture. With `position_grid`, positions are interpolated from that
    grid. Weights are drawn on the CPU, so `device` doesn't change them; on "meta" none are drawn.

    Raises:
        ConfigError: a name or size is unknown, or sizes don't divide; one message lists all problems.
    """
    known = {size: size for size in _ENCODER_SIZES}
    config = ModelConfig(
        name=name,
        image_size=_sides(image_size),
        patch_size=patch_size,
        channels=channels,
        rescale_residual=rescale_residual,
        **_renamed("build_encoder", sizes, known),
    )
    return _encoder(config, seed, device)


def build_predictor(
    name: str,
    *,
    image_size: int | tuple[int, int] = 224,
    patch_size: int = 16,
    rescale_residual: bool = False,
    seed: int = 0,
    device: torch.device | str | None = None,
    **sizes: Any,
) -> Predictor:
    """Returns the predictor that belongs to the named encoder, with weights drawn from `seed`.

    `depth` and `width` (384 by default) are the predictor's own. If you overrode the encoder's sizes, pass its width
    and heads as `encoder_width` and `heads`. The other arguments are those of `build_encoder`.

    Raises:
        ConfigError: a name or size is unknown, or sizes don't divide; one message lists all problems.
    """
    config = ModelConfig(
        name=name,
        image_size=_sides(image_size),
        patch_size=patch_size,
        rescale_residual=rescale_residual,
        **_renamed("build_predictor", sizes, _PREDICTOR_SIZES),
    )
    return _predictor(config, seed, device)


def build_jepa(model: ModelConfig, seed: int, device: torch.device | str | None = None) -> JEPA:
    """Returns encoder and predictor as one module, equal to those of `build_encoder` and `build_predictor`.

    Raises:
        ConfigError: the name is unknown, or sizes don't divide; one message lists all problems.
        ValueError: a parameter or a buffer is neither the encoder's nor the predictor's, or nothing fills it.
    """
    jepa = JEPA(_encoder(model, seed, device), _predictor(model, seed, device))
    tensors = [name for named in (jepa.named_parameters(), jepa.named_buffers()) for name, _ in named]
    strangers = [name for name in tensors if not name.startswith(("encoder.", "predictor."))]
    if strangers:
        raise ValueError(
            f"{', '.join(strangers)} of {type(jepa).__name__} are neither the encoder's nor the predictor's, so "
            "nothing initialises or trains them; put them into one of these"
        )
    return jepa


def build_target(jepa: JEPA) -> VisionTransformer:
    """Returns a frozen copy of the encoder, in evaluation mode. Call it before anything is sharded."""
    return copy.deepcopy(jepa.encoder).requires_grad_(False).eval()


def _encoder(model: ModelConfig, seed: int, device: torch.device | str | None) -> VisionTransformer:
    sizes = resolve(model)
    with torch.device("meta"):  # so that constructors don't draw from the global generator
        encoder = VisionTransformer(
            grid=sizes.grid,
            position_grid=sizes.position_grid,
            patch_size=sizes.patch_size,
            width=sizes.width,
            depth=sizes.depth,
            heads=sizes.heads,
            mlp_width=sizes.mlp_width,
            channels=sizes.channels,
        )
    return _materialise(encoder, rng.generator(seed, "init.encoder"), model.rescale_residual, device)


def _predictor(model: ModelConfig, seed: int, device: torch.device | str | None) -> Predictor:
    sizes = resolve(model)
    with torch.device("meta"):
        predictor = Predictor(
            grid=sizes.grid,
            position_grid=sizes.position_grid,
            encoder_width=sizes.width,
            width=sizes.predictor_width,
            depth=sizes.predictor_depth,
            heads=sizes.heads,
            mlp_width=sizes.predictor_mlp_width,
        )
    return _materialise(predictor, rng.generator(seed, "init.predictor"), model.rescale_residual, device)


def _materialise(
    model: _Model, generator: torch.Generator, rescale_residual: bool, device: torch.device | str | None
) -> _Model:
    """Gives a model from the meta device weights drawn on the CPU, moves it to `device` and returns it."""
    unknown = [name for name, _ in model.named_buffers() if name not in _POSITIONS]
    if unknown:
        raise ValueError(
            f"no values are known for the buffers {', '.join(unknown)} of {type(model).__name__}; fixed embeddings are "
            f"called {' and '.join(_POSITIONS)}: add others to models/registry.py"
        )
    device = torch.device("cpu" if device is None else device)
    if device.type == "meta":
        return model.to("meta")
    buffers = {
        name: positions(buffer.shape[-1], model.grid, model.position_grid)[None]
        for name, buffer in model.named_buffers()
    }
    model.to_empty(device="cpu")
    model.load_state_dict(buffers, strict=False)
    initialise(model, generator, rescale_residual)
    return model.to(device)


def _sides(image_size: int | tuple[int, int]) -> tuple[int, int]:
    return (image_size, image_size) if isinstance(image_size, int) else image_size


def _renamed(builder: str, sizes: dict[str, Any], known: dict[str, str]) -> dict[str, Any]:
    """Returns `sizes` under the names of ModelConfig's fields."""
    for size in sizes:
        if size not in known:
            near = difflib.get_close_matches(size, known, n=1, cutoff=0.0)[0]
            raise ConfigError(f"{builder} knows no {size!r}; did you mean {near}? Choose from {', '.join(known)}")
    return {known[size]: value for size, value in sizes.items()}
