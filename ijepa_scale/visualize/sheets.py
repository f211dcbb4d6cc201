"""The sheets that `launch/visualize.py` and the report show, one function each.

Shapes: B images, R x C patches, D channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_scale.errors import ConfigError, DataError
from ijepa_scale.evaluate.frozen import Pool, pooled
from ijepa_scale.metrics.plots import mask_grids, mask_panels
from ijepa_scale.models.vit import VisionTransformer
from ijepa_scale.visualize.last_attention import last_attention
from ijepa_scale.visualize.photographs import Photographs, on_page
from ijepa_scale.visualize.prediction_errors import PatchErrors, patch_errors
from ijepa_scale.visualize.principal_colors import principal_colors, sharpened
from ijepa_scale.visualize.sheet import Panel, Scale, Sheet, as_bytes, heat
from ijepa_scale.visualize.source import PictureSource

_BACKGROUND = 0.88  # grey
_BATCH = 16
_FITTED = 64  # images that principal components are fitted to


def mask_sheet(source: PictureSource, *, count: int = 6, step: int = 0) -> Sheet:
    """Returns images with the context and targets that training would draw for a batch of them at `step`.

    Raises:
        ConfigError: no training has such a step.
    """
    if not 0 <= step < 2**32:
        raise ConfigError(f"step is {step}; give a step of training, from 0 to {2**32 - 1}")
    encoder, transform = source.encoder()
    sampler = source.masks(encoder.grid)
    photographs = source.photographs(transform)
    numbers = photographs.some(count)
    drawn = max(len(numbers), sampler.config.group_size)  # a whole group, which is cut to one length
    context, targets = mask_grids(sampler(step, 0, drawn, drawn), drawn, encoder.grid)
    names = ("Image", "Context", f"{targets.shape[1]} targets")
    items = []
    for b, image in enumerate(photographs.shown(numbers)):
        kept = int(context[b].any(0).sum())
        meanings = (_called(photographs, numbers[b]), f"{kept} context patches", "target blocks, each in a frame")
        panels = mask_panels(image, context[b], targets[b])
        items.append(_panels(panels, names, meanings))
    rows, columns = encoder.grid
    note = (
        f"From the context alone, the predictor finds the target encoder's features of each target block. {rows} x "
        f"{columns} patches; sampler {sampler.config.sampler}, step {step}."
        + ("" if source.has_masks else " The source tells no masks of its own: these are the default.")
    )
    return Sheet(title="Masks", note=note, items=items, across=True)


def pca_sheet(source: PictureSource, *, count: int = 6, times: int = 2) -> Sheet:
    """Returns images with their patch features as colours, by patch and sharpened at the image's edges.

    The encoder takes images of `times` the size that it was trained on, unless the source says another size. Components
    are fitted to at least 64 images of the set, if it has them.
    """
    encoder, transform = source.encoder(times)
    photographs = source.photographs(transform)
    numbers = photographs.some(count)
    more = [number for number in photographs.some(max(_FITTED, count)) if number not in numbers]
    tokens, _ = _encoded(photographs, [*numbers, *more[: max(0, _FITTED - len(numbers))]], encoder, "tokens")
    colors, foreground = principal_colors(tokens.unflatten(1, encoder.grid))
    maps = torch.cat([colors, foreground[:, None]], dim=1)[: len(numbers)].cpu()
    shown = photographs.shown(numbers)
    sharp = sharpened(maps, torch.from_numpy(shown).permute(0, 3, 1, 2))
    plain = F.interpolate(maps, size=shown.shape[1:3], mode="nearest-exact")
    names = ("Image", "Patches", "Sharpened")
    meanings = ("principal components of its patches as colours", "the same, with the image's edges")
    items = [
        _panels((as_bytes(image), _over_grey(plain[b]), _over_grey(sharp[b])), names,
                (_called(photographs, numbers[b]), *meanings))
        for b, image in enumerate(shown)
    ]  # fmt: skip
    rows, columns = encoder.grid
    note = (
        "The first three principal components of the foreground's patch features are red, green and blue, the same for "
        "all images: like colours, like features. Features hold places too, and so do colours. Grey is background. "
        f"Fitted to {len(tokens)} images; {rows} x {columns} patches of {transform.image_size[0]} x "
        f"{transform.image_size[1]} pixels' input; sharpening takes "
        "edges from the image, not from the encoder."
    )
    return Sheet(title="Principal components of patch features", note=note, items=items, across=True)


def attention_sheet(source: PictureSource, *, count: int = 3, query: tuple[float, float] | None = None) -> Sheet:
    """Returns images with the last block's attention: that which patches receive, or that of a query patch.

    `query` is its place as shares of the image's width and height, from 0 to 1.

    Raises:
        ConfigError: the query is outside the image.
    """
    if query is not None and not all(0 <= share <= 1 for share in query):
        raise ConfigError(
            f"query is {query[0]:g} {query[1]:g}; give shares of width and height from 0 to 1, as 0.5 0.5"
        )
    encoder, transform = source.encoder()
    photographs = source.photographs(transform)
    numbers = photographs.some(count)
    weights = last_attention(encoder, photographs.inputs(numbers).to(encoder.pos_embed.device)).cpu()
    rows, columns = encoder.grid
    shown = photographs.shown(numbers)
    if query is None:
        maps, what = weights.mean(dim=2), "received by each patch, mean over all queries"
    else:
        row, column = min(int(query[1] * rows), rows - 1), min(int(query[0] * columns), columns - 1)
        maps, what = weights[:, :, row * columns + column], "of the query patch, which has a frame"
        patch = shown.shape[1] // rows, shown.shape[2] // columns
        for image in shown:
            _frame(image, row * patch[0], column * patch[1], patch)
    relative = torch.cat([maps.mean(dim=1, keepdim=True), maps], dim=1).unflatten(2, (rows, columns)) * rows * columns
    scale = Scale(colors="magma", low=0.0, high=float(relative.quantile(0.995)), label="attention / uniform attention")
    heads = weights.shape[1]
    names = ["Image", "Mean", *(f"Head {head + 1}" for head in range(heads))]
    items = []
    for b, image in enumerate(shown):
        overlays = [heat(image, values, scale) for values in on_page(relative[b], shown.shape[1:3])]
        meanings = [_called(photographs, numbers[b]), *(f"attention, {name.lower()}" for name in names[1:])]
        items.append(_panels([as_bytes(image), *overlays], names, meanings))
    note = f"Attention of the last block, {what}. {rows} x {columns} patches, {heads} heads; there is no class token."
    return Sheet(title="Attention of the last block", note=note, items=items, lead=2, scale=scale)


def error_sheet(source: PictureSource, *, count: int = 6, draws: int = 64) -> Sheet:
    """Returns images with the predictor's error at each patch, mean over `draws` masks of each image."""
    jepa, target, transform = source.jepa()
    sampler = source.masks(target.grid)
    photographs = source.photographs(transform)
    numbers = photographs.some(count)
    device = target.pos_embed.device
    found = [patch_errors(jepa, target, image.to(device), sampler, draws) for image in photographs.inputs(numbers)]
    shown = photographs.shown(numbers)
    errors = torch.stack([each.mean for each in found])
    scale = Scale(
        colors="magma", low=0.0, high=float(errors.nan_to_num(0.0).max()),
        label="mean squared error of normalised features",
    )  # fmt: skip
    overlays = [heat(image, on_page(errors[b : b + 1], shown.shape[1:3])[0], scale) for b, image in enumerate(shown)]
    meanings = [f"error by patch, {_mean_of(each):.3f} in the mean" for each in found]
    items = [
        _panels((as_bytes(image), overlays[b]), ("Image", "Error"), (_called(photographs, numbers[b]), meanings[b]))
        for b, image in enumerate(shown)
    ]
    baseline = sum(each.baseline for each in found) / len(found)
    note = (
        f"Mean over {draws} masks of each image: the predictor's squared error at a patch when it is a target. In all "
        f"{sum(map(_mean_of, found)) / len(found):.3f}; the mean feature of the image's own patches would have "
        f"{baseline:.3f}, zeros 1. Patches without colour were never a target."
    )
    return Sheet(title="Where the predictor errs", note=note, items=items, across=True, scale=scale)


