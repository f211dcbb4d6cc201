"""The map of gradient norms: its colours are the norms, its alarms stand where they went off, its texts are apart."""

from __future__ import annotations

import base64
import io
import re
from xml.etree import ElementTree

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import colormaps
from PIL import Image

from ijepa_scale.visualize import block_gradients
from ijepa_scale.visualize.block_gradients import block_norms, block_svg, common_scale
from ijepa_scale.visualize.curves import RunRows

NORMS = st.one_of(st.none(), st.just(0.0), st.floats(1e-8, 1e3))


@st.composite
def run_rows(draw: st.DrawFn, most: int = 6) -> RunRows:
    encoder, predictor = draw(st.integers(1, 40)), draw(st.integers(0, 12))
    names = ["encoder_rest", *(f"encoder_{n}" for n in range(encoder)), *(f"predictor_{n}" for n in range(predictor))]
    steps = sorted(draw(st.sets(st.integers(0, 10**6), min_size=1, max_size=most)))
    seeded = np.random.default_rng(draw(st.integers(0, 99)))
    rows = [
        {"step": step, "alarm": draw(st.integers(0, 1))}
        | {
            f"grad_norm_{name}": float(norm)
            for name, norm in zip(names, seeded.lognormal(size=len(names)), strict=True)
        }
        for step in steps
    ]
    for place, name, norm in draw(st.lists(st.tuples(st.integers(0, 99), st.sampled_from(names), NORMS), max_size=4)):
        rows[place % len(rows)][f"grad_norm_{name}"] = norm
    return RunRows(name="run", rows=rows)


@given(run_rows())
@settings(max_examples=5, deadline=None)
def test_each_pixel_is_a_norm(run: RunRows) -> None:
    found = block_norms(run)
    assert found is not None
    scale = common_scale([found])
    svg = block_svg(found, run, scale, "a")
    root = ElementTree.fromstring(svg)
    (image,) = root.iter("{http://www.w3.org/2000/svg}image")
    content = image.attrib["{http://www.w3.org/1999/xlink}href"].partition("base64,")[2]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGBA"))
    assert pixels.shape == (*found.norms.shape, 4)
    for row, block in enumerate(found.blocks):
        for column, step in enumerate(found.steps):
            given = next(r for r in run.rows if r["step"] == step)[f"grad_norm_{block.replace(' ', '_')}"]
            if given is None:
                assert pixels[row, column, 3] == 0
                continue
            share = np.log(max(given, scale.low) / scale.low) / max(np.log(scale.high / scale.low), 1e-6)
            expected = np.array(colormaps["viridis"](share)) * 255
            assert np.abs(pixels[row, column] - expected).max() < 6  # a step or two of the map's 256
    assert svg.count(f"stroke: {block_gradients._ALARM}") >= len(run.alarms())


@given(run_rows())
@settings(max_examples=30, deadline=None)
def test_named_blocks_are_apart(run: RunRows) -> None:
    found = block_norms(run)
    assert found is not None
    named = block_gradients._ticks(found.blocks)
    assert named[0] == 0 and max(named) < len(found.blocks) and len(named) <= 24
    assert len(found.blocks) > 16 or named == list(range(len(found.blocks)))
    assert min(np.diff(named), default=1) >= len(found.blocks) // 32


def test_many_measurements_are_averaged() -> None:
    rows = [{"step": step, "grad_norm_encoder_0": 10.0 ** (step % 2)} for step in range(10_000)]
    run = RunRows(name="run", rows=[*rows, {"step": 10_000, "grad_norm_encoder_0": None}])
    found = block_norms(run)
    assert found is not None and found.latest() == {"encoder 0": 10.0}
    svg = block_svg(found, run, common_scale([found]), "a")
    assert len(svg) < 20_000 and re.search(r"data:image/png", svg)


def test_runs_without_blocks_have_no_map() -> None:
    assert block_norms(RunRows(name="run", rows=[{"step": 1, "grad_norm": 2.0, "loss": 1.0}])) is None
