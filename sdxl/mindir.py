"""What a graph is made of: exported as MindIR and read back, without a device.

    a Cell, inputs ──ms.export──> ModelProto ──read──> Graph: nodes, parameters, bytes

Design: an export runs the front end of the compiler alone, shapes and types included,
so a graph in its Ascend form can be looked at on any machine. The weights are taken
out before they are written, and parameters of an `SDXL` have no memory until they are
loaded: a full-size network takes seconds and about a gigabyte. `Exports` stands in for
`Graphs` in a pipeline, which so exports just the graphs that it would run, with just
the inputs that it would give them.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from mindspore.train.mind_ir_pb2 import AttributeProto, ModelProto, TensorProto

from sdxl.graphs import Graphs, Input, on_device

# Nodes of the representation itself, which compute nothing and own no memory.
STRUCTURE = frozenset(
    ("Constant", "Load", "Depend", "UpdateState", "MakeTuple", "TupleGetItem", "Return")
)
# What gives the memory of its first input another shape.
VIEWS = frozenset(("Load", "Depend", "TupleGetItem", "Reshape", "ExpandDims"))
DTYPES = {
    TensorProto.FLOAT: np.float32,
    TensorProto.FLOAT16: np.float16,
    TensorProto.INT32: np.int32,
    TensorProto.INT64: np.int64,
    TensorProto.BOOL: np.bool_,
    TensorProto.UINT8: np.uint8,
    TensorProto.DOUBLE: np.float64,
    TensorProto.FLOAT64: np.float64,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Array:
    """Shape and type of an array; a size of -1 is not known before it runs."""

    shape: tuple[int, ...]
    dtype: int

    @property
    def type_name(self) -> str:
        return TensorProto.DataType.Name(self.dtype)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(DTYPES[self.dtype]).itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A call of a primitive: what it takes, by name, and the arrays it gives."""

    name: str
    primitive: str
    inputs: tuple[str, ...]
    outputs: tuple[Array, ...]
    scope: str


@dataclass(frozen=True)
class Graph:
    """A compiled graph's front end, read back from the bytes of its MindIR."""

    key: str
    data: bytes
    seconds: float

    @cached_property
    def proto(self) -> ModelProto:
        proto = ModelProto()
        proto.ParseFromString(self.data)
        return proto

    @cached_property
    def nodes(self) -> list[Node]:
        graphs = (self.proto.graph, *self.proto.functions)
        return [_node(node) for graph in graphs for node in graph.node]

    @property
    def primitives(self) -> Counter[str]:
        """Count the nodes of each primitive; `STRUCTURE` is left out."""
        names = (node.primitive for node in self.nodes)
        return Counter(name for name in names if name not in STRUCTURE)

    @cached_property
    def parameters(self) -> dict[str, Array]:
        """Name each weight without the graph's own prefix."""
        return {p.name.partition(":")[2]: _array(p) for p in self.proto.graph.parameter}

    @property
    def parameter_bytes(self) -> int:
        return sum(array.nbytes for array in self.parameters.values())

    @property
    def inputs(self) -> list[Array]:
        return [_array(i.tensor[0]) for i in self.proto.graph.input]

    @property
    def outputs(self) -> list[Array]:
        outputs = self.proto.graph.output
        tuples = [array for o in outputs for array in _arrays(o.attr_info)]
        return tuples or [_array(t) for o in outputs for t in o.tensor]

    def digest(self) -> str:
        """Hash all that the graph computes; names and counters in them are left out."""
        order: dict[str, int] = {}
        digest = hashlib.sha256()
        graphs = (self.proto.graph, *self.proto.functions)
        for kind in ("input", "parameter", "node"):
            for item in (item for graph in graphs for item in getattr(graph, kind)):
                digest.update(_anonymous(item, order))
        for primitive in sorted(_attributes(p) for p in self.proto.primitives):
            digest.update(primitive)
        return digest.hexdigest()

    def live_bytes(self) -> int:
        """Estimate the most memory that arrays hold at a time, weights left out.

        Nodes run in the order of the file; an array is held from its node to the last
        one that takes it, and one that is only given another shape is not held twice.
        An engine that fuses nodes needs less, its kernels' work spaces come on top.
        """
        owners = _owners(self.nodes)
        size = {
            node.name: sum(array.nbytes for array in node.outputs)
            for node in self.nodes
            if node.primitive not in STRUCTURE | VIEWS
        }
        last: dict[str, int] = {}
        for position, node in enumerate(self.nodes):
            for name in node.inputs:
                last.update(dict.fromkeys(owners.get(name, ()), position))
        for output in self.proto.graph.output:
            last.update(dict.fromkeys(owners.get(output.name, ()), len(self.nodes)))

        held = most = sum(array.nbytes for array in self.inputs)
        ends: Counter[int] = Counter()
        for position, node in enumerate(self.nodes):
            held += size.get(node.name, 0)
            ends[last.get(node.name, position)] += size.get(node.name, 0)
            most = max(most, held)
            held -= ends[position]
        return most


