"""For VisBench: `visbench.run(backbone("runs/mine"), "semantic_segmentation", dataset, train_dataset)`."""

from typing import Any

from visbench import CustomBackbone

from ijepa_scale.evaluate.frozen import load


def backbone(source: str, *, device: str = "cpu", **options: Any) -> CustomBackbone:
    """Returns what `ijepa_scale.load` reads, each block's tokens after the final norm; `options` go to `load`."""
    encoder, transform = load(source, **options)

    def layers(module: Any, images: Any, chosen: list[int]) -> list[Any]:
        outputs = module(images, last=len(module.blocks) - chosen[0])
        return [(outputs[index - chosen[0]], None, module.grid) for index in chosen]

    sizes: dict[str, Any] = {"embed_dim": encoder.width, "patch_size": encoder.patch_size}
    sizes |= {"image_size": transform.image_size[0], "num_layers": len(encoder.blocks)}
    return CustomBackbone(encoder, transform, name="ijepa", layer_feature_fn=layers, device=device, **sizes)
