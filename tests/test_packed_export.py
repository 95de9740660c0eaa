"""Packed weights in bundles: the same numbers on every target, no byte stored twice."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from quantized_folders import (
    HEAD,
    IDS,
    LINEARS,
    TINY,
    plain_weights,
    reference_logits,
    write_folder,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from llamac.export import export_bundle
from llamac.export.engine_build import build_engines
from llamac.export.verify import bundle_checkpoint, verify_bundle
from llamac.model.checkpoint import open_checkpoint
from llamac.model.checkpoint.quantized import native_settings
from llamac.model.checkpoint.random_weights import write_random_checkpoint
from llamac.model.config import LlamaConfig
from llamac.model.kernels.packed_product import dequantize
from llamac.model.packed import PackedFormat
from llamac.model.quantization import parse_recipe, quantize_checkpoint
from llamac.runtime.bundle.manifest import (
    MANIFEST_NAME,
    WEIGHT_BYTES,
    Manifest,
    content_digest,
)
from llamac.runtime.bundle.memory_needs import memory_needs
from llamac.runtime.bundle.opening import open_bundle
from llamac.runtime.ort.ort_backend import OrtBackend

SIZES = {"batch_size": 2, "prefill_len": 8, "max_seq_len": 32}
EMBEDDING = "model.embed_tokens"
FORMS = {
    "int4": PackedFormat(bits=4, group_size=32, scale_dtype="bfloat16"),
    "int8": PackedFormat(bits=8, group_size=16, scale_dtype="float32"),
    "minima": PackedFormat(bits=4, group_size=32, scale_dtype="float16", minimum_dtype="float32"),
    "int8 minima": PackedFormat(
        bits=8, group_size=64, scale_dtype="float32", minimum_dtype="float16"
    ),
    "order": PackedFormat(bits=4, group_size=16, scale_dtype="float32", has_order=True),
}


def packed_model(
    folder: Path, form: PackedFormat | None, *, channel_bits: int = 8, **keys: object
) -> tuple[Path, dict[str, Tensor]]:
    """Writes a folder of random packed weights; gives what they stand for.

    Some scales are negative, some are 0. None packs with one group for all columns of a row.
    """
    weights = plain_weights(**keys)
    tensors: dict[str, Tensor] = {}
    packed: dict[str, PackedFormat] = {}
    generator = torch.Generator().manual_seed(1)
    tied = bool(keys.get("tie_word_embeddings"))
    for name, weight in list(weights.items()):
        module = name.removesuffix(".weight")
        if module not in (*LINEARS, HEAD) and not (tied and module == EMBEDDING):
            tensors[name] = weight.bfloat16() if weight.dim() == 2 else weight
            weights[name] = tensors[name].float()
            continue
        num_rows, width = weight.shape
        one = form or PackedFormat(bits=channel_bits, group_size=width, scale_dtype="float32")
        packed[module] = one
        parts = {
            part: torch.randint(1, 256, shape, generator=generator).to(torch.uint8)
            if dtype == "uint8"
            else torch.randperm(width, generator=generator).int()
            if dtype == "int32"
            else (torch.rand(shape, generator=generator) - 0.4).to(getattr(torch, dtype))
            / (0.4 * 2**one.bits)
            for part, (shape, dtype) in one.tensors(num_rows, width).items()
        }
        parts["weight_scale"][::7, -1] = 0
        if one.minimum_dtype is not None:
            parts["weight_minimum"] = parts["weight_minimum"] * 2 ** (one.bits - 2)
        tensors |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
        whole = dequantize(
            parts["weight_packed"],
            parts["weight_scale"],
            parts.get("weight_minimum"),
            torch.float32,
            width=width,
        )
        if one.has_order:
            ordered = torch.empty_like(whole)
            ordered[:, parts["weight_order"].long()] = whole
            whole = ordered
        weights[name] = whole
    return write_folder(folder, tensors, native_settings(packed), **keys), weights


def run_all(backend: OrtBackend) -> NDArray[np.float32]:
    """[T, V], a token a step after a chunk of eight."""
    rows = [backend.prefill(1, IDS[:8], 0)]
    for position in range(8, len(IDS)):
        ids, positions = np.array([0, IDS[position]]), np.array([0, position])
        rows.append(backend.decode(ids, positions)[1].copy())
    return np.stack(rows)


def expected_rows(weights: Mapping[str, Tensor], **keys: object) -> NDArray[np.float32]:
    return reference_logits(weights, **keys)[7:]


@pytest.mark.parametrize("name", [*FORMS, "channel"])
def test_bundles_compute_what_the_weights_stand_for(tmp_path: Path, name: str):
    folder, weights = packed_model(tmp_path / "checkpoint", FORMS.get(name))
    options = {"targets": ("cpu", "tensorrt"), "accuracy_level": 0, **SIZES}
    bundle = export_bundle(open_checkpoint(folder), tmp_path / "bundle", **options)
    for target in ("cpu", "tensorrt"):
        found = run_all(OrtBackend(bundle, target=target, threads=1))
        np.testing.assert_allclose(found, expected_rows(weights), rtol=1e-4, atol=1e-4)
    ops = bundle.find_graph("decode", "cpu").ops
    assert (ops["MatMulNBits"], "DequantizeLinear" in ops) == (15, False)
    ops = bundle.find_graph("decode", "tensorrt").ops
    assert (ops["DequantizeLinear"], "MatMulNBits" in ops) == (15, False)


@pytest.mark.parametrize("name", ["int4", "int8", "minima"])
def test_a_tied_table_is_one(tmp_path: Path, name: str):
    keys = {"tie_word_embeddings": True}
    folder, weights = packed_model(tmp_path / "checkpoint", FORMS[name], **keys)
    options = {"targets": ("cpu", "tensorrt"), "accuracy_level": 0, **SIZES}
    bundle = export_bundle(open_checkpoint(folder), tmp_path / "bundle", **options)
    for target in ("cpu", "tensorrt"):
        found = run_all(OrtBackend(bundle, target=target, threads=1))
        np.testing.assert_allclose(found, expected_rows(weights, **keys), rtol=1e-4, atol=1e-4)
    places = [file for file in bundle.weights if f"{EMBEDDING}.weight_packed" in file.tensors]
    assert [file.file for file in places] == ["model.safetensors"]


def test_rounded_activations_have_a_tolerance_of_their_own(tmp_path: Path):
    folder, weights = packed_model(tmp_path / "checkpoint", FORMS["int8"])
    bundle = export_bundle(open_checkpoint(folder), tmp_path / "bundle", **SIZES)
    expected, found = expected_rows(weights), run_all(OrtBackend(bundle, threads=1))
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert 1e-4 < error < 1e-1  # exact kernels would give less
    result = verify_bundle(bundle)
    assert result.passed
    assert {run.dtype for run in result.runs} == {"int8"}


@pytest.mark.parametrize("recipe", ["int4", "int8"])
def test_a_quantized_folder_is_linked_and_little_is_added(tmp_path: Path, recipe: str):
    config = LlamaConfig.from_dict(
        {**TINY, "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1024}
    )
    write_random_checkpoint(None, tmp_path / "plain", config=config, dtype="bfloat16")
    plain, folder = open_checkpoint(tmp_path / "plain"), tmp_path / "packed"
    quantize_checkpoint(plain, folder, parse_recipe(recipe))
    bundle = export_bundle(open_checkpoint(folder), tmp_path / "bundle", **SIZES)
    file = folder / "model.safetensors"
    assert (bundle.folder / "model.safetensors").samefile(file)
    added = sum(
        record.bytes for name, record in bundle.files.items() if name.endswith(".safetensors")
    )
    assert added <= 1.03 * file.stat().st_size
    needs = memory_needs(bundle, "cpu")
    assert needs.weight_bytes == pytest.approx(file.stat().st_size, rel=0.01)
    # Each session takes the packed weights apart for itself: two graphs, all but the embedding.
    packed_bytes = file.stat().st_size - 2 * 4096 * 512
    assert needs.prepacked_bytes == pytest.approx(2 * packed_bytes, rel=0.02)
    result = verify_bundle(bundle, against=str(tmp_path / "plain"))
    assert result.passed
    (run,) = result.runs
    assert run.quality is not None
    assert 0 < run.quality.mean_kl_nats < 1


def test_a_bundle_is_a_checkpoint_of_its_own(tmp_path: Path):
    folder, weights = packed_model(tmp_path / "checkpoint", FORMS["minima"])
    bundle = export_bundle(open_checkpoint(folder), tmp_path / "bundle", **SIZES)
    for checkpoint in (bundle_checkpoint(bundle), open_checkpoint(bundle.folder)):
        assert checkpoint.packed == open_checkpoint(folder).packed
        assert checkpoint.tensors.keys() == open_checkpoint(folder).tensors.keys()
    assert weights.keys() >= {f"{HEAD}.weight"}


def test_groups_without_an_operator_are_refused_by_name(tmp_path: Path):
    """One group a row of 200 columns: the operator's blocks are powers of two from 16 on."""
    folder, _ = packed_model(tmp_path / "checkpoint", None, intermediate_size=200)
    with pytest.raises(ValueError, match="groups of 200 columns have no ONNX operator"):
        export_bundle(open_checkpoint(folder), tmp_path / "bundle", **SIZES)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("level", [-1, 5, 9])
