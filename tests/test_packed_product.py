from __future__ import annotations

import ctypes
import itertools
import logging
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cpp_forms import FORMS, options_of
from llamac.model.kernels import packed_product
from llamac.model.kernels.cpp_library import load_library
from llamac.model.kernels.packed_product import dequantize, multiply_packed
from llamac.runtime.cache_folder import cache_sizes
from packed_weight import PackedWeight

SOURCES = (Path(packed_product.__file__).with_name("unpack.cpp"),)  # the quickest to compile
GROUPS = (16, 32, 64, 128)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Of the largest result. float32: a sum of terms that are larger than it; 16 bits: x and the result
# are as exact as they can be, of many rows the weight is rounded, too.
ALLOWED_ERROR = {torch.float32: 4e-6, torch.bfloat16: 2e-2, torch.float16: 1e-3}

# [N, K]; groups that don't divide K are that of the whole row.
SHAPES = ((5, 24), (7, 40), (131, 352), (67, 576), (33, 2048))


def multiply(x: Tensor, *weights: PackedWeight) -> list[Tensor]:
    return multiply_packed(
        x,
        [weight.packed for weight in weights],
        [weight.scale for weight in weights],
        [weight.minimum for weight in weights],
    )


def random_x(num_rows: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(num_rows, width, generator=torch.Generator().manual_seed(num_rows))
    return (x * width**-0.5).to(dtype)


def assert_close_to_exact(out: Tensor, x: Tensor, weight: PackedWeight) -> None:
    assert out.dtype == x.dtype
    assert out.is_contiguous()
    exact = x.double() @ weight.exact.t()
    error = (out.double() - exact).abs().max() / exact.abs().max()
    assert error < ALLOWED_ERROR[x.dtype]


@pytest.fixture(params=[*FORMS, None])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test with each form of the C++ that this processor can run, and without it."""
    library = None
    if request.param is not None:
        library = packed_product.cpp_library(*options_of(request.param))
        assert library is not None
    monkeypatch.setattr(packed_product, "cpp_library", lambda: library)
    monkeypatch.setattr(packed_product, "DTYPES_IN_CPP", frozenset(DTYPES))


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_x", [1, 3])
def test_activations_of_like_size_beside_huge_ones_lose_nothing_to_integers(
    num_x: int, dtype: torch.dtype
):
    if packed_product.cpp_library() is None:
        pytest.skip("without the library a weight is rounded to x's dtype")
    weight = PackedWeight(67, 640, bits=8, dtype=dtype)
    x = random_x(num_x, 640, torch.bfloat16)
    x[:, ::97] *= 3000  # what LLaMAs have in a few columns
    x[-1, 8:16] = 0  # of whole lanes
    exact = x.double() @ weight.exact.t()
    out = multiply(x, weight)[0].double()
    # The result's own rounding, and 2^-15 of the largest of a lane's columns times their weights.
    largest = x.double().abs().unflatten(1, (-1, 4)).amax(-1)
    weights = weight.exact.abs().unflatten(1, (-1, 4)).sum(-1)
    assert ((out - exact).abs() <= 2**-8 * exact.abs() + 2**-15 * largest @ weights.t()).all()


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("num_x", [1, 3])
@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none(bits: int, num_x: int, x_dtype: torch.dtype, value: float):
    weight = PackedWeight(19, 256, bits=bits, dtype=torch.bfloat16)
    x = random_x(num_x, 256, x_dtype)
    x[-1, 77] = value
    out = multiply(x, weight)[0]
    assert not out[-1].isfinite().any()
    assert out[:-1].isfinite().all()


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("with_minimum", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", [4, 8])
def test_product(bits: int, group: int, dtype: torch.dtype, with_minimum: bool):
    for (num_rows, width), x_dtype in itertools.product(SHAPES, DTYPES):
        weight = PackedWeight(
            num_rows, width, bits=bits, group=group, dtype=dtype, with_minimum=with_minimum
        )
        for num_x in (1, 2, 3, 8, 16, 17, 40):
            x = random_x(num_x, width, x_dtype)
            assert_close_to_exact(multiply(x, weight)[0], x, weight)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("with_minimum", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_beside_others_is_what_it_is_alone(bits: int, dtype: torch.dtype, with_minimum: bool):
    """To the bit: a step that checks guesses gives the tokens of steps of one."""
    if packed_product.cpp_library() is None:
        pytest.skip("BLAS rounds as it likes")
    for num_rows, width in SHAPES:
        weight = PackedWeight(num_rows, width, bits=bits, with_minimum=with_minimum)
        x = random_x(11, width, dtype)
        alone = torch.cat([multiply(row[None], weight)[0] for row in x])
        for num_x in (2, 5, 11):
            assert torch.equal(multiply(x[:num_x], weight)[0], alone[:num_x])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_many_rows_where_a_library_is_faster(
    bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(packed_product, "DTYPES_IN_CPP", frozenset())
    monkeypatch.setattr(packed_product, "_BLOCK_BYTES", 4096)  # several blocks
    weight = PackedWeight(67, 576, bits=bits, dtype=torch.bfloat16)
    x = random_x(40, 576, dtype)
    assert_close_to_exact(multiply(x, weight)[0], x, weight)


@pytest.mark.parametrize("with_minimum", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_dequantize(bits: int, with_minimum: bool):
    weight = PackedWeight(6, 96, bits=bits, dtype=torch.float16, with_minimum=with_minimum)
    minimum = weight.minimum if with_minimum else None
    values = dequantize(weight.packed, weight.scale, minimum, torch.float32, width=96)
    torch.testing.assert_close(values, weight.exact.float())
    rounded = dequantize(weight.packed, weight.scale, minimum, torch.bfloat16, width=96)
    assert torch.equal(rounded, values.bfloat16())


def test_the_low_half_of_a_byte_is_the_first_column():
    packed = torch.tensor([[0x10, 0xF2]], dtype=torch.uint8)
    scale = torch.tensor([[2.0]])
    minimum = torch.tensor([[1.0]])
    assert dequantize(packed, scale, None, torch.float32, width=4).tolist() == [[-16, -14, -12, 14]]
    assert dequantize(packed, scale, minimum, torch.float32, width=4).tolist() == [[1, 3, 5, 31]]


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("num_rows", [1, 4, 20])
def test_several_weights_equal_one_each(num_rows: int):
    weights = [
        PackedWeight(9, 256, bits=4, group=32),
        PackedWeight(4, 256, bits=8, group=128, dtype=torch.float16),
        PackedWeight(5, 256, bits=4, group=64, with_minimum=True),
    ]
    x = random_x(num_rows, 256, torch.bfloat16)
    for out, weight in zip(multiply(x, *weights), weights, strict=True):
        assert torch.equal(out, multiply(x, weight)[0])
    outs = multiply_packed(x, [weights[0].packed], [weights[0].scale], [])
    assert torch.equal(outs[0], multiply(x, weights[0])[0])


@pytest.mark.slow  # compiles
def test_one_graph_for_any_weights_of_a_shape():
    def step(x: Tensor, weight: PackedWeight) -> Tensor:
        first, second = multiply(x * 2, weight, weight)
        return first + second

    compiled = torch.compile(step, fullgraph=True)
    x = random_x(2, 64)
    for seed in range(3):
        weight = PackedWeight(12, 64)
        weight.scale *= seed
        with torch.compiler.set_stance("fail_on_recompile" if seed else "default"):
            torch.testing.assert_close(compiled(x, weight), step(x, weight))


def test_the_operator_imports_no_compiler():
    command = (
        "import sys, torch; from llamac.model.kernels.packed_product import multiply_packed;"
        "multiply_packed(torch.ones(1, 16), [torch.ones(1, 8).byte()], [torch.ones(1, 1)], []);"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", command], check=True)


@pytest.mark.usefixtures("form")
def test_an_x_that_is_a_view():
    weight = PackedWeight(9, 64)
    x = random_x(64, 3).t()
    assert not x.is_contiguous()
    assert_close_to_exact(multiply(x, weight)[0], x, weight)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 7])
def test_the_number_of_threads_changes_no_bit(num_rows: int, dtype: torch.dtype):
    weights = [PackedWeight(83, 416), PackedWeight(50, 416, bits=8)]
    x = random_x(num_rows, 416, dtype)
    num_threads = torch.get_num_threads()
    outs = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        outs.append(torch.cat(multiply(x, *weights), dim=1))
    torch.set_num_threads(num_threads)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def before_a_page_that_cannot_be_read(part: Tensor) -> Tensor:
    pages = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(start + mmap.PAGESIZE), mmap.PAGESIZE, 0) == 0
    moved = torch.frombuffer(
        pages, dtype=part.dtype, count=part.numel(), offset=mmap.PAGESIZE - part.nbytes
    )
    return moved.copy_(part.flatten()).view(part.shape)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("width", [40, 352])
@pytest.mark.parametrize("bits", [4, 8])
def test_nothing_is_read_behind_a_weight(bits: int, width: int):
    """It may be the end of a mapped file."""
    weight = PackedWeight(3, width, bits=bits, with_minimum=True)
    for name in ("packed", "scale", "minimum"):
        setattr(weight, name, before_a_page_that_cannot_be_read(getattr(weight, name)))
    for num_rows in (1, 2, 20):
        x = random_x(num_rows, width)
        assert_close_to_exact(multiply(x, weight)[0], x, weight)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "llamac" / "kernels"


def test_a_library_is_compiled_once(cache: Path, monkeypatch: pytest.MonkeyPatch):
    assert load_library(SOURCES) is not None
    (made,) = cache.iterdir()
    before = made.stat().st_mtime_ns
    assert load_library(SOURCES) is not None
    assert made.stat().st_mtime_ns == before
    assert load_library(SOURCES, "-march=x86-64") is not None
    monkeypatch.setattr("llamac.model.kernels.cpp_library.instruction_set", lambda: "mmx")
    assert load_library(SOURCES) is not None
    assert len([*cache.iterdir()]) == 3
    assert cache_sizes()["kernels"] > 0


def test_a_damaged_library_is_compiled_again(cache: Path, caplog: pytest.LogCaptureFixture):
    load_library(SOURCES)
    (made,) = cache.iterdir()
    content = made.read_bytes()
    for damaged in (content[:1000] + b"x" + content[1001:], content[:-1], b""):
        made.unlink()  # as a loaded library is mapped
        made.write_bytes(damaged)
        with caplog.at_level(logging.INFO):
            assert load_library(SOURCES) is not None
        assert "damaged" in caplog.text
        caplog.clear()
        assert len(made.read_bytes()) == len(content)


def test_where_no_library_can_be_made(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    assert load_library(SOURCES, "-march=none-such") is None
    assert "none-such" in caplog.text
    assert [*cache.iterdir()] == []
    cache.rmdir()
    cache.write_text("no folder")
    assert load_library(SOURCES) is None
    assert str(cache) in caplog.text
    monkeypatch.setenv("CXX", "/nonexistent")
    assert load_library(SOURCES) is None
    assert "/nonexistent is missing" in caplog.text


def test_a_process_without_a_compiler_multiplies():
    command = (
        "import torch; from llamac.model.kernels.packed_product import multiply_packed;"
        "packed = torch.full((3, 8), 0x99, dtype=torch.uint8);"
        "print(multiply_packed(torch.ones(1, 16), [packed], [torch.ones(3, 1)], [])[0].tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", command],
        env=os.environ | {"CXX": "/nonexistent"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("[[16.0, 16.0, 16.0]]\n", "")
