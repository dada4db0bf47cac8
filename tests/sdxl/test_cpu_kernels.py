"""Our own kernels: what they compute, by definition; machines without a compiler."""

import ctypes
import shutil
import stat
import subprocess
import sys
from math import erf, sqrt
from pathlib import Path

import numpy as np
import pytest

from sdxl import cpu_kernels
from tests.golden.networks_cases import normals
from tests.sdxl.definitions import group_norm

needs_compiler = pytest.mark.skipif(
    cpu_kernels.compiler() is None, reason="needs a C compiler"
)
WIDTHS = (1, 31, 32, 33, 77, 640)  # around the number of partial sums


def run(name, out_shape, *arrays, threads=2):
    """Call an operator of the library as MindSpore does."""
    library = ctypes.CDLL(cpu_kernels.library())
    library.set_threads(threads)
    out = np.full(out_shape, 7, np.float32)
    arrays = [np.ascontiguousarray(a, np.float32) for a in (*arrays, out)]
    n = len(arrays)
    pointers = (ctypes.c_void_p * n)(*(a.ctypes.data for a in arrays))
    ranks = (ctypes.c_int * n)(*(a.ndim for a in arrays))
    sizes = [(ctypes.c_int64 * a.ndim)(*a.shape) for a in arrays]
    shapes = (ctypes.POINTER(ctypes.c_int64) * n)(
        *(ctypes.cast(s, ctypes.POINTER(ctypes.c_int64)) for s in sizes)
    )
    assert getattr(library, name)(n, pointers, ranks, shapes, None, None, None) == 0
    return arrays[-1]


def phi(x):
    return np.vectorize(lambda v: (1 + erf(v / sqrt(2))) / 2)(x.astype(np.float64))


@needs_compiler
@pytest.mark.parametrize("width", WIDTHS)
def test_geglu_is_value_times_exact_gelu_of_gate(width):
    x, bias = 3 * normals("x", (5, 3, 2 * width)), normals("bias", (2 * width,))
    value, gate = np.split((x + bias).astype(np.float64), 2, axis=-1)

    found = run("geglu", (5, 3, width), x, bias)

    assert np.abs(found - value * gate * phi(gate)).max() < 1e-5  # of numbers up to 60


@needs_compiler
def test_its_gelu_is_exact_not_its_tanh_approximation():
    gate = np.linspace(-12, 12, 100_001, dtype=np.float32)
    x = np.concatenate((np.ones_like(gate), gate))[None]

    found = run("geglu", (1, len(gate)), x, np.zeros(x.shape[1]))[0]

    assert np.abs(found - gate * phi(gate)).max() < 1.1e-6  # tanh: 5e-4


@needs_compiler
@pytest.mark.parametrize("width", WIDTHS)
def test_layer_norm_equals_its_definition(width):
    x = 3 * normals("x", (7, width)) + 20
    gamma, beta = normals("gamma", (width,)), normals("beta", (width,))
    centered = x.astype(np.float64) - x.mean(-1, keepdims=True, dtype=np.float64)
    deviation = np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-5)

    found = run("layer_norm", x.shape, x, gamma, beta, [1e-5])

    assert np.abs(found - (centered / deviation * gamma + beta)).max() < 2e-5


@needs_compiler
@pytest.mark.parametrize("name", ["group_norm", "group_norm_silu"])
@pytest.mark.parametrize("groups", [1, 4, 24])
def test_group_norm_equals_its_definition(groups, name):
    x = 3 * normals("x", (3, 24, 5, 7)) + 20
    gamma, beta = normals("gamma", (24,)), normals("beta", (24,))
    expected = group_norm(x, groups, gamma, beta)
    if name == "group_norm_silu":
        expected = expected / (1 + np.exp(-expected))

    found = run(name, x.shape, x, gamma, beta, [groups, 1e-5])

    assert np.abs(found - expected).max() < 2e-5


@needs_compiler
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("spread", [1, 100])
def test_softmax_equals_its_definition_and_sums_to_one(width, spread):
    x = spread * normals("x", (9, width))
    exponents = 0.125 * (x - x.max(-1, keepdims=True)).astype(np.float64)
    expected = np.exp(exponents) / np.exp(exponents).sum(-1, keepdims=True)

    found = run("softmax", x.shape, x, [0.125])

    assert np.abs(found - expected).max() < 1e-6
    assert np.abs(found.sum(-1) - 1).max() < 1e-6


@needs_compiler
def test_what_is_masked_has_no_weight_at_all():
    from sdxl.clip import MASKED

    x = np.array([[1, 2, MASKED, MASKED], [MASKED, 0, MASKED, MASKED]], np.float32)

    found = run("softmax", x.shape, x, [0.125])

    np.testing.assert_array_equal(found[0, 2:], [0, 0])
    np.testing.assert_array_equal(found[1], [0, 1, 0, 0])


