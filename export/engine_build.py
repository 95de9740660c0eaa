"""Builds the `tensorrt` graphs into real engines on a machine without a GPU.

TensorRT for RTX parses and builds on a CPU; only running an engine needs a GPU. So this proves
that TensorRT takes every node, makes one engine of each graph and writes the caches in place. It
says nothing of speed, nor of the TensorRT 10 that ONNX Runtime loads.
"""

from __future__ import annotations

import ctypes
import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from ..runtime.backend import BackendUnavailableError
from ..runtime.bundle.manifest import Manifest
from ..runtime.bundle.memory_needs import memory_needs
from ..runtime.memory import available_bytes, format_bytes

__all__ = ["EngineBuild", "build_engine", "build_engines", "load_tensorrt"]

_LIBRARY_PACKAGE = "onnxruntime_ep_nv_tensorrt_rtx"
_BINDINGS = "tensorrt_rtx_bindings"
# In the order in which one needs the other; the names go on with a version.
_LIBRARIES = ("libcudart.so.*", "libtensorrt_rtx.so.*", "libtensorrt_onnxparser_rtx.so.*")
_MAX_MESSAGE = 300  # characters of what TensorRT says


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineBuild:
    """What TensorRT made of one graph.

    Attributes:
        file: The graph.
        problems: What it refused, in words; none where the engine was built as it must be.
        num_cache_updates: Cache buffers that the engine writes in place.
        engine_bytes: Size of the engine; 0 if there is none.
        build_s: Time to parse and build.
    """

    file: str
    problems: tuple[str, ...]
    num_cache_updates: int
    engine_bytes: int
    build_s: float

    @property
    def passed(self) -> bool:
        """Whether there is one engine of the whole graph, with every cache in place."""
        return not self.problems


def build_engines(
    manifest: Manifest, *, progress: Callable[[str], None] = lambda _: None
) -> list[EngineBuild]:
    """Builds the engines of a bundle's `tensorrt` graphs, one after the other.

    Args:
        manifest: The bundle.
        progress: Told what is being built.

    Returns:
        One result a graph.

    Raises:
        ValueError: The bundle has no graphs for tensorrt.
        BackendUnavailableError: TensorRT for RTX is not installed, or the memory is too small.
    """
    manifest.find_graph("decode", "tensorrt")
    trt = load_tensorrt()
    # Beside the mapped file TensorRT holds the weights it optimizes and the engine.
    needed = 2 * memory_needs(manifest, "tensorrt").weight_bytes
    if needed > (free := available_bytes()):
        raise BackendUnavailableError(
            f"--engine-build needs about {format_bytes(needed)} of memory, {format_bytes(free)} "
            "are free; build on a larger machine"
        )
    results = []
    for graph in manifest.graphs:
        if graph.target == "tensorrt":
            progress(f"building the engine of {graph.file}")
            path = manifest.folder / graph.file
            layers = manifest.model.num_hidden_layers
            results.append(build_engine(trt, path, num_hidden_layers=layers))
    return results


def build_engine(trt: ModuleType, path: Path, *, num_hidden_layers: int) -> EngineBuild:
    """Builds one engine; it is dropped, only whether it could be made is of interest.

    Args:
        trt: What load_tensorrt returned.
        path: The graph, its weights beside it.
        num_hidden_layers: Each has one K and one V cache.

    Returns:
        The result.
    """
    begin = time.perf_counter()
    log = _make_log(trt)
    builder = trt.Builder(log)
    network = builder.create_network(0)  # strongly typed: the graph's own dtypes
    parser = trt.OnnxParser(network, log)
    problems: list[str] = []
    num_updates = engine_bytes = 0
    if parser.parse_from_file(str(path)):
        updates = set(_cache_updates(trt, network))
        wanted = {
            (f"past_key_values.{i}.{kind}", f"present.{i}.{kind}")
            for i in range(num_hidden_layers)
            for kind in ("key", "value")
        }
        num_updates = len(updates & wanted)
        problems += [
            f"{past} is not written in place to {present}"
            for past, present in sorted(wanted - updates)
        ]
        engine = builder.build_serialized_network(network, builder.create_builder_config())
        engine_bytes = 0 if engine is None else engine.nbytes
        if engine is None:
            problems += log.errors or ["TensorRT built no engine and gave no reason"]
    else:
        problems += _parser_errors(parser) or log.errors or ["not read as ONNX"]
    return EngineBuild(
        file=path.name,
        problems=tuple(problems),
        num_cache_updates=num_updates,
        engine_bytes=engine_bytes,
        build_s=time.perf_counter() - begin,
    )


def load_tensorrt() -> ModuleType:
    """Imports TensorRT for RTX, whose bindings don't find its libraries by themselves.

    Returns:
        The module `tensorrt_rtx_bindings`.

    Raises:
        BackendUnavailableError: A package is not installed, or of another version.
    """
    for package in (_LIBRARY_PACKAGE, _BINDINGS):
        if importlib.util.find_spec(package) is None:
            raise BackendUnavailableError(
                f"--engine-build needs {package}, which is not installed; "
                "pip install 'llamac[tensorrt-check]'"
            )
    spec = importlib.util.find_spec(_LIBRARY_PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent
    for pattern in _LIBRARIES:
        found = sorted(folder.glob(pattern))
        if len(found) != 1:
            raise BackendUnavailableError(
                f"--engine-build needs one {pattern} in {folder}, found {len(found)} in version "
                f"{version('onnxruntime-ep-nv-tensorrt-rtx')}; pip install 'llamac[tensorrt-check]'"
            )
        ctypes.CDLL(str(found[0]), mode=ctypes.RTLD_GLOBAL)
    return importlib.import_module(_BINDINGS)


def _cache_updates(trt: ModuleType, network: Any) -> Iterator[tuple[str, str]]:
    """Input and output of every in-place update that lies between an input and an output."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.KV_CACHE_UPDATE:
            past, present = layer.get_input(0), layer.get_output(0)
            if past.is_network_input and present.is_network_output:
                yield past.name, present.name


def _parser_errors(parser: Any) -> list[str]:
    errors = (parser.get_error(index) for index in range(parser.num_errors))
    return [
        f"node {error.node_name()} ({error.node_operator()}): {_one_line(error.desc())}"
        for error in errors
    ]


def _make_log(trt: ModuleType) -> Any:
    """A logger that keeps the errors; its base class exists only once TensorRT is loaded."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(_one_line(message))

    return Log()


def _one_line(text: str) -> str:
    return " ".join(text.split())[:_MAX_MESSAGE]
