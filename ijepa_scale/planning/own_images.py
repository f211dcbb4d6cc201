"""The recipe `own_images`: chooses settings from the number and size of the images and from the machine.

Only rules, with their reasons. Must not read images or query devices: `Facts` holds what was found.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ijepa_scale.config.architectures import ARCHITECTURES, resolve
from ijepa_scale.config.pixels import RGB8, PixelFormat
from ijepa_scale.config.schema import BlockMaskConfig, ModelConfig
from ijepa_scale.config.yaml_text import flat, plain
from ijepa_scale.planning.devices import Device
from ijepa_scale.planning.footprint import largest_micro_batch
from ijepa_scale.planning.spread import Spread
from ijepa_scale.planning.strategy import choose_strategy
from ijepa_scale.plurals import counted

# Size and learning rate of the published runs' batch, which the paper's appendix A.1 states
PUBLISHED_BATCH, PUBLISHED_LR = 2048, 1e-3
PUBLISHED_PATCHES = 14  # along a side, of the published runs at 224 pixels with patches of 16
_CPU_PATCHES = 8  # along a side: a third of the published tokens
_SIZES = (32, 64, 96, 128, 224)  # pixels
_LARGEST_SIZE = {"cpu": 96, "cuda": 224}
_ENLARGED = 1.25  # times that an image of the usual size may be enlarged
_MODELS = ((50_000, "vit_small"), (500_000, "vit_base"), (3_000_000, "vit_large"))  # below this many images
_STEPS = {"cpu": (100, 1_000, 3_000), "cuda": (300, 20_000, 300_000)}  # epochs, then the fewest and the most steps
_LARGEST_BATCH = {"cpu": 64, "cuda": PUBLISHED_BATCH}
_FEWEST_AT_ONCE = 16  # images on a GPU, for its products to be worth their start
_SHORT_RUN = 5_000  # steps
_STEPS_OF_AN_EPOCH = 10  # that a batch leaves, if there are as many images


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of the images and of the machine."""

    images: int
    shorter_side: int  # pixels, the median of a few images
    pixels: PixelFormat = RGB8  # as a few images store them, where that isn't what becomes 8-bit RGB
    reader: str = "imagefolder"  # that suits the images
    processes: int
    processes_per_host: int
    cores: int  # of this host, that the run may use
    device: str  # cpu | cuda
    device_name: str = "CPU"
    memory_bytes: float = 0.0  # of one device; cuda only
    has_bf16: bool = False


class Choice(NamedTuple):
    """A setting that a rule chose."""

    key: str  # dotted
    value: Any
    reason: str


def choose(facts: Facts, given: Mapping[str, Any]) -> list[Choice]:
    """Returns the settings that no file and no override sets. `given` holds those that one does, nested.

    Raises:
        ConfigError: what is given can't be used, so nothing can be chosen to go with it.
    """
    rules = _Rules(facts, {key: plain(value) for key, value in flat(given).items()})
    rules.choose_all()
    return rules.choices


