"""What a job needs of a card's memory, from its exported graphs; see docs/ascend.md.

Weights are counted once, in the type they are kept in. To them come the arrays that
graphs hold while they run: those of the largest graph where graphs share their work
space, those of all together where each keeps its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from sdxl.mindir import Graph

CARDS = (32, 64)
# Of a card's memory, what is left for a job beside driver, engine and kernels.
SHARE = 0.9
START, END = "<!-- memory -->", "<!-- /memory -->"
GB = 1e9

Found = tuple[str, int, Graph]  # model, batch, graph


def table(found: Sequence[Found]) -> str:
    """Make a table of setups and batches, and what fits into which card."""
    cards = " | ".join(f"{card} GB" for card in CARDS)
    lines = [
        "| job | batch | weights, GB | largest graph, GB | all graphs, GB | "
        f"total, GB | {cards} |",
        "|---|---|---|---|---|---|" + "---|" * len(CARDS),
    ]
    for name, models in (
        ("base", ("base",)),
        ("consistency model", ("lcm",)),
        ("refiner", ("refiner",)),
        ("base and refiner", ("base", "refiner")),
    ):
        for batch in sorted({batch for _, batch, _ in found}):
            lines.append(_row(name, batch, found, models))
    return "\n".join(lines)


def _row(name: str, batch: int, found: Sequence[Found], models: Sequence[str]) -> str:
    weights = sum(_weights(found, model) for model in models)
    live = [size for model in models for size in _live(found, model, batch)]
    shared, apart = weights + max(live), weights + sum(live)
    fits = (_fit(card * GB * SHARE, shared, apart) for card in CARDS)
    sizes = (weights, max(live), sum(live))
    cells = (
        name,
        str(batch),
        *(f"{size / GB:.1f}" for size in sizes),
        f"{shared / GB:.1f} to {apart / GB:.1f}",
        *fits,
    )
    return f"| {' | '.join(cells)} |"


def _fit(room: float, shared: float, apart: float) -> str:
    if apart <= room:
        return "fits"
    return "if graphs share" if shared <= room else "no"


def _weights(found: Sequence[Found], model: str) -> int:
    """Add up the weights of a model's graphs, each once."""
    arrays = {}
    for name, _, graph in found:
        if name == model or (model == "lcm" and name == "base" and _of_both(graph)):
            arrays |= graph.parameters
    return sum(array.nbytes for array in arrays.values())


def _live(found: Sequence[Found], model: str, batch: int) -> list[int]:
    """List the arrays' bytes of each graph that a job from noise runs."""
    return [
        graph.live_bytes()
        for name, size, graph in found
        if size == batch
        and (name == model or (model == "lcm" and name == "base" and _of_both(graph)))
        and not graph.key.startswith("encode")
        and "plain" not in graph.key
    ]


def _of_both(graph: Graph) -> bool:
    """Say whether a consistency model has this graph of the base too."""
    return graph.key.startswith(("encode", "decode"))
