"""Plans a run of pretraining or finetuning before it is launched: memory, communication, time and strategy.

python launch/plan.py --config configs/in1k_vith14_ep300.yaml --gpus 8x a100-80gb
python launch/plan.py --config C.yaml --gpus 16x h100 --network 25 --mfu 0.4 engine.checkpointing=full
python launch/plan.py --config C.yaml --gpus h200 --json
"""

from __future__ import annotations

import contextlib
import json
import sys

from ijepa_scale import terminal
from ijepa_scale.planning.devices import GPUS_PER_NODE, Cluster, parse_gpus
from ijepa_scale.planning.finetune_plan import plan_run
from ijepa_scale.planning.plan_text import plan_json, plan_text
from ijepa_scale.planning.reading import read_planned
from ijepa_scale.train.initial import with_init_to_plan


@terminal.command
def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for an impossible run or a mistake that the user can fix."""
    parser = terminal.Parser(description=__doc__)
    config_help = "YAML file of this package or in the published layout"
    parser.add_argument("--config", "--fname", type=terminal.path, required=True, help=config_help)
    parser.add_argument("--gpus", nargs="+", required=True, help="number and kind of GPUs, such as 8x a100-80gb")
    parser.add_argument("--gpus-per-node", type=int, default=GPUS_PER_NODE, help=f"(default {GPUS_PER_NODE})")
    network = "GB/s per GPU and direction between nodes (default: usual for the GPU, e.g. 25 for A100, 50 for H100)"
    parser.add_argument("--network", type=float, help=network)
    parser.add_argument("--mfu", type=float, help="share of the peak FLOP/s (default: estimated)")
    parser.add_argument("--images", type=int, help="number of training images (default: ImageNet-1k's or -22k's)")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_plugins()
    parser.add_argument("overrides", nargs="*", help="dotted settings, e.g. engine.accumulation=4")
    flags = parser.parse_intermixed_args(arguments)
    overrides = flags.overrides + [
        word for word in flags.gpus if "=" in word
    ]  # --gpus also collects the words after it
    config = with_init_to_plan(read_planned(flags.config, overrides))
    count, device = parse_gpus(" ".join(word for word in flags.gpus if "=" not in word))
    network_bandwidth = device.network_bandwidth if flags.network is None else flags.network * 1e9
    cluster = Cluster(device, count, flags.gpus_per_node, network_bandwidth)
    zero = None
    if config.engine.ds_config is not None:
        with contextlib.redirect_stdout(sys.stderr):  # deepspeed logs to standard output when it is imported
            from ijepa_scale.engine.ds_config import load_ds_config

            zero = load_ds_config(config.engine.ds_config)["zero_optimization"]
    result = plan_run(config, cluster, mfu=flags.mfu, num_images=flags.images, zero=zero)
    print(json.dumps(plan_json(result), indent=2) if flags.json else plan_text(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
