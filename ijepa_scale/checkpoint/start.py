"""Starts pretraining from a source: encoder, target and predictor, and the optimiser's state where it is asked for.

Loading is strict, as `weights` says. A predictor that isn't there is new, and a report says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ijepa_scale.checkpoint.geometry import depth_of
from ijepa_scale.checkpoint.published_order import published_numbers
from ijepa_scale.checkpoint.sources import ModelFile, RunSource, WeightsSource
from ijepa_scale.checkpoint.weights import LoadReport, fit, listed
from ijepa_scale.config import ModelConfig
from ijepa_scale.engine.protocol import Piece
from ijepa_scale.errors import CheckpointError
from ijepa_scale.models.jepa import JEPA
from ijepa_scale.models.predictor import Predictor
from ijepa_scale.models.vit import VisionTransformer
from ijepa_scale.optim.adamw import AdamW

_STATES = "optimizer."  # prefix of the optimiser's pieces


@dataclass(frozen=True, kw_only=True)
class StartReport:
    """What pretraining starts from."""

    origin: str
    encoder: LoadReport
    target: LoadReport
    predictor: tuple[str, ...] | None  # the names of its tensors that were loaded; None: the source has none
    notes: tuple[str, ...]

    def text(self) -> str:
        """Returns the report in a few lines."""
        lines = [f"model.init: {self.encoder.text()}"]
        if self.target.which != self.encoder.which:
            lines.append(self.target.text())
        new = "has no predictor: it is new, with weights drawn from the seed"
        found = new if self.predictor is None else f"loaded the predictor, {len(self.predictor)} tensors, 100.0% of it"
        return "\n".join([*lines, f"{self.origin}: {found}", *(f"  note: {note}" for note in self.notes)])


@dataclass(frozen=True, kw_only=True)
class OptimizerStates:
    """An optimiser's state by the names of an engine's pieces, and the steps that led to it."""

    tensors: dict[str, Tensor]
    step: int  # of the schedules: the run goes on with this one
    optimizer_step: int  # that the optimiser has counted
    notes: tuple[str, ...] = ()


def start_from(source: WeightsSource, jepa: JEPA, target: VisionTransformer) -> StartReport:
    """Loads the source's encoder, target and predictor, before anything is sharded; returns a report.

    Encoder and target start alike where the source has only one of them.

    Raises:
        CheckpointError: something doesn't match the model; the message lists all problems of the part.
    """
    roles, notes = source.roles, []
    if len(roles) < 2:
        held = f"only the {roles[0]} encoder" if roles else "one encoder"
        notes.append(f"holds {held}: encoder and target both start from it")
    encoder = source.encoder("context" if "context" in roles else "target")
    average = source.encoder("target" if "target" in roles else "context") if len(roles) == 2 else encoder
    encoder, average = (dataclasses.replace(each, notes=_without_request(each.notes)) for each in (encoder, average))
    tensors = source.predictor()
    if tensors is not None:
        _check_predictor(jepa.predictor, tensors, source.origin)
    report = StartReport(
        origin=source.origin,
        encoder=fit(jepa.encoder, encoder),
        target=fit(target, average),
        predictor=None if tensors is None else _fill_predictor(jepa.predictor, tensors),
        notes=tuple(notes),
    )
    return report


def optimizer_states(source: WeightsSource, model: ModelConfig, steps_per_epoch: int) -> OptimizerStates:
    """Returns AdamW's state of a published file, or the state of a run's optimiser.

    Raises:
        CheckpointError: the source has none, or it belongs to another model.
    """
    if isinstance(source, RunSource) and source.predictor() is not None:
        checkpoint = source.checkpoint
        tensors = {f"{_STATES}{name}": tensor for name, tensor in checkpoint.full(_STATES).items()}
        taken = checkpoint.step + checkpoint.extra.get("steps_before", 0)
        return OptimizerStates(tensors=tensors, step=checkpoint.step, optimizer_step=taken)
    if isinstance(source, ModelFile) and isinstance(source.rest.get("opt"), Mapping):
        try:
            return _published_states(source.rest, model, steps_per_epoch)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise CheckpointError(
                f"{source.origin}: its optimiser's state doesn't belong to this model ({error}); set "
                "model.init_state=weights"
            ) from None
    raise CheckpointError(
        f"{source.origin} holds no optimiser's state of pretraining; set model.init_state=weights for a new one"
    )


def fill_states(pieces: Iterable[Piece], states: OptimizerStates, origin: str) -> None:
    """Fills the optimiser's pieces.

    Raises:
        CheckpointError: a state is missing or has another shape: it belongs to another optimiser or model.
    """
    wanted = [piece for piece in pieces if piece.name.startswith(_STATES)]
    for piece in wanted:
        found = states.tensors.get(piece.name)
        if found is None or tuple(found.shape) != piece.shape:
            has = "lacks it" if found is None else f"has {tuple(found.shape)}"
            raise CheckpointError(
                f"{origin}: {piece.name} is {piece.shape} here, and the source {has}; set model.init_state=weights"
            )
    for piece in wanted:
        flat = states.tensors[piece.name].reshape(-1)
        piece.tensor.copy_(flat[piece.start : piece.start + piece.tensor.numel()])


def fill_predictor(predictor: Predictor, tensors: Mapping[str, Tensor], origin: str) -> None:
    """Loads a predictor's tensors.

    Raises:
        CheckpointError: something doesn't match; the message lists all problems.
    """
    _check_predictor(predictor, tensors, origin)
    _fill_predictor(predictor, tensors)


def predictor_sizes(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Returns a predictor's width and depth as `ModelConfig` names them."""
    depth = depth_of(tensors, "predictor_blocks")
    return {"predictor_width": len(tensors["predictor_embed.weight"]), "predictor_depth": depth}


