"""The imports of the tests' fork server."""

import torch

from ijepa_scale.engine.zero import import_deepspeed

torch.set_num_threads(1)
import_deepspeed(torch.device("cpu"))

import ijepa_scale.engine.build  # noqa: E402, F401
import ijepa_scale.train.step  # noqa: E402, F401
