"""compressed-tensors folders, written by its own library wherever that still writes them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from quantized_folders import (
    HEAD,
    LINEARS,
    TINY,
    assert_logits,
    assert_weights,
    plain_weights,
    read_parts,
    write_folder,
)
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig as ReferenceConfig
from transformers import LlamaForCausalLM

from llamac.model.checkpoint import open_checkpoint

compressed_tensors = pytest.importorskip("compressed_tensors")

from compressed_tensors.compressors import ModelCompressor  # noqa: E402
from compressed_tensors.quantization import (  # noqa: E402
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams  # noqa: E402

_ACTIVATIONS = {"num_bits": 8, "strategy": "token", "dynamic": True}


def write(
    folder: Path,
    *schemes: tuple[Iterable[str], dict[str, Any], dict[str, Any] | None],
    ignore: Iterable[str] = (HEAD,),
    **keys: Any,
) -> dict[str, Tensor]:
    """Has the library quantize a model; gives the weights that it decompresses again."""
    model = LlamaForCausalLM(ReferenceConfig(**{**TINY, **keys}))
    model.load_state_dict(plain_weights(**keys), strict=False)
    groups = {
        f"group_{i}": QuantizationScheme(
            targets=list(targets),
            weights=QuantizationArgs(**weights),
            input_activations=None if inputs is None else QuantizationArgs(**inputs),
        )
        for i, (targets, weights, inputs) in enumerate(schemes)
    }
    settings = QuantizationConfig(config_groups=groups, ignore=list(ignore))
    apply_quantization_config(model, settings)
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None and scheme.weights is not None:
            low, high = _bounds(module.weight.data, scheme.weights)
            scale, zero = calculate_qparams(low, high, scheme.weights)
            module.weight_scale.data.copy_(scale)
            if hasattr(module, "weight_zero_point"):
                module.weight_zero_point.data.copy_(zero)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    compressor.decompress_model(model)
    weights = dict(model.named_parameters())
    return {n: w.detach() for n, w in weights.items() if n.endswith(("weight", "bias"))}


def _bounds(weight: Tensor, how: QuantizationArgs) -> tuple[Tensor, Tensor]:
    if how.strategy == "block":
        rows, columns = how.block_structure
        weight = F.pad(weight, (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows))
        weight = weight.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
        return weight.amin((1, 3)), weight.amax((1, 3))
    if how.strategy == "tensor":
        return weight.amin().reshape(1), weight.amax().reshape(1)
    groups = weight.unflatten(1, (-1, how.group_size or weight.shape[1]))
    return groups.amin(-1), groups.amax(-1)


def packed(bits: int, *, group: int | None = 32, symmetric: bool = True) -> dict[str, Any]:
    where = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    return {"num_bits": bits, "symmetric": symmetric, **where}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 64, None])
def test_pack_quantized(tmp_path: Path, bits: int, symmetric: bool, group: int | None):
    how = packed(bits, group=group, symmetric=symmetric)
    expected = write(tmp_path, (["Linear"], how, None))
    checkpoint = assert_weights(tmp_path, expected, rtol=0 if symmetric else 1e-6)
    assert set(checkpoint.packed) == {*LINEARS}
    stored = load_file(tmp_path / "model.safetensors")
    for name in LINEARS:
        parts = read_parts(checkpoint, name)
        raw = stored[f"{name}.weight_packed"].view(torch.uint8)
        assert torch.equal(parts["weight_packed"], raw)
        assert torch.equal(parts["weight_scale"], stored[f"{name}.weight_scale"])
        assert checkpoint.tensors[f"{name}.weight_packed"].file is not None  # mapped, not copied
        assert ("weight_minimum" in parts) is not symmetric
    assert_logits(tmp_path, expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_columns_in_the_order_of_activations(tmp_path: Path, bits: int):
    """Release 0.20 writes no weight_g_idx any more; the weights keep their places."""
    expected = write(tmp_path, (["Linear"], packed(bits), None))
    tensors = load_file(tmp_path / "model.safetensors")
    settings = json.loads((tmp_path / "config.json").read_bytes())["quantization_config"]
    for i, name in enumerate(LINEARS):
        width = expected[f"{name}.weight"].shape[1]
        if i == 1:  # as publishers leave it where nothing was reordered
            tensors[f"{name}.weight_g_idx"] = torch.full((width,), -1, dtype=torch.int32)
            continue
        groups = torch.arange(width) // 32
        groups = groups[torch.randperm(width, generator=torch.Generator().manual_seed(i))]
        tensors[f"{name}.weight_g_idx"] = groups.to(torch.int32)
        raw = tensors[f"{name}.weight_packed"].view(torch.uint8)
        if bits == 4:
            raw = torch.stack((raw & 15, raw >> 4), -1).flatten(1)
        scale = tensors[f"{name}.weight_scale"][:, groups]
        expected[f"{name}.weight"] = (raw.float() - 2 ** (bits - 1)) * scale
    write_folder(tmp_path, tensors, settings)
    checkpoint = assert_weights(tmp_path, expected)
    assert checkpoint.packed[LINEARS[0]].has_order
    assert not checkpoint.packed[LINEARS[1]].has_order
    assert_logits(tmp_path, expected)


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_int_quantized(tmp_path: Path, strategy: str):
    how = {"num_bits": 8, "strategy": strategy}
    expected = write(tmp_path, (["Linear"], how, _ACTIVATIONS))
    checkpoint = assert_weights(tmp_path, expected)
    stored = load_file(tmp_path / "model.safetensors")
    parts = read_parts(checkpoint, LINEARS[0])
    assert torch.equal(parts["weight_packed"].int() - 128, stored[f"{LINEARS[0]}.weight"].int())
    assert_logits(tmp_path, expected)


def test_int_quantized_with_zero_points(tmp_path: Path):
    how = {"num_bits": 8, "strategy": "channel", "symmetric": False}
    expected = write(tmp_path, (["Linear"], how, _ACTIVATIONS))
    assert load_file(tmp_path / "model.safetensors")[f"{LINEARS[0]}.weight_zero_point"].any()
    assert_weights(tmp_path, expected, rtol=1e-6)
    assert_logits(tmp_path, expected)


@pytest.mark.parametrize("strategy", ["channel", "tensor", "block"])
def test_float_quantized(tmp_path: Path, strategy: str):
    how = {"num_bits": 8, "type": "float", "strategy": strategy}
    inputs = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    if strategy == "block":
        how["block_structure"] = [48, 40]  # divides neither 32 nor 64
        inputs = {**inputs, "strategy": "group", "group_size": 40, "dynamic": True}
    expected = write(tmp_path, (["Linear"], how, inputs))
    assert not assert_weights(tmp_path, expected, rtol=1e-6).packed
    assert_logits(tmp_path, expected)


def test_a_cache_of_8_bits_is_not_asked_for(tmp_path: Path):
    expected = write(tmp_path, (["Linear"], packed(8), None))
    tensors = load_file(tmp_path / "model.safetensors")
    for i in range(2):
        for name in ("k_scale", "v_scale", "q_scale"):
            tensors[f"model.layers.{i}.self_attn.{name}"] = torch.tensor([0.5])
    settings = json.loads((tmp_path / "config.json").read_bytes())["quantization_config"]
    settings["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    write_folder(tmp_path, tensors, settings)
    assert_weights(tmp_path, expected)


def test_several_formats_in_one_folder(tmp_path: Path):
    expected = write(
        tmp_path,
        (["re:.*self_attn.*"], packed(4), None),
        (["re:.*mlp.*"], {"num_bits": 8, "strategy": "channel"}, _ACTIVATIONS),
        ([HEAD], packed(8, group=64), None),
        ignore=(),
    )
    settings = json.loads((tmp_path / "config.json").read_bytes())["quantization_config"]
    assert settings["format"] == "mixed-precision"
    checkpoint = assert_weights(tmp_path, expected)
    assert {form.bits for form in checkpoint.packed.values()} == {4, 8}
    assert_logits(tmp_path, expected)


def test_a_tied_head_that_stays_as_it_is_and_biases(tmp_path: Path):
    keys = {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}
    expected = write(tmp_path, (["Linear"], packed(4), None), **keys)
    expected.pop("lm_head.weight", None)
    assert_weights(tmp_path, expected)
    assert_logits(tmp_path, expected, **keys)


def test_a_quantized_head_beside_the_embedding_it_was_tied_to(tmp_path: Path):
    expected = write(tmp_path, (["Linear"], packed(8), None), ignore=())
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "tie_word_embeddings": True}))
    assert not assert_weights(tmp_path, expected).config.tie_word_embeddings
    assert_logits(tmp_path, expected)


def test_the_older_name_of_the_settings(tmp_path: Path):
    expected = write(tmp_path, (["Linear"], packed(4), None))
    path = tmp_path / "config.json"
    config = json.loads(path.read_bytes())
    settings = config.pop("quantization_config")
    config["compression_config"] = {**settings, "sparsity_config": {"format": "dense"}}
    path.write_text(json.dumps(config))
    assert_weights(tmp_path, expected)


@pytest.mark.parametrize("bits", [2, 3, 5, 6])
def test_other_bits_are_refused(tmp_path: Path, bits: int):
    write(tmp_path, (["Linear"], packed(bits), None))
    with pytest.raises(ValueError, match=f"weights of {bits} bits; only 4 and 8 can be read"):
        open_checkpoint(tmp_path)
