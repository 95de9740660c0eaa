"""GPTQ and AWQ folders, packed here word by word after the libraries' own layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantized_folders import (
    HEAD,
    LINEARS,
    assert_logits,
    assert_weights,
    plain_weights,
    read_parts,
    write_folder,
)
from rounded import AWQ_ORDER, Rounded, words
from torch import Tensor

from llamac.model.checkpoint import open_checkpoint

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
AWQ = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 32,
    "zero_point": True,
    "version": "gemm",
    "modules_to_not_convert": None,
}


def round_all(names: tuple[str, ...] = LINEARS, **how: Any) -> tuple[dict, dict[str, Rounded]]:
    """The unquantized weights of the rest, and the rounded ones."""
    weights = plain_weights()
    return weights, {name: Rounded(weights.pop(f"{name}.weight"), **how) for name in names}


def dequantized(weights: dict[str, Tensor], rounded: dict[str, Rounded]) -> dict[str, Tensor]:
    return {**weights, **{f"{name}.weight": one.weight for name, one in rounded.items()}}


def write_gptq(
    folder: Path, weights: dict[str, Tensor], rounded: dict[str, Rounded], **settings: Any
) -> Path:
    version = 2 if settings.get("checkpoint_format") == "gptq_v2" else 1
    tensors = dict(weights)
    for name, one in rounded.items():
        tensors |= {f"{name}.{key}": value for key, value in one.gptq(version=version).items()}
    return write_folder(folder, tensors, {**GPTQ, **settings})


def test_words_hold_the_first_value_in_their_lowest_bits():
    assert words(np.arange(1, 9)[None], 4).tolist() == [[0x87654321 - 2**32]]
    assert words(np.arange(1, 9)[None], 4, AWQ_ORDER).tolist() == [[0x86427531 - 2**32]]
    assert words(np.array([[1, 2, 3, 255]]), 8).tolist() == [[0xFF030201 - 2**32]]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, -1])
def test_gptq(tmp_path: Path, bits: int, sym: bool, version: int, group: int):
    if group == -1:
        weights, rounded = plain_weights(), {}
        for name in LINEARS:
            weight = weights.pop(f"{name}.weight")
            rounded[name] = Rounded(weight, bits=bits, group=weight.shape[1], sym=sym)
    else:
        weights, rounded = round_all(bits=bits, group=group, sym=sym)
    form = "gptq_v2" if version == 2 else "gptq"
    folder = write_gptq(
        *(tmp_path, weights, rounded), bits=bits, sym=sym, group_size=group, checkpoint_format=form
    )
    expected = dequantized(weights, rounded)
    checkpoint = assert_weights(folder, expected, rtol=0 if sym else 1e-6)
    name = LINEARS[-1]
    parts, one = read_parts(checkpoint, name), rounded[name]
    packed = one.values if bits == 8 else one.values[:, ::2] | one.values[:, 1::2] << 4
    assert parts["weight_packed"].tolist() == packed.tolist()
    assert parts["weight_scale"].tolist() == one.scale.tolist()
    assert ("weight_minimum" in parts) is not sym
    if not sym:
        minimum = -one.zero.astype(np.float32) * one.scale.astype(np.float32)
        assert parts["weight_minimum"].tolist() == minimum.tolist()
    assert_logits(folder, expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_gptq_with_columns_in_the_order_of_activations(tmp_path: Path, bits: int, sym: bool):
    weights, rounded = plain_weights(), {}
    for i, name in enumerate(LINEARS):
        weight = weights.pop(f"{name}.weight")
        order = np.random.default_rng(i).permutation(weight.shape[1])
        rounded[name] = Rounded(weight, bits=bits, group=32, sym=sym, order=order)
    folder = write_gptq(tmp_path, weights, rounded, bits=bits, sym=sym, desc_act=True)
    expected = dequantized(weights, rounded)
    checkpoint = assert_weights(folder, expected, rtol=0 if sym else 1e-6)
    assert all(checkpoint.packed[name].has_order for name in LINEARS)
    assert_logits(folder, expected)


def test_gptq_zero_points_of_zero_borrow_from_their_neighbours(tmp_path: Path):
    weights, rounded = plain_weights(), {}
    for name in LINEARS:
        weight = weights.pop(f"{name}.weight")
        weight[::3] = weight[::3].abs()
        rounded[name] = Rounded(weight, bits=4, group=32, sym=False)
        assert (rounded[name].zero == 0).any()
    folder = write_gptq(tmp_path, weights, rounded, sym=False)
    assert_weights(folder, dequantized(weights, rounded), rtol=1e-6)


def test_gptq_of_the_head_and_with_the_biases_of_zeros_that_autogptq_adds(tmp_path: Path):
    weights, rounded = round_all((*LINEARS, HEAD), bits=4, group=32, sym=True)
    biases = {f"{name}.bias": torch.zeros(len(one.values)) for name, one in rounded.items()}
    folder = write_gptq(tmp_path, {**weights, **biases}, rounded, lm_head=True)
    expected = dequantized(weights, rounded)
    assert_weights(folder, expected)
    assert_logits(folder, expected)
    biases[f"{LINEARS[0]}.bias"][1] = 0.5
    write_gptq(tmp_path, {**weights, **biases}, rounded)
    with pytest.raises(ValueError, match="self_attn.q_proj.bias is not part of this model"):
        open_checkpoint(tmp_path)


def test_a_folder_of_autogptqs_own(tmp_path: Path):
    weights, rounded = round_all(bits=4, group=32, sym=True)
    folder = write_gptq(tmp_path, weights, rounded)
    config = json.loads((folder / "config.json").read_bytes())
    settings = config.pop("quantization_config")
    del settings["quant_method"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quantized weights where config.json says how"):
        open_checkpoint(folder)
    (folder / "quantize_config.json").write_text(json.dumps(settings))
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit-32g.safetensors")
    assert_weights(folder, dequantized(weights, rounded))


@pytest.mark.parametrize("tie", [True, False])
def test_awq(tmp_path: Path, tie: bool):
    weights, rounded = round_all(bits=4, group=32, sym=False)
    tensors = dict(weights)
    if tie:
        del tensors["lm_head.weight"]
    expected = dequantized(tensors, rounded)
    for name, one in rounded.items():
        tensors |= {f"{name}.{key}": value for key, value in one.awq().items()}
    write_folder(tmp_path, tensors, AWQ, tie_word_embeddings=tie)
    checkpoint = assert_weights(tmp_path, expected, rtol=1e-6)
    parts, one = read_parts(checkpoint, LINEARS[0]), rounded[LINEARS[0]]
    assert (
        parts["weight_packed"].tolist() == (one.values[:, ::2] | one.values[:, 1::2] << 4).tolist()
    )
    assert parts["weight_scale"].tolist() == one.scale.tolist()
    assert_logits(tmp_path, expected, tie_word_embeddings=tie)


def test_a_folder_of_autoawqs_own(tmp_path: Path):
    weights, rounded = round_all(bits=4, group=32, sym=False)
    tensors = dict(weights)
    for name, one in rounded.items():
        tensors |= {f"{name}.{key}": value for key, value in one.awq().items()}
    write_folder(tmp_path, tensors)
    settings = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (tmp_path / "quant_config.json").write_text(json.dumps(settings))
    assert_weights(tmp_path, dequantized(weights, rounded), rtol=1e-6)
