"""Evaluates a trained encoder on labelled images by kNN, linear probe, logistic regression and few-shot classification.

python launch/evaluate.py runs/mine --data photos/train photos/val --protocol knn logistic
python launch/evaluate.py IN1K-vit.h.14-300e.pth.tar --data imagenet/train imagenet/val --to runs/h14-evaluation
torchrun --nproc-per-node 8 launch/evaluate.py timm:vit_huge_patch14_gap_224.in1k_ijepa --data TRAIN VAL
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch

from ijepa_scale.config import EngineConfig
from ijepa_scale.environment import Launch
from ijepa_scale.evaluate.offline import EvaluationRequest, evaluate_encoder
from ijepa_scale.evaluate.protocols import PROTOCOLS
from ijepa_scale.registry import SOURCES
from ijepa_scale.train import processes


def main(request: EvaluationRequest, launch: Launch, device: torch.device) -> None:
    """Evaluates in this process of the run, and prints the table on the main one."""
    level = logging.INFO if launch.rank == 0 else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s")
    with processes.world_of(launch, device, alone=True) as world:
        results = evaluate_encoder(request, world)
        if results is not None:
            print(results.text(), "", *results.write(request.folder), sep="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="run folder, checkpoint, .pth.tar, .safetensors, or timm:NAME")
    parser.add_argument("--data", nargs=2, required=True, metavar=("TRAIN", "TEST"), help="labelled images")
    parser.add_argument("--reader", default="imagefolder", choices=SOURCES.names(), help="how they are stored")
    parser.add_argument("--protocol", nargs="+", default=list(PROTOCOLS), choices=PROTOCOLS, help="(default: all)")
    parser.add_argument("--weights", choices=["target", "context"], default="target", help="which encoder")
    parser.add_argument("--image-size", type=int, help="side of the images in pixels (default: as trained)")
    parser.add_argument("--heads", type=int, help="attention heads, if the source doesn't tell")
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 5, 10], help="images per class (default 1 5 10)")
    parser.add_argument("--epochs", type=int, default=50, help="of the linear probe (default 50)")
    parser.add_argument("--no-untrained", action="store_true", help="skip the same architecture at random weights")
    parser.add_argument("--to", type=Path, default=Path("runs/evaluation"), help="folder (default runs/evaluation)")
    parser.add_argument("--batch-size", type=int, default=64, help="images per process and forward (default 64)")
    parser.add_argument("--workers", type=int, default=2, help="decoding processes per process (default 2)")
    parser.add_argument("--processes", type=int, help="number of processes to start on this host")
    parser.add_argument("--seed", type=int, default=0, help="of classifiers and draws (default 0)")
    given = parser.parse_args()
    wanted = EvaluationRequest(
        source=given.source, train=given.data[0], test=given.data[1], protocols=tuple(given.protocol),
        reader=given.reader, which=given.weights, image_size=given.image_size, heads=given.heads, folder=given.to,
        batch_size=given.batch_size, workers=given.workers, seed=given.seed, shots=tuple(given.shots),
        epochs=given.epochs, untrained=not given.no_untrained,
    )  # fmt: skip
    processes.run(main, wanted, EngineConfig(), devices=None, processes=given.processes)
