from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from llamac.model.checkpoint import (
    load_model,
    load_weights,
    open_checkpoint,
    weight_bytes,
)
from llamac.model.checkpoint.random_weights import write_random_checkpoint
from llamac.model.checkpoint.stored import Checkpoint, weight_shapes
from llamac.model.config import LlamaConfig
from llamac.model.llama import Llama

TINY = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}


def hf_model(**keys) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**TINY, **keys}))


def assemble(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Every tensor, from the parts; what no part fills stays NaN."""
    full = {
        name: torch.full(stored.shape, float("nan"), dtype=getattr(torch, stored.dtype))
        for name, stored in checkpoint.tensors.items()
    }
    for name, place, part in checkpoint.read():
        full[name][place] = part
    return full


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound HF folder in one file."""
    hf_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def distinct_weights(model: transformers.LlamaForCausalLM) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def save_bin(model: transformers.LlamaForCausalLM, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    model.config.save_pretrained(folder)
    state = model.state_dict()
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    torch.save(state, folder / "pytorch_model.bin")


def save_sharded_bin(model: transformers.LlamaForCausalLM, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    model.config.save_pretrained(folder)
    state = list(model.state_dict().items())
    shards = {"pytorch_model-1.bin": dict(state[:7]), "pytorch_model-2.bin": dict(state[7:])}
    for name, part in shards.items():
        torch.save(part, folder / name)
    weight_map = {key: name for name, part in shards.items() for key in part}
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


WRITERS: dict[str, Callable[[transformers.LlamaForCausalLM, Path], None]] = {
    "one file": lambda model, folder: model.save_pretrained(folder),
    "shards": lambda model, folder: model.save_pretrained(folder, max_shard_size="40KB"),
    "bin": save_bin,
    "bin shards": save_sharded_bin,
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("is_tied", [False, True])
def test_reads_what_transformers_writes(tmp_path: Path, writer: str, is_tied: bool):
    model = hf_model(tie_word_embeddings=is_tied)
    WRITERS[writer](model, tmp_path)
    if writer == "shards":
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
    checkpoint = open_checkpoint(tmp_path)
    assert ("lm_head.weight" in checkpoint.tensors) != is_tied
    assert checkpoint.folder == tmp_path
    assert_same(assemble(checkpoint), distinct_weights(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_weights_are_read_as_stored(tmp_path: Path, dtype: torch.dtype):
    model = hf_model(attention_bias=True, mlp_bias=True, head_dim=32).to(dtype)
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.config.dtype == str(dtype).removeprefix("torch.")
    assert_same(assemble(checkpoint), distinct_weights(model))
    assert weight_bytes(checkpoint, torch.float32) == 4 * sum(p.numel() for p in model.parameters())


def test_offsets_point_at_the_tensors_own_bytes(tmp_path: Path):
    hf_model().save_pretrained(tmp_path, max_shard_size="40KB")
    checkpoint = open_checkpoint(tmp_path)
    weights = assemble(checkpoint)
    for name, stored in checkpoint.tensors.items():
        assert stored.file is not None
        assert stored.offset is not None
        raw = stored.file.read_bytes()[stored.offset :][: weights[name].nbytes]
        assert raw == weights[name].numpy().tobytes()


def test_parts_of_a_bin_file_have_no_offset(tmp_path: Path):
    save_bin(hf_model(), tmp_path)
    stored = open_checkpoint(tmp_path).tensors["model.norm.weight"]
    assert (stored.file, stored.offset, stored.shape) == (None, None, (64,))


def test_read_takes_names_and_refuses_unknown_ones(folder: Path):
    checkpoint = open_checkpoint(folder)
    names = ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"]
    assert sorted(name for name, _, _ in checkpoint.read(names)) == sorted(names)
    with pytest.raises(ValueError, match=r"no tensor model\.extra"):
        next(checkpoint.read(["model.extra"]))


def test_large_tensors_come_in_blocks(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("llamac.model.checkpoint.pieces._BLOCK_BYTES", 1000)
    checkpoint = open_checkpoint(folder)
    rows = [place[0] for name, place, _ in checkpoint.read(["lm_head.weight"])]
    assert rows[:2] == [slice(0, 3), slice(3, 6)]  # 256 bytes a row
    assert_same(assemble(checkpoint), dict(load_file(folder / "model.safetensors")))


def test_weight_shapes_are_the_models(folder: Path):
    for keys in ({}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}):
        config = LlamaConfig.from_dict({"model_type": "llama", **TINY, **keys})
        with torch.device("meta"):
            model = Llama(config, num_positions=4)
        expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
        assert weight_shapes(config) == expected


@pytest.mark.parametrize("is_tied", [False, True])
def test_load_model_is_ready_to_run(tmp_path: Path, is_tied: bool):
    reference = hf_model(tie_word_embeddings=is_tied)
    reference.save_pretrained(tmp_path)
    seen: list[tuple[int, int]] = []
    model = load_model(
        open_checkpoint(tmp_path),
        num_positions=16,
        dtype=torch.bfloat16,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == is_tied
    assert model.cos.shape == (16, 8)
    assert model.cos.dtype == model.sin.dtype == torch.float32
    assert model.cos[0].eq(1).all()
    expected = {name: w.bfloat16() for name, w in distinct_weights(reference).items()}
    assert_same({name: p.detach() for name, p in model.named_parameters()}, expected)
    assert seen[-1][0] == seen[-1][1] == sum(4 * p.numel() for p in reference.parameters())


def test_load_model_takes_the_checkpoints_dtype(tmp_path: Path):
    hf_model().half().save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    del data["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(data))
    checkpoint = open_checkpoint(tmp_path)
    assert load_model(checkpoint, num_positions=4).lm_head.weight.dtype == torch.float16


def test_load_weights_refuses_another_model(folder: Path):
    checkpoint = open_checkpoint(folder)
    for keys, message in (
        ({"vocab_size": 97}, "embed_tokens.weight has shape"),
        ({"num_hidden_layers": 3}, r"tensor model\.layers\.2\..* is not in both"),
    ):
        config = LlamaConfig.from_dict({"model_type": "llama", **TINY, **keys})
        with pytest.raises(ValueError, match=message):
            load_weights(Llama(config, num_positions=4), checkpoint)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_one_file_is_read_before_shards(
    tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture
):
    """A stale index used to win: the old weights, and nobody was told."""
    old, new = hf_model(), hf_model()
    for parameter in new.parameters():
        parameter.data.neg_()
    if suffix == "safetensors":
        old.save_pretrained(tmp_path / "old", max_shard_size="40KB")
        new.save_pretrained(tmp_path)
    else:
        save_sharded_bin(old, tmp_path / "old")
        save_bin(new, tmp_path)
    for path in (tmp_path / "old").iterdir():
        path.rename(tmp_path / path.name)
    assert_same(assemble(open_checkpoint(tmp_path)), distinct_weights(new))
    assert "is read, not the shards that" in caplog.text
    for path in tmp_path.glob("*-*"):
        path.unlink()
    assert_same(assemble(open_checkpoint(tmp_path)), distinct_weights(new))


@pytest.mark.parametrize("name", ["model-00009.safetensors", "overlay.safetensors"])
def test_a_later_shard_supersedes_an_earlier_one(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
):
    """Both holding a tensor used to be refused; transformers reads the last."""
    model = hf_model()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    index = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    key = "model.layers.1.mlp.up_proj.weight"
    save_file({key: torch.ones(160, 64)}, tmp_path / name, metadata={"format": "pt"})
    for holder in (name, weight_map[key]):
        caplog.clear()
        extra = {"model.unused": name}
        index.write_text(
            json.dumps({"metadata": {}, "weight_map": {**weight_map, **extra, key: holder}})
        )
        assert_same(assemble(open_checkpoint(tmp_path)), reference_weights(tmp_path))
        assert assemble(open_checkpoint(tmp_path))[key].eq(1).all()
        assert ("other shards than it names" in caplog.text) == (holder != name)


def reference_weights(folder: Path) -> dict[str, Tensor]:
    """What transformers reads."""
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype="auto")
    return distinct_weights(model)


TIED = {
    "no head": lambda w: w.pop("lm_head.weight"),
    "the same head": lambda w: None,
    "another head": lambda w: w.update({"lm_head.weight": w["lm_head.weight"].flip(0)}),
    "only a head": lambda w: w.pop("model.embed_tokens.weight"),
}


@pytest.mark.parametrize("stored", TIED)
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_tied_model_is_what_its_file_says(
    tmp_path: Path, stored: str, suffix: str, caplog: pytest.LogCaptureFixture
):
    """A stored head used to be dropped whatever it held, and one alone was refused."""
    model = hf_model(tie_word_embeddings=True)
    model.config.save_pretrained(tmp_path)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    TIED[stored](weights)
    if suffix == "bin":
        torch.save(weights, tmp_path / "pytorch_model.bin")
    else:
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(tmp_path)
    is_tied = stored != "another head"
    assert checkpoint.config.tie_word_embeddings == is_tied
    assert ("lm_head.weight is stored with values other" in caplog.text) != is_tied
    expected = {name: weights[name] for name in weights if not (is_tied and "lm_head" in name)}
    if stored == "only a head":
        expected["model.embed_tokens.weight"] = weights["lm_head.weight"]
    assert_same(assemble(checkpoint), expected)
    assert_same(reference_weights(tmp_path), expected)


def test_an_index_may_list_a_tied_head(tmp_path: Path):
    """A head that no shard holds used to be refused."""
    model = hf_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    index = tmp_path / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["lm_head.weight"] = data["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(data))
    assert_same(assemble(open_checkpoint(tmp_path)), distinct_weights(model))


@pytest.mark.parametrize("keys", [{"tie_word_embeddings": True}, {}])
def test_names_of_the_base_model_are_completed(tmp_path: Path, keys: dict):
    """What LlamaModel saves used to be refused."""
    model = hf_model(**keys)
    model.config.save_pretrained(tmp_path)
    weights = {name.removeprefix("model."): w for name, w in distinct_weights(model).items()}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_same(assemble(open_checkpoint(tmp_path)), distinct_weights(model))
    weights["model.norm.weight"] = torch.ones(64)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"tensor (model\.)?norm.weight is stored twice"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("writer", WRITERS)
def test_an_adapters_config_beside_whole_weights_is_a_warning(
    tmp_path: Path, writer: str, caplog: pytest.LogCaptureFixture
):
    """Merging leaves it there; it used to be refused."""
    model = hf_model()
    WRITERS[writer](model, tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert_same(assemble(open_checkpoint(tmp_path)), distinct_weights(model))
    assert "adapter_config.json is ignored; the weights count as merged" in caplog.text


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (
            -70000.0,
            "float16",
            "norm.weight holds 70000, past float16's range; use --dtype bfloat16",
        ),
        (
            float("nan"),
            "float16",
            "norm.weight holds nan: its weights are damaged; copy them again",
        ),
        (float("nan"), "bfloat16", "norm.weight holds nan"),
        (float("-inf"), "bfloat16", "norm.weight holds inf"),
        (3.4e38, "bfloat16", r"norm.weight holds 3.4e\+38, past bfloat16's range"),
    ],
)
def test_weights_that_no_value_of_the_dtype_holds(
    folder: Path, value: float, dtype: str, message: str
):
    """Loading used to make them infinite, or to keep them as they were."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][5] = value
    save_file(weights, path)
    with pytest.raises(ValueError, match=message):
        load_model(open_checkpoint(folder), num_positions=4, dtype=getattr(torch, dtype))


def test_end_ids_of_the_generation_config_are_added(folder: Path):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert open_checkpoint(folder).config.eos_token_ids == (2, 7)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_reading_lets_pages_go(tmp_path: Path, suffix: str):
    """RSS used to grow by the whole file: here 56 MB in tensors of at most 2."""
    keys = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}
    config = LlamaConfig.from_dict({"model_type": "llama", **TINY, **keys})
    out = tmp_path / "model"
    write_random_checkpoint(None, out, config=config)
    if suffix == "bin":
        torch.save(load_file(out / "model.safetensors"), out / "pytorch_model.bin")
        (out / "model.safetensors").unlink()
    checkpoint = open_checkpoint(out)
    assert weight_bytes(checkpoint, torch.bfloat16) > 56e6

    def file_bytes() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssFile"))

    before = file_bytes()
    peak = 0
    for _, _, part in checkpoint.read():
        part.sum()
        peak = max(peak, file_bytes())
    assert peak - before < 8e6


def test_save_file_is_read_whatever_its_alignment(folder: Path):
    """Headers used to be written unpadded, so float32 could start at any byte."""
    path = folder / "model.safetensors"
    expected = load_file(path)
    save_file(expected, path)
    raw = path.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    path.write_bytes((n + 3).to_bytes(8, "little") + raw[8 : 8 + n] + b"   " + raw[8 + n :])
    assert_same(assemble(open_checkpoint(folder)), expected)
