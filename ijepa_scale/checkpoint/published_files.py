"""The four weights that were published with the paper: their names here, addresses, architectures and licence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath

PUBLISHED = "published:"
ADDRESS = "https://dl.fbaipublicfiles.com/ijepa/"
# Source: LICENSE of facebookresearch/ijepa.
LICENCE, LICENCE_TEXT = (
    "cc-by-nc-4.0",
    "CC-BY-NC 4.0 (no commercial use; https://creativecommons.org/licenses/by-nc/4.0)",
)


@dataclass(frozen=True, kw_only=True)
class PublishedFile:
    """One of the published files."""

    file: str
    width: int
    depth: int
    patch_size: int


# Names of the configurations that the files were trained with. Source: README of facebookresearch/ijepa.
FILES = {
    "in1k_vith14_ep300": PublishedFile(file="IN1K-vit.h.14-300e.pth.tar", width=1280, depth=32, patch_size=14),
    "in1k_vith16-448_ep300": PublishedFile(
        file="IN1K-vit.h.16-448px-300e.pth.tar", width=1280, depth=32, patch_size=16
    ),
    "in22k_vith14_ep66": PublishedFile(file="IN22K-vit.h.14-900e.pth.tar", width=1280, depth=32, patch_size=14),
    "in22k_vitg16_ep44": PublishedFile(file="IN22K-vit.g.16-600e.pth.tar", width=1408, depth=40, patch_size=16),
}


def licence_of(source: str) -> str | None:
    """Returns the licence of a source by its name, if it is a published one or a conversion of it; else None."""
    if source.startswith(PUBLISHED) or PurePath(source).name in {known.file for known in FILES.values()}:
        return LICENCE
    # Source: the licence fields of timm's pretrained configurations, and of the models on the hub.
    is_converted = source.startswith(("timm:", "transformers:", "vit_", "facebook/")) and "ijepa" in source
    return LICENCE if is_converted else None
