from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

from llamac.model.checkpoint import open_checkpoint
from llamac.model.checkpoint.presets import preset_config
from llamac.model.checkpoint.random_weights import write_random_checkpoint
from llamac.model.config import LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        k: w for file in sorted(folder.glob("*.safetensors")) for k, w in load_file(file).items()
    }


@pytest.mark.parametrize("shards", [1, 2, 5, 21])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_transformers_loads_every_tensor(tmp_path: Path, shards: int, dtype: str):
    out = tmp_path / "new" / "model"
    write_random_checkpoint(None, out, config=CONFIG, dtype=dtype, shards=shards)
    assert len(list(out.glob("*.safetensors"))) == shards
    assert [path.name for path in out.parent.iterdir()] == ["model"]
    model, info = transformers.LlamaForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert str(model.dtype) == f"torch.{dtype}"
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights(out)[name])
    checkpoint = open_checkpoint(out)
    assert checkpoint.config == replace(CONFIG, dtype=dtype)


def test_values_depend_on_seed_and_name_but_not_on_shards(tmp_path: Path):
    for name, options in (("a", {}), ("b", {"shards": 3}), ("c", {"seed": 1})):
        write_random_checkpoint(None, tmp_path / name, config=CONFIG, dtype="float32", **options)
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert a.keys() == b.keys() == c.keys()
    for name in a:
        assert torch.equal(a[name], b[name])
        assert torch.equal(a[name], c[name]) == name.endswith("norm.weight")
    gate, up = (a[f"model.layers.0.mlp.{x}_proj.weight"] for x in ("gate", "up"))
    assert not torch.equal(gate, up)
    assert a["model.norm.weight"].eq(1).all()
    assert 0.019 < gate.std() < 0.021
    assert abs(gate.mean()) < 0.001


def test_chunks_join_without_a_seam(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("llamac.model.checkpoint.random_weights._CHUNK", 100)
    seen: list[tuple[int, int]] = []
    write_random_checkpoint(
        None, tmp_path / "a", config=CONFIG, progress=lambda *now: seen.append(now)
    )
    gate = weights(tmp_path / "a")["model.layers.0.mlp.gate_proj.weight"].flatten()
    assert not torch.equal(gate[:100], gate[100:200])
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]


def test_depth_overrides_the_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small = replace(preset_config("llama-3.2-1b"), vocab_size=64, hidden_size=64)
    monkeypatch.setattr("llamac.model.checkpoint.random_weights.preset_config", lambda name: small)
    write_random_checkpoint("llama-3.2-1b", tmp_path / "a", num_hidden_layers=1)
    checkpoint = open_checkpoint(tmp_path / "a")
    assert checkpoint.config == replace(small, num_hidden_layers=1)
    assert "lm_head.weight" not in checkpoint.tensors  # tied


def test_data_starts_aligned_and_declares_its_framework(tmp_path: Path):
    write_random_checkpoint(None, tmp_path / "a", config=CONFIG)
    path = tmp_path / "a" / "model.safetensors"
    assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % 64 == 0
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    ("preset", "options", "message"),
    [
        ("llama-9b", {}, "preset is 'llama-9b'; it must be one of"),
        ("llama-7b", {"dtype": "int8"}, "dtype is 'int8'; it must be one of"),
        ("llama-7b", {"shards": 0}, "shards is 0; this model takes 1 to 291"),
        ("llama-7b", {"shards": 292}, "shards is 292"),
        ("llama-7b", {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ("llama-65b", {"dtype": "float32", "num_hidden_layers": 1000}, "GiB, .* are free there"),
    ],
)
def test_bad_arguments_write_nothing(tmp_path: Path, preset: str, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        write_random_checkpoint(preset, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_refused(tmp_path: Path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "full", tmp_path / "full" / "file"):
        with pytest.raises(ValueError, match="already there; remove it or name a new folder"):
            write_random_checkpoint(None, out, config=CONFIG)
    write_random_checkpoint(None, tmp_path / "empty", config=CONFIG)
    assert (tmp_path / "empty" / "config.json").exists()


def test_an_interrupt_leaves_nothing(tmp_path: Path):
    def interrupt(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_random_checkpoint(None, tmp_path / "out", config=CONFIG, progress=interrupt)
    assert list(tmp_path.iterdir()) == []