class _Rules:
    """The settings so far. Each rule reads what those before it chose."""

    def __init__(self, facts: Facts, given: dict[str, Any]) -> None:
        self.facts, self.values, self.choices = facts, given, list[Choice]()

    def choose_all(self) -> None:
        for rule in (
            self._reader, self._format, self._image_size, self._patch_size, self._model, self._predictor, self._batch,
            self._precision, self._accumulation, self._masks, self._length, self._rates, self._momentum, self._host,
        ):  # fmt: skip
            for choice in rule():
                self.values[choice.key] = choice.value
                self.choices.append(choice)

    def _has(self, *keys: str) -> bool:
        return any(self.values.get(key) is not None for key in keys)

    def model(self, **changes: Any) -> ModelConfig:
        """Returns the model section as it is so far."""
        named = {key.partition(".")[2]: value for key, value in self.values.items() if key.startswith("model.")}
        return ModelConfig(**{**named, **changes})

    def _reader(self) -> Iterator[Choice]:
        if not self._has("data.reader"):
            yield Choice("data.reader", self.facts.reader, "by what data.train names")

    def _format(self) -> Iterator[Choice]:
        found = self.facts.pixels
        for key, value, usual in (
            ("model.channels", found.channels, RGB8.channels), ("data.pixels", found.dtype, RGB8.dtype),
        ):  # fmt: skip
            if value != usual and not self._has(key):
                yield Choice(key, value, f"a few images were looked at, and all have {found}")

    def _image_size(self) -> Iterator[Choice]:
        if self._has("model.image_size"):
            return
        most, side = _LARGEST_SIZE[self.facts.device], self.facts.shorter_side
        size = max([size for size in _SIZES if size <= min(most, _ENLARGED * side)], default=_SIZES[0])
        if (patch := self.values.get("model.patch_size")) is not None:
            size = max(patch, size // patch * patch)
        why = f"images are {side} pixels at their shorter side"
        if _ENLARGED * side >= most:
            why += f", and {most} is the most that is chosen on a {self._machine}"
        yield Choice("model.image_size", size, why)

    def _patch_size(self) -> Iterator[Choice]:
        if self._has("model.patch_size"):
            return
        size = self.values["model.image_size"]
        sides = size if isinstance(size, (list, tuple)) else [size]
        common = math.gcd(*sides)
        patches = [patch for patch in range(1, common + 1) if common % patch == 0]
        wanted = PUBLISHED_PATCHES if self.facts.device == "cuda" else _CPU_PATCHES
        patch = min(patches, key=lambda patch: abs(math.log(min(sides) / patch / wanted)))
        yield Choice(
            "model.patch_size", patch, f"{min(sides) // patch} patches along a side, of about {wanted} that are meant"
        )

    def _model(self) -> Iterator[Choice]:
        if self._has("model.name"):
            return
        facts = self.facts
        if facts.device == "cpu":
            yield Choice("model.name", "vit_tiny", "the smallest, since a CPU trains it")
            return
        name = next((name for most, name in _MODELS if facts.images < most), "vit_huge")
        why = f"{self._images}: the paper trains vit_huge on 1.28 and 14 million, fewer suffice for less"
        names = list(ARCHITECTURES)
        while name != names[0] and self._at_once(self.model(name=name), _FEWEST_AT_ONCE) < _FEWEST_AT_ONCE:
            name = names[names.index(name) - 1]
            why = f"the largest of which {_FEWEST_AT_ONCE} images fit on a {self._machine} at once"
        yield Choice("model.name", name, why)

    def _predictor(self) -> Iterator[Choice]:
        sizes = resolve(self.model())
        if not self._has("model.predictor_width") and sizes.width // 2 < sizes.predictor_width:
            width = math.lcm(sizes.heads, 4) * max(1, sizes.width // 2 // math.lcm(sizes.heads, 4))
            why = f"about half of the encoder's {sizes.width}; the published {sizes.predictor_width} are for wider ones"
            yield Choice("model.predictor_width", width, why)

    def _batch(self) -> Iterator[Choice]:
        if self._has("data.batch_size", "data.batch_size_per_process"):
            return
        facts, most = self.facts, _LARGEST_BATCH[self.facts.device]
        wanted = min(most, 1 << max(0, (facts.images // _STEPS_OF_AN_EPOCH).bit_length() - 1))
        batch = max(1, wanted // facts.processes) * facts.processes
        why = (
            f"the published one, for {self._images}" if wanted == PUBLISHED_BATCH
            else f"the most that is chosen on a {self._machine}" if wanted == most
            else f"the least, for only {self._images}" if facts.images < _STEPS_OF_AN_EPOCH
            else f"a power of two of which an epoch of {self._images} has ten or more"
        )  # fmt: skip
        yield Choice("data.batch_size", batch, why + self._for_processes)

    @property
    def _images(self) -> str:
        return counted(self.facts.images, "image", ",")

    @property
    def batch(self) -> int:
        """Images of a step, over all processes."""
        each = self.values.get("data.batch_size_per_process")
        return self.facts.processes * each if each is not None else self.values["data.batch_size"]

    def _precision(self) -> Iterator[Choice]:
        if self._has("engine.precision"):
            return
        if self.facts.has_bf16:
            yield Choice("engine.precision", "bf16", f"a {self._machine} has it")
        else:
            yield Choice("engine.precision", "fp32", f"bf16 gains nothing on a {self._machine}")

    def _accumulation(self) -> Iterator[Choice]:
        share = self.batch // self.facts.processes
        if self._has("engine.accumulation") or self.facts.device == "cpu" or share < 1:
            return
        fits = max(1, self._at_once(self.model(), share))
        parts = next(parts for parts in range(1, share + 1) if share % parts == 0 and share // parts <= fits)
        yield Choice(
            "engine.accumulation", parts, f"{share // parts} images at once are estimated to fit on a {self._machine}"
        )

    def _at_once(self, model: ModelConfig, most: int) -> int:
        """Returns the number of images, `most` or fewer, that fit on a GPU at once."""
        facts = self.facts
        masks = BlockMaskConfig(min_keep=_min_keep(model), group_size=max(1, min(128, most)))
        precision = self.values.get("engine.precision") or ("bf16" if facts.has_bf16 else "fp32")
        chosen = choose_strategy(
            model, world=facts.processes, processes_per_node=facts.processes_per_host, device="cuda",
            device_memory_bytes=facts.memory_bytes, precision=precision,
        )  # fmt: skip
        spread = Spread(
            strategy=chosen.strategy, world=facts.processes, local=facts.processes_per_host, precision=precision,
            replicas=chosen.replicas, reshard_after_forward=chosen.reshard_after_forward,
        )  # fmt: skip
        device = Device(facts.device_name, facts.device_name, facts.memory_bytes, 1.0, 1.0, 1.0)
        mode = self.values.get("engine.checkpointing", "none")
        return largest_micro_batch(
            model, masks, spread, checkpointing=mode, device=device, batch_size=most * facts.processes
        )

    def _masks(self) -> Iterator[Choice]:
        model = self.model()
        down, across = model.grid
        if not self._has("masks.min_keep"):
            why = f"a grid of {down} x {across} patches; the published 10 are for {PUBLISHED_PATCHES} x "
            yield Choice("masks.min_keep", _min_keep(model), why + f"{PUBLISHED_PATCHES} and more")
        if not self._has("masks.group_size"):
            parts = self.values.get("engine.accumulation", 1)
            size = max(1, min(128, self.batch // self.facts.processes // parts))
            yield Choice("masks.group_size", size, "images of a process at once, up to the published 128")

    def _length(self) -> Iterator[Choice]:
        per_epoch = self.values.get("schedule.steps_per_epoch") or max(1, self.facts.images // max(1, self.batch))
        usual, fewest, most = _STEPS[self.facts.device]
        if not self._has("schedule.epochs"):
            steps = min(most, max(fewest, usual * per_epoch))
            limit = {fewest: " at least", most: " at most"}.get(steps, "")
            why = f"{counted(steps, 'step', ',')}{limit} on a {self._machine}; {usual} epochs are {usual * per_epoch:,}"
            yield Choice("schedule.epochs", math.ceil(1e4 * steps / per_epoch) / 1e4, why)
        if not self._has("schedule.warmup_epochs"):
            warmup = min(40.0, 0.1 * float(self.values["schedule.epochs"]))
            yield Choice(
                "schedule.warmup_epochs", float(f"{warmup:.6g}"), "a tenth of the epochs, up to the paper's 40"
            )
        steps = int(float(self.values["schedule.epochs"]) * per_epoch)
        self.steps = max(1, steps)
        if not self._has("checkpoint.every"):
            every = max(50, min(1_000, self.steps // 20))
            yield Choice("checkpoint.every", every, "a twentieth of the run, from 50 to 1,000 steps")

    def _rates(self) -> Iterator[Choice]:
        if not self._has("optimizer.lr"):
            lr = PUBLISHED_LR * math.sqrt(self.batch / PUBLISHED_BATCH)
            why = (
                f"{PUBLISHED_LR:g} at a batch of {PUBLISHED_BATCH}, by the square root of the batch (arXiv 2205.10287)"
            )
            yield Choice("optimizer.lr", float(f"{lr:.3g}"), why)
        peak = float(self.values["optimizer.lr"])
        for key, share, words in (("start_lr", 0.2, "a fifth"), ("final_lr", 1e-3, "a thousandth")):
            if not self._has(f"optimizer.{key}"):
                yield Choice(f"optimizer.{key}", float(f"{peak * share:.3g}"), f"{words} of optimizer.lr, as published")

    def _momentum(self) -> Iterator[Choice]:
        if self._has("schedule.momentum"):
            return
        if self.steps < _SHORT_RUN:
            yield Choice(
                "schedule.momentum", [0.998, 1.0], f"a run of {self.steps:,} steps learns more from a slower target"
            )
        else:
            yield Choice("schedule.momentum", [0.996, 1.0], "as published")

    def _host(self) -> Iterator[Choice]:
        if not self._has("data.workers"):
            facts = self.facts
            workers = max(0, min(12, facts.cores // facts.processes_per_host - 1))
            training = _plural(facts.processes_per_host, "process")
            why = f"{_plural(facts.cores, 'core')} for {training} training, up to 12 each"
            yield Choice("data.workers", workers, why)

    @property
    def _machine(self) -> str:
        return self.facts.device_name

    @property
    def _for_processes(self) -> str:
        count = self.facts.processes
        return f", divided over {count} processes" if count > 1 else ""


def _plural(count: int, name: str) -> str:
    return f"{count} {name if count == 1 else name + ('es' if name.endswith('s') else 's')}"


def _min_keep(model: ModelConfig) -> int:
    """Returns what a block must exceed: the published 10 on 14 x 14 patches and more, and fewer on fewer."""
    down, across = model.grid
    return min(10, down * across // 19)
