# ruff: noqa: E501 (a row is a line, as the command is in its page)
"""How each command that the documentation shows is run in the tiny world, and why some can't be run.

A command runs as shown in a copy of the tiny world, where the files that it names are. What follows here is all that is
different: `swap` puts other words, or values after a `=`, in the place of shown ones; `add` appends settings that make
models and runs small; `without` removes what the command is to write.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

LONG, FAST = "long", "fast"


class Run(NamedTuple):
    """A command that ends with this exit code."""

    add: tuple[str, ...] = ()
    swap: Mapping[str, str] = {}
    without: tuple[str, ...] = ()
    code: int = 0
    says: str = ""  # among what it prints
    form: str = LONG


class Never(NamedTuple):
    """A command that can't be run by this test. Its flags are read, as those of all are."""

    reason: str


SHORT = ("schedule.stop_after=2", "data.workers=0", "logging.tensorboard=false")
SMALL = ("model.width=24", "model.depth=1", "model.predictor_width=24", "model.predictor_depth=1")
FEW = ("data.batch_size=4", "masks.group_size=4", "masks.min_keep=3")  # min_keep: blocks on 8 x 8 patches are small
OWN = Run((*SMALL, *SHORT), without=("runs/mine",), says="done: 2 steps")
MADE = Run(("--workers", "0"), without=("SHARDS",), says="24 images in 1 shard")
HUGE = Run((*SMALL, *SHORT, *FEW, "model.heads=3", "model.image_size=112"))
CONTINUED = Run((*SHORT, *FEW))
FINETUNED = (
    "data.batch_size=8",
    "schedule.epochs=1",
    "schedule.warmup_epochs=0",
    "data.workers=0",
    "evaluate.workers=0",
)
TWO_CLASSES = ("model.num_classes=2",)
SIZES = ("model.encoder.width=24", "model.encoder.depth=2", "model.encoder.heads=3")  # of the runs
CPUS = {"cuda:0": "cpu", "cuda:1": "cpu"}
TWO = {"8": "2", "16": "2"}  # processes
HOST = "127.0.0.1"  # takes the place of several, with two processes
QUICK = ("--epochs", "1", "--attentive-epochs", "1", "--workers", "0")
SLURM_JOBS = "needs a Slurm that runs jobs: tests/cluster/test_slurm.py"
TWO_HOSTS = "needs hosts that SSH reaches: tests/cluster/test_two_hosts.py"