def test_an_unknown_accuracy_level_is_refused(tmp_path: Path, level: int):
    folder, _ = packed_model(tmp_path / "checkpoint", FORMS["int4"])
    with pytest.raises(ValueError, match=f"accuracy_level is {level}; it must be one of 0 to 4"):
        export_bundle(open_checkpoint(folder), tmp_path / "b", accuracy_level=level, **SIZES)


@pytest.mark.parametrize("version", [1, 2])
def test_bundles_of_older_formats_are_read(tmp_path: Path, version: int):
    """One dtype a file, no packed weights; no speculation, no graphs of fewer rows."""
    folder = write_folder(tmp_path / "checkpoint", plain_weights())
    bundle = export_bundle(open_checkpoint(folder), tmp_path / "bundle", **SIZES)
    expected = run_all(OrtBackend(bundle, threads=1))
    path = bundle.folder / MANIFEST_NAME
    data = json.loads(path.read_text())
    assert data.pop("format") == 3
    del data["digest"]
    assert data["shape"].pop("num_guesses") == 0
    for graph in data["graphs"]:
        assert graph.pop("attended_rows") == graph["rows"]
        if version == 1:
            assert graph.pop("accuracy_level") is None
    for file in data["weights"] if version == 1 else ():
        (file["dtype"],) = {stored.pop("dtype") for stored in file["tensors"].values()}
    data = {"format": version, **data}
    path.write_text(json.dumps({**data, "digest": content_digest(data)}))
    found = open_bundle(bundle.folder)
    assert replace(found, digest="") == replace(bundle, digest="")
    np.testing.assert_array_equal(run_all(OrtBackend(found, threads=1)), expected)


