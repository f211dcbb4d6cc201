"""Pretrains I-JEPA.

python launch/pretrain.py --config configs/demo.yaml optimizer.lr=1e-3
python launch/pretrain.py --config C.yaml --devices cuda:0 cuda:1
torchrun --nproc-per-node 8 launch/pretrain.py --config C.yaml
deepspeed launch/pretrain.py --config C.yaml engine.ds_config=ds_configs/zero3.json
srun --kill-on-bad-exit --ntasks-per-node 8 python launch/pretrain.py --config C.yaml
"""

import logging

import torch

from ijepa_scale.config import PretrainConfig
from ijepa_scale.environment import Launch
from ijepa_scale.train import processes
from ijepa_scale.train.command import launch_from_command_line
from ijepa_scale.train.pretrain import pretrain
from ijepa_scale.train.setup import with_strategy


def main(config: PretrainConfig, launch: Launch, device: torch.device) -> None:
    """Runs this process's part of the pretraining."""
    level = logging.INFO if launch.rank == 0 else logging.WARNING
    logging.basicConfig(level=level, format=f"[{launch.rank}] %(name)s: %(message)s")
    config = with_strategy(config, launch, device)
    with processes.world_of(launch, device, alone=config.engine.strategy == "plain") as world:
        result = pretrain(config, world)
        if world.is_main:
            knn = "" if result.knn is None else f", kNN {result.knn:.1%} (untrained {result.knn_untrained or 0:.1%})"
            loss = "no steps were left" if result.loss is None else f"loss {result.loss:.4f}"
            print(f"done: {result.steps} steps, {loss}{knn}; {result.checkpoint}")


if __name__ == "__main__":
    launch_from_command_line(__doc__ or "", PretrainConfig, main)
