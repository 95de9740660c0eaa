"""What llamac quantize writes: read by others, as near as its bits allow, from any format."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_folders import (
    HEAD,
    IDS,
    TINY,
    plain_weights,
    read_parts,
    read_weight,
    reference_logits,
    write_folder,
)
from references import one_forward
from safetensors.torch import load_file
from test_atomic_write import small_disk  # noqa: F401  (a fixture)
from test_foreign_formats import CONFIG, random_weights, write_lit, write_meta
from torch import Tensor

from llamac.model.checkpoint import Checkpoint, load_model, open_checkpoint
from llamac.model.checkpoint.stored import weight_shapes
from llamac.model.config import LlamaConfig
from llamac.model.kernels.packed_product import dequantize
from llamac.model.load import DEMO_FOLDER
from llamac.model.packed import PackedFormat
from llamac.model.quantization import parse_recipe, quantize_checkpoint, quantized_copy
from llamac.model.quantization.rounding import round_weight
from llamac.runtime.cache_folder import cache_sizes

KEYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "one key head": {"num_key_value_heads": 1, "num_hidden_layers": 3},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "odd widths": {"intermediate_size": 168, "head_dim": 16},  # which 16 does not divide
}


def write_source(folder: Path, *, seed: int = 0, **keys: Any) -> Path:
    dtype = getattr(torch, keys.get("dtype", "float32"))
    plain = {key: value for key, value in keys.items() if key != "dtype"}
    weights = {name: w.to(dtype) for name, w in plain_weights(seed, **plain).items()}
    return write_folder(folder, weights, **keys)


def quantize(source: Path, out: Path, recipe: str) -> Checkpoint:
    quantize_checkpoint(open_checkpoint(source), out, parse_recipe(recipe))
    return open_checkpoint(out)


def source_weight(checkpoint: Checkpoint, module: str) -> Tensor:
    if module == HEAD and checkpoint.config.tie_word_embeddings:
        module = "model.embed_tokens"
    return read_weight(checkpoint, f"{module}.weight")


def logits_of_transformers(folder: Path) -> Tensor:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0]


@pytest.mark.parametrize(
    ("kind", "recipe"),
    [*((kind, recipe) for kind in KEYS for recipe in ("int4", "int8"))]
    + [("plain", "int4-g64"), ("plain", "int8-g16")],
)
def test_transformers_reads_what_is_written(tmp_path: Path, kind: str, recipe: str):
    pytest.importorskip("compressed_tensors")
    written = quantize(write_source(tmp_path / "in", **KEYS[kind]), tmp_path / "out", recipe)
    model = load_model(written, num_positions=32, dtype=torch.float32)
    ours = torch.from_numpy(one_forward(model, IDS))
    torch.testing.assert_close(ours, logits_of_transformers(tmp_path / "out"), rtol=1e-4, atol=1e-4)
    assert written.config.dtype == KEYS[kind].get("dtype", "float32")
    weights = {name: read_weight(written, f"{name}.weight") for name in written.packed}
    plain = {name: read_weight(written, name) for name in written.tensors if is_plain(name)}
    keys = {k: v for k, v in KEYS[kind].items() if k not in ("dtype", "tie_word_embeddings")}
    expected = reference_logits({**plain, **{f"{n}.weight": w for n, w in weights.items()}}, **keys)
    torch.testing.assert_close(ours, torch.from_numpy(expected), rtol=1e-4, atol=1e-4)


def is_plain(name: str) -> bool:
    return not name.rpartition(".")[2].startswith("weight_")


def test_transformers_reads_the_demo_model(tmp_path: Path):
    pytest.importorskip("compressed_tensors")
    for recipe in ("int4", "int8"):
        model = load_model(
            quantize(DEMO_FOLDER, tmp_path / recipe, recipe), num_positions=32, dtype=torch.float32
        )
        ours = torch.from_numpy(one_forward(model, IDS))
        theirs = logits_of_transformers(tmp_path / recipe)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (tmp_path / "int4" / "tokenizer.model").is_file()


@pytest.mark.parametrize("recipe", ["int4", "int8", "int8-g16"])
@pytest.mark.parametrize("kind", ["plain", "tied", "bfloat16", "float16"])
def test_no_weight_is_off_by_more_than_half_a_step(tmp_path: Path, kind: str, recipe: str):
    source = open_checkpoint(write_source(tmp_path / "in", **KEYS[kind]))
    written = quantize(tmp_path / "in", tmp_path / "out", recipe)
    assert written.packed
    for module, form in written.packed.items():
        weight, found = source_weight(source, module), read_weight(written, f"{module}.weight")
        scale = read_parts(written, module)["weight_scale"].float()
        steps = scale.repeat_interleave(form.group_size, 1)
        off = (weight - found).abs() / steps.abs()
        # What is clipped, to make the others' steps smaller.
        half = 2 ** (form.bits - 1)
        assert off.max() <= (1.5 if form.bits == 4 else 4)
        clipped = (weight / steps > half - 0.5) | (weight / steps < -half - 0.5)
        off[clipped] = 0
        assert clipped.float().mean() < 1 / form.group_size
        assert (off <= 0.5001).all()


def test_weights_begin_at_lines_of_the_cache(tmp_path: Path):
    quantize(DEMO_FOLDER, tmp_path / "out", "int8")
    raw = (tmp_path / "out" / "model.safetensors").read_bytes()
    header_len = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:header_len])
    begins = {
        name: header_len + entry["data_offsets"][0]
        for name, entry in header.items()
        if name.endswith("weight_packed")
    }
    assert len(begins) > 1
    assert {begin % 64 for begin in begins.values()} == {0}


def test_four_bits_clip_where_that_makes_the_error_smaller():
    torch.manual_seed(0)
    form = PackedFormat(bits=4, group_size=32, scale_dtype="float32")
    normal = torch.randn(400, 64)
    even = torch.arange(-8.0, 8).repeat(400, 4)  # needs no clipping
    for weight, allowed in ((normal, 0.95), (even, 0.0)):
        packed, scale = round_weight(weight, form)
        error = (dequantize(packed, scale, None, torch.float32, width=64) - weight).square().sum()
        groups = weight.unflatten(1, (-1, 32))
        largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
        plain = (groups / (largest / -8)).round().clamp(-8, 7) * (largest / -8)
        assert error <= allowed * (plain - groups).square().sum()


@pytest.mark.parametrize("recipe", ["int4", "int8"])
def test_the_errors_printed_are_those_made(tmp_path: Path, run, recipe: str):
    source = open_checkpoint(write_source(tmp_path / "in"))
    code, out, _ = run("quantize", tmp_path / "in", tmp_path / "out", recipe, "--json")
    assert code == 0
    written = open_checkpoint(tmp_path / "out")
    found: dict[tuple[str, PackedFormat], list[str]] = {}
    for module, form in written.packed.items():
        found.setdefault((module.rpartition(".")[2], form), []).append(module)
    told = {(k["kind"], PackedFormat(**k["form"])): k for k in json.loads(out)}
    assert told.keys() == found.keys()
    for key, modules in found.items():
        error = square = 0.0
        for module in modules:
            weight = source_weight(source, module).double()
            made = read_weight(written, f"{module}.weight").double()
            error += (weight - made).square().sum().item()
            square += weight.square().sum().item()
        assert told[key]["relative_error"] == pytest.approx(math.sqrt(error / square), rel=1e-5)
        assert told[key]["count"] == len(modules)


def test_a_group_of_zeros_and_one_of_a_lone_value(tmp_path: Path):
    weights = plain_weights()
    name = "model.layers.0.mlp.gate_proj"
    weights[f"{name}.weight"][0] = 0
    weights[f"{name}.weight"][1, 1:] = 0
    write_folder(tmp_path / "in", weights)
    for recipe in ("int4", "int8"):
        written = quantize(tmp_path / "in", tmp_path / recipe, recipe)
        found = read_weight(written, f"{name}.weight")
        assert not found[0].any()
        assert not found[1, 1:].any()
        assert found[1, 0].item() == pytest.approx(weights[f"{name}.weight"][1, 0].item(), rel=0.01)
        assert (read_parts(written, name)["weight_scale"] != 0).all()


def packed_bytes(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_bytes(folder: Path, expected: Path) -> None:
    found, wanted = packed_bytes(folder), packed_bytes(expected)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def test_every_format_gives_the_same_bytes(tmp_path: Path):
    config = replace(CONFIG, num_key_value_heads=8)  # lit-llama knows no other
    weights = random_weights(tmp_path / "hf", config)
    quantize(tmp_path / "hf", tmp_path / "expected", "int4")
    names = list(weights)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "config.json").write_text(json.dumps(config.to_dict()))
    shards = {f"pytorch_model-{i}.bin": names[i::2] for i in range(2)}
    for file, part in shards.items():
        torch.save({name: weights[name] for name in part}, tmp_path / "shards" / file)
    index = {name: file for file, part in shards.items() for name in part}
    path = tmp_path / "shards" / "pytorch_model.bin.index.json"
    path.write_text(json.dumps({"weight_map": index}))
    (tmp_path / "lit").mkdir()
    (tmp_path / "lit" / "config.json").write_text(json.dumps(config.to_dict()))
    write_lit(tmp_path / "lit" / "lit-llama.pth", weights, config.head_dim)
    for name in ("shards", "lit"):
        quantize(tmp_path / name, tmp_path / f"{name}-int4", "int4")
        assert_same_bytes(tmp_path / f"{name}-int4", tmp_path / "expected")


@pytest.mark.parametrize("num_shards", [1, 2])
def test_shards_of_columns_give_the_same_bytes(tmp_path: Path, num_shards: int):
    weights = random_weights(tmp_path / "hf", CONFIG)
    write_meta(tmp_path / "meta", weights, num_shards)
    for name in ("hf", "meta"):
        quantize(tmp_path / name, tmp_path / f"{name}-int4", "int4")
    assert_same_bytes(tmp_path / "meta-int4", tmp_path / "hf-int4")


def test_a_packed_checkpoint_is_unpacked_first(tmp_path: Path):
    packed = quantize(write_source(tmp_path / "in"), tmp_path / "int8", "int8")
    names = weight_shapes(packed.config)
    write_folder(tmp_path / "plain", {name: read_weight(packed, name) for name in names})
    for name in ("int8", "plain"):
        quantize(tmp_path / name, tmp_path / f"{name}-int4", "int4")
    assert_same_bytes(tmp_path / "int8-int4", tmp_path / "plain-int4")


def test_the_recipes_bits(tmp_path: Path):
    config = LlamaConfig.from_dict({**TINY, "num_hidden_layers": 16})
    forms = parse_recipe("int4").formats(config, weight_shapes(config))
    eight = {name for name, form in forms.items() if form.bits == 8}
    assert eight == {HEAD, *(f"model.layers.{i}.mlp.down_proj" for i in (0, 15))}
    assert {form.group_size for form in forms.values() if form.bits == 4} == {32}
    assert "model.embed_tokens" not in forms
    assert {
        f.bits for f in parse_recipe("int8").formats(config, weight_shapes(config)).values()
    } == {8}


@pytest.mark.parametrize("recipe", ["", "int2", "int4-g48", "int8-", "INT4", "fp8", "int4\n", "é"])
def test_a_recipe_that_is_none(tmp_path: Path, refused, recipe: str):
    write_source(tmp_path / "in")
    refused("quantize is .*; it must be int4, int8", "quantize", tmp_path / "in", "out", recipe)
    refused("quantize is ", "generate", tmp_path / "in", "a", f"--quantize={recipe}")
    assert not Path("out").exists()


def test_weights_that_are_no_numbers(tmp_path: Path, refused):
    weights = plain_weights()
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    write_folder(tmp_path / "in", weights)
    refused(
        *(r"model.layers.1.mlp.up_proj.weight holds nan: its weights are damaged", "quantize"),
        *(tmp_path / "in", tmp_path / "a" / "out", "int4"),
    )
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_name_that_is_taken(tmp_path: Path, refused):
    source = write_source(tmp_path / "in")
    refused("already there", "quantize", source, source, "int4")
    assert open_checkpoint(source).packed == {}


def test_a_full_disk(tmp_path_factory, small_disk: Path, refused):  # noqa: F811
    source = write_source(tmp_path_factory.mktemp("a") / "in", vocab_size=4096)
    refused(
        r"needs .* are free there|the disk is full",
        *("quantize", source, small_disk / "out", "int4"),
    )
    assert list(small_disk.iterdir()) == []


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "llamac" / "quantized"


def test_a_copy_is_made_once(tmp_path: Path, cache: Path):
    source, recipe = write_source(tmp_path / "in"), parse_recipe("int8")
    told: list[str] = []
    first = quantized_copy(open_checkpoint(source), recipe, progress=told.append)
    assert told
    assert first.packed
    told.clear()
    assert quantized_copy(open_checkpoint(source), recipe, progress=told.append) == first
    assert not told
    other = quantized_copy(open_checkpoint(source), parse_recipe("int4"))
    assert other.folder != first.folder
    assert len(list(cache.iterdir())) == 2
    assert cache_sizes()["quantized"] > 0


def test_an_edited_source_gets_a_new_copy_in_the_old_ones_place(tmp_path: Path, cache: Path):
    source, recipe = write_source(tmp_path / "in"), parse_recipe("int8")
    first = quantized_copy(open_checkpoint(source), recipe)
    write_source(source, seed=1)
    os.utime(source / "model.safetensors", (1, 1))
    second = quantized_copy(open_checkpoint(source), recipe)
    assert [*cache.iterdir()] == [second.folder]
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(read_weight(second, name), plain_weights(0)[name])
    torch.testing.assert_close(read_weight(second, name), plain_weights(1)[name], rtol=0, atol=0.01)
    assert first.folder != second.folder


@pytest.mark.parametrize("damage", ["cut", "gone", "partial"])
def test_a_damaged_copy_is_made_again(tmp_path: Path, cache: Path, damage: str):
    source, recipe = write_source(tmp_path / "in"), parse_recipe("int8")
    folder = quantized_copy(open_checkpoint(source), recipe).folder
    path = folder / "model.safetensors"
    sound = path.read_bytes()
    if damage == "cut":
        path.write_bytes(sound[:-1000])
    elif damage == "gone":
        (folder / "config.json").unlink()
    else:  # a process was killed while it wrote
        folder.rename(folder.with_name(f".{folder.name}.partial"))
        path = folder.with_name(f".{folder.name}.partial") / "model.safetensors"
        path.write_bytes(sound[:-1000])
        path = folder / "model.safetensors"
    assert quantized_copy(open_checkpoint(source), recipe).folder == folder
    assert path.read_bytes() == sound
    assert [*cache.iterdir()] == [folder]


def test_generate_quantizes_on_the_way(tmp_path: Path, run, cache: Path):
    said = []
    for extra in (("--quantize", "int8"), ("--quantize", "int8"), ()):
        code, out, _ = run(
            *("generate", DEMO_FOLDER, "Once upon a time", "--backend", "eager", "--dtype"),
            *("float32", "--temperature", "0", "--max-new-tokens", "4", *extra),
        )
        assert code == 0
        said.append(out)
    assert said[0] == said[1] == said[2]
    assert len(list(cache.iterdir())) == 1
    code, out, _ = run("cache")
    assert code == 0
    assert "quantized" in out
