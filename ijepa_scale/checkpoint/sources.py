"""Reads an encoder's weights from any supported source, under the names of this package.

Sources are a run folder or checkpoint of this package (pretraining or finetuning, any engine), a published `.pth.tar`,
`.safetensors` (also in shards with an index), a PyTorch file of another program, a folder saved by timm or
transformers, a name in their registries, or that of a published file. Only plain tensors are read; a file that would
run code when loaded is refused. Knows nothing of the model that the weights are loaded into.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ijepa_scale.checkpoint.convert import to_ours, unwrapped
from ijepa_scale.checkpoint.digests import digest_of_files, digest_of_tensors
from ijepa_scale.checkpoint.download import published_path
from ijepa_scale.checkpoint.facts import Facts, facts_of_folder, facts_of_run, written_facts
from ijepa_scale.checkpoint.file_kinds import check_kind
from ijepa_scale.checkpoint.named_models import as_named, fetch
from ijepa_scale.checkpoint.prefixes import choose_encoder, find_predictor, roles_in
from ijepa_scale.checkpoint.published_files import PUBLISHED, PublishedFile, licence_of
from ijepa_scale.checkpoint.safetensors_files import INDEX, files_of, read_safetensors
from ijepa_scale.checkpoint.store import MANIFEST, Checkpoint, newest
from ijepa_scale.checkpoint.torch_files import briefly, read_torch_file
from ijepa_scale.config import ModelConfig
from ijepa_scale.config.architectures import resolve
from ijepa_scale.config.json_text import parse_json
from ijepa_scale.errors import CheckpointError
from ijepa_scale.models.pos_embed import positions
from ijepa_scale.plurals import counted

WHICH_KEY = "ijepa_scale.weights"  # in a safetensors file's metadata: target or context
CLASSES_KEY = "ijepa_scale.classes"  # in the same metadata: a JSON list of class names
FACTS_KEY = "ijepa_scale.encoder"  # in the same metadata: `Facts` as JSON
ROLES = ("target", "context")
SOURCE_KINDS = "run, checkpoint, .pth.tar, .safetensors, published:NAME, timm:NAME or transformers:NAME"  # for messages
_PARTS = {  # keys of a file's parts; of several for one role, the first one that is there counts
    "target": ("target_encoder", "teacher", "model_ema", "state_dict_ema"),
    "context": ("encoder", "student"),
}
_INSIDE = ("state_dict", "model", "module", "model_state_dict")  # keys of a file's only model in other programs
_SUFFIXES = (".safetensors", ".tar", ".pth", ".pt", ".bin", ".ckpt")


@dataclass(frozen=True, kw_only=True)
class Weights:
    """An encoder's tensors under the names of this package, possibly with a classifier's `fc_norm` and `head`."""

    tensors: dict[str, Tensor]
    origin: str  # for messages
    which: str  # target | context | only (the source holds one encoder and doesn't say which)
    facts: Facts = Facts()
    notes: tuple[str, ...] = ()
    classes: tuple[str, ...] | None = None  # class names of a finetuned head


class WeightsSource(Protocol):
    """An opened source. Tensors are on the CPU, in their stored dtype, and mostly memory-mapped."""

    origin: str  # for messages
    roles: tuple[str, ...]  # which of ROLES it tells apart; none if it has one encoder and doesn't say which

    def encoder(self, which: str) -> Weights:
        """Returns the target or context encoder.

        Raises:
            CheckpointError: it isn't there, or has no known names.
        """

    def predictor(self) -> dict[str, Tensor] | None:
        """Returns the predictor's tensors under the names of this package; None if there is none."""

    def digest(self) -> str:
        """Returns the SHA-256 of what was opened. Reads all of it."""


def read_weights(source: str | Path, *, which: str = "target") -> Weights:
    """Returns the target or context encoder of `source`, on the CPU, in its stored dtype.

    A name that isn't a path is fetched by timm or transformers; all other sources are read from disk.

    Raises:
        CheckpointError: the source doesn't exist, is damaged or unknown, or doesn't hold the requested encoder.
    """
    if which not in ROLES:
        raise CheckpointError(f"weights is {which!r}; choose target or context")
    return open_source(source).encoder(which)


