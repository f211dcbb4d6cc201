"""`ijepa_scale.load` and `features`: every kind of source gives its own program's features, and says what it takes."""

from __future__ import annotations

import inspect
import json
import pydoc
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import Tensor, nn
from transformers import IJepaConfig, IJepaForImageClassification, IJepaModel, ViTImageProcessor

import ijepa_scale
from ijepa_scale.checkpoint import store
from ijepa_scale.checkpoint.export import export_safetensors
from ijepa_scale.config import EncoderConfig, PretrainConfig
from ijepa_scale.config.finetune_run import ClassifierConfig, FinetuneConfig
from ijepa_scale.engine.protocol import Piece
from ijepa_scale.engine.world import World
from ijepa_scale.errors import CheckpointError, ConfigError, DataError
from ijepa_scale.evaluate.frozen import ImageTransform
from ijepa_scale.models.classifier import build_classifier
from ijepa_scale.models.pos_embed import positions, sincos_2d
from ijepa_scale.models.registry import build_encoder, build_jepa

ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
SIZES: dict[str, Any] = dict(name="vit_tiny", image_size=(32, 32), patch_size=8, width=24, depth=4, heads=3)
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
GREY = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
CLOSE = dict(atol=1e-5, rtol=1e-5)


def shaken(module: nn.Module, seed: int = 1) -> Any:
    """Returns the module with biases and norms that matter, and positions as they were."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "pos" not in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def saved(folder: Path, tensors: dict[str, Tensor], config: dict, **extra: Any) -> Path:
    pieces = [
        Piece(name=n, tensor=t.flatten(), start=0, shape=tuple(t.shape)) for n, t in tensors.items() if "pos_" not in n
    ]
    plain = json.loads(json.dumps({"config": config, **extra}))
    store.save(folder / "checkpoints", 3, pieces, world=ALONE, extra=plain, keep=1)
    return folder


def pretrained(folder: Path, **changes: Any) -> tuple[Path, Any, Any]:
    """Returns a pretraining run, its target and its context encoder."""
    config = PretrainConfig(model={**SIZES, **changes}, augment=dict(mean=GREY[0], std=GREY[1]))
    jepa, target = shaken(build_jepa(config.model, seed=1)), shaken(build_jepa(config.model, seed=2).encoder, 5)
    tensors = {f"model.{n}": t for n, t in jepa.state_dict().items()}
    tensors |= {f"target.{n}": t for n, t in target.state_dict().items()}
    return saved(folder, tensors, config.values(), kind="pretrain"), target, jepa.encoder


def test_a_pretraining_run(tmp_path: Path) -> None:
    run, target, context = pretrained(tmp_path)
    for which, expected in (("target", target), ("context", context)):
        for source in (run, str(run / "checkpoints" / "step-00000003")):
            encoder, transform = ijepa_scale.load(source, which=which)
            assert not encoder.training and torch.equal(encoder(IMAGES), expected(IMAGES))
    assert (transform.image_size, transform.channels, transform.mean, transform.std) == ((32, 32), 3, *GREY)
    with pytest.raises(CheckpointError, match="weights is 'teacher'; choose target or context"):
        ijepa_scale.load(run, which="teacher")


@pytest.mark.parametrize("naming", ["published", "transformers"])
@pytest.mark.parametrize("image_size", [(32, 32), (48, 16)])
def test_our_exports_say_all(tmp_path: Path, naming: str, image_size: tuple[int, int]) -> None:
    run, target, _ = pretrained(tmp_path / "run", image_size=image_size, position_grid=(4, 4))
    path = export_safetensors(run, tmp_path / "encoder.safetensors", naming=naming)
    encoder, transform = ijepa_scale.load(path)
    images = torch.randn(2, 3, *image_size)
    torch.testing.assert_close(encoder(images), target(images), **CLOSE)
    assert (encoder.grid, transform.image_size, transform.mean, transform.std) == (target.grid, image_size, *GREY)
    assert encoder.position_grid == (None if image_size == (32, 32) else (4, 4))


@pytest.mark.parametrize("pool_norm", ["after", "before"])
@pytest.mark.parametrize("average", [False, True])
def test_a_finetuning_run(tmp_path: Path, pool_norm: Any, average: bool) -> None:
    model = ClassifierConfig(encoder=EncoderConfig(**SIZES), num_classes=5, pool_norm=pool_norm)
    config = FinetuneConfig(model=model, augment=dict(mean=GREY[0], std=GREY[1]))
    both = [shaken(build_classifier(model, seed=seed), seed) for seed in (1, 2)]
    tensors = {f"model.{n}": t for n, t in both[0].state_dict().items()}
    tensors |= {f"target.{n}": t for n, t in both[1].state_dict().items()} if average else {}
    encoder, transform = ijepa_scale.load(saved(tmp_path, tensors, config.values(), kind="finetune"))
    assert transform.mean == GREY[0] and transform.crop_fraction == 1.0
    used = both[average]
    logits = used.head(used.fc_norm(ijepa_scale.features(encoder, IMAGES)))
    torch.testing.assert_close(logits, used(IMAGES), **CLOSE)


def test_a_published_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    context, target = (shaken(build_encoder("vit_tiny", image_size=48, depth=12, seed=s), s) for s in (1, 2))
    wrapped = {
        part: {f"module.{n}": t for n, t in encoder.state_dict().items()}
        for part, encoder in (("encoder", context), ("target_encoder", target))
    }
    torch.save({**wrapped, "epoch": 3}, tmp_path / "jepa.pth.tar")
    images = torch.randn(2, 3, 48, 48)
    with caplog.at_level("INFO"):
        encoder, transform = ijepa_scale.load(tmp_path / "jepa.pth.tar")  # heads by width and depth, size by positions
    torch.testing.assert_close(encoder(images), target(images), **CLOSE)
    assert transform.mean == (0.485, 0.456, 0.406) and "doesn't state the mean of its images; using" in caplog.text
    assert torch.equal(ijepa_scale.load(tmp_path / "jepa.pth.tar", which="context")[0](images), context(images))


def test_what_a_file_does_not_say_must_be_given(tmp_path: Path) -> None:
    model = shaken(build_encoder(**SIZES))
    tensors = model.state_dict()
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match=r"heads of its encoder; give load\(..., heads=...\), or --heads where"):
        ijepa_scale.load(tmp_path / "a.safetensors")
    assert torch.equal(ijepa_scale.load(tmp_path / "a.safetensors", heads=3)[0](IMAGES), model(IMAGES))
    del tensors["pos_embed"]
    save_file(tensors, tmp_path / "b.safetensors")
    with pytest.raises(ConfigError, match="doesn't state the image_size .* or --image-size where a command has it"):
        ijepa_scale.load(tmp_path / "b.safetensors", heads=3)
    encoder, transform = ijepa_scale.load(tmp_path / "b.safetensors", heads=3, image_size=32, mean=GREY[0], std=GREY[1])
    assert torch.equal(encoder(IMAGES), model(IMAGES)) and (transform.mean, transform.std) == GREY
    with pytest.raises(ConfigError, match=r"takes 3 channels, but mean has 1 values; give load\(..., mean="):
        ijepa_scale.load(tmp_path / "b.safetensors", heads=3, image_size=32, mean=[0.5])


def timm_twin() -> Any:
    model = timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, img_size=32, patch_size=8, class_token=False, global_pool="avg",
        num_classes=0, depth=4, embed_dim=24, num_heads=3, fc_norm=False,
    )  # fmt: skip
    model.pos_embed.data.copy_(sincos_2d(24, (4, 4)))
    return shaken(model)


def test_timms_files_folders_and_names(tmp_path: Path) -> None:
    twin = timm_twin()
    save_for_hf(twin, tmp_path, safe_serialization="both")
    with torch.no_grad():
        expected = twin(IMAGES)
    for source in (
        tmp_path,
        tmp_path / "model.safetensors",
        tmp_path / "pytorch_model.bin",
        f"timm:local-dir:{tmp_path}",
    ):
        encoder, transform = ijepa_scale.load(source)
        torch.testing.assert_close(ijepa_scale.features(encoder, IMAGES), expected, **CLOSE)
        assert (transform.image_size, transform.mean, transform.crop_fraction) == ((32, 32), (0.5, 0.5, 0.5), 0.9)


def test_a_bare_timm_name_goes_to_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    twin, asked = timm_twin(), []
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: asked.append((name, pretrained)) or twin)
    encoder, _ = ijepa_scale.load("vit_huge_patch14_gap_224.in1k_ijepa")
    assert asked == [("vit_huge_patch14_gap_224.in1k_ijepa", True)]
    torch.testing.assert_close(ijepa_scale.features(encoder, IMAGES), twin(IMAGES).detach(), **CLOSE)


@pytest.mark.parametrize("kind", [IJepaModel, IJepaForImageClassification])
def test_transformers_folders_files_and_names(tmp_path: Path, kind: Any) -> None:
    config = IJepaConfig(
        hidden_size=24, num_hidden_layers=4, num_attention_heads=3, intermediate_size=96, image_size=32, patch_size=8
    )
    twin = shaken(kind(config))
    body = getattr(twin, "ijepa", twin)
    body.embeddings.position_embeddings.data.copy_(sincos_2d(24, (4, 4)))
    assert config.layer_norm_eps == 1e-12  # unlike the published code's, and kept
    with torch.no_grad():
        expected = body(IMAGES).last_hidden_state
    twin.save_pretrained(tmp_path / "whole")
    twin.save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    for name in ("whole", "sharded"):
        processor.save_pretrained(tmp_path / name)
    sources = [tmp_path / "whole", tmp_path / "whole" / "model.safetensors", tmp_path / "sharded"]
    torch.save(twin.state_dict(), tmp_path / "whole" / "memory.pth")  # the names of modules in memory differ
    sources += [tmp_path / "whole" / "memory.pth", f"transformers:{tmp_path / 'whole'}"]
    for source in sources:
        encoder, transform = ijepa_scale.load(source)
        tokens = ijepa_scale.features(encoder, IMAGES, pool="tokens")
        torch.testing.assert_close(tokens, expected, **CLOSE)
        assert (transform.mean, transform.crop_fraction) == ((0.5, 0.5, 0.5), 1.0)


def test_a_name_goes_to_transformers_only_if_it_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for path in ("runs/demo", "a/b.safetensors", "a/b/c", "nothing"):
        with pytest.raises(CheckpointError, match="doesn't exist; give a run folder, .*, published:NAME, timm:NAME"):
            ijepa_scale.load(path)
    from transformers import AutoModel

    def offline(name: str) -> None:
        raise OSError(f"no {name}\nmore")

    monkeypatch.setattr(AutoModel, "from_pretrained", offline)
    with pytest.raises(CheckpointError, match=r"transformers can't load owner/name \(no owner/name\); give a local"):
        ijepa_scale.load("owner/name")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="owner/name isn't there, and transformers, .* isn't installed; give a"):
        ijepa_scale.load("owner/name")


@pytest.mark.parametrize("how", ["interpolated", "computed"])
def test_another_image_size(tmp_path: Path, how: Any) -> None:
    run, target, _ = pretrained(tmp_path)
    encoder, transform = ijepa_scale.load(run, image_size=(64, 32), positions=how)
    trained = (4, 4) if how == "interpolated" else None
    assert torch.equal(encoder.pos_embed[0], positions(24, (8, 4), trained)) and transform.image_size == (64, 32)
    assert torch.equal(encoder.norm.weight, target.norm.weight)


def test_features_are_what_they_are_called(tmp_path: Path) -> None:
    encoder, _ = ijepa_scale.load(pretrained(tmp_path)[0])
    encoder.train()
    mean, tokens, last4 = (
        ijepa_scale.features(encoder, IMAGES, pool=pool, batch_size=2) for pool in ("mean", "tokens", "last4")
    )
    assert encoder.training and not mean.requires_grad
    assert (mean.shape, tokens.shape, last4.shape) == ((3, 24), (3, 16, 24), (3, 96))
    torch.testing.assert_close(tokens.mean(1), mean, **CLOSE)
    layers = [layer.mean(1) for layer in encoder.features(IMAGES, last=4)]
    torch.testing.assert_close(last4, torch.cat(layers, 1).detach(), **CLOSE)
    torch.testing.assert_close(last4[:, 72:], mean, **CLOSE)
    with pytest.raises(ConfigError, match="pool is 'max'; choose one of mean, tokens, last4"):
        ijepa_scale.features(encoder, IMAGES, pool="max")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="pool is last4 but the encoder has 2 blocks; choose mean or tokens"):
        ijepa_scale.features(build_encoder(**{**SIZES, "depth": 2}), IMAGES, pool="last4")


@pytest.mark.parametrize(
    ("images", "text"),
    [
        (
            torch.zeros(2, 4, 32, 32),
            r"images are \(2, 4, 32, 32\) float32; this encoder takes \(B, 3, 32, 32\) of floats",
        ),
        (torch.zeros(2, 3, 32, 40), r"images are \(2, 3, 32, 40\) float32; this encoder takes \(B, 3, 32, 32\)"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), r"\(2, 3, 32, 32\) uint8; this encoder takes .* of floats"),
        (torch.zeros(3, 32, 32), r"images are \(3, 32, 32\) float32"),
        (torch.zeros(0, 3, 32, 32), "images holds 0 images"),
        (["a.jpg"], r"images is a list; give what transform\(images\) returns, or features\(..., transform=...\)"),
    ],
)
def test_images_that_do_not_fit_are_refused_in_one_line(images: Any, text: str) -> None:
    with pytest.raises(DataError, match=text) as caught:
        ijepa_scale.features(build_encoder(**SIZES), images)
    assert len(str(caught.value).splitlines()) == 1


def test_the_transform_takes_paths_arrays_and_pil_images(tmp_path: Path) -> None:
    encoder, transform = ijepa_scale.load(pretrained(tmp_path / "run")[0])
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(np.ascontiguousarray(np.rot90(pixels))).save(tmp_path / "turned.png", exif=turned)
    opened = Image.open(tmp_path / "turned.png")
    one = transform(pixels)
    assert one.shape == (3, 32, 32) and one.dtype == torch.float32
    several = [
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        pixels,
        Image.fromarray(pixels),
        tmp_path / "turned.png",
        opened,
    ]
    every = transform(several)
    assert every.shape == (6, 3, 32, 32) and all(torch.equal(each, one) for each in every)
    grey = pixels[..., 0]
    assert torch.equal(transform(Image.fromarray(grey)), transform(np.stack([grey] * 3, axis=-1)))
    mean, std = (torch.tensor(values)[:, None, None] for values in GREY)
    flat = transform(np.full((50, 50, 3), 51, dtype=np.uint8))
    torch.testing.assert_close(flat, ((0.2 - mean) / std).expand(3, 32, 32), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        ijepa_scale.features(encoder, several, transform=transform, batch_size=4), ijepa_scale.features(encoder, every)
    )
    for wrong, text in {
        "no.png": "image no.png: ",
        "grey": r"array is \(40, 50\) uint8; this encoder takes images of 3 channels: give \(H, W, 3\) uint8",
        "four": r"array is \(40, 50, 4\) uint8",
        "float": r"array is \(40, 50, 3\) float64",
        "none": "an image is a NoneType; give a path",
    }.items():
        values = {"grey": grey, "four": np.zeros((40, 50, 4), np.uint8), "float": pixels / 255.0, "none": [None]}
        with pytest.raises(DataError, match=text):
            transform(values.get(wrong, wrong))  # type: ignore[arg-type]


def test_the_package_shows_its_public_names_only() -> None:
    names = ["__version__", "build_encoder", "build_predictor", "features", "load", "run"]
    assert dir(ijepa_scale) == sorted(ijepa_scale.__all__) == names
    text = pydoc.render_doc(ijepa_scale, renderer=pydoc.plaintext)
    listed = text[text.index("FUNCTIONS") : text.index("VERSION")]
    assert re.findall(r"^    (\w+)\(", listed, flags=re.MULTILINE) == names[1:] and "DATA" not in text
    for name in names[1:]:
        assert inspect.getdoc(getattr(ijepa_scale, name))


def test_importing_the_package_is_light() -> None:
    code = "import sys, ijepa_scale; print([n for n in ('torch', 'numpy', 'timm', 'transformers') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(("dtype", "suffix"), [("uint16", "tif"), ("float32", "npy")])
def test_a_run_of_other_pixels_reads_them(tmp_path: Path, dtype: str, suffix: str) -> None:
    """Five channels: files, arrays and an export give the same features; 8-bit RGB is refused."""
    config = PretrainConfig(
        model={**SIZES, "channels": 5}, data={"pixels": dtype, "batch_size": 8},
        augment={"mean": (0.5,) * 5, "std": (0.25,) * 5},
    )  # fmt: skip
    jepa = shaken(build_jepa(config.model, seed=1))
    tensors = {f"model.{name}": each for name, each in jepa.state_dict().items()}
    tensors |= {f"target.{name}": each for name, each in build_jepa(config.model, seed=2).encoder.state_dict().items()}
    saved(tmp_path / "deep", tensors, config.values(), kind="pretrain")
    encoder, transform = ijepa_scale.load(tmp_path / "deep")
    assert transform.channels == 5 and transform.format.dtype == dtype
    values = np.random.default_rng(0).random((40, 36, 5))
    pixels = (values * 65535).astype(np.uint16) if dtype == "uint16" else values.astype(np.float32)
    path = tmp_path / f"image.{suffix}"
    if suffix == "npy":
        np.save(path, pixels)
    else:
        tifffile.imwrite(path, pixels, photometric="minisblack", planarconfig="contig")
    found = ijepa_scale.features(encoder, transform([path, pixels, path.read_bytes()]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    export_safetensors(tmp_path / "deep", tmp_path / "out.safetensors")
    again, other = ijepa_scale.load(tmp_path / "out.safetensors")
    assert repr(other) == repr(transform) and torch.equal(ijepa_scale.features(again, other([path]))[0], found[0])
    with pytest.raises(DataError, match=rf"this encoder takes images of 5 channels: give \(H, W, 5\) {dtype}"):
        transform(np.zeros((40, 36, 3), dtype=np.uint8))


def test_pil_images_whose_values_are_no_levels_are_refused() -> None:
    encoder = build_encoder(**{**SIZES, "channels": 1})
    transform = ImageTransform(encoder, mean=(0.5,), std=(0.25,))
    levels = Image.fromarray(np.random.default_rng(0).integers(0, 9, (40, 40), dtype=np.uint8) * 28)
    assert torch.equal(transform(levels), transform(np.asarray(levels)[..., None]))
    for mode in ("P", "CMYK"):
        with pytest.raises(DataError, match=f"PIL image: its pixels are {mode}"):
            transform(levels.convert(mode))
