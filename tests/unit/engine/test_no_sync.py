"""A training step doesn't make the host wait for a GPU: it runs no operation that would, even here on the CPU."""

from __future__ import annotations

import functools
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ijepa_scale import masks
from ijepa_scale.config import AdamWConfig, BlockMaskConfig, EngineConfig, ModelConfig, RegressionConfig
from ijepa_scale.data.batch import Batch
from ijepa_scale.engine.build import build_engine
from ijepa_scale.engine.finite import FiniteWatch
from ijepa_scale.engine.world import World
from ijepa_scale.masks import MaskSampler
from ijepa_scale.metrics.meters import Meters
from ijepa_scale.models.registry import build_jepa, build_target
from ijepa_scale.objectives.protocol import build_objective
from ijepa_scale.optim.fused_tail import FusedTailAdamW
from ijepa_scale.optim.lars import LarsConfig
from ijepa_scale.schedules import Hyper
from ijepa_scale.train.step import TrainStep

WORLD = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
MODEL = ModelConfig(name="vit_tiny", image_size=32, patch_size=4, width=48, depth=2, predictor_depth=2)
# Operations that read device memory on the host, or whose output size only the device knows.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "unique_consecutive", "equal",
           "is_nonzero", "bincount", "repeat_interleave", "histc"}  # fmt: skip


# Methods that read values on the host. For host tensors, most of them run no operation that a dispatch mode could see.
READING = ("tolist", "cpu", "numpy", "item", "__array__")


class NoWaiting(TorchDispatchMode):
    """Raises if this thread runs an operation, or calls a method, that makes the host wait for the device."""

    def __enter__(self):
        self._thread = threading.get_ident()
        self._own = {name: vars(torch.Tensor).get(name) for name in READING}
        for name in READING:
            setattr(torch.Tensor, name, self._refusing(name, getattr(torch.Tensor, name)))
        return super().__enter__()

    def __exit__(self, *error):
        for name, own in self._own.items():
            delattr(torch.Tensor, name) if own is None else setattr(torch.Tensor, name, own)
        return super().__exit__(*error)

    def _refusing(self, name, method):
        @functools.wraps(method)
        def read(tensor, *args, **kwargs):
            here = threading.get_ident() == self._thread
            assert not here or _reads_the_host(sys._getframe(1)), f"{name} waits for the device"
            return method(tensor, *args, **kwargs)

        return read

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.rpartition("::")[2]
        assert name not in WAITING, f"{name} waits for the device"
        return function(*args, **(kwargs or {}))


def _reads_the_host(caller) -> bool:
    """Returns whether the caller reads host memory even on a GPU: drawing masks, and the last step's finite check."""
    drawing = Path(masks.__file__).parent in Path(caller.f_code.co_filename).parents
    return drawing or caller.f_code is FiniteWatch.settle.__code__


def a_step(late: bool, optimizer=None, **engine) -> tuple[TrainStep, Batch]:
    settings = EngineConfig(strategy="plain", precision="bf16", **engine)
    built = build_engine(WORLD, settings, optimizer or AdamWConfig())
    module = build_jepa(MODEL, seed=0)
    built.prepare(module, build_target(module))
    built._watch = FiniteWatch(WORLD, late=late)
    step = TrainStep(
        built,
        augment=lambda batch: batch.pixels.view(-1, 3, 32, 32).float(),
        masks=MaskSampler(BlockMaskConfig(min_keep=3, group_size=4, context="packed"), MODEL.grid, seed=0),
        schedule=lambda step: Hyper(lr=1e-3, weight_decay=0.1, momentum=0.99),
        objective=build_objective(RegressionConfig(), triton=built.triton),
        batch_size=4,
        meters=Meters("cpu"),
    )
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, 4 * 3 * 32 * 32, dtype=np.uint8))
    sizes = np.full((4, 2), 32)
    labels = torch.zeros(4, dtype=torch.int64)
    return step, Batch(pixels=pixels, sizes=sizes, sample_ids=np.arange(4), labels=labels, step=0, epoch=0, position=0)


@pytest.mark.parametrize(
    "engine",
    [
        {},
        {"accumulation": 2},
        {"checkpointing": "full"},
        {"target_precision": "fp8"},
        {"optimizer": LarsConfig()},
        {"optimizer": AdamWConfig(impl="fused_tail", clip_norm=1.0), "target_precision": "fp8"},
    ],
)
def test_a_step_does_not_wait_for_the_device(engine, monkeypatch) -> None:
    monkeypatch.setattr(FusedTailAdamW, "implementation", "eager")
    step, batch = a_step(late=True, **engine)
    step(batch)  # creates the optimiser's states, and draws the masks of the next step
    with NoWaiting():
        info = step(batch)
        step.by_block = True
        assert step(batch).block_norms is not None
    assert info.stopped == 0.0


def test_the_check_detects_a_wait() -> None:
    """Without `late` the step itself reads the finite check, so the test above can fail."""
    step, batch = a_step(late=False)
    assert step(batch).stopped is None
    with pytest.raises(AssertionError, match="tolist waits for the device") as caught, NoWaiting():
        step(batch)
    assert FiniteWatch.check.__code__ in [entry.frame.code.raw for entry in caught.traceback]
    assert step(batch).stopped is None, "outside `NoWaiting` nothing is refused"


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (lambda x: x.tolist(), "tolist"),
        (lambda x: x.cpu(), "cpu"),
        (lambda x: x.numpy(), "numpy"),
        (lambda x: x.item(), "item"),
        (np.asarray, "__array__"),
        (float, "_local_scalar_dense"),
        (torch.nonzero, "nonzero"),
    ],
)
def test_the_check_detects_each_kind_of_wait(read, name) -> None:
    value = torch.ones(())
    with pytest.raises(AssertionError, match=f"^{name} waits for the device"), NoWaiting():
        read(value)
    with NoWaiting(), ThreadPoolExecutor(max_workers=1) as other:
        assert other.submit(value.tolist).result() == 1.0, "other threads, which draw masks, may read values"
    read(value)
