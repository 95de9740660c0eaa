"""Opens checkpoints of any supported format and loads them into the model."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable, Container
from pathlib import Path

import torch
from torch import nn

from ...runtime.side_file import read_side_file
from ...runtime.typed_json import shown
from ..llama import Llama
from ..packed import is_packed_part
from ..ranks import ALONE, Rank
from .adapter import merge_adapter
from .gguf_format import find_gguf, open_gguf_file
from .hf_format import has_hf_weights, open_hf_folder
from .lit_format import open_lit_file
from .meta_format import is_meta_folder, open_meta_folder
from .stored import Checkpoint, StoredTensor, copy_finite, is_finite

__all__ = [
    "Checkpoint",
    "StoredTensor",
    "load_model",
    "load_weights",
    "open_checkpoint",
    "weight_bytes",
]

logger = logging.getLogger(__name__)

_LONGEST_NAME = 4096  # bytes of a path on Linux


def open_checkpoint(source: str | Path, *, adapter: str | Path | None = None) -> Checkpoint:
    """Finds a checkpoint and checks its names, shapes and dtypes; no weight is read.

    Args:
        source: An HF folder, Meta's folder, a lit-llama `.pth` or a `.gguf` or the folder of one,
            or the name of a model in the local Hugging Face cache (nothing is downloaded).
        adapter: The folder of a LoRA that PEFT saved, merged as the weights are read; None is none.

    Returns:
        The checkpoint.

    Raises:
        FileNotFoundError: Nothing is there, or a part of it is missing; says what was looked for.
        ValueError: A file is damaged or holds objects other than tensors, the config isn't a
            LLaMA's, or a tensor is missing, extra, misshaped or stored in a way that isn't read;
            of an adapter see merge_adapter.
    """
    checkpoint = _find(source)
    return checkpoint if adapter is None else merge_adapter(checkpoint, adapter)


def load_weights(
    model: Llama,
    checkpoint: Checkpoint,
    progress: Callable[[int, int], None] | None = None,
    *,
    mapped: Container[str] = (),
) -> None:
    """Copies every weight into the model's parameters, casting to their dtype.

    Args:
        model: Real (not meta) parameters of the checkpoint's shapes.
        checkpoint: What is read, part by part: beyond the model, one part is in memory.
        mapped: Names that need no copy.
        progress: Called with the stored bytes copied so far and in all.

    Raises:
        ValueError: The model's parameters aren't the checkpoint's, or a weight is NaN or past their
            dtype's range; the first is named.
    """
    # The state dict's tensors share the parameters' memory, fused or tied ones included.
    targets = model.state_dict()
    if model.config.tie_word_embeddings:
        targets = {n: t for n, t in targets.items() if not n.startswith("lm_head.")}
    for name in sorted(targets.keys() ^ checkpoint.tensors.keys()):
        raise ValueError(f"{checkpoint.folder}: tensor {name} is not in both model and checkpoint")
    for name, stored in checkpoint.tensors.items():
        if tuple(targets[name].shape) != stored.shape:
            raise ValueError(
                f"{checkpoint.folder}: tensor {name} has shape {list(stored.shape)}, "
                f"the model's {list(targets[name].shape)}"
            )
    done_bytes = 0
    total_bytes = sum(
        math.prod(stored.shape) * getattr(torch, stored.dtype).itemsize
        for name, stored in checkpoint.tensors.items()
        if name not in mapped
    )
    for name, place, part in checkpoint.read(n for n in checkpoint.tensors if n not in mapped):
        copy_finite(f"{checkpoint.folder}: {name}", part, targets[name][place])
        done_bytes += part.nbytes
        if progress is not None:
            progress(done_bytes, total_bytes)


def load_model(
    checkpoint: Checkpoint,
    *,
    num_positions: int,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    rank: Rank = ALONE,
    progress: Callable[[int, int], None] | None = None,
) -> Llama:
    """Builds the model and loads it, ready to run.

    On a CPU, weights whose bytes serve as they are stay in their files, mapped: nothing is read
    before it is used, and processes share the pages. Their files must not change meanwhile. On a
    GPU, weights that meet the same rows are parts of one tensor.

    Args:
        checkpoint: What is loaded.
        num_positions: Rows of the RoPE tables.
        dtype: Of the weights; None takes the config's. The RoPE tables stay float32.
        device: Where the weights go.
        rank: Whose part of the model the checkpoint is; see shard_checkpoint.
        progress: See load_weights.

    Returns:
        The model, in eval mode, nothing requiring a gradient.

    Raises:
        ValueError: A file changed since the checkpoint was opened, or see load_weights.
    """
    chosen: torch.dtype = dtype or getattr(torch, checkpoint.config.dtype)
    with torch.device("meta"):
        model = Llama(
            checkpoint.config, num_positions=num_positions, packed=checkpoint.packed, rank=rank
        )
    mapped: set[str] = set()
    for name, parameter in list(model.named_parameters()):
        if name not in checkpoint.tensors:
            continue  # a rank's rows of a tied embedding; others are refused below
        kind = parameter.dtype if is_packed_part(name) else chosen
        weight = checkpoint.map(name, kind) if torch.device(device).type == "cpu" else None
        if weight is None:
            weight = torch.empty(parameter.shape, dtype=kind, device=device)
        elif is_packed_part(name) and weight.is_floating_point() and not is_finite(weight):
            raise ValueError(
                f"{checkpoint.folder}: {name} holds what is not a number: its weights are damaged; "
                "copy them again"
            )
        else:
            mapped.add(name)
        module, _, key = name.rpartition(".")
        setattr(model.get_submodule(module), key, nn.Parameter(weight, requires_grad=False))
    model.tie()
    if torch.device(device).type == "cuda":
        model.join_weights()
    model.cos, model.sin = model.cos.to(device), model.sin.to(device)
    load_weights(model, checkpoint, progress, mapped=mapped)
    return model.eval()


def weight_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """Bytes of the model's distinct parameters in a dtype.

    Args:
        checkpoint: Supplies the shapes; a tied head counts once.
        dtype: Of every parameter that isn't a packed weight's.

    Returns:
        The number of bytes.
    """
    return sum(
        math.prod(stored.shape) * _dtype_in(name, stored, dtype).itemsize
        for name, stored in checkpoint.tensors.items()
    )


def _dtype_in(name: str, stored: StoredTensor, chosen: torch.dtype) -> torch.dtype:
    """A packed weight's parts stay as they are stored."""
    return getattr(torch, stored.dtype) if is_packed_part(name) else chosen


