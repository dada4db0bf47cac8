"""The two text encoders: token ids to hidden states, and to one pooled vector.

Attribute names are the checkpoint's keys: `ClipText` follows Hugging Face's CLIP
(`transformer.text_model.…`), `OpenClipText` OpenCLIP's (`model.…`, fused projections).
Both return their penultimate hidden states without the final norm, as SDXL was trained
(Podell et al. 2023, section 2.1).
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from mindspore import ops as msops

from sdxl import ops
from sdxl.config import TextEncoderConfig
from sdxl.layers import Dense, Embedding, LayerNorm, empty

# The least float16: after softmax it is exactly 0 in both precisions.
MASKED = -65_504.0


def causal_mask(length: int) -> Tensor:
    """(L, L) float32: 0 where a token may look, `MASKED` at the tokens after it."""
    return Tensor(np.triu(np.full((length, length), MASKED, np.float32), k=1))


class ClipAttention(nn.Cell):
    def __init__(self, width: int, heads: int, dtype: ms.Type) -> None:
        super().__init__()
        self.q_proj = Dense(width, width, dtype)
        self.k_proj = Dense(width, width, dtype)
        self.v_proj = Dense(width, width, dtype)
        self.out_proj = Dense(width, width, dtype)
        self.attention = ops.Attention(heads, width // heads)

    def construct(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.out_proj(self.attention(q, k, v, mask))


class ClipMLP(nn.Cell):
    def __init__(self, width: int, mlp_width: int, dtype: ms.Type) -> None:
        super().__init__()
        self.fc1 = Dense(width, mlp_width, dtype)
        self.fc2 = Dense(mlp_width, width, dtype)

    def construct(self, x: Tensor) -> Tensor:
        return self.fc2(ops.quick_gelu(self.fc1(x)))


class ClipLayer(nn.Cell):
    def __init__(self, config: TextEncoderConfig, dtype: ms.Type) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(config.width)
        self.self_attn = ClipAttention(config.width, config.heads, dtype)
        self.layer_norm2 = LayerNorm(config.width)
        self.mlp = ClipMLP(config.width, config.mlp_width, dtype)

    def construct(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), mask)

        return x + self.mlp(self.layer_norm2(x))


class ClipEmbeddings(nn.Cell):
    def __init__(self, config: TextEncoderConfig, dtype: ms.Type) -> None:
        super().__init__()
        self.token_embedding = Embedding(config.vocab_size, config.width, dtype)
        self.position_embedding = Embedding(config.context_length, config.width, dtype)

    def construct(self, ids: Tensor) -> Tensor:
        return ops.add_row(
            self.token_embedding(ids), self.position_embedding.embedding_table
        )


class ClipLayers(nn.Cell):
    def __init__(self, config: TextEncoderConfig, dtype: ms.Type) -> None:
        super().__init__()
        layers = [ClipLayer(config, dtype) for _ in range(config.layers)]
        self.layers = nn.CellList(layers)


class ClipTextModel(nn.Cell):
    """The last layer and the final norm belong to the checkpoint, not to the result."""

    def __init__(self, config: TextEncoderConfig, dtype: ms.Type) -> None:
        super().__init__()
        self.embeddings = ClipEmbeddings(config, dtype)
        self.encoder = ClipLayers(config, dtype)
        self.final_layer_norm = LayerNorm(config.width)
        self.depth = config.layers - 1
        self.mask = causal_mask(config.context_length)

    def construct(self, ids: Tensor) -> Tensor:
        x = self.embeddings(ids)
        for layer in self.encoder.layers[: self.depth]:
            x = layer(x, self.mask)
        return x


class ClipTransformer(nn.Cell):
    def __init__(self, config: TextEncoderConfig, dtype: ms.Type) -> None:
        super().__init__()
        self.text_model = ClipTextModel(config, dtype)


class ClipText(nn.Cell):
    """CLIP ViT-L's text half: (B, L) ids -> hidden (B, L, D) and no pooled vector."""

    def __init__(self, config: TextEncoderConfig, dtype: ms.Type) -> None:
        super().__init__()
        self.transformer = ClipTransformer(config, dtype)

    def construct(self, ids: Tensor, end: Tensor) -> tuple[Tensor, None]:
        return self.transformer.text_model(ids), None


