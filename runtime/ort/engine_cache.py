"""Where TensorRT's engines are kept, and the options that put them there.

ONNX Runtime never checks that a cached engine belongs to a graph, so the folder's name does.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
from pathlib import Path

from ..bundle.manifest import GraphFile, Manifest
from ..cache_folder import cache_folder
from .gpu_libraries import find_gpu

__all__ = ["engine_folder", "has_engine", "tensorrt_options"]


def engine_folder(manifest: Manifest, base: Path | None) -> Path:
    """Makes the folder (mode 0700) of a bundle's engines on this machine.

    Args:
        manifest: The bundle; its digest covers graphs and weights.
        base: Where such folders are kept; None is the user's cache.

    Returns:
        A folder named after the content, the versions of ONNX Runtime and TensorRT, and the GPU.
    """
    import onnxruntime

    gpu = find_gpu()
    key = {
        "bundle": manifest.digest,
        "onnxruntime": onnxruntime.__version__,
        "tensorrt": ctypes.CDLL("libnvinfer.so.10").getInferLibVersion(),
        "gpu": gpu and [gpu.name, gpu.compute_capability],
    }
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    folder = (cache_folder("tensorrt") if base is None else base) / name
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    return folder


def has_engine(folder: Path, graph: GraphFile) -> bool:
    """Whether a graph's engine was built before."""
    return any(folder.glob(f"{Path(graph.file).stem}_*.engine"))


def tensorrt_options(folder: Path, graph: GraphFile) -> dict[str, str]:
    """Options of ONNX Runtime's TensorRT provider for one graph.

    No precision flag: without one the network is strongly typed, as the graph says. Products in
    float32 are TF32 all the same, unless NVIDIA_TF32_OVERRIDE=0 is in the environment: ONNX
    Runtime has no option for it.

    Args:
        folder: What engine_folder returned.
        graph: Decode steps are captured as one CUDA graph; prefill's slot address varies.

    Returns:
        Option names to values.
    """
    return {
        "device_id": "0",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_engine_cache_prefix": Path(graph.file).stem,
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
        "trt_cuda_graph_enable": str(int(graph.role == "decode")),
    }
