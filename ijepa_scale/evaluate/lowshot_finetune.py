"""Low-shot classification by finetuning the encoder, as published, on subsets of the training images."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from ijepa_scale.config.finetune_run import FinetuneConfig
from ijepa_scale.config.json_text import parse_json
from ijepa_scale.data.sources.contents import contents_of
from ijepa_scale.data.sources.subset import SubsetSource, write_subset
from ijepa_scale.engine.world import World
from ijepa_scale.environment import Launch
from ijepa_scale.errors import ConfigError
from ijepa_scale.evaluate.labelled_sets import LabelledSet
from ijepa_scale.evaluate.logistic import few_shots, share_of
from ijepa_scale.evaluate.protocols import FINETUNED, Score
from ijepa_scale.new_file import new_file
from ijepa_scale.plurals import counted
from ijepa_scale.regular_file import read_regular
from ijepa_scale.train.finetune import finetune
from ijepa_scale.train.initial import with_init
from ijepa_scale.train.setup import with_strategy

logger = logging.getLogger(__name__)

# Source: arXiv 2301.08243, appendix A.1
_BATCH, _STEPS, _EPOCHS = 512, 25, 50  # 25 batches of 512 are an epoch of 1% of ImageNet-1k
_DECAY, _DECAY_OF_SMALLER = 0.4, 0.05  # weight decay of ViT-H, and of smaller encoders
_HUGE = 1280  # width of ViT-H
_LEAST_BATCH, _PER_PROCESS = 32, 64


@dataclass(frozen=True, kw_only=True)
class FinetuneRequest:
    """What is finetuned, and where to."""

    source: str
    which: str
    digest: str  # of the encoder's weights
    width: int  # of the encoder
    image_size: tuple[int, int]  # pixels
    heads: int
    folder: Path
    subsets: tuple[str, ...] = ("1%",)  # shares like 1%, images per class like 5, and files of names
    seeds: int = 3
    seed: int = 0
    epochs: int = _EPOCHS
    workers: int = 2


class _Subset(NamedTuple):
    name: str
    draw: Callable[[int], np.ndarray] | None  # ids of the training images by seed; None: of a file


def parse_subset(text: str, labels: np.ndarray) -> _Subset:
    """Returns the subset that `1%`, `5` (images per class) or a file's path means.

    Raises:
        ConfigError: it is none of them.
    """
    if re.fullmatch(r"\d+", text) and int(text) > 0:
        return _Subset(f"{text}-shot", partial(few_shots, labels, int(text)))
    share = re.fullmatch(r"(\d+(?:\.\d+)?)%", text)
    if share and 0 < float(share[1]) <= 100:
        return _Subset(f"{text} low-shot", partial(share_of, labels, float(share[1]) / 100))
    if not os.path.isfile(text):
        raise ConfigError(
            f"--subset is {text!r}; give a share like 1%, images per class like 5, or a text file with a name per line"
        )
    return _Subset(f"{Path(text).stem} low-shot", None)


def check_subsets(data: LabelledSet, subsets: tuple[str, ...], seed: int) -> None:
    """Checks that all subsets can be drawn or read.

    Raises:
        UserError: one can't.
    """
    for text in subsets:
        draw = parse_subset(text, data.train.labels).draw
        if draw is None:
            SubsetSource(data.train.source, text)
        else:
            draw(seed)


def lowshot_finetune(data: LabelledSet, request: FinetuneRequest, world: World, *, trained: bool) -> list[Score]:
    """Returns the accuracy on the test images of each subset: mean, lowest and highest of the seeds.

    With `trained` false, the encoder starts at random weights. Trains on all processes, so every process must call it.
    Finished runs are kept as their accuracies, and an interrupted one goes on from its last checkpoint.

    Raises:
        UserError: see `finetune`; or a subset is unknown.
    """
    scores = []
    for text in request.subsets:
        name, draw = parse_subset(text, data.train.labels)
        found, count = [], 0
        for seed in range(request.seed, request.seed + request.seeds):
            path = Path(text)
            if draw is not None:
                path = request.folder / "subsets" / f"{name.replace(' ', '-').replace('%', 'pct')}-seed{seed}.txt"
                if world.is_main:
                    write_subset(data.train.source, draw(seed), path)
                world.barrier()
            count = SubsetSource(data.train.source, path).num_samples
            config = lowshot_config(data, request, path, count, seed=seed, processes=world.size)
            found.append(_accuracy(config, data, request, world, trained=trained))
        note = "" if count >= _BATCH * _STEPS else "batches below the published 512"
        setting = f"{counted(count, 'image')}, {counted(request.seeds, 'seed')}, {counted(request.epochs, 'epoch')}"
        scores.append(
            Score(
                protocol=f"{name}{FINETUNED}",
                setting=setting,
                accuracy=float(np.mean(found)),
                low=min(found),
                high=max(found),
                note=note,
            )  # fmt: skip
        )
    return scores


def lowshot_config(
    data: LabelledSet, request: FinetuneRequest, subset: Path, count: int, *, seed: int, processes: int
) -> FinetuneConfig:
    """Returns the published recipe for `count` training images.

    Its batch of 512 is for 1% of ImageNet. A smaller set gets as many steps, but batches of at least 32. The batch is a
    multiple of the processes.
    """
    batch = min(count, _BATCH, max(_LEAST_BATCH, count // _STEPS))
    batch = max(1, batch // processes) * processes
    share = batch // processes
    accumulation = next(n for n in range(1, share + 1) if share % n == 0 and share // n <= _PER_PROCESS)
    large = request.width >= _HUGE
    values: dict[str, Any] = {
        "model": {
            "encoder": {"image_size": request.image_size, "heads": request.heads}, "num_classes": data.num_classes,
            "drop_path": 0.0, "init": request.source, "weights": request.which,
        },
        "data": {
            "reader": data.train.reader, "train": data.train.path, "subset": str(subset), "batch_size": batch,
            "workers": request.workers, "exif": data.train.images.exif,
        },
        "augment": {"random_erasing": 0.0, "mixup": 0.0, "cutmix": 0.0},
        "optimizer": {
            "lr": 3e-5, "weight_decay": _DECAY if large else _DECAY_OF_SMALLER,
        },
        "schedule": {"epochs": float(request.epochs), "warmup_epochs": 0.1 * request.epochs},
        "engine": {"checkpointing": "selective" if large else "none", "accumulation": accumulation},
        "logging": {"tensorboard": False},
        "evaluate": {
            "test": data.test.path, "reader": data.test.reader, "every_epochs": float(request.epochs),
            "workers": request.workers,
        },
    }  # fmt: skip
    return FinetuneConfig(seed=seed, **values)


def _accuracy(
    config: FinetuneConfig, data: LabelledSet, request: FinetuneRequest, world: World, *, trained: bool
) -> float:
    """Returns the accuracy of one run, 0 to 1: that of an earlier call if there is one."""
    facts = {
        "config": config.values(), "weights": request.digest, "trained": trained, "processes": world.size,
        "train": contents_of(data.train.source), "test": contents_of(data.test.source),
        "subset": Path(config.data.subset or "").read_text(errors="surrogateescape"),
    }  # fmt: skip
    key = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]
    folder, result = request.folder / "finetuned" / key, request.folder / "finetuned" / f"{key}.json"
    top1 = world.broadcast_object(_stored(result) if world.is_main else None)
    if top1 is None:
        launch = Launch(
            rank=world.rank, world_size=world.size, local_rank=world.local_rank, local_world_size=world.local_size
        )
        config = with_init(config.replace(folder=str(folder)))
        if not trained:
            config = config.replace(model=config.model.replace(init=None))
        found = finetune(with_strategy(config, launch, world.device), world)
        assert found.top1 is not None  # the configuration names test images
        top1 = found.top1
        if world.is_main:
            known = {"top1": top1, "subset": config.data.subset, "seed": config.seed, "trained": trained}
            with new_file(result) as temporary:
                temporary.write_text(json.dumps(known) + "\n")
            shutil.rmtree(folder)  # its checkpoints are three times the encoder's size
        world.barrier()
    return cast(float, top1)


def _stored(path: Path) -> float | None:
    """Returns the accuracy that an earlier call has stored; None if there is none, or it isn't one, which is logged."""
    try:
        top1 = parse_json(read_regular(path))["top1"]
        if not isinstance(top1, float) or not 0 <= top1 <= 1:
            raise ValueError("it holds no accuracy")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        logger.warning("%s is damaged (%s); this run is repeated", path, error)
        return None
    return top1
