"""A whole SDXL: the networks under the prefixes of the original checkpoint.

`SDXL(config, precision).parameters_dict()` has exactly the names of the reference's
MindSpore checkpoints, which `layouts.tensor_specs` lists.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import nn
from mindspore.nn.utils import no_init_parameters

from sdxl.clip import text_encoder
from sdxl.config import ModelConfig
from sdxl.unet import UNet
from sdxl.vae import VAE

PRECISIONS: dict[str, ms.Type] = {"fp32": ms.float32, "fp16": ms.float16}


class DiffusionModel(nn.Cell):
    def __init__(self, config: ModelConfig, dtype: ms.Type) -> None:
        super().__init__()
        self.diffusion_model = UNet(config.unet, dtype)


class Conditioner(nn.Cell):
    def __init__(self, config: ModelConfig, dtype: ms.Type) -> None:
        super().__init__()
        encoders = [text_encoder(encoder, dtype) for encoder in config.text_encoders]
        self.embedders = nn.CellList(encoders)


class SDXL(nn.Cell):
    """The networks, their parameters without data until a loader gives it.

    `precision` holds for the UNet and the text encoders; norms and the autoencoder stay
    in float32.
    """

    def __init__(self, config: ModelConfig, precision: str) -> None:
        super().__init__()
        dtype = PRECISIONS[precision]
        with no_init_parameters():
            self.model = DiffusionModel(config, dtype)
            self.conditioner = Conditioner(config, dtype)
            self.first_stage_model = VAE(config.vae)
        self.set_train(False)
