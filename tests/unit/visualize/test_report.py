"""The HTML report: what the files say is on it, nothing in them runs, and a real browser shows it everywhere."""

from __future__ import annotations

import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import CHROMIUM, Browser
from hypothesis import given, settings
from hypothesis import strategies as st
from picture_runs import write_photographs, write_run
from PIL import Image

from ijepa_scale.errors import ConfigError, DataError
from ijepa_scale.visualize import report_page
from ijepa_scale.visualize.curves import RUN_COLORS
from ijepa_scale.visualize.report_evaluations import read_evaluation
from ijepa_scale.visualize.report_page import ReportOptions, render, write_report
from ijepa_scale.visualize.report_runs import differences, read_folders, summary
from ijepa_scale.visualize.report_values import shown
from launch import report

HOSTILE = '<script>document.title="x"<script><img src=x onerror=alert(1)>"\'&{{ 7*7 }}]]>'
VOID = {"meta", "link", "img", "br", "hr", "input"}
EVALUATION = {
    "facts": {"encoder": HOSTILE, "seed": 0},
    "published": {"linear": 79.3},
    "scores": [
        {"protocol": "linear", "setting": HOSTILE, "accuracy": 0.5, "low": 0.45, "high": 0.551, "note": ""},
        {"protocol": "knn", "setting": "k 20", "accuracy": 0.25, "low": 0.2, "high": 0.3, "note": ""},
    ],
    "untrained": [{"protocol": "knn", "setting": "", "accuracy": 0.125, "low": 0.1, "high": 0.15, "note": ""}],
}


