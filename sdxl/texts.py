"""Texts through a model's encoders, each distinct one once.

Design: prompts of a job repeat, negative prompts most of all, so what was encoded
lately is kept on the host, by its token ids: texts that read alike to the encoders are
one. The batch size is part of what is remembered: another one moves a text's numbers by
1e-6.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from mindspore import ops as msops

from sdxl.conditioning import Text
from sdxl.config import ModelConfig
from sdxl.graphs import Graphs
from sdxl.model import SDXL
from sdxl.picture import filled
from sdxl.tokenizer import END_ID, Tokenizer

CACHED_TEXTS = 256


class EncodeText(nn.Cell):
    """Run every text encoder: end positions, ids of each -> hidden states, pooled."""

    def __init__(self, model: SDXL) -> None:
        super().__init__(auto_prefix=False)
        self.embedders = model.conditioner.embedders

    def construct(self, end: Tensor, *ids: Tensor) -> tuple[Tensor, Tensor]:
        hidden, pooled = (), None
        for i in range(len(ids)):
            states, vector = self.embedders[i](ids[i], end)
            hidden = (*hidden, states.astype(ms.float32))
            if vector is not None:
                pooled = vector.astype(ms.float32)
        return msops.concat(hidden, -1), pooled


class Texts:
    """The text encoders of one model, and the texts they encoded lately."""

    def __init__(self, model: SDXL, config: ModelConfig, graphs: Graphs) -> None:
        self.model = model
        self.graphs = graphs
        self._tokenizers = [Tokenizer(e.pad_id) for e in config.text_encoders]
        self._known: OrderedDict[tuple[bytes, int], Text] = OrderedDict()

    def encode(self, texts: Iterable[str], batch_size: int) -> dict[str, Text]:
        """Encode the distinct ones of `texts` that are not known yet."""
        distinct = list(dict.fromkeys(texts))
        ids = self.tokenize(distinct)
        keys = [
            (b"".join(one[i].tobytes() for one in ids), batch_size)
            for i in range(len(distinct))
        ]
        rows = {key: i for i, key in enumerate(keys)}
        missing = [i for key, i in rows.items() if key not in self._known]
        found = {key: self._known[key] for key in rows if key in self._known}
        for part, valid in filled(len(missing), batch_size):
            chosen = [missing[row] for row in part]
            hidden, pooled = self.run([one[chosen] for one in ids])
            for i in range(valid):
                found[keys[chosen[i]]] = Text(hidden=hidden[i], pooled=pooled[i])
        self._remember(found)
        return {text: found[key] for text, key in zip(distinct, keys, strict=True)}

    def tokenize(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids (n, 77) that each encoder reads."""
        return [tokenizer(texts)[0] for tokenizer in self._tokenizers]

    def run(self, ids: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Encode a batch of ids (n, 77), one array per encoder.

        Returns hidden states (n, 77, D) and the pooled vector (n, P), float32.
        """
        end = (ids[-1] == END_ID).argmax(axis=1).astype(np.int32)
        name = f"text-b{len(end)}"
        return self.graphs.run(name, lambda: EncodeText(self.model), end, *ids)

    def _remember(self, texts: dict[tuple[bytes, int], Text]) -> None:
        for key, encoded in texts.items():
            self._known[key] = encoded
            self._known.move_to_end(key)
        while len(self._known) > CACHED_TEXTS:
            self._known.popitem(last=False)
