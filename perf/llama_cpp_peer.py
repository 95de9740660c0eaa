"""llama.cpp through llama-cpp-python's bindings of its C interface, fed ids and read logits."""

from __future__ import annotations

import ctypes
import json
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.backend import BackendUnavailableError
from .setup import Runner, Setup, System
from .stand_in_tokenizer import SPECIALS
from .weight_sizes import WeightSizes

__all__ = ["LLAMA_CPP", "LLAMA_CPP_QUANTIZED", "permute_rope"]

# Without the native flag a wheel built elsewhere would be compared: it lacks this CPU's
# instructions.
_MISSING = (
    "llama-cpp-python is not installed; CMAKE_ARGS='-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF' "
    "pip install --no-binary llama-cpp-python llama-cpp-python==0.3.36"
)
_BATCH = 512  # tokens of a prompt chunk, llama-bench's default

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


class _LlamaCppRunner:
    """llama.cpp's decode call.

    Args:
        setup: `artifact` is a folder holding model.gguf.
        quantized: Whether its weights are; all else is computed in float32 then.
    """

    def __init__(self, setup: Setup, *, quantized: bool) -> None:
        begin = time.perf_counter()
        try:
            llama_cpp: Any = import_module("llama_cpp")
        except ModuleNotFoundError:
            raise BackendUnavailableError(_MISSING) from None
        import_s = time.perf_counter() - begin
        begin = time.perf_counter()
        if setup.device != "cpu" and not llama_cpp.llama_supports_gpu_offload():
            raise BackendUnavailableError(
                "this llama-cpp-python is built without CUDA; add -DGGML_CUDA=ON"
            )
        assert setup.artifact is not None
        self._api = llama_cpp
        self._setup = setup
        self._silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._silence, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0 if setup.device == "cpu" else 999
        path = str(Path(setup.artifact, "model.gguf"))
        self._model: Any = llama_cpp.llama_model_load_from_file(path.encode(), options)
        if not self._model:
            raise BackendUnavailableError(f"llama.cpp refused {path}")
        self._context: Any = self._make_context()
        vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size: int = llama_cpp.llama_vocab_n_tokens(vocab)
        self._batch: Any = llama_cpp.llama_batch_init(_BATCH * setup.batch_size, 0, 1)
        self._position = 0
        self.precision = "float32" if quantized else setup.dtype
        self.phases = {"import_s": import_s, "load_s": time.perf_counter() - begin}
        self.facts: dict[str, object] = {
            "llama-cpp-python": llama_cpp.__version__,
            "features": llama_cpp.llama_print_system_info().decode(),
            "cache_dtype": "float32" if setup.dtype == "float32" else "float16",
        }
        if quantized:
            self.facts |= WeightSizes.read(Path(setup.artifact)).facts

    def reset(self) -> None:
        """See Runner."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        self._position = 0

    def extend(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """See Runner."""
        for begin in range(0, ids.shape[1], _BATCH):
            chunk = ids[:, begin : begin + _BATCH]
            logits = self._run(chunk)
        return logits

    def decode(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """See Runner."""
        return self._run(ids[:, None])

    def seek(self, position: int) -> None:
        """See Runner; feeds tokens."""
        if position > self._position:
            count = position - self._position
            self.extend(np.zeros((self._setup.batch_size, count), dtype=np.int64))

    def _run(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        batch = self._batch
        num_rows, num_tokens = ids.shape
        batch.n_tokens = ids.size
        for i, token in enumerate(ids.flatten().tolist()):
            batch.token[i] = token
            batch.pos[i] = self._position + i % num_tokens
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = i // num_tokens
            batch.logits[i] = i % num_tokens == num_tokens - 1
        code = self._api.llama_decode(self._context, batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")
        self._position += num_tokens
        rows = [
            self._api.llama_get_logits_ith(self._context, row * num_tokens + num_tokens - 1)
            for row in range(num_rows)
        ]  # waits for the computation
        return np.stack([np.ctypeslib.as_array(row, (self._vocab_size,)) for row in rows])

    def _make_context(self) -> Any:
        api, setup = self._api, self._setup
        options = api.llama_context_default_params()
        options.n_ctx = setup.max_seq_len * setup.batch_size
        options.n_batch = _BATCH * setup.batch_size
        options.n_seq_max = setup.batch_size
        options.n_threads = options.n_threads_batch = setup.threads
        if setup.dtype == "float32":  # its cache and its fused attention would round to 16 bits
            options.type_k = options.type_v = api.GGML_TYPE_F32
            options.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        context = api.llama_init_from_model(self._model, options)
        if not context:
            raise BackendUnavailableError(f"llama.cpp has no context of {options.n_ctx} tokens")
        return context


def permute_rope(weight: Any, num_heads: int) -> Any:
    """Reorders q or k rows from rotate-half to llama.cpp's pairs: row i + D/2 follows row i.

    Args:
        weight: [heads * D, E].
        num_heads: Heads in the weight.

    Returns:
        The same shape.
    """
    rows, width = weight.shape
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, width)
    return halves.swapaxes(1, 2).reshape(rows, width)


def _build(setup: Setup, out: Path) -> None:
    """Writes the checkpoint as model.gguf: weights in setup.dtype, norms in float32."""
    if find_spec("llama_cpp") is None:
        raise BackendUnavailableError(_MISSING)
    try:
        gguf: Any = import_module("gguf")
    except ModuleNotFoundError:
        raise BackendUnavailableError("gguf is not installed; pip install 'llamac[perf]'") from None
    import torch

    from ..model.checkpoint import load_model, open_checkpoint

    checkpoint = open_checkpoint(setup.model)
    config = checkpoint.config
    if checkpoint.packed:
        raise BackendUnavailableError(
            "llama.cpp is compared on checkpoints that aren't quantized; it quantizes its own"
        )
    if config.rope_scaling is not None or config.attention_bias or config.mlp_bias:
        raise BackendUnavailableError(
            "llama.cpp is compared on models without RoPE scaling or biases only"
        )
    kinds = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    kind = gguf.GGMLQuantizationType[kinds[setup.dtype]]
    dtype = getattr(torch, setup.dtype)
    out.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(str(out / "model.gguf"), "llama", use_temp_file=True)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(int(gguf.LlamaFileType[f"MOSTLY_{kind.name}" if kind else "ALL_F32"]))
    _add_tokenizer(writer, checkpoint.side_folder / "tokenizer.json")
    model = load_model(checkpoint, num_positions=1, dtype=dtype)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        target = _gguf_name(name)
        part = target.split(".")[-2]
        if part in heads:
            weight = permute_rope(weight, heads[part])
        if weight.dim() == 1:
            writer.add_tensor(target, weight.float().numpy())
        else:
            raw = weight.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(target, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: Any, path: Path) -> None:
    """The stand-in of random weights, which a server needs; any other is left out."""
    spec = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    special = {token["content"]: token["id"] for token in spec.get("added_tokens", ())}
    if tuple(special) != SPECIALS:
        writer.add_tokenizer_model("no_vocab")
        return
    ids = spec["model"]["vocab"] | special
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(ids, key=ids.__getitem__))
    writer.add_token_merges([" ".join(pair) for pair in spec["model"]["merges"]])
    writer.add_bos_token_id(special[SPECIALS[0]])
    writer.add_eos_token_id(special[SPECIALS[1]])


def _quantize(setup: Setup, out: Path, ftype: str) -> None:
    """Has llama.cpp quantize what _build writes, in the checkpoint's own dtype."""
    from ..model.checkpoint import open_checkpoint

    with TemporaryDirectory(dir=out.parent) as work:
        dtype = open_checkpoint(setup.model).config.dtype
        _build(replace(setup, dtype=dtype), Path(work))
        llama_cpp: Any = import_module("llama_cpp")
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{ftype}")
        options.nthread = setup.threads
        out.mkdir(parents=True, exist_ok=True)
        source, target = str(Path(work, "model.gguf")), str(out / "model.gguf")
        code = llama_cpp.llama_model_quantize(
            source.encode(), target.encode(), ctypes.byref(options)
        )
        if code:
            raise RuntimeError(f"llama_model_quantize returned {code}")
    reader: Any = import_module("gguf").GGUFReader(target)
    WeightSizes.of({tensor.name: int(tensor.n_bytes) for tensor in reader.tensors}).write(out)


def _gguf_name(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight."""
    stem = name.removesuffix(".weight")
    if stem.startswith("model.layers."):
        _, _, layer, inner = stem.split(".", 3)
        return f"blk.{layer}.{_NAMES[inner]}.weight"
    return f"{_NAMES[stem]}.weight"


def _open(*, quantized: bool) -> Callable[[Setup], Runner]:
    return lambda setup: _LlamaCppRunner(setup, quantized=quantized)


def _of_type(ftype: str, weights: str) -> System:
    return System(
        open=_open(quantized=True),
        build=lambda setup, out: _quantize(setup, out, ftype),
        artifact=lambda setup: f"gguf-{ftype.lower()}",
        weights=weights,
    )


LLAMA_CPP = System(
    open=_open(quantized=False), build=_build, artifact=lambda setup: f"gguf-{setup.dtype}"
)
LLAMA_CPP_QUANTIZED = {
    "llama.cpp-q8_0": _of_type("Q8_0", "int8"),
    "llama.cpp-q4_0": _of_type("Q4_0", "int4"),
    "llama.cpp-q4_k_m": _of_type("Q4_K_M", "int4"),
}
