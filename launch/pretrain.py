"""Pretrains I-JEPA.

python launch/pretrain.py --config configs/demo.yaml optimizer.lr=1e-3
python launch/pretrain.py --config C.yaml --devices cuda:0 cuda:1
torchrun --nproc-per-node 8 launch/pretrain.py --config C.yaml
deepspeed launch/pretrain.py --config C.yaml engine.ds_config=ds_configs/zero3.json
srun --kill-on-bad-exit --ntasks-per-node 8 python launch/pretrain.py --config C.yaml

Reference: docs/getting-started.md, and --help-config for the settings
"""

from ijepa_scale.train.command import launch
from ijepa_scale.train.pretrain import PretrainTask

if __name__ == "__main__":
    launch(__doc__ or "", PretrainTask)
