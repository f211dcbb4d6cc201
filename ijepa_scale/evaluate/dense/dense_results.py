"""The table of a dense evaluation, as text, JSON, Markdown and a picture. Knows nothing of encoders."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ijepa_scale.evaluate.dense.dense_protocols import Measure
from ijepa_scale.evaluate.results import write_table
from ijepa_scale.evaluate.tables import as_markdown, as_text
from ijepa_scale.metrics.plots import BLUE, GREY, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = ("protocol", "measure", "value", "95% interval", "untrained", "setting", "note")
_CLASSES_SHOWN = 21  # on the terminal; the files have all


@dataclass(frozen=True, kw_only=True)
class DenseResults:
    """Figures of an encoder and of the same architecture at random weights."""

    facts: dict[str, Any]  # what was evaluated on what
    measures: list[Measure]
    untrained: list[Measure]
    classes: list[str] | None = None  # names

    def rows(self, *, most_classes: int | None = None) -> list[tuple[str, ...]]:
        """Returns the table's rows as text; without single classes if there are more than `most_classes`."""
        without = {_key(each): each for each in self.untrained}
        classes = len({each.of_class for each in self.measures} - {None})
        few = most_classes is None or classes <= most_classes
        return [
            (
                each.protocol,
                self._name(each),
                _shown(each, each.value),
                f"{_shown(each, each.low)} - {_shown(each, each.high)}",
                _shown(each, without[_key(each)].value) if _key(each) in without else "",
                each.setting if each.of_class is None else "",
                each.note if each.of_class is None else "",
            )
            for each in self.measures
            if few or each.of_class is None
        ]

    def text(self) -> str:
        """Returns the table as lines of text; without single classes if there are many."""
        return as_text(_COLUMNS, self.rows(most_classes=_CLASSES_SHOWN))

    def markdown(self) -> str:
        """Returns the table in Markdown, with what was evaluated below it."""
        return as_markdown(_COLUMNS, self.rows(), self.facts)

    def write(self, folder: Path) -> list[Path]:
        """Writes the table as JSON, Markdown and a picture, and returns their paths."""
        content = {
            "facts": self.facts, "classes": self.classes,
            "measures": [asdict(each) for each in self.measures],
            "untrained": [asdict(each) for each in self.untrained],
        }  # fmt: skip
        return write_table(folder, content, self.markdown(), self._draw)

    def _name(self, each: Measure) -> str:
        if each.of_class is None:
            return each.measure
        return f"{each.measure}, {self.classes[each.of_class] if self.classes else f'class {each.of_class}'}"

    def _draw(self, path: Path) -> Path:
        """Draws the figures that aren't of a single class: shares, and those in the unit of the depths."""
        whole = [each for each in self.measures if each.of_class is None]
        kinds = [part for part in ([e for e in whole if e.share], [e for e in whole if not e.share]) if part]
        figure = new_figure(width=7.0, height=0.9 + 0.45 * len(whole) + 0.4 * len(kinds))
        every = figure.subplots(len(kinds), squeeze=False, height_ratios=[len(part) + 0.5 for part in kinds])[:, 0]
        for axes, part in zip(every, kinds, strict=True):
            self._bars(axes, part)
        handles, labels = every[0].get_legend_handles_labels()
        figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside upper center", ncols=2)
        return save_figure(figure, path)

    def _bars(self, axes: Axes, part: list[Measure]) -> None:
        keys, factor = [_key(each) for each in part], 100 if part[0].share else 1
        for color, shift, label, measures in (
            (BLUE, -0.18, "trained", part),
            (GREY, 0.18, "same architecture, random weights", [e for e in self.untrained if _key(e) in keys]),
        ):
            places = [keys.index(_key(each)) + shift for each in measures]
            axes.barh(places, [factor * each.value for each in measures], height=0.34, color=color, label=label)
            # barh's xerr refuses negative lengths, and a value can lie outside its bootstrap interval
            lows, highs = [factor * each.low for each in measures], [factor * each.high for each in measures]
            axes.hlines(places, lows, highs, colors="black", linewidth=1)
        axes.set_yticks(range(len(part)), [f"{each.protocol}: {each.measure}" for each in part])
        axes.invert_yaxis()
        axes.set_xlabel("On held-out images (%)" if part[0].share else "On held-out images (unit of the depths)")
        axes.grid(axis="x", alpha=0.3, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)


def _key(each: Measure) -> tuple[str, str, int | None]:
    return each.protocol, each.measure, each.of_class


def _shown(each: Measure, value: float) -> str:
    return f"{100 * value:.2f}%" if each.share else f"{value:.4g}"