def _find(source: str | Path) -> Checkpoint:
    if len(str(source)) >= _LONGEST_NAME:
        raise FileNotFoundError(f"{shown(str(source))}: no such file or folder")
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        return _open_folder(path)
    if path.exists():
        return _open_file(path)
    if re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(source)) and ".." not in str(source):
        return _open_folder(_find_in_cache(str(source)))
    raise FileNotFoundError(f"{source}: no such file or folder")


def _open_folder(folder: Path) -> Checkpoint:
    if (folder / "adapter_config.json").exists():
        if not has_hf_weights(folder):
            raise ValueError(f"{folder}: holds an adapter; name its model, and it with --adapter")
        logger.warning("%s: adapter_config.json is ignored; the weights count as merged", folder)
    if not (any(folder.glob("*.safetensors*")) or any(folder.glob("pytorch_model*.bin*"))):
        if is_meta_folder(folder):
            return open_meta_folder(folder)
        found = sorted(folder.glob("*.pth"))
        if len(found) == 1:
            return open_lit_file(found[0])
        if found:
            names = ", ".join(path.name for path in found)
            raise ValueError(f"{folder}: holds {names}; name the file to open")
        if (file := find_gguf(folder)) is not None:
            return open_gguf_file(file)
    elif any(folder.glob("*.gguf")):
        logger.warning("%s: its .gguf is not read, but the weights beside it", folder)
    if (folder / "config.json").exists():
        return open_hf_folder(folder)
    raise FileNotFoundError(
        f"{folder}: no checkpoint (looked for config.json, consolidated.*.pth, lit-llama's *.pth, "
        "*.gguf)"
    )


def _open_file(path: Path) -> Checkpoint:
    if path.name.startswith("consolidated."):
        return open_meta_folder(path.parent)
    if path.suffix in (".pth", ".pt", ".ckpt"):
        return open_lit_file(path)
    if path.suffix == ".gguf":
        return open_gguf_file(path)
    raise ValueError(f"{path}: not a folder, a .pth or a .gguf file; name the folder it lies in")


def _find_in_cache(name: str) -> Path:
    """The snapshot that refs/main names; only looks, never downloads."""
    root = _cache_folder()
    repo = root / f"models--{name.replace('/', '--')}"
    if not repo.is_dir():
        raise FileNotFoundError(
            f"{name}: no such folder, and not in the Hugging Face cache (looked for {repo}); "
            "download it first, or name a folder"
        )
    reference = repo / "refs" / "main"
    if reference.exists():
        commit = read_side_file(reference).decode(errors="replace").strip()
        if not re.fullmatch(r"[0-9a-zA-Z]+", commit):
            raise ValueError(f"{reference}: not a commit")
        snapshots = [repo / "snapshots" / commit]
    else:
        snapshots = sorted((repo / "snapshots").glob("*"))
    if len(snapshots) != 1 or not snapshots[0].is_dir():
        raise FileNotFoundError(f"{name}: no snapshot of main in the cache (looked in {repo})")
    return snapshots[0]


def _cache_folder() -> Path:
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if value := os.environ.get(variable):
            return Path(os.path.expanduser(value))
    if value := os.environ.get("HF_HOME"):
        return Path(os.path.expanduser(value)) / "hub"
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(base)) / "huggingface" / "hub"
