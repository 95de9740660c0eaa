"""bitsandbytes, torchao and fp8 folders, by the libraries themselves where they are installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_folders import (
    LINEARS,
    assert_logits,
    assert_weights,
    plain_weights,
    read_parts,
    write_folder,
)
from safetensors.torch import load_file
from torch import Tensor

from llamac.model.checkpoint import open_checkpoint

# What importing the libraries warns of is theirs.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

BITSANDBYTES = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0}


@pytest.mark.parametrize("states_method", [True, False])
def test_bitsandbytes_int8(tmp_path: Path, states_method: bool):
    functional = pytest.importorskip("bitsandbytes.functional")
    tensors = plain_weights()
    expected = dict(tensors)
    for name in LINEARS:
        values, largest, _ = functional.int8_vectorwise_quant(tensors[f"{name}.weight"].half())
        tensors |= {f"{name}.weight": values, f"{name}.SCB": largest}
        tensors[f"{name}.weight_format"] = torch.tensor(0, dtype=torch.uint8)
        expected[f"{name}.weight"] = functional.int8_vectorwise_dequant(values, largest)
    settings = dict(BITSANDBYTES)
    if not states_method:  # as transformers first wrote it
        del settings["quant_method"]
    write_folder(tmp_path, tensors, settings)
    checkpoint = assert_weights(tmp_path, expected, rtol=1e-6)
    parts = read_parts(checkpoint, LINEARS[0])
    assert torch.equal(parts["weight_packed"].int() - 128, tensors[f"{LINEARS[0]}.weight"].int())
    assert_logits(tmp_path, expected)
    tensors[f"{LINEARS[0]}.weight_format"] += 1
    write_folder(tmp_path, tensors, settings)
    with pytest.raises(ValueError, match="q_proj: weight_format isn't 0"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("block", [64, 256])
def test_bitsandbytes_of_4_bits(tmp_path: Path, kind: str, nested: bool, block: int):
    functional = pytest.importorskip("bitsandbytes.functional")
    tensors = plain_weights()
    expected = dict(tensors)
    for name in LINEARS:
        values, state = functional.quantize_4bit(
            tensors[f"{name}.weight"], blocksize=block, compress_statistics=nested, quant_type=kind
        )
        tensors[f"{name}.weight"] = values
        packed = state.as_dict(packed=True)
        tensors |= {f"{name}.weight.{key}": value for key, value in packed.items()}
        size, state.shape = state.shape, torch.Size((1, state.shape.numel()))
        # In one row: its CPU kernel takes blocks that go over several rows for other ones.
        expected[f"{name}.weight"] = functional.dequantize_4bit(values, state).view(size)
    write_folder(tmp_path, tensors, {**BITSANDBYTES, "load_in_8bit": False, "load_in_4bit": True})
    checkpoint = assert_weights(tmp_path, expected, rtol=1e-6)
    assert not checkpoint.packed
    assert_logits(tmp_path, expected)


def write_torchao(folder: Path, kind: Any) -> dict[str, Tensor]:
    """Has transformers and torchao write a folder; gives the weights that torchao dequantizes."""
    from transformers import LlamaForCausalLM, TorchAoConfig

    plain = write_folder(folder.parent / "plain", plain_weights())
    how = TorchAoConfig(kind)
    model = LlamaForCausalLM.from_pretrained(plain, quantization_config=how, dtype=torch.float32)
    model.save_pretrained(folder)
    return {
        name: (
            p.dequantize() if hasattr(p, "dequantize") and type(p) is not torch.nn.Parameter else p
        ).detach()
        for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("kind", ["rows", "groups", "activations", "intx", "zero points"])
def test_torchao_int8(tmp_path: Path, kind: str):
    torchao = pytest.importorskip("torchao.quantization")
    groups = torchao.PerGroup(32)
    intx = {"weight_dtype": torch.int8, "granularity": groups}
    how = {
        "rows": lambda: torchao.Int8WeightOnlyConfig(version=2),
        "groups": lambda: torchao.Int8WeightOnlyConfig(version=2, granularity=groups),
        "activations": lambda: torchao.Int8DynamicActivationInt8WeightConfig(version=2),
        "intx": lambda: torchao.IntxWeightOnlyConfig(**intx),
        "zero points": lambda: torchao.IntxWeightOnlyConfig(
            **intx, mapping_type=torchao.MappingType.ASYMMETRIC
        ),
    }[kind]()
    expected = write_torchao(tmp_path / "quantized", how)
    checkpoint = assert_weights(tmp_path / "quantized", expected, rtol=1e-6)
    assert set(checkpoint.packed) == {*LINEARS}
    stored = load_file(tmp_path / "quantized" / "model.safetensors")
    parts = read_parts(checkpoint, LINEARS[0])
    values = stored[f"{LINEARS[0]}._weight_qdata"]
    assert torch.equal(parts["weight_packed"].int() - 128, values.int())
    assert ("weight_minimum" in parts) is (kind == "zero points")
    assert_logits(tmp_path / "quantized", expected)


def test_what_else_torchao_writes_is_refused_by_name(tmp_path: Path):
    torchao = pytest.importorskip("torchao.quantization")
    write_torchao(tmp_path / "quantized", torchao.Float8WeightOnlyConfig())
    with pytest.raises(ValueError, match="quant_type is 'Float8WeightOnlyConfig'; of torchao"):
        open_checkpoint(tmp_path / "quantized")


SIZES = {"hidden_size": 144, "intermediate_size": 200}  # which no block below divides


@pytest.mark.parametrize("block", [[128, 128], [80, 48], None])
def test_fp8(tmp_path: Path, block: list[int] | None):
    """As transformers' finegrained fp8 has it; its own classes need a GPU."""
    tensors = plain_weights(**SIZES)
    expected = dict(tensors)
    for name in LINEARS:
        weight = tensors[f"{name}.weight"]
        rows, columns = block or weight.shape
        scales = torch.empty(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
        values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
        expected[f"{name}.weight"] = torch.empty(weight.shape)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                place = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
                scales[i, j] = weight[place].abs().max() / 448
                values[place] = (weight[place] / scales[i, j]).to(values.dtype)
                expected[f"{name}.weight"][place] = values[place].float() * scales[i, j]
        tensors[f"{name}.weight"] = values
        tensors[f"{name}.weight_scale_inv"] = scales if block else scales[0, 0]
        tensors[f"{name}.activation_scale"] = torch.tensor(0.5)
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block}
    write_folder(*(tmp_path, tensors, {**settings, "modules_to_not_convert": ["lm_head"]}), **SIZES)
    assert not assert_weights(tmp_path, expected).packed
    assert_logits(tmp_path, expected, **SIZES)
