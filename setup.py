"""Installs `ijepa_scale`, and the folder `kernels` as `ijepa_kernels` (the name `kernels` is another package's)."""

from setuptools import find_packages, setup

kernels = find_packages("kernels")

setup(
    packages=[
        *find_packages(include=["ijepa_scale", "ijepa_scale.*"]),
        "ijepa_kernels",
        *(f"ijepa_kernels.{name}" for name in kernels),
    ],
    package_dir={"ijepa_kernels": "kernels"},
    package_data={"ijepa_scale.visualize": ["*.jinja"]},
)
