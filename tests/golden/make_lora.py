"""Record the tiny model's weights after diffusers merged LoRA files into them.

python tests/golden/make_lora.py        needs peft beside the oracle packages
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from diffusers import StableDiffusionXLPipeline

from sdxl.config import TINY
from sdxl.convert import convert
from sdxl.layouts import tensor_specs
from tests.golden.lora_cases import SCALES, samples, write_lora
from tests.sdxl.small_models import numbers, write

NETWORKS = ["unet", "text_encoder", "text_encoder_2"]


def fused(folder: Path, lora: Path, scale: float) -> dict[str, np.ndarray]:
    """Merge a file with diffusers; give the weights by their original names."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name)
    pipeline.fuse_lora(components=NETWORKS, lora_scale=scale)
    pipeline.unload_lora_weights()
    state = {
        f"{network}/{'text_model.' if network == 'text_encoder' else ''}{name}": tensor
        for network in NETWORKS
        for name, tensor in getattr(pipeline, network).state_dict().items()
    }
    return {
        spec.name: spec.from_layout(
            "diffusers", [state[name].numpy() for name in spec.names_in("diffusers")]
        )
        for spec in tensor_specs(TINY)
        if spec.component in NETWORKS and spec.diffusers
    }


def main() -> None:
    arrays = numbers(TINY)
    record = {}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        convert(write(root / "tiny.safetensors", arrays), root / "tiny")
        for style in ("peft", "kohya"):
            lora = write_lora(root / f"{style}.safetensors", style)
            for scale in SCALES:
                merged = fused(root / "tiny", lora, scale)
                changed = sorted(
                    n for n in merged if not np.array_equal(merged[n], arrays[n])
                )
                record[f"{style} {scale} names"] = np.array(changed)
                record[f"{style} {scale}"] = np.stack(
                    [samples(merged[name]) for name in changed]
                )
    np.savez_compressed(Path(__file__).with_name("lora_fused.npz"), **record)


if __name__ == "__main__":
    main()
