"""Evaluates a trained encoder on images with labels, masks or depth maps, as the protocols of docs/evaluation.md say.

python launch/evaluate.py runs/mine --data photos/train photos/val --protocol knn logistic
python launch/evaluate.py IN1K-vit.h.14-300e.pth.tar --data imagenet/train imagenet/val --to runs/h14
torchrun --nproc-per-node 8 launch/evaluate.py timm:vit_huge_patch14_gap_224.in1k_ijepa --data TRAIN VAL
"""

from __future__ import annotations

import sys
from pathlib import Path

from ijepa_scale import terminal
from ijepa_scale.config import EngineConfig
from ijepa_scale.evaluate.dense.dense_evaluation import evaluate_dense_here
from ijepa_scale.evaluate.dense.dense_protocols import DENSE_PROTOCOLS
from ijepa_scale.evaluate.offline import EvaluationRequest, evaluate_here
from ijepa_scale.evaluate.protocols import PROTOCOLS
from ijepa_scale.registry import SOURCES
from ijepa_scale.train import processes


@terminal.command
def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after a mistake that the user can fix."""
    parser = terminal.Parser(description=__doc__)
    add = parser.add_argument
    add("source", type=terminal.existing_path, help="run folder, checkpoint, .pth.tar, .safetensors, or timm:NAME")
    add("--data", nargs=2, required=True, type=terminal.path, metavar=("TRAIN", "TEST"), help="images and answers")
    add("--reader", choices=SOURCES.names(), help="how they are stored (default: by what TRAIN is)")
    every = [*PROTOCOLS, *DENSE_PROTOCOLS]
    add("--protocol", nargs="+", default=[*PROTOCOLS], choices=every, help="(default: all that need labels)")
    add("--weights", choices=["target", "context"], default="target", help="which encoder (default target)")
    add("--image-size", type=terminal.at_least_1, help="side of the images in pixels (default: as trained)")
    add("--heads", type=terminal.at_least_1, help="attention heads, if the source doesn't tell")
    add("--shots", type=terminal.at_least_1, nargs="+", default=[1, 5, 10], help="per class (default 1 5 10)")
    add("--epochs", type=terminal.at_least_1, default=50, help="of linear probes (default 50)")
    add("--classes", type=terminal.at_least_1, help="of masks (default: classes.json, or by the training masks)")
    add("--depth-scale", type=terminal.above_0, help="integer that stands for a depth of 1, of depth maps in PNG")
    add("--no-untrained", dest="untrained", action="store_false", help="skip the encoder at random weights")
    add("--to", dest="folder", type=terminal.path, default="runs/evaluation", help="folder (default runs/evaluation)")
    add("--batch-size", type=terminal.at_least_1, default=64, help="images per process and forward (default 64)")
    add("--workers", type=int, default=2, help="decoding processes per process (default 2)")
    add("--overwrite", action="store_true", help="replace the table in the folder")
    add("--processes", type=terminal.at_least_1, help="number of processes to start on this host")
    add("--seed", type=int, default=0, help="of classifiers and draws (default 0)")
    parser.add_plugins()
    given = vars(parser.parse_args(arguments))
    count, _ = given.pop("processes"), given.pop("plugin")
    train, test = given.pop("data")
    given |= {"protocols": tuple(given.pop("protocol")), "which": given.pop("weights"), "shots": tuple(given["shots"])}
    request = EvaluationRequest(**given | {"train": train, "test": test, "folder": Path(given["folder"])})
    here = evaluate_here if {*request.protocols} <= {*PROTOCOLS} else evaluate_dense_here
    processes.run(here, request, EngineConfig(), devices=None, processes=count)
    return 0


if __name__ == "__main__":
    sys.exit(main())
