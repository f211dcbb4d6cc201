"""The table of an evaluation, as text, JSON, Markdown and a picture. Knows nothing of encoders."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ijepa_scale.errors import ConfigError
from ijepa_scale.escapes import one_line
from ijepa_scale.evaluate.protocols import FINETUNED, Score
from ijepa_scale.evaluate.tables import as_markdown, as_text
from ijepa_scale.metrics.plots import BLUE, GREY, new_figure, save_figure

JSON, MARKDOWN, PICTURE = "evaluation.json", "evaluation.md", "evaluation.png"
_COLUMNS = ("protocol", "accuracy", "95% interval", "untrained", "published", "setting", "note")

# Top-1 accuracies in percent. Source: arXiv 2301.08243
_PUBLISHED = {
    ("vit_base", 16, 224): {"linear": 72.9},
    ("vit_large", 16, 224): {"linear": 77.5, "1% low-shot": 69.4},
    ("vit_huge", 14, 224): {"linear": 79.3, "1% low-shot": 73.3},
    ("vit_huge", 16, 448): {"linear": 81.1, "1% low-shot": 77.3},
}
_IMAGENET_CLASSES, _IMAGENET_TEST = 1000, 50_000


@dataclass(frozen=True, kw_only=True)
class Results:
    """Scores of an encoder and of the same architecture at random weights, in the same order."""

    facts: dict[str, Any]  # what was evaluated on what
    scores: list[Score]
    untrained: list[Score]
    published: dict[str, float]  # percent, by protocol

    def rows(self) -> list[tuple[str, ...]]:
        """Returns the table's rows as text, in the order of the columns."""
        without = {score.protocol: score for score in self.untrained}
        rows: list[tuple[str, ...]] = []
        for score in self.scores:
            reference = without.get(score.protocol)
            published = self.published.get(score.protocol.removesuffix(FINETUNED))
            rows.append(
                (
                    score.protocol,
                    f"{100 * score.accuracy:.2f}%",
                    f"{100 * score.low:.2f} - {100 * score.high:.2f}",
                    f"{100 * reference.accuracy:.2f}%" if reference else "",
                    f"{published:.1f}%" if published is not None else "",
                    score.setting,
                    score.note,
                )
            )
        return rows

    def text(self) -> str:
        """Returns the table as lines of text."""
        return as_text(_COLUMNS, self.rows())

    def markdown(self) -> str:
        """Returns the table in Markdown, with what was evaluated below it."""
        return as_markdown(_COLUMNS, self.rows(), self.facts)

    def write(self, folder: Path) -> list[Path]:
        """Writes the table as JSON, Markdown and a picture, and returns their paths."""
        content = {
            "facts": self.facts, "published": self.published,
            "scores": [asdict(score) for score in self.scores],
            "untrained": [asdict(score) for score in self.untrained],
        }  # fmt: skip
        return write_table(folder, content, self.markdown(), self._draw)

    def _draw(self, path: Path) -> Path:
        names = [score.protocol for score in self.scores]
        figure = new_figure(width=7.0, height=0.9 + 0.45 * len(names))
        axes = figure.subplots()
        for color, shift, scores, label in (
            (BLUE, -0.18, self.scores, "trained"), (GREY, 0.18, self.untrained, "same architecture, random weights"),
        ):  # fmt: skip
            places = [names.index(score.protocol) + shift for score in scores]
            axes.barh(places, [100 * score.accuracy for score in scores], height=0.34, color=color, label=label)
            # barh's xerr refuses negative lengths, and rounding can put the mean of equal draws outside them
            lows, highs = [100 * score.low for score in scores], [100 * score.high for score in scores]
            axes.hlines(places, lows, highs, colors="black", linewidth=1)
        axes.set_yticks(range(len(names)), [*map(one_line, names)], parse_math=False)
        axes.invert_yaxis()
        axes.set_xlabel("Accuracy on held-out images (%)")
        axes.grid(axis="x", alpha=0.3, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="lower right")
        return save_figure(figure, path)


def write_table(folder: Path, content: dict[str, Any], markdown: str, draw: Callable[[Path], Path]) -> list[Path]:
    """Writes the files of a table and returns their paths. The JSON file comes last, whole: it says that all is done.

    Raises:
        ConfigError: they can't be written.
    """
    try:
        picture = draw(folder / PICTURE)
        (folder / MARKDOWN).write_text(markdown, encoding="utf-8")
        unfinished = folder / f".unfinished-{JSON}"
        unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(unfinished, folder / JSON)
    except OSError as error:
        raise ConfigError(
            f"the table in {folder} can't be written ({error.strerror}); free space and run again: features are kept"
        ) from None
    return [folder / JSON, folder / MARKDOWN, picture]


def published_figures(
    name: str, patch_size: int, image_size: tuple[int, int], *, num_classes: int, num_test: int
) -> dict[str, float]:
    """Returns I-JEPA's published accuracies (percent, by protocol) where the encoder and ImageNet's set are theirs."""
    if (num_classes, num_test) != (_IMAGENET_CLASSES, _IMAGENET_TEST) or image_size[0] != image_size[1]:
        return {}
    return _PUBLISHED.get((name, patch_size, image_size[0]), {})
