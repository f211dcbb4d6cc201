"""Finetunes a classifier from a pretrained encoder with the MAE recipe.

python launch/finetune.py --config configs/finetune/demo_finetune.yaml model.init=runs/demo
python launch/finetune.py --config C.yaml --devices cuda:0 cuda:1
torchrun --nproc-per-node 8 launch/finetune.py --config C.yaml
deepspeed launch/finetune.py --config C.yaml engine.ds_config=ds_configs/zero2.json
srun --kill-on-bad-exit --ntasks-per-node 8 python launch/finetune.py --config C.yaml

Reference: docs/finetuning.md, and --help-config for the settings
"""

from ijepa_scale.train.command import launch
from ijepa_scale.train.finetune import FinetuneTask

if __name__ == "__main__":
    launch(__doc__ or "", FinetuneTask)
