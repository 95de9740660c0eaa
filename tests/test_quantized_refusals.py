"""Folders of quantized weights that are damaged, or that nobody reads: one line, and its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantized_folders import LINEARS, plain_weights, write_folder
from rounded import Rounded
from safetensors.torch import load_file, save_file
from test_quantized_gptq_awq import AWQ, GPTQ, round_all, write_gptq
from torch import Tensor

from llamac.model.checkpoint import load_model, open_checkpoint
from llamac.model.checkpoint.quantized import native_settings
from llamac.model.packed import PackedFormat

Q = LINEARS[0]  # [64, 64]
PACKED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}}},
}
# What a hand or a fault may put in the place of any setting.
ODD: tuple[Any, ...] = (
    *(True, False, 0, -1, 3, 10**400, -(2**63), 0.5, 4.0, float("nan"), float("inf")),
    *("", "4", "\x1b[31mred\x1b[0m", "A" * 5000),
    *([], [4], {}, {"a": {"b": []}}, [[[]]], [None]),
)


def packed_tensors() -> dict[str, Tensor]:
    """As compressed-tensors packs all but the head, with 4 bits, groups of 32."""
    tensors = plain_weights()
    for name in LINEARS:
        num_rows, width = tensors.pop(f"{name}.weight").shape
        tensors |= {
            f"{name}.weight_packed": torch.randint(0, 1 << 30, (num_rows, width // 8)).int(),
            f"{name}.weight_scale": 0.01 + torch.rand(num_rows, width // 32) / 50,
            f"{name}.weight_shape": torch.tensor([num_rows, width]),
        }
    return tensors


def int8_tensors(scale: str, values: str = "weight") -> dict[str, Tensor]:
    tensors = plain_weights()
    for name in LINEARS:
        num_rows, width = tensors.pop(f"{name}.weight").shape
        tensors[f"{name}.{values}"] = torch.randint(-127, 128, (num_rows, width)).to(torch.int8)
        tensors[f"{name}.{scale}"] = torch.rand(num_rows)
    return tensors


def awq_tensors() -> dict[str, Tensor]:
    tensors, rounded = round_all(bits=4, group=32, sym=False)
    for name, one in rounded.items():
        tensors |= {f"{name}.{key}": value for key, value in one.awq().items()}
    return tensors


def gptq_tensors(bits: int = 4) -> dict[str, Tensor]:
    tensors, rounded = round_all(bits=bits, group=32, sym=True)
    for name, one in rounded.items():
        tensors |= {f"{name}.{key}": value for key, value in one.gptq(version=1).items()}
    return tensors


def fp8_tensors() -> dict[str, Tensor]:
    tensors = plain_weights()
    for name in LINEARS:
        values = tensors[f"{name}.weight"].to(torch.float8_e4m3fn)
        scales = values.shape[0] // 32, values.shape[1] // 32
        tensors |= {f"{name}.weight": values, f"{name}.weight_scale_inv": 1 + torch.rand(scales)}
    return tensors


def torchao_tensors() -> dict[str, Tensor]:
    tensors = int8_tensors("_weight_scale", "_weight_qdata")
    for name in LINEARS:
        tensors[f"{name}._weight_scale"] = tensors[f"{name}._weight_scale"][:, None]
    return tensors


def native_tensors() -> dict[str, Tensor]:
    """As a bundle keeps GPTQ's weights, with zero points and in an order."""
    tensors = plain_weights()
    for i, name in enumerate(LINEARS):
        weight = tensors.pop(f"{name}.weight")
        order = np.random.default_rng(i).permutation(weight.shape[1])
        one = Rounded(weight, bits=4, group=32, sym=False, order=order)
        order = np.argsort(one.group_of, kind="stable")
        values, scale = one.values[:, order], torch.from_numpy(one.scale)
        tensors |= {
            f"{name}.weight_packed": torch.from_numpy(values[:, ::2] | values[:, 1::2] << 4),
            f"{name}.weight_scale": scale,
            f"{name}.weight_minimum": -torch.from_numpy(one.zero).float() * scale.float(),
            f"{name}.weight_order": torch.from_numpy(order).int(),
        }
    return tensors


NATIVE = native_settings(
    {
        name: PackedFormat(
            bits=4,
            group_size=32,
            scale_dtype="float16",
            minimum_dtype="float32",
            has_order=True,
        )
        for name in LINEARS
    }
)

FOLDERS = {
    "llamac": (native_tensors, NATIVE),
    "gptq": (gptq_tensors, GPTQ),
    "awq": (awq_tensors, AWQ),
    "compressed-tensors": (packed_tensors, PACKED),
    "bitsandbytes": (lambda: int8_tensors("SCB"), {"quant_method": "bitsandbytes"}),
    "fp8": (fp8_tensors, {"quant_method": "fp8", "weight_block_size": [32, 32]}),
    "torchao": (torchao_tensors, {"quant_method": "torchao", "quant_type": {"default": {}}}),
}