@needs_compiler
def test_heads_are_parted_and_joined():
    x = normals("x", (2, 9, 5 * 4))
    apart = x.reshape(2, 9, 5, 4).transpose(0, 2, 1, 3).reshape(10, 9, 4)

    np.testing.assert_array_equal(run("split_heads", apart.shape, x), apart)
    np.testing.assert_array_equal(run("join_heads", x.shape, apart), x)


# Images, channels, maps, height, width: rows that are and are not whole vectors, maps
# that are no multiple of a block, bands of a large image, small images together, more
# channels than are summed at a time.
CONVOLUTIONS = [
    (1, 1, 1, 1, 1),
    (2, 3, 5, 2, 3),
    (3, 4, 9, 7, 24),
    (1, 5, 16, 40, 17),
    (9, 80, 8, 8, 8),
    (2, 130, 12, 16, 32),
    (1, 40, 4, 130, 96),
]


def convolution(x, weight):
    """Sum over taps and channels, in float64, with a rim of zeros."""
    H, W = x.shape[2:]
    rimmed = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    return sum(
        np.einsum(
            "bchw,oc->bohw", rimmed[:, :, i : i + H, j : j + W], weight[..., i, j]
        )
        for i in range(3)
        for j in range(3)
    )


@needs_compiler
@pytest.mark.parametrize("sizes", CONVOLUTIONS)
@pytest.mark.parametrize("name", ["convolve", "convolve_add"])
def test_convolution_equals_its_definition(name, sizes):
    images, channels, maps, H, W = sizes
    x = normals("x", (images, channels, H, W))
    weight = normals("weight", (maps, channels, 3, 3)) / np.float32(9 * channels) ** 0.5
    bias = normals("bias", (images, maps))
    added = normals("added", (images, maps, H, W))
    also = [added] if name == "convolve_add" else []
    wanted = convolution(x, weight) + bias[..., None, None] + sum(also)

    found = run(name, wanted.shape, x, weight, bias, *also)

    assert np.abs(found - wanted).max() < 5e-6  # of numbers of deviation 1 to 2


@needs_compiler
def test_images_share_a_bias_or_have_their_own():
    x, weight = normals("x", (3, 4, 5, 6)), normals("weight", (7, 4, 3, 3))
    bias = normals("bias", (7,))

    shared = run("convolve", (3, 7, 5, 6), x, weight, bias)
    own = run("convolve", (3, 7, 5, 6), x, weight, np.tile(bias, (3, 1)))

    np.testing.assert_array_equal(shared, own)


@needs_compiler
def test_a_pixel_reaches_its_neighbours_and_none_else():
    x, weight = normals("x", (2, 3, 9, 24)), normals("weight", (5, 3, 3, 3))
    x[1, 2, 4, 0] = np.nan

    found = np.isnan(run("convolve", (2, 5, 9, 24), x, weight, np.zeros(5)))

    assert found[1, :, 3:6, :2].all()
    assert found.sum() == 5 * 3 * 2


OPERATORS = {
    "convolve": ((5, 9, 6, 7), [(10, 9, 3, 3), (10,)], (5, 10, 6, 7)),
    "geglu": ((11, 64), [(64,)], (11, 32)),
    "layer_norm": ((11, 64), [(64,), (64,), (1,)], (11, 64)),
    "group_norm_silu": ((2, 6, 3, 5), [(6,), (6,), [3, 1e-5]], (2, 6, 3, 5)),
    "softmax": ((11, 64), [[0.3]], (11, 64)),
    "split_heads": ((2, 9, 20), [], (8, 9, 5)),
    "join_heads": ((8, 9, 5), [], (2, 9, 20)),
}


def case(name):
    shape, others, out_shape = OPERATORS[name]
    arrays = [
        np.float32(o) if isinstance(o, list) else np.abs(normals(f"o{i}", o))
        for i, o in enumerate(others)
    ]
    return normals("x", shape), arrays, out_shape


@needs_compiler
@pytest.mark.parametrize("name", OPERATORS)
def test_every_number_of_threads_gives_the_same_bits(name):
    x, others, out_shape = case(name)
    one = run(name, out_shape, x, *others, threads=1)

    for threads in (2, 3, 64, 10_000):
        more = run(name, out_shape, x, *others, threads=threads)
        np.testing.assert_array_equal(more, one)


@needs_compiler
@pytest.mark.parametrize("name", OPERATORS)
def test_what_is_not_a_number_stays_that(name):
    x, others, out_shape = case(name)
    x[-1, -1] = np.nan

    found = run(name, out_shape, x, *others)

    assert np.isnan(found).any()
    assert not np.isnan(found).all()


