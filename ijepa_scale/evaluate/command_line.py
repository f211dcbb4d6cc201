"""The flags of launch/evaluate.py."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TypeVar

from ijepa_scale import terminal
from ijepa_scale.evaluate.dense.dense_protocols import DENSE_PROTOCOLS
from ijepa_scale.evaluate.labelled_sets import Named
from ijepa_scale.evaluate.offline import ALL, USUAL, EvaluationRequest
from ijepa_scale.registry import SOURCES

T = TypeVar("T")


def add_flags(parser: terminal.Parser) -> None:
    """Adds all flags to a parser."""
    add = parser.add_argument
    add("source", type=terminal.existing_path, help="run, checkpoint, .pth.tar, .safetensors, published: or timm:NAME")
    add("--data", nargs=2, required=True, type=terminal.path, metavar=("TRAIN", "TEST"), help="images with answers")
    add("--reader", choices=SOURCES.names(), help="how the images are stored (default: by what TRAIN is)")
    add(
        "--transfer", nargs=3, action="append", default=[], metavar=("NAME", "TRAIN", "TEST"),
        help="another dataset, evaluated by kNN and logistic regression; can be repeated",
    )  # fmt: skip
    add(
        "--protocol", nargs="+", default=[*USUAL], choices=[*ALL, *DENSE_PROTOCOLS], help=f"(default {' '.join(USUAL)})"
    )
    add("--weights", choices=["target", "context"], default="target", help="which encoder (default target)")
    add("--image-size", type=terminal.at_least_1, help="side of the images in pixels (default: as trained)")
    add("--heads", type=terminal.at_least_1, help="attention heads, if the source doesn't say")
    add("--shots", type=terminal.at_least_1, nargs="+", default=[1, 5, 10], help="images per class (default 1 5 10)")
    add(
        "--subset", nargs="+", default=["1%"], metavar="SUBSET",
        help="what to finetune on: a share like 1%%, images per class like 5, or a text file with one name per line",
    )  # fmt: skip
    add("--seeds", type=terminal.at_least_1, default=3, help="number of low-shot draws (default 3)")
    add("--epochs", type=terminal.at_least_1, default=50, help="epochs of linear probes (default 50)")
    add("--classes", type=terminal.at_least_1, help="classes of masks (default: from classes.json or training masks)")
    add("--depth-scale", type=terminal.above_0, help="PNG depth maps: integer that means a depth of 1")
    add("--attentive-epochs", type=terminal.at_least_1, default=20, help="epochs of attentive probes (default 20)")
    add("--finetune-epochs", type=terminal.at_least_1, default=50, help="epochs of lowshot-finetune (default 50)")
    add("--token-gb", type=float, default=16.0, help="limit for stored tokens; more are recomputed (default 16)")
    add("--no-untrained", dest="untrained", action="store_false", help="skip the encoder with random weights")
    add("--to", dest="folder", type=terminal.path, default="runs/evaluation", help="output (default runs/evaluation)")
    add("--batch-size", type=terminal.at_least_1, default=64, help="images per process and forward pass (default 64)")
    add("--workers", type=terminal.at_least_0, default=2, help="decoding processes per process (default 2)")
    add("--overwrite", action="store_true", help="replace the table in the folder")
    add("--processes", type=terminal.at_least_1, help="number of processes to start on this host")
    add("--seed", type=int, default=0, help="seed of classifiers and draws (default 0)")
    parser.add_plugins()


def _once(given: list[T]) -> tuple[T, ...]:
    """Returns each value once, in the order given."""
    return tuple(dict.fromkeys(given))


def request_of(flags: argparse.Namespace) -> EvaluationRequest:
    """Returns what the flags ask for.

    Raises:
        argparse.ArgumentTypeError: a path can't be expanded.
    """
    train, test = flags.data
    same = ("source", "reader", "image_size", "heads", "seeds", "epochs", "attentive_epochs", "finetune_epochs",
            "classes", "depth_scale", "token_gb", "untrained", "batch_size", "workers", "overwrite",
            "seed")  # fmt: skip
    return EvaluationRequest(
        train=train, test=test, which=flags.weights, folder=Path(flags.folder), protocols=_once(flags.protocol),
        shots=_once(flags.shots), subsets=_once(flags.subset),
        transfer=tuple(Named(name, terminal.path(one), terminal.path(other)) for name, one, other in flags.transfer),
        **{name: getattr(flags, name) for name in same},
    )  # fmt: skip
