"""Pictures through every system, made by diffusers and by us from these settings.

A run is two pictures of 64x128 (height, width), one with a negative prompt, each with
its own seed, guidance scale and sizes. Runs from an image share `init_pixels`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from sdxl.config import TINY, TINY_REFINER, ModelConfig
from tests.golden.networks_cases import CONSISTENCY, SHORT, Case, normals

MODELS: dict[str, ModelConfig] = {
    "tiny": TINY,
    "tiny-refiner": TINY_REFINER,
    "consistency": CONSISTENCY,
    "short": SHORT,
}
HEIGHT, WIDTH = 64, 128
KARRAS = {
    "discretization": "EDMDiscretization",
    "sigma_min": 0.0291672,
    "sigma_max": 14.6146412,
    "rho": 7.0,
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """What to make, and with whose scheduler diffusers makes it.

    `scheduler` names a class of diffusers or a function of k-diffusion, `settings` are
    its arguments; `listed` gives it our timesteps as a list. `strength` is diffusers'
    for as many steps as ours makes; `seam` is its `denoising_end`, None where the base
    finishes.
    """

    model: str = "tiny"
    scheduler: str = "EulerDiscreteScheduler"
    settings: dict[str, Any] = field(default_factory=dict)
    listed: bool = True
    strength: float | None = None
    refined: bool = False
    seam: float | None = None
    pictures: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def cases(self) -> list[Case]:
        """Give the two pictures."""
        size = {"width": WIDTH, "height": HEIGHT}
        first = Case(prompt="a red circle on a blue square", seed=0, **size)
        second = Case(
            prompt="an owl",
            negative_prompt="a blurry cat",
            seed=4_294_967_295,
            guidance_scale=2.0,
            original_width=1024,
            crop_left=48,
            aesthetic_score=7.25,
            negative_aesthetic_score=1.5,
            **size,
        )
        asked = {"steps": 10} | self.pictures
        return [replace(case, **asked) for case in (first, second)]


def init_pixels() -> np.ndarray:
    """Draw the two images that img2img starts from: (2, 64, 128, 3) uint8."""
    noise = normals("init", (2, HEIGHT, WIDTH, 3))
    slope = np.linspace(40, 215, WIDTH).reshape(1, 1, -1, 1)
    return (slope + 40 * noise).clip(0, 255).astype(np.uint8)


TRAILING = {"timestep_spacing": "trailing"}

RUNS: dict[str, Run] = {
    "heun": Run(
        scheduler="HeunDiscreteScheduler", pictures={"sampler": "HeunEDMSampler"}
    ),
    "euler_ancestral": Run(
        scheduler="EulerAncestralDiscreteScheduler",
        settings=TRAILING,
        listed=False,
        pictures={"sampler": "EulerAncestralSampler"},
    ),
    "dpmpp2m": Run(
        scheduler="DPMSolverMultistepScheduler", pictures={"sampler": "DPMPP2MSampler"}
    ),
    "multistep": Run(
        scheduler="LMSDiscreteScheduler",
        settings=TRAILING,
        listed=False,
        pictures={"sampler": "LinearMultistepSampler"},
    ),
    "churned": Run(
        scheduler="sample_euler",
        settings={"s_churn": 3.0, "s_noise": 1.003},
        pictures={"s_churn": 3.0, "s_noise": 1.003},
    ),
    "dpmpp2s_ancestral": Run(
        scheduler="sample_dpmpp_2s_ancestral",
        pictures={"sampler": "DPMPP2SAncestralSampler"},
    ),
    "dpmpp2m_karras": Run(
        scheduler="sample_dpmpp_2m",
        pictures={"sampler": "DPMPP2MSampler", "steps": 20, **KARRAS},
    ),
    "leading": Run(
        settings={"steps_offset": 1},
        listed=False,
        pictures={"discretization": "DiffusersDDPMDiscretization"},
    ),
    "euler_karras_fractional": Run(
        settings={"use_karras_sigmas": True, "timestep_spacing": "linspace"},
        listed=False,
        pictures=KARRAS,
        options={"quantize_sigma": False},
    ),
    "v_prediction": Run(
        settings={"prediction_type": "v_prediction"}, options={"scaling": "VScaling"}
    ),
    "edm": Run(
        scheduler="EDMEulerScheduler",
        listed=False,
        pictures=KARRAS | {"sigma_min": 0.002, "sigma_max": 80.0},
        options={"scaling": "EDMScaling"},
    ),
    "unguided": Run(pictures={"guider": "IdentityGuider"}),
    "thresholded": Run(
        scheduler="DPMSolverMultistepScheduler",
        settings={
            "thresholding": True,
            "dynamic_thresholding_ratio": 0.99,
            "sample_max_value": 1.5,
        },
        pictures={
            "sampler": "DPMPP2MSampler",
            "thresholding_ratio": 0.99,
            "thresholding_maximum": 1.5,
        },
    ),
    "lcm_guided": Run(
        scheduler="LCMScheduler", pictures={"sampler": "LCMSampler", "steps": 4}
    ),
    "lcm_embedded": Run(
        model="consistency",
        scheduler="LCMScheduler",
        pictures={"sampler": "LCMSampler", "steps": 4, "guider": "IdentityGuider"},
    ),
    # 14 steps of 20 at 0.75, where diffusers would make 15.
    "img2img": Run(strength=0.7, pictures={"steps": 20, "strength": 0.75}),
    "img2img_ancestral": Run(
        scheduler="EulerAncestralDiscreteScheduler",
        settings=TRAILING,
        listed=False,
        strength=0.4,
        pictures={
            "sampler": "EulerAncestralSampler",
            "strength": 0.5,
        },
    ),
    "refiner": Run(
        model="tiny-refiner", strength=0.7, pictures={"steps": 20, "strength": 0.75}
    ),
    "two_stage_20": Run(refined=True, seam=0.86, pictures={"steps": 20}),
    "two_stage_40": Run(refined=True, seam=0.86, pictures={"steps": 40}),
    "two_stage_ancestral": Run(
        scheduler="EulerAncestralDiscreteScheduler",
        settings=TRAILING,
        listed=False,
        refined=True,
        seam=0.86,
        pictures={"sampler": "EulerAncestralSampler", "steps": 20},
    ),
    "two_stage_renoised": Run(refined=True, strength=0.1, pictures={"steps": 20}),
}
