from __future__ import annotations

import ctypes
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cpp_forms import FORMS, options_of
from llamac.model.cache import quantize_rows
from llamac.model.kernels import few_rows, many_rows
from llamac.model.kernels.few_rows import attend_in_cpp, load_operators, multiply_few
from llamac.model.kernels.many_rows import (
    CPP_TYPES,
    call_product,
    multiply_dense_in_cpp,
    multiply_many,
)
from llamac.model.kernels.packed_product import cpp_library

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALLOWED_ERROR = {torch.float32: 4e-6, torch.bfloat16: 2e-2, torch.float16: 1e-3}


def library_of(form: str) -> ctypes.CDLL:
    library = cpp_library(*options_of(form))
    assert library is not None
    return library


def multiply_by(library: ctypes.CDLL, x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    outs = [x.new_full((len(x), len(weight)), 9) for weight in weights]
    fields = [
        number
        for weight, out in zip(weights, outs, strict=True)
        for number in (weight.data_ptr(), out.data_ptr(), len(weight))
    ]
    call_product(library.multiply_dense, x, fields, len(weights))
    return outs


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_products(dtype: torch.dtype, form: str):
    library = library_of(form)
    torch.manual_seed(0)
    # A vector's columns and some more or less; rows that don't divide into runs.
    for width, num_x in itertools.product((1, 20, 64, 100, 2048), (1, 2, 3, 4, 5, 8, 9, 13, 16)):
        x = torch.randn(num_x, width).to(dtype)
        weights = [torch.randn(num_rows, width).to(dtype) for num_rows in (37, 1, 16)]
        alone = multiply_by(library, x[-1:], weights)
        for out, weight, last in zip(multiply_by(library, x, weights), weights, alone, strict=True):
            exact = x.double() @ weight.double().t()
            assert (out.double() - exact).abs().max() <= ALLOWED_ERROR[dtype] * exact.abs().max()
            assert torch.equal(out[-1:], last)  # to the bit: speculation needs it


def exact_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, slots: Tensor, scale: float
) -> Tensor:
    rows, tokens = torch.arange(k_cache.shape[2]), torch.arange(q.shape[2])
    seen = rows <= positions[:, None, None] + tokens[:, None]  # [B, T, S]
    return F.scaled_dot_product_attention(
        q.double(),
        k_cache[slots].double(),
        v_cache[slots].double(),
        seen[:, None],
        scale=scale,
        enable_gqa=True,
    ).transpose(1, 2)


# H, K, T, S, D and the positions: some behind the last row, which then see all rows.
SIZES = (
    (8, 2, 1, 64, 20, (5,)),
    (4, 4, 1, 600, 64, (0, 255, 256, 599, 700)),
    (6, 2, 7, 300, 32, (0, 290)),
    (3, 1, 16, 40, 128, (24,)),
    # Chunks of rows and panels of queries that end anywhere; an odd D.
    (8, 2, 128, 700, 64, (0, 500, 690)),
    (4, 4, 17, 300, 32, (0, 127, 283)),
    (6, 2, 50, 200, 33, (3, 150)),
    (5, 1, 40, 130, 80, (90,)),
)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("in_int8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "tokens", "rows", "dim", "given"), SIZES)
def test_attention(
    heads: int,
    kv_heads: int,
    tokens: int,
    rows: int,
    dim: int,
    given: tuple[int, ...],
    dtype: torch.dtype,
    in_int8: bool,
    form: str,
):
    library = library_of(form)
    torch.manual_seed(0)
    batch = len(given)
    q = torch.randn(batch, tokens, heads, dim).to(dtype).transpose(1, 2)
    caches = torch.randn(2, batch + 2, kv_heads, rows, dim).to(dtype)
    stored, scales = quantize_rows(caches) if in_int8 else (caches, None)
    if scales is not None:
        caches = stored * scales[..., None]
    addresses = [0, 0] if scales is None else [one.data_ptr() for one in scales]
    positions, slots = torch.tensor(given), torch.randperm(batch + 2)[:batch]
    scale = dim**-0.5
    exact = exact_attention(q, *caches, positions, slots, scale)
    for slot, position in zip(slots.tolist(), given, strict=True):  # what nobody sees
        (stored if scales is None else scales)[:, slot, :, position + tokens :] = float("nan")
    out = q.new_empty(batch, tokens, heads, dim)
    numbers = (q.data_ptr(), batch, heads, tokens, dim, *q.stride()[:3])
    queries = (ctypes.c_int64 * 8)(*numbers)
    addresses = [*(one.data_ptr() for one in stored), *addresses]
    cache = (ctypes.c_int64 * 6)(*addresses, kv_heads, rows)
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (positions, slots))
    last = (ctypes.c_int64(CPP_TYPES[dtype]), ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(2))
    attend = library.attend if tokens <= few_rows.MAX_ROWS else library.attend_many
    assert attend(queries, cache, *pointers, ctypes.c_double(scale), *last)
    error = (out.double() - exact).abs().max() / exact.abs().max()
    assert error <= {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]