needs_tensorrt = pytest.mark.skipif(
    find_spec("tensorrt_rtx_bindings") is None, reason="llamac[tensorrt-check] is not installed"
)


@needs_tensorrt
@pytest.mark.parametrize("name", [*FORMS, "channel"])
def test_tensorrt_takes_every_form(tmp_path: Path, name: str):
    folder, _ = packed_model(
        tmp_path / "checkpoint", FORMS.get(name), tie_word_embeddings=name == "int8"
    )
    options = {"targets": ("tensorrt",), "dtype": "bfloat16", **SIZES}
    bundle = export_bundle(open_checkpoint(folder), tmp_path / "bundle", **options)
    assert [engine.problems for engine in build_engines(bundle)] == [(), ()]


@pytest.mark.parametrize("scale", ["float32", "bfloat16"])
def test_tensorrt_gets_no_scale_of_8_bits_that_is_not_positive(tmp_path: Path, scale: str):
    form = PackedFormat(bits=8, group_size=16, scale_dtype=scale)
    folder, _ = packed_model(tmp_path / "checkpoint", form)
    checkpoint = open_checkpoint(folder)
    options = {"targets": ("cpu", "tensorrt"), "dtype": "float16", **SIZES}
    bundle = export_bundle(checkpoint, tmp_path / "bundle", **options)
    with safe_open(bundle.folder / "model-signed.safetensors", "pt") as file:
        names = [name for name in file.keys() if name.endswith("weight_positive_scale")]
        assert len(names) == 15
        assert all((file.get_tensor(name) > 0).all() for name in names)
    # Each target reads one of the two kinds of scales.
    scales = sum(
        math.prod(checkpoint.tensors[name].shape) * WEIGHT_BYTES[scale]
        for name in checkpoint.tensors
        if name.endswith("weight_scale")
    )
    stored = sum(record.bytes for name, record in bundle.files.items() if "model" in name)
    assert stored > memory_needs(bundle, "tensorrt").weight_bytes + scales


