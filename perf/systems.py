"""The systems that can be measured, by name."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.backend import BackendUnavailableError
from ..runtime.chunks import next_chunk
from ..runtime.request import Request
from ..runtime.sampling import SamplingParams
from ..runtime.scheduler import Scheduler
from ..runtime.text.tokenizer_files import load_tokenizer
from .llama_cpp_peer import LLAMA_CPP, LLAMA_CPP_QUANTIZED
from .peers import GENAI, GENAI_QUANTIZED, TRANSFORMERS, TRANSFORMERS_STATIC
from .setup import Runner, Setup, System
from .weight_sizes import WeightSizes

if TYPE_CHECKING:
    from ..runtime.backend import Backend
    from ..runtime.bundle.manifest import Manifest
    from ..runtime.text.tokenizer import Tokenizer

__all__ = ["PEERS", "SYSTEMS", "TEMPERATURE", "BackendRunner"]

TEMPERATURE = 0.8  # of BackendRunner.generate
PEERS = (
    *("transformers", "transformers-static"),
    *("genai", *GENAI_QUANTIZED),
    *("llama.cpp", *LLAMA_CPP_QUANTIZED),
)
_INT8_LEVEL = 4  # an accuracy_level of ONNX Runtime's


class BackendRunner:
    """Runs any llamac backend with the generation loop's chunks and positions.

    Args:
        backend: Ready to run.
        precision: See Runner.
        phases: See Runner.
        facts: See Runner; what doesn't change.
        tokenizer: Of the checkpoint, for `generate`; None where it has none.
        count: What else to report, given the number of backend calls so far.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        precision: str,
        phases: dict[str, float],
        facts: dict[str, object],
        tokenizer: Tokenizer | None = None,
        count: Callable[[int], dict[str, object]] = lambda _: {},
    ) -> None:
        self.backend = backend
        self.precision = precision
        self.phases = phases
        self._facts = facts
        self._tokenizer = tokenizer
        self._count = count
        self._num_calls = 0
        self._position = 0

    @property
    def facts(self) -> dict[str, object]:
        """See Runner."""
        return self._facts | self._count(self._num_calls)

    def reset(self) -> None:
        """See Runner; rows past the position hold garbage that no result depends on."""
        self._position = 0

    def extend(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """See Runner; one slot after the other."""
        if self._position:
            raise ValueError(
                "a llamac backend is measured with prompts at position 0; seek instead"
            )
        logits = [self._prefill(slot, row) for slot, row in enumerate(ids.tolist())]
        self._position = ids.shape[1]
        return np.stack(logits)

    def decode(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """See Runner."""
        logits = self.backend.decode(ids, np.full(len(ids), self._position, dtype=np.int64))
        self._num_calls += 1
        self._position += 1
        return logits

    def seek(self, position: int) -> None:
        """See Runner; the rows skipped hold whatever they held."""
        self._position = position

    def generate(self, prompts: Sequence[Sequence[int]], *, num_new: int, seed: int) -> Any:
        """Runs a request for each slot as `llamac generate` does, with sampling on.

        Args:
            prompts: Ids, one list for each slot.
            num_new: Tokens of each continuation; no id ends it earlier.
            seed: Of the samples, which differ from slot to slot.

        Returns:
            `total_s`; `ttft_s`, of each request; `step_s`, of the steps that decoded all of them.
        """
        scheduler = Scheduler(self.backend, self._tokenizer, eos_ids=())
        num_ids = self.backend.shape.vocab_size  # of which a padded vocabulary has no text
        if self._tokenizer is not None:
            num_ids = min(num_ids, self._tokenizer.vocab_size)
        begin = time.perf_counter()
        for index, ids in enumerate(prompts):
            request = Request(
                prompt_ids=tuple(token_id % num_ids for token_id in ids),
                max_new_tokens=num_new,
                sampling=SamplingParams(temperature=TEMPERATURE, seed=seed),
                sample_index=index,
            )
            scheduler.submit(request)
        ttft_s: dict[int, float] = {}
        step_s = []
        while not scheduler.idle:
            all_decoding = len(ttft_s) == len(prompts)
            step_begin = time.perf_counter()
            events = scheduler.step()
            end = time.perf_counter()
            self._num_calls += 1
            if all_decoding and len(events) == len(prompts):
                step_s.append(end - step_begin)
            for event in events:
                ttft_s.setdefault(event.request_id, end - begin)
        total_s = time.perf_counter() - begin
        return {"total_s": total_s, "ttft_s": list(ttft_s.values()), "step_s": step_s}

    def _prefill(self, slot: int, ids: list[int]) -> NDArray[np.float32]:
        done = 0
        logits = np.empty(0, dtype=np.float32)
        while done < len(ids):
            start, done = next_chunk(len(ids), done, self.backend.shape)
            logits = self.backend.prefill(slot, ids[start:done], start)
            self._num_calls += 1
        return logits


def _open_torch(setup: Setup, *, compile: bool) -> Runner:
    begin = time.perf_counter()
    import torch

    from ..model.load import load_backend

    ranks = int(setup.options.get("tensor_parallel", "1"))
    torch.set_num_threads(setup.threads)
    import_s = time.perf_counter() - begin
    loaded = load_backend(
        setup.model,
        compile=compile,
        device=setup.device,
        dtype=setup.dtype,
        batch_size=setup.batch_size,
        max_seq_len=setup.max_seq_len,
        prefill_len=setup.prefill_len,
        threads=None if ranks == 1 else max(1, setup.threads // ranks),
        tensor_parallel=ranks,
    )
    backend, startup = loaded.backend, loaded.backend.startup
    tokenizer, tokenizer_phase = _load_tokenizer(loaded.checkpoint.side_folder)
    facts: dict[str, object] = {"cache_hit": startup.cache_hit} if compile else {}
    facts |= {"tensor_parallel": ranks} if ranks > 1 else {}
    phases = {"import_s": import_s, "load_s": loaded.load_s, "warmup_s": startup.warmup_s}
    # Eagerly the first call compiles nothing; it is as much warm-up as the second.
    phases["compile_s" if compile else "first_call_s"] = startup.compile_s
    return BackendRunner(
        backend,
        precision=setup.dtype,
        phases=phases | tokenizer_phase,
        facts=facts | WeightSizes.of_checkpoint(loaded.checkpoint, setup.dtype).facts,
        tokenizer=tokenizer,
        count=_compiled_counts(backend, setup) if compile else lambda _: {},
    )


def _compiled_counts(backend: Any, setup: Setup) -> Callable[[int], dict[str, object]]:
    """What a compiled backend does after its warm-up, which is over."""
    traced = _num_traced()

    def count(num_calls: int) -> dict[str, object]:
        counts: dict[str, object] = {"recompiles": _num_traced() - traced}
        if setup.device == "cuda":
            counts |= {"steps": num_calls, "graph_replays": backend.num_replays}
        return counts

    return count


def _num_traced() -> int:
    """Graphs that Dynamo made in this process, which may do without importing it."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return 0 if dynamo is None else dynamo.counters["stats"]["unique_graphs"]


def _load_tokenizer(folder: Path) -> tuple[Tokenizer | None, dict[str, float]]:
    """Loads a tokenizer as `llamac generate` does, and says how long it took."""
    begin = time.perf_counter()
    try:
        tokenizer = load_tokenizer(folder)
    except FileNotFoundError:  # ids are fed, so a checkpoint without one can be measured
        return None, {}
    return tokenizer, {"tokenizer_s": time.perf_counter() - begin}


def _open_ort(setup: Setup, *, provider: str, target: str) -> Runner:
    begin = time.perf_counter()
    try:
        import onnxruntime
    except ModuleNotFoundError:
        extra = {"cpu": "cpu", "cuda": "gpu", "tensorrt": "tensorrt"}[provider]
        raise BackendUnavailableError(
            f"onnxruntime is not installed; pip install 'llamac[{extra}]'"
        ) from None
    from ..runtime.bundle.opening import open_bundle
    from ..runtime.ort.ort_backend import OrtBackend, check_choice

    import_s = time.perf_counter() - begin
    assert setup.artifact is not None
    tokenizer, tokenizer_phase = _load_tokenizer(Path(setup.artifact))
    begin = time.perf_counter()
    manifest = open_bundle(setup.artifact)
    try:
        check_choice(manifest, provider, target)
    except ValueError as error:  # a bundle that was given, with other graphs
        raise BackendUnavailableError(str(error)) from None
    prepack = setup.options.get("prepack", "off") == "on"
    backend = OrtBackend(
        manifest, provider=provider, target=target, threads=setup.threads, prepack=prepack
    )
    phases = {"import_s": import_s, "load_s": time.perf_counter() - begin}
    precision = "float32" if provider == "cpu" else setup.dtype
    facts: dict[str, object] = {"onnxruntime": onnxruntime.__version__}
    facts |= {"prepack": "on"} if prepack else {}
    facts |= _packed_facts(manifest, target)
    return BackendRunner(
        backend,
        precision=precision,
        phases=phases | tokenizer_phase,
        facts=facts,
        tokenizer=tokenizer,
    )


def _packed_facts(manifest: Manifest, target: str) -> dict[str, object]:
    """Of a bundle with packed weights; others are of the graphs' dtype."""
    levels = {graph.accuracy_level for graph in manifest.graphs if graph.target == target}
    if levels == {None}:
        return {}
    rounding = {"activations": "int8"} if levels == {_INT8_LEVEL} else {}
    return WeightSizes.of_bundle(manifest, target).facts | rounding


def _export(setup: Setup, out: Path, *, provider: str, target: str) -> None:
    try:
        from ..export.bundle import export_bundle
    except ModuleNotFoundError as error:
        raise BackendUnavailableError(
            f"{error.name} is not installed; pip install 'llamac[export]'"
        ) from None
    from ..model.checkpoint import open_checkpoint

    export_bundle(
        open_checkpoint(setup.model),
        out,
        targets=(target,),
        batch_size=setup.batch_size,
        prefill_len=setup.prefill_len,
        max_seq_len=setup.max_seq_len,
        dtype="float32" if provider == "cpu" else setup.dtype,
    )


def _bundle_name(setup: Setup, *, provider: str, target: str) -> str:
    dtype = "float32" if provider == "cpu" else setup.dtype
    sizes = f"b{setup.batch_size}-s{setup.max_seq_len}-p{setup.prefill_len}"
    return f"bundle-{target}-{dtype}-{sizes}"


def _ort(provider: str, target: str) -> System:
    which = {"provider": provider, "target": target}
    return System(
        open=lambda setup: _open_ort(setup, **which),
        build=lambda setup, out: _export(setup, out, **which),
        artifact=lambda setup: _bundle_name(setup, **which),
        compiles=provider == "tensorrt",
        device="cpu" if provider == "cpu" else "cuda",
    )


def _torch(*, compile: bool) -> Callable[[Setup], Runner]:
    return lambda setup: _open_torch(setup, compile=compile)


def _quantized(system: System) -> dict[str, System]:
    """The same on the quantized checkpoint, by what is added to its name."""
    return {
        f"-{weights}": replace(system, weights=weights, on_quantized=True)
        for weights in ("int8", "int4")
    }


_COMPILE, _ORT_CPU = System(open=_torch(compile=True), compiles=True), _ort("cpu", "cpu")

SYSTEMS = {
    "eager": System(open=_torch(compile=False)),
    "compile": _COMPILE,
    **{f"compile{end}": system for end, system in _quantized(_COMPILE).items()},
    "ort-cpu": _ORT_CPU,
    **{f"ort-cpu{end}": system for end, system in _quantized(_ORT_CPU).items()},
    # The graphs that TensorRT gets, of standard operators alone.
    "ort-cpu-standard": _ort("cpu", "tensorrt"),
    "ort-cuda": _ort("cuda", "cuda"),
    "ort-tensorrt": _ort("tensorrt", "tensorrt"),
    "transformers": TRANSFORMERS,
    "transformers-static": TRANSFORMERS_STATIC,
    "genai": GENAI,
    **GENAI_QUANTIZED,
    "llama.cpp": LLAMA_CPP,
    **LLAMA_CPP_QUANTIZED,
}
