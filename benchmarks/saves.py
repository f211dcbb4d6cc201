"""Question: how long does training wait for a checkpoint, written while it goes on or not?

python -m benchmarks.saves [--rounds 3] [--size vit_base] [--only ddp fsdp2 zero3] [--to FILE]

Trains an I-JEPA model of this size on 2 gloo processes of one thread, on small images, since the state's size doesn't
depend on them, and saves in turns as `checkpoint.asynchronous=false` and `=true` do. Prints the seconds in which copies
of the state are compared, those that training then waits, those until the checkpoint is there, and the time of a step
meanwhile over that of a step before. Then it counts,
from meta tensors, the bytes that each process of 8, 64 and 512 saves for ViT-H, and at the rates measured here what
training would wait for.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import Row, record, table
from ijepa_scale.checkpoint import store
from ijepa_scale.checkpoint.background import BackgroundSaves
from ijepa_scale.checkpoint.writing import parts_to_write
from ijepa_scale.config import AdamWConfig, BlockMaskConfig, EngineConfig, ModelConfig, RegressionConfig
from ijepa_scale.data.batch import Batch
from ijepa_scale.engine.build import build_engine
from ijepa_scale.engine.protocol import Piece
from ijepa_scale.engine.replicas import check_replicas
from ijepa_scale.engine.world import World
from ijepa_scale.masks import MaskSampler
from ijepa_scale.metrics.meters import Meters
from ijepa_scale.models.registry import build_jepa, build_target
from ijepa_scale.objectives.protocol import build_objective
from ijepa_scale.train.step import TrainStep
from tests.distributed.training import SCHEDULE

ENGINES = {
    "ddp": {"strategy": "ddp"},
    "fsdp2": {"strategy": "fsdp2"},
    "zero3": {"strategy": "deepspeed", "ds_config": "ds_configs/zero3.json"},
}
SIDE, BATCH = 96, 2


def _batch(step: int, world: World) -> Batch:
    size = BATCH // world.size
    images = np.random.default_rng(step).integers(0, 256, (size, SIDE, SIDE, 3), dtype=np.uint8)
    return Batch(
        pixels=torch.from_numpy(images).flatten(), sizes=np.full((size, 2), SIDE), sample_ids=np.arange(size),
        labels=torch.zeros(size, dtype=torch.int64), step=step, epoch=0, position=world.rank * size,
    )  # fmt: skip


def _images(batch: Batch) -> torch.Tensor:
    return (batch.pixels.view(-1, SIDE, SIDE, 3).permute(0, 3, 1, 2).float() / 63.75 - 2.0).contiguous()


def measure(world: World, engine: dict[str, Any], size: str, rounds: int, folder: str) -> list[Row]:
    """Returns a row for each save of this process: seconds waited and in all, and the times of steps."""
    config = ModelConfig(name=size, image_size=SIDE, patch_size=16)
    module = build_jepa(config, seed=3)
    target = build_target(module)
    built = build_engine(world, EngineConfig(**engine, precision="fp32"), AdamWConfig())
    built.prepare(module, target)
    step = TrainStep(
        built, augment=_images, masks=MaskSampler(BlockMaskConfig(min_keep=3, group_size=BATCH), config.grid, seed=5),
        schedule=SCHEDULE, objective=build_objective(RegressionConfig(), triton=()), batch_size=BATCH,
        meters=Meters(world.device),
    )  # fmt: skip
    saves, rows, done = BackgroundSaves(world), [], 0

    def take() -> float:
        nonlocal done
        world.barrier()
        begin = time.perf_counter()
        step(_batch(done, world))
        done += 1
        return time.perf_counter() - begin

    take()  # allocates
    for turn in range(rounds + 1):
        for asynchronous in (False, True) if turn % 2 == 0 else (True, False):
            before = [take() for _ in range(3)]
            world.barrier()
            begin = time.perf_counter()
            check_replicas(built.pieces(working=True), world)
            compared = time.perf_counter() - begin
            world.barrier()
            begin = time.perf_counter()
            if not asynchronous:
                store.save(Path(folder), done, built.pieces(), world=world, extra={}, keep=1)
                waited = total = time.perf_counter() - begin
                meanwhile = []
            else:
                ended: list[float] = []

                def end(_: Future[Path], ended: list[float] = ended) -> None:
                    ended.append(time.perf_counter())

                saves.start(Path(folder), done, built.pieces(), extra={}, keep=1, ended=end)
                waited = time.perf_counter() - begin
                meanwhile = []
                while world.any(saves.is_running):
                    meanwhile.append(take())
                saves.wait()
                total = ended[0] - begin
            if turn:  # the first round reserves memory
                rows.append({
                    "asynchronous": asynchronous, "waited_s": waited, "total_s": total, "compared_s": compared,
                    "step_s": statistics.median(before),
                    "step_meanwhile_s": statistics.mean(meanwhile) if meanwhile else None,
                    "bytes": sum(part.tensor.nbytes for part in parts_to_write(built.pieces())),
                })  # fmt: skip
    saves.close()
    return rows


def by_formula(copy_rate: float, write_rate: float) -> list[Row]:
    """Returns the bytes of ViT-H/14's state per process, and the seconds that they take at these bytes/s."""
    with torch.device("meta"):
        module = build_jepa(ModelConfig(name="vit_huge", image_size=224, patch_size=14), seed=0)
        states = [(value, 3) for value in module.parameters()]  # weight and two averages
        states += [(value, 1) for value in build_target(module).parameters()]
    rows: list[Row] = []
    for processes in (8, 64, 512):
        pieces = [
            Piece(name=str(number), tensor=value.detach().view(-1), start=0, shape=(value.numel(),), share=share)
            for number, (value, copies) in enumerate(states) for _ in range(copies)
            for share in [(processes - 1, processes)]
        ]  # fmt: skip
        share = sum(part.tensor.nbytes for part in parts_to_write(pieces))
        whole = sum(piece.tensor.nbytes for piece in pieces)
        rows.append({
            "processes": processes, "bytes": whole, "bytes_per_process": share,
            "waits_synchronous_s": share / write_rate, "waits_asynchronous_s": share / copy_rate,
            "waits_if_one_process_wrote_s": whole / write_rate,
        })  # fmt: skip
    return rows


