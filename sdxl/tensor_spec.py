"""One tensor of a model under its names and forms in the three layouts.

original    one file; the names that our Cells' attributes have
mindspore   the same, but a norm has gamma and beta, an embedding embedding_table
diffusers   a folder per network; other names, a few other forms (`Form`)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Layout = Literal["original", "mindspore", "diffusers"]

# How a tensor's diffusers form differs from its original one:
#   same        not at all
#   matrix      a 1x1 convolution (O, I, 1, 1) is a dense weight (O, I)
#   transposed  (I, O) is (O, I)
#   qkv         the rows are three tensors: query, key, value
#   absent      diffusers has none
Form = Literal["same", "matrix", "transposed", "qkv", "absent"]
Kind = Literal["plain", "norm", "embedding"]
_MINDSPORE: dict[Kind, dict[str, str]] = {
    "plain": {},
    "norm": {"weight": "gamma", "bias": "beta"},
    "embedding": {"weight": "embedding_table"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One tensor of a model: `name` and `shape` are the original layout's.

    `diffusers` has one name, three for a fused projection, none for an absent tensor;
    `component` is the folder they are in.
    """

    name: str
    shape: tuple[int, ...]
    component: str = ""
    diffusers: tuple[str, ...]
    form: Form = "same"
    kind: Kind = "plain"

    @property
    def mindspore(self) -> str:
        """The name in the reference's MindSpore checkpoints and in our Cells."""
        stem, _, last = self.name.rpartition(".")
        return f"{stem}.{_MINDSPORE[self.kind].get(last, last)}"

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def names_in(self, layout: Layout) -> tuple[str, ...]:
        """Give its names in a layout; a diffusers name is preceded by its folder."""
        match layout:
            case "original":
                return (self.name,)
            case "mindspore":
                return (self.mindspore,)
        return tuple(f"{self.component}/{name}" for name in self.diffusers)

    def shape_in(self, layout: Layout) -> tuple[int, ...]:
        """Give the shape of each of its tensors in a layout."""
        if layout == "diffusers":
            match self.form:
                case "matrix":
                    return self.shape[:2]
                case "transposed":
                    return self.shape[::-1]
                case "qkv":
                    return (self.shape[0] // 3, *self.shape[1:])
        return self.shape

    def from_layout(self, layout: Layout, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Bring its tensors in a layout to the original form."""
        if layout == "diffusers":
            match self.form:
                case "qkv":
                    return np.concatenate(parts)
                case "transposed":
                    return np.ascontiguousarray(parts[0].T)
        return parts[0].reshape(self.shape)

    def to_layout(self, layout: Layout, array: np.ndarray) -> list[np.ndarray]:
        """Bring the original form to its tensors in a layout, as `names_in` lists."""
        if layout == "diffusers":
            match self.form:
                case "qkv":
                    return np.split(array, 3)
                case "transposed":
                    return [array.T]
                case "absent":
                    return []
        return [array.reshape(self.shape_in(layout))]
