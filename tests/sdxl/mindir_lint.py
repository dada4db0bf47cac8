"""Hold every graph, in the form it has on a card, to what a card can run.

    python tests/sdxl/mindir_lint.py --report docs/ascend.md

Pipelines without weights are driven through their stages, each graph exported instead
of run (`sdxl.mindir.Exports`), once for each of two quite different jobs.
"""

from __future__ import annotations

import argparse
import re
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from sdxl.config import BASE, REFINER, ModelConfig  # noqa: E402
from sdxl.layouts import tensor_specs  # noqa: E402
from sdxl.mindir import STRUCTURE, Array, Exports, Graph  # noqa: E402
from tests.golden.networks_cases import Case  # noqa: E402
from tests.jobs.report import put_into  # noqa: E402
from tests.sdxl import card_memory  # noqa: E402

LCM = replace(BASE, unet=replace(BASE.unet, time_cond_proj_dim=256))
START, END = "<!-- mindir -->", "<!-- /mindir -->"
MB = 1e6
Found = tuple[str, int, Graph, list[str]]  # model, batch, graph, what was found

# What leaves the device in mid-graph, or can't be told before it runs.
HOST = re.compile(
    "Py(Execute|Interpret|Func)|Print|.*Summary|TensorDump|Custom|CallBack|Switch|Partial"
)
# A primitive of the compiler, and the function whose documentation is its own.
SAME_AS = {"Muls": "mul"}
# How MindSpore hands each primitive to the device's graph engine at O2: one of its own
# (`op_declare/*_ops_declare.cc`), or one written in others (`expander/fallback`).
DECLARED = re.compile(
    "Add|BatchMatMul|BiasAdd|BroadcastTo|Cast|Concat|Conv2D|Cos|Erf|FlashAttentionScore"
    "|Gather|LayerNorm|MatMul|Maximum|Minimum|Mul|Reshape|Sigmoid|Sin|Softmax|Split|Sub"
    "|Transpose"
)
EXPANDED = re.compile("Dense|GroupNorm|Muls")
FULL = ("encode", "decode")  # graphs of the autoencoder: float32 throughout
ISLANDS = ("LayerNorm", "GroupNorm", "Softmax", "Sin", "Cos")
# In the checkpoint, and in no graph: the last layer of CLIP, and what follows it.
UNUSED = re.compile(
    r"logit_scale|final_layer_norm|text_model\.encoder\.layers\.(\d+)\."
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a pipeline is driven through; `again` is that with every value changed."""

    config: ModelConfig
    size: int
    batch: int
    guider: str = "VanillaCFG"
    whole: bool = True

    def picture(self, *, again: bool) -> Case:
        size = {"width": self.size, "height": self.size, "guider": self.guider}
        if not again:
            return Case(prompt="a lighthouse", seed=0, steps=1, **size)
        return Case(
            prompt="two owls on a fence " * 30,
            negative_prompt="blurry",
            seed=4_294_967_295,
            guidance_scale=11.5,
            steps=2,
            sampler="EulerAncestralSampler",
            discretization="DiffusersDDPMDiscretization",
            crop_top=128,
            aesthetic_score=1.0,
            **size,
        )

    def export(
        self, *, again: bool = False, known: dict[str, Graph] | None = None
    ) -> dict[str, Graph]:
        """Drive the pipeline; give the graphs that it asked for, and those known."""
        from sdxl import ops
        from sdxl.graphs import set_up
        from sdxl.model import SDXL
        from sdxl.pipeline import Pipeline

        set_up("CPU")
        pictures, batch = [self.picture(again=again)], self.batch
        with ops.built_in(ops.ASCEND):
            graphs = Exports(precision="fp16", jit_level="O2", device_target="Ascend")
            graphs.found |= known or {}
            pipeline = Pipeline(SDXL(self.config, "fp16"), self.config, graphs)
            cond = pipeline.encode(pictures, batch)
            latents = pipeline.sample(cond, pictures, batch)
            if self.whole:
                pixels = np.zeros((1, self.size, self.size, 3), np.uint8)
                pipeline.encode_images(pixels, pictures, batch)
                pipeline.decode(latents, batch)
        return graphs.found


def findings(graph: Graph, config: ModelConfig) -> Iterator[str]:
    """Say what of a graph a card could not run, or not in the precision meant."""
    for node in graph.nodes:
        yield from _of_primitive(node.primitive)
        yield from (f"{node.name}: {what}" for a in node.outputs for what in _of(a))
        half = any(array.type_name == "FLOAT16" for array in node.outputs)
        if half and (node.primitive in ISLANDS or graph.key.startswith(FULL)):
            yield f"{node.scope}: {node.primitive} in float16"
    for array in graph.inputs:
        yield from (f"input: {what}" for what in _of(array))
    yield from _of_parameters(graph, config)
    if graph.key.startswith("unet"):
        yield from _of_attention(graph, config)


def _of_primitive(name: str) -> Iterator[str]:
    if HOST.fullmatch(name):
        yield f"{name} leaves the device"
    if name in STRUCTURE or HOST.fullmatch(name):
        return
    if "Ascend" not in platforms(name):
        yield f"{name} is not documented for Ascend"
    if not DECLARED.fullmatch(name) and not EXPANDED.fullmatch(name):
        yield f"{name} is not known to the graph engine"


@cache
def platforms(primitive: str) -> str:
    """Read where a primitive runs from its documentation, or that of its function."""
    from mindspore import ops
    from mindspore.ops import auto_generate

    text = getattr(getattr(auto_generate, primitive, None), "__doc__", None) or ""
    text = text or getattr(getattr(ops, primitive, None), "__doc__", None) or ""
    other = re.search(r"Refer to :func:`mindspore\.ops\.(\w+)`", text)
    name = SAME_AS.get(primitive) or (other[1] if other else None)
    if name is not None:
        text = getattr(ops, name).__doc__
    found = re.search(r"Supported Platforms:\s*(.*)", text)
    return found[1] if found else ""


def _of(array: Array) -> Iterator[str]:
    if any(side < 0 for side in array.shape):
        yield f"a shape that is not fixed: {list(array.shape)}"
    if array.type_name in ("DOUBLE", "FLOAT64", "INT64", "COMPLEX64", "COMPLEX128"):
        yield f"{array.type_name}"


def _of_parameters(graph: Graph, config: ModelConfig) -> Iterator[str]:
    """Compare each weight with what the geometry says of it."""
    expected = {spec.mindspore: spec.shape for spec in tensor_specs(config)}
    for name, array in graph.parameters.items():
        if name not in expected:
            yield f"{name} is no tensor of the model"
        elif array.shape != expected[name] or array.type_name != stored_type(name):
            yield f"{name} is {list(array.shape)} {array.type_name}"


def stored_type(name: str) -> str:
    """Say in which type a weight is on a card: norms and the autoencoder in float32."""
    island = name.startswith("first_stage") or name.endswith((".gamma", ".beta"))
    return "FLOAT" if island else "FLOAT16"


def _of_attention(graph: Graph, config: ModelConfig) -> Iterator[str]:
    """Expect the fused kernel for each attention of each transformer block."""
    names = [spec.name for spec in tensor_specs(config)]
    expected = 2 * sum(name.endswith("attn1.to_q.weight") for name in names)
    found = graph.primitives["FlashAttentionScore"]
    if found != expected or graph.primitives["Softmax"]:
        yield f"{found} fused attentions of {expected}"


def left_over(graphs: dict[str, Graph], config: ModelConfig) -> set[str]:
    """Name the tensors of a checkpoint that no graph of a whole job takes."""
    last = max(config.text_encoders, key=lambda e: e.kind == "clip").layers - 1
    taken = {name for graph in graphs.values() for name in graph.parameters}
    unused = set()
    for spec in tensor_specs(config):
        known = UNUSED.search(spec.mindspore)
        if known is None or (known[1] is not None and int(known[1]) != last):
            unused.add(spec.mindspore)
    return unused - taken


def lint(
    job: Job, *, twice: bool = True, known: dict[str, Graph] | None = None
) -> Iterator[tuple[Graph, list[str]]]:
    """Give each graph of a job that is not known yet with what was found in it.

    Exported `twice`, the second time for a job with other values, it must be the same.
    """
    known = known or {}
    graphs = job.export(known=known)
    others = job.export(again=True, known=known) if twice else graphs
    missing = left_over(graphs, job.config) if job.whole else set()
    for key in graphs.keys() - known.keys():
        found = list(dict.fromkeys(findings(graphs[key], job.config)))
        if key not in others or others[key].digest() != graphs[key].digest():
            found.append("another prompt, seed, scale or sigma makes another graph")
        found += [f"no graph takes {name}" for name in sorted(missing)]
        yield graphs[key], found


def full_size(size: int, batch: int, only: str) -> list[Found]:
    """Lint the base, with and without guidance, the consistency model or the refiner.

    Batches above 1 are exported once.
    """
    make = {"size": size, "batch": batch}
    plain = {"guider": "IdentityGuider", "whole": False}
    jobs = {
        "base": (Job(config=BASE, **make), Job(config=BASE, **make, **plain)),
        "lcm": (Job(config=LCM, **make, **plain),),
        "refiner": (Job(config=REFINER, **make),),
    }
    found, known = [], {}
    for job in jobs[only]:
        for graph, what in lint(job, twice=batch == 1, known=known):
            found.append((only, batch, graph, what))
        known = {g.key: g for _, _, g, _ in found if g.key.startswith("text")}
    return found


def lint_all(size: int) -> Iterator[Found]:
    """Lint every full-size network in batches of 1 and 4, two at a time."""
    from multiprocessing import get_context

    asked = [
        (size, batch, only) for batch in (1, 4) for only in ("base", "lcm", "refiner")
    ]
    with get_context("spawn").Pool(2, maxtasksperchild=1) as pool:
        for found in pool.imap(_full_size, asked, chunksize=1):
            yield from found


def _full_size(asked: tuple[int, int, str]) -> list[Found]:
    """Do as `full_size` in a process of its own; graphs come back as their bytes."""
    return [(*names, replace(graph), what) for *names, graph, what in full_size(*asked)]


HEADER = """\
| model | graph | nodes | primitives | weights, MB | live, MB | s | findings |
|---|---|---|---|---|---|---|---|"""


def row(model: str, graph: Graph, found: list[str]) -> str:
    key = graph.key.removesuffix("-fp16-O2-ascend")
    cells = (
        model,
        f"`{key}`",
        f"{sum(graph.primitives.values()):,}",
        len(graph.primitives),
        f"{graph.parameter_bytes / MB:,.1f}",
        f"{graph.live_bytes() / MB:,.0f}",
        f"{graph.seconds:.0f}",
        "; ".join(found[:3]) or "none",
    )
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    import mindspore

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--report", type=Path, help="document to put the table into")
    asked = parser.parse_args()
    start, rows, all_found, clean = time.monotonic(), [], [], True
    print(HEADER, flush=True)
    for model, batch, graph, found in lint_all(asked.size):
        clean = clean and not found
        rows.append(row(model, graph, found))
        all_found.append((model, batch, graph))
        print(rows[-1], flush=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    seconds, verdict = time.monotonic() - start, "nothing" if clean else "SOMETHING"
    said = (
        f"{len(rows)} graphs at {asked.size}x{asked.size}, those of batch 1 exported "
        f"twice, in {seconds:.0f} s, at most {peak:.1f} GB a process, MindSpore "
        f"{mindspore.__version__}: {verdict} found."
    )
    print(said)
    memory = card_memory.table(all_found)
    print(memory)
    if asked.report:
        put_into(asked.report, memory, card_memory.START, card_memory.END)
        put_into(asked.report, "\n".join((HEADER, *rows, "", said)), START, END)
    sys.exit(0 if clean else 1)


if __name__ == "__main__":
    main()
