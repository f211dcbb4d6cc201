"""Loads a trained encoder from anywhere, and computes features with it. `ijepa_scale` offers both functions."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ijepa_scale.augment.eval_transform import EvalTransform
from ijepa_scale.checkpoint.geometry import PATCHES
from ijepa_scale.checkpoint.models_of_weights import encoder_of_weights
from ijepa_scale.checkpoint.sources import read_weights
from ijepa_scale.config.form import PixelType, Positions
from ijepa_scale.config.pixels import PixelFormat
from ijepa_scale.data.deep_decode import decode_as, pixels_of_pil
from ijepa_scale.data.eval_reader import IMAGENET_MEAN, IMAGENET_STD, crop_fraction_of
from ijepa_scale.data.pil_decode import rgb_of
from ijepa_scale.data.sources.read_file import read_image_file
from ijepa_scale.errors import ConfigError, DataError, SampleError
from ijepa_scale.models.layers import Block
from ijepa_scale.models.vit import VisionTransformer
from ijepa_scale.plurals import counted

logger = logging.getLogger(__name__)

Pool = Literal["mean", "tokens", "last4"]
POOLS: tuple[Pool, ...] = ("mean", "tokens", "last4")
OneImage: TypeAlias = "str | Path | bytes | Image.Image | np.ndarray"
_ONE = (str, Path, bytes, Image.Image, np.ndarray)


def load(
    source: str | Path,
    *,
    which: str = "target",
    image_size: int | tuple[int, int] | None = None,
    positions: Positions = "interpolated",
    heads: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    pixels: PixelType | None = None,
) -> tuple[VisionTransformer, ImageTransform]:
    """Returns a trained encoder, fp32 on the CPU in eval mode, and the transform that makes its images.

    Sizes, channels and normalisation come from the source. What it doesn't say is logged with what is taken instead.

    Args:
        source: run folder or checkpoint of this package (pretraining or finetuning), published `.pth.tar`,
            `.safetensors` (also in shards), a PyTorch file or folder of another program, `timm:NAME` or
            `transformers:NAME`.
        which: target (which the paper evaluates) or context; of a source with one encoder, that one.
        image_size: height and width, or the side of a square, in pixels. By default, the size that it was trained on.
        positions: how positions on another grid than the trained one are found, `interpolated` or `computed` anew.
            An interpolated one keeps its meaning as a place in the image, so that trained features hold.
        heads: attention heads, needed only if the source and its width and depth don't tell.
        mean: of each channel, in [0, 1], instead of the source's. ImageNet's if the source has none.
        std: standard deviation of each channel.
        pixels: type of the images' values, `uint8`, `uint16` or `float32`, instead of the source's. `uint8` if the
            source doesn't tell.

    Raises:
        CheckpointError: the source doesn't exist, is damaged, or isn't an encoder that this package has.
        ConfigError: sizes don't fit, or are needed and missing.
    """
    weights = read_weights(source, which=which)
    encoder = encoder_of_weights(weights, image_size=image_size, positions=positions, heads=heads)
    facts, channels = weights.facts, weights.tensors[PATCHES].shape[1]
    values = {}
    for name, given, stated, usual in (
        ("mean", mean, facts.mean, IMAGENET_MEAN),
        ("std", std, facts.std, IMAGENET_STD),
    ):
        if given is None and stated is None and channels == len(usual):
            logger.info(
                "%s: doesn't state the %s of its images; using ImageNet's %s", weights.origin, name, list(usual)
            )
        chosen = given if given is not None else stated if stated is not None else usual
        if len(chosen) != channels:
            raise ConfigError(
                f"{weights.origin}: its encoder takes {channels} channels, but {name} has {len(chosen)} values; give "
                f"load(..., {name}=[...]) with {channels}"
            )
        values[name] = tuple(chosen)
    dtype = pixels or facts.pixels or "uint8"
    return encoder, ImageTransform(encoder, crop_fraction=facts.crop_fraction, pixels=dtype, **values)


class ImageTransform:
    """Turns images into an encoder's input: resized (bicubic) to cover it, centre-cropped, normalised.

    Attributes:
        image_size: height and width of the result, pixels.
        channels: channels of an image.
        mean: of each channel, in [0, 1].
        std: standard deviation of each channel.
        crop_fraction: share of the resized image that the crop covers. By default 0.875, and 1 up to 64 pixels.
        format: channels of an image and the type of its values.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        crop_fraction: float | None = None,
        pixels: PixelType = "uint8",
    ) -> None:
        height, width = (side * encoder.patch_size for side in encoder.grid)
        self.image_size, self.channels = (height, width), channels_of(encoder)
        self.mean, self.std = mean, std
        self.crop_fraction = crop_fraction or crop_fraction_of(self.image_size)
        self.format = PixelFormat(self.channels, pixels)
        self._transform = EvalTransform(self.image_size, self.crop_fraction, mean=mean, std=std, pixels=self.format)

    def __call__(self, images: OneImage | Sequence[OneImage]) -> Tensor:
        """Returns (C, h, w) float32 for one image, (B, C, h, w) for a list of them, on the CPU.

        An image is a path, the bytes of a file, a PIL image, or an array (H, W, C) of the encoder's type of values. All
        but arrays are turned as their EXIF orientation says, since a photograph is given as it is seen. To an encoder
        of 8-bit RGB, files and PIL images of other kinds are converted; to another one, none is.

        Raises:
            DataError: an image can't be read, or has another number of channels or another dtype.
        """
        if isinstance(images, _ONE):
            return self._transform([self.pixels(images)])[0]
        return self._transform([self.pixels(image) for image in images])

    def __repr__(self) -> str:
        return (
            f"ImageTransform(image_size={self.image_size}, channels={self.channels}, mean={self.mean}, std={self.std}, "
            f"crop_fraction={self.crop_fraction:g}, pixels={self.format.dtype})"
        )

    def pixels(self, image: OneImage) -> np.ndarray:
        """Returns the whole image, (H, W, C) of the encoder's type of values.

        Raises:
            DataError: see `__call__`.
        """
        if isinstance(image, np.ndarray):
            pixels, name = image, "array"
        elif isinstance(image, Image.Image):
            image, name = image.copy(), "PIL image"  # a copy, since decoding drops what it has read
            try:
                pixels = rgb_of(image, "apply") if self.format.is_rgb8 else self._stored(image)
            except SampleError as error:
                raise DataError(f"{name}: {error}") from None
        elif isinstance(image, bytes):
            pixels, name = decode_as(self.format, image, "apply"), "image"
        elif isinstance(image, (str, Path)):
            name = f"image {image}"
            try:
                pixels = decode_as(self.format, read_image_file(image), "apply")
            except SampleError as error:
                raise DataError(f"{name}: {error}") from None
        else:
            raise DataError(
                f"an image is a {type(image).__name__}; give a path, a PIL image, or an array (H, W, C) "
                f"{self.format.dtype}"
            )
        dtype = self.format.dtype
        if pixels.ndim != 3 or pixels.dtype != np.dtype(dtype) or pixels.shape[2] != self.channels or not pixels.size:
            raise DataError(
                f"{name} is {pixels.shape} {pixels.dtype}; this encoder takes images of {self.channels} channels: give "
                f"(H, W, {self.channels}) {dtype}"
            )
        return pixels

    def _stored(self, image: Image.Image) -> np.ndarray:
        """Returns the pixels of a PIL image as they are, turned as its EXIF orientation says."""
        turned = ImageOps.exif_transpose(image)
        turned.format = image.format
        return pixels_of_pil(turned, self.format)


