"""Writes the model card of an export, in the form that the Hugging Face hub reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import PurePath

from ijepa_scale.checkpoint.portable import Portable
from ijepa_scale.checkpoint.published_files import LICENCE, LICENCE_TEXT

# What one of timm and transformers does with `images`, by whether it is a classifier
_RUNS = {
    ("timm", False): "features = model(images)  # (B, D): the mean of model.forward_features(images), (B, N, D)",
    ("timm", True): "logits = model(images)",
    ("transformers", False): "features = model(images).last_hidden_state.mean(dim=1)  # (B, D), of tokens (B, N, D)",
    ("transformers", True): "logits = model(images).logits",
}
_WHICH = {"target": "the target encoder", "context": "the context encoder", "only": "its only encoder"}


def model_card(model: Portable, library: str, opens: Sequence[str]) -> str:
    """Returns the card as Markdown with a YAML header.

    Args:
        model: what was exported.
        library: timm or transformers.
        opens: lines of Python of which each opens the folder.
    """
    weights, sizes, licence = model.weights, model.sizes, model.weights.facts.licence
    is_classifier = model.classifier is not None
    # the header is YAML, of which JSON's texts are a part
    head = [
        *([f"license: {json.dumps(licence)}"] if licence else []),
        f"library_name: {library}",
        f"pipeline_tag: {'image-classification' if is_classifier else 'image-feature-extraction'}",
        "tags: [ijepa]",
    ]
    height, width = model.image_size
    kind = (
        f"a classifier of {model.num_classes} classes on it"
        if is_classifier
        else "its features are the mean of its tokens"
    )
    code = [f"import {library}", "", *(f"model = {line}" for line in opens), _RUNS[library, is_classifier]]
    told = {
        LICENCE: f"The weights come from files published with I-JEPA under {LICENCE_TEXT}.",
        None: "The source of these weights states no licence. That of weights which training started from may apply.",
    }.get(licence, f"The source of these weights states the licence {licence}.")
    lines = [
        "---", *head, "---", "",
        "# I-JEPA encoder",
        "",
        f"A vision transformer with {sizes.patch_size}-pixel patches: width {sizes.width}, {sizes.depth} blocks, "
        f"{sizes.heads} heads, MLPs of {sizes.mlp_width}; {kind}.",
        "",
        f"Exported by ijepa_scale from `{PurePath(weights.origin).name}`, {_WHICH[weights.which]} (SHA-256 of the "
        f"source: {model.digest}).",
        "",
        "## Open it", "", "```python", *code, "```", "",
        "## Images",
        "",
        f"{sizes.channels} channels of {model.pixels}, {height} x {width} pixels. Resize (bicubic) to cover it with a "
        f"crop fraction of {model.crop_fraction:g}, cut the centre, scale to [0, 1], subtract the mean "
        f"{list(model.mean)} and divide by the standard deviation {list(model.std)}.",
        "",
        "## Licence", "", told, "",
    ]  # fmt: skip
    return "\n".join(lines)