def export(cell: nn.Cell, inputs: Sequence[Tensor], key: str) -> Graph:
    """Export a Cell for these inputs, weights left out, and read the graph back."""
    kept: list[bytes] = []

    def keep(model: ModelProto) -> None:
        kept.append(model.SerializeToString())
        del model.graph.parameter[:]

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph"
        ms.export(
            cell.set_train(False),
            *inputs,
            file_name=str(path),
            file_format="MINDIR",
            custom_func=keep,
        )
    return Graph(key, kept[0], time.perf_counter() - start)


class Exports(Graphs):
    """A model's graphs, exported where they would run; what they return is zeros."""

    def __init__(self, *, precision: str, jit_level: str, device_target: str) -> None:
        super().__init__(
            precision=precision, jit_level=jit_level, device_target=device_target
        )
        self.found: dict[str, Graph] = {}

    def run(self, name: str, make: Callable[[], nn.Cell], *inputs: Input) -> Any:
        """Export the graph `name` when it is first asked for; return zeros."""
        key = f"{self.prefix}{name}-{self.suffix}"
        if key not in self.found:
            cell = make()
            cell.set_jit_config(ms.JitConfig(jit_level=self.jit_level))
            tensors = [on_device(x) if isinstance(x, np.ndarray) else x for x in inputs]
            self.found[key] = export(cell, tensors, key)
        arrays = [np.zeros(a.shape, DTYPES[a.dtype]) for a in self.found[key].outputs]
        return tuple(arrays) if len(arrays) > 1 else arrays[0]

    def keep(self, name: str, make: Callable[[], nn.Cell], *inputs: Input) -> Any:
        """Do as `run`; the zeros are tensors."""
        zeros = self.run(name, make, *inputs)
        return tuple(map(Tensor, zeros)) if isinstance(zeros, tuple) else Tensor(zeros)


def _node(proto: Any) -> Node:
    shapes = [a for a in proto.attribute if a.name == "shape"]
    return Node(
        name=proto.output[0],
        primitive=proto.op_type.removeprefix("REF::").partition(":")[0],
        inputs=tuple(proto.input),
        outputs=tuple(array for a in shapes for array in _arrays(a)),
        scope=proto.domain,
    )


def _arrays(attribute: Any) -> Iterator[Array]:
    if attribute.type in (AttributeProto.TUPLE, AttributeProto.LIST):
        for value in attribute.values:
            yield from _arrays(value)
    for tensor in attribute.tensors:
        yield _array(tensor)


def _array(tensor: Any) -> Array:
    return Array(shape=tuple(tensor.dims), dtype=tensor.data_type)


def _owners(nodes: Sequence[Node]) -> dict[str, tuple[str, ...]]:
    """Say which nodes' memory each name stands for."""
    owners: dict[str, tuple[str, ...]] = {}
    for node in nodes:
        if node.primitive == "MakeTuple":
            found = [name for taken in node.inputs for name in owners.get(taken, ())]
            owners[node.name] = tuple(found)
        elif node.primitive in VIEWS:
            owners[node.name] = owners.get(node.inputs[0], ())
        elif node.primitive not in STRUCTURE:
            owners[node.name] = (node.name,)
    return owners


def _anonymous(item: Any, order: dict[str, int]) -> bytes:
    """Serialize an input, a weight or a node, its names replaced by their numbers."""
    if not hasattr(item, "op_type"):
        order[item.name] = len(order)
        shape = item.tensor[0] if hasattr(item, "tensor") else item
        return f"{list(shape.dims)}{shape.data_type}".encode()
    order[item.output[0]] = len(order)
    inputs = [order.get(name, name) for name in item.input]
    primitive = item.op_type.removeprefix("REF::").partition(":")[0]
    return f"{primitive}{inputs}".encode() + _attributes(item)


def _attributes(item: Any) -> bytes:
    return b"".join(
        sorted(a.SerializeToString(deterministic=True) for a in item.attribute)
    )
