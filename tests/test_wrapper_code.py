"""Inductor's code cut down: known statements only, and nothing that imports a compiler."""

from __future__ import annotations

import pytest

from llamac.model.compiled.wrapper_code import UnknownCodeError, cut_down

HEAD = """
from ctypes import c_void_p
import torch
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.select_algorithm import extern_kernels
aten = torch.ops.aten
async_compile = AsyncCompile()
add = async_compile.cpp_pybinding(['float*'], '''void kernel(float* x) {}''')
async_compile.wait(globals())
del async_compile
"""
CALL = """
def call(args):
    add(*args)
    return tuple(args)
"""
TAIL = """
def get_args():
    from torch._dynamo.testing import rand_strided
    return [rand_strided((1,), (1,))]
if __name__ == "__main__":
    from torch._inductor.wrapper_benchmark import compiled_module_main
    compiled_module_main("None", get_args)
"""


def test_what_is_left_runs_with_the_kernels_alone():
    code, kernels = cut_down(HEAD + CALL + TAIL)
    assert kernels == ["add"]
    assert "_inductor" not in code
    assert "_dynamo" not in code
    seen: list[int] = []
    namespace: dict = {"add": seen.append}
    exec(code, namespace)
    assert namespace["call"]([7]) == (7,)
    assert seen == [7]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("import triton", "unknown use of triton"),
        ("from torch._inductor.runtime import triton_helpers", "unknown use of torch._inductor"),
        ("triton = async_compile.triton('x', '')", "unknown use of async_compile"),
        ("with torch.cuda.device(0): pass", "unknown With"),
        ("def f(): return torch._inductor.config", "unknown use of torch._inductor"),
        ("def f():\n    import torch._dynamo", "unknown use of torch._dynamo"),
    ],
)
def test_what_is_not_known_is_named(line: str, fault: str):
    with pytest.raises(UnknownCodeError, match=fault):
        cut_down(f"{HEAD}{line}\n{CALL}{TAIL}")
