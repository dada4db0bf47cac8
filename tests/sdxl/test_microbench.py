"""Single kernels: each is timed, and none is faster than the device's peak by much."""

import numpy as np
import pytest

from sdxl import flops, microbench
from sdxl.graphs import set_up


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    set_up("CPU")
    monkeypatch.setattr(microbench, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(microbench, "SQUARE", 256)
    microbench.peak.cache_clear()


def test_every_kernel_is_timed_and_has_its_arithmetic():
    found = microbench.kernels("fp32")
    names = {op["name"] for op in found["ops"]}
    assert {
        "conv 3x3",
        "group norm",
        "self-attention",
        "gelu",
        "dense to 5120",
    } <= names
    assert all(op["ms"] > 0 for op in found["ops"])
    for op in found["ops"]:
        assert (op["of_peak"] is None) == (op["flops"] == 0)
    conv = next(op for op in found["ops"] if op["shape"] == "2x320x64x64")
    assert conv["flops"] == 2 * flops.conv(320, 320, 64 * 64)
    share = conv["flops"] / (conv["ms"] / 1e3) / found["peak"]
    assert conv["of_peak"] == pytest.approx(share)


def test_a_time_is_the_least_of_several_after_the_first():
    import time

    from mindspore import Tensor

    calls = []

    class Slow(microbench.Call):
        def __call__(self, x):
            calls.append(1)
            time.sleep(0.05 if len(calls) == 1 else 0.002)
            return x

    x = Tensor(np.ones(1, np.float32))
    assert 0.002 <= microbench.seconds_of(Slow(lambda x: x), x) < 0.04
    assert len(calls) == 4
