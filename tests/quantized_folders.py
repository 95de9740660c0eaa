"""A tiny LLaMA, folders of its quantized weights, and what is asked of every reader of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from references import one_forward
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig as ReferenceConfig
from transformers import LlamaForCausalLM

from llamac.model.checkpoint import Checkpoint, load_model, open_checkpoint
from llamac.model.checkpoint.dequantized import read_dequantized

__all__ = [
    "HEAD",
    "IDS",
    "LINEARS",
    "TINY",
    "assert_logits",
    "assert_weights",
    "plain_weights",
    "read_parts",
    "read_weight",
    "write_folder",
]

TINY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
HEAD = "lm_head"
LINEARS = tuple(
    f"model.layers.{i}.{name}"
    for i in range(2)
    for name in (
        *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
        *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    )
)
IDS = [3, 17, 95, 0, 42, 42, 8, 61, 30, 77]


def plain_weights(seed: int = 0, **keys: Any) -> dict[str, Tensor]:
    """Weights of a tiny model, float32, wide enough for distinct logits."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(ReferenceConfig(**{**TINY, **keys}))
    for parameter in model.parameters():
        parameter.data.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.15)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def write_folder(
    folder: Path, tensors: Mapping[str, Tensor], quantization: object = None, **keys: Any
) -> Path:
    """Writes config.json, unless quantization is None with a quantization_config, and weights."""
    folder.mkdir(exist_ok=True)
    config = {**TINY, **keys}
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    contiguous = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def read_weight(checkpoint: Checkpoint, name: str) -> Tensor:
    """A weight as float32, packed or not."""
    return torch.cat([part.float() for _, part in read_dequantized(checkpoint, name)])


def read_parts(checkpoint: Checkpoint, module: str) -> dict[str, Tensor]:
    """What is stored of a packed weight: PackedFormat's name to the tensor."""
    names = [name for name in checkpoint.tensors if name.startswith(f"{module}.weight")]
    found = {name: torch.empty(0) for name in names}
    for name, place, part in checkpoint.read(names):
        if not found[name].numel():
            stored = checkpoint.tensors[name]
            found[name] = torch.empty(stored.shape, dtype=getattr(torch, stored.dtype))
        found[name][place] = part
    return {name.removeprefix(f"{module}."): tensor for name, tensor in found.items()}


def assert_weights(folder: Path, expected: Mapping[str, Tensor], *, rtol: float = 0) -> Checkpoint:
    """Every weight equals what its own library makes of it."""
    checkpoint = open_checkpoint(folder)
    for name, weight in expected.items():
        torch.testing.assert_close(
            read_weight(checkpoint, name), weight.float(), rtol=rtol, atol=rtol, msg=name
        )
    return checkpoint


def assert_logits(folder: Path, expected: Mapping[str, Tensor], **keys: Any) -> None:
    """The loaded model's logits are those of transformers with the dequantized weights."""
    model = load_model(open_checkpoint(folder), num_positions=32, dtype=torch.float32)
    np.testing.assert_allclose(
        one_forward(model, IDS), reference_logits(expected, **keys), rtol=1e-4, atol=1e-4
    )


def reference_logits(weights: Mapping[str, Tensor], **keys: Any) -> NDArray[np.float32]:
    """[T, V], of transformers' model with such weights."""
    model = LlamaForCausalLM(ReferenceConfig(**{**TINY, **keys})).eval()
    missing, unexpected = model.load_state_dict(
        {name: weight.float() for name, weight in weights.items()}, strict=False
    )
    assert not unexpected
    assert missing in ([], ["lm_head.weight"])  # of a tied one
    with torch.no_grad():
        logits = model(torch.tensor([IDS])).logits[0].numpy()
    assert np.ptp(logits) > 1
    return logits