def one_line(error: BaseException) -> str:
    """The message, if it is one that a terminal can show."""
    text = str(error)
    assert text.isprintable(), text
    assert len(text) < 500, text
    return text


def load(folder: Path) -> None:
    load_model(open_checkpoint(folder), num_positions=32, dtype=torch.float32)


@pytest.mark.parametrize("kind", FOLDERS)
def test_any_value_of_any_setting_is_read_or_refused_in_a_line(tmp_path: Path, kind: str):
    make, settings = FOLDERS[kind]
    folder = write_folder(tmp_path, make(), settings)
    load(folder)
    names = {
        *("group_size", "desc_act", "config_groups", "sparsity_config", "transform_config"),
        *("load_in_8bit", "zero_point", "checkpoint_format", "kv_cache_scheme", "ignore"),
        *("modules_to_not_convert", "weight_block_size", *settings),
    }
    config = json.loads((folder / "config.json").read_bytes())
    tries = [{**settings, name: value} for name in sorted(names) for value in (*ODD, None)]
    for path in (("group_0",), ("group_0", "weights"), ("group_0", "format")):
        tries += [{**settings, "config_groups": nested(path, value)} for value in (*ODD, None)]
    for value in ODD:
        block = {"group_0": {"weights": {"block_structure": value}}}
        tries += [{**settings, "config_groups": block}, value]
    if kind == "llamac":
        forms = settings["modules"]
        tries += [{**settings, "modules": {**forms, Q: value}} for value in ODD]
        for name in forms[Q]:
            odd = [{**forms, Q: {**forms[Q], name: value}} for value in (*ODD, None)]
            tries += [{**settings, "modules": value} for value in odd]
    refused = 0
    for quantization in tries:
        config["quantization_config"] = quantization
        (folder / "config.json").write_text(json.dumps(config))
        refused += (message := refusal(folder)) is not None
        assert message is None or str(folder) in message
    assert refused >= 2 * len(ODD)


def refusal(folder: Path) -> str | None:
    try:
        open_checkpoint(folder)
    except ValueError as error:
        return one_line(error)
    return None


def nested(path: tuple[str, ...], value: object) -> object:
    for name in reversed(path):
        value = {name: value}
    return value


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_tensor_that_is_away_or_misshaped_or_of_another_dtype(tmp_path: Path, kind: str):
    """Each tensor of one module in turn; away, some are others' business."""
    make, settings = FOLDERS[kind]
    sound = make()
    may_be_away = {"g_idx", "weight_shape", "_weight_zero_point"}
    for name in [name for name in sound if name.startswith(f"{Q}.")]:
        part = name.removeprefix(f"{Q}.")
        tensor = sound[name]
        wrong: list[Tensor | None] = [None] if part not in may_be_away else []
        if part != "weight_shape":
            wrong += [tensor[:-1], tensor[None], tensor[..., :0]]
            wrong += [tensor.to(torch.int16), tensor.to(torch.bool), tensor.to(torch.float64)]
        for value in wrong:
            tensors = {key: tensor for key, tensor in sound.items() if key != name}
            if value is not None:
                tensors[name] = value
            write_folder(tmp_path, tensors, settings)
            with pytest.raises(ValueError, match=str(tmp_path)) as caught:
                open_checkpoint(tmp_path)
            assert "q_proj" in one_line(caught.value)


