import io
import json
import math

import pytest
import torch
import yaml
from PIL import Image

from ijepa_scale.config import LoggingConfig
from ijepa_scale.masks import DenseMasks, Wanted
from ijepa_scale.metrics.meters import Meters, feature_std
from ijepa_scale.metrics.progress import Progress, describe, duration
from ijepa_scale.metrics.row import FIELDS, training_row
from ijepa_scale.metrics.sinks import JsonlSink, Sinks, TensorBoardSink, open_sinks
from ijepa_scale.metrics.stored_rows import read_rows
from ijepa_scale.metrics.targets import TargetMeters
from ijepa_scale.schedules import Hyper

HYPER = Hyper(lr=9.1e-4, weight_decay=0.05, momentum=0.996)


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_meters_average_and_start_anew():
    meters = Meters("cpu")
    meters.add("loss", torch.tensor(1.0, requires_grad=True), count=3)
    meters.add("loss", torch.tensor(5.0), count=1)
    meters.add("grad_norm", 2.5)
    values = meters.flush()
    assert values["loss"] == 2.0 and values["grad_norm"] == 2.5
    meters.count_step()
    assert set(meters.flush()) == {"data_wait_ms", "step_ms"}
    assert meters.flush() == {}  # nothing was timed


def test_a_step_that_changed_nothing_is_not_in_the_means():
    meters = Meters("cpu")
    flags = [None, torch.zeros(()), torch.ones(()), torch.zeros(())]
    for flag, loss in zip(flags, (1.0, 2.0, float("nan"), 6.0), strict=True):
        meters.count_step(flag, loss=torch.tensor(loss), grad_norm=loss)
    values = meters.flush()
    assert values["loss"] == values["grad_norm"] == 3.0
    meters.count_step(torch.ones(()), loss=torch.tensor(5.0))
    assert math.isnan(meters.flush()["loss"])


def test_meters_leave_the_callers_tensor_alone():
    loss = torch.tensor(1.0)
    meters = Meters("cpu")
    for _ in range(3):
        meters.add("loss", loss)
    assert loss.item() == 1.0 and meters.flush()["loss"] == 1.0


def test_meters_hand_one_vector_to_reduce():
    seen = []

    def reduce(vector):
        seen.append(vector.clone())
        return vector * 2

    meters = Meters("cpu")
    meters.add("b", 1.0)
    meters.add("a", torch.tensor(3.0))
    values = meters.flush(reduce)
    assert len(seen) == 1 and seen[0].shape == (4,) and seen[0].dtype == torch.float64
    assert (values["a"], values["b"]) == (6.0, 2.0)


def test_meters_time_waiting_and_steps_without_pauses():
    clock = Clock()

    def batches():
        for number in range(2):
            clock.now_s += 0.25  # the loader works
            yield number

    meters = Meters("cpu", clock)
    clock.now_s += 50.0  # whatever comes before the first batch
    for _ in meters.timed(batches()):
        clock.now_s += 0.75  # the step
        meters.count_step()
        with meters.paused():
            clock.now_s += 100.0
    values = meters.flush()
    assert values["data_wait_ms"] == pytest.approx(250.0)
    assert values["step_ms"] == pytest.approx(1000.0)


def test_the_first_step_counts_but_its_time_does_not():
    clock = Clock()
    meters = Meters("cpu", clock)

    def step(seconds, loss):
        clock.now_s += seconds
        meters.add("loss", loss)
        meters.count_step()

    for number in meters.timed(range(3)):
        if number == 0:
            with meters.warming_up():
                step(60.0, 6.0)
        else:
            step(0.5, 3.0)
    assert meters.warm_up_s == 60.0
    values = meters.flush()
    assert values["step_ms"] == pytest.approx(500.0) and values["loss"] == pytest.approx(4.0)


