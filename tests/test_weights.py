"""The bundle's weight files: linked where the checkpoint's bytes serve, else converted."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_foreign_formats import CONFIG as META_CONFIG
from test_foreign_formats import random_weights, write_meta
from torch import Tensor

from llamac.export.weights import WeightPlan, plan_weights, write_rope_tables, write_weights
from llamac.model.checkpoint import open_checkpoint
from llamac.model.checkpoint.random_weights import write_random_checkpoint
from llamac.model.config import LlamaConfig
from llamac.model.tables import rope_tables
from llamac.runtime.bundle.manifest import WeightFile
from llamac.runtime.bundle.opening import hash_file

CONFIG = LlamaConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)


def write_checkpoint(folder: Path, dtype: str, shards: int = 1) -> dict[str, Tensor]:
    write_random_checkpoint(None, folder, config=CONFIG, dtype=dtype, shards=shards)
    parts = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return {name: tensor.clone() for part in parts for name, tensor in part.items()}


def write_all(checkpoint: Path, out: Path, *dtypes: str) -> list[WeightPlan]:
    out.mkdir()
    source = open_checkpoint(checkpoint)
    plans = plan_weights(source, dtypes)
    for plan in plans:
        write_weights(source, plan, out, lambda _: None)
        assert (out / plan.content.file).stat().st_size == plan.bytes
    return plans


def read_places(folder: Path, files: Iterable[WeightFile]) -> dict[str, Tensor]:
    """Each weight from the place that the manifest names, and nothing else."""
    found: dict[str, Tensor] = {}
    for file in files:
        data = torch.from_numpy(np.fromfile(folder / file.file, np.uint8))
        for name, stored in file.tensors.items():
            dtype = getattr(torch, stored.dtype)
            num_bytes = int(np.prod(stored.shape)) * dtype.itemsize
            raw = data[stored.offset : stored.offset + num_bytes].clone()
            assert name not in found
            found[name] = raw.view(dtype).view(stored.shape)
    return found


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


def dtype_of(file: WeightFile) -> str:
    (dtype,) = {stored.dtype for stored in file.tensors.values()}
    return dtype


def contents(plans: Iterable[WeightPlan]) -> list[WeightFile]:
    return [plan.content for plan in plans]


@pytest.mark.parametrize("shards", [1, 3])
def test_shards_in_the_wanted_dtype_are_linked(tmp_path: Path, shards: int):
    expected = write_checkpoint(tmp_path / "checkpoint", "bfloat16", shards)
    plans = write_all(tmp_path / "checkpoint", tmp_path / "out", "bfloat16")
    assert len(plans) == shards
    assert_equal(read_places(tmp_path / "out", contents(plans)), expected)
    theirs = {path.stat().st_ino for path in (tmp_path / "checkpoint").glob("*.safetensors")}
    assert {path.stat().st_ino for path in (tmp_path / "out").iterdir()} == theirs


def test_a_link_is_made_to_the_file_behind_a_symlink(tmp_path: Path):
    expected = write_checkpoint(tmp_path / "checkpoint", "float32")
    stored = tmp_path / "checkpoint" / "model.safetensors"
    stored.rename(tmp_path / "blob")
    stored.symlink_to(tmp_path / "blob")
    plans = write_all(tmp_path / "checkpoint", tmp_path / "out", "float32")
    assert not (tmp_path / "out" / "model.safetensors").is_symlink()
    assert (tmp_path / "out" / "model.safetensors").samefile(tmp_path / "blob")
    assert_equal(read_places(tmp_path / "out", contents(plans)), expected)


def test_another_filesystem_gets_a_copy(tmp_path: Path):
    shared_memory = Path("/dev/shm")
    if not shared_memory.is_dir() or shared_memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second filesystem at /dev/shm")
    out = shared_memory / f"llamac-test-{os.getpid()}"
    expected = write_checkpoint(tmp_path / "checkpoint", "float32")
    try:
        plans = write_all(tmp_path / "checkpoint", out, "float32")
        assert (out / "model.safetensors").stat().st_nlink == 1
        assert_equal(read_places(out, contents(plans)), expected)
    finally:
        for path in out.iterdir():
            path.unlink()
        out.rmdir()


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_each_dtype_is_written_once_whatever_the_order(tmp_path: Path, dtypes: tuple[str, ...]):
    expected = write_checkpoint(tmp_path / "checkpoint", "bfloat16")
    plans = write_all(tmp_path / "checkpoint", tmp_path / "out", *dtypes)
    by_dtype = {dtype_of(plan.content): plan.content for plan in plans}
    assert {dtype: file.file for dtype, file in by_dtype.items()} == {
        "bfloat16": "model.safetensors",
        "float32": "model-float32.safetensors",
    }
    assert_equal(read_places(tmp_path / "out", [by_dtype["bfloat16"]]), expected)
    wide = {name: tensor.float() for name, tensor in expected.items()}
    assert_equal(read_places(tmp_path / "out", [by_dtype["float32"]]), wide)
    # What is written is a safetensors file that others read, its weights aligned.
    assert_equal(load_file(tmp_path / "out" / "model-float32.safetensors"), wide)
    assert by_dtype["float32"].tensors["model.embed_tokens.weight"].offset % 64 == 0


def test_weights_of_two_dtypes_are_converted_to_one(tmp_path: Path):
    folder = tmp_path / "checkpoint"
    expected = write_checkpoint(folder, "bfloat16")
    mixed = {n: t.float() if "norm" in n else t for n, t in expected.items()}
    save_file(mixed, folder / "model.safetensors")
    plans = write_all(folder, tmp_path / "out", "bfloat16")
    assert [plan.source for plan in plans] == [None]
    assert_equal(read_places(tmp_path / "out", contents(plans)), expected)


def test_unaligned_weights_are_written_anew(tmp_path: Path):
    folder = tmp_path / "checkpoint"
    expected = write_checkpoint(folder, "float32")
    stored = folder / "model.safetensors"
    data = stored.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + length].rstrip() + b" "
    header += b" " * ((8 + len(header)) % 2 == 0)
    stored.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    assert (8 + len(header)) % 4
    plans = write_all(folder, tmp_path / "out", "float32")
    assert [plan.source for plan in plans] == [None]
    assert_equal(read_places(tmp_path / "out", contents(plans)), expected)


def test_metas_layout_is_converted_while_streaming(tmp_path: Path):
    expected = random_weights(tmp_path / "hf", META_CONFIG)
    folder = write_meta(tmp_path / "meta", expected, num_shards=2)
    plans = write_all(folder, tmp_path / "out", "float32", "bfloat16")
    files = {dtype_of(plan.content): plan.content for plan in plans}
    assert_equal(read_places(tmp_path / "out", [files["float32"]]), expected)
    narrow = {name: tensor.bfloat16() for name, tensor in expected.items()}
    assert_equal(read_places(tmp_path / "out", [files["bfloat16"]]), narrow)


def test_a_weight_past_float16_is_refused_by_name(tmp_path: Path):
    folder = tmp_path / "checkpoint"
    weights = write_checkpoint(folder, "bfloat16")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = -70000.0
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r": model.layers.1.mlp.up_proj.weight holds 70144, past"):
        write_all(folder, tmp_path / "out", "float16")


def test_a_disk_too_small_is_refused_before_writing(tmp_path: Path):
    write_checkpoint(tmp_path / "checkpoint", "bfloat16")
    source = open_checkpoint(tmp_path / "checkpoint")
    (plan,) = plan_weights(source, ["float32"])
    with pytest.raises(ValueError, match=r"model.safetensors needs 1073741824\.00 GiB, .* free"):
        write_weights(source, replace(plan, bytes=1 << 60), tmp_path, lambda _: None)
    assert not (tmp_path / "model.safetensors").exists()


def test_no_file_is_written_under_a_name_of_the_checkpoints(tmp_path: Path):
    """Writing rope.safetensors over a linked shard of that name once cut the user's file."""
    folder = tmp_path / "checkpoint"
    write_checkpoint(folder, "bfloat16", shards=2)
    index = folder / "model.safetensors.index.json"
    text = index.read_text()
    for old, new in zip(
        sorted(path.name for path in folder.glob("*.safetensors")),
        ("model-float32.safetensors", "rope.safetensors"),
        strict=True,
    ):
        (folder / old).rename(folder / new)
        text = text.replace(old, new)
    index.write_text(text)
    before = {path.name: hash_file(path) for path in folder.iterdir()}
    plans = write_all(folder, tmp_path / "out", "float32", "bfloat16")
    write_rope_tables(CONFIG, 8, tmp_path / "out" / "rope.safetensors")
    assert len({plan.content.file for plan in plans} | {"rope.safetensors"}) == 4
    assert {path.name: hash_file(path) for path in folder.iterdir()} == before


def test_rope_tables_are_the_models(tmp_path: Path):
    content = write_rope_tables(CONFIG, 50, tmp_path / "rope.safetensors")
    cos, sin = rope_tables(CONFIG, 50)
    expected = {"rope.cos": cos, "rope.sin": sin}
    assert_equal(read_places(tmp_path, [content]), expected)
    assert_equal(load_file(tmp_path / "rope.safetensors"), expected)
