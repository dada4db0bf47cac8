"""Texts through a model's encoders, each distinct one once.

Design: prompts of a job repeat, negative prompts most of all, so what was encoded
lately is kept on the host. The batch size is part of what is remembered: another one
moves a text's numbers by 1e-6.
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
        self._known: OrderedDict[tuple[str, int], Text] = OrderedDict()

    def encode(self, texts: Iterable[str], batch_size: int) -> dict[str, Text]:
        """Encode the distinct ones of `texts` that are not known yet."""
        distinct = dict.fromkeys(texts)
        missing = [text for text in distinct if (text, batch_size) not in self._known]
        fresh: dict[str, Text] = {}
        for rows, valid in filled(len(missing), batch_size):
            part = [missing[row] for row in rows]
            hidden, pooled = self._run(part)
            for i in range(valid):
                fresh[part[i]] = Text(hidden=hidden[i], pooled=pooled[i])

        found = {
            text: fresh[text] if text in fresh else self._known[text, batch_size]
            for text in distinct
        }
        self._remember(found, batch_size)
        return found

    def _run(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        ids = [tokenizer(texts)[0] for tokenizer in self._tokenizers]
        end = (ids[-1] == END_ID).argmax(axis=1).astype(np.int32)
        name = f"text-b{len(texts)}"
        return self.graphs.run(name, lambda: EncodeText(self.model), end, *ids)

    def _remember(self, texts: dict[str, Text], batch_size: int) -> None:
        for text, encoded in texts.items():
            self._known[text, batch_size] = encoded
            self._known.move_to_end((text, batch_size))
        while len(self._known) > CACHED_TEXTS:
            self._known.popitem(last=False)