class OpenClipAttention(nn.Cell):
    def __init__(self, width: int, heads: int, dtype: ms.Type) -> None:
        super().__init__()
        self.in_proj_weight = empty((3 * width, width), dtype, "in_proj_weight")
        self.in_proj_bias = empty((3 * width,), dtype, "in_proj_bias")
        self.out_proj = Dense(width, width, dtype)
        self.attention = ops.Attention(heads, width // heads)

    def construct(self, x: Tensor, mask: Tensor) -> Tensor:
        D = x.shape[-1]
        qkv = ops.dense(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = msops.split(qkv, D, -1)
        return self.out_proj(self.attention(q, k, v, mask))


class OpenClipMLP(nn.Cell):
    def __init__(self, width: int, mlp_width: int, dtype: ms.Type) -> None:
        super().__init__()
        self.c_fc = Dense(width, mlp_width, dtype)
        self.c_proj = Dense(mlp_width, width, dtype)

    def construct(self, x: Tensor) -> Tensor:
        return self.c_proj(ops.gelu(self.c_fc(x)))


class OpenClipLayer(nn.Cell):
    def __init__(self, config: TextEncoderConfig, dtype: ms.Type) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.width)
        self.attn = OpenClipAttention(config.width, config.heads, dtype)
        self.ln_2 = LayerNorm(config.width)
        self.mlp = OpenClipMLP(config.width, config.mlp_width, dtype)

    def construct(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask)

        return x + self.mlp(self.ln_2(x))


class OpenClipLayers(nn.Cell):
    def __init__(self, config: TextEncoderConfig, dtype: ms.Type) -> None:
        super().__init__()
        layers = [OpenClipLayer(config, dtype) for _ in range(config.layers)]
        self.resblocks = nn.CellList(layers)


class OpenClipModel(nn.Cell):
    """`logit_scale` is part of the checkpoint, not of the result."""

    def __init__(self, config: TextEncoderConfig, dtype: ms.Type) -> None:
        super().__init__()
        D, L = config.width, config.context_length
        self.token_embedding = Embedding(config.vocab_size, D, dtype)
        self.positional_embedding = empty((L, D), dtype, "positional_embedding")
        self.transformer = OpenClipLayers(config, dtype)
        self.ln_final = LayerNorm(D)
        self.text_projection = empty((D, D), dtype, "text_projection")
        self.logit_scale = empty((), ms.float32, "logit_scale")
        self.depth = config.layers - 1
        self.mask = causal_mask(L)
        self.project = msops.MatMul()

    def construct(self, ids: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        B, L = ids.shape
        x = ops.add_row(self.token_embedding(ids), self.positional_embedding)
        for layer in self.transformer.resblocks[: self.depth]:
            x = layer(x, self.mask)
        last = self.transformer.resblocks[self.depth](x, self.mask)

        last = self.ln_final(last).reshape(B * L, -1)
        row = end + msops.arange(0, B * L, L).astype(ms.int32)
        pooled = self.project(msops.gather(last, row, 0), self.text_projection)
        return x, pooled


class OpenClipText(nn.Cell):
    """OpenCLIP's text half: (B, L) ids, (B,) index of the end token, both int32.

    Returns hidden (B, L, D), and pooled (B, D): the end token's projected state.
    """

    def __init__(self, config: TextEncoderConfig, dtype: ms.Type) -> None:
        super().__init__()
        self.model = OpenClipModel(config, dtype)

    def construct(self, ids: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        return self.model(ids, end)


def text_encoder(config: TextEncoderConfig, dtype: ms.Type) -> nn.Cell:
    """Build the encoder that `config.kind` names."""
    return {"clip": ClipText, "openclip": OpenClipText}[config.kind](config, dtype)