def _published_states(content: Mapping[str, Any], model: ModelConfig, steps_per_epoch: int) -> OptimizerStates:
    optimizer, epoch = content["opt"], content["epoch"]
    if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
        raise ValueError(f"its epoch is {epoch!r}, not a whole number")
    numbers = [number for group in optimizer["param_groups"] for number in group["params"]]
    names = published_numbers(model)
    if len(numbers) != len(names):
        raise ValueError(f"it has {len(numbers)} parameters, the model {len(names)}")
    tensors: dict[str, Tensor] = {}
    counted = set()
    for number, name in zip(numbers, names, strict=True):
        if "pos_embed" in name:
            continue
        state = optimizer["state"][number]
        counted.add(int(state["step"]))
        tensors |= {f"{_STATES}{kind}.{name}": state[kind] for kind in AdamW.Config.state_names}
    if len(counted) != 1:
        raise ValueError(f"its parameters took {sorted(counted)} steps")
    (taken,), step = counted, epoch * steps_per_epoch
    notes = []
    if taken != step:
        notes.append(
            f"its optimiser took {taken} steps, and {epoch} epochs of {steps_per_epoch} steps are {step}: the "
            f"schedules go on at step {step}; schedule.steps_per_epoch may differ"
        )
    return OptimizerStates(tensors=tensors, step=step, optimizer_step=taken, notes=tuple(notes))


def _check_predictor(predictor: Predictor, tensors: Mapping[str, Tensor], origin: str) -> None:
    """Checks names, shapes and values; positions are the model's own."""
    own = dict(predictor.named_parameters())
    found = {name: tensor for name, tensor in tensors.items() if name != "predictor_pos_embed"}
    problems = [
        f"{title}: {listed(names)}"
        for title, names in (
            ("missing", [name for name in own if name not in found]),
            ("unexpected", [name for name in found if name not in own]),
        )
        if names
    ]
    shared = [name for name in own if name in found]
    problems += [
        f"{name} is {tuple(found[name].shape)}, the model's {tuple(own[name].shape)}"
        for name in shared
        if found[name].shape != own[name].shape
    ]
    problems += [f"{name} holds values that aren't finite" for name in shared if not found[name].isfinite().all()]
    if problems:
        sizes = " ".join(f"model.{name}={size}" for name, size in predictor_sizes(tensors).items())
        raise CheckpointError(
            f"{origin}: its predictor doesn't match the model, and nothing was loaded: {'; '.join(problems[:6])}; give "
            f"the encoder's heads, and {sizes}"
        )


@torch.no_grad()
def _fill_predictor(predictor: Predictor, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    own = dict(predictor.named_parameters())
    for name, parameter in own.items():
        parameter.copy_(tensors[name])
    return tuple(own)


def _without_request(notes: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the notes without the one on which encoder was requested: pretraining asks for all that there are."""
    return tuple(note for note in notes if not note.startswith("holds one encoder and doesn't say which"))
