"""The figures of `bench` as the reference prints its own: one row a system."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jobs.progress import duration

COLUMNS = (
    "model",
    "resolution",
    "flash attn",
    "sampler",
    "steps",
    "jit level",
    "graph compile",
    "s/img",
)
OPS = ("op", "shape", "ms", "GFLOP/s", "of peak")


def describe(report: dict[str, Any]) -> str:
    """Put a report into lines for people."""
    found = report["versions"]
    parts = [
        found["device"],
        f"{found['cores']} cores",
        f"MindSpore {found['mindspore']}",
        f"CANN {found['cann'] or '-'}",
        f"driver {found['driver'] or '-'}",
        f"NumPy {found['numpy']}",
    ]
    lines = [", ".join(parts)]
    if report.get("rows"):
        lines += ["", *table(COLUMNS, [_cells(row) for row in report["rows"]])]
        lines += ["", *map(_stages, report["rows"])]
    if report.get("ops"):
        peak = report["ops"]["peak"] / 1e9
        lines += ["", f"matrix product: {peak:.0f} GFLOP/s in {report['ops']['dtype']}"]
        found = [*report["ops"]["ops"], *_networks(report)]
        lines += ["", *table(OPS, [_op_cells(op) for op in found])]
    return "\n".join(lines)


def table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Draw a Markdown table with columns of equal width."""
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = (f"{c:<{w}}" for c, w in zip(cells, widths, strict=True))
        return f"| {' | '.join(padded)} |"

    return [line(names), line(["-" * width for width in widths]), *map(line, rows)]


def _cells(row: dict[str, Any]) -> list[str]:
    sampler = row["sampler"].removesuffix("Sampler")
    if row["discretization"] == "EDMDiscretization":
        sampler += " Karras"
    steps = str(row["steps"])
    if row["steps_made"] != row["steps"]:
        steps += f" ({row['steps_made']} made)"
    return [
        row["model"],
        f"{row['width']}x{row['height']}",
        "ON" if row["flash_attention"] else "OFF",
        sampler,
        steps,
        row["jit_level"],
        f"{row['compile_s']:.2f} s",
        f"{row['seconds_per_image']:.3g} ({row['least']:.3g} to {row['most']:.3g})",
    ]


def _stages(row: dict[str, Any]) -> str:
    """Say where a picture's time goes, and what the figures are of."""
    text, denoise, decode = (row["stages_ms"][n] / 1e3 for n in _STAGES)
    name = f"{row['model']} {row['sampler'].removesuffix('Sampler')} {row['steps']}"
    return (
        f"{name}: text {text:.3g} s, denoise {denoise:.3g} s, decode {decode:.3g} s; "
        f"{row['precision']}, batch {row['batch_size']}, median of {row['runs']}; "
        f"{row['weights']} weights loaded in {duration(row['load_s'])}, "
        f"peak {row['peak_memory_mb'] / 1e3:.3g} GB"
    )


_STAGES = ("text_encode_ms", "denoise_ms", "decode_ms")


def _networks(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Put the whole networks' speeds, from the pictures made, beside the kernels'."""
    found = []
    for row in report["rows"]:
        for name, speed in row["arithmetic"].items():
            seconds = speed["ms"] / 1e3
            shape = f"{row['width']}x{row['height']}"
            share = speed["flops"] / seconds / report["ops"]["peak"]
            named = {"name": f"{row['model']} {name}", "shape": shape}
            found.append({**named, **speed, "of_peak": share})
    return found


def _op_cells(op: dict[str, Any]) -> list[str]:
    if not op["flops"]:
        return [op["name"], op["shape"], f"{op['ms']:.3g}", "", ""]
    speed = op["flops"] / op["ms"] / 1e6
    return [
        op["name"],
        op["shape"],
        f"{op['ms']:.3g}",
        f"{speed:.0f}",
        f"{op['of_peak']:.0%}",
    ]
