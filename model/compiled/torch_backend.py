"""The torch backend: one prefill and one decode callable on a preallocated cache."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...runtime.backend import BackendUnavailableError, StaticShape, StepInputs, check_rows
from ...runtime.mixed_step import mixed_inputs
from ..cache import KVCache
from ..decode_layer import call_layer
from ..kernels.few_rows import load_operators
from ..llama import Llama, TorchAttention
from ..ranks import is_so_everywhere
from .bound_step import BoundStep
from .inductor import cache_misses, compiler, compiler_problem, kernel_compiler
from .saved_step import SavedStep
from .step_key import step_key

__all__ = ["Startup", "TorchBackend"]

# How steps are named.
_PREFILL, _DECODE, _EXTEND, _MIXED = "prefill_", "decode", "extend", "mixed_"

_Step = Callable[..., Tensor]  # from the fields of StepInputs to [B, N, V] logits

# Inductor's default of 512 elements a thread splits the reduction of a matrix-vector product
# between threads; rows are what should be split. Sizes don't change from call to call: asking each
# tensor for its own took a twelfth of a small model's step.
_CPU_OPTIONS: dict[str, Any] = {"cpp.min_chunk_size": 65536, "size_asserts": False}


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

    Compiled, every step is one graph without breaks; after warm-up a recompile is a RuntimeError.
    On CUDA every step is replayed as one CUDA graph; what our own kernels can do there (see
    gpu_step.fits_gpu) is recorded without torch's compiler.

    Args:
        model: The model, on its device, in its dtype; its RoPE tables fix num_positions.
        batch_size: B, cache slots.
        max_seq_len: S, cache rows of a slot.
        prefill_lens: P, ascending.
        num_guesses: Ids behind the newest that `extend` takes; 0 makes no such step.
        mixed_lens: Rows of the steps that `mix` runs, ascending; () makes none.
        cache_dtype: Of keys and values; None is the model's, that of its hidden states.
        compile: Whether to compile; False runs the same code eagerly.
        all_logits: Whether prefill computes logits for all its tokens, which `score` needs.
        progress: Told in a few words what is being compiled.

    Attributes:
        startup: What that cost.
        all_logits: Whether `score` can be called.

    Raises:
        ValueError: The sizes contradict each other.
        BackendUnavailableError: compile on a CPU whose C++ compiler is missing or fails, or whose
            cache folder can't be written.
    """

    def __init__(
        self,
        model: Llama,
        *,
        batch_size: int = 1,
        max_seq_len: int,
        prefill_lens: tuple[int, ...],
        num_guesses: int = 0,
        mixed_lens: tuple[int, ...] = (),
        cache_dtype: torch.dtype | None = None,
        compile: bool = True,
        all_logits: bool = False,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.shape = StaticShape(
            batch_size=batch_size,
            max_seq_len=max_seq_len,
            prefill_lens=prefill_lens,
            num_positions=model.cos.shape[0],
            vocab_size=model.config.vocab_size,
            num_guesses=num_guesses,
            mixed_lens=mixed_lens,
        )
        self._device = model.cos.device
        self._model, self._attention = model, TorchAttention().to(self._device)
        self.all_logits = all_logits
        if compile and self._device.type == "cpu":
            problem = compiler_problem()
            if problem is None and load_operators() is None:
                problem = "the C++ operators can't be compiled; see why with --verbose"
            if problem is not None:
                raise BackendUnavailableError(f"{problem}, or use --backend eager")
        self.cache = KVCache.allocate(
            model.config,
            batch_size,
            max_seq_len,
            dtype=cache_dtype or model.dtype,
            device=self._device,
        )
        self._steps: dict[str, BoundStep] = {}
        if not compile:
            self.startup = self._start(self._eager_step, progress)
        elif (step := self._gpu_step()) is not None:
            with kernel_compiler() as folder:
                before = len(os.listdir(folder))
                started = self._record(self._start(lambda _: step, progress))
                self.startup = replace(started, cache_hit=before == len(os.listdir(folder)))
        else:
            self.startup = self._compile(progress)

    @property
    def num_replays(self) -> int:
        """Steps so far that were replays of a CUDA graph; 0 where nothing is recorded."""
        return sum(step.num_replays for step in self._steps.values())

    def prefill(self, slot: int, ids: Sequence[int], start: int) -> NDArray[np.float32]:
        """One chunk of a prompt through one slot; see Backend."""
        logits = self._run_prefill(slot, ids, start)
        return logits[len(ids) - 1 if self.all_logits else 0].copy()

    def score(self, slot: int, ids: Sequence[int], start: int) -> NDArray[np.float32]:
        """Like prefill, with the logits of every id.

        Args:
            slot: Which slot's cache to fill.
            ids: 1 to P token ids.
            start: Position of the first id.

        Returns:
            [len(ids), V] float32 logits.

        Raises:
            ValueError: The backend was built without all_logits, or the chunk is refused.
        """
        if not self.all_logits:
            raise ValueError("score needs a TorchBackend built with all_logits=True")
        return self._run_prefill(slot, ids, start)[: len(ids)].copy()

    def decode(self, ids: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """One token of every slot; see Backend."""
        return self._steps[_DECODE](self.shape.step_inputs(ids, positions))[:, 0]

    def extend(self, ids: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """A few tokens of every slot; see Backend."""
        return self._steps[_EXTEND](self.shape.extend_inputs(ids, positions))

    def mix(
        self,
        slots: NDArray[np.int64],
        ids: NDArray[np.int64],
        positions: NDArray[np.int64],
        logit_rows: Sequence[int],
    ) -> NDArray[np.float32]:
        """Tokens of any slots; see Backend."""
        inputs = mixed_inputs(self.shape, slots, ids, positions, logit_rows)
        logits = self._steps[f"{_MIXED}{len(inputs.slots)}"](inputs)
        return logits[0, : len(logit_rows)]

    def read_rows(self, slot: int, num_rows: int) -> NDArray[np.float32]:
        """The first rows of a slot's cache; see Backend."""
        return self.cache.read_rows(slot, num_rows).numpy()

    def write_rows(self, slot: int, rows: NDArray[np.float32]) -> None:
        """Rows into a slot's cache; see Backend."""
        check_rows(rows, self.cache.row_shape, self.shape.max_seq_len)
        self.cache.write_rows(slot, torch.from_numpy(rows))

    def _run_prefill(self, slot: int, ids: Sequence[int], start: int) -> NDArray[np.float32]:
        """[N, V] logits of one chunk, valid until the next."""
        inputs = self.shape.chunk_inputs(slot, ids, start, all_logits=self.all_logits)
        return self._steps[f"{_PREFILL}{inputs.input_ids.shape[1]}"](inputs)[0]

    def _compile(self, progress: Callable[[str], None]) -> Startup:
        begin = time.perf_counter()
        with compiler() as folder:
            ready_s = time.perf_counter() - begin
            if self._device.type == "cpu":
                started = self._start(partial(self._saved_step, folder), progress)
                return replace(started, compile_s=ready_s + started.compile_s)
            misses = cache_misses()
            started = self._start(self._compiled_step, progress)
            hit = cache_misses() == misses
        return self._record(replace(started, compile_s=ready_s + started.compile_s, cache_hit=hit))

    def _record(self, started: Startup) -> Startup:
        """Records every step on CUDA, which belongs to warming up."""
        begin = time.perf_counter()
        pool = torch.cuda.graph_pool_handle()  # one for all
        for step in self._steps.values():
            step.record(pool)
        return replace(started, warmup_s=started.warmup_s + time.perf_counter() - begin)

    def _gpu_step(self) -> _Step | None:
        """Every step, of kernels of our own; None where they don't fit."""
        if self._device.type != "cuda" or find_spec("triton") is None:
            return None
        from ..gpu_step import fits_gpu, run_on_gpu

        return partial(run_on_gpu, *self._constants) if fits_gpu(self._model, self.cache) else None

    def _start(self, make: Callable[[str], _Step], progress: Callable[[str], None]) -> Startup:
        """Loads every step, or else runs it twice: the first call compiles, the second is warm."""
        zeros = np.zeros(self.shape.batch_size, np.int64)
        calls: dict[str, Callable[[], object]] = {
            f"{_PREFILL}{p}": partial(self._run_prefill, 0, [0] * p, 0)
            for p in self.shape.prefill_lens
        }
        calls[_DECODE] = partial(self.decode, zeros, zeros)
        if num_guesses := self.shape.num_guesses:
            tokens = np.zeros((self.shape.batch_size, 1 + num_guesses), np.int64)
            calls[_EXTEND] = partial(self.extend, tokens, zeros)
        for n in self.shape.mixed_lens:
            calls[f"{_MIXED}{n}"] = partial(self.mix, *np.zeros((3, n), np.int64), [0])
        compile_s = warmup_s = 0.0
        hit: bool | None = None
        for name, call in calls.items():
            begin = time.perf_counter()
            step = make(name)
            is_saved = isinstance(step, SavedStep)
            progress(f"{'compiling' if is_saved else 'starting'} {name.replace('_', ' of ')}")
            self._steps[name] = self._bind(name, step)
            loaded = is_saved and step.load()
            if not is_so_everywhere(loaded, self._model.rank, self._device) and loaded:
                step.forget()  # compiling calls it, which takes all ranks
                loaded = False
            if is_saved:
                hit = loaded and hit is not False
            if not loaded:
                call()
            middle = time.perf_counter()
            if not loaded:
                call()
            compile_s += middle - begin
            warmup_s += time.perf_counter() - middle
        return Startup(compile_s=compile_s, warmup_s=warmup_s, cache_hit=hit)

    def _bind(self, name: str, step: _Step) -> BoundStep:
        batch, tokens, logits = self.shape.batch_size, 1, 1
        if name == _EXTEND:
            tokens = logits = 1 + self.shape.num_guesses
        elif name.startswith(_PREFILL):
            batch, tokens = 1, int(name.removeprefix(_PREFILL))
            logits = tokens if self.all_logits else 1
        sizes = StepInputs.sizes(batch, tokens, logits)
        if name.startswith(_MIXED):
            sizes = StepInputs.sizes(int(name.removeprefix(_MIXED)), 1, 1)
            sizes["logit_indices"] = (1, batch)

        def run(*inputs: Tensor) -> Tensor:
            with torch.no_grad():
                return step(*inputs)

        return BoundStep(run, sizes, self._device)

    def _saved_step(self, folder: Path, name: str) -> SavedStep:
        key = step_key(
            (self._model, self._attention),
            self.cache.buffers,
            world_size=self._model.rank.world_size,
            rank=self._model.rank,
            config=self._model.config,
            shape=replace(self.shape, mixed_lens=()),  # names tell which step it is
            all_logits=self.all_logits,
            options=_CPU_OPTIONS,
        )
        compiled = partial(_compiled_step, name, _CPU_OPTIONS)
        return SavedStep(compiled, folder / f"{name}-{key}.step", *self._constants)

    def _compiled_step(self, name: str) -> _Step:
        return partial(_compiled_step(name, {}), *self._constants)

    def _eager_step(self, name: str) -> _Step:
        return partial(_eager_step(name), *self._constants)

    @property
    def _constants(self) -> tuple[Llama, TorchAttention, KVCache]:
        return self._model, self._attention, self.cache


def _compiled_step(name: str, options: dict[str, Any]) -> Callable[..., Tensor]:
    """One graph for fixed shapes; its decoder layer is compiled once, however many there are."""
    run_layer: Any = torch.compiler.nested_compile_region(call_layer)
    step = _eager_step(name, run_layer)
    options = {**options, "guard_filter_fn": _guards_inputs}
    return torch.compile(step, fullgraph=True, dynamic=False, options=options)


def _eager_step(name: str, run_layer: Callable[..., Tensor] = call_layer) -> Callable[..., Tensor]:
    def step(
        model: nn.Module,
        attention: nn.Module,
        cache: KVCache,
        input_ids: Tensor,
        positions: Tensor,
        write_indices: Tensor,
        logit_indices: Tensor,
        slots: Tensor,
    ) -> Tensor:
        return model(
            input_ids,
            positions,
            write_indices,
            logit_indices,
            cache,
            attention,
            slots=slots,
            run_layer=run_layer,
        )

    # torch.compile keys its cache on the code object: a copy for every step keeps one backend's
    # shapes from counting as another's recompiles.
    code = step.__code__.replace(co_name=name)
    return FunctionType(code, step.__globals__, name, None, step.__closure__)


def _guards_inputs(guards: Sequence[Any]) -> list[bool]:
    """Of what a saved step would check at each call, keeps the shapes and dtypes of its inputs.

    Weights and cache are the backend's own and stay what they were.
    """
    inputs = set(StepInputs.names())
    return [guard.guard_type == "TENSOR_MATCH" and guard.name in inputs for guard in guards]