def retrieval_sheet(
    source: PictureSource, *, count: int = 5, neighbors: int = 6, queries: Sequence[str] = (), at_most: int = 5000
) -> Sheet:
    """Returns query images with their nearest neighbours in the set, by the cosine of centred mean features.

    The mean over the set is subtracted, since all cosines of a young encoder are near 1 without. Queries are images of
    the set, which then aren't their own neighbours, unless others are given. Of a larger set than `at_most` images, so
    many are taken, spread evenly.

    Raises:
        DataError: the set has no other image.
    """
    encoder, transform = source.encoder()
    photographs = source.photographs(transform)
    features, numbers = _encoded(photographs, photographs.spread(at_most), encoder, "mean")
    asked = photographs
    if queries:
        asked = Photographs.of(queries, None, transform)
        sought, asked_numbers = _encoded(asked, asked.spread(count), encoder, "mean")
    else:
        chosen = torch.linspace(0, len(numbers) - 1, min(count, len(numbers))).long()
        sought, asked_numbers = features[chosen], [numbers[place] for place in chosen.tolist()]
    mean = features.mean(dim=0)
    likeness = F.normalize(sought - mean, dim=1) @ F.normalize(features - mean, dim=1).T
    if not queries:
        likeness[torch.arange(len(chosen)), chosen] = -float("inf")
    most = min(neighbors, len(numbers) - (not queries))
    if most < 1:
        raise DataError(f"the set has only {len(numbers)} usable image; nearest neighbours need another one")
    best, places = likeness.topk(most)
    items = []
    for q, number in enumerate(asked_numbers):
        near = [numbers[place] for place in places[q].tolist()]
        pictures = [*asked.shown([number]), *photographs.shown(near)]
        names = [asked.folder(number) or "Query"]
        names += [f"{value:.2f} {photographs.folder(n)}" for value, n in zip(best[q].tolist(), near, strict=True)]
        meanings = [
            f"query: {asked.name(number)}",
            *(f"neighbour {rank + 1}: {photographs.name(n)}" for rank, n in enumerate(near)),
        ]
        items.append(_panels(map(as_bytes, pictures), names, meanings))
    note = (
        f"Left, a query; next to it, the most alike of {len(numbers)} images. Above each stand the cosine of the two "
        "images' mean features, from which the mean of all images is subtracted, and the image's folder."
    )
    return Sheet(title="Nearest neighbours", note=note, items=items)


