"""Writes a model as a program that runs without this package: ONNX, or PyTorch's exported program.

Each file is read back and its results are compared with the model's, on other batch sizes than it was traced with,
before it gets its name.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim

from ijepa_scale import rng
from ijepa_scale.checkpoint.models_of_weights import (
    classifier_config,
    classifier_of_weights,
    encoder_of_weights,
    predictor_of_source,
)
from ijepa_scale.checkpoint.portable import metadata_of
from ijepa_scale.checkpoint.sources import WeightsSource
from ijepa_scale.checkpoint.whole import write_file
from ijepa_scale.errors import CheckpointError
from ijepa_scale.models.predictor import Predictor
from ijepa_scale.new_file import PatientFile

TOLERANCE = 1e-4  # largest difference of an output, absolute
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_MOST_INSIDE = 1_800_000_000  # bytes of weights in an ONNX file itself; protobuf ends at 2 GiB
Program = Callable[..., Tensor]


class _OfImages(nn.Module):
    """An encoder's tokens (B, N, D), or a classifier's logits (B, C), of images (B, channels, H, W) alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)


class _OfPlaces(nn.Module):
    """A predictor's (M * B, T, D) of context tokens (B, K, D) at `keep` (B, K), for `targets` (M, B, T)."""

    def __init__(self, predictor: Predictor) -> None:
        super().__init__()
        self.predictor = predictor

    def forward(self, context: Tensor, keep: Tensor, targets: Tensor) -> Tensor:
        return self.predictor(context, keep, targets)


def export_program(source: WeightsSource, to: Path, *, kind: str, which: str) -> str:
    """Writes the target or context encoder, the classifier, or the predictor, and returns a line that opens it.

    `kind` is onnx or torch. Batch sizes are open; a predictor's numbers of blocks and tokens too.

    Raises:
        CheckpointError: the source can't be read, packages are missing, the model can't be traced, or the program's
            results differ from the model's by more than 1e-4; nothing is left then.
    """
    if kind == "onnx":
        missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
        if missing:
            raise CheckpointError(f"ONNX needs {', '.join(missing)}; install ijepa_scale[onnx], or export as torch")
    facts: dict[str, str] = {}
    if which == "predictor":
        predictor = predictor_of_source(source)
        module: nn.Module = _OfPlaces(predictor)
        inputs, dynamic = [_places(predictor, size) for size in (2, 1, 3)], _open_places()
    else:
        weights = source.encoder(which)
        config = classifier_config(weights)
        model: Any = encoder_of_weights(weights) if config is None else classifier_of_weights(weights, config)
        encoder = model if config is None else model.encoder
        side = [length * encoder.patch_size for length in encoder.grid]
        module, facts = _OfImages(model), metadata_of(weights)
        inputs = [(_normal((size, encoder.channels, *side), size),) for size in (2, 1, 3)]
        dynamic = {"images": {0: Dim("batch")}}
    module.eval().requires_grad_(False)
    names = [*dynamic]

    def write(path: Path) -> None:
        written = _write_onnx if kind == "onnx" else _write_torch
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about its own code; what counts is compared below
            program = written(module, inputs[0], dynamic, path, facts)
        _compare(module, program, inputs, to)

    write_file(to, write)
    if kind == "onnx":
        data = to.with_name(f"{to.name}.data")
        if _state_bytes(module) <= _MOST_INSIDE and data.is_file():
            data.unlink()  # of a larger model, whose file was replaced
        return f'onnxruntime.InferenceSession("{to}").run(None, {{{", ".join(f"{n!r}: {n}" for n in names)}}})'
    return f'torch.export.load("{to}").module()({", ".join(names)})'


def _write_torch(
    module: nn.Module, inputs: tuple[Tensor, ...], dynamic: dict[str, Any], path: Path, facts: dict[str, str]
) -> Program:
    """Writes an exported program, and returns it as it is read back."""
    try:
        program = torch.export.export(module, inputs, dynamic_shapes=dynamic)
    except (RuntimeError, ValueError) as error:
        raise _untraceable(error) from error
    with PatientFile(path) as file:
        torch.export.save(program, cast(IO[bytes], file), extra_files={name: text for name, text in facts.items()})
    return torch.export.load(path).module()


def _write_onnx(
    module: nn.Module, inputs: tuple[Tensor, ...], dynamic: dict[str, Any], path: Path, facts: dict[str, str]
) -> Program:
    """Writes an ONNX file, with the weights next to it if they are large, and returns it as onnxruntime reads it."""
    import onnxruntime

    names = [*dynamic]
    try:
        program = torch.onnx.export(
            module,
            inputs,
            dynamo=True,
            input_names=names,
            output_names=["output"],
            dynamic_shapes=dynamic,
            verbose=False,
        )
    except (RuntimeError, ValueError) as error:  # torch.onnx.OnnxExporterError is the first
        raise _untraceable(error) from error
    assert program is not None
    program.model.metadata_props.update(facts)
    program.save(path, external_data=_state_bytes(module) > _MOST_INSIDE)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(*tensors: Tensor) -> Tensor:
        given: dict[str, np.ndarray] = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        return torch.from_numpy(session.run(None, given)[0])

    return run


def _state_bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())


def _compare(module: nn.Module, program: Program, inputs: Sequence[tuple[Tensor, ...]], to: Path) -> None:
    """Checks that the program gives what the module gives."""
    with torch.no_grad():
        for each in inputs:
            wanted, found = module(*each), program(*each)
            if found.shape != wanted.shape:
                raise CheckpointError(
                    f"{to} would give {tuple(found.shape)} instead of {tuple(wanted.shape)}, so it isn't kept; report "
                    "it with the versions of torch and onnxruntime"
                )
            apart = float((found - wanted).abs().max())
            if not apart <= TOLERANCE:  # also if it isn't a number
                raise CheckpointError(
                    f"{to} would give results that differ by {apart:.2g} (at most {TOLERANCE:g} is allowed), so it "
                    "isn't kept; report it with the versions of torch and onnxruntime"
                )


def _untraceable(error: BaseException) -> CheckpointError:
    reason = " ".join(str(error).split())[:300]
    return CheckpointError(f"torch {torch.__version__} can't trace the model ({reason}); export it as safetensors")


def _places(predictor: Predictor, images: int) -> tuple[Tensor, ...]:
    """Returns inputs of a predictor: context tokens, their patches, and the patches to predict."""
    patches = predictor.predictor_pos_embed.shape[1]
    kept, targets, blocks = max(2, patches // 2) + images, max(2, patches // 4) + images, images + 1
    draw = rng.generator(0, "export", images)
    return (
        _normal((images, kept, predictor.predictor_embed.in_features), images),
        torch.randint(patches, (images, kept), generator=draw),
        torch.randint(patches, (blocks, images, targets), generator=draw),
    )


def _open_places() -> dict[str, Any]:
    images, kept, blocks, targets = (Dim(name) for name in ("images", "kept", "blocks", "targets"))
    return {
        "context": {0: images, 1: kept},
        "keep": {0: images, 1: kept},
        "targets": {0: blocks, 1: images, 2: targets},
    }


def _normal(shape: tuple[int, ...], draw: int) -> Tensor:
    return torch.randn(shape, generator=rng.generator(0, "export.images", draw))
