"""Loads a trained encoder from a checkpoint."""

from __future__ import annotations

from pathlib import Path

from ijepa_scale.checkpoint.store import Checkpoint, newest
from ijepa_scale.config import ModelConfig
from ijepa_scale.errors import CheckpointError
from ijepa_scale.models.registry import build_jepa
from ijepa_scale.models.vit import VisionTransformer


def load_encoder(path: str | Path, *, which: str = "target") -> VisionTransformer:
    """Returns the encoder of a run folder's newest checkpoint, or of one checkpoint: fp32, on the CPU, in eval mode.

    `which` is target (which the paper evaluates) or context. The checkpoint may come from any engine.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or `which` is unknown.
    """
    prefixes = {"target": "target.", "context": "model.encoder."}
    if which not in prefixes:
        raise CheckpointError(f"which is {which!r}; choose target or context")
    path = Path(path)
    checkpoint = Checkpoint(newest(path / "checkpoints") or path)
    encoder = build_jepa(ModelConfig(**checkpoint.extra["config"]["model"]), seed=0).encoder
    weights = checkpoint.full(prefixes[which])
    missing, unexpected = encoder.load_state_dict(weights, strict=False)
    if missing != ["pos_embed"] or unexpected:  # pos_embed is computed from the grid, not stored
        raise CheckpointError(f"{checkpoint.path}: missing {missing}, unexpected {unexpected}; use a matching version")
    return encoder.eval()
