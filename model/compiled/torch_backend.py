"""The torch backend: one prefill and one decode callable on a preallocated cache."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import shutil
import sysconfig
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...runtime.backend import BackendUnavailableError, StaticShape
from ...runtime.cache_folder import cache_folder
from ..cache import KVCache
from ..llama import Llama, TorchAttention, call_layer
from .bound_step import BoundStep
from .saved_step import SavedStep

__all__ = ["Startup", "TorchBackend", "compiler_problem"]

_Step = Callable[[nn.Module, nn.Module, Tensor, Tensor, Tensor, Tensor, KVCache], Tensor]

# Inductor's default of 512 elements a thread splits the reduction of a matrix-vector product
# between threads; rows are what should be split.
_CPU_OPTIONS: dict[str, Any] = {"cpp.min_chunk_size": 65536}


@dataclass(frozen=True, slots=True, kw_only=True)
class Startup:
    """What making the backend ready cost.

    Attributes:
        compile_s: Loading the steps from the disk cache, or else their first calls.
        warmup_s: Second calls, at full speed; a loaded step needs none. On CUDA the recording, too.
        cache_hit: Whether every step came from the disk cache; None when nothing is compiled.
    """

    compile_s: float
    warmup_s: float
    cache_hit: bool | None


class TorchBackend:
    """A Llama in torch, eager or compiled, behind the Backend protocol.

    Compiled, every step is one graph without breaks; after warm-up a recompile or a moved cache
    is a RuntimeError. On CUDA every step is replayed as one CUDA graph; each slot has a prefill of
    its own.

    Args:
        model: The model, on its device, in its dtype; its RoPE tables fix num_positions.
        batch_size: B, cache slots.
        max_seq_len: S, cache rows of a slot.
        prefill_lens: P, ascending.
        compile: Whether to compile; False runs the same code eagerly.
        all_logits: Whether prefill computes logits for all its tokens, which `score` needs.
        unroll_layers: Compile every layer separately instead of once (slow; for torch versions
            whose nested compile regions can't write the cache in place).
        progress: Told in a few words what is being compiled.

    Raises:
        ValueError: The sizes contradict each other.
        BackendUnavailableError: compile on a CPU without a C++ compiler.
    """

    def __init__(
        self,
        model: Llama,
        *,
        batch_size: int = 1,
        max_seq_len: int,
        prefill_lens: tuple[int, ...],
        compile: bool = True,
        all_logits: bool = False,
        unroll_layers: bool = False,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        config = model.config
        self.shape = StaticShape(
            batch_size=batch_size,
            max_seq_len=max_seq_len,
            prefill_lens=prefill_lens,
            num_positions=model.cos.shape[0],
            vocab_size=config.vocab_size,
        )
        self._device = model.cos.device
        if compile and self._device.type == "cpu" and (problem := compiler_problem()):
            raise BackendUnavailableError(f"{problem}; install it or use --backend eager")
        self._compiled = compile
        self._all_logits = all_logits
        self.cache = KVCache.allocate(
            config,
            batch_size,
            max_seq_len,
            dtype=model.lm_head.weight.dtype,
            device=self._device,
        )
        self._addresses = self._cache_addresses()

        on_cpu = self._device.type == "cpu"

        def build(name: str) -> _Step:
            if not compile:
                return _step(name, call_layer)

            def compiled() -> _Step:
                layer: Callable[..., Any] = call_layer
                if not unroll_layers:
                    layer = torch.compiler.nested_compile_region(call_layer)
                step = _step(name, layer)
                options = {**(_CPU_OPTIONS if on_cpu else {}), "guard_filter_fn": _guards_inputs}
                return torch.compile(step, fullgraph=True, dynamic=False, options=options)

            if not on_cpu:
                return compiled()
            dtype = self.cache.k[0].dtype
            return SavedStep(compiled, name, config, dtype, self.shape, all_logits, unroll_layers)

        self._prefill = {length: build(f"prefill_{length}") for length in prefill_lens}
        self._decode = build("decode")
        attention = TorchAttention()

        def bind(step: _Step, cache: KVCache, num_tokens: int, num_logits: int) -> BoundStep:
            def run(*inputs: Tensor) -> Tensor:
                ids, positions, rows, last = inputs
                with torch.no_grad():
                    return step(model, attention, ids, positions, rows, last, cache)

            batch = cache.k[0].shape[0]
            sizes = [(batch, num_tokens), (batch,), (batch,), (batch, num_logits)]
            return BoundStep(run, sizes, self._device)

        self._bound_prefill = {
            (length, slot): bind(step, self.cache.slot(slot), length, length if all_logits else 1)
            for length, step in self._prefill.items()
            for slot in range(batch_size)
        }
        self._bound_decode = bind(self._decode, self.cache, 1, 1)
        self._warm = False
        self.startup = self._start(progress)
        self._warm = True

    @property
    def num_replays(self) -> int:
        """Steps so far that were replays of a CUDA graph; 0 where nothing is recorded."""
        return sum(step.num_replays for step in (*self._bound_prefill.values(), self._bound_decode))

    def prefill(self, slot: int, ids: Sequence[int], start: int) -> NDArray[np.float32]:
        """One chunk of a prompt through one slot; see Backend."""
        logits = self._run_prefill(slot, ids, start)
        return logits[len(ids) - 1 if self._all_logits else 0].copy()

    def score(self, slot: int, ids: Sequence[int], start: int) -> NDArray[np.float32]:
        """Like prefill, with the logits of every id.

        Args:
            slot: Which slot's cache to fill.
            ids: 1 to P token ids.
            start: Position of the first id.

        Returns:
            [len(ids), V] float32 logits.

        Raises:
            ValueError: The backend was built without all_logits.
        """
        if not self._all_logits:
            raise ValueError("score needs a TorchBackend built with all_logits=True")
        return self._run_prefill(slot, ids, start)[: len(ids)].copy()

    def decode(self, ids: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """One token of every slot; see Backend."""
        self._check_addresses()
        rows = positions % self.shape.max_seq_len
        return self._bound_decode(ids[:, None], positions, rows, np.zeros_like(ids)[:, None])[:, 0]

    def _run_prefill(self, slot: int, ids: Sequence[int], start: int) -> NDArray[np.float32]:
        """[N, V] logits of one chunk, valid until the next."""
        length = self.shape.chunk_len(slot, len(ids), start)
        self._check_addresses()
        padded = np.zeros((1, length), dtype=np.int64)
        padded[0, : len(ids)] = ids
        position = np.array([start])
        wanted = np.arange(length) if self._all_logits else np.array([len(ids) - 1])
        return self._bound_prefill[length, slot](padded, position, position, wanted[None])[0]

    def _check_addresses(self) -> None:
        if self._compiled and self._warm and self._cache_addresses() != self._addresses:
            raise RuntimeError("the KV cache was reallocated after warm-up")

    def _cache_addresses(self) -> list[int]:
        return [buffer.data_ptr() for buffer in (*self.cache.k, *self.cache.v)]

    def _start(self, progress: Callable[[str], None]) -> Startup:
        """Loads every step, or else runs it twice: the first call compiles, the second is warm."""
        ids = np.zeros(self.shape.batch_size, dtype=np.int64)
        calls: list[tuple[str, _Step, Callable[[], object]]] = [
            (f"prefill of {p}", step, lambda p=p: self._run_prefill(0, [0] * p, 0))
            for p, step in self._prefill.items()
        ]
        calls.append(("decode", self._decode, lambda: self.decode(ids, ids)))
        loaded = misses = 0
        begin = time.perf_counter()
        with _compiler(self._device) if self._compiled else contextlib.nullcontext():
            compile_s, warmup_s = time.perf_counter() - begin, 0.0
            if self._compiled:
                misses = _cache_misses()
            for name, step, call in calls:
                progress(f"compiling {name}" if self._compiled else f"warming up {name}")
                begin = time.perf_counter()
                if isinstance(step, SavedStep) and step.load():
                    compile_s += time.perf_counter() - begin
                    loaded += 1
                    continue
                call()
                middle = time.perf_counter()
                call()
                compile_s += middle - begin
                warmup_s += time.perf_counter() - middle
        hit = None
        if self._compiled and self._device.type == "cuda":
            hit = _cache_misses() == misses
            begin = time.perf_counter()
            pool = torch.cuda.graph_pool_handle()
            for bound in (*self._bound_prefill.values(), self._bound_decode):
                bound.record(pool)
            warmup_s += time.perf_counter() - begin
        elif self._compiled:
            hit = loaded == len(calls)
        return Startup(compile_s=compile_s, warmup_s=warmup_s, cache_hit=hit)


def _step(name: str, call_layer: Callable[..., Tensor]) -> _Step:
    def step(
        model: nn.Module,
        attention: nn.Module,
        ids: Tensor,
        positions: Tensor,
        rows: Tensor,
        last: Tensor,
        cache: KVCache,
    ) -> Tensor:
        return model(ids, positions, rows, last, cache, attention, call_layer)

    # torch.compile keys its cache on the code object: a copy for every step keeps one backend's
    # shapes from counting as another's recompiles.
    code = step.__code__.replace(co_name=name)
    return FunctionType(code, step.__globals__, name, None, step.__closure__)


def _guards_inputs(guards: Sequence[Any]) -> list[bool]:
    """Of what a saved step would check at each call, keeps the shapes and dtypes of its inputs.

    Weights and cache are the backend's own and stay what they were.
    """
    inputs = {"ids", "positions", "rows", "last"}
    return [guard.guard_type == "TENSOR_MATCH" and guard.name in inputs for guard in guards]


def compiler_problem() -> str | None:
    """What torch.compile lacks on this machine's CPU, in a few words, or None."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler}) found, which torch.compile needs on CPU"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.exists():
        return f"{header} not found, which torch.compile needs on CPU (python3-dev)"
    return None


def _cache_misses() -> int:
    from torch._dynamo.utils import counters

    return counters["inductor"]["fxgraph_cache_miss"]


@contextlib.contextmanager
def _compiler(device: torch.device) -> Iterator[None]:
    """Keeps the cache of torch's compiler in the user's folder.

    The cache is elsewhere if the environment names another folder.
    """
    with _no_collection():
        from torch._inductor.runtime.cache_dir_utils import default_cache_dir

        name = "TORCHINDUCTOR_CACHE_DIR"
        before = os.environ.get(name, default_cache_dir())  # the import may have set it
        if before == default_cache_dir():
            os.environ[name] = str(cache_folder("inductor"))
        if device.type == "cpu":
            _probe_instructions()
        try:
            with warnings.catch_warnings():
                # float32 was asked for; that TF32 would be faster is no news.
                warnings.filterwarnings("ignore", "TensorFloat32")
                yield
        finally:
            os.environ[name] = before


def _probe_instructions() -> None:
    """Lets Inductor try out the processor's vector instructions, while Dynamo is imported.

    It waits for programs of its own, and must be through before anything is compiled: the probe
    changes the compiler flags that it shares with every kernel, so a second one at the same time
    leaves other flags behind, and kernels that no later process finds on disk.
    """
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    probe = threading.Thread(target=pick_vec_isa)
    probe.start()
    importlib.import_module("torch._dynamo")
    probe.join()


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """A third faster imports, a tenth faster compilation: what they make would be walked often."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
