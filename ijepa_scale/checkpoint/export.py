"""Writes weights for other programs, in the format that a suffix or a name says. Each format has its own file.

`export` is the way in. What other programs read is made of `Portable` weights; `reference_file` is made of a
checkpoint, and `programs` run the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ijepa_scale.checkpoint.convert import NAMINGS, to_transformers
from ijepa_scale.checkpoint.heads import told_heads, with_heads
from ijepa_scale.checkpoint.portable import portable, write_predictor, write_tensors
from ijepa_scale.checkpoint.programs import export_program
from ijepa_scale.checkpoint.reference_file import export_published
from ijepa_scale.checkpoint.sources import open_source, read_weights
from ijepa_scale.checkpoint.store import MANIFEST, Checkpoint, newest
from ijepa_scale.checkpoint.timm_folder import export_timm
from ijepa_scale.checkpoint.transformers_folder import export_transformers
from ijepa_scale.checkpoint.whole import write_file
from ijepa_scale.errors import CheckpointError

FORMATS = ("safetensors", "reference", "timm", "transformers", "onnx", "torch")
PARTS = ("target", "context", "predictor")
_SUFFIXES = {"safetensors": ".safetensors", "reference": ".pth.tar", "onnx": ".onnx", "torch": ".pt2"}
_ENCODERS_ONLY = {
    "timm": "timm has no model for it",
    "transformers": "transformers has no model for it",
    "reference": "the file holds encoder, target and predictor together",
}


@dataclass(frozen=True)
class Exported:
    """A written file or folder, and a line of Python that opens it."""

    path: Path
    opens: str

    @property
    def bytes(self) -> int:
        """The size of the file, with that of its weights next to it, or of the folder's files."""
        data = self.path.with_name(f"{self.path.name}.data")
        files = [*self.path.iterdir()] if self.path.is_dir() else [self.path, *([data] if data.exists() else [])]
        return sum(file.stat().st_size for file in files)


def export(
    source: str | Path,
    to: str | Path,
    *,
    kind: str | None = None,
    which: str = "target",
    naming: str = "published",
    steps_per_epoch: int | None = None,
    processes: int = 1,
    heads: int | None = None,
) -> Exported:
    """Writes an encoder, classifier or predictor of `source` (see `open_source`) to a file or folder.

    Args:
        source: what `open_source` takes; for `reference`, a run folder or checkpoint of pretraining.
        to: the file, or for timm and transformers the folder.
        kind: one of FORMATS; None: what the suffix of `to` says.
        which: one of PARTS.
        naming: of the tensors in a safetensors file, published (also timm's) or transformers.
        steps_per_epoch: for `reference`: of the run.
        processes: for `reference`: that will resume.
        heads: of the encoder's attention, if the source doesn't tell.

    Raises:
        CheckpointError: the source can't be read, the format can't hold it, or what was written gives other results
            than the model; nothing is left then.
        ConfigError: the source doesn't tell a size that is needed.
    """
    to = Path(to)
    kind = _kind(to, kind)
    if which not in PARTS:
        raise CheckpointError(f"weights is {which!r}; choose one of {', '.join(PARTS)}")
    if which == "predictor" and kind in _ENCODERS_ONLY:
        raise CheckpointError(
            f"the predictor can't be exported as {kind}: {_ENCODERS_ONLY[kind]}; choose safetensors, onnx or torch"
        )
    _check_unused(kind, which, naming, steps_per_epoch, processes)
    if heads is not None and kind == "reference":
        raise CheckpointError(f"--heads is {heads}, which {kind} doesn't use; drop the flag")
    if kind == "reference":
        if steps_per_epoch is None:
            raise CheckpointError("a .pth.tar counts epochs; give --steps-per-epoch, the run's samples // batch")
        folder = newest(Path(source) / "checkpoints") or Path(source)
        if not (folder / MANIFEST).is_file():
            raise CheckpointError(
                f"{source} isn't a checkpoint of this package, whose optimiser's states a .pth.tar holds; give a run "
                "or a checkpoint of one, or export it as .safetensors"
            )
        export_published(Checkpoint(folder), to, steps_per_epoch=steps_per_epoch, processes=processes)
        return Exported(to, f'torch.load("{to}", weights_only=True)')
    if kind == "safetensors":
        if which == "predictor":
            write_predictor(with_heads(open_source(source), heads), to)
        else:
            export_safetensors(source, to, which=which, naming=naming, heads=heads)
        return Exported(to, f'safetensors.torch.load_file("{to}")')
    if kind in ("onnx", "torch"):
        return Exported(to, export_program(with_heads(open_source(source), heads), to, kind=kind, which=which))
    write = export_timm if kind == "timm" else export_transformers
    return Exported(to, write(portable(with_heads(open_source(source), heads), which), to))


def export_safetensors(
    source: str | Path, path: str | Path, *, which: str = "target", naming: str = "published", heads: int | None = None
) -> Path:
    """Writes the target or context encoder of `source` (see `read_weights`) and returns the file's path.

    `naming` is published (timm uses the same names) or transformers. The file's metadata says which encoder it
    holds, its sizes, and how its images are normalised. For a finetuned run, the file also holds the head, and the
    metadata its class names.

    Raises:
        CheckpointError: the source can't be read, a tensor has no name in that naming, or `path` has another suffix.
    """
    if naming not in NAMINGS:
        raise CheckpointError(f"naming is {naming!r}; choose one of {', '.join(NAMINGS)}")
    if Path(path).suffix != ".safetensors":
        raise CheckpointError(f"{path} doesn't end in .safetensors, by which readers know the format; rename it")
    weights = told_heads(read_weights(source, which=which), heads)
    tensors = to_transformers(weights.tensors) if naming == "transformers" else weights.tensors
    return write_file(Path(path), lambda temporary: write_tensors(weights, tensors, temporary))


def _check_unused(kind: str, which: str, naming: str, steps_per_epoch: int | None, processes: int) -> None:
    """Checks that nothing is asked for that a format would leave out.

    Raises:
        CheckpointError: something is.
    """
    is_reference = kind == "reference"
    renames = kind == "safetensors" and which != "predictor"
    for flag, value, is_used in (
        ("--steps-per-epoch", steps_per_epoch, is_reference or steps_per_epoch is None),
        ("--processes", processes, is_reference or processes == 1),
        ("--naming", naming, renames or naming == "published"),
        ("--weights", which, not is_reference or which == "target"),
    ):
        if not is_used:
            what = f"{kind} of the predictor" if which == "predictor" else kind
            raise CheckpointError(f"{flag} is {value}, which {what} doesn't use; drop the flag")


def _kind(to: Path, asked: str | None) -> str:
    """Returns the format of a path."""
    by_suffix = next((kind for kind, suffix in _SUFFIXES.items() if to.name.endswith(suffix)), None)
    if asked is None:
        if by_suffix is None:
            raise CheckpointError(
                f"{to} ends in none of {', '.join(_SUFFIXES.values())}; add --as timm or --as transformers for a folder"
            )
        return by_suffix
    if asked not in FORMATS:
        raise CheckpointError(f"format is {asked!r}; choose one of {', '.join(FORMATS)}")
    if asked != by_suffix and (asked in _SUFFIXES or by_suffix is not None):
        expected = f"a name that ends in {_SUFFIXES[asked]}" if asked in _SUFFIXES else "a folder"
        raise CheckpointError(f"{to} can't be written as {asked}; give {expected}")
    return asked