class Page(HTMLParser):
    """Elements with their attributes, the text, and tags that are never closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"{tag} closes another element"

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Returns a run with a checkpoint, an evaluation and images, and a hostile one without."""
    folder = tmp_path_factory.mktemp("report")
    photographs = write_photographs(folder / "photographs")
    first = write_run(folder / "first", train=str(photographs), reader="imagefolder")
    (first / "evaluation").mkdir()
    (first / "evaluation" / "evaluation.json").write_text(json.dumps(EVALUATION))
    second = write_run(folder / HOSTILE.replace("/", ""), checkpoint=False)
    (second / "config.yaml").write_text(json.dumps({"model": {"width": HOSTILE, HOSTILE: 1}}))
    (second / "run.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    rows = [{"step": 10, "loss": 0.5, HOSTILE: 1.5}, {"step": 20, "loss": 0.4, HOSTILE: 2.5}]
    (second / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(first), str(second)]


@pytest.fixture(scope="module")
def page(runs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("page") / "report.html"
    assert report.main([*runs, "--to", str(to)]) == 0
    return to


def test_nothing_from_files_is_markup(page: Path) -> None:
    found = Page(page.read_text())
    assert found.open == []
    tags = Counter(tag for tag, _ in found.elements)
    assert not {"script", "iframe", "object", "embed", "form", "base", "foreignobject"} & tags.keys()
    for tag, attributes in found.elements:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        for name in ("src", "href", "xlink:href", "action", "srcset"):
            assert (attributes.get(name) or "#").startswith(("data:image/", "data:,", "#")), (tag, name)
    policy = next(a["content"] for t, a in found.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert "url(http" not in page.read_text() and "@import" not in page.read_text()
    text = "".join(found.words)
    assert text.count(HOSTILE) > 8 and "{{ 7*7 }}" in text  # shown as it is, wherever it stands


def test_the_page_can_be_navigated(page: Path) -> None:
    found = Page(page.read_text())
    levels = [int(tag[1]) for tag, _ in found.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    identifiers = Counter(a["id"] for _, a in found.elements if a.get("id"))
    assert max(identifiers.values()) == 1
    links = {a["href"][1:] for tag, a in found.elements if tag == "a" and a["href"]}
    assert links and links <= identifiers.keys()
    images = [a for tag, a in found.elements if tag == "img"]
    assert images and all(a.get("alt") for a in images)
    assert all(a.get("aria-label") for _, a in found.elements if a.get("role") in ("img", "region"))
    assert all(a.get("scope") for tag, a in found.elements if tag == "th")
    assert dict(found.elements)["html"]["lang"] == "en"


def test_the_figures_are_those_of_the_files(runs: list[str], page: Path) -> None:
    found = read_folders(runs)
    figures = dict(summary(found))
    assert figures["Steps"] == ["50", "20"] and figures["Last loss"] == ["0.02", "0.4"]
    assert figures["kNN accuracy, %"] == ["25.0 (untrained 10.0)", "not measured"]
    assert figures["Images per second, median"] == ["300", "not measured"] and "Share of the peak" not in str(figures)
    differing = dict(differences(found))
    assert differing["model.width"] == ["24", HOSTILE] and "folder" not in differing
    (evaluation,) = found[0].evaluations
    (table,) = evaluation.tables
    assert table.columns == ["protocol", "accuracy", "95% interval", "untrained", "published", "setting"]
    assert table.rows[0] == ["linear", "50.00%", "45.00% to 55.10%", "", "79.3%", HOSTILE]
    assert table.rows[1] == ["knn", "25.00%", "20.00% to 30.00%", "12.50%", "", "k 20"]
    text = "".join(Page(page.read_text()).words)
    for cell in ("25.0 (untrained 10.0)", "45.00% to 55.10%", "Principal components of patch features", "RankMe"):
        assert (cell in text) == (cell != "RankMe")
    assert "Not drawn: " in text and "has neither a checkpoint" in text  # the second run has none, and the page says so


def test_any_field_of_the_rows_is_drawn(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", checkpoint=False)
    (run / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 2, "rank_me": 7.5}\n{"step": 2, "rank_me": null, "new_one": 4}\n'
    )
    text = render(read_folders([str(run)]), [])
    labels = [a["aria-label"] for _, a in Page(text).elements if a.get("role") == "img"]
    assert "RankMe. run: 7.5 at step 1, 7.5 at step 1" in labels and "new one. run: 4 at step 2, 4 at step 2" in labels


@pytest.mark.parametrize("count", [1, 2, 3, 30])
def test_fields_that_are_not_drawn_are_named(tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_page, "_MOST_PLOTS", 2)
    run = tmp_path / "many"
    run.mkdir()
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1} | {f"a_{n}_b": n for n in range(count)}) + "\n")
    text = render(read_folders([str(run)]), [])
    drawn = [a["aria-label"] for _, a in Page(text).elements if a.get("role") == "img"]
    for n in range(count):
        assert any(label.startswith(f"a {n} b. ") for label in drawn) != (f"a_{n}_b" in text)
    assert (f"{count - 2} more fields aren't drawn here" in text.replace("&#39;", "'")) == (count > 2)


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", checkpoint=False)
    (run / "metrics.jsonl").write_text("")
    text = "".join(Page(render(read_folders([str(run)]), [])).words)
    assert "the runs have no losses yet" in text and "No step was timed" in text


def test_only_runs_with_settings_are_compared(tmp_path: Path) -> None:
    paths = [str(write_run(tmp_path / name, checkpoint=False)) for name in "abc"]
    (tmp_path / "c" / "config.yaml").unlink()
    assert differences(read_folders(paths)) == []
    (tmp_path / "b" / "config.yaml").write_text("seed: 5\n")
    found = dict(differences(read_folders(paths)))
    assert found["seed"] == ["0", "5", "unknown"] and found["model.width"] == ["24", "not set", "unknown"]
    text = render(read_folders(paths), [])
    assert "<details><summary>Settings in which the runs differ" in text  # over 30 of them
    assert "Settings in which the runs differ" not in render(read_folders(paths[::2]), [])


def test_a_setting_of_finetuning_that_has_a_new_name_is_no_difference(tmp_path: Path) -> None:
    paths = [str(write_run(tmp_path / name, checkpoint=False)) for name in ("old", "new")]
    (tmp_path / "old" / "config.yaml").write_text("model: {num_classes: 3, width: 8}\noptimizer: {epochs: 7}\n")
    (tmp_path / "new" / "config.yaml").write_text(
        "model: {num_classes: 3, encoder: {width: 8}}\nschedule: {epochs: 9}\n"
    )
    assert differences(read_folders(paths)) == [("schedule.epochs", ["7", "9"])]


def test_alarms_and_blocks_are_told(runs: list[str]) -> None:
    found = read_folders(runs)
    assert dict(summary(found))["Collapse alarms"] == ["1, at step 50; still on", "not measured"]
    text = render(found, [])
    assert "0.4 (encoder 3)" in text and "0.1 (encoder 0)" in text
    assert "Gradient norm of each block, first. At step 50: encoder 0 0.1; encoder 1 0.2;" in text


FIELDS = st.dictionaries(
    st.text(max_size=12), st.one_of(st.none(), st.text(), st.floats(), st.integers(), st.just(10**400), st.booleans())
)


@given(st.lists(FIELDS, max_size=4), FIELDS, st.text(max_size=12))
@settings(max_examples=6, deadline=None)
def test_any_files_make_a_whole_page(tmp_path_factory, rows, facts, note) -> None:
    folder = tmp_path_factory.mktemp("any")
    written = [row | {"step": number, "loss": 0.5} for number, row in enumerate(rows, start=1)]
    (folder / "metrics.jsonl").write_text('{"step": 0}\n' + "".join(json.dumps(row) + "\n" for row in written))
    (folder / "run.json").write_text(json.dumps(facts))
    (folder / "evaluation.json").write_text(json.dumps({"scores": [{"protocol": note, **facts}], "facts": facts}))
    found = Page(write_report([str(folder)], folder / "a.html", ReportOptions(pictures=False)).read_text())
    assert found.open == [] and "script" not in dict(found.elements)


@pytest.mark.parametrize(
    "name,content,message",
    [
        ("run.json", "[1]", "run.json holds no JSON object; copy it again, or leave it out"),
        ("run.json", "{", "run.json can't be read as JSON"),
        ("config.yaml", "3", "config.yaml isn't a mapping of settings; copy it again from the run"),
        (
            "evaluation.json",
            '{"scores": 3}',
            "evaluation.json holds no scores with a protocol; give the evaluation.json",
        ),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: str, message: str, capsys: Any) -> None:
    run = write_run(tmp_path / "run", checkpoint=False)
    (run / name).write_text(content)
    assert report.main([str(run), "--to", str(tmp_path / "a.html"), "--no-pictures"]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "a.html").exists()


def test_other_folders_and_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no metrics.jsonl; give the folder of a run"):
        write_report([str(tmp_path)], tmp_path / "a.html", ReportOptions())
    run = str(write_run(tmp_path / "run", checkpoint=False))
    with pytest.raises(ConfigError, match="a.pdf ends in '.pdf'; a report is written as .html"):
        write_report([run], tmp_path / "a.pdf", ReportOptions())
    to = write_report([run], tmp_path / "a.html", ReportOptions(pictures=False))
    with pytest.raises(ConfigError, match="a.html exists; name another file with --to, or add --overwrite"):
        write_report([run], to, ReportOptions())
    with pytest.raises(DataError, match="missing.json can't be read as JSON"):
        read_evaluation(tmp_path / "missing.json")


def test_values_are_shown_in_short() -> None:
    values = [None, 0.123456, 12345.6, 7, 1234567, True, "a", [1, 2]]
    assert list(map(shown, values)) == ["", "0.1235", "12,346", "7", "1,234,567", "true", "a", "[1, 2]"]


def luminance(color: str) -> float:
    """Returns the relative luminance of #rrggbb. Source: WCAG 2.2."""
    shares = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_contrast_suffices_on_light_and_dark_pages() -> None:
    style = Path(report_page.__file__).with_name("report.html.jinja").read_text()
    schemes = [dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", line)) for line in re.findall(r":root \{([^}]*)\}", style)]
    assert len(schemes) == 3  # light, dark, print
    for scheme in schemes[:2]:
        for page in (scheme["page"], scheme["card"]):
            assert min(contrast(scheme[name], page) for name in ("ink", "muted", "link")) >= 4.5
            assert min(contrast(color, page) for color in RUN_COLORS) >= 3


PROBLEMS = (
    "Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Network.loadingFailed",
    "Page.javascriptDialogOpening",
)  # fmt: skip
LOOK = """({
  wide: Math.max(document.documentElement.scrollWidth, innerWidth),  // a phone widens its view to what it holds
  text: document.body.innerText,
  scripts: document.scripts.length,
  title: document.title,
  broken: [...document.images].filter(image => !image.naturalWidth).length,
  background: getComputedStyle(document.body).backgroundColor,
  ink: getComputedStyle(document.body).color,
  axis: getComputedStyle(document.querySelector(".plots svg text")).fill,
  plot: document.querySelector(".plots svg").getBoundingClientRect().width,
  small: [...document.querySelectorAll(".plots svg text")].map(t => t.getBoundingClientRect().height),
  tile: document.querySelector(".item img").getBoundingClientRect().width,
})"""


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium isn't installed; on Debian: apt-get install chromium")
def test_a_browser_shows_it(page: Path, tmp_path: Path) -> None:
    browser = Browser(tmp_path / "profile")
    try:
        shades = {}
        for width in (390, 1280):
            for scheme in ("light", "dark"):
                browser.open(page, width=width, scheme=scheme)
                seen = browser.evaluate(LOOK)
                problems = [event for event in browser.events if event["method"] in PROBLEMS]
                assert problems == [] and seen["broken"] == 0 and seen["scripts"] == 0
                asked = {e["params"]["request"]["url"].partition(":")[0] for e in browser.events
                         if e["method"] == "Network.requestWillBeSent"}  # fmt: skip
                assert asked <= {"file", "data"}
                assert seen["wide"] == width and seen["plot"] <= width and seen["tile"] >= 48
                assert min(height for height in seen["small"] if height) >= 8  # pixels
                assert seen["title"].startswith("Report: first, ") and HOSTILE.replace("/", "") in seen["text"]
                assert "25.0 (untrained 10.0)" in seen["text"]
                shades[width, scheme] = seen["background"], seen["ink"]
                assert seen["axis"] not in (seen["background"], "rgb(0, 0, 0)")
                browser.screenshot(tmp_path / "page.png")
                assert len(np.unique(np.asarray(Image.open(tmp_path / "page.png").convert("L")))) > 100
        assert shades[390, "light"] == ("rgb(255, 255, 255)", "rgb(28, 33, 40)") == shades[1280, "light"]
        assert shades[390, "dark"] == ("rgb(15, 19, 24)", "rgb(230, 237, 243)") == shades[1280, "dark"]
        browser("Emulation.setEmulatedMedia", media="print", features=[])
        assert browser.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
        assert browser.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
        assert browser.evaluate("document.querySelector('details pre').checkVisibility()")  # printed though closed
        browser("Emulation.setEmulatedMedia", media="screen", features=[])
        assert not browser.evaluate("document.querySelector('details pre').checkVisibility()")
    finally:
        browser.close()