@pytest.mark.parametrize("kind", FOLDERS)
def test_scales_that_are_no_numbers(tmp_path: Path, kind: str):
    make, settings = FOLDERS[kind]
    tensors = make()
    name = next(
        n for n in tensors if n.startswith(Q) and n.endswith(("scale", "scales", "SCB", "inv"))
    )
    tensors[name].view(-1)[-1] = float("nan")
    write_folder(tmp_path, tensors, settings)
    with pytest.raises(ValueError, match="q_proj.* holds .*: its weights are damaged"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "hqq"}, "quant_method is 'hqq'; only awq, bitsandbytes"),
        ({"quant_method": None}, "quant_method is None"),
        ({**GPTQ, "bits": 2}, "bits is 2; only 4, 8 can be read"),
        ({**GPTQ, "bits": 3}, "bits is 3; only 4, 8 can be read"),
        ({**GPTQ, "bits": "4"}, "bits is '4'"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'; only gptq"),
        ({**GPTQ, "group_size": 48}, "q_proj: groups of 48 columns don't divide 64"),
        ({**GPTQ, "group_size": 8}, r"qzeros is \[2, 8\] int32; the config makes it \[8, 8\]"),
        ({**AWQ, "version": "gemv"}, "version is 'gemv'; only gemm"),
        ({**AWQ, "version": "marlin"}, "version is 'marlin'"),
        ({**AWQ, "zero_point": False}, "zero_point is False"),
        ({**AWQ, "bits": 3}, "bits is 3; only 4"),
        ({**PACKED, "format": "marlin-24"}, "format is 'marlin-24'; only pack-quantized"),
        ({**PACKED, "format": "nvfp4-pack-quantized"}, "format is 'nvfp4-pack-quantized'"),
        ({**PACKED, "format": None}, "format is None"),
        ({**PACKED, "transform_config": {"config_groups": {}}}, "transform_config changes the"),
        ({**PACKED, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config changes"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, settings: dict, message: str):
    make = FOLDERS.get(settings["quant_method"], FOLDERS["gptq"])[0]
    write_folder(tmp_path, make(), settings)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path)


def test_an_order_that_leaves_a_column_out(tmp_path: Path):
    tensors = native_tensors()
    tensors[f"{Q}.weight_order"][5] = 999
    write_folder(tmp_path, tensors, NATIVE)
    with pytest.raises(ValueError, match="q_proj: its order doesn't name every column once"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("value", [2, -1, 2**31 - 1])
def test_a_column_of_no_group(tmp_path: Path, value: int):
    tensors = gptq_tensors()
    tensors[f"{Q}.g_idx"][5] = value
    write_folder(tmp_path, tensors, GPTQ)
    with pytest.raises(ValueError, match="q_proj: its groups don't have 32 columns each"):
        open_checkpoint(tmp_path)


def test_a_zero_point_that_contradicts_the_settings(tmp_path: Path):
    weights, rounded = round_all(bits=4, group=32, sym=False)
    write_gptq(tmp_path, weights, rounded, sym=True)
    with pytest.raises(ValueError, match="qzeros has a zero point other than 8, although sym"):
        load(tmp_path)


def test_groups_that_no_kernel_has(tmp_path: Path):
    weights = plain_weights()
    rounded = {
        name: Rounded(weights.pop(f"{name}.weight"), bits=4, group=8, sym=True) for name in LINEARS
    }
    write_gptq(tmp_path, weights, rounded, group_size=8)
    with pytest.raises(ValueError, match="groups of 8; only 16, 32, 64, 64 can be read"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (b"", "is not bytes of JSON"),
        (b"\xff{", "is not bytes of JSON"),
        (b"[" * 60000, "is not bytes of JSON"),
        (b"[]", "describes another weight"),
        (b'{"shape": [64, 65], "blocksize": 64}', "describes another weight"),
        (b'{"shape": [64, 64], "blocksize": 0}', "blocksize is 0; it must be an integer"),
        (b'{"shape": [64, 64], "blocksize": true}', "blocksize is True"),
        (b'{"shape": [64, 64]}', "blocksize is None"),
        (b'{"shape": [64, 64], "blocksize": 128}', r"absmax is \[64\] float32; the config makes"),
    ],
)
def test_what_bitsandbytes_says_of_a_weight(tmp_path: Path, state: bytes, message: str):
    tensors = plain_weights()
    tensors[f"{Q}.weight"] = torch.zeros(2048, 1, dtype=torch.uint8)
    tensors[f"{Q}.weight.absmax"] = torch.ones(64)
    tensors[f"{Q}.weight.quant_map"] = torch.ones(16)
    raw = torch.frombuffer(bytearray(state or b" "), dtype=torch.uint8)
    tensors[f"{Q}.weight.quant_state.bitsandbytes__nf4"] = raw if state else raw[:0]
    write_folder(tmp_path, tensors, {"quant_method": "bitsandbytes"})
    with pytest.raises(ValueError, match=message) as caught:
        open_checkpoint(tmp_path)
    one_line(caught.value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_pickle_of_tensors_of_other_classes(tmp_path: Path):
    write_folder(tmp_path, packed_tensors(), PACKED)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    open_checkpoint(tmp_path)  # plain ones are read from there, too
    torchao = pytest.importorskip("torchao.quantization")
    module = torch.nn.Linear(64, 64)
    torchao.quantize_(module, torchao.Int8WeightOnlyConfig(version=2))
    tensors[f"{Q}.weight"] = module.weight
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match="pytorch_model.bin: (damaged, or holds|tensor .* not plain)"
    ):
        open_checkpoint(tmp_path)


def test_a_file_that_is_cut_short(tmp_path: Path):
    write_folder(tmp_path, packed_tensors(), PACKED)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated"):
        open_checkpoint(tmp_path)


def test_a_lone_number_in_the_place_of_a_weight(tmp_path: Path):
    """It was a traceback."""
    tensors = {**plain_weights(), "model.norm.weight": torch.tensor(1.0)}
    write_folder(tmp_path, tensors)
    with pytest.raises(ValueError, match=r"model.norm.weight"):
        open_checkpoint(tmp_path)
    save_file({**tensors, "extra": torch.tensor(1.0)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="extra is not part of this model"):
        open_checkpoint(tmp_path)
