"""Classifies images with a finetuned model and prints the most likely classes.

Skips and names files that can't be read, and then exits with code 2.

python launch/predict.py PHOTO.jpg OTHER.png FOLDER --model runs/finetune
"""

from __future__ import annotations

import argparse
import io
import sys

import torch

from ijepa_scale.data.class_names import written
from ijepa_scale.errors import DataError, UserError
from ijepa_scale.evaluate.predictions import ImageClassifier, ImageFiles


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after a mistake that the user can fix or if an image was skipped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", help="image files, or folders of them")
    parser.add_argument("--model", required=True, help="folder of a finetuning run, or one of its checkpoints")
    parser.add_argument("--top", type=int, default=5, help="number of classes to print for each image (default 5)")
    parser.add_argument("--device", help="cpu or cuda:N (default: a GPU if there is one)")
    options = parser.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold any bytes
    try:
        device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        predictor = ImageClassifier(options.model, device)
        found = ImageFiles(options.images)
        for line in (*found.problems, *found.passed_over):
            print(line, file=sys.stderr)
        skipped = len(found.problems)
        for path in found.files:
            try:
                image = predictor.load(path)
            except DataError as error:
                print(f"skipped: {error}", file=sys.stderr)
                skipped += 1
                continue
            (guesses,) = predictor(image[None], top=max(1, options.top))
            lines = (f"  {guess.probability:6.1%}  {written(guess.name)}" for guess in guesses)
            print(written(path), *lines, sep="\n")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if skipped:
        print(f"error: skipped {skipped} images or folders; replace or drop those named above", file=sys.stderr)
    return 2 if skipped else 0


if __name__ == "__main__":
    sys.exit(main())