@needs_compiler
def test_the_graph_calls_them_and_equals_the_plain_form():
    """Oracle: the plain form of the same cells, which the golden files hold."""
    import mindspore as ms
    from mindspore import Tensor, nn

    from sdxl import ops
    from sdxl.graphs import Graphs, set_up
    from sdxl.layers import Conv2d, GroupNorm, LayerNorm

    set_up("CPU")

    class Cell(nn.Cell):
        def __init__(self):
            super().__init__()
            self.gate = ops.GatedGelu()
            self.attention = ops.Attention(2, 16)
            self.norm = LayerNorm(32)
            self.group = GroupNorm(9, 3, activated=True)
            self.convolution = Conv2d(9, 9, 3, ms.float32, padding=1)
            self.convolution.weight.set_data(Tensor(weight))
            self.norm.gamma.set_data(self.norm.gamma + 1)
            self.group.gamma.set_data(self.group.gamma + 1)

        def construct(self, x, bias):
            x = self.norm(self.gate(x, bias))
            x = self.attention(x, x, x)
            x = self.group(x.reshape(2, 9, 8, 4))
            return self.convolution(self.convolution(x), bias[:18].reshape(2, 9), x)

    def outcome(form):
        with ops.built_in(form):
            graphs = Graphs(precision="fp32", jit_level="O2", device_target="CPU")
            return graphs.run("test", Cell, x, bias)

    x, bias = normals("x", (2, 9, 64)), normals("bias", (64,))
    weight = normals("weight", (9, 9, 3, 3)) / 9
    assert ops.form().kernels
    assert np.abs(outcome(ops.form()) - outcome(ops.CPU)).max() < 1e-5


@pytest.fixture
def anew(monkeypatch, tmp_path):
    """A user whose cache is empty; forget what this process knows of libraries."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("SDXL_CPU_KERNELS", raising=False)
    cpu_kernels.library.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    cpu_kernels.library.cache_clear()


def test_without_a_compiler_the_plain_form_is_used_and_the_log_says_so(
    anew, monkeypatch, caplog
):
    from sdxl import ops

    monkeypatch.setenv("PATH", str(anew))

    assert ops.form_of_cpu() == ops.CPU
    assert "there is no C compiler" in caplog.text


@pytest.mark.parametrize("asked", ["off", "0", "OFF"])
def test_they_can_be_left_out(asked, anew, monkeypatch):
    monkeypatch.setenv("SDXL_CPU_KERNELS", asked)

    assert cpu_kernels.library() == ""
    assert list(anew.iterdir()) == []


def test_a_compiler_that_fails_is_quoted(anew, monkeypatch, caplog):
    broken = anew / "broken"
    broken.write_text("#!/bin/sh\necho 'no licence today' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))

    assert cpu_kernels.library() == ""
    assert "no licence today" in caplog.text


@needs_compiler
def test_it_is_compiled_once_for_this_user_alone(anew):
    path = Path(cpu_kernels.library())
    made = path.stat().st_mtime_ns
    cpu_kernels.library.cache_clear()

    assert Path(cpu_kernels.library()) == path
    assert path.stat().st_mtime_ns == made
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@needs_compiler
@pytest.mark.parametrize("damage", ["torn", "writable by others", "a link"])
def test_a_library_that_may_not_be_ours_is_made_anew(damage, anew, tmp_path):
    path = Path(cpu_kernels.library())
    whole = path.read_bytes()
    path.unlink()  # not in place: this process has the file mapped
    if damage == "torn":
        path.write_bytes(whole[:1000])
    elif damage == "a link":
        shutil.copy(cpu_kernels.SOURCE, tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.write_bytes(whole)
        path.chmod(0o777)
    cpu_kernels.library.cache_clear()

    assert cpu_kernels.library() == str(path)
    assert not path.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert len(path.read_bytes()) == len(whole)


@needs_compiler
def test_a_cache_that_cannot_be_written_costs_nothing(anew, monkeypatch):
    (anew / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(anew / "file"))

    path = cpu_kernels.library()

    assert Path(path).exists()
    assert not path.startswith(str(anew))


@needs_compiler
def test_processes_that_find_a_torn_library_all_end_with_a_whole_one(anew):
    """Else workers of one job would differ, by rounding."""
    path = Path(cpu_kernels.library())
    name = path.name.rpartition("-")[0]
    (path.parent / f"{name}-torn.so").write_bytes(b"torn")
    path.unlink()
    code = "from sdxl.cpu_kernels import library; print(library())"
    words = [sys.executable, "-c", code]
    started = [subprocess.Popen(words, stdout=subprocess.PIPE) for _ in range(4)]

    found = {process.communicate()[0].decode().strip() for process in started}

    assert found == {str(path)}
    assert path.exists()
