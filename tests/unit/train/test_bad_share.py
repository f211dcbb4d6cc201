"""How many samples of a run may be bad, however short it is and whichever process met them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from ijepa_scale.config import load_config
from ijepa_scale.data.sources.folder import ImageFolderSource
from ijepa_scale.engine.world import World
from ijepa_scale.errors import DataError
from ijepa_scale.train.loop import Loop
from ijepa_scale.train.pretrain import pretrain
from tests.unit.data.shards.image_sets import class_folders
from tests.unit.data.test_bad_files import loader
from tests.unit.train.test_labels_of_runs import ALONE, PRETRAIN


def test_a_short_run_with_bad_samples_does_not_end_well(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "set", 15)
    for number in range(5):
        (root / "a" / f"bad{number}.jpg").write_text("text")
    (tmp_path / "c.yaml").write_text(PRETRAIN)
    settings = ["data.reader=imagefolder", f"data.train={root}", f"folder={tmp_path / 'run'}", "schedule.epochs=1"]
    settings += ["data.batch_size=20", "masks.group_size=20"]
    with pytest.raises(DataError) as caught:
        pretrain(load_config(tmp_path / "c.yaml", settings), ALONE)
    assert str(caught.value).startswith(
        "5 of 20 samples couldn't be decoded (5 x not decodable), over data.max_bad_fraction 0.001; the last is "
    )
    settings.append("data.max_bad_fraction=0.25")
    assert pretrain(load_config(tmp_path / "c.yaml", settings), ALONE).steps == 1  # the step was saved
    settings[2] = f"folder={tmp_path / 'other'}"
    assert pretrain(load_config(tmp_path / "c.yaml", settings), ALONE).steps == 1


class TwoProcesses(World):
    """This process of two, of which the other has met `other` samples."""

    other = (3, 10)

    def gather(self, tensor: Tensor) -> Tensor:
        return torch.stack([tensor, tensor.new_tensor(self.other)])

    def barrier(self) -> None:
        """The other process is there already."""


@pytest.mark.parametrize(("limit", "raises"), [(0.1, True), (0.15, False)])
def test_the_bad_samples_of_all_processes_count(tmp_path: Path, limit: float, raises: bool) -> None:
    train = loader(ImageFolderSource(class_folders(tmp_path / "set", 12)), stop_step=1, max_bad_fraction=limit)
    list(train)
    assert (train.num_bad, train.num_seen) == (0, 6)
    train.num_seen = 10
    world = TwoProcesses(rank=0, size=2, local_rank=0, local_size=2, device=torch.device("cpu"))
    loop = SimpleNamespace(world=world)
    if raises:
        with pytest.raises(
            DataError, match="^3 of 20 samples couldn't be decoded, over data.max_bad_fraction 0.1; fix"
        ):
            Loop._check_bad(loop, train)  # type: ignore[arg-type]
    else:
        Loop._check_bad(loop, train)  # type: ignore[arg-type]
