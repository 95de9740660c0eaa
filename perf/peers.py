"""Other systems on the same weights: transformers and onnxruntime-genai."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.backend import BackendUnavailableError
from .setup import Runner, Setup, System
from .stand_in_tokenizer import write_stand_in_tokenizer
from .weight_sizes import WeightSizes

__all__ = ["GENAI", "GENAI_QUANTIZED", "TRANSFORMERS", "TRANSFORMERS_STATIC"]


class _TransformersRunner:
    """transformers' LlamaForCausalLM; its own cache, one id at a time after the prompt.

    Args:
        setup: Sizes, dtype and device.
        static: Preallocate the cache and compile the decode step, which is what transformers'
            `generate` does with a static cache.
    """

    def __init__(self, setup: Setup, *, static: bool) -> None:
        begin = time.perf_counter()
        try:
            import torch
            import transformers
        except ModuleNotFoundError as error:
            raise BackendUnavailableError(
                f"{error.name} is not installed; pip install transformers"
            ) from None
        torch.set_num_threads(setup.threads)
        transformers.utils.logging.set_verbosity_error()
        import_s = time.perf_counter() - begin
        begin = time.perf_counter()
        if not (Path(setup.model) / "config.json").exists():
            raise BackendUnavailableError(
                f"{setup.model} is not a Hugging Face folder; transformers needs one"
            )
        self._torch: Any = torch
        self._model: Any = transformers.LlamaForCausalLM.from_pretrained(
            setup.model, dtype=getattr(torch, setup.dtype)
        ).eval()
        self._model.to(setup.device)  # device_map would need accelerate
        load_s = time.perf_counter() - begin
        begin = time.perf_counter()
        if (Path(setup.model) / "tokenizer.json").exists():
            transformers.AutoTokenizer.from_pretrained(setup.model)
        tokenizer_s = time.perf_counter() - begin
        self._transformers: Any = transformers
        self._setup = setup
        self._static = static
        self.precision = setup.dtype
        self.phases = {"import_s": import_s, "load_s": load_s, "tokenizer_s": tokenizer_s}
        self.facts: dict[str, object] = {"transformers": transformers.__version__}
        # Renamed in 5.24, and called by the old name with a warning.
        parameters = signature(transformers.LlamaForCausalLM.forward).parameters
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"
        self._step: Any = self._model
        self._cache: Any = None
        self.reset()
        if static:
            mode = "reduce-overhead" if setup.device == "cuda" else "default"
            self._step = torch.compile(self._model, mode=mode, fullgraph=True, dynamic=False)
            self.phases["compile_s"] = self._compile()

    def reset(self) -> None:
        """See Runner."""
        self._position = 0
        if not self._static:
            self._cache = self._transformers.DynamicCache(config=self._model.config)
        elif self._cache is None:
            self._cache = self._transformers.StaticCache(
                config=self._model.config, max_cache_len=self._setup.max_seq_len
            )
        else:
            self._cache.reset()

    def extend(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """See Runner; the whole prompt at once, eagerly."""
        return self._forward(self._model, ids)

    def decode(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """See Runner."""
        return self._forward(self._step, ids[:, None])

    def seek(self, position: int) -> None:
        """See Runner; appends rows of zeros to the cache, as feeding tokens may take minutes."""
        config, torch = self._model.config, self._torch
        count = position - self._position
        shape = (self._setup.batch_size, config.num_key_value_heads, count, config.head_dim)
        rows = torch.zeros(shape, dtype=self._model.dtype, device=self._setup.device)
        for layer in range(config.num_hidden_layers if count else 0):
            self._cache.update(rows, rows, layer)
        self._position = position

    def _forward(self, call: Any, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        torch = self._torch
        count = ids.shape[1]
        # Inference mode would make the compiled step's guards differ from its warm-up's.
        with torch.no_grad():
            out = call(
                input_ids=torch.from_numpy(np.ascontiguousarray(ids)).to(self._setup.device),
                position_ids=torch.arange(
                    self._position, self._position + count, device=self._setup.device
                )[None].expand(len(ids), -1),
                use_cache=True,
                logits_to_keep=1,
                **{self._cache_name: self._cache},
            )
        self._position += count
        return out.logits[:, -1].float().cpu().numpy()

    def _compile(self) -> float:
        begin = time.perf_counter()
        ids = np.zeros((self._setup.batch_size, 1), dtype=np.int64)
        self.extend(ids)
        for _ in range(3):  # the first compiles, a CUDA graph is recorded by the next ones
            self.decode(ids)
        self.reset()
        return time.perf_counter() - begin


class _GenaiRunner:
    """onnxruntime-genai's generator, fed ids through append_tokens.

    Args:
        setup: `artifact` is a folder that genai's model builder wrote.
        weights: "int8" or "int4", or None for those of the precision.
    """

    def __init__(self, setup: Setup, *, weights: str | None) -> None:
        begin = time.perf_counter()
        try:
            genai: Any = import_module("onnxruntime_genai")
        except ModuleNotFoundError:
            raise BackendUnavailableError(
                "onnxruntime-genai is not installed; pip install onnxruntime-genai"
            ) from None
        import_s = time.perf_counter() - begin
        begin = time.perf_counter()
        assert setup.artifact is not None
        facts = json.loads(Path(setup.artifact, "genai_config.json").read_text(encoding="utf-8"))
        if setup.max_seq_len > facts["model"]["context_length"]:
            raise BackendUnavailableError(
                f"genai's graphs end at {facts['model']['context_length']} tokens, "
                f"max_seq_len is {setup.max_seq_len}"
            )
        if setup.batch_size > 1:
            raise BackendUnavailableError("genai takes ids after the prompt in batches of 1 only")
        options = {"intra_op_num_threads": setup.threads}
        config = genai.Config(setup.artifact)
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._genai = genai
        self._model: Any = genai.Model(config)
        self._setup = setup
        self._position = 0
        self.precision = _genai_precision(setup, weights)
        self.phases = {"import_s": import_s, "load_s": time.perf_counter() - begin}
        self.facts: dict[str, object] = {"onnxruntime-genai": genai.__version__}
        if weights is not None:
            self.facts |= WeightSizes.read(Path(setup.artifact)).facts
        self.reset()

    def reset(self) -> None:
        """See Runner; a generator is as cheap as its cache."""
        params = self._genai.GeneratorParams(self._model)
        params.set_search_options(
            max_length=self._setup.max_seq_len,
            batch_size=self._setup.batch_size,
            do_sample=False,
            past_present_share_buffer=True,
        )
        self._generator: Any = None  # the old cache goes before the new one comes
        self._generator = self._genai.Generator(self._model, params)
        self._position = 0

    def extend(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """See Runner."""
        self._generator.append_tokens(ids.astype(np.int32))
        self._position += ids.shape[1]
        return self._generator.get_logits()[:, -1]

    def decode(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """See Runner."""
        return self.extend(ids[:, None])

    def seek(self, position: int) -> None:
        """See Runner; feeds tokens."""
        while self._position < position:
            count = min(512, position - self._position)
            self.extend(np.zeros((self._setup.batch_size, count), dtype=np.int64))


def _genai_precision(setup: Setup, weights: str | None) -> str:
    """What is computed in: the builder has no 16-bit graphs for CPUs."""
    if setup.device == "cpu":
        return "float32"
    return setup.dtype if weights is None else "float16"


def _build_genai(setup: Setup, out: Path, weights: str | None) -> None:
    """Runs genai's model builder, which needs a tokenizer beside the weights."""
    for module in ("onnxruntime_genai", "onnx_ir", "transformers", "torch"):
        if find_spec(module) is None:
            name = module.replace("_", "-")
            raise BackendUnavailableError(f"{name} is not installed; pip install {name}")
    from ..model.checkpoint import open_checkpoint

    if not Path(setup.model).is_dir() or open_checkpoint(setup.model).packed:
        raise BackendUnavailableError(
            "genai is compared on folders that aren't quantized; its builder quantizes them"
        )
    precisions = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
    with TemporaryDirectory() as work:
        source = Path(work, "model")
        source.mkdir()
        for entry in Path(setup.model).resolve().iterdir():
            (source / entry.name).symlink_to(entry)
        if not list(source.glob("tokenizer*")):
            config = json.loads((source / "config.json").read_text(encoding="utf-8"))
            write_stand_in_tokenizer(source, config["vocab_size"])
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
        builder += ["--input", str(source), "--output", str(out), "--cache_dir", work]
        builder += ["--precision", weights or precisions[_genai_precision(setup, None)]]
        builder += ["--execution_provider", setup.device]
        subprocess.run(builder, check=True, cwd=work)
    if weights is not None:
        graph = import_module("onnx_ir").load(out / "model.onnx").graph
        tensors = {name: value.const_value.nbytes for name, value in graph.initializers.items()}
        kept = {name: size for name, size in tensors.items() if not name.endswith("_cache")}
        WeightSizes.of(kept).write(out)


def _transformers(*, static: bool) -> System:
    def open_it(setup: Setup) -> Runner:
        return _TransformersRunner(setup, static=static)

    return System(open=open_it, compiles=static)


TRANSFORMERS = _transformers(static=False)
TRANSFORMERS_STATIC = _transformers(static=True)


def _genai(weights: str | None) -> System:
    return System(
        open=lambda setup: _GenaiRunner(setup, weights=weights),
        build=lambda setup, out: _build_genai(setup, out, weights),
        artifact=lambda setup: f"genai-{setup.device}-{weights or _genai_precision(setup, None)}",
        weights=weights,
    )


GENAI = _genai(None)
GENAI_QUANTIZED = {f"genai-{weights}": _genai(weights) for weights in ("int8", "int4")}