def test_a_value_without_its_opposite_is_refused_for_tensorrt(tmp_path: Path):
    """-128 times a negative scale: no byte holds 128."""
    folder, _ = packed_model(tmp_path / "checkpoint", FORMS["int8"])
    path = folder / "model.safetensors"
    tensors = load_file(path)
    module = LINEARS[0]
    row, group = (tensors[f"{module}.weight_scale"] < 0).nonzero()[0].tolist()
    tensors[f"{module}.weight_packed"][row, group * 16] = 0
    save_file(tensors, path)
    checkpoint = open_checkpoint(folder)
    with pytest.raises(ValueError, match=f"{module}.weight has -128 times a negative scale"):
        export_bundle(checkpoint, tmp_path / "bundle", targets=("tensorrt",), **SIZES)
    assert not (tmp_path / "bundle").exists()
    export_bundle(checkpoint, tmp_path / "bundle", targets=("cpu",), **SIZES)


@needs_tensorrt
@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["int4", "int8"])
def test_engines_keep_the_weights_packed(tmp_path: Path, recipe: str):
    config = LlamaConfig.from_dict(
        {
            **TINY,
            "vocab_size": 1024,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 8,
        }
    )
    write_random_checkpoint(None, tmp_path / "plain", config=config, dtype="bfloat16")
    plain, folder = open_checkpoint(tmp_path / "plain"), tmp_path / "packed"
    quantize_checkpoint(plain, folder, parse_recipe(recipe))
    bundle = export_bundle(
        open_checkpoint(folder), tmp_path / "bundle", targets=("tensorrt",), **SIZES
    )
    packed_bytes = memory_needs(bundle, "tensorrt").weight_bytes
    for engine in build_engines(bundle):
        assert engine.problems == ()
        assert engine.engine_bytes < 1.2 * packed_bytes + (4 << 20)


def test_manifests_of_packed_bundles_say_each_dtype(tmp_path: Path):
    folder, _ = packed_model(tmp_path / "checkpoint", FORMS["order"])
    targets = ("cpu", "cuda", "tensorrt")
    bundle: Manifest = export_bundle(
        open_checkpoint(folder), tmp_path / "bundle", targets=targets, dtype="float16", **SIZES
    )
    found = {
        (name.rpartition(".")[2], stored.dtype)
        for file in bundle.weights
        for name, stored in file.tensors.items()
        if "q_proj" in name or "norm" in name or EMBEDDING in name
    }
    assert found == {
        ("weight_packed", "uint8"),
        ("weight_signed", "int8"),
        ("weight_scale", "float32"),
        ("weight_order", "int32"),
        ("weight", "float32"),  # norms of cpu
        ("weight", "float16"),  # norms of cuda and tensorrt
        ("weight", "bfloat16"),  # the embedding, as it was stored
    }
