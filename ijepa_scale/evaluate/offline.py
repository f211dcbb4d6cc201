"""Evaluates a trained encoder on labelled images, next to the same architecture at random weights."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ijepa_scale import rng, terminal
from ijepa_scale.config.architectures import ARCHITECTURES
from ijepa_scale.config.form import Exif
from ijepa_scale.data.sources.fetch import scheme_of
from ijepa_scale.data.sources.open import build_source, reader_of
from ijepa_scale.data.sources.source import SampleSource, check_problems
from ijepa_scale.engine.world import World
from ijepa_scale.environment import Launch
from ijepa_scale.errors import ConfigError, DataError
from ijepa_scale.evaluate.class_lists import compare_classes
from ijepa_scale.evaluate.frozen import Pool, load
from ijepa_scale.evaluate.linear_probe import ProbeRecipe
from ijepa_scale.evaluate.protocols import PROTOCOLS, Options, Split, run_protocols
from ijepa_scale.evaluate.results import JSON, Results, published_figures
from ijepa_scale.evaluate.stored_features import FeatureStore, ImagesToEncode
from ijepa_scale.models.init import initialise
from ijepa_scale.models.vit import VisionTransformer
from ijepa_scale.train import processes

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest:
    """What is evaluated, on what, and how."""

    source: str
    train: str
    test: str
    protocols: tuple[str, ...] = ("knn", "linear", "logistic", "lowshot")
    reader: str | None = None  # None: by what `train` is
    which: str = "target"
    image_size: int | None = None
    heads: int | None = None
    exif: Exif = "ignore"
    folder: Path = Path("runs/evaluation")
    batch_size: int = 64
    workers: int = 2
    seed: int = 0
    shots: tuple[int, ...] = (1, 5, 10)
    epochs: int = 50
    untrained: bool = True
    overwrite: bool = False
    classes: int | None = None  # of masks; None: classes.json, or one more than the highest
    depth_scale: float | None = None  # integer that stands for a depth of 1, of PNG
    patches: int = 200_000  # that patch-knn remembers


def evaluate_here(request: EvaluationRequest, launch: Launch, device: torch.device) -> None:
    """Evaluates in this process of the run, and prints the table on the main one."""
    terminal.log_to_terminal(logging.INFO if launch.rank == 0 else logging.WARNING)
    with processes.world_of(launch, device, alone=True) as world:
        results = evaluate_encoder(request, world)
        if results is not None:
            terminal.say(*results.text().splitlines(), "", *results.write(request.folder))


def evaluate_encoder(request: EvaluationRequest, world: World) -> Results | None:
    """Returns the table on process 0, where classifiers are trained; None on the others, which compute features only.

    Features are kept in `request.folder`/features, so the same images aren't encoded twice and an interrupted run goes
    on. Every process must call it.

    Raises:
        UserError: the source, the images or their labels can't be used.
    """
    unknown = [name for name in request.protocols if name not in PROTOCOLS]
    if unknown:
        raise ConfigError(f"protocol {', '.join(unknown)} is unknown; choose among {', '.join(PROTOCOLS)}")
    check_unwritten(request, world)
    encoder, transform = load(request.source, which=request.which, image_size=request.image_size, heads=request.heads)
    sets = [
        _opened(f"{name} images", path, request) for name, path in (("train", request.train), ("test", request.test))
    ]
    compare_classes(("the train images", sets[0]), ("the test images", sets[1]), log=world.is_main)
    labels = [_labels(name, source) for name, source in zip(("train", "test"), sets, strict=True)]
    num_classes = 1 + int(max(each.max() for each in labels))
    pool: Pool = "last4" if "linear" in request.protocols and len(encoder.blocks) >= 4 else "mean"
    store = FeatureStore(
        request.folder / "features", world, batch_size=request.batch_size, workers=request.workers,
        advance=show_encoded if world.is_main else None,
    )  # fmt: skip
    width = encoder.pos_embed.shape[-1]
    options = Options(
        width=width, num_classes=num_classes, device=world.device, shots=request.shots, seed=request.seed,
        recipe=ProbeRecipe(epochs=request.epochs, seed=request.seed),
    )  # fmt: skip
    nets = {"": encoder, "untrained-": untrained_like(encoder, request.seed)}
    pairs = []
    for name, net in nets.items() if request.untrained else [("", encoder)]:
        net.to(world.device)
        splits = []
        for each, source, answers in zip(("train", "test"), sets, labels, strict=True):
            images = ImagesToEncode(name=name + each, source=source, exif=request.exif)
            rows = store.features(net, transform, images, pool, tried=bool(name))
            splits.append(Split(features=rows, labels=answers))
        pairs.append(splits)
    world.barrier()  # the last collective
    if not world.is_main:
        return None  # and doesn't wait: training classifiers may take longer than any collective's timeout
    tables = [run_protocols(request.protocols, train, test, options) for train, test in pairs]
    facts = {
        "encoder": f"{request.source} ({request.which})",
        "architecture": f"{name_of(encoder)}, patches of {encoder.patch_size}",
        "images": repr(transform),
        "train": f"{request.train}: {len(labels[0])} images, {num_classes} classes",
        "test": f"{request.test}: {len(labels[1])} images",
        "seed": request.seed,
    }
    sizes = (name_of(encoder), encoder.patch_size, transform.image_size)
    published = published_figures(*sizes, num_classes=num_classes, num_test=len(labels[1]))
    return Results(facts=facts, scores=tables[0], untrained=tables[1] if request.untrained else [], published=published)


def check_unwritten(request: EvaluationRequest, world: World) -> None:
    """Checks that the folder has no table yet, unless it may be overwritten. Communicates."""
    done = request.folder / JSON
    if world.broadcast_object(done.exists()) and not request.overwrite:
        raise ConfigError(f"{done} exists; name another folder with --to, or add --overwrite")


def untrained_like(encoder: VisionTransformer, seed: int) -> VisionTransformer:
    """Returns an encoder of the same architecture at random weights, drawn from `seed`."""
    fresh = copy.deepcopy(encoder).cpu()
    initialise(fresh, rng.generator(seed, "untrained"))
    return fresh


def name_of(encoder: VisionTransformer) -> str:
    """Returns the architecture's name, or its width and depth if none is known."""
    width, depth = encoder.width, len(encoder.blocks)
    named = (name for name, sizes in ARCHITECTURES.items() if (sizes.width, sizes.depth) == (width, depth))
    return next(named, f"width {width}, depth {depth}")


