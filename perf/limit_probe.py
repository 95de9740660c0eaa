"""Measures what this machine can do: how fast it reads, how fast it multiplies."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

__all__ = ["LimitProbe", "ProbeSize"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeSize:
    """How much is read and multiplied.

    Attributes:
        num_bytes: Of the array read; many times the last cache.
        matrix_size: Rows and columns of the matrices multiplied.
    """

    num_bytes: int
    matrix_size: int


class LimitProbe:
    """Measures the machine's rates; built once, so that a measurement allocates little.

    All data are random: a GPU multiplies constants at a higher clock.

    Args:
        device: "cpu" or "cuda".
        threads: CPU threads.
        size: How much is read and multiplied.
    """

    def __init__(self, *, device: str, threads: int, size: ProbeSize) -> None:
        import torch

        torch.set_num_threads(threads)
        self._torch: Any = torch
        self._device = device
        torch.manual_seed(0)
        self._array = torch.rand(size.num_bytes // 4, device=device)
        # Which kernel reads or multiplies fastest depends on the machine; a limit is the best.
        table = self._array.view(-1, 4096)
        vector = torch.rand(4096, device=device)
        self._readers: dict[str, Callable[[], object]] = {
            "sum": self._array.sum,
            "max": self._array.max,
            "norm": self._array.norm,
            "dot": lambda: self._array @ self._array,
            "matrix-vector": lambda: table @ vector,
        }
        self._matrix_size = size.matrix_size
        self._products = (
            _cpu_products(size.matrix_size, threads)
            if device == "cpu"
            else {
                name: {"cuBLAS": _torch_product(size.matrix_size, name, device)}
                for name in ("float32", "bfloat16", "float16")
            }
        )

    def measure(self, repeats: int = 2) -> dict[str, Any]:
        """Runs every kernel and keeps the best of each.

        Args:
            repeats: Calls of each kernel.

        Returns:
            `read_bytes_per_s` by kernel, and `flops_per_s` by dtype and kernel.
        """
        num_bytes, flops = self._array.nbytes, 2 * self._matrix_size**3
        reads = {
            name: num_bytes / self._best_s(call, repeats) for name, call in self._readers.items()
        }
        rates = {
            dtype: {name: flops / self._best_s(call, repeats) for name, call in products.items()}
            for dtype, products in self._products.items()
        }
        return {"read_bytes_per_s": reads, "flops_per_s": rates}

    def _best_s(self, call: Callable[[], object], repeats: int) -> float:
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            call()
            if self._device == "cuda":
                self._torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        return min(times)


def _cpu_products(size: int, threads: int) -> dict[str, dict[str, Callable[[], object]]]:
    """Every product that a measured system could make use of, by dtype and library."""
    import torch

    from ..model.linear import STORAGE_DTYPES

    products: dict[str, dict[str, Callable[[], object]]] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if dtype in STORAGE_DTYPES:  # without arithmetic for it, one product takes half a minute
            continue
        name = str(dtype).removeprefix("torch.")
        products[name] = {"torch": _torch_product(size, name, "cpu")}
        if torch.backends.mkldnn.is_available():
            products[name]["oneDNN"] = _onednn_product(size, dtype)
    if find_spec("onnxruntime") is not None and find_spec("onnx") is not None:
        products["float32"]["ONNX Runtime"] = _ort_product(size, threads)
    return products


def _torch_product(size: int, dtype: str, device: str) -> Callable[[], object]:
    """On a CPU MKL's in float32; in 16 bits torch asks oneDNN, too."""
    import torch

    left, right = torch.randn(2, size, size, device=device).to(getattr(torch, dtype))
    return lambda: left @ right


def _onednn_product(size: int, dtype: Any) -> Callable[[], object]:
    """What Inductor may put in place of a Linear on a CPU."""
    import torch

    x, weight = torch.randn(2, size, size).to(dtype)
    multiply = torch.ops.mkldnn._linear_pointwise
    return lambda: multiply(x, weight, None, "none", [], "")


def _ort_product(size: int, threads: int) -> Callable[[], object]:
    """A graph of one MatMul whose weight is packed beforehand."""
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    x, weight = np.random.default_rng(0).standard_normal((2, size, size), dtype=np.float32)
    x_info, y_info = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [size, size]) for name in "xy"
    )
    node = helper.make_node("MatMul", ["x", "weight"], ["y"])
    graph = helper.make_graph(
        [node], "product", [x_info], [y_info], [numpy_helper.from_array(weight, "weight")]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads that spin after a product would slow down what is timed next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda: session.run(None, {"x": x})
