"""Classifies images with a finetuned model and prints the most likely classes.

Skips and names files that can't be read, and then exits with code 2.

python launch/predict.py PHOTO.jpg OTHER.png --model runs/finetune
python launch/predict.py FOLDER --model runs/finetune --top 1
python launch/predict.py FOLDER --model runs/finetune/checkpoints/step-00006250 --device cuda:1

Reference: docs/finetuning.md
"""

from __future__ import annotations

import sys

import torch

from ijepa_scale import terminal
from ijepa_scale.data.class_names import written
from ijepa_scale.errors import DataError
from ijepa_scale.evaluate.predictions import ImageClassifier, ImageFiles


@terminal.command
def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after a mistake that the user can fix or if an image was skipped."""
    parser = terminal.Parser(description=__doc__)
    add = parser.add_argument
    add("images", nargs="+", type=terminal.existing_path, help="image files, or folders of them")
    model = "folder of a finetuning run, or one of its checkpoints"
    add("--model", required=True, type=terminal.path, help=model)
    add("--top", type=terminal.at_least_1, default=5, help="number of classes to print for each image (default 5)")
    add("--device", help="cpu or cuda:N (default: a GPU if there is one)")
    parser.add_plugins()
    options = parser.parse_args(arguments)
    predictor = ImageClassifier(options.model, options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    found = ImageFiles(options.images)
    for line in (*found.problems, *found.passed_over):
        terminal.report(line, "")
    skipped = len(found.problems)
    for path in found.files:
        try:
            image = predictor.load(path)
        except DataError as error:
            terminal.report(error, "skipped")
            skipped += 1
            continue
        (guesses,) = predictor(image[None], top=options.top)
        lines = (f"  {guess.probability:6.1%}  {written(guess.name)}" for guess in guesses)
        terminal.say(written(path), *lines)
    if skipped:
        what = "image or folder" if skipped == 1 else "images or folders"
        terminal.report(f"skipped {skipped} {what}; replace or drop those named above")
    return 2 if skipped else 0


if __name__ == "__main__":
    sys.exit(main())
