"""Evaluates a trained encoder on labelled images, next to the same architecture at random weights."""

from __future__ import annotations

import copy
import logging
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from ijepa_scale import rng, terminal
from ijepa_scale.checkpoint.digests import digest_of_tensors
from ijepa_scale.config.architectures import ARCHITECTURES
from ijepa_scale.config.form import Exif
from ijepa_scale.data.sources.source import described
from ijepa_scale.engine.world import World
from ijepa_scale.environment import Launch
from ijepa_scale.errors import ConfigError
from ijepa_scale.evaluate.alike import check_opened, check_options
from ijepa_scale.evaluate.attentive_protocol import ATTENTIVE, attentive, token_bytes
from ijepa_scale.evaluate.bar import Bar
from ijepa_scale.evaluate.frozen import ImageTransform, Pool, heads_of, load
from ijepa_scale.evaluate.labelled_sets import LabelledSet, Named
from ijepa_scale.evaluate.linear_probe import ProbeRecipe
from ijepa_scale.evaluate.lowshot_finetune import FinetuneRequest, check_subsets, lowshot_finetune
from ijepa_scale.evaluate.protocols import PROTOCOLS, Options, Score, Split, check_labels, means, transfer
from ijepa_scale.evaluate.results import JSON, Results, published_figures
from ijepa_scale.evaluate.stored_features import FeatureStore
from ijepa_scale.models.init import initialise
from ijepa_scale.models.vit import VisionTransformer
from ijepa_scale.plurals import counted
from ijepa_scale.train import processes

logger = logging.getLogger(__name__)

FINETUNE = "lowshot-finetune"
ALL = (*PROTOCOLS, *ATTENTIVE, FINETUNE)
_SET_NAME = re.compile(r"\w[\w.+-]{0,39}")
USUAL = (*PROTOCOLS, "attentive")  # the others take hours without a GPU


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest:
    """What is evaluated, on what, and how."""

    source: str
    train: str
    test: str
    transfer: tuple[Named, ...] = ()
    protocols: tuple[str, ...] = USUAL
    reader: str | None = None  # None: by what `train` is
    which: str = "target"
    image_size: int | None = None
    heads: int | None = None
    exif: Exif = "ignore"
    folder: Path = Path("runs/evaluation")
    batch_size: int = 64
    workers: int = 2
    seed: int = 0
    seeds: int = 3  # draws of few images
    shots: tuple[int, ...] = (1, 5, 10)
    subsets: tuple[str, ...] = ("1%",)  # that are finetuned on
    epochs: int = 50  # of the linear probe
    finetune_epochs: int = 50
    attentive_epochs: int = 20
    token_gb: float = 16.0  # that tokens may take in the folder; more are computed anew in each epoch
    untrained: bool = True
    overwrite: bool = False
    classes: int | None = None  # of masks; None: classes.json, or one more than the highest
    depth_scale: float | None = None  # integer that stands for a depth of 1, of PNG
    patches: int = 200_000  # that patch-knn remembers


class Table(Protocol):
    """What an evaluation found."""

    def text(self) -> str: ...  # noqa: D102
    def write(self, folder: Path) -> list[Path]: ...  # noqa: D102


Evaluate = Callable[["EvaluationRequest", World], "Table | None"]

# of an EvaluationRequest, as `check_options` takes them
PATHS = {"source", "train", "test", "transfer", "folder"}
FLAGS = {"protocols": "--protocol", "subsets": "--subset", "which": "--weights", "untrained": "the untrained encoder"}


def evaluate_here(evaluate: Evaluate, request: EvaluationRequest, launch: Launch, device: torch.device) -> None:
    """Evaluates in this process of the run, and prints the table on the main one."""
    terminal.log_to_terminal(logging.INFO if launch.rank == 0 else logging.WARNING)
    with processes.world_of(launch, device, alone=True) as world:
        results = evaluate(request, world)
        if results is not None:
            terminal.say(*results.text().splitlines(), "", *results.write(request.folder))