def _encoded(
    photographs: Photographs, numbers: Sequence[int], encoder: VisionTransformer, pool: Pool
) -> tuple[Tensor, list[int]]:
    """Returns the features of usable images, on the encoder's device, and their numbers."""
    parts, kept = [], []
    for some, images in photographs.batches(numbers, _BATCH):
        parts.append(pooled(encoder, images.to(encoder.pos_embed.device), pool))
        kept += some
    return torch.cat(parts), kept


def _panels(pictures: Iterable[np.ndarray], names: Sequence[str], meanings: Sequence[str]) -> list[Panel]:
    return [
        Panel(pixels=pixels, label=name, meaning=meaning)
        for pixels, name, meaning in zip(pictures, names, meanings, strict=True)
    ]


def _called(photographs: Photographs, number: int) -> str:
    return f"image {photographs.name(number)}"


def _over_grey(maps: Tensor) -> np.ndarray:
    """Returns colours (3, h, w) over grey, weighted by the foreground, the fourth channel, as (h, w, 3) uint8."""
    colors, weight = maps[:3], maps[3:]
    return as_bytes((colors * weight + _BACKGROUND * (1 - weight)).permute(1, 2, 0).numpy())


def _mean_of(errors: PatchErrors) -> float:
    return float(errors.mean.nanmean())


def _frame(image: np.ndarray, top: int, left: int, patch: tuple[int, int]) -> None:
    """Draws a light frame with a dark edge around a patch of an image (h, w, 3), in place."""
    for inset, color in ((-2, 0.1), (0, 1.0)):
        rows = slice(max(0, top + inset), top + patch[0] - inset), slice(max(0, left + inset), left + patch[1] - inset)
        inner = image[top + 2 : top + patch[0] - 2, left + 2 : left + patch[1] - 2].copy()
        image[rows] = color
        image[top + 2 : top + patch[0] - 2, left + 2 : left + patch[1] - 2] = inner