def _opened(name: str, path: str, request: EvaluationRequest) -> SampleSource:
    """Returns the labelled images under a path."""
    if scheme_of(path) is not None:
        raise DataError(f"{name}: {path} is remote; copy it to a local folder first")
    source = build_source(request.reader or reader_of(request.train), path)
    check_problems(source.problems(), source.num_samples, max_bad_fraction=0.0)
    return source


def _labels(name: str, source: SampleSource) -> np.ndarray:
    labels = source.labels()
    unlabelled = np.flatnonzero(labels < 0)
    if len(unlabelled):
        raise DataError(
            f"{len(unlabelled)} of {len(labels)} {name} images have no label (the first is "
            f"{source.name(int(unlabelled[0]))}); give class folders, or shards or a list with labels"
        )
    return labels


def show_encoded(name: str, done: int, total: int) -> None:
    """Shows how many images are encoded: a bar on a terminal, a line at the end elsewhere."""
    bar = _BARS.get(name)
    if bar is None:
        bar = _BARS[name] = tqdm(total=total, unit="image", desc=name, disable=None, dynamic_ncols=True)
    bar.update(done - bar.n)
    if done == total:
        bar.close()
        del _BARS[name]
        logger.info("%s: features of %d images", name, total)


_BARS: dict[str, tqdm] = {}