def main() -> None:
    """Measures, counts, prints two tables and appends the rows."""
    from tests.distributed.harness import run

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="saves of each kind, after one that isn't counted")
    parser.add_argument("--size", default="vit_base", help="of the encoder (default: vit_base)")
    parser.add_argument("--only", nargs="*", default=list(ENGINES), choices=list(ENGINES), help="engines")
    parser.add_argument("--to", type=Path, help="file that the rows are appended to")
    options = parser.parse_args()
    lines, copy_rates, write_rates = [], [], []
    for name in options.only:
        with tempfile.TemporaryDirectory() as folder:
            found = run(measure, 2, ENGINES[name], options.size, options.rounds, folder)
        for asynchronous in (False, True):
            chosen = [row for rows in found for row in rows if row["asynchronous"] is asynchronous]
            waited, total, compared = (
                statistics.median(row[key] for row in chosen) for key in ("waited_s", "total_s", "compared_s")
            )
            slower = [row["step_meanwhile_s"] / row["step_s"] for row in chosen if row["step_meanwhile_s"]]
            size = max(row["bytes"] for row in chosen)
            (copy_rates if asynchronous else write_rates).append(size / waited)
            row = {
                "what": "measured", "engine": name, "size": options.size, "processes": 2, "asynchronous": asynchronous,
                "waited_s": waited, "total_s": total, "compared_s": compared, "bytes_per_process": size,
                "step_meanwhile_ratio": statistics.median(slower) if slower else None,
            }  # fmt: skip
            record(options.to, [row])
            ratio = f"{row['step_meanwhile_ratio']:.2f}" if slower else ""
            kind = "while training goes on" if asynchronous else "training waits"
            lines.append([name, kind, f"{size / 1e9:.2f}", f"{compared:.2f}", f"{waited:.2f}", f"{total:.1f}", ratio])
    print(table(["engine", "saved", "GB per process", "copies compared, s", "then training waits, s", "done after, s",
                 "step meanwhile / before"], lines))  # fmt: skip
    rows = by_formula(statistics.median(copy_rates), statistics.median(write_rates))
    record(options.to, ({"what": "counted", "size": "vit_huge", **row} for row in rows))
    print(f"\nViT-H/14, {rows[0]['bytes'] / 1e9:.1f} GB, at {statistics.median(copy_rates) / 1e9:.2f} GB/s copied and "
          f"{statistics.median(write_rates) / 1e9:.2f} GB/s hashed and written by each process:")  # fmt: skip
    print(table(["processes", "GB per process", "training waits, s", "if it waited for the files, s"], [
        [str(row["processes"]), f"{row['bytes_per_process'] / 1e9:.2f}", f"{row['waits_asynchronous_s']:.2f}",
         f"{row['waits_synchronous_s']:.1f}"] for row in rows
    ]))  # fmt: skip


if __name__ == "__main__":
    main()
