"""The seam between devices: what is chosen for a card, seen where there is none."""

from types import SimpleNamespace

import pytest


@pytest.fixture
def card(monkeypatch):
    """Give a function that sets this process up for a card; return what it was told."""
    import mindspore as ms
    from mindspore import _c_expression

    from sdxl import ops
    from sdxl.graphs import keep_numbers, set_up

    told = {}

    def tell(name, arguments):
        if name in told and name != "set_device":  # as MindSpore does
            raise RuntimeError(f"The '{name}' can not be set repeatedly.")
        told[name] = arguments

    precision = ms.device_context.ascend.op_precision
    for module, name in (
        (ms, "set_device"),
        (ms, "set_deterministic"),
        (precision, "precision_mode"),
        (precision, "conv_allow_hf32"),
    ):
        monkeypatch.setattr(module, name, lambda *a, name=name: tell(name, a))

    def make(version, **options):
        context = SimpleNamespace(get_ascend_soc_version=lambda: version)
        known = SimpleNamespace(get_instance=lambda: context)
        monkeypatch.setattr(_c_expression, "MSContext", known)
        set_up("Ascend", 0, **options)
        return told

    before = ops.form()
    keep_numbers.cache_clear()
    yield make
    keep_numbers.cache_clear()
    ops.build_in(before)


def test_a_card_keeps_float32_where_the_graph_has_it_and_gives_the_same_twice(card):
    assert card("ascend910b") == {
        "set_device": ("Ascend", 0),
        "precision_mode": ("must_keep_origin_dtype",),
        "conv_allow_hf32": (False,),
        "set_deterministic": (True,),
    }


@pytest.mark.parametrize(
    ("version", "asked", "flash"),
    [
        ("ascend910b", None, True),
        ("ascend910_93", None, True),
        ("ascend910", None, False),
        ("ascend910b", False, False),
        ("ascend910", True, True),
    ],
)
def test_flash_attention_is_for_the_cards_that_have_it_unless_told(
    version, asked, flash, card
):
    from sdxl import ops
    from sdxl.graphs import Graphs

    card(version, flash_attention=asked)
    graphs = Graphs(precision="fp16", jit_level="O2", device_target="Ascend")

    assert ops.form().flash_attention is flash
    assert ops.form().group_norm
    assert graphs.suffix == "fp16-O2-ascend" + ("" if flash else "-softmax")


def test_a_second_model_in_the_process_finds_the_card_set_up(card):
    card("ascend910b")
    told = card("ascend910b")

    assert told["set_deterministic"] == (True,)


def test_a_process_on_the_cpu_builds_for_the_cpu(card):
    from sdxl import ops
    from sdxl.graphs import set_up

    card("ascend910b")
    set_up("CPU")

    assert ops.form() == ops.form_of_cpu()
    assert not ops.form().flash_attention


def test_a_form_holds_until_its_block_ends_however_it_ends():
    from sdxl import ops

    with pytest.raises(ZeroDivisionError), ops.built_in(ops.ASCEND):
        assert ops.GroupNormalize(8, 1e-5).native
        1 / 0  # noqa: B018

    assert not ops.GroupNormalize(8, 1e-5).native
