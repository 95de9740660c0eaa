"""From a checkpoint's name to a backend that is ready to generate."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from ..runtime.backend import MAX_THREADS, BackendUnavailableError, StaticShape
from ..runtime.memory import available_bytes, format_bytes
from ..runtime.typed_json import shown
from .cache import cache_bytes
from .checkpoint import Checkpoint, load_model, open_checkpoint, weight_bytes
from .compiled.torch_backend import TorchBackend
from .config import DTYPES, LlamaConfig
from .tables import check_rope_rows, rope_bytes

__all__ = ["DEMO_FOLDER", "LoadedModel", "load_backend", "static_shape"]

logger = logging.getLogger(__name__)

DEMO_FOLDER = Path(__file__).parent / "demo"

_DEVICES = ("cpu", "cuda")
_MAX_WINDOWS = 16  # that RoPE rows are made for: a context of millions would cost gigabytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A torch backend and where it came from.

    Attributes:
        backend: Ready to run.
        checkpoint: What was loaded.
        load_s: Time to read the weights.
    """

    backend: TorchBackend
    checkpoint: Checkpoint
    load_s: float


def load_backend(
    source: Checkpoint | str | Path | None = None,
    *,
    compile: bool = True,
    device: str = "cpu",
    dtype: str | None = None,
    batch_size: int = 1,
    max_seq_len: int | None = None,
    prefill_len: int | tuple[int, ...] | None = None,
    threads: int | None = None,
    all_logits: bool = False,
    announce: Callable[[str], None] = logger.info,
    progress: Callable[[str], None] = lambda _: None,
) -> LoadedModel:
    """Loads a checkpoint into a torch backend.

    Args:
        source: An open checkpoint, or a folder, file, or name in the local Hugging Face cache;
            None is the demo model.
        compile: Whether to compile; False runs eagerly.
        device: "cpu" or "cuda".
        dtype: "float32", "float16" or "bfloat16"; None keeps the checkpoint's own.
        batch_size: B, cache slots.
        max_seq_len: S; None is max_position_embeddings, at most 2048.
        prefill_len: P, or several, ascending; None is 16 and 128, at most S.
        threads: CPU threads; None leaves torch's number.
        all_logits: Whether `score` can be called.
        announce: Told the bytes needed before anything is loaded.
        progress: Told what is being done.

    Returns:
        The backend and where it came from.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: The checkpoint or an option is refused; the message says why.
        BackendUnavailableError: The machine lacks the device, a compiler or the memory.
    """
    _check_choice("device", device, _DEVICES)
    if dtype is not None:
        _check_choice("dtype", dtype, DTYPES)
    opened = isinstance(source, Checkpoint)
    checkpoint = source if opened else open_checkpoint(source or DEMO_FOLDER)
    config = checkpoint.config
    torch_dtype: torch.dtype = getattr(torch, dtype or config.dtype)
    shape = static_shape(
        config, batch_size=batch_size, max_seq_len=max_seq_len, prefill_len=prefill_len
    )
    if device == "cuda":
        _check_cuda()
    if threads is not None:
        if not 1 <= threads <= MAX_THREADS:
            raise ValueError(f"threads is {threads}; it must be between 1 and {MAX_THREADS}")
        torch.set_num_threads(threads)
    text = _check_memory(checkpoint, shape, device, torch_dtype)
    announce(
        f"{text} ({dtype or config.dtype}, batch {batch_size}, max_seq_len {shape.max_seq_len})"
    )
    begin = time.perf_counter()
    progress("loading weights")
    model = load_model(
        checkpoint, dtype=torch_dtype, device=device, num_positions=shape.num_positions
    )
    load_s = time.perf_counter() - begin
    backend = TorchBackend(
        model,
        batch_size=batch_size,
        max_seq_len=shape.max_seq_len,
        prefill_lens=shape.prefill_lens,
        cache_dtype=torch_dtype,
        compile=compile,
        all_logits=all_logits,
        progress=progress,
    )
    return LoadedModel(backend=backend, checkpoint=checkpoint, load_s=load_s)


def static_shape(
    config: LlamaConfig,
    *,
    batch_size: int = 1,
    max_seq_len: int | None = None,
    prefill_len: int | tuple[int, ...] | None = None,
) -> StaticShape:
    """Fills in the sizes that were not asked for, alike for every backend and for an export.

    There are RoPE rows for the context the model was trained for, at most 16 windows of it.

    Args:
        config: Supplies max_position_embeddings, vocab_size and how RoPE is stretched.
        batch_size: B.
        max_seq_len: S; None is max_position_embeddings, at most 2048.
        prefill_len: P, or several, ascending; None is 16, for short prompts, and 128, at most S,
            and with several slots 1, for a slot that decodes alone.

    Returns:
        The backend's sizes.

    Raises:
        ValueError: They contradict each other, or RoPE can't reach as far.
    """
    trained = config.max_position_embeddings
    rows = min(trained, 2048) if max_seq_len is None else max_seq_len
    check_rope_rows(config, rows)
    if prefill_len is None:
        lens = {min(16, rows), min(128, rows)} | ({1} if batch_size > 1 else set())
        prefill_len = tuple(sorted(lens))
    return StaticShape(
        batch_size=batch_size,
        max_seq_len=rows,
        prefill_lens=prefill_len if isinstance(prefill_len, tuple) else (prefill_len,),
        num_positions=max(rows, min(trained, _MAX_WINDOWS * rows)),
        vocab_size=config.vocab_size,
    )


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {shown(value)}; it must be one of {', '.join(allowed)}")


def _check_cuda() -> None:
    if not torch.cuda.is_available():
        raise BackendUnavailableError(
            f"no CUDA device found by torch {torch.__version__}; use --device cpu, or install a "
            "CUDA build of torch and a driver"
        )
    if find_spec("triton") is None:
        raise BackendUnavailableError(
            "triton is not installed, which --device cuda needs; pip install triton, or install a "
            "CUDA build of torch for Linux, which brings it"
        )


def _check_memory(
    checkpoint: Checkpoint, shape: StaticShape, device: str, dtype: torch.dtype
) -> str:
    """Returns what will be allocated, in words, if it fits."""
    config, rows = checkpoint.config, shape.max_seq_len
    needed = {
        "weights": weight_bytes(checkpoint, dtype),
        "cache": cache_bytes(config, shape.batch_size, rows, dtype=dtype),
        "RoPE": rope_bytes(config, shape.num_positions),
    }
    text = ", ".join(f"{name} {format_bytes(size)}" for name, size in needed.items())
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else available_bytes()
    if sum(needed.values()) > free:
        raise BackendUnavailableError(
            f"{text} do not fit in {format_bytes(free)} of free memory; lower --max-seq-len or "
            "--batch-size, or choose a 16-bit --dtype"
        )
    return text