SHOWN: dict[str, Run | Never] = {
    # README
    "python launch/pretrain.py --config configs/own_images.yaml data.train=PHOTOS folder=runs/mine": OWN._replace(form=FAST),
    "python launch/plan.py --config configs/in1k_vith14_ep300.yaml --gpus 8x a100-80gb": Run(says="it fits", form=FAST),
    "torchrun --nproc-per-node 8 launch/doctor.py --config C.yaml": Run(swap=TWO),
    "python launch/tune.py --config C.yaml --processes 8": Run(("--limit", "1", "--steps", "3", "--warmup", "1"), TWO),
    "python launch/shards.py make --from imagefolder --root IMAGENET --to SHARDS": Run(("--workers", "0"), without=("SHARDS",), form=FAST),
    "python launch/pretrain.py --config configs/continue.yaml model.init=published:in1k_vith14_ep300 data.train=SHARDS": CONTINUED._replace(form=FAST),
    "python launch/embed.py PHOTOS --model runs/mine --to features.npy": Run(("--workers", "0"), form=FAST),
    "python launch/finetune.py --config configs/finetune/base.yaml model.init=runs/mine model.num_classes=N data.train=TRAIN evaluate.test=VAL": Run(FINETUNED, {"N": "2", "TRAIN": "SHARDS", "VAL": "VAL_SHARDS"}, form=FAST),
    "python launch/evaluate.py runs/mine --data photos/train photos/val": Run(("--protocol", "knn", "logistic", "--workers", "0"), form=FAST),
    "python launch/report.py runs/mine --to report.html": Run(("--no-pictures",), form=FAST),
    "python launch/export.py runs/mine --to encoder.safetensors": Run(form=FAST),
    "python launch/pretrain.py": Run(code=2, says="--config is missing; name a YAML file"),  # the script by its name
    "python launch/pretrain.py --config C.yaml --devices cuda:0 cuda:1": Run(swap=CPUS, without=("runs/mine",)),
    "torchrun --nproc-per-node 8 launch/pretrain.py --config C.yaml": Run(swap=TWO, without=("runs/mine",)),
    "deepspeed launch/pretrain.py --config C.yaml engine.ds_config=ds_configs/zero3.json": Run(without=("runs/mine",)),
    "python launch/slurm.py pretrain --config C.yaml --nodes 2 --gpus-per-node 8 --time 1000": Run(("--dry-run", "data.batch_size=16"), form=FAST),
    # clusters, engines
    "python launch/pretrain.py --config C.yaml": Run(without=("runs/mine",)),
    "python launch/pretrain.py --config C.yaml --processes 2": Run(without=("runs/mine",)),
    "mpirun -n 8 python launch/pretrain.py --config C.yaml": Run(swap=TWO, without=("runs/mine",)),
    "torchrun --nnodes 2 --node-rank 0 --nproc-per-node 8 --master-addr nodea --master-port 29500 launch/pretrain.py --config C.yaml": Run(swap={"2": "1", "8": "2", "nodea": HOST, "29500": "{port}"}, without=("runs/mine",)),
    "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint nodea:29500 --rdzv-id 1 launch/pretrain.py --config C.yaml": Run(swap={"2": "1", "8": "2", "nodea:29500": HOST + ":{port}"}, without=("runs/mine",)),
    "deepspeed --hostfile hosts.txt --master_addr nodea launch/pretrain.py --config C.yaml engine.ds_config=ds_configs/zero3.json": Never(TWO_HOSTS),
    "deepspeed --hostfile hosts.txt --no_ssh --node_rank 0 --master_addr nodea --master_port 29500 launch/pretrain.py --config C.yaml": Run(swap={"nodea": HOST, "29500": "{port}"}, without=("runs/mine",)),
    "mpirun -n 16 --host nodea:8,nodeb:8 -x MASTER_ADDR=nodea -x OMP_NUM_THREADS python launch/pretrain.py --config C.yaml": Run(swap={"16": "2", "nodea:8,nodeb:8": "localhost:2", "nodea": HOST}, without=("runs/mine",)),
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nnodes 1:2 --nproc-per-node 8 --max-restarts 10 --rdzv-backend c10d --rdzv-endpoint nodea:29500 --rdzv-id 1 launch/pretrain.py --config C.yaml data.batch_size=2048": Run(swap={"8": "2", "nodea:29500": HOST + ":{port}", "2048": "8"}, without=("runs/mine",)),
    "torchrun --nproc-per-node 8 launch/pretrain.py --config C.yaml engine.strategy=fsdp2": Run(swap=TWO, without=("runs/mine",)),
    "srun --ntasks-per-node 8 --kill-on-bad-exit python launch/pretrain.py --config C.yaml": Never(SLURM_JOBS),
    # data, dense, doctor
    "python launch/shards.py stats PHOTOS --channels 1 --pixels uint16": Run(("--workers", "0"), {"1": "3", "uint16": "uint8"}),
    "python launch/shards.py stats DATA --channels 13 --pixels uint16": Run(("--workers", "0"),),
    "python launch/shards.py make --from list --root photos.txt --to SHARDS": MADE._replace(form=FAST),
    "python launch/shards.py make --from csv --root labels.csv --to SHARDS": MADE,
    "python launch/shards.py make --from tar --root photos.tar --to SHARDS": MADE,
    "python launch/shards.py make --from zip --root photos.zip --to SHARDS": MADE,
    "python launch/shards.py make --from parquet --root photos.parquet --to SHARDS": MADE,
    "python launch/shards.py make --from CIFAR10 --root CIFAR --download --to SHARDS": Never("downloads: tests/unit/data/shards/test_shards_sources.py reads such files"),
    "python launch/shards.py verify SHARDS": Run(("--workers", "0")),
    "python launch/shards.py classes SHARDS": Run(swap={"SHARDS": "NAMED"}),
    "python launch/evaluate.py runs/mine --data shapes/train shapes/val --protocol segmentation patch-knn": Run(QUICK),
    "python launch/evaluate.py runs/mine --data rooms/train rooms/val --protocol depth --image-size 448": Run(QUICK, {"448": "48"}),
    "torchrun --nproc-per-node 8 launch/evaluate.py IN1K-vit.h.14-300e.pth.tar --protocol segmentation --data ADEChallengeData2016/images/training ADEChallengeData2016/images/validation --classes 150 --to runs/ade20k": Run(QUICK, TWO),
    "python launch/doctor.py --folder runs --data SHARDS": Run(form=FAST),
    "python launch/doctor.py --config C.yaml --processes 8": Run(swap=TWO),
    # evaluation, extending, features, finetuning
    "python launch/evaluate.py IN1K-vit.h.14-300e.pth.tar --data imagenet/train imagenet/val --to runs/h14": Run(QUICK),
    "python launch/evaluate.py published:in1k_vith14_ep300 --data imagenet/train imagenet/val --protocol linear --to runs/h14": Run(QUICK),
    "python launch/evaluate.py runs/mine --data A/train A/val --transfer flowers F/train F/val --transfer pets P/train P/val": Run(QUICK),
    "torchrun --nproc-per-node 8 launch/evaluate.py timm:vit_huge_patch14_gap_224.in1k_ijepa --data TRAIN VAL": Run(QUICK, {**TWO, "timm:vit_huge_patch14_gap_224.in1k_ijepa": "RUN"}),
    "python launch/evaluate.py runs/demo --data TRAIN TEST": Run(QUICK),
    "PYTHONPATH=. python launch/pretrain.py --plugin my_losses --config configs/demo.yaml objective.loss=log_cosh objective.scale=2": Run((*SMALL, *SHORT, *FEW), without=("runs/demo",)),
    "PYTHONPATH=. python launch/pretrain.py --plugin my_losses --help-config objective": Run(says="turns from quadratic to linear"),
    "torchrun --nproc-per-node 8 launch/embed.py '/data/{000..127}.tar' --model jepa.pth.tar --to features.parquet": Run(("--workers", "0"), swap={**TWO, "/data/{000..127}.tar": "SHARDS/shard-{000000..000000}.tar"}),
    "python launch/pretrain.py --config configs/continue.yaml model.init=SOURCE data.train=SHARDS evaluate.train=LABELLED evaluate.test=HELD_OUT": CONTINUED,
    "python launch/pretrain.py --config configs/continue.yaml model.init=SOURCE data.reader=imagefolder data.train=IMAGES evaluate.every=0": CONTINUED,
    "python launch/finetune.py --config configs/finetune/in1k_vitl16.yaml model.init=runs/in1k_vitl16_ep600": Run((*FINETUNED, *SIZES, *TWO_CLASSES)),
    "torchrun --nproc-per-node 8 launch/finetune.py --config C.yaml": Run(swap={**TWO, "C.yaml": "finetune.yaml"}),
    "deepspeed launch/finetune.py --config configs/finetune/in1k_vith14_ep300_finetuning.yaml engine.ds_config=ds_configs/zero2.json engine.accumulation=4": Run((*FINETUNED[1:], "data.batch_size=16", "model.encoder.name=vit_tiny", *TWO_CLASSES)),
    "python launch/plan.py --config configs/finetune/in1k_vitg16.yaml --gpus 8x a100-40gb": Run(says="it fits"),
    "python launch/predict.py PHOTO.jpg FOLDER --model RUN": Run(swap={"RUN": "runs/finetuned"}, form=FAST),
    # getting started, health, installing, own images
    "python launch/report.py runs/demo --to report.html": Run(),
    "python launch/pretrain.py --config configs/own_images.yaml data.train=PHOTOS folder=runs/mine schedule.epochs=50 model.name=vit_small": OWN,
    "python launch/evaluate.py runs/mine --data PHOTOS/train PHOTOS/val --protocol knn logistic": Run(("--workers", "0")),
    "python launch/pretrain.py --config configs/own_images.yaml data.train=PHOTOS folder=runs/mine health.on_collapse=stop": OWN,
    "ijepa demo": Never("downloads Fashion-MNIST: test_first_screen.py runs it as make demo"),
    "ijepa pretrain --config configs/demo.yaml data.train=SHARDS": Run((*SMALL, *SHORT, *FEW), without=("runs/demo",)),
    "ijepa completion bash": Run(says="complete", form=FAST),
    "ijepa completion zsh": Run(says="compdef"),
    "ijepa completion fish": Run(says="complete"),
    "python launch/completion.py bash": Run(says="complete"),
    "ijepa plan --config configs/in1k_vith14_ep300.yaml --gpus 8x h100": Run(says="it fits", form=FAST),
    "python launch/pretrain.py --config configs/own_images.yaml data.train=PHOTOS folder=runs/mine model.name=vit_small": OWN,
    "python launch/shards.py stats 'PHOTOS/**' --channels 1 --pixels uint16": Run(("--workers", "0"), {"1": "3", "uint16": "uint8"}, says="PHOTOS/pixel_stats.json"),
    "python launch/pretrain.py --config configs/own_images.yaml 'data.train=PHOTOS/**' folder=runs/mine": OWN,
    # migrating
    "python launch/pretrain.py --fname C.yaml --devices cuda:0 cuda:1": Run(swap={**CPUS, "C.yaml": "published.yaml"}),
    "python launch/slurm.py --fname C.yaml --folder LOGS --partition P --nodes 2 --tasks-per-node 8 --time 1000": Run(("--dry-run",), {"C.yaml": "published.yaml"}, says="--nodes=2"),
    "srun --ntasks-per-node 8 --kill-on-bad-exit python launch/pretrain.py --fname C.yaml": Never(SLURM_JOBS),
    "python launch/finetune.py --fname C.yaml --devices cuda:0": Run(("evaluate.workers=0",), swap={**CPUS, "C.yaml": "fork.yaml"}),
    "python launch/embed.py IMAGES --model RUN --to features.npy": Run(("--workers", "0")),
    "python launch/pretrain.py --config C.yaml --print-config": Run(swap={"C.yaml": "published.yaml"}, says="# "),
    "python launch/export.py RUN --to jepa.pth.tar --steps-per-epoch 625 --processes 16": Run(swap={"625": "2", "16": "2"}, without=("jepa.pth.tar",)),
    "python launch/visualize.py curves RUN PUBLISHED.csv": Run(swap={"PUBLISHED.csv": "IN1K-vit.h.14-logs-rank.0.csv"}),
    # pictures
    "python launch/visualize.py KIND SOURCE --images photos/val --to picture.png": Run(swap={"KIND": "pca"}),
    "python launch/report.py runs/first runs/second --to report.html": Run(),
    "python launch/pretrain.py --config configs/own_images.yaml data.train=photos/train folder=runs/photos evaluate.train=photos/train evaluate.test=photos/val evaluate.reader=imagefolder evaluate.every=180 model.patch_size=8 model.width=192 model.depth=4 model.heads=3 model.predictor_depth=3 model.predictor_width=96 data.batch_size=32 optimizer.lr=5e-4 schedule.epochs=120 augment.flip=0.5": Run(SHORT, {"32": "8"}, without=("runs/photos",)),
    "python launch/visualize.py masks runs/photos --images photos/val --count 5": Run(),
    "python launch/visualize.py pca runs/photos --images photos/val": Run(),
    "python launch/visualize.py attention runs/photos --images photos/val --count 2 --query 0.5 0.4": Run(),
    "python launch/visualize.py prediction-error runs/photos --images photos/val --count 5": Run(),
    "python launch/visualize.py retrieval runs/photos --images photos/val --count 3": Run(),
    "python launch/visualize.py curves runs/photos runs/demo": Run(),
    "python launch/visualize.py curves runs/mine IN1K-vit.h.14-logs-rank.0.csv --fields loss step_ms": Run(),
    "python launch/report.py runs/first runs/second --to report.html --images photos/val": Run(),
    "python launch/visualize.py curves runs/demo": Run(form=FAST),
    "python launch/visualize.py masks runs/demo --images datasets/fashion-mnist/test": Run(),
    # planning, reference or corrected, reliability, scaling
    "python launch/plan.py --config C.yaml --gpus 16x h100 --network 25 --mfu 0.4 engine.checkpointing=full": Run(("data.batch_size=16",)),
    "python launch/plan.py --config C.yaml --gpus 8x l40s engine.ds_config=ds_configs/zero2.json --json": Run(says='"'),
    "python launch/pretrain.py --config configs/in1k_vith14_ep300.yaml data.train=SHARDS": HUGE,
    "python launch/pretrain.py --config YOUR_PUBLISHED_FILE.yaml": Run(),
    "python launch/checkpoint.py ls runs/mine": Run(says="4", form=FAST),
    "python launch/checkpoint.py verify runs/mine": Run(),
    "python launch/checkpoint.py diff CHECKPOINT CHECKPOINT": Run(swap={"CHECKPOINT": "runs/mine/checkpoints/step-00000004"}),
    "python launch/checkpoint.py rm runs/mine 1000 2000": Run(swap={"1000": "1", "2000": "2"}),
    "python launch/checkpoint.py convert runs/mine --to kept/step-00002000": Run(swap={"kept/step-00002000": "kept/step-00000004"}),
    "python launch/replay.py runs/mine --step 1234": Run(swap={"1234": "3"}, form=FAST),
    "python launch/replay.py runs/mine --step 1234 --exact": Run(swap={"1234": "3"}),
    "python launch/plan.py --config C.yaml --gpus 8x h100 --sweep nodes=1..128 --to scaling.png": Run(("data.batch_size=1024",)),
    "python launch/plan.py --config C.yaml --gpus 4x a100 --sweep nodes=1,2,4 --network 12.5 --measured IMAGES:MS": Run(("data.batch_size=16",), {"IMAGES:MS": "4:10"}),
    # Slurm
    "python launch/slurm.py pretrain --config configs/in1k_vith14_ep300.yaml --nodes 2 --gpus-per-node 8 --partition P --time 1000 data.train=/data/shards": Run(("--dry-run",), {"/data/shards": "data/shards"}),
    "python launch/slurm.py status runs/in1k_vith14_ep300": Never(SLURM_JOBS),
    "python launch/slurm.py logs runs/in1k_vith14_ep300": Run(swap={"runs/in1k_vith14_ep300": "runs/mine"}),
    "python launch/slurm.py cancel runs/in1k_vith14_ep300": Never(SLURM_JOBS),
    "python launch/slurm.py --fname configs/in1k_vith14_ep300.yaml --folder logs --partition P --nodes 2 --tasks-per-node 8 --time 1000": Run(("--dry-run",), says="#SBATCH --requeue"),
    "srun --label --kill-on-bad-exit=0 --wait=120 --cpus-per-task=9 .venv/bin/python launch/pretrain.py '${arguments[@]}'": Never("a line of a job's file: tests/cluster/test_slurm.py"),
    # troubleshooting, tuning, weights
    "python launch/shards.py make --root IMAGES --to SHARDS": Run(("--workers", "0"), without=("SHARDS",)),
    "python launch/tune.py --config configs/demo.yaml": Run(("--limit", "1", "--steps", "3", "--warmup", "1", *SMALL, "data.batch_size=8")),
    "python launch/tune.py --config C.yaml --devices cuda:0 cuda:1 --minutes 30 data.train=/path/to/shards": Run(("--limit", "1", "--steps", "3", "--warmup", "1"), {**CPUS, "/path/to/shards": "SHARDS"}),
    "python launch/pretrain.py --config runs/demo/tuned.yaml": Run(swap={"runs/demo/tuned.yaml": "C.yaml"}),
    "python launch/export.py SOURCE --to encoder.safetensors": Run(),
    "python launch/export.py SOURCE --as timm --to FOLDER": Run(without=("FOLDER",)),
    "python launch/export.py SOURCE --as transformers --to FOLDER": Run(without=("FOLDER",)),
    "python launch/export.py SOURCE --to encoder.onnx": Run(),
    "python launch/export.py SOURCE --to encoder.pt2": Run(),
    "python launch/export.py published:in1k_vith14_ep300 --as transformers --to ijepa-vith14": Run(),
    "python launch/finetune.py --config configs/finetune/base.yaml model.init=published:in1k_vith14_ep300 model.num_classes=N data.train=TRAIN evaluate.test=VAL": Run(FINETUNED, {"N": "2", "TRAIN": "SHARDS", "VAL": "VAL_SHARDS"}),
}  # fmt: skip

# What other programs than ours do, by the beginning of a line, and the test that runs it or why none does.
ELSEWHERE = {
    "git clone ": "test_first_screen.py",
    "cd ": "test_first_screen.py",
    "source ": "test_first_screen.py",
    "make install": "test_first_screen.py",
    "make demo": "test_first_screen.py",
    "make docs": "test_site.py builds the site",
    "make test": "is what runs the tests",
    ".venv/bin/pre-commit install": "writes a hook into the clone; make lint has its checks",
    "tensorboard --logdir ": "serves pages until it is stopped; tests/unit/metrics reads its files",
    "pip install ": "needs a network: make test-versions installs so",
    "python -m build ": "tests/unit/test_wheel.py builds both files",
    "docker ": "needs Docker and a GPU; tests/unit/test_containers.py reads the recipe",
    "apptainer ": "needs Apptainer and a GPU; tests/unit/test_containers.py reads the recipe",
    "python main": "is the published code's",
    "torchrun --max-restarts ": "is a flag by its name",
    "python -m pytest -m gpu": "needs a GPU",
    "python -m tests.lowering.recorded": "writes the file that tests/lowering compares with",
    "python -m benchmarks.": "test_shown_commands.py reads its flags; they measure, and take minutes",
}
