"""Make the golden files of tokenizer, noise, schedule and samplers.

    python tests/golden/make_numerics.py tokens --clip-tokenizer simple_tokenizer.py
    python tests/golden/make_numerics.py noise schedule samplers

See README.numerics.md for versions and for where the oracles come from.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
PROMPTS = HERE.parent / "data" / "parti_prompts.tsv"

# What breaks tokenizers: each is one way, some several.
NASTY = [
    "",
    " \t\n ",
    "\r\n\r\n",
    "a\nb\r\nc\td\x0be\x0cf",
    "\x00a\x01b\x1bc\x7fd",
    "\x1b[31mred\x1b[0m",
    "a\u00a0b\u2003c\u3000d\u2028e\u0085f\u1680g",
    "a\u200bb\u200cc\u200dd\ufeffe\u2060f",
    "caf\u00e9 cafe\u0301 CAF\u00c9",
    "\u212bngstr\u00f6m \u212a \ufb01ne \ufb06rong",
    "\u0130stanbul Stra\u00dfe \u01c5 \u1fbc\u0345 a\u0345b",
    "it's IT'S it\u2019s it'\u017f we'll they'RE I'd I'M could've don't ''s '",
    "\u201cquoted\u201d \u2018single\u2019 \u2026 \u2013 \u2014",
    "\u00e2\u20ac\u2122 \u00c3\u00a9 \u00e2\u20ac\u0153mojibake\u00e2\u20ac\ufffd",
    "&amp; &lt;b&gt; &amp;lt; &#39; &#x27; &nbsp; &eacute &notanentity; & &&amp;;",
    "<b>bold</b> &lt; a<b>c",
    "0123456789 3.14 1,000 ½ ² Ⅷ ٣ 二",
    "snake_case kebab-case CamelCase a/b\\c a@b.c #tag $5 50% ^~`|",
    "!!!??? ... ,,,;;; (((:-))) <3 o_O",
    "一只猫坐在窗台上 ねこ ネコ 고양이",
    "مرحبا \u202eabc\u202c שלום",
    "नमस्ते ประเทศไทย ഹലോ",
    "🙂👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 ☺️ 🫠",
    "𝓯𝓪𝓷𝓬𝔂 ｆｕｌｌ Ⓒ ™ ℃",
    "\ud83d\ude42 \ud800 x\udfff",
    "\ufffd \ufffe \U0010ffff \U000e0001",
    "z\u0351\u0352\u0353a\u0354\u0355l\u0356g\u0357o\u0358",
    "<|startoftext|> a <|endoftext|> b",
    "a<|endoftext|>b!<|endoftext|>'s<|EndOfText|>",
    "<|endoftext| > <|end",
    "&lt;|endoftext|&gt; in disguise",
    "<start_of_text> <end_of_text> </w> a</w>",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "Lorem ipsum dolor sit amet, " * 20,
    "x" * 1000,
    "ab1!é" * 200,
]
# Seeds with the shapes drawn one after another from one torch generator.
DRAWS = {
    0: [[1, 4, 32, 32], [1, 4, 32, 32]],
    42: [[1, 4, 16, 24], [3], [1, 4, 16, 24], [4], [17], [1], [31], [33], [15], [16]],
    2**32 - 1: [[5], [1, 4, 32, 32]],
}
LARGE = {"seed": 1234, "shape": [1, 4, 128, 128], "stride": 97}
TRAILING = (1, 2, 4, 5, 7, 8, 10, 11, 13, 20, 25, 40, 50, 77, 91, 100, 125, 143, 200)
LEADING = (1, 2, 4, 20, 30, 40, 50, 333, 500, 999)
KARRAS = ((1, 0.03, 14.61, 3.0), (20, 0.0291672, 14.6146412, 7.0), (18, 0.002, 80, 7))


def tokens(clip_tokenizer: Path) -> dict[str, np.ndarray]:
    """Encode every prompt and every nasty string with the original tokenizer."""
    encode = _module(clip_tokenizer).SimpleTokenizer().encode
    with PROMPTS.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        prompts = [row["Prompt"] for row in rows]
    nasty = [{"text": text, "ids": encode(text)} for text in NASTY]
    lines = ",\n".join(json.dumps(entry) for entry in nasty)
    (HERE / "numerics_nasty.json").write_text(f"[\n{lines}\n]\n", encoding="ascii")
    ids = [encode(prompt) for prompt in prompts]
    return {
        "ids": np.concatenate(ids).astype(np.uint16),
        "lengths": np.array([len(row) for row in ids], dtype=np.uint16),
    }


def noise() -> dict[str, np.ndarray]:
    """Draw with torch.randn from seeded CPU generators."""
    import torch

    arrays = {
        "draws": np.array(json.dumps(DRAWS)),
        "large": np.array(json.dumps(LARGE)),
    }
    for seed, shapes in DRAWS.items():
        generator = torch.Generator("cpu").manual_seed(seed)
        for n, shape in enumerate(shapes):
            arrays[f"{seed}_{n}"] = torch.randn(shape, generator=generator).numpy()
    generator = torch.Generator("cpu").manual_seed(LARGE["seed"])
    large = torch.randn(LARGE["shape"], generator=generator).numpy()
    return arrays | {"large_values": large.ravel()[:: LARGE["stride"]]}


def schedule() -> dict[str, np.ndarray]:
    """Ask diffusers and k-diffusion for their levels, times and scalings."""
    import diffusers
    import torch
    from numerics_samplers import BETAS, import_k_diffusion

    def euler(**settings: object) -> diffusers.EulerDiscreteScheduler:
        return diffusers.EulerDiscreteScheduler(**BETAS | settings)

    arrays: dict[str, np.ndarray] = {}
    for spacing, counts in (("trailing", TRAILING), ("leading", LEADING)):
        for steps in counts:
            scheduler = euler(timestep_spacing=spacing, steps_offset=1)
            scheduler.set_timesteps(steps)
            arrays[f"{spacing}_{steps}"] = scheduler.sigmas.numpy()
    for n, (steps, low, high, rho) in enumerate(KARRAS):
        levels = import_k_diffusion().get_sigmas_karras(steps, low, high, rho)
        arrays[f"karras_{n}"] = levels.numpy()
    arrays["karras"] = np.array(KARRAS)

    sigmas = np.geomspace(0.01, 20, 60)
    scheduler = euler()
    table = np.log(((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod) ** 0.5)
    times = [scheduler._sigma_to_t(sigma, table.numpy()) for sigma in sigmas]
    arrays |= {"sigmas": sigmas, "times": np.array(times)}
    for prediction in ("epsilon", "v_prediction"):
        edm = diffusers.EDMEulerScheduler(prediction_type=prediction)
        one, none = torch.ones(()), torch.zeros(())
        rows = [
            (
                float(edm.precondition_outputs(one, none, sigma)),
                float(edm.precondition_outputs(none, one, sigma)),
                float(edm.precondition_inputs(one, sigma)),
                float(edm.precondition_noise(sigma)),
            )
            for sigma in sigmas
        ]
        arrays[f"edm_{prediction}"] = np.array(rows)
    return arrays


def samplers() -> dict[str, np.ndarray]:
    """Sample with k-diffusion and diffusers."""
    from numerics_samplers import make

    return make()


def _module(path: Path) -> object:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Write the golden files that are named on the command line."""
    makers = {"noise": noise, "schedule": schedule, "samplers": samplers}
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("areas", nargs="+", choices=["tokens", *makers])
    parser.add_argument("--clip-tokenizer", type=Path)
    asked = parser.parse_args()
    if "tokens" in asked.areas and asked.clip_tokenizer is None:
        parser.error("tokens needs --clip-tokenizer")
    makers["tokens"] = lambda: tokens(asked.clip_tokenizer)
    for area in asked.areas:
        np.savez_compressed(HERE / f"numerics_{area}.npz", **makers[area]())


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    main()
