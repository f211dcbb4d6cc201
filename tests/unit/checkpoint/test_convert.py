"""Weights from all sources: each naming is read back exactly, and each mismatch is refused before the model changes."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer

from ijepa_scale.checkpoint import store
from ijepa_scale.checkpoint.convert import to_ours, to_transformers
from ijepa_scale.checkpoint.sources import WHICH_KEY, read_weights
from ijepa_scale.checkpoint.weights import load_weights
from ijepa_scale.config import EncoderConfig, ModelConfig
from ijepa_scale.config.finetune_run import ClassifierConfig
from ijepa_scale.engine.protocol import Piece
from ijepa_scale.engine.world import World
from ijepa_scale.errors import CheckpointError
from ijepa_scale.models import build_encoder
from ijepa_scale.models.classifier import build_classifier
from ijepa_scale.models.pos_embed import positions, sincos_2d

ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
SIZES = dict(name="vit_tiny", image_size=(32, 32), patch_size=8, width=24, depth=2, heads=3)


def encoder(seed: int = 0, **changes):
    """Returns an encoder whose biases and norms are all non-trivial."""
    model = build_encoder(**{**SIZES, **changes}, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def classifier_config(**changes) -> ClassifierConfig:
    sizes = {name: changes.pop(name, size) for name, size in SIZES.items()}
    return ClassifierConfig(encoder=EncoderConfig(**sizes), **{"num_classes": 5, **changes})


def classifier(**changes):
    return build_classifier(classifier_config(**changes), seed=9)


CONTEXT, TARGET = encoder(1).state_dict(), encoder(2).state_dict()


def equal(model, expected: dict) -> bool:
    found = model.state_dict()
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def published(path: Path, **parts) -> Path:
    content = {"encoder": CONTEXT, "target_encoder": TARGET, "predictor": {"mask_token": torch.zeros(1, 1, 8)}, **parts}
    wrapped = {name: {f"module.{n}": t for n, t in part.items()} for name, part in content.items() if part is not None}
    optimiser = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    rest = {"opt": optimiser, "scaler": None, "epoch": 3, "loss": 0.5, "batch_size": 4, "world_size": 1, "lr": 1e-3}
    torch.save({**wrapped, **rest}, path)
    return path


def run_folder(path: Path, model: dict, tensors: dict) -> Path:
    pieces = [
        Piece(name=n, tensor=t.flatten(), start=0, shape=tuple(t.shape)) for n, t in tensors.items() if "pos_" not in n
    ]
    extra = {"config": json.loads(json.dumps({"model": model}))}
    store.save(path / "checkpoints", 3, pieces, world=ALONE, extra=extra, keep=1)
    return path


def pretraining(path: Path) -> Path:
    both = {f"target.{n}": t for n, t in TARGET.items()} | {f"model.encoder.{n}": t for n, t in CONTEXT.items()}
    return run_folder(path, ModelConfig(**SIZES).values(), both)


@pytest.mark.parametrize("make", [published, pretraining], ids=["published", "run folder"])
@pytest.mark.parametrize("which, expected", [("target", TARGET), ("context", CONTEXT)])
def test_the_requested_encoder_is_loaded(tmp_path: Path, make, which: str, expected: dict) -> None:
    source, model = make(tmp_path / "start.pth.tar"), encoder()
    report = load_weights(model, source, which=which)
    assert equal(model, expected)
    assert (report.share, report.missing, report.unexpected, report.reshaped) == (1.0, (), (), ())
    assert len(report.loaded) == len(CONTEXT) - 1 and report.which == which  # the position embedding isn't trained
    assert f"loaded the {which} encoder, 28 tensors, 100.0% of the model's weights" in report.text()
    load_weights(other := encoder(), source)
    assert equal(other, TARGET)  # the target is the default


def test_a_file_with_one_encoder_says_so(tmp_path: Path) -> None:
    source = published(tmp_path / "one.pth.tar", target_encoder=None)
    text = "holds only the context encoder, but target is requested; set model.weights=context"
    with pytest.raises(CheckpointError, match=text):
        load_weights(encoder(), source)
    load_weights(model := encoder(), source, which="context")
    assert equal(model, CONTEXT)
    save_file(CONTEXT, tmp_path / "one.safetensors", metadata={WHICH_KEY: "context"})
    with pytest.raises(CheckpointError, match=text):
        load_weights(encoder(), tmp_path / "one.safetensors")
    load_weights(model := encoder(), tmp_path / "one.safetensors", which="context")
    assert equal(model, CONTEXT)


def timm_twin(**changes) -> TimmVisionTransformer:
    sizes = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, class_token=False, global_pool="avg")
    twin = TimmVisionTransformer(**{**sizes, "fc_norm": False, "num_classes": 0, **changes})
    twin.pos_embed.data.copy_(sincos_2d(24, (4, 4)))
    return twin.eval()


@pytest.mark.parametrize("ending", [".safetensors", ".pth", "nested.bin"])
def test_timms_names(tmp_path: Path, ending: str, caplog: pytest.LogCaptureFixture) -> None:
    twin, model, path = timm_twin(), encoder(), tmp_path / f"timm{ending}"
    if ending == ".safetensors":
        save_file(twin.state_dict(), path)
    else:
        torch.save({"state_dict": twin.state_dict()} if "nested" in ending else twin.state_dict(), path)
    with caplog.at_level(logging.WARNING):
        report = load_weights(model, path)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(images), twin.forward_features(images), atol=1e-5, rtol=1e-5)
    assert report.which == "only" and report.share == 1.0
    assert "holds one encoder and doesn't say which; target was requested" in caplog.text


def test_a_timm_name(monkeypatch: pytest.MonkeyPatch) -> None:
    twin = timm_twin()
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: twin)
    name = "timm:vit_huge_patch14_gap_224.in1k_ijepa"
    report = load_weights(model := encoder(), name)
    assert torch.equal(model.blocks[1].attn.qkv.weight, twin.blocks[1].attn.qkv.weight)
    assert "converters use the context encoder; the paper evaluates the target" in report.notes[0]
    with pytest.raises(CheckpointError, match="it has 3 attention heads, the model 2; set model.name or model.heads"):
        load_weights(encoder(heads=2), name)
    for unknown in ("vit_huger", "vit_small_patch16_18x2_224"):  # an unknown model, and one without weights
        with pytest.raises(CheckpointError, match=f"has no weights of '{unknown}'; those of I-JEPA are vit_giant"):
            read_weights(f"timm:{unknown}")

    def fail(name, pretrained):
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(CheckpointError, match=r"timm can't download the weights of .* \(no network\); download them"):
        read_weights(name)


TRANSFORMERS = [  # IJepaModel's names for an encoder with one block
    "embeddings.position_embeddings",
    *(f"embeddings.patch_embeddings.projection.{kind}" for kind in ("weight", "bias")),
    *(
        f"encoder.layer.0.{part}.{kind}"
        for part in (
            "attention.attention.query", "attention.attention.key", "attention.attention.value",
            "attention.output.dense", "intermediate.dense", "output.dense", "layernorm_before", "layernorm_after",
        )
        for kind in ("weight", "bias")
    ),
    *(f"layernorm.{kind}" for kind in ("weight", "bias")),
]  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "ijepa."])
def test_transformers_names(tmp_path: Path, prefix: str) -> None:
    theirs = to_transformers(TARGET)
    assert {n for n in theirs if "layer.1." not in n} == set(TRANSFORMERS) and len(theirs) == len(TRANSFORMERS) + 16
    names = [f"encoder.layer.1.attention.attention.{part}.bias" for part in ("query", "key", "value")]
    assert torch.equal(torch.cat([theirs[name] for name in names]), TARGET["blocks.1.attn.qkv.bias"])
    assert torch.equal(theirs["encoder.layer.1.output.dense.weight"], TARGET["blocks.1.mlp.fc2.weight"])
    save_file({f"{prefix}{n}": t for n, t in theirs.items()}, tmp_path / "model.safetensors")
    report = load_weights(model := encoder(), tmp_path)  # a folder as save_pretrained writes it
    assert equal(model, TARGET)
    assert "transformers' converters use the context encoder" in report.notes[0]


def test_incomplete_and_foreign_names() -> None:
    theirs = to_transformers(TARGET)
    del theirs["encoder.layer.1.attention.attention.key.bias"]
    with pytest.raises(CheckpointError, match="f lacks key of blocks.1.attn.qkv.bias; the file is incomplete"):
        to_ours(theirs, "f")
    assert to_ours({**to_transformers(TARGET), "pooler.dense.bias": torch.zeros(1)}, "f")[0].keys() - TARGET.keys() == {
        "pooler.dense.bias"
    }
    with pytest.raises(CheckpointError, match="f holds conv1.weight, fc.bias, a ..., which isn't a known encoder"):
        to_ours(dict.fromkeys(["conv1.weight", "fc.bias", "a", "b"], torch.zeros(1)), "f")
    with pytest.raises(CheckpointError, match="f holds nothing, which isn't a known encoder"):
        to_ours({}, "f")
    with pytest.raises(CheckpointError, match="fc_norm.weight has no name in transformers' .* published naming"):
        to_transformers({"fc_norm.weight": torch.zeros(1)})


@pytest.mark.parametrize("pool_norm", ["after", "before"])
def test_a_classifier_loads_the_encoder_and_reports_the_rest(tmp_path: Path, pool_norm: str) -> None:
    model, source = classifier(pool_norm=pool_norm), published(tmp_path / "start.pth.tar")
    initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = load_weights(model, source)
    found = model.state_dict()
    new = {"head.weight", "head.bias"} | ({"fc_norm.weight", "fc_norm.bias"} if pool_norm == "after" else set())
    assert set(report.missing) == new and all(torch.equal(found[name], initial[name]) for name in new)
    assert all(torch.equal(tensor, TARGET[n.removeprefix("encoder.")]) for n, tensor in found.items() if n not in new)
    assert report.unexpected == (("norm.weight", "norm.bias") if pool_norm == "after" else ())
    total = sum(parameter.numel() for parameter in model.parameters())
    assert report.share == pytest.approx(1 - sum(initial[name].numel() for name in new) / total)
    text = report.text()
    assert "  new: " in text and ("left out: norm.weight, norm.bias" in text) == (pool_norm == "after")


def finetuned(path: Path, **changes) -> tuple[Path, dict]:
    model = classifier(**changes)
    with torch.no_grad():
        model.head.bias += 1.0
    config = classifier_config(**changes).values()
    return run_folder(path, config, {f"model.{n}": t for n, t in model.state_dict().items()}), model.state_dict()


def test_a_finetuned_classifier_starts_another(tmp_path: Path) -> None:
    source, trained = finetuned(tmp_path)
    report = load_weights(model := classifier(), source)
    assert set(report.missing) == set(report.unexpected) == {"head.weight", "head.bias"}
    assert "a finetuned classifier, which has one encoder" in report.text() and "its only encoder" in report.text()
    assert not model.head.bias.any() and torch.equal(model.fc_norm.weight, trained["fc_norm.weight"])
    report = load_weights(model, source, keep_head=True)
    assert report.share == 1.0 and equal(model, trained)
    load_weights(classifier(num_classes=7), source)  # a new head may have other classes
    with pytest.raises(
        CheckpointError, match="head has 5 classes, the model's 7; set model.num_classes=5, or model.keep"
    ):
        load_weights(classifier(num_classes=7), source, keep_head=True)
    with pytest.raises(CheckpointError, match="head.weight is .5, 24., the model's .5, 96."):
        load_weights(classifier(depth=4, representation="last4"), finetuned(tmp_path / "b", depth=4)[0], keep_head=True)
    with pytest.raises(
        CheckpointError, match="missing: norm.weight, norm.bias .it was finetuned with model.pool_norm=af"
    ):
        load_weights(encoder(), source)


def test_a_head_is_kept_only_with_the_norm_it_was_trained_with(tmp_path: Path) -> None:
    save_file(TARGET, tmp_path / "bare.safetensors")
    with pytest.raises(CheckpointError, match="missing: .*head.weight.* .set model.keep_head=false for a new head"):
        load_weights(classifier(pool_norm="before"), tmp_path / "bare.safetensors", keep_head=True)
    save_file(timm_twin(num_classes=5).state_dict(), tmp_path / "timm.safetensors")
    with pytest.raises(CheckpointError, match="missing: fc_norm.weight, fc_norm.bias .model.keep_head needs the norm"):
        load_weights(classifier(), tmp_path / "timm.safetensors", keep_head=True)
    report = load_weights(classifier(pool_norm="before"), tmp_path / "timm.safetensors", keep_head=True)
    assert report.share == 1.0


@pytest.mark.parametrize("image_size, grid", [((48, 16), "6 x 2"), ((64, 16), "8 x 2"), ((64, 64), "8 x 8")])
@pytest.mark.parametrize("make", [published, pretraining], ids=["published", "run folder"])
@pytest.mark.parametrize("how", ["interpolated", "computed anew"])
def test_positions_of_another_grid_stay_the_models(
    tmp_path: Path, make, image_size: tuple, grid: str, how: str
) -> None:
    trained = (4, 4) if how == "interpolated" else None
    model = encoder(image_size=image_size, position_grid=trained)
    expected = positions(24, model.grid, trained)
    assert torch.equal(expected, sincos_2d(24, model.grid)) == (trained is None)
    report = load_weights(model, make(tmp_path / "start.pth.tar"))
    assert report.reshaped == (f"pos_embed, 4 x 4 patches -> {grid}, {how}",)
    assert torch.equal(model.pos_embed[0], expected)
    assert torch.equal(model.norm.weight, TARGET["norm.weight"]) and report.share == 1.0


def test_half_precision_is_read_into_fp32(tmp_path: Path) -> None:
    save_file({name: tensor.bfloat16() for name, tensor in TARGET.items()}, tmp_path / "half.safetensors")
    report = load_weights(model := encoder(), tmp_path / "half.safetensors")
    assert report.reshaped == () and model.norm.weight.dtype == torch.float32
    assert torch.equal(model.norm.weight, TARGET["norm.weight"].bfloat16().float())
    assert torch.equal(model.pos_embed, TARGET["pos_embed"])


def spoiled(**changes) -> dict:
    tensors = {**TARGET, **changes}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


MISFITS = {
    "its patches are 16 x 16 pixels, the model's 8: .* aren't resized; set model.patch_size=16": encoder(
        patch_size=16
    ).state_dict(),
    "its width is 12, the model's 24; set model.name or model.width": encoder(width=12).state_dict(),
    "it has 3 blocks, the model 2; set model.name or model.depth": encoder(depth=3).state_dict(),
    r"blocks.0.mlp.fc1.weight is \(48, 24\), the model's \(96, 24\)": encoder(mlp_ratio=2.0).state_dict(),
    "missing: blocks.1.norm2.bias$": spoiled(**{"blocks.1.norm2.bias": None}),
    "unexpected: cls_token$": spoiled(cls_token=torch.zeros(1, 1, 24)),
    "pos_embed of 16 patches isn't a fixed sine-cosine embedding": spoiled(pos_embed=TARGET["pos_embed"] + 0.1),
    "pos_embed of 17 patches isn't a fixed": spoiled(pos_embed=torch.zeros(1, 17, 24)),
    "norm.bias holds values that aren't finite": spoiled(**{"norm.bias": torch.full((24,), float("nan"))}),
    "blocks.0.attn.proj.bias is .*; and 4 more$": spoiled(**{name: torch.zeros(2) for name in list(TARGET)[3:13]}),
}


@pytest.mark.parametrize("text", MISFITS)
def test_mismatches_are_refused_before_the_model_changes(tmp_path: Path, text: str) -> None:
    save_file({n: t.contiguous() for n, t in MISFITS[text].items()}, tmp_path / "other.safetensors")
    model = encoder(5)
    with pytest.raises(CheckpointError, match="doesn't match the model, and nothing was loaded: ") as error:
        load_weights(model, tmp_path / "other.safetensors")
    error.match(text)
    assert equal(model, encoder(5).state_dict())


@pytest.mark.parametrize(
    ("key", "sizes"),
    [("patch_size=16", {"patch_size": 16}), ("name or .*width", {"width": 12}), ("name", {"depth": 3})],
)
def test_a_remedy_for_finetuning_names_its_own_section(key: str, sizes: dict[str, int], tmp_path: Path) -> None:
    save_file(encoder(**sizes).state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=f"; set model.encoder.{key}"):
        load_weights(classifier(), tmp_path / "other.safetensors")


def test_heads_are_compared_if_they_are_known(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="it has 3 attention heads, the model 2; set model.name or model.heads"):
        load_weights(encoder(heads=2), pretraining(tmp_path))


class Code:
    def __reduce__(self):
        return print, ("run!",)


def test_unreadable_sources(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.save({"encoder": Code()}, tmp_path / "code.pth")
    with pytest.raises(CheckpointError, match="isn't a file of tensors and plain values, and is refused: loading"):
        read_weights(tmp_path / "code.pth")
    assert "run!" not in capsys.readouterr().out
    (tmp_path / "half.pth").write_bytes(published(tmp_path / "whole.pth.tar").read_bytes()[:1000])
    torch.save([1], tmp_path / "list.pth")
    (tmp_path / "half.safetensors").write_bytes(b"12345678910")
    (tmp_path / "notes.txt").write_text("")
    for name, text in {
        "half.pth": "it is cut short: the end of its 1000 bytes lacks the list of contents; copy it again",
        "list.pth": "holds a list; expected a dictionary of tensors",
        "half.safetensors": "can't be read as safetensors .* copy it again",
        "notes.txt": "ends in '.txt'; give a folder or one of .safetensors, .tar",
        "nothing.pth": "doesn't exist; give a run folder, a checkpoint, a file, published:NAME, timm:NAME or",
        "": "has neither a checkpoint .* nor model.safetensors nor .* nor pytorch_model.bin; give a run folder",
    }.items():
        with pytest.raises(CheckpointError, match=text):
            read_weights(tmp_path / name)
    with pytest.raises(CheckpointError, match="weights is 'teacher'; choose target or context"):
        read_weights(tmp_path, which="teacher")