def open_source(source: str | Path) -> WeightsSource:
    """Returns the opened source.

    Raises:
        CheckpointError: it doesn't exist, is damaged, or is of an unknown kind.
    """
    if str(source).startswith(PUBLISHED):
        return _torch_file(published_path(str(source), _check_published))
    name = as_named(source)
    if name is not None:
        tensors, facts = fetch(name)
        facts = facts if facts.licence is not None else facts.replace(licence=licence_of(name))
        return ModelFile(name, (), {None: tensors}, facts=facts, converted=True)
    path = Path(source)
    if os.path.isdir(path):
        checkpoint = newest(path / "checkpoints") or newest(path) or path
        if (checkpoint / MANIFEST).is_file():
            return RunSource(Checkpoint(checkpoint))
        path = _inside(path)
    if not os.path.exists(path):  # unlike Path.exists, takes a name that no file can have
        raise CheckpointError(
            f"{path} doesn't exist; give a run folder, a checkpoint, a file, published:NAME, timm:NAME or "
            "transformers:NAME"
        )
    if not os.path.isfile(path):
        raise CheckpointError(f"{path} is a pipe or a device; weights are read from files: copy it into one")
    is_index = path.name.endswith(f".safetensors{INDEX}")
    if not is_index and path.suffix.lower() not in _SUFFIXES:
        raise CheckpointError(f"{path} ends in {path.suffix!r}; give a folder or one of {', '.join(_SUFFIXES)}")
    check_kind(path, is_index=is_index)
    return _safetensors(path) if is_index or path.suffix.lower() == ".safetensors" else _torch_file(path)


def _inside(folder: Path) -> Path:
    """Returns the file of weights that timm or transformers saved into a folder."""
    names = ("model.safetensors", f"model.safetensors{INDEX}", "pytorch_model.bin")
    found = next((folder / name for name in names if (folder / name).exists()), None)
    if found is None:
        raise CheckpointError(
            f"{folder} has neither a checkpoint (checkpoints/step-XXXXXXXX, {MANIFEST}) nor {' nor '.join(names)}; "
            "give a run folder, a checkpoint, or a file"
        )
    return found


class RunSource:
    """A checkpoint of this package."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.origin = checkpoint, str(checkpoint.path)
        tensors = checkpoint.tensors
        self._is_classifier = "model.head.weight" in tensors
        pretrained = "target.norm.weight" in tensors or not self._is_classifier
        self.roles: tuple[str, ...] = ROLES if pretrained or "target.head.weight" in tensors else ()

    def encoder(self, which: str) -> Weights:
        """Returns the target or context encoder; of a classifier with averaged weights, these are the target."""
        checkpoint, notes = self.checkpoint, ()
        context = "model." if self._is_classifier else "model.encoder."
        tensors = checkpoint.full({"target": "target." if self.roles else context, "context": context}[which])
        if self._is_classifier:
            tensors, _ = to_ours(tensors, self.origin)
        if not self.roles:
            notes = (f"a finetuned classifier, which has one encoder: there are no separate {which} weights",)  # type: ignore[assignment]
        facts = facts_of_run(checkpoint.extra.get("config", {}))
        if facts.image_size is not None:
            encoder = resolve(self.model_config())
            # computed, not stored
            tensors["pos_embed"] = positions(encoder.width, encoder.grid, encoder.position_grid)[None]
        classes = checkpoint.extra.get("classes")
        return Weights(
            tensors=tensors,
            origin=self.origin,
            which=which if self.roles else "only",
            facts=facts,
            notes=notes,
            classes=tuple(classes) if classes else None,
        )

    def predictor(self) -> dict[str, Tensor] | None:
        """Returns the predictor's tensors; None for a classifier."""
        return self.checkpoint.full("model.predictor.") or None

    def model_config(self) -> ModelConfig:
        """Returns the sizes that the checkpoint was trained with."""
        model = self.checkpoint.extra["config"]["model"]
        model = model.get("encoder", model)  # of a classifier; earlier ones held the encoder's sizes themselves
        return ModelConfig(**{n: value for n, value in model.items() if n in ModelConfig.model_fields})

    def digest(self) -> str:
        """Returns the SHA-256 of the manifest, which holds those of all files."""
        return digest_of_files([self.checkpoint.path / MANIFEST])


