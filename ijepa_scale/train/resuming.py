"""Which checkpoint a run goes on from, and whether it is one of the same run. Must not know any kind of training."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Protocol

from ijepa_scale.checkpoint import store
from ijepa_scale.config import CheckpointConfig, EngineConfig, LoggingConfig
from ijepa_scale.config.earlier import stored
from ijepa_scale.engine.world import World
from ijepa_scale.errors import CheckpointError, ConfigError
from ijepa_scale.train.initial import STARTING
from ijepa_scale.train.task import Task

logger = logging.getLogger(__name__)


class RunConfig(Protocol):
    """The sections that every kind of run has."""

    @property
    def folder(self) -> str: ...  # noqa: D102
    @property
    def resume(self) -> str: ...  # noqa: D102
    @property
    def logging(self) -> LoggingConfig: ...  # noqa: D102
    @property
    def checkpoint(self) -> CheckpointConfig: ...  # noqa: D102
    @property
    def engine(self) -> EngineConfig: ...  # noqa: D102


def find_checkpoint(config: RunConfig, world: World) -> store.Checkpoint | None:
    """Returns the checkpoint to start from, if any, whose files were all read. Communicates.

    With `resume` auto, it is the newest one that is whole; damaged ones are renamed, so that they are never read again.

    Raises:
        ConfigError: `resume` names a checkpoint that isn't the newest of its folder, or it is none although there is a
            checkpoint.
        CheckpointError: the checkpoint that `resume` names is damaged, or none is whole.
    """
    folder = Path(config.folder) / "checkpoints"
    if config.resume == "auto":
        return store.newest_whole(folder, world)
    found = world.broadcast_object(store.newest(folder) if world.is_main else None)
    assert found is None or isinstance(found, Path)
    if config.resume != "none":
        chosen = Path(config.resume)
        if found is not None and chosen.resolve().parent == found.resolve().parent and chosen.name < found.name:
            raise ConfigError(
                f"resume is {chosen} but {found} in the same folder is newer; set another folder for the new run, "
                "or remove the newer checkpoints"
            )
        return store.whole(chosen, world)
    if found is not None:
        raise ConfigError(
            f"resume is none but {found} exists; set resume=auto to continue it, or set another folder for a new run"
        )
    return None


def check_continues(checkpoint: store.Checkpoint, task: Task) -> None:
    """Checks that a task can go on from a checkpoint, and logs what was changed since.

    Raises:
        CheckpointError: it is of another kind of run, or of one with other settings that decide what is computed.
    """
    path = checkpoint.path
    kind = checkpoint.extra.get("kind", "pretrain")
    if kind != task.kind:
        raise CheckpointError(f"{path} belongs to a {kind} run, but this is a {task.kind} run; set another folder")
    sections = task.identity_sections
    config_kind, extra = type(task.config), checkpoint.extra
    before = {name: stored(extra[name], config_kind, sections=sections) for name in ("identity", "config")}
    ours = task.identity()
    if "optimizer.name" in ours:
        before["identity"].setdefault("optimizer.name", "adamw")  # the only one in version 0.1.0
    if "labels" in ours:
        before["identity"].setdefault("labels", ours["labels"])  # not stored by version 0.1.0
    before["identity"].setdefault("data.pixels", "uint8")  # not stored where there was no other type
    if "data.decode_scaling" not in before["identity"]:
        before["identity"] |= {name: ours[name] for name in ("data.exif", "data.decode_scaling")}
        logger.warning(
            "%s is from a version that read crops over twice the image size at reduced scale; now they are read "
            "exactly. Set data.decode_scaling=dct to read JPEGs much as before", path,
        )  # fmt: skip
    for name in STARTING:
        before["identity"].get("model", {}).pop(name, None)  # stored by version 0.1.0
    before["identity"].get("schedule", {}).pop("stop_after", None)  # filled in by its default
    _check_identity(path, before["identity"], ours)
    for line in _changes(before["config"], _among(task.config.values(), before["config"])):
        logger.warning("setting changed since %s: %s", path.name, line)


def _check_identity(path: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    lines = list(_changes(found, expected))
    if lines:
        raise CheckpointError(
            f"{path} belongs to a run with other settings, so this run can't continue it: {'; '.join(lines)}; "
            "give the same values, or set another folder for a new run"
        )


def _among(values: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """Returns the values that `known` has too: settings that came with a later version weren't changed."""
    return {
        name: _among(value, known[name]) if isinstance(value, dict) and isinstance(known[name], dict) else value
        for name, value in values.items()
        if name in known
    }


def _changes(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    """Returns a line with the dotted name of each value that differs."""
    lines = []
    for name in {**before, **after}:
        old, new = before.get(name), after.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += _changes(old, new, f"{prefix}{name}.")
        elif old != new:
            lines.append(f"{prefix}{name} was {old}, is {new}")
    return lines
