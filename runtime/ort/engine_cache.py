"""TensorRT's engines of a bundle: built once, whole or not at all, and opened without the weights.

ONNX Runtime never checks that a kept engine belongs to a graph, so the folder's name does. Beside
each engine it leaves an EP-context model: one node with the graph's inputs and outputs that names
the engine's file. A session of that model reads the engine alone; one of the graph itself would
read and parse all weights before it looks for an engine.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..atomic_write import new_folder, remove_abandoned
from ..bundle.manifest import GraphFile, Manifest
from ..cache_folder import cache_folder, folder_bytes
from .gpu_libraries import find_gpu

__all__ = ["MAX_CACHE_BYTES", "Engines", "kept_engines", "prune_engines"]

logger = logging.getLogger(__name__)

# An 8B model in 16 bits leaves 32 GB, an engine for prefill and one for decode: two such bundles,
# or one before and after an update, are kept.
MAX_CACHE_BYTES = 72 << 30

# Everything that changes an engine is set here or is part of the folder's name. 3 is TensorRT's
# own default.
_BUILD_OPTIONS = {"trt_builder_optimization_level": "3"}
_TF32 = "NVIDIA_TF32_OVERRIDE"
_FOLDER_NAME = re.compile("[0-9a-f]{32}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Engines:
    """Where the engines of a bundle are, or are being built.

    Attributes:
        folder: Holds for each graph an EP-context model of the graph's name, and its engine.
        built: Whether they are there; otherwise the sessions that are opened now build them.
        device_id: The GPU.
    """

    folder: Path
    built: bool
    device_id: int

    def model_path(self, manifest: Manifest, graph: GraphFile) -> Path:
        """What a session is opened on."""
        return (self.folder if self.built else manifest.folder) / graph.file

    def provider_options(self, graph: GraphFile) -> dict[str, str]:
        """Options of ONNX Runtime's TensorRT provider for one graph.

        Its booleans are True and False, unlike the CUDA provider's. No precision flag: without one
        the network is strongly typed, as the graph says. Products in float32 are TF32 all the
        same, unless NVIDIA_TF32_OVERRIDE=0 is in the environment: there is no option for it.

        Args:
            graph: Steps of all slots are captured as one CUDA graph; prefill's slot address varies.

        Returns:
            Option names to values.
        """
        options = {
            "device_id": str(self.device_id),
            "trt_cuda_graph_enable": str(graph.is_step),
        }
        if self.built:
            return options
        return {
            **options,
            **_BUILD_OPTIONS,
            # The engine goes beside the EP-context model. Naming its folder would put that
            # folder's path into the model.
            "trt_dump_ep_context_model": "True",
            "trt_ep_context_file_path": str(self.folder / graph.file),
            "trt_ep_context_embed_mode": "0",  # a protobuf holds 2 GB
            "trt_engine_cache_enable": "True",
            "trt_engine_cache_prefix": Path(graph.file).stem,
            "trt_timing_cache_enable": "True",
            "trt_timing_cache_path": str(self.folder),
        }


@contextlib.contextmanager
def kept_engines(
    manifest: Manifest, files: Sequence[str], base: Path | None, device_id: int = 0
) -> Iterator[Engines]:
    """Finds a bundle's engines, or keeps those that the block builds, once all are whole.

    Args:
        manifest: The bundle; its digest covers graphs and weights.
        files: The graphs that are opened.
        base: Where such folders are kept; None is the user's cache.
        device_id: The GPU.

    Yields:
        The engines.

    Raises:
        ValueError: The folder can't be made, or another process builds the same engines.
    """
    base = cache_folder("tensorrt") if base is None else base
    folder = base / _folder_name(manifest, files, device_id)
    if folder.is_dir():
        os.utime(folder)  # the oldest are pruned
        yield Engines(folder=folder, built=True, device_id=device_id)
        return
    opened = False
    try:
        with new_folder(folder) as partial:
            partial.chmod(0o700)
            yield Engines(folder=partial, built=False, device_id=device_id)
            opened = True
            _check_whole(partial)
    except (OSError, ValueError) as error:
        if not opened:
            raise
        # The engines run all the same.
        logger.warning("TensorRT's engines are not kept: %s; the next start builds them", error)
        return
    prune_engines(base, keep=folder)


def prune_engines(base: Path, *, keep: Path, max_bytes: int = MAX_CACHE_BYTES) -> None:
    """Deletes what killed builds left, and the engines unused for longest until the rest fits.

    Args:
        base: Where the folders are kept; others than engines' are left alone.
        keep: A folder that stays.
        max_bytes: The size to come below.
    """
    remove_abandoned(base)
    folders = [path for path in base.iterdir() if _FOLDER_NAME.fullmatch(path.name)]
    folders.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
    total = folder_bytes(keep)
    for folder in folders:
        if folder == keep:
            continue
        total += folder_bytes(folder)
        if total > max_bytes:
            shutil.rmtree(folder, ignore_errors=True)


def _folder_name(manifest: Manifest, files: Sequence[str], device_id: int) -> str:
    import onnxruntime

    gpu = find_gpu(device_id)
    key = {
        "bundle": manifest.digest,
        "graphs": list(files),
        "onnxruntime": onnxruntime.__version__,
        "tensorrt": ctypes.CDLL("libnvinfer.so.10").getInferLibVersion(),
        "gpu": gpu and [gpu.name, gpu.compute_capability],
        "options": _BUILD_OPTIONS,
        "tf32": os.environ.get(_TF32),
    }
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]


def _check_whole(folder: Path) -> None:
    """ONNX Runtime doesn't look whether what it writes arrives.

    Raises:
        OSError: The disk filled up, or an engine's model wasn't written.
    """
    if not shutil.disk_usage(folder).free:
        raise OSError(f"the disk of {folder.parent} is full")
    if not all(path.stat().st_size for path in folder.glob("*.engine")):
        raise OSError("ONNX Runtime wrote an empty engine")
    models, engines = (list(folder.glob(pattern)) for pattern in ("*.onnx", "*.engine"))
    if not models or len(models) != len(engines):
        raise OSError(f"ONNX Runtime wrote {len(models)} models and {len(engines)} engines")
