"""The systems that can be measured, by name."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..runtime.generate import next_chunk
from .llama_cpp_peer import LLAMA_CPP
from .peers import GENAI, TRANSFORMERS, TRANSFORMERS_STATIC
from .setup import MissingError, Runner, Setup, System

if TYPE_CHECKING:
    from ..runtime.backend import Backend

__all__ = ["SYSTEMS", "BackendRunner"]


class BackendRunner:
    """Runs any llamac backend with the generation loop's chunks and positions.

    Args:
        backend: Ready to run.
        precision: See Runner.
        phases: See Runner.
        facts: See Runner.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        precision: str,
        phases: dict[str, float],
        facts: dict[str, object],
    ) -> None:
        self.backend = backend
        self.precision = precision
        self.phases = phases
        self.facts = facts
        self._position = 0

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
        self._position += 1
        return logits

    def seek(self, position: int) -> None:
        """See Runner; the rows skipped hold whatever they held."""
        self._position = position

    def _prefill(self, slot: int, ids: list[int]) -> NDArray[np.float32]:
        done = 0
        logits = np.empty(0, dtype=np.float32)
        while done < len(ids):
            start, done = next_chunk(len(ids), done, self.backend.shape)
            logits = self.backend.prefill(slot, ids[start:done], start)
        return logits


def _open_torch(setup: Setup, *, compile: bool) -> Runner:
    begin = time.perf_counter()
    import torch

    from ..model.load import load_backend

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
    )
    startup = loaded.backend.startup
    phases = {"import_s": import_s, "load_s": loaded.load_s, "warmup_s": startup.warmup_s}
    # Eagerly the first call compiles nothing; it is as much warm-up as the second.
    phases["compile_s" if compile else "first_call_s"] = startup.compile_s
    facts: dict[str, object] = {"cache_hit": startup.cache_hit} if compile else {}
    return BackendRunner(loaded.backend, precision=setup.dtype, phases=phases, facts=facts)


def _open_ort(setup: Setup, *, provider: str) -> Runner:
    begin = time.perf_counter()
    try:
        import onnxruntime
    except ModuleNotFoundError:
        extra = {"cpu": "cpu", "cuda": "gpu", "tensorrt": "tensorrt"}[provider]
        raise MissingError(f"onnxruntime is not installed; pip install 'llamac[{extra}]'") from None
    from ..runtime.session import OrtBackend

    import_s = time.perf_counter() - begin
    assert setup.artifact is not None
    begin = time.perf_counter()
    backend = OrtBackend(
        Path(setup.artifact),
        provider=provider,
        target=_target(setup, provider),
        threads=setup.threads,
        prepack=setup.options.get("prepack", "off") == "on",
    )
    phases = {"import_s": import_s, "load_s": time.perf_counter() - begin}
    precision = "float32" if provider == "cpu" else setup.dtype
    facts: dict[str, object] = {"onnxruntime": onnxruntime.__version__, **setup.options}
    return BackendRunner(backend, precision=precision, phases=phases, facts=facts)


def _target(setup: Setup, provider: str) -> str:
    return setup.options.get("target", provider)


def _export(setup: Setup, out: Path, *, provider: str) -> None:
    try:
        from ..export.bundle import export_bundle
    except ModuleNotFoundError as error:
        raise MissingError(f"{error.name} is not installed; pip install 'llamac[export]'") from None
    from ..model.checkpoint import open_checkpoint

    export_bundle(
        open_checkpoint(setup.model),
        out,
        targets=(_target(setup, provider),),
        batch_size=setup.batch_size,
        prefill_len=setup.prefill_len,
        max_seq_len=setup.max_seq_len,
        dtype=setup.dtype,
    )


def _bundle_name(setup: Setup, *, provider: str) -> str:
    target = _target(setup, provider)
    dtype = "float32" if target == "cpu" else setup.dtype
    sizes = f"b{setup.batch_size}-s{setup.max_seq_len}-p{setup.prefill_len}"
    return f"bundle-{target}-{dtype}-{sizes}"


def _ort(provider: str) -> System:
    return System(
        open=lambda setup: _open_ort(setup, provider=provider),
        build=lambda setup, out: _export(setup, out, provider=provider),
        artifact=lambda setup: _bundle_name(setup, provider=provider),
        compiles=provider == "tensorrt",
        device="cpu" if provider == "cpu" else "cuda",
    )


def _torch(*, compile: bool) -> Callable[[Setup], Runner]:
    return lambda setup: _open_torch(setup, compile=compile)


SYSTEMS = {
    "eager": System(open=_torch(compile=False)),
    "compile": System(open=_torch(compile=True), compiles=True),
    "ort-cpu": _ort("cpu"),
    "ort-cuda": _ort("cuda"),
    "ort-tensorrt": _ort("tensorrt"),
    "transformers": TRANSFORMERS,
    "transformers-static": TRANSFORMERS_STATIC,
    "genai": GENAI,
    "llama.cpp": LLAMA_CPP,
}