def test_a_row_of_the_warm_up_alone_has_no_speed():
    meters = Meters("cpu")
    with meters.warming_up():
        meters.add("loss", 1.0)
        meters.count_step()
    row = training_row(meters.flush(), step=1, epoch=0, images_seen=4, hyper=HYPER, images_per_step=4)
    assert row["loss"] == 1.0 and row["step_ms"] is None and row["images_per_s"] is None


def test_feature_std_sees_the_image_and_not_the_place():
    images = torch.randn(64, 1, 8, generator=torch.Generator().manual_seed(0))
    places = torch.arange(5.0)[None, :, None]
    everywhere = torch.arange(5).expand(64, 5)
    assert feature_std(images + places, everywhere, 5).item() == pytest.approx(1.0, abs=0.1)
    collapsed = places.expand(64, 5, 8)  # differs from place to place
    assert feature_std(collapsed, everywhere, 5).item() == 0.0
    assert math.isnan(feature_std(torch.randn(1, 5, 8), everywhere[:1], 5).item())


def test_feature_std_compares_like_places():
    """Each image shows some places only: their features are compared by place, and places seen once are left out."""
    places = torch.tensor([[0, 2], [2, 3], [0, 3]])
    features = torch.tensor([[[1.0], [5.0]], [[7.0], [20.0]], [[3.0], [20.0]]])
    assert feature_std(features, places, 6).item() == pytest.approx(math.sqrt((2.0 + 2.0 + 0.0) / 3))
    assert math.isnan(feature_std(features[:1], places[:1], 6).item())


@pytest.mark.parametrize("images", [20, 40])
def test_the_alarm_of_a_step_looks_at_32_images_at_most(images):
    generator = torch.Generator().manual_seed(0)
    tokens = 1.0 + 2.0 * torch.randn(images, 5, 8, generator=generator)
    places = torch.rand(images, 12, generator=generator).argsort(dim=1)[:, :5]
    masks = DenseMasks(torch.zeros(1, images, 7, dtype=torch.int64), places[None, :, :3])
    meters = Meters("cpu")
    TargetMeters(meters, 12)(tokens, masks, Wanted(places, torch.arange(3 * images)))
    expected = feature_std(torch.nn.functional.layer_norm(tokens[:32], (8,)), places[:32], 12)
    values = meters.flush()
    assert values["target_std"] == pytest.approx(expected.item(), abs=1e-5)
    assert (values["context_tokens"], values["target_tokens"]) == (7.0, 3.0)


def test_training_row_has_every_field():
    means = {"loss": 0.5, "step_ms": 500.0, "data_wait_ms": 10.0, "extra": 7.0}
    row = training_row(
        means, step=3, epoch=0, images_seen=192, hyper=HYPER, images_per_step=64, flops_per_image=1e9, peak_flops=1e12
    )
    assert tuple(row)[: len(FIELDS)] == FIELDS
    assert row["images_per_s"] == 128.0 and row["mfu"] == pytest.approx(0.128)
    assert row["grad_norm"] is None and row["extra"] == 7.0
    assert training_row(means, step=3, epoch=0, images_seen=192, hyper=HYPER, images_per_step=64)["mfu"] is None


def test_jsonl_has_each_step_once_after_a_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    for step in (10, 20, 30):
        sink.write({"step": step, "loss": 1.0})
    sink.close()
    with path.open("a") as file:
        file.write('{"step": 40, "lo')  # killed while writing
    sink = JsonlSink(path, drop_from=30)
    sink.write({"step": 30, "loss": 2.0})
    sink.close()
    assert [(row["step"], row["loss"]) for row in read_rows(path)] == [(10, 1.0), (20, 1.0), (30, 2.0)]
    assert (tmp_path / "metrics.broken.jsonl").read_text() == '{"step": 40, "lo\n'
    JsonlSink(path, drop_from=0).close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.broken.jsonl", "metrics.jsonl"]
    assert path.read_text() == ""


def test_jsonl_appends_after_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st')
    sink = JsonlSink(path)
    sink.write({"step": 2, "loss": float("nan"), "mfu": None})
    sink.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1},
        {"step": 2, "loss": None, "mfu": None},
    ]


