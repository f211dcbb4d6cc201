"""Installs `ijepa_scale`, and the folder `kernels` as `ijepa_kernels` (the name `kernels` is another package's).

A wheel also holds `launch`, `configs` and `ds_configs`, in `ijepa_scale/_repository`, where `ijepa_scale.shipped` finds
them. Their own names would be everybody's in site-packages.
"""

from pathlib import Path

from setuptools import find_packages, setup

FOLDERS = [
    *("launch", "configs", "ds_configs"),
    *(str(path) for path in sorted(Path("configs").rglob("*")) if path.is_dir()),
]
SHIPPED = {f"ijepa_scale._repository.{folder.replace('/', '.')}": folder for folder in FOLDERS}

setup(
    packages=[
        *find_packages(include=["ijepa_scale", "ijepa_scale.*"]),
        "ijepa_kernels",
        *(f"ijepa_kernels.{name}" for name in find_packages("kernels")),
        *SHIPPED,
    ],
    package_dir={"ijepa_kernels": "kernels", **SHIPPED},
    package_data={
        "ijepa_scale.visualize": ["*.jinja"],
        "ijepa_scale.completion": ["*.json"],
        **{name: ["*.yaml", "*.json"] for name in SHIPPED},
    },
)
