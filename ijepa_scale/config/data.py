"""Where images come from and how they are augmented. Knows no component."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from typing_extensions import override

from ijepa_scale.config import form
from ijepa_scale.config.pixels import PixelFormat
from ijepa_scale.config.section import Section
from ijepa_scale.registry import SOURCES


def _known_reader(name: str) -> str:
    if name not in SOURCES.names():
        raise ValueError(
            f"choose one of {', '.join(SOURCES.names())}, or name the module that registers it with --plugin"
        )
    return name


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WITHOUT_MEMBERS = ("imagefolder", "list", "synthetic")  # readers whose samples are one image each

Reader = Annotated[str, AfterValidator(_known_reader)]
Verify = Literal["first_open", "size"]


class DataConfig(Section, at="data", registry=SOURCES, selector="reader"):
    """Where training images come from, and how they are batched."""

    reader: str = Field("shards", description="Shards are WebDataset tars; stream reads them with plain webdataset.")
    train: form.PathText | None = Field(
        None, description="Tars (folder, glob, {000..127}, https://), folder of images, or list of paths."
    )
    subset: form.PathText | None = Field(
        None, description="Text file with a name per line: only these images of train, such as 1% of ImageNet."
    )
    batch_size: form.Images | None = Field(None, description="Images per optimiser step, over all processes.")
    batch_size_per_process: form.Images | None = Field(None, description="The same per process, instead of batch_size.")
    workers: int = Field(2, ge=0, description="Decoding processes per training process; 0: decode in that process.")
    prefetch: form.Count = Field(2, description="Batches that each worker prepares ahead.")
    worker_restarts: int = Field(
        3, ge=0, description="How often a process restarts its workers after one was killed or hangs."
    )
    worker_timeout: form.Seconds = Field(
        300.0,
        description="Longest wait for a worker; one that hangs is started again, if it is shorter than "
        "engine.hang_timeout. 0: no limit.",
    )
    window_shards: form.Count = Field(8, description="Shards whose samples are shuffled together.")
    cache: form.PathText | None = Field(
        None, description="Folder for downloaded shards, shared by a machine's processes."
    )
    cache_gb: form.Gibibytes = Field(100.0, description="Largest size of the cache.")
    redirect_hosts: form.Hosts = Field(
        (), description="Other servers, HOST or HOST:PORT, to which https shards may be redirected."
    )
    verify: Verify = Field(
        "first_open",
        description="What is compared with the manifest: SHA-256 when first opened, or size. Reader stream: size.",
    )
    stream_shuffle: form.Count = Field(1000, description="Reader stream: samples that a worker draws from.")
    allow_pipe: bool = Field(False, description="Reader stream: allow `pipe:` addresses, which run shell commands.")
    synthetic_samples: form.Images = Field(
        1_281_167, description="Size of the synthetic set; by default ImageNet-1K's."
    )
    image_member: form.Member | None = Field(
        None, description="Shards: which image to read if a sample has several, by suffix, like jpg or rgb.png."
    )
    label_member: form.Member | None = Field(
        None, description="Shards: which label to read if a sample has several, like cls or coarse.cls."
    )
    exif: form.Exif = Field(
        "ignore", description="Whether to rotate images by their EXIF orientation; torchvision ignores it."
    )
    decode_scaling: form.DecodeScaling = Field(
        "none", description="With dct, JPEG crops over twice the image size are decoded at 1/2, 1/4 or 1/8 scale."
    )
    pixels: form.PixelType = Field(
        "uint8", description="Type of the images' values; files of another type, or other channels, are bad samples."
    )
    max_bad_fraction: form.Fraction = Field(
        0.001, description="Share of bad samples above which training stops, or fails at its end."
    )

    def _problems(self) -> Iterator[str]:
        if (self.batch_size is None) == (self.batch_size_per_process is None):
            yield (
                f"batch_size is {self.batch_size} and batch_size_per_process {self.batch_size_per_process}; "
                "give exactly one of them"
            )
        if self.subset is not None and self.reader in ("stream", "synthetic"):
            yield f"subset is {self.subset}, but reader {self.reader} has no named images; use shards or imagefolder"
        for name, member in (("image_member", self.image_member), ("label_member", self.label_member)):
            if member is not None and self.reader in WITHOUT_MEMBERS:
                yield f"{name} is {member}, but reader {self.reader} has no samples of several members; set it to null"


class CropConfig(Section, at="augment"):
    """What both kinds of augmentation do: crops, resized as in PIL, and normalisation."""

    crop_ratio: form.CropRatio = Field((3 / 4, 4 / 3), description="Width of a crop divided by its height.")
    mean: form.Means | None = Field(
        IMAGENET_MEAN,
        description="Mean of each channel in [0, 1]. Null, the default unless 8-bit RGB: from shards.py stats.",
    )
    std: form.Deviations | None = Field(
        IMAGENET_STD, description="Standard deviation of each channel. Null: from shards.py stats, as for mean."
    )

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel, once they are known."""
        assert self.mean is not None and self.std is not None  # a run reads them before it builds anything
        return self.mean, self.std

    def for_format(self, pixels: PixelFormat) -> CropConfig:
        """Returns the section for images of this format: without ImageNet's values where they are only a default."""
        open_ones = {"mean", "std"} - self.model_fields_set
        if pixels.is_rgb8 or not open_ones:
            return self
        fitting = self.model_copy(update=dict.fromkeys(open_ones))
        fitting.__pydantic_fields_set__.difference_update(open_ones)  # still open: `model.init` may tell them
        return fitting

    def misfits(self, pixels: PixelFormat) -> Iterator[str]:
        """Yields what doesn't fit images of this format, beginning with the name of a setting of this section."""
        if (self.mean is None) != (self.std is None):
            yield f"mean is {self.mean} and std is {self.std}; give both, or neither"
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != pixels.channels:
                yield (
                    f"{name} has {len(values)} numbers, but images have {pixels}; give {pixels.channels}, or null "
                    "for those that `launch/shards.py stats` measures"
                )


class AugmentConfig(CropConfig):
    """Training augmentation, drawn per sample and run on the device. Probabilities are per image."""

    crop_scale: form.CropScale = Field((0.3, 1.0), description="Share of the image's area that a crop covers.")
    interpolation: form.Interpolation = Field("bilinear", description="How crops are resized.")
    flip: form.Fraction = Field(0.0, description="Probability of a horizontal flip.")
    color_jitter: float = Field(
        0.0, ge=0, le=1.25, description="Strength: 0.8 of it for brightness, contrast, saturation, 0.2 for hue."
    )
    color_jitter_probability: form.Fraction = Field(0.8, description="Probability of colour jitter.")
    grayscale: form.Fraction = Field(0.0, description="Probability of a grey image.")
    blur: form.Fraction = Field(0.0, description="Probability of a Gaussian blur, sigma 0.1 to 2 pixels.")
    solarize: form.Fraction = Field(0.0, description="Probability of inverting levels of 128 and above.")

    @override
    def misfits(self, pixels: PixelFormat) -> Iterator[str]:
        yield from super().misfits(pixels)
        for name in ("color_jitter", "grayscale", "solarize"):
            if getattr(self, name) and (pixels.channels != 3 or pixels.dtype == "float32"):
                yield (
                    f"{name} is {getattr(self, name)}, but images have {pixels}, and it changes the colours of RGB "
                    "images of uint8 or uint16; set it to 0"
                )
