"""Plans a pretraining or finetuning run before you launch it: memory, communication, time and strategy.

python launch/plan.py --config configs/in1k_vith14_ep300.yaml --gpus 8x a100-80gb
python launch/plan.py --config C.yaml --gpus 16x h100 --network 25 --mfu 0.4 engine.checkpointing=full
python launch/plan.py --config C.yaml --gpus h200 --json
python launch/plan.py --config C.yaml --gpus 8x h100 --sweep nodes=1..128 --to scaling.png

Reference: docs/planning.md
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

from ijepa_scale import terminal
from ijepa_scale.planning.finetune_plan import plan_run
from ijepa_scale.planning.plan_flags import add_flags, request_of
from ijepa_scale.planning.plan_text import plan_json, plan_text
from ijepa_scale.planning.sweep import sweep
from ijepa_scale.planning.sweep_text import draw_sweep, sweep_json, sweep_text
from ijepa_scale.train.initial import with_init_to_plan


@terminal.command
def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for an impossible run or a mistake that the user can fix."""
    parser = terminal.Parser(description=__doc__)
    add_flags(parser)
    flags = parser.parse_intermixed_args(arguments)
    asked = request_of(flags)
    config, assumed = with_init_to_plan(asked.config), asked.assumptions
    zero: dict[str, Any] | None = None
    if config.engine.ds_config is not None:
        with contextlib.redirect_stdout(sys.stderr):  # deepspeed logs to standard output when it is imported
            from ijepa_scale.engine.ds_config import load_ds_config

            zero = load_ds_config(config.engine.ds_config)["zero_optimization"]
    if asked.nodes is None:
        plan = plan_run(config, asked.cluster, mfu=assumed.mfu, num_images=assumed.num_images, zero=zero)
        print(json.dumps(plan_json(plan), indent=2) if flags.json else plan_text(plan))
        return 0
    found = sweep(config, asked.device, asked.nodes, assumed, gpus_per_node=asked.gpus_per_node, zero=zero)
    print(json.dumps(sweep_json(found), indent=2) if flags.json else sweep_text(found))
    if flags.to is not None:
        draw_sweep(found, flags.to)
    return 0


if __name__ == "__main__":
    sys.exit(main())