def channels_of(encoder: VisionTransformer) -> int:
    """Returns the number of channels of an encoder's images."""
    return encoder.patch_embed.proj.in_channels


def heads_of(encoder: VisionTransformer) -> int:
    """Returns the number of an encoder's attention heads."""
    return next(block.attn.heads for block in encoder.modules() if isinstance(block, Block))


def features(
    encoder: VisionTransformer,
    images: Tensor | OneImage | Sequence[OneImage],
    *,
    pool: Pool = "mean",
    transform: ImageTransform | None = None,
    batch_size: int = 64,
) -> Tensor:
    """Returns the features of images, float32 on the encoder's device, without gradients and in eval mode.

    Args:
        encoder: from `load` or `build_encoder`, on any device.
        images: (B, C, h, w) float32, as the transform of `load` makes them. With `transform`, what it takes: so no more
            than a batch of pixels is in memory.
        pool: `mean` of the tokens, (B, D); all `tokens`, (B, N, D), row by row; or `last4`: means of the last 4 blocks'
            tokens side by side, each after the final norm, (B, 4 * D), the deepest last. Source: arXiv 2301.08243,
            appendix A.1.
        transform: applied to each batch.
        batch_size: images of one forward pass.

    Raises:
        DataError: images have another number of channels or another size than the encoder's.
        ConfigError: the pool is unknown, or the encoder has too few blocks for it.
    """
    check_pool(encoder, pool)
    device = encoder.pos_embed.device
    if transform is not None and isinstance(images, _ONE):
        images = [images]
    if transform is None and not isinstance(images, Tensor):
        raise DataError(
            f"images is a {type(images).__name__}; give what transform(images) returns, or features(..., transform=...)"
        )
    parts = []
    was_training = encoder.training
    encoder.eval()
    try:
        for begin in range(0, len(images), batch_size):  # type: ignore[arg-type]
            batch: Any = images[begin : begin + batch_size]  # type: ignore[index]
            parts.append(pooled(encoder, (batch if transform is None else transform(batch)).to(device), pool))
    finally:
        encoder.train(was_training)
    if not parts:
        raise DataError("images holds 0 images; give at least 1")
    return torch.cat(parts)


def check_pool(encoder: VisionTransformer, pool: str) -> None:
    """Checks that an encoder can give these features.

    Raises:
        ConfigError: the pool is unknown, or the encoder has too few blocks for it.
    """
    if pool not in POOLS:
        raise ConfigError(f"pool is {pool!r}; choose one of {', '.join(POOLS)}")
    if pool == "last4" and len(encoder.blocks) < 4:
        raise ConfigError(
            f"pool is last4 but the encoder has {counted(len(encoder.blocks), 'block')}; choose mean or tokens"
        )


@torch.no_grad()
def pooled(encoder: VisionTransformer, images: Tensor, pool: Pool) -> Tensor:
    """Returns the features, float32, of one batch (B, C, h, w) on the encoder's device; see `features`."""
    expected = (channels_of(encoder), *(side * encoder.patch_size for side in encoder.grid))
    if images.ndim != 4 or tuple(images.shape[1:]) != expected or not images.is_floating_point():
        raise DataError(
            f"images are {tuple(images.shape)} {str(images.dtype).removeprefix('torch.')}; this encoder takes "
            f"(B, {', '.join(map(str, expected))}) of floats, as the transform of ijepa_scale.load makes them"
        )
    if pool == "tokens":
        return encoder(images).float()
    layers = encoder(images, last=4 if pool == "last4" else 1)
    return torch.cat([tokens.float().mean(dim=1) for tokens in layers], dim=1)
