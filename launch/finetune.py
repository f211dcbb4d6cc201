"""Finetunes a classifier from a pretrained encoder with the MAE recipe.

python launch/finetune.py --config configs/finetune/demo_finetune.yaml model.init=runs/demo
python launch/finetune.py --config C.yaml --devices cuda:0 cuda:1
torchrun --nproc-per-node 8 launch/finetune.py --config C.yaml
deepspeed launch/finetune.py --config C.yaml engine.ds_config=ds_configs/zero2.json
srun --kill-on-bad-exit --ntasks-per-node 8 python launch/finetune.py --config C.yaml
"""

import logging

import torch

from ijepa_scale.config.finetune_run import FinetuneConfig
from ijepa_scale.environment import Launch
from ijepa_scale.train import processes
from ijepa_scale.train.command import launch_from_command_line
from ijepa_scale.train.finetune import finetune
from ijepa_scale.train.setup import with_strategy


def main(config: FinetuneConfig, launch: Launch, device: torch.device) -> None:
    """Runs this process's part of the finetuning."""
    level = logging.INFO if launch.rank == 0 else logging.WARNING
    logging.basicConfig(level=level, format=f"[{launch.rank}] %(name)s: %(message)s")
    config = with_strategy(config, launch, device)
    with processes.world_of(launch, device, alone=config.engine.strategy == "plain") as world:
        result = finetune(config, world)
        if world.is_main:
            top = "" if result.top1 is None else f", top-1 {result.top1:.2%}, top-5 {result.top5 or 0:.2%}"
            best = "" if result.best_top1 is None else f" (best top-1 {result.best_top1:.2%})"
            loss = "no steps were left" if result.loss is None else f"loss {result.loss:.4f}"
            print(f"done: {result.steps} steps, {loss}{top}{best}; {result.checkpoint}")


if __name__ == "__main__":
    launch_from_command_line(__doc__ or "", FinetuneConfig, main)
