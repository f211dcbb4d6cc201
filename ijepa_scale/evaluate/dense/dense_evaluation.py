"""Evaluates a trained encoder on dense tasks, next to the same architecture at random weights."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from ijepa_scale.data.sources.contents import digest_of_stats
from ijepa_scale.data.sources.source import described
from ijepa_scale.engine.world import World
from ijepa_scale.errors import ConfigError, DataError
from ijepa_scale.evaluate.alike import check_opened, check_options
from ijepa_scale.evaluate.dense.dense_protocols import (
    DENSE_PROTOCOLS,
    NEEDS,
    DenseOptions,
    DenseSplit,
)
from ijepa_scale.evaluate.dense.dense_results import DenseResults
from ijepa_scale.evaluate.dense.map_files import IGNORED
from ijepa_scale.evaluate.dense.map_folders import Checked, Kind, MapFolder, check_maps, training_maps
from ijepa_scale.evaluate.dense.patch_head import HeadRecipe
from ijepa_scale.evaluate.frozen import ImageTransform, load
from ijepa_scale.evaluate.offline import (
    FLAGS,
    PATHS,
    EncodingBars,
    EvaluationRequest,
    check_folder,
    name_of,
    untrained_like,
)
from ijepa_scale.evaluate.stored_features import FeatureStore, ImagesToEncode
from ijepa_scale.plurals import counted

logger = logging.getLogger(__name__)


def evaluate_dense(request: EvaluationRequest, world: World) -> DenseResults | None:
    """Returns the table on process 0, where heads are trained; None on the others, which compute tokens only.

    Tokens are kept in `request.folder`/features, so the same images aren't encoded twice and an interrupted run goes
    on. Every process must call it.

    Raises:
        UserError: the source, the photographs or their maps can't be used.
    """
    kind = _kind_of(request.protocols)
    if request.reader is not None:
        raise ConfigError(f"--reader is {request.reader}, but {kind} are read from folders of files; drop the flag")
    if request.transfer:
        raise ConfigError(
            f"--transfer is {request.transfer[0].name}, but it is for images with labels, not {kind}; drop the flag"
        )
    check_options(world, request, paths=PATHS, flags=FLAGS)
    check_folder(request, world)
    encoder, transform = load(request.source, which=request.which, image_size=request.image_size, heads=request.heads)
    whole = ImageTransform(
        encoder, mean=transform.mean, std=transform.std, crop_fraction=1.0, pixels=transform.format.dtype
    )
    train, test = (
        MapFolder(path, kind, image_size=whole.image_size, pixels=whole.format, depth_scale=request.depth_scale)
        for path in (request.train, request.test)
    )
    check_opened(world, encoder, {"train": described(train), "test": described(test)})
    found = _checked(train, test, request, world)
    store = FeatureStore(
        request.folder / "features", world, batch_size=request.batch_size, workers=request.workers,
        advance=EncodingBars() if world.is_main else None,
    )  # fmt: skip
    splits = []
    nets = [("", encoder)] + ([("untrained-", untrained_like(encoder, request.seed))] if request.untrained else [])
    for name, net in nets:
        net.to(world.device)
        for part, source in (("train", train), ("test", test)):
            images = ImagesToEncode(name=name + part, source=source)
            tokens = store.features(net, whole, images, ["tokens"], tried=True)["tokens"]
            splits.append(DenseSplit(tokens=tokens, source=source))
        net.cpu()
    world.barrier()  # the last collective
    if not world.is_main:
        return None  # and doesn't wait: training heads may take longer than any collective's timeout
    options = DenseOptions(
        grid=encoder.grid, device=world.device, num_classes=train.num_classes or 0,
        depths=(found.lowest, found.highest), patches=request.patches, workers=request.workers, seed=request.seed,
        recipe=HeadRecipe(epochs=request.epochs, seed=request.seed),
    )  # fmt: skip
    maps = training_maps(train, _maps_path(train, request.folder), workers=request.workers)
    tables = [
        [
            each
            for name in request.protocols
            for each in DENSE_PROTOCOLS[name](splits[at], maps, splits[at + 1], options)
        ]
        for at in range(0, len(splits), 2)
    ]
    what = f"{train.num_classes} classes" if kind == "masks" else f"depths from {found.lowest:g} to {found.highest:g}"
    facts = {
        "encoder": f"{request.source} ({request.which})",
        "architecture": f"{name_of(encoder)}, patches of {encoder.patch_size}",
        "images": f"whole, resized to {whole.image_size[0]} x {whole.image_size[1]} pixels, {encoder.grid[0]} x "
        f"{encoder.grid[1]} patches; figures at the size of each {'mask' if kind == 'masks' else 'depth map'}",
        "train": f"{request.train}: {counted(train.num_samples, 'image')}, {what}",
        "test": f"{request.test}: {counted(test.num_samples, 'image')}",
        "seed": request.seed,
    }
    return DenseResults(
        facts=facts, measures=tables[0], untrained=tables[1] if request.untrained else [], classes=train.classes
    )


def _kind_of(protocols: tuple[str, ...]) -> Kind:
    """Returns the maps that the protocols need, masks or depth."""
    unknown = [name for name in protocols if name not in DENSE_PROTOCOLS]
    kinds = sorted({NEEDS[name] for name in protocols if name in NEEDS})
    if unknown or len(kinds) != 1:
        raise ConfigError(
            f"protocols {', '.join(protocols)} need different data (class folders, images with masks, or images with "
            "depth maps); give one command for each kind"
        )
    return kinds[0]


def _checked(train: MapFolder, test: MapFolder, request: EvaluationRequest, world: World) -> Checked:
    """Checks all pairs of both sets, and returns what is in the training maps. Sets the number of classes of both."""
    if train.kind == "depth" and request.classes is not None:
        raise ConfigError(f"--classes is {request.classes}, but depth has no classes; drop the flag")
    if train.kind == "masks" and request.depth_scale is not None:
        raise ConfigError(f"--depth-scale is {request.depth_scale:g}, but masks have no scale; drop the flag")
    if train.classes and test.classes and train.classes != test.classes:
        raise DataError(f"classes.json of {train.path} and of {test.path} differ; give both the same list")
    if request.classes is not None:
        if train.classes is not None and len(train.classes) != request.classes:
            raise ConfigError(
                f"--classes is {request.classes}, but classes.json of {train.path} names {len(train.classes)}; correct "
                "one of them"
            )
        train.num_classes = request.classes
    found = []
    for name, source in (("train", train), ("test", test)):
        found.append(check_maps(source, name, world=world, workers=request.workers))
        if source is train and train.kind == "masks":
            train.num_classes = train.num_classes or 1 + max(found[0].classes or [0])
            if not 2 <= train.num_classes <= IGNORED:
                raise DataError(
                    f"{train.path} has {counted(train.num_classes, 'class')}; give masks of 2 to "
                    f"{IGNORED}, or the number with "
                    "--classes"
                )
            test.num_classes = train.num_classes
        if world.is_main:
            logger.info("%s: %s", name, source.summary())
            if found[-1].turned:
                logger.info("%s: %d photographs are rotated by their EXIF orientation", name, found[-1].turned)
    only = sorted({*(found[1].classes or ())} - {*(found[0].classes or ())})
    if only and world.is_main:
        logger.warning("no training mask has class %s, which test masks have", ", ".join(map(str, only)))
    return found[0]


def _maps_path(train: MapFolder, folder: Path) -> Path:
    """Returns the path of the training maps at the encoder's size; it changes with any of their files."""
    files = digest_of_stats(map(train.map_name, range(train.num_samples)))
    key = hashlib.sha256(f"{train.fingerprint} {files} {train.depth_scale}".encode()).hexdigest()[:16]
    return folder / "features" / f"train-{train.kind}-{key}.npy"
