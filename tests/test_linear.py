from __future__ import annotations

import pytest
import torch
from conftest import TOLERANCE
from torch import Tensor

from llamac.model import linear
from llamac.model.kernels.few_rows import MAX_ROWS, load_operators
from llamac.model.linear import Linear, join_weights, multiply_in_float32
from llamac.model.packed import project

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random_linear(width: int, num_out: int, dtype: torch.dtype, *, bias: bool = False) -> Linear:
    torch.manual_seed(width)
    linear = Linear(width, num_out, bias=bias).requires_grad_(False)
    torch.nn.init.normal_(linear.weight, std=width**-0.5)
    if linear.bias is not None:
        torch.nn.init.normal_(linear.bias)
    return linear.to(dtype)


def assert_close_to_exact(out: Tensor, x: Tensor, linear: Linear) -> None:
    exact = x.double() @ linear.weight.double().t()
    if linear.bias is not None:
        exact = exact + linear.bias.double()
    atol, rtol = TOLERANCE[str(x.dtype).removeprefix("torch.")]
    assert out.dtype == x.dtype
    assert out.is_contiguous()
    torch.testing.assert_close(out.double(), exact, atol=atol, rtol=rtol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 3, 9])
@pytest.mark.parametrize("bias", [False, True])
def test_eager(num_rows: int, dtype: torch.dtype, bias: bool):
    linear = random_linear(48, 20, dtype, bias=bias)
    x = torch.randn(num_rows, 48).to(dtype)
    assert_close_to_exact(linear(x), x, linear)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "num_out"), [(48, 7), (5632, 20)])
def test_compiled_with_few_rows_and_with_many(width: int, num_out: int, dtype: torch.dtype):
    linear = random_linear(width, num_out, dtype, bias=True)
    assert load_operators() is not None
    torch.compiler.reset()
    compiled = torch.compile(linear, fullgraph=True, dynamic=False)
    for num_rows in (1, 3, 9, 17):
        x = torch.randn(num_rows, width).to(dtype)
        assert_close_to_exact(compiled(x).contiguous(), x, linear)


@pytest.mark.parametrize("num_out", [1, 7, 4096])
def test_weights_are_converted_in_blocks(num_out: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("llamac.model.linear._BLOCK_ELEMENTS", 64 * 5)
    linear = random_linear(64, num_out, torch.bfloat16)
    x = torch.randn(11, 64).bfloat16()
    assert_close_to_exact(multiply_in_float32(x, linear.weight), x, linear)


def test_the_operator_is_well_formed():
    x = torch.randn(9, 16).bfloat16()
    weight = torch.randn(5, 16).bfloat16()
    torch.library.opcheck(torch.ops.llamac.multiply_in_float32, (x, weight))


@pytest.mark.parametrize("bias", [False, True])
def test_joined_weights_meet_x_in_one_product(monkeypatch: pytest.MonkeyPatch, bias: bool):
    layers = [random_linear(24, n, torch.float64, bias=bias) for n in (16, 8, 5)]
    x = torch.randn(MAX_ROWS + 1, 24, dtype=torch.float64)
    expected = [layer(x) for layer in layers]
    join_weights(*layers)
    joined = layers[0].joined
    assert joined is not None
    for layer in layers:
        assert layer.weight.untyped_storage().data_ptr() == joined.untyped_storage().data_ptr()
    products: list[Tensor] = []
    multiply = linear.F.linear
    monkeypatch.setattr(
        linear.F, "linear", lambda *given: products.append(given[1]) or multiply(*given)
    )
    for num_rows in (1, len(x)):
        products.clear()
        for out, wanted in zip(project(x[:num_rows], *layers), expected, strict=True):
            torch.testing.assert_close(out, wanted[:num_rows])
        assert len(products) == 1
        assert products[0] is joined


def test_a_region_that_layers_share_takes_joined_weights():
    """It takes no two inputs of one memory; on the meta device, where nothing is compiled."""
    with torch.device("meta"):
        layers = [Linear(24, n, bias=True).requires_grad_(False) for n in (16, 8)]
        join_weights(*layers)
        x = torch.empty(3, 24)

    @torch.compiler.nested_compile_region
    def region(x: Tensor) -> Tensor:
        first, second = project(x, *layers)
        return first.sum() + second.sum()

    step = torch.compile(lambda x: region(x) + region(x), fullgraph=True, backend="aot_eager")
    assert step(x).device.type == "meta"
