"""Compile small graphs through `Graphs`, in the order given; print what came of it."""

import json
import sys
from pathlib import Path

import numpy as np
from mindspore import Tensor, nn, ops

from sdxl.cache_key import graphs_folder
from sdxl.compile_cache import CompileCache
from sdxl.config import PRESETS
from sdxl.graphs import Graphs, set_up


class Net(nn.Cell):
    def __init__(self, what):
        super().__init__()
        self.dense = nn.Dense(8, 1, has_bias=False)
        self.dense.weight.set_data(Tensor(np.ones((1, 8), np.float32)))
        self.what = what

    def construct(self, x):
        x = self.dense(x)
        if self.what == "add":
            return x + 1
        if self.what == "tanh":
            return ops.tanh(x)
        return x * 3


def main(folder, *names):
    set_up("CPU")
    cache = None
    if folder != "off":
        cache = CompileCache(graphs_folder(Path(folder), PRESETS["tiny"]))
    graphs = Graphs(precision="fp32", jit_level="O2", device_target="CPU", cache=cache)
    found = {}
    for name in names:
        ones = np.ones((1, 8), np.float32)
        value = graphs.run(name, lambda name=name: Net(name), ones)
        found[name] = (sum(graphs.loads.values()), round(float(value[0, 0]), 4))
        graphs.loads.clear()
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