def evaluate_encoder(request: EvaluationRequest, world: World) -> Results | None:
    """Returns the table on process 0, where classifiers on features are trained; None on the others.

    Features are kept in `request.folder`/features, so the same images aren't encoded twice and an interrupted run goes
    on. Every process must call it.

    Raises:
        UserError: the source, the images or their labels can't be used.
    """
    unknown = [name for name in request.protocols if name not in ALL]
    if unknown:
        raise ConfigError(f"protocol {', '.join(unknown)} is unknown; choose among {', '.join(ALL)}")
    _check_flags(request)
    check_options(world, request, paths=PATHS, flags=FLAGS)
    check_folder(request, world)
    encoder, transform = load(request.source, which=request.which, image_size=request.image_size, heads=request.heads)
    sets = [
        LabelledSet.open(given, request.reader if not given.name else None, request.exif, log=world.is_main)
        for given in (Named("", request.train, request.test), *request.transfer)
    ]
    images = [part.images for each in sets for part in (each.train, each.test)]
    check_opened(world, encoder, {each.name: described(each.source) for each in images})
    for number, each in enumerate(sets):
        needs_shots = number > 0 or "lowshot" in request.protocols
        check_labels(each.train.labels, _shots(request, number) if needs_shots else (), each.name)
    if FINETUNE in request.protocols:
        check_subsets(sets[0], request.subsets, request.seed)
    nets = {"": encoder, "untrained-": untrained_like(encoder, request.seed)}
    if not request.untrained:
        del nets["untrained-"]
    evaluations = [_Evaluation(request, world, net, transform, sets, name) for name, net in nets.items()]
    for evaluation in evaluations:
        evaluation.prepare()
    world.barrier()  # the last collective
    if not world.is_main:
        return None  # and doesn't wait: training classifiers may take longer than any collective's timeout
    tables = [evaluation.scores() for evaluation in evaluations]
    main = sets[0]
    facts = {
        "encoder": f"{request.source} ({request.which})",
        "architecture": f"{name_of(encoder)}, patches of {encoder.patch_size}",
        "images": repr(transform),
        "train": f"{request.train}: {counted(len(main.train.labels), 'image')}, {counted(main.num_classes, 'class')}",
        "test": f"{request.test}: {counted(len(main.test.labels), 'image')}",
        "seed": request.seed,
    }
    facts |= {f"transfer {each.name}": f"{each.train.path} and {each.test.path}" for each in sets[1:]}
    sizes = (name_of(encoder), encoder.patch_size, transform.image_size)
    published = published_figures(*sizes, num_classes=main.num_classes, num_test=len(main.test.labels))
    return Results(facts=facts, scores=tables[0], untrained=tables[1] if request.untrained else [], published=published)