def test_attention_has_the_same_bits_whatever_the_number_of_threads():
    assert load_operators() is not None
    torch.manual_seed(0)
    q, (k_cache, v_cache) = torch.randn(2, 6, 3, 16), torch.randn(2, 2, 2, 900, 16)
    positions, slots = torch.tensor([880, 300]), torch.tensor([1, 0])
    before, outs = torch.get_num_threads(), []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        outs.append(attend_in_cpp(q, [k_cache, v_cache], positions, slots, 0.25))
    torch.set_num_threads(before)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_the_operators_are_well_formed():
    assert load_operators() is not None
    x, weights = torch.randn(2, 16), [torch.randn(5, 16), torch.randn(3, 16)]
    torch.library.opcheck(torch.ops.llamac.multiply_few, (x, weights))
    torch.library.opcheck(torch.ops.llamac.multiply_many, (x, weights))
    packed, scale = torch.zeros(5, 8, dtype=torch.uint8), torch.ones(5, 1)
    torch.library.opcheck(torch.ops.llamac.multiply_few_packed, (x, [packed], [scale], []))
    cache = torch.randn(2, 2, 9, 16)
    numbers = torch.tensor([3])
    torch.library.opcheck(
        torch.ops.llamac.attend_in_cpp,
        (torch.randn(1, 4, 1, 16), [cache, cache.clone()], numbers, numbers * 0, 0.25),
    )
    rows, scales = quantize_rows(cache)
    buffers = [rows, rows.clone(), scales, scales.clone()]
    torch.library.opcheck(
        torch.ops.llamac.attend_in_cpp,
        (torch.randn(1, 4, 1, 16), buffers, numbers, numbers * 0, 0.25),
    )


def test_sizes_that_do_not_fit_are_refused():
    assert load_operators() is not None
    x, weight = torch.randn(2, 16), torch.randn(5, 16)
    for wrong in (
        (torch.randn(17, 16), [weight]),
        (x, [torch.randn(5, 15)]),
        (x, [weight.bfloat16()]),
        (x, [torch.randn(16, 5).t()]),
        (x.double(), [weight.double()]),
    ):
        with pytest.raises(RuntimeError):
            multiply_few(*wrong)
    packed = torch.zeros(5, 8, dtype=torch.uint8)
    for packs, scales, minima in (
        ([packed], [torch.ones(4, 1)], []),
        ([packed[:, :5]], [torch.ones(5, 1)], []),
        ([packed], [torch.ones(5, 1)], [torch.ones(5, 2)]),
    ):
        with pytest.raises(RuntimeError):
            few_rows.multiply_few_packed(x, packs, scales, minima)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows(dtype: torch.dtype, form: str):
    library = library_of(form)
    torch.manual_seed(0)
    # Panels of all widths, and a second pass; columns of several blocks, and an odd one; strips of
    # rows that begin a tile.
    sizes = itertools.product((17, 40, 64, 70, 128, 300), (1, 20, 129, 2048))
    for num_x, width in (*sizes, (128, 5000)):
        x = torch.randn(num_x, width).to(dtype)
        weights = [torch.randn(num_rows, width).to(dtype) for num_rows in (49, 1, 130)]
        outs = multiply_dense_in_cpp(library, x, weights)
        for out, weight in zip(outs, weights, strict=True):
            exact = x.double() @ weight.double().t()
            assert (out.double() - exact).abs().max() <= ALLOWED_ERROR[dtype] * exact.abs().max()


def test_many_rows_whatever_the_number_of_threads_have_the_same_bits():
    x, weight = torch.randn(128, 576), torch.randn(200, 576)
    before, outs = torch.get_num_threads(), []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        outs += multiply_dense_in_cpp(library_of("native"), x, [weight])
    torch.set_num_threads(before)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("in_cpp", [False, True])
def test_the_operator_for_many_rows(in_cpp: bool, monkeypatch: pytest.MonkeyPatch):
    dtypes = frozenset({torch.float32} if in_cpp else ())
    monkeypatch.setattr(many_rows, "DTYPES_IN_CPP", dtypes)
    x, weight = torch.randn(40, 96), torch.randn(33, 96)
    (out,) = multiply_many(x, [weight])
    assert out.is_contiguous()
    torch.testing.assert_close(out.double(), x.double() @ weight.double().t(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("by_amd", [False, True])
def test_what_libraries_multiply_faster_is_left_to_them(
    by_amd: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(many_rows, "is_amd", lambda: by_amd)
    of_amd = {torch.float32} if by_amd else set()
    assert many_rows._dtypes_in_cpp(frozenset({"avx2"})) == set()
    found = many_rows._dtypes_in_cpp(frozenset({"fma", "avx512_bf16"}))
    assert found == {torch.bfloat16, torch.float16} | of_amd
    found = many_rows._dtypes_in_cpp(frozenset({"fma", "amx_bf16"}))
    assert found == {torch.float16} | of_amd
    found = many_rows._dtypes_in_cpp(frozenset({"fma", "amx_bf16", "avx512_fp16"}))
    assert found == of_amd
