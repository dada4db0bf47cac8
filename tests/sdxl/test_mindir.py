"""Graphs in their Ascend form, exported here: what the lint lets pass, and what not."""

from dataclasses import replace

import numpy as np
import pytest

from sdxl.config import TINY, TINY_REFINER
from tests.sdxl import mindir_lint
from tests.sdxl.mindir_lint import Job, findings, left_over, lint

NARROW = replace(
    TINY,
    unet=replace(
        TINY.unet,
        channel_mult=(1, 2),
        transformer_depth=(0, 1),
        middle_depth=1,
        num_res_blocks=1,
    ),
    text_encoders=tuple(replace(e, layers=2) for e in TINY.text_encoders),
    vae=replace(TINY.vae, ch_mult=(1, 2), num_res_blocks=1),
)
REFINER = replace(
    TINY_REFINER,
    unet=replace(NARROW.unet, context_dim=32, adm_in_channels=32 + 5 * 64),
    text_encoders=NARROW.text_encoders[1:],
    vae=NARROW.vae,
)
CONSISTENCY = replace(NARROW, unet=replace(NARROW.unet, time_cond_proj_dim=16))


@pytest.fixture(scope="module")
def cells():
    """Give cells that a card could not run as meant, and one that it could."""
    import mindspore as ms
    from mindspore import Tensor, nn
    from mindspore import ops as msops

    class Plain(nn.Cell):
        def construct(self, x):
            y = msops.sin(x)
            z = msops.cos(y)
            return z * y

    class Scaled(nn.Cell):
        def __init__(self, scale):
            super().__init__()
            self.scale = Tensor(np.full(4, scale, np.float32))

        def construct(self, x):
            return x * self.scale

    class Prints(nn.Cell):
        def __init__(self):
            super().__init__()
            self.print = msops.Print()

        def construct(self, x):
            self.print(x)
            return x + x

    class Halved(nn.Cell):
        def construct(self, x):
            return msops.softmax(x.astype(ms.float16)).astype(ms.float32)

    class Sorted(nn.Cell):
        def construct(self, x):
            return msops.sort(x)[0]

    class Wide(nn.Cell):
        def construct(self, x):
            return msops.sin(x.astype(ms.float64)).astype(ms.float32)

    return {
        "plain": Plain,
        "scaled": Scaled,
        "prints": Prints,
        "halved": Halved,
        "sorted": Sorted,
        "wide": Wide,
    }


def exported(cell, shape=(256,), key="unet"):
    from mindspore import Tensor

    from sdxl.mindir import export

    if None in shape:
        import mindspore as ms

        return export(cell, [Tensor(shape=list(shape), dtype=ms.float32)], key)
    return export(cell, [Tensor(np.zeros(shape, np.float32))], key)


@pytest.fixture(scope="module")
def linted():
    return list(lint(Job(config=NARROW, size=64, batch=2)))


def test_every_graph_of_a_small_model_passes(linted):
    assert len(linted) == 5  # texts, context, step, encoder, decoder
    assert [(graph.key, what) for graph, what in linted if what] == []


@pytest.mark.parametrize(
    ("config", "guider"),
    [
        (NARROW, "IdentityGuider"),
        (CONSISTENCY, "IdentityGuider"),
        (REFINER, "VanillaCFG"),
    ],
    ids=["plain", "consistency", "refiner"],
)
def test_the_steps_of_other_systems_pass(config, guider):
    job = Job(config=config, size=64, batch=1, guider=guider, whole=False)

    for graph, what in lint(job, twice=False):
        assert (graph.key, what) == (graph.key, [])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("prints", "Print leaves the device"),
        ("halved", "Softmax in float16"),
        ("sorted", "Sort.* is not known to the graph engine"),
        ("wide", "DOUBLE|FLOAT64"),
    ],
)
def test_what_a_card_can_not_run_as_meant_is_found(name, said, cells):
    found = findings(exported(cells[name](), key="text"), TINY)

    assert any(mindir_lint.re.search(said, what) for what in found)


def test_a_shape_that_is_not_fixed_is_found(cells):
    found = list(findings(exported(cells["plain"](), (None, 4), "text"), TINY))

    assert any("a shape that is not fixed" in what for what in found)


def test_a_primitive_without_a_word_on_ascend_is_found(cells, monkeypatch):
    graph = exported(cells["plain"](), key="text")
    assert list(findings(graph, TINY)) == []
    monkeypatch.setattr(mindir_lint, "platforms", lambda name: "``GPU`` ``CPU``")

    assert "Sin is not documented for Ascend" in set(findings(graph, TINY))


def test_attention_that_is_not_fused_and_weights_of_another_type_are_found(monkeypatch):
    from sdxl import ops

    job = Job(config=NARROW, size=64, batch=1, whole=False)
    monkeypatch.setattr(ops, "ASCEND", ops.ASCEND_SOFTMAX)
    step = next(g for k, g in job.export().items() if k.startswith("unet"))
    monkeypatch.setattr(mindir_lint, "stored_type", lambda name: "FLOAT")
    found = "\n".join(findings(step, NARROW))

    assert "0 fused attentions of" in found
    assert "FLOAT16" in found


def test_a_value_in_the_graph_makes_it_another_and_a_name_does_not(cells):
    first, same, other = (
        exported(cells["scaled"](scale), (4,)) for scale in (5.0, 5.0, 7.5)
    )

    assert first.digest() == same.digest() != other.digest()
    assert (
        exported(cells["plain"]()).digest() != exported(cells["plain"](), (8,)).digest()
    )


def test_a_weight_that_no_graph_takes_is_named(linted):
    graphs = {g.key: g for g, _ in linted if not g.key.startswith("decode")}
    missing = left_over(graphs, NARROW)

    assert "first_stage_model.decoder.conv_in.weight" in missing
    assert not any(name.startswith("model.diffusion_model") for name in missing)


def test_live_memory_counts_what_is_still_needed_and_no_more(cells):
    """x is held throughout; sin(x) until the product; cos of it; then the product."""
    array = 4 * 256

    assert exported(cells["plain"]()).live_bytes() == 4 * array


@pytest.mark.full
def test_every_graph_of_the_full_size_models_passes():
    for name, _, graph, what in mindir_lint.lint_all(1024):
        assert (name, graph.key, what) == (name, graph.key, [])
