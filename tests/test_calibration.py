"""Rounding for what a model reads: the text changes less, whatever the weights and inputs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from quantized_folders import plain_weights, read_weight, write_folder
from references import one_forward
from safetensors.torch import load_file
from torch import Tensor

from llamac.model.checkpoint import load_model, open_checkpoint
from llamac.model.kernels.packed_product import dequantize
from llamac.model.load import DEMO_FOLDER
from llamac.model.packed import PackedFormat
from llamac.model.quantization import parse_recipe, quantize_checkpoint
from llamac.model.quantization.rounding import input_moments, round_for_inputs, round_weight
from llamac.runtime.text.tokenizer_files import load_tokenizer

STORY = """Lily and Ben found a small bird under the old tree. It could not fly. "We must help it,"
said Ben. They put it in a box with soft grass and gave it water. The next day the bird sang."""


def unpacked(packed: Tensor, scale: Tensor, width: int) -> Tensor:
    return dequantize(packed, scale, None, torch.float32, width=width)


def random_inputs(num_rows: int, width: int) -> Tensor:
    """Of which some columns are large, and all have much in common."""
    torch.manual_seed(0)
    common = torch.randn(num_rows, width // 8) @ torch.randn(width // 8, width)
    return (common + torch.randn(num_rows, width)) * torch.rand(width).pow(4) * 10


@pytest.mark.parametrize("group", [16, 32, 64, 128])
@pytest.mark.parametrize(("bits", "allowed"), [(4, 0.35), (8, 0.5)])
def test_products_change_less(bits: int, allowed: float, group: int):
    form = PackedFormat(bits=bits, group_size=group, scale_dtype="bfloat16")
    x, weight = random_inputs(600, 1280), torch.randn(96, 1280)  # more than a block of columns
    given = weight.clone()
    packed, scale = round_for_inputs(weight, form, input_moments(x[:300]))
    assert torch.equal(weight, given)
    for (size, dtype), part in zip(form.tensors(96, 1280).values(), (packed, scale), strict=True):
        assert (tuple(part.shape), str(part.dtype)) == (size, f"torch.{dtype}")
    unseen = x[300:]
    error = (unseen @ (unpacked(packed, scale, 1280) - weight).t()).square().sum()
    nearest = unpacked(*round_weight(weight, form), 1280)
    assert error < allowed * (unseen @ (nearest - weight).t()).square().sum()


def test_rows_are_rounded_each_for_itself():
    form = PackedFormat(bits=4, group_size=32, scale_dtype="float32")
    weight, moments = torch.randn(40, 96), input_moments(random_inputs(50, 96))
    packed, scale = round_for_inputs(weight, form, moments)
    for rows in (slice(0, 13), slice(13, 40)):
        own, own_scale = round_for_inputs(weight[rows], form, moments)
        made = unpacked(packed[rows], scale[rows], 96)
        torch.testing.assert_close(unpacked(own, own_scale, 96), made)


@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan")])
def test_inputs_that_tell_nothing(value: float):
    form = PackedFormat(bits=4, group_size=32, scale_dtype="bfloat16")
    weight, x = torch.randn(8, 64), torch.full((5, 64), value)
    found = unpacked(*round_for_inputs(weight, form, input_moments(x)), 64)
    nearest = unpacked(*round_weight(weight, form), 64)
    assert (found - weight).square().sum() < 1.1 * (nearest - weight).square().sum()


def test_a_model_changes_less(tmp_path: Path):
    """On a text that it wasn't rounded for."""
    ids = load_tokenizer(DEMO_FOLDER).encode(STORY)
    source = open_checkpoint(DEMO_FOLDER)
    length = {"num_positions": len(ids), "dtype": torch.float32}
    expected = torch.from_numpy(one_forward(load_model(source, **length), ids)).log_softmax(-1)
    divergence = {}
    for name, options in (("nearest", {"calibration": None}), ("text", {})):
        quantize_checkpoint(source, tmp_path / name, parse_recipe("int4"), **options)
        model = load_model(open_checkpoint(tmp_path / name), **length)
        found = torch.from_numpy(one_forward(model, ids)).log_softmax(-1)
        divergence[name] = (expected.exp() * (expected - found)).sum(-1).mean().item()
    assert divergence["text"] < 0.9 * divergence["nearest"]


def test_without_a_tokenizer_values_are_the_nearest(tmp_path: Path, run):
    write_folder(tmp_path / "in", plain_weights())
    made = []
    for name, option in (("a", ()), ("b", ("--no-calibration",))):
        code, _, said = run("quantize", tmp_path / "in", tmp_path / name, "int4", *option)
        assert code == 0
        assert ("has no tokenizer: rounded without a text" in said) == (name == "a")
        made.append(load_file(tmp_path / name / "model.safetensors"))
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def test_what_is_not_packed_is_copied(tmp_path: Path):
    """Norms and weights of odd widths, of every layer."""
    folder = write_folder(
        tmp_path / "in", plain_weights(vocab_size=2048, intermediate_size=168), vocab_size=2048,
        intermediate_size=168,
    )  # fmt: skip
    shutil.copyfile(DEMO_FOLDER / "tokenizer.model", folder / "tokenizer.model")
    source = open_checkpoint(folder)
    quantize_checkpoint(source, tmp_path / "out", parse_recipe("int4"))
    written = open_checkpoint(tmp_path / "out")
    plain = [name for name in written.tensors if "weight_" not in name]
    assert any("down_proj" in name for name in plain)
    assert any("post_attention_layernorm" in name for name in plain)
    for name in plain:
        assert torch.equal(read_weight(written, name), read_weight(source, name)), name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b" \n", "the calibration text is empty"),
        (b"\xff\xfe\x00", "not UTF-8 text"),
    ],
)
def test_a_text_that_is_none(tmp_path: Path, refused, content: bytes | None, message: str):
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    refused(message, "quantize", DEMO_FOLDER, tmp_path / "out", "int4", "--calibration", path)
    assert not (tmp_path / "out").exists()


def test_weights_that_are_no_numbers(tmp_path: Path, refused):
    folder = tmp_path / "in"
    weights = plain_weights(vocab_size=2048)
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("inf")
    write_folder(folder, weights, vocab_size=2048)
    shutil.copyfile(DEMO_FOLDER / "tokenizer.model", folder / "tokenizer.model")
    message = "model.layers.1.mlp.up_proj.weight holds inf"
    refused(message, "quantize", folder, tmp_path / "out", "int4")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_own_text(tmp_path: Path, run):
    (tmp_path / "text").write_text(STORY, encoding="utf-8")
    code, out, _ = run(
        *("quantize", DEMO_FOLDER, tmp_path / "out", "int8", "--json"),
        *("--calibration", tmp_path / "text"),
    )
    assert code == 0
    assert {kind["form"]["bits"] for kind in json.loads(out)} == {8}
