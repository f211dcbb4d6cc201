"""Evaluates a trained encoder on images with labels, masks or depth maps.

python launch/evaluate.py runs/mine --data photos/train photos/val --protocol knn logistic
python launch/evaluate.py IN1K-vit.h.14-300e.pth.tar --data imagenet/train imagenet/val --to runs/h14
torchrun --nproc-per-node 8 launch/evaluate.py timm:vit_huge_patch14_gap_224.in1k_ijepa --data TRAIN VAL

Reference: docs/evaluation.md
"""

from __future__ import annotations

import sys
from functools import partial

from ijepa_scale import terminal
from ijepa_scale.config import EngineConfig
from ijepa_scale.evaluate.command_line import add_flags, request_of
from ijepa_scale.evaluate.dense.dense_evaluation import evaluate_dense
from ijepa_scale.evaluate.dense.dense_protocols import DENSE_PROTOCOLS
from ijepa_scale.evaluate.offline import evaluate_encoder, evaluate_here
from ijepa_scale.train import processes


@terminal.command
def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after a mistake that the user can fix."""
    parser = terminal.Parser(description=__doc__)
    add_flags(parser)
    parser.add_local_rank()
    flags = parser.parse_args(arguments)
    evaluate = evaluate_dense if {*flags.protocol} & {*DENSE_PROTOCOLS} else evaluate_encoder
    here = partial(evaluate_here, evaluate)
    processes.run(here, request_of(flags), EngineConfig(), devices=None, processes=flags.processes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
