"""Rebuilds a step of a pretraining run: its images with their masks, the loss of each, and gradient norms by block.

python launch/replay.py runs/mine --step 1234             # with the weights of the newest checkpoint before
python launch/replay.py runs/mine --step 1234 --exact     # with exactly its weights: repeats the steps in between
torchrun --nproc-per-node 8 launch/replay.py runs/mine --step 1234 --exact

Reference: docs/reliability.md
"""

from __future__ import annotations

from pathlib import Path

from ijepa_scale import environment, terminal
from ijepa_scale.train import processes
from ijepa_scale.train.replay import options_of, replay_here


def main() -> None:
    """Replays in each process, and exits with code 2 after a mistake that the user can fix."""
    parser = terminal.Parser(description=__doc__)
    parser.add_plugins()
    parser.add_argument("run", type=terminal.path, help="folder of the run")
    parser.add_argument("--step", type=terminal.at_least_0, required=True, help="number of the step, from 0")
    parser.add_argument("--exact", action="store_true", help="repeat the steps since the checkpoint")
    parser.add_argument("--to", type=terminal.path, help="folder for batch.png and step.json (RUN/replay/step-...)")
    parser.add_argument("--processes", type=terminal.at_least_1, help="number of processes to start on this host")
    parser.add_argument("--devices", nargs="+", help="start one process per device, e.g. cuda:0 cuda:1")
    parser.add_argument("--set", nargs="+", default=[], metavar="SETTING=VALUE", help="e.g. engine.device=cpu")
    parser.add_local_rank()
    flags = parser.parse_args()
    with processes.user_errors(0):
        started = flags.processes or len(flags.devices or ()) or environment.detect_launch().world_size
        options = options_of(
            Path(flags.run), flags.step, exact=flags.exact, to=flags.to, started=started, overrides=flags.set
        )
    processes.run(replay_here, options, options.config.engine, devices=flags.devices, processes=flags.processes)


if __name__ == "__main__":
    with terminal.printing():
        main()
