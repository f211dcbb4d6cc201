"""The pictures of an encoder: what they show is what its weights say, and every text is on the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from picture_runs import stays_on_page, write_photographs, write_run
from PIL import Image

import ijepa_scale
from ijepa_scale.checkpoint.export import export_safetensors
from ijepa_scale.config.schema import BlockMaskConfig
from ijepa_scale.errors import CheckpointError, ConfigError, DataError
from ijepa_scale.masks import MaskSampler
from ijepa_scale.masks.types import target_index
from ijepa_scale.models.registry import build_encoder
from ijepa_scale.objectives.targets import normalise_targets, select_targets
from ijepa_scale.visualize import sheet as sheet_module
from ijepa_scale.visualize import sheets
from ijepa_scale.visualize.last_attention import last_attention
from ijepa_scale.visualize.pictures import KINDS, draw
from ijepa_scale.visualize.prediction_errors import patch_errors
from ijepa_scale.visualize.sheet import Panel, Scale, Sheet, as_bytes, draw_sheet, heat
from ijepa_scale.visualize.sheets import attention_sheet, error_sheet, mask_sheet, pca_sheet, retrieval_sheet
from ijepa_scale.visualize.source import PictureSource
from launch import visualize


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> PictureSource:
    folder = tmp_path_factory.mktemp("pictures")
    photographs = write_photographs(folder / "photographs")
    run = write_run(folder / "run", train=str(photographs), reader="imagefolder")
    return PictureSource(source=str(run))


def test_attention_is_what_the_block_computes() -> None:
    encoder = build_encoder("vit_tiny", image_size=32, patch_size=8, width=24, depth=2, heads=3).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    weights = last_attention(encoder, images)
    assert weights.shape == (2, 3, 16, 16)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 16))
    block: Any = encoder.blocks[-1]
    normed = block.norm1(encoder.trunk(images))
    values = block.attn.qkv(normed).unflatten(-1, (3, 3, 8)).unbind(-3)[2].transpose(1, 2)
    torch.testing.assert_close(block.attn.proj((weights @ values).transpose(1, 2).flatten(2)), block.attn(normed))


@pytest.mark.parametrize("context", ["truncate", "packed"])
def test_errors_stand_at_their_patches(context: Any) -> None:
    target = build_encoder("vit_tiny", image_size=32, patch_size=8, width=24, depth=2, heads=3).eval()
    sampler = MaskSampler(BlockMaskConfig(min_keep=0, group_size=8, context=context), (4, 4), seed=3)
    image = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(1))
    wanted = normalise_targets(target(image[None]))
    off = torch.arange(16).double()  # how far the prediction of each patch is off

    class Predicting:
        def __call__(self, images: torch.Tensor, masks: Any) -> torch.Tensor:
            biased = wanted + off[None, :, None].float()
            return select_targets(biased.expand(len(images), -1, -1), target_index(masks, 16), masks)

    found = patch_errors(Predicting(), target, image, sampler, draws=20)  # type: ignore[arg-type]
    seen = found.draws.flatten() > 0
    torch.testing.assert_close(found.mean.flatten()[seen], off.square().float()[seen], atol=1e-4, rtol=1e-4)
    assert found.mean.flatten()[~seen].isnan().all()
    counted = sum(len(target_index(sampler(step, 0, n, n), 16)) for step, n in ((0, 16), (1, 4)))
    assert int(found.draws.sum()) == counted
    assert found.baseline == pytest.approx(float(wanted[0].var(dim=0, correction=0).mean()), rel=1e-4)


def test_nearest_neighbours_are_the_near_copies(source: PictureSource) -> None:
    sheet = retrieval_sheet(source, count=5, neighbors=3)
    for query, first, *_ in sheet.items:
        name, near = (Path(panel.meaning.partition(": ")[2]) for panel in (query, first))
        assert near.parent == name.parent and int(near.stem) == int(name.stem) ^ 1
        assert first.label.endswith(name.parent.name)
    given = retrieval_sheet(source, queries=[str(Path(source.source).parent / "photographs" / "dots" / "03.png")])
    assert [Path(panel.meaning).name for panel in given.items[0][:2]] == ["03.png", "03.png"]  # itself, as asked


def test_retrieval_needs_another_image(source: PictureSource, tmp_path: Path) -> None:
    write_photographs(tmp_path, count=2, names=("one",))
    (tmp_path / "one" / "01.png").unlink()
    with pytest.raises(DataError, match="the set has only 1 usable image; nearest neighbours need another one"):
        retrieval_sheet(PictureSource(source=source.source, images=[str(tmp_path)]))


def test_masks_are_those_of_training(source: PictureSource) -> None:
    sheet = mask_sheet(source, count=3, step=5)
    config = BlockMaskConfig(min_keep=1, group_size=8, target_scale=(0.15, 0.3))
    masks: Any = MaskSampler(config, (4, 6), seed=0)(5, 0, 8, 8)
    for b, (_, context, targets) in enumerate(sheet.items):
        kept = len(set(masks.context[:, b].flatten().tolist()))
        assert context.meaning == f"{kept} context patches" and targets.label == "4 targets"
        shown = (context.pixels != round(0.93 * 255)).any(-1).mean()
        assert shown == pytest.approx(kept / 24, abs=0.02)


def test_other_masks_than_those_of_training_are_said(source: PictureSource, tmp_path: Path) -> None:
    encoder = build_encoder("vit_tiny", image_size=112, patch_size=8, width=24, depth=1, heads=3)
    torch.save({"target_encoder": encoder.state_dict()}, tmp_path / "a.pth.tar")
    images = [str(Path(source.source).parent / "photographs")]
    alone = PictureSource(source=str(tmp_path / "a.pth.tar"), images=images, heads=3)
    says = "these are the default"
    assert says in mask_sheet(alone, count=1).note and says not in mask_sheet(source, count=1).note


@given(st.one_of(st.integers(max_value=-1), st.integers(min_value=2**32)))
@settings(max_examples=10, deadline=None)
def test_steps_that_no_training_has_are_refused(source: PictureSource, step: int) -> None:
    with pytest.raises(ConfigError, match=f"step is {step}; give a step of training, from 0 to 4294967295"):
        mask_sheet(source, step=step)


@pytest.mark.parametrize("flag", [["--image-size", "64"], ["--weights", "context"]])
def test_the_predictor_takes_what_it_was_trained_on(source: PictureSource, flag: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        visualize.main(["prediction-error", source.source, *flag])
    assert f"unrecognized arguments: {' '.join(flag)}" in capsys.readouterr().err


def test_pca_takes_twice_the_trained_size(source: PictureSource) -> None:
    sheet = pca_sheet(source, count=2)
    assert "8 x 12 patches of 64 x 96 pixels" in sheet.note and "Fitted to 16 images" in sheet.note
    assert {panel.pixels.shape for item in sheet.items for panel in item} == {(384, 576, 3)}


def test_a_query_is_a_place(source: PictureSource, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, transform = source.encoder()
    photographs = source.photographs(transform)
    weights = last_attention(encoder, photographs.inputs(photographs.some(1)))[0]
    shown: list[np.ndarray] = []
    monkeypatch.setattr(sheets, "heat", lambda image, values, scale: shown.append(values) or as_bytes(image))
    for query, expected in (((0.99, 0.0), weights[:, 5]), ((0.0, 0.99), weights[:, 18]), (None, weights.mean(1))):
        shown.clear()
        attention_sheet(source, count=1, query=query)  # the mean over heads, then each head
        maps = 24 * torch.cat([expected.mean(0, keepdim=True), expected])
        found = np.stack(shown)[:, 4::96, 4::96].reshape(4, 24)
        np.testing.assert_allclose(found, maps.numpy(), atol=1e-5)
    with pytest.raises(ConfigError, match=r"query is 1.5 0; give shares of width and height from 0 to 1, as 0.5 0.5"):
        attention_sheet(source, query=(1.5, 0.0))


def test_heat_shows_values_and_what_has_none() -> None:
    image = np.full((2, 2, 3), 0.5)
    values = np.array([[0.0, 1.0], [np.nan, 2.0]])
    shown = heat(image, values, Scale(colors="gray", low=0.0, high=2.0, label=""), strength=1.0)
    assert shown[..., 0].tolist() == [[0, 128], [128, 255]]


def test_a_source_without_a_predictor_is_refused(source: PictureSource, tmp_path: Path) -> None:
    encoder = export_safetensors(source.source, tmp_path / "encoder.safetensors", which="target", naming="published")
    alone = PictureSource(source=str(encoder), images=[str(Path(source.source).parent / "photographs")])
    with pytest.raises(CheckpointError, match="has no predictor; give a run of pretraining, its checkpoint or a publi"):
        error_sheet(alone)
    with pytest.raises(ConfigError, match="names no images that are here; give --images FOLDER or SHARDS"):
        pca_sheet(PictureSource(source=str(encoder)))


def test_a_published_file_has_all(source: PictureSource, tmp_path: Path) -> None:
    run = Path(source.source)
    tensors = PictureSource(source=str(run)).jepa()[0].state_dict()
    parts = {
        "encoder": {n.partition(".")[2]: t for n, t in tensors.items() if n.startswith("encoder.")},
        "predictor": {n.partition(".")[2]: t for n, t in tensors.items() if n.startswith("predictor.")},
    }
    parts["target_encoder"] = ijepa_scale.load(run)[0].state_dict()
    torch.save(
        {key: {f"module.{n}": t for n, t in part.items()} for key, part in parts.items()}, tmp_path / "a.pth.tar"
    )
    images = [str(run.parent / "photographs")]
    found = PictureSource(source=str(tmp_path / "a.pth.tar"), images=images, heads=3)
    jepa, target, _ = found.jepa()
    assert all(torch.equal(t, tensors[n]) for n, t in jepa.state_dict().items())
    assert all(torch.equal(t, parts["target_encoder"][n]) for n, t in target.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_draws(kind: str, source: PictureSource, tmp_path: Path, capsys: Any) -> None:
    to = tmp_path / "new" / f"{kind}.png"
    arguments = [kind, source.source, "--to", str(to), "--count", "2"]
    assert visualize.main(arguments) == 0
    assert capsys.readouterr().out.strip() == str(to)
    picture = np.asarray(Image.open(to).convert("RGB"))
    assert min(picture.shape[:2]) > 300 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 500
    assert (picture[0] == 255).all() and (picture[-1] == 255).all()
    assert visualize.main(arguments) == 2
    assert f"{to} exists; name another file with --to, or add --overwrite" in capsys.readouterr().err


def test_other_files_than_pngs_are_refused() -> None:
    with pytest.raises(ConfigError, match="a.jpg ends in '.jpg'; pictures are written as .png"):
        draw("pca", to="a.jpg", overwrite=False)


def test_images_that_cannot_be_read_are_named(source: PictureSource, tmp_path: Path, caplog: Any) -> None:
    write_photographs(tmp_path)
    (tmp_path / "dots" / "02.png").write_bytes(b"no image")
    sheet = mask_sheet(PictureSource(source=source.source, images=[str(tmp_path)]), count=16)
    assert len(sheet.items) == 15 and "1 of 16 images can't be used; the first" in caplog.text
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match="none of 6 images can be used; the first: "):
        mask_sheet(PictureSource(source=source.source, images=[str(tmp_path)]))


NAMES = st.text(st.characters(min_codepoint=33, max_codepoint=0x24F), min_size=1, max_size=60)


@given(
    names=st.lists(NAMES, min_size=1, max_size=7),
    title=st.text("abc $_^{", max_size=30),
    note=st.text("word $", max_size=300),
    across=st.booleans(),
    shape=st.sampled_from([(40, 40), (40, 70), (60, 30)]),
    scaled=st.booleans(),
)
@settings(max_examples=15, deadline=None)
def test_no_text_leaves_the_page(tmp_path_factory, names, title, note, across, shape, scaled) -> None:
    item = [Panel(pixels=np.zeros((*shape, 3), np.uint8), label=name, meaning="") for name in names]
    scale = Scale(colors="magma", low=0.0, high=1.0, label="a share") if scaled else None
    sheet = Sheet(title=title, note=note, items=[item, item], across=across, per_line=4, scale=scale)
    kept: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sheet_module, "save_figure", lambda figure, path: kept.append(figure))
        draw_sheet(sheet, tmp_path_factory.getbasetemp() / "sheet.png")
    assert stays_on_page(kept[0])
