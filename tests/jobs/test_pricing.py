"""What `plan` says of compiling: graphs, those in the cache, the price of the rest."""

import json
from dataclasses import replace

import pytest

from jobs.config import load
from jobs.pricing import compilation, describe_compilation
from jobs.resolved import resolve
from sdxl.cache_key import graphs_folder
from sdxl.config import PRESETS

SQUARE, WIDE = (64, 64, "VanillaCFG"), (128, 64, "VanillaCFG")


@pytest.fixture
def priced(tmp_path):
    """Price graphs of the tiny preset, given what the cache holds of it."""
    config = load(None, ["model.preset=tiny", "runtime.workers=4"])
    resolved = resolve(config, native_size=64)

    def price(graphs, cached, cache=tmp_path):
        for key, seconds in cached.items():
            entry = graphs_folder(tmp_path, PRESETS["tiny"]) / key
            entry.mkdir(parents=True)
            (entry / "entry.json").write_text(json.dumps({"seconds": seconds}))
        here = replace(resolved, compile_cache=cache)
        return compilation(graphs, here, config.model)

    return price


def test_what_is_in_the_cache_is_free_and_the_rest_costs_what_others_took(priced):
    cached = {
        "unet-b1-8x8-guided-fp32-O2-cpu": 40.0,
        "unet-b2-8x16-guided-fp32-O2-cpu": 60.0,  # of another batch size
        "unet-b1-8x16-plain-fp32-O2-cpu": 50.0,  # of another guider
        "decode-b1-8x16-fp32-O2-cpu": 1.0,
    }
    found = priced([SQUARE, WIDE], cached)
    assert (found["graphs"], found["cached"], found["compilations"]) == (2, 1, 1)
    assert found["seconds"] == 50.0
    assert "1 compilation(s), about 50 s" in describe_compilation(found)


def test_what_was_never_measured_here_has_no_price(priced):
    found = priced([SQUARE], {})
    assert (found["cached"], found["seconds"]) == (0, None)
    assert "not measured yet" in describe_compilation(found)


def test_without_a_cache_help_compiles_again(priced):
    assert priced([SQUARE, WIDE], {}, cache=None)["compilations"] == 5
    assert priced([SQUARE], {}, cache=None)["compilations"] == 4
