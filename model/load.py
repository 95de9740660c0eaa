"""From a checkpoint's name to a backend that is ready to generate."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..runtime.backend import MAX_THREADS, BackendUnavailableError, StaticShape
from ..runtime.launcher import num_local_ranks
from ..runtime.memory import available_bytes, format_bytes
from ..runtime.typed_json import shown
from .cache import cache_bytes
from .checkpoint import Checkpoint, load_model, open_checkpoint, weight_bytes
from .compiled.torch_backend import TorchBackend
from .config import DTYPES, LlamaConfig
from .distributed import ParallelBackend, RankGroup
from .parallel import check_ranks, shard_checkpoint
from .ranks import ALONE, Rank
from .tables import check_rope_rows, rope_bytes

__all__ = ["DEMO_FOLDER", "LoadedModel", "load_backend", "load_part", "static_shape"]

logger = logging.getLogger(__name__)

DEMO_FOLDER = Path(__file__).parent / "demo"

_DEVICES = ("cpu", "cuda")
_KV_DTYPES = ("int8",)
_MAX_RANKS = 1024
_MAX_WINDOWS = 16  # that RoPE rows are made for: a context of millions would cost gigabytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A torch backend and where it came from.

    Attributes:
        backend: Ready to run; of several ranks the first one's speaks for all.
        checkpoint: What was loaded.
        load_s: Time to read the weights.
    """

    backend: TorchBackend | ParallelBackend
    checkpoint: Checkpoint
    load_s: float