class ModelFile:
    """A file, a set of files, or a model that another program loaded: tensors by the role of their part."""

    def __init__(
        self,
        origin: str,
        files: tuple[Path, ...],
        parts: Mapping[str | None, Mapping[str, Tensor]],
        *,
        facts: Facts | None = None,
        converted: bool = False,
        notes: tuple[str, ...] = (),
        classes: tuple[str, ...] | None = None,
        rest: Mapping[str, Any] | None = None,
    ) -> None:
        """`parts` has a part for each role, or a single one, None, whose names may tell encoders apart.

        `rest` is all that a published file holds.
        """
        self.origin, self._files, self._converted = origin, files, converted
        self._parts = {role: unwrapped(part, origin) for role, part in parts.items()}
        self._facts, self._notes, self._classes = facts or Facts(), notes, classes
        self.rest = rest or {}
        everything = self._parts.get(None, {})
        self.roles = tuple(role for role in ROLES if role in self._parts) or roles_in(everything)

    def encoder(self, which: str) -> Weights:
        """Returns the target or context encoder. Where nothing says which it is, a note says so."""
        if None not in self._parts and which not in self._parts:
            raise CheckpointError(
                f"{self.origin} holds only the {self.roles[0]} encoder, but {which} is requested; set "
                f"model.weights={self.roles[0]}, in Python which={self.roles[0]!r}"
            )
        stated = which if None not in self._parts else None
        chosen = choose_encoder(self._parts[stated], which, self.origin)
        ours, naming = to_ours(chosen.tensors, self.origin)
        stated = stated or chosen.which
        notes = [*self._notes]
        if stated is None:
            notes.append(f"holds one encoder and doesn't say which; {which} was requested")
            if naming == "transformers" or self._converted:
                notes[-1] += (
                    ". timm's and transformers' converters use the context encoder; the paper evaluates the target"
                )
        if chosen.left_out:
            shown = ", ".join(chosen.left_out[:3]) + (", ..." if len(chosen.left_out) > 3 else "")
            notes.append(f"{len(chosen.left_out)} tensors outside the encoder are left out: {shown}")
        return Weights(
            tensors=ours,
            origin=self.origin,
            which=stated or "only",
            facts=self._facts,
            notes=tuple(notes),
            classes=self._classes,
        )

    def predictor(self) -> dict[str, Tensor] | None:
        """Returns the predictor's tensors, from its own part or by its prefix; None if there is none."""
        part = self._parts.get("predictor", self._parts.get(None, {}))
        return find_predictor(part)

    def digest(self) -> str:
        """Returns the SHA-256 of the files; of a model from a registry, of its tensors."""
        return digest_of_files(self._files) if self._files else digest_of_tensors(self._parts[None])


def _torch_file(path: Path) -> ModelFile:
    content = read_torch_file(path)
    keys = {role: next((key for key in keys if _is_part(content, key)), None) for role, keys in _PARTS.items()}
    notes: tuple[str, ...] = ()
    if keys["target"] in ("model_ema", "state_dict_ema") and keys["context"] is None:
        plain = keys["context"] = next((key for key in _INSIDE if _is_part(content, key)), None)
        if plain is not None:
            notes = (
                f"holds {plain} and its average {keys['target']}: the average is the target, {plain} the context; "
                "model.weights chooses",
            )
    parts: dict[str | None, Mapping[str, Tensor]]
    parts = {role: _tensors(content[key]) for role, key in keys.items() if key is not None}
    if parts and _is_part(content, "predictor"):
        parts["predictor"] = _tensors(content["predictor"])
    if not parts:
        inside = next((content[key] for key in _INSIDE if _is_part(content, key)), content)
        parts = {None: _tensors(inside)}
    origin = str(path)
    facts = facts_of_folder(path.parent)
    if (licence := licence_of(origin)) is not None:
        facts = facts.replace(licence=licence)
    return ModelFile(origin, (path,), parts, facts=facts, notes=notes, rest=content)


def _check_published(path: Path, known: PublishedFile) -> None:
    """Checks that a file holds an encoder of a published one's sizes.

    Raises:
        CheckpointError: it doesn't.
    """
    tensors = _torch_file(path).encoder("target").tensors
    width, _, _, patch = tensors["patch_embed.proj.weight"].shape
    depth = len([name for name in tensors if name.startswith("blocks.") and name.endswith(".norm1.weight")])
    if (width, depth, patch) != (known.width, known.depth, known.patch_size):
        raise CheckpointError(
            f"{path} holds an encoder of width {width} with {counted(depth, 'block')} and "
            f"{patch}-pixel patches instead of "
            f"{known.width}, {known.depth} and {known.patch_size}; try again later, or download it yourself"
        )


def _is_part(content: Mapping[Any, Any], key: str) -> bool:
    return isinstance(content.get(key), Mapping)


def _safetensors(path: Path) -> ModelFile:
    tensors, metadata = read_safetensors(path)
    stored, named, said = (metadata.get(key) for key in (WHICH_KEY, CLASSES_KEY, FACTS_KEY))
    try:
        classes = None if named is None else _names_in(parse_json(named.encode()))
    except ValueError as error:
        raise CheckpointError(f"{path}: its class names can't be read ({briefly(error)}); copy it again") from None
    facts = facts_of_folder(path.parent) if said is None else written_facts(said, str(path))
    role = stored if stored in ROLES else None
    return ModelFile(str(path), files_of(path), {role: tensors}, facts=facts, classes=classes)


def _names_in(content: Any) -> tuple[str, ...]:
    if not isinstance(content, list) or not all(isinstance(name, str) for name in content):
        raise ValueError("they aren't a list of texts")
    return tuple(content)


def _tensors(content: Mapping[str, Any], above: str = "") -> dict[str, Tensor]:
    """Returns the tensors of a mapping; those of mappings inside it have dotted names."""
    found: dict[str, Tensor] = {}
    for name, value in content.items():
        if isinstance(value, Tensor):
            found[f"{above}{name}"] = value
        elif isinstance(value, Mapping):
            found |= _tensors(value, f"{above}{name}.")
    return found
