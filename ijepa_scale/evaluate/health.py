"""Measures a pretraining run on a few fixed images, without labels. Must not know how an engine spreads its weights.

Shapes: B images of a chunk, N patches, D channels, E context blocks of K tokens, M target blocks of T tokens, Q views.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ijepa_scale import rng
from ijepa_scale.config import PretrainConfig
from ijepa_scale.data.eval_reader import read_usable, spread
from ijepa_scale.data.sources.source import SampleSource
from ijepa_scale.engine.protocol import Engine
from ijepa_scale.engine.world import World
from ijepa_scale.errors import DataError
from ijepa_scale.evaluate.evaluator import ImageSettings
from ijepa_scale.evaluate.features import gather_features, local_ids
from ijepa_scale.evaluate.rank import lidar, rank_me
from ijepa_scale.masks import DenseMasks, MaskSampler, Wanted
from ijepa_scale.masks.types import target_index
from ijepa_scale.objectives.protocol import Objective
from ijepa_scale.objectives.targets import normalise_targets
from ijepa_scale.planning.flops import encoder_forward_flops, forward_flops, mask_flops
from ijepa_scale.plurals import counted

logger = logging.getLogger(__name__)

VIEWS = 4  # mask draws per image: LiDAR's views of it
_FEWEST = 2  # images, to compare
_NAMED = 5  # images that can't be used, in the warning


class HealthCheck:
    """Measures features and predictions on fixed images with fixed masks.

    Reads the images at construction and keeps them in host memory, each process its part. The figures are the same on
    all processes, and but for rounding for any number of them.
    """

    def __init__(
        self,
        config: PretrainConfig,
        source: SampleSource,
        name: str,
        *,
        images: ImageSettings,
        objective: Objective,
        world: World,
        chunk: int,
    ) -> None:
        """Reads the images.

        Args:
            config: of the run; masks are drawn as in training, keyed by its seed.
            source: of the images, which may be those of the training set.
            name: the setting that names the set, for messages.
            images: how they are sized and normalised.
            objective: of the run.
            world: this process's place.
            chunk: images per forward pass and process.

        Raises:
            DataError: fewer than 2 images can be read.
        """
        self._config, self._world, self._objective, self._chunk = config, world, objective, chunk
        self._num_patches = config.model.grid[0] * config.model.grid[1]
        self._images, self.total = _read(source, name, config.health.images, images, world)
        group = min(config.masks.group_size, self.total)
        section = config.masks.replace(context="truncate", group_size=group)
        sampler = MaskSampler(section, config.model.grid, seed=rng.key(config.seed, "health"))
        drawn = [sampler(view, 0, group, group) for view in range(VIEWS)]
        self._masks = [masks for masks in drawn if isinstance(masks, DenseMasks)]
        assert len(self._masks) == VIEWS, "one group of truncated contexts"
        first = world.rank * len(self._images)
        self._rows = [(first + row) % group for row in range(len(self._images))]  # of the drawn masks
        self._num_own = max(0, min(len(self._images), self.total - first))  # the rest repeats the last image

    @property
    def flops(self) -> float:
        """The FLOPs of one measurement, over all processes."""
        model, masks = self._config.model, self._masks[0]
        count = mask_flops(model, masks, num_images=masks.context.shape[1])
        return self.total * (encoder_forward_flops(model) + VIEWS * forward_flops(model, count))

    def share(self, batch_size: int) -> float:
        """Returns the FLOPs of measurements divided by those of training on batches of `batch_size` images."""
        masks = self._masks[0]
        step = batch_size * mask_flops(self._config.model, masks, num_images=masks.context.shape[1]).total
        return self.flops / (self._config.health.every * step)

    @torch.no_grad()
    def measure(self, engine: Engine) -> dict[str, float]:
        """Returns the figures by name. Synchronises and communicates, so every process must call it.

        - health_loss: the objective's loss;
        - relative_loss: divided by that of predicting, for each patch, the mean of its features over the images;
        - feature_std: `metrics.meters.feature_std` of the target encoder's features;
        - rank_me, lidar: see `rank`, of the target encoder's mean tokens, and of the context encoder's for each view;
        - context_cosine: mean cosine between the normalised tokens of context and target encoder at the context's
          patches.
        """
        with torch.compiler.set_stance("force_eager"):  # graphs for a few passes would cost more than they gain
            tokens_BND = torch.cat([engine.target(self._part(rows)) for rows in self._chunks()]).float()
            own = normalise_targets(tokens_BND[: self._num_own])
            mean_ND = self._sum(own.sum(dim=0)) / self.total
            squares = self._sum((own - mean_ND).square().sum(dim=(0, 1))) / (self._num_patches * (self.total - 1))
            views_BQD, sums = self._views(engine, tokens_BND, mean_ND)
        loss, baseline, cosine = (self._sum(sums) / (VIEWS * self.total)).tolist()  # host sync: once per measurement
        gather, total = self._world.gather, self.total
        figures = {
            "health_loss": loss,
            "relative_loss": loss / max(baseline, 1e-12),
            "feature_std": float(squares.sqrt().mean()),
            "rank_me": rank_me(gather_features(tokens_BND.mean(dim=1), gather, total)),
            "lidar": lidar(gather_features(views_BQD, gather, total)),
            "context_cosine": cosine,
        }
        found = self._world.broadcast_object(figures)  # decisions follow, and they must agree
        assert isinstance(found, dict)
        return found

    def _views(self, engine: Engine, tokens_BND: Tensor, mean_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the views' features (B, Q, D), and this process's sums of loss, baseline's loss and cosine."""
        features: list[Tensor] = []
        sums = torch.zeros(3, device=tokens_BND.device)
        for rows in self._chunks():
            views = []
            count = max(0, min(len(rows), self._num_own - rows.start))
            for view in range(VIEWS):
                masks = self._masks_of(view, rows)
                both = engine.evaluate(self._part(rows), masks, True)
                prediction, context = both[0].float(), both[1].float().unflatten(0, (-1, len(rows)))  # (E, B, K, D)
                views.append(context.mean(dim=(0, 2)))
                if count:
                    tokens = tokens_BND[rows.start : rows.start + count]
                    prediction = prediction.unflatten(0, (-1, len(rows)))[:, :count].flatten(0, 1)
                    masks = DenseMasks(masks.context[:, :count], masks.targets[:, :count])
                    figures = self._compare(prediction, context[:, :count], tokens, masks, mean_ND)
                    sums += count * torch.stack(figures)
            features.append(torch.stack(views, dim=1))
        return torch.cat(features), sums

    def _compare(
        self, prediction: Tensor, context: Tensor, tokens: Tensor, masks: DenseMasks, mean_ND: Tensor
    ) -> list[Tensor]:
        """Returns loss, baseline's loss and cosine of some images, () each."""
        num_blocks, count, _ = masks.context.shape
        everywhere = torch.arange(self._num_patches, device=tokens.device).expand(count, -1)
        wanted = Wanted(everywhere, target_index(masks, self._num_patches))
        baseline = mean_ND[masks.targets][:, None].expand(-1, num_blocks, -1, -1, -1).flatten(0, 2)
        losses = [self._objective(guess, tokens, masks, wanted) for guess in (prediction, baseline)]
        images = torch.arange(count, device=tokens.device)[:, None]
        kept = normalise_targets(tokens)[images, masks.context]  # (E, B, K, D)
        return [*losses, cosine_similarity(normalise_targets(context), kept, dim=-1).mean()]

    def _chunks(self) -> Iterator[range]:
        """Yields this process's rows of the images; every process has as many chunks, as sharded engines need."""
        for start in range(0, len(self._images), self._chunk):
            yield range(start, min(start + self._chunk, len(self._images)))

    def _part(self, rows: range) -> Tensor:
        return self._images[rows.start : rows.stop].to(self._world.device)

    def _masks_of(self, view: int, rows: range) -> DenseMasks:
        chosen = torch.tensor(self._rows[rows.start : rows.stop])
        return self._masks[view].map(lambda tensor: tensor[:, chosen].to(self._world.device))

    def _sum(self, tensor: Tensor) -> Tensor:
        return self._world.gather(tensor).sum(dim=0)


def _read(source: SampleSource, name: str, most: int, images: ImageSettings, world: World) -> tuple[Tensor, int]:
    """Returns this process's images (B, C, h, w), and the number of different ones of all processes. Communicates.

    Images that can't be decoded are left out, and named.
    """
    ids = spread(source.num_samples, most)
    while len(ids) >= _FEWEST:
        part, bad = read_usable(
            source,
            images.size,
            local_ids(ids, world.rank, world.size),
            mean=images.mean,
            std=images.std,
            exif=images.exif,
            pixels=images.pixels,
        )
        every: dict[int, str] = {}
        for found in world.gather_objects(bad):
            assert isinstance(found, dict)
            every |= found
        if not every:
            return torch.cat(part), len(ids)
        if world.is_main:
            shown = "; ".join(list(every.values())[:_NAMED])
            logger.warning("health leaves out %d of %d images of %s: %s", len(every), len(ids), name, shown)
        ids = ids[~np.isin(ids, list(every))]
    raise DataError(
        f"{name}: {counted(len(ids), 'image')} can be used; health needs at least {_FEWEST}, or set health.every=0"
    )