def load_backend(
    source: Checkpoint | str | Path | None = None,
    *,
    compile: bool = True,
    device: str = "cpu",
    dtype: str | None = None,
    kv_dtype: str | None = None,
    batch_size: int = 1,
    max_seq_len: int | None = None,
    prefill_len: int | tuple[int, ...] | None = None,
    num_guesses: int = 0,
    mixed_lens: tuple[int, ...] = (),
    threads: int | None = None,
    tensor_parallel: int = 1,
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
        kv_dtype: "int8" keeps keys and values in 8 bits, with a scale for each row and head; None
            keeps them in dtype.
        batch_size: B, cache slots.
        max_seq_len: S; None is max_position_embeddings, at most 2048.
        prefill_len: P, or several, ascending; None is 16 and 128, at most S.
        num_guesses: How many ids a step may check beside the newest; 0 is one token a step.
        mixed_lens: Rows of steps that take tokens of any slots, ascending; () makes none.
        threads: CPU threads, of each rank; None leaves torch's number, of several ranks on this
            machine their share of the cores.
        tensor_parallel: How many ranks hold the model together, each a process; if one is lost,
            this one ends too. The backend's `close`, or this process's end, ends the others.
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
    if kv_dtype is not None:
        _check_choice("kv_dtype", kv_dtype, _KV_DTYPES)
    opened = isinstance(source, Checkpoint)
    checkpoint = source if opened else open_checkpoint(source or DEMO_FOLDER)
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise ValueError(f"threads is {threads}; it must be between 1 and {MAX_THREADS}")
    if not 1 <= tensor_parallel <= _MAX_RANKS:
        raise ValueError(
            f"tensor_parallel is {tensor_parallel}; it must be between 1 and {_MAX_RANKS}"
        )
    dtype = dtype or checkpoint.config.dtype
    shape = static_shape(
        checkpoint.config, batch_size=batch_size, max_seq_len=max_seq_len, prefill_len=prefill_len
    )
    if device == "cuda":
        _check_cuda(num_local_ranks(tensor_parallel))
    check_ranks(checkpoint, tensor_parallel)
    dtypes = getattr(torch, dtype), getattr(torch, kv_dtype or dtype)
    text = _check_memory(checkpoint, shape, device, dtypes, tensor_parallel)
    announce(f"{text} ({dtype}, batch {batch_size}, max_seq_len {shape.max_seq_len})")
    options: dict[str, Any] = {
        "compile": compile,
        "device": device,
        "dtype": dtype,
        "kv_dtype": kv_dtype,
        "batch_size": batch_size,
        "max_seq_len": max_seq_len,
        "prefill_len": prefill_len,
        "num_guesses": num_guesses,
        "mixed_lens": mixed_lens,
        "threads": threads,
        "all_logits": all_logits,
    }
    if tensor_parallel == 1:
        backend, load_s = load_part(checkpoint, **options, progress=progress)
        return LoadedModel(backend=backend, checkpoint=checkpoint, load_s=load_s)
    adapter = checkpoint.adapter
    place = {
        "source": os.path.abspath(checkpoint.folder),
        "adapter": None if adapter is None else os.path.abspath(adapter),
    }
    group = RankGroup.lead(tensor_parallel, {**place, **options})
    try:
        progress("waiting for the other ranks")
        group.connect(device)
        own, load_s = load_part(checkpoint, group, **options, progress=progress)
    except BaseException:
        group.kill()
        raise
    heads = checkpoint.config.num_key_value_heads
    parallel = ParallelBackend(own, group, num_kv_heads=heads)
    return LoadedModel(backend=parallel, checkpoint=checkpoint, load_s=load_s)


def load_part(
    checkpoint: Checkpoint,
    group: RankGroup | None = None,
    *,
    compile: bool,
    device: str,
    dtype: str,
    kv_dtype: str | None,
    batch_size: int,
    max_seq_len: int | None,
    prefill_len: int | tuple[int, ...] | None,
    num_guesses: int,
    mixed_lens: Sequence[int],
    threads: int | None,
    all_logits: bool,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[TorchBackend, float]:
    """Loads what one process holds, once the options are known to be valid; see load_backend.

    Args:
        checkpoint: The whole model.
        group: The ranks that hold it together, connected, each of which calls this; None is this
            process alone.
        compile: See load_backend.
        device: See load_backend.
        dtype: See load_backend.
        kv_dtype: See load_backend.
        batch_size: See load_backend.
        max_seq_len: See load_backend.
        prefill_len: See load_backend.
        num_guesses: See load_backend.
        mixed_lens: See load_backend.
        threads: See load_backend.
        all_logits: See load_backend.
        progress: See load_backend.

    Returns:
        The backend, and the time to read the weights in seconds.

    Raises:
        ValueError: A weight is damaged.
        BackendUnavailableError: The compiler fails, or another rank is gone.
    """
    shape = static_shape(
        checkpoint.config, batch_size=batch_size, max_seq_len=max_seq_len, prefill_len=prefill_len
    )
    rank, place = ALONE, torch.device(device)
    if group is not None:
        rank, place = group.rank, group.device
        checkpoint = shard_checkpoint(checkpoint, rank)
        if threads is None and group.local_size > 1:
            threads = max(1, len(os.sched_getaffinity(0)) // group.local_size)
    if threads is not None:
        torch.set_num_threads(threads)
    begin = time.perf_counter()
    progress("loading weights")
    torch_dtype: torch.dtype = getattr(torch, dtype)
    model = load_model(
        checkpoint, dtype=torch_dtype, device=place, num_positions=shape.num_positions, rank=rank
    )
    load_s = time.perf_counter() - begin
    with contextlib.nullcontext() if group is None else group.guarded():
        backend = TorchBackend(
            model,
            batch_size=batch_size,
            max_seq_len=shape.max_seq_len,
            prefill_lens=shape.prefill_lens,
            num_guesses=num_guesses,
            mixed_lens=tuple(mixed_lens),
            cache_dtype=getattr(torch, kv_dtype or dtype),
            compile=compile,
            all_logits=all_logits,
            progress=progress,
        )
        if group is not None:
            group.started()
    return backend, load_s


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


def _check_cuda(num_ranks: int) -> None:
    if not torch.cuda.is_available():
        raise BackendUnavailableError(
            f"no CUDA device found by torch {torch.__version__}; use --device cpu, or install a "
            "CUDA build of torch and a driver"
        )
    if (count := torch.cuda.device_count()) < num_ranks:
        raise BackendUnavailableError(f"{num_ranks} ranks need a GPU each; there are {count}")
    if find_spec("triton") is None:
        raise BackendUnavailableError(
            "triton is not installed, which --device cuda needs; pip install triton, or install a "
            "CUDA build of torch for Linux, which brings it"
        )


def _check_memory(
    checkpoint: Checkpoint,
    shape: StaticShape,
    device: str,
    dtypes: tuple[torch.dtype, torch.dtype],
    world_size: int,
) -> str:
    """Returns what will be allocated, in words, if it fits; of several ranks each one's."""
    dtype, cache_dtype = dtypes
    if world_size > 1:
        checkpoint = shard_checkpoint(checkpoint, Rank(index=0, world_size=world_size))
    config, rows = checkpoint.config, shape.max_seq_len
    needed = {
        "weights": weight_bytes(checkpoint, dtype),
        "cache": cache_bytes(config, shape.batch_size, rows, dtype=cache_dtype),
        "RoPE": rope_bytes(config, shape.num_positions),
    }
    text = ", ".join(f"{name} {format_bytes(size)}" for name, size in needed.items())
    if world_size > 1:
        read = format_bytes(sum(piece.num_bytes for piece in checkpoint.pieces))
        text = f"each of {world_size} ranks: {text}, {read} of files"
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else available_bytes()
    together = 1 if device == "cuda" else num_local_ranks(world_size)
    if together * sum(needed.values()) > free:
        raise BackendUnavailableError(
            f"{text} do not fit in {format_bytes(free)} of free memory; lower --max-seq-len or "
            "--batch-size, or choose a 16-bit --dtype"
        )
    return text
