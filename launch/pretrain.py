"""Pretrains I-JEPA.

python launch/pretrain.py --config configs/demo.yaml optimizer.lr=1e-3
python launch/pretrain.py --config C.yaml --devices cuda:0 cuda:1
torchrun --nproc-per-node 8 launch/pretrain.py --config C.yaml
deepspeed launch/pretrain.py --config C.yaml engine.ds_config=ds_configs/zero3.json
srun --kill-on-bad-exit --ntasks-per-node 8 python launch/pretrain.py --config C.yaml
"""

import argparse
import logging

import torch

from ijepa_scale.config import PretrainConfig, read_config, to_yaml
from ijepa_scale.environment import Launch
from ijepa_scale.train import processes
from ijepa_scale.train.pretrain import pretrain
from ijepa_scale.train.setup import with_strategy


def main(config: PretrainConfig, launch: Launch, device: torch.device) -> None:
    """Pretrains in this process, one of the run's."""
    level = logging.INFO if launch.rank == 0 else logging.WARNING
    logging.basicConfig(level=level, format=f"[{launch.rank}] %(name)s: %(message)s")
    config = with_strategy(config, launch, device)
    with processes.world_of(launch, device, alone=config.engine.strategy == "plain") as world:
        result = pretrain(config, world)
        if world.is_main:
            knn = "" if result.knn is None else f", kNN {result.knn:.1%} (untrained {result.knn_untrained or 0:.1%})"
            loss = "no step was left to take" if result.loss is None else f"loss {result.loss:.4f}"
            print(f"done: {result.steps} steps, {loss}{knn}; {result.checkpoint}")


def parse() -> argparse.Namespace:
    """Returns the command line's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", "--fname", required=True, help="YAML file, ours or a published one")
    parser.add_argument("--devices", nargs="+", help="start one process per device, e.g. cuda:0 cuda:1")
    parser.add_argument("--processes", type=int, help="start that many processes on this host")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # appended by the deepspeed launcher
    parser.add_argument("overrides", nargs="*", help="dotted settings, e.g. optimizer.lr=1e-3 data.workers=8")
    flags = parser.parse_intermixed_args()
    flags.overrides += [word for word in flags.devices or () if "=" in word]  # --devices takes all that follows
    flags.devices = [word for word in flags.devices or () if "=" not in word] or None
    return flags


if __name__ == "__main__":
    flags = parse()
    with processes.user_errors(0):
        loaded = read_config(flags.config, flags.overrides, kind=PretrainConfig)
    if flags.print_config:
        print("\n".join([*(f"# {note}" for note in loaded.notes), to_yaml(loaded.config)]))
    else:
        processes.run(main, loaded.config, loaded.config.engine, devices=flags.devices, processes=flags.processes)
