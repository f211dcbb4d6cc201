"""Classifies images with a finetuned model and prints the most likely classes.

python launch/predict.py PHOTO.jpg OTHER.png --model runs/finetune
"""

from __future__ import annotations

import argparse
import sys

import torch

from ijepa_scale.data.class_names import written
from ijepa_scale.errors import UserError
from ijepa_scale.evaluate.predictions import ImageClassifier


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after a mistake that the user can fix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", help="image files")
    parser.add_argument("--model", required=True, help="folder of a finetuning run, or one of its checkpoints")
    parser.add_argument("--top", type=int, default=5, help="number of classes to print for each image (default 5)")
    parser.add_argument("--device", help="cpu or cuda:N (default: a GPU if there is one)")
    options = parser.parse_args(arguments)
    try:
        device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        predictor = ImageClassifier(options.model, device)
        for path in options.images:
            (guesses,) = predictor(predictor.load(path)[None], top=max(1, options.top))
            print(written(path), *(f"  {guess.probability:6.1%}  {written(guess.name)}" for guess in guesses), sep="\n")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