class _Evaluation:
    """The evaluation of one encoder on all sets: first what all processes do together, then what process 0 does."""

    def __init__(
        self,
        request: EvaluationRequest,
        world: World,
        encoder: VisionTransformer,
        transform: ImageTransform,
        sets: list[LabelledSet],
        name: str,
    ) -> None:  # fmt: skip
        self._request, self._world, self._encoder, self._transform = request, world, encoder, transform
        self._sets, self._name = sets, name
        shown = EncodingBars() if world.is_main else None
        self._store = FeatureStore(
            request.folder / "features", world, batch_size=request.batch_size, workers=request.workers, advance=shown
        )
        self._splits: list[tuple[Split, Split]] = []
        self._together: dict[str, list[Score]] = {}  # by protocol

    def prepare(self) -> None:
        """Computes features, and trains what all processes train. Communicates."""
        request, encoder, main = self._request, self._encoder.to(self._world.device), self._sets[0]
        wanted = [name for name in request.protocols if name in ATTENTIVE]
        needed = token_bytes(encoder, main) * (2 if request.untrained else 1)
        stored = bool(wanted) and needed <= request.token_gb * 1e9
        if wanted and not stored and self._world.is_main and not self._name:
            logger.info(
                "tokens take %.1f GB, over --token-gb %g: they are recomputed in each epoch",
                needed / 1e9, request.token_gb,
            )  # fmt: skip
        pool: Pool = "last4" if "linear" in request.protocols and len(encoder.blocks) >= 4 else "mean"
        tokens: dict[str, np.ndarray] = {}
        for each in self._sets:
            splits = []
            pools: list[Pool] = [pool, "tokens"] if stored and each is main else [pool]
            for part in (each.train, each.test):
                images = replace(part.images, name=self._name + part.images.name)
                found = self._store.features(encoder, self._transform, images, pools, tried=bool(self._name))
                splits.append(Split(features=found[pool], labels=part.labels))
                if "tokens" in found:
                    tokens[part.images.name] = found["tokens"]
            self._splits.append((splits[0], splits[1]))
        for name in wanted:
            self._together[name] = attentive(
                name, main, encoder, self._transform, self._store, tokens, epochs=request.attentive_epochs,
                seed=request.seed, world=self._world,
            )  # fmt: skip
        if FINETUNE in request.protocols:
            finetuning = FinetuneRequest(
                source=request.source, which=request.which, digest=digest_of_tensors(encoder.cpu().state_dict()),
                width=encoder.width, heads=heads_of(encoder), image_size=self._transform.image_size,
                folder=request.folder, subsets=request.subsets, seeds=request.seeds, seed=request.seed,
                epochs=request.finetune_epochs, workers=request.workers,
            )  # fmt: skip
            self._together[FINETUNE] = lowshot_finetune(main, finetuning, self._world, trained=not self._name)
        encoder.cpu()

    def scores(self) -> list[Score]:
        """Returns the scores in the order of the protocols, those of further sets at the end. On process 0 only."""
        names, further = self._request.protocols, self._sets[1:]
        found: list[Score] = []
        bar, total = Bar(f"{self._name or 'trained-'}classifiers", "protocol"), len(names) + len(further)
        bar.show(0, total)
        for done, name in enumerate(names, start=1):
            if name in self._together:
                found += self._together[name]
            else:
                found += PROTOCOLS[name](*self._splits[0], self._options(0))
            bar.show(done, total)
        transfers = []
        for number, each in enumerate(further, start=1):
            transfers.append(transfer(*self._splits[number], self._options(number)))
            found += [replace(score, protocol=f"{each.name}: {score.protocol}") for score in transfers[-1]]
            bar.show(len(names) + number, total)
        return found + (means("all sets", transfers) if len(transfers) > 1 else [])

    def _options(self, number: int) -> Options:
        request = self._request
        return Options(
            width=self._encoder.width, num_classes=self._sets[number].num_classes, device=self._world.device,
            shots=_shots(request, number), seed=request.seed, seeds=request.seeds,
            recipe=ProbeRecipe(epochs=request.epochs, seed=request.seed),
        )  # fmt: skip


class EncodingBars:
    """Shows how many images are encoded: a bar on a terminal, a line at the end elsewhere."""

    def __init__(self) -> None:
        self._bars: dict[str, Bar] = {}

    def __call__(self, name: str, done: int, total: int) -> None:
        """Shows that `done` of `total` images of a set are encoded."""
        self._bars.setdefault(name, Bar(name, "image")).show(done, total)
        if done == total:
            logger.info("%s: features of %d images", name, total)


def check_folder(request: EvaluationRequest, world: World) -> None:
    """Makes the folder, and checks that it takes files and has no table that must be kept. Communicates.

    Raises:
        ConfigError: it can't be used.
    """
    problem = world.broadcast_object(_problem_of(request) if world.is_main else None)
    if problem is not None:
        raise ConfigError(problem)


def _problem_of(request: EvaluationRequest) -> str | None:
    done = request.folder / JSON
    try:
        if done.exists() and not request.overwrite:
            return f"{done} exists; name another folder with --to, or add --overwrite"
        request.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=request.folder):
            return None
    except OSError as error:
        return f"{request.folder} can't be written to ({error.strerror}); name another folder with --to"


def _check_flags(request: EvaluationRequest) -> None:
    """Checks the names of further sets, the room for tokens, and that no flag is only for dense protocols.

    Raises:
        ConfigError: otherwise.
    """
    names = [each.name for each in request.transfer]
    for name in names:
        if not _SET_NAME.fullmatch(name) or names.count(name) > 1:
            raise ConfigError(
                f"--transfer is named {name!r}; give each data set a name of its own, of up to 40 letters, digits and "
                "any of - . _ +"
            )
    if not request.token_gb >= 0:  # also if it isn't a number
        raise ConfigError(f"--token-gb is {request.token_gb:g}; give 0, which keeps none, or more")
    for flag, value in (("--classes", request.classes), ("--depth-scale", request.depth_scale)):
        if value is not None:
            raise ConfigError(f"{flag} is {value:g}, but images with labels have no maps; drop the flag")


def _shots(request: EvaluationRequest, number: int) -> tuple[int, ...]:
    """Returns the images per class of the set with that number; further ones have 1 and 10 at most."""
    return request.shots if number == 0 else tuple(each for each in request.shots if each in (1, 10)) or (1,)


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