def test_tensorboard_holds_the_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for drop_from, loss in ((None, 1.0), (2, 2.0)):
        sink = TensorBoardSink(tmp_path, drop_from)
        for step in (1, 2, 3)[1 if drop_from else 0 :]:
            sink.write({"step": step, "loss": loss, "lr": 0.1, "mfu": None})
        sink.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "schedule/lr"}
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 2.0), (3, 2.0)]


def test_tensorboard_holds_the_configuration_and_pictures_and_other_sinks_need_not(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Image.new("RGB", (6, 4), (200, 10, 30)).save(tmp_path / "masks.png")
    run = {"seed": 3, "optimizer": {"lr": 1e-3}}
    with open_sinks(tmp_path, rank=0, logging=LoggingConfig(), drop_from=None, run=run) as sinks:
        sinks.picture("masks", tmp_path / "masks.png", 0)
        sinks.write({"step": 1, "rank_me": 2.0, "linear_untrained": 0.1, "grad_norm": 1.0, "grad_norm_encoder_0": 0.5})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["images"] == ["pictures/masks"]
    picture = events.Images("pictures/masks")[0]
    assert (picture.width, picture.height) == (6, 4)
    (tag,) = events.Tags()["tensors"]
    assert tag == "configuration/text_summary"
    text = events.Tensors(tag)[0].tensor_proto.string_val[0].decode()
    assert yaml.safe_load(text.removeprefix("```yaml").removesuffix("```")) == run
    assert set(events.Tags()["scalars"]) == {
        "health/rank_me", "evaluate/linear_untrained", "train/grad_norm", "gradients/grad_norm_encoder_0",
    }  # fmt: skip


def test_only_rank_0_writes(tmp_path):
    with open_sinks(tmp_path / "other", rank=1, logging=LoggingConfig(), drop_from=None, run={}) as sinks:
        sinks.write({"step": 0})
    assert not (tmp_path / "other").exists()
    with open_sinks(
        tmp_path / "first", rank=0, logging=LoggingConfig(tensorboard=False), drop_from=None, run={}
    ) as sinks:
        sinks.write({"step": 0})
    assert [p.name for p in (tmp_path / "first").iterdir()] == ["metrics.jsonl"]
    Sinks().write({"step": 0})


ROW = {"step": 120, "loss": 0.34123, "lr": 9.1e-4, "images_per_s": 1234.4, "data_wait_ms": 2.0, "step_ms": 282.4}


def test_progress_prints_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    with Progress(800, stream=stream) as progress:
        progress.advance()
        progress.show(ROW)
    assert stream.getvalue() == "step 120/800  loss 0.3412  lr 9.1e-04  1234 img/s  wait 1%  eta 00:03:12\n"


def test_progress_bar_and_silence():
    stream = io.StringIO()
    with Progress(800, mode="bar", first_step=119, stream=stream) as progress:
        progress.advance()
        progress.show(ROW)
        progress.note("saved")
    assert "120/800" in stream.getvalue() and "loss 0.3412" in stream.getvalue() and "saved\n" in stream.getvalue()
    stream = io.StringIO()
    progress = Progress(800, mode="none", stream=stream)
    progress.show(ROW)
    progress.note("saved")
    assert stream.getvalue() == ""


def test_describe_leaves_out_what_is_unknown():
    assert describe({"step": 1, "knn": 0.5, "loss": None}) == ""
    assert duration(90061) == "1d 01:01:01"


@pytest.mark.parametrize("images", [4, 16, 64])
def test_feature_std_does_not_depend_on_the_number_of_images(images):
    generator = torch.Generator().manual_seed(0)
    places = torch.rand(images, 20, generator=generator).argsort(dim=1)[:, :8]
    features = torch.randn(images, 8, 256, generator=generator)
    assert feature_std(features, places, 20).item() == pytest.approx(1.0, abs=0.06)
