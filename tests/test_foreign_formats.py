from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llamac.model.checkpoint import load_model, open_checkpoint
from llamac.model.checkpoint.pieces import _uninterleave
from llamac.model.checkpoint.random_weights import write_random_checkpoint
from llamac.model.checkpoint.stored import Checkpoint
from llamac.model.config import LlamaConfig
from llamac.model.tables import rope_tables, rotate

# The MLP's width is Meta's formula: 2/3 of 4 * 64, up to a multiple of 32.
CONFIG = LlamaConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
    dtype="float32",
)
PARAMS = {
    "dim": 64,
    "n_layers": 2,
    "n_heads": 8,
    "n_kv_heads": 2,
    "multiple_of": 32,
    "norm_eps": 1e-5,
    "vocab_size": -1,
}


def assemble(checkpoint: Checkpoint) -> dict[str, Tensor]:
    full = {
        name: torch.full(stored.shape, float("nan"), dtype=getattr(torch, stored.dtype))
        for name, stored in checkpoint.tensors.items()
    }
    for name, place, part in checkpoint.read():
        full[name][place] = part
    return full


def random_weights(folder: Path, config: LlamaConfig) -> dict[str, Tensor]:
    write_random_checkpoint(None, folder, config=config, dtype=config.dtype)
    return assemble(open_checkpoint(folder))


def assert_same(checkpoint: Checkpoint, expected: dict[str, Tensor]) -> None:
    found = assemble(checkpoint)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


def interleave(weight: Tensor, head_dim: int) -> Tensor:
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def write_meta(
    folder: Path,
    weights: dict[str, Tensor],
    num_shards: int,
    *,
    embedding_dim: int = 1,
    params: dict | None = None,
) -> Path:
    """Cuts HF weights the way Meta's tensor-parallel training leaves them."""
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(PARAMS if params is None else params))
    shards: list[dict[str, Tensor]] = [{} for _ in range(num_shards)]

    def split(key: str, weight: Tensor, dim: int) -> None:
        for shard, part in zip(shards, weight.chunk(num_shards, dim), strict=True):
            shard[key] = part.clone()

    def copy(key: str, weight: Tensor) -> None:
        for shard in shards:
            shard[key] = weight.clone()

    split("tok_embeddings.weight", weights["model.embed_tokens.weight"], embedding_dim)
    copy("norm.weight", weights["model.norm.weight"])
    if "lm_head.weight" in weights:
        split("output.weight", weights["lm_head.weight"], 0)
    copy("rope.freqs", torch.ones(4))
    for i in range(CONFIG.num_hidden_layers):
        theirs, ours = f"layers.{i}", f"model.layers.{i}"
        q, k, v = (weights[f"{ours}.self_attn.{x}_proj.weight"] for x in "qkv")
        k = interleave(k, CONFIG.head_dim)
        copies = max(1, num_shards // CONFIG.num_key_value_heads)
        if copies > 1:  # a head is held by as many neighbours
            k, v = (
                x.unflatten(0, (-1, 8)).repeat_interleave(copies, 0).flatten(0, 1) for x in (k, v)
            )
        split(f"{theirs}.attention.wq.weight", interleave(q, CONFIG.head_dim), 0)
        split(f"{theirs}.attention.wk.weight", k, 0)
        split(f"{theirs}.attention.wv.weight", v, 0)
        split(f"{theirs}.attention.wo.weight", weights[f"{ours}.self_attn.o_proj.weight"], 1)
        split(f"{theirs}.feed_forward.w1.weight", weights[f"{ours}.mlp.gate_proj.weight"], 0)
        split(f"{theirs}.feed_forward.w2.weight", weights[f"{ours}.mlp.down_proj.weight"], 1)
        split(f"{theirs}.feed_forward.w3.weight", weights[f"{ours}.mlp.up_proj.weight"], 0)
        copy(f"{theirs}.attention_norm.weight", weights[f"{ours}.input_layernorm.weight"])
        copy(f"{theirs}.ffn_norm.weight", weights[f"{ours}.post_attention_layernorm.weight"])
        copy(f"{theirs}.attention.inner_attention.rope.freqs", torch.ones(4))
    for i, shard in enumerate(shards):
        torch.save(shard, folder / f"consolidated.{i:02}.pth")
    return folder


def write_lit(path: Path, weights: dict[str, Tensor], head_dim: int, **wrap: object) -> Path:
    state: dict[str, Tensor] = {
        "transformer.wte.weight": weights["model.embed_tokens.weight"],
        "transformer.ln_f.scale": weights["model.norm.weight"],
        "lm_head.weight": weights["lm_head.weight"],
    }
    num_layers = sum(name.endswith("input_layernorm.weight") for name in weights)
    for i in range(num_layers):
        theirs, ours = f"transformer.h.{i}", f"model.layers.{i}"
        q, k, v = (weights[f"{ours}.self_attn.{x}_proj.weight"] for x in "qkv")
        fused = torch.cat((interleave(q, head_dim), interleave(k, head_dim), v))
        state[f"{theirs}.attn.c_attn.weight"] = fused
        state[f"{theirs}.attn.c_proj.weight"] = weights[f"{ours}.self_attn.o_proj.weight"]
        state[f"{theirs}.mlp.c_fc1.weight"] = weights[f"{ours}.mlp.gate_proj.weight"]
        state[f"{theirs}.mlp.c_fc2.weight"] = weights[f"{ours}.mlp.up_proj.weight"]
        state[f"{theirs}.mlp.c_proj.weight"] = weights[f"{ours}.mlp.down_proj.weight"]
        state[f"{theirs}.rms_1.scale"] = weights[f"{ours}.input_layernorm.weight"]
        state[f"{theirs}.rms_2.scale"] = weights[f"{ours}.post_attention_layernorm.weight"]
    torch.save({"model": state, **wrap} if wrap else state, path)
    return path


def test_uninterleave_moves_pairs_half_a_head_apart():
    rows = torch.arange(8)[:, None]  # two heads of 4
    assert _uninterleave(rows, 4).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_scores_of_converted_heads_equal_the_complex_form():
    """Meta rotates neighbours as complex numbers; the model rotates halves."""
    torch.manual_seed(0)
    wq, wk = torch.randn(16, 64), torch.randn(16, 64)
    x = torch.randn(5, 64)
    cos, sin = rope_tables(CONFIG, 5)  # [5, 4]

    def rotate_complex(weight: Tensor) -> Tensor:
        pairs = torch.view_as_complex((x @ weight.T).view(5, 2, 4, 2))
        return torch.view_as_real(pairs * torch.complex(cos, sin)[:, None]).flatten(2)

    def rotate_halves(weight: Tensor) -> Tensor:
        heads = (x @ _uninterleave(weight, 8).T).view(1, 5, 2, 8)
        return rotate(heads, cos[None], sin[None])[0]

    expected = torch.einsum("qhd,khd->hqk", rotate_complex(wq), rotate_complex(wk))
    found = torch.einsum("qhd,khd->hqk", rotate_halves(wq), rotate_halves(wk))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("num_shards", [1, 2, 4])
@pytest.mark.parametrize("embedding_dim", [1, 0])
def test_meta_shards_are_merged(tmp_path: Path, num_shards: int, embedding_dim: int):
    """With 4 shards and 2 kv heads, neighbours hold the same head."""
    weights = random_weights(tmp_path / "hf", CONFIG)
    folder = write_meta(tmp_path / "meta", weights, num_shards, embedding_dim=embedding_dim)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config == CONFIG
    assert checkpoint.folder == folder
    assert all(stored.file is None for stored in checkpoint.tensors.values())
    assert_same(checkpoint, weights)
    assert_same(open_checkpoint(folder / "consolidated.00.pth"), weights)
    (tmp_path / "tokenizer.model").touch()  # one folder up, as Llama 1 and 2 were given out
    assert open_checkpoint(folder).folder == tmp_path
    (folder / "tokenizer.model").touch()
    assert open_checkpoint(folder).folder == folder


def test_meta_in_blocks_and_into_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("llamac.model.checkpoint.pieces._BLOCK_BYTES", 5000)
    weights = random_weights(tmp_path / "hf", CONFIG)
    checkpoint = open_checkpoint(write_meta(tmp_path / "meta", weights, 2))
    model = load_model(checkpoint, num_positions=4)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name]), name


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"norm_eps": 1e-6}, {"max_position_embeddings": 2048}),
        ({}, {"max_position_embeddings": 4096, "rope_theta": 1e4, "eos_token_ids": (2,)}),
        ({"rope_theta": 1e6}, {"max_position_embeddings": 16_384}),
        ({"max_seq_len": 77}, {"max_position_embeddings": 77}),
        ({"use_scaled_rope": False}, {"rope_scaling": None}),
        (
            {"use_scaled_rope": True, "rope_theta": 5e5},
            {"max_position_embeddings": 131_072, "bos_token_id": 128_000},
        ),
        ({"ffn_dim_multiplier": 1.1}, {"intermediate_size": 192}),
    ],
)
def test_params_become_a_config(tmp_path: Path, params: dict, expected: dict):
    weights = random_weights(tmp_path / "hf", CONFIG)
    folder = write_meta(tmp_path / "meta", weights, 1, params={**PARAMS, **params})
    config = open_checkpoint(folder).config
    assert {key: getattr(config, key) for key in expected} == expected
    if params.get("use_scaled_rope"):  # narrow: 3.2, stretched 32 times
        assert config.rope_scaling is not None
        assert config.rope_scaling.factor == 32.0


def test_without_output_the_head_is_tied(tmp_path: Path):
    weights = random_weights(tmp_path / "hf", CONFIG)
    del weights["lm_head.weight"]
    checkpoint = open_checkpoint(write_meta(tmp_path / "meta", weights, 2))
    assert checkpoint.config.tie_word_embeddings
    assert_same(checkpoint, weights)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"dim": None}, r"params\.json: dim is None; it must be an integer from 1 to"),
        ({"n_layers": 10**7}, r"params\.json: .*num_hidden_layers is 10000000; it must be an"),
        ({"max_seq_len": 2**31}, "max_seq_len is 2147483648; it must be an integer from 1 to"),
        ({"ffn_dim_multiplier": 10**400}, "ffn_dim_multiplier is an integer of more than 60"),
        ({"norm_eps": True}, "norm_eps is True; it must be a number"),
        ({"use_scaled_rope": "false"}, "use_scaled_rope is 'false'; it must be true or false"),
        ({"use_scaled_rope": 1}, "use_scaled_rope is 1; it must be true or false"),
        ({"n_heads": 7}, "it must be a multiple of n_heads"),
        ({"multiple_of": 256}, "makes the MLP 256 wide, 1 shards of w1 make it 192"),
        ({"vocab_size": 97}, r"tok_embeddings\.weight .* has shape \[96, 64\]; .* \[97, 64\]"),
        ({"n_kv_heads": 4}, r"attention\.wk\.weight .* has shape \[16, 64\]; .* \[32, 64\]"),
        ({"n_layers": 3}, r"tensor model\.layers\.2\..* is missing"),
        ({"n_layers": 1}, r"consolidated\.00\.pth: tensor layers\.1\..* is not part of this model"),
        ({"norm_eps": "small"}, "norm_eps is 'small'"),
    ],
)
def test_params_that_disagree_are_refused(tmp_path: Path, params: dict, message: str):
    weights = random_weights(tmp_path / "hf", CONFIG)
    folder = write_meta(tmp_path / "meta", weights, 1, params={**PARAMS, **params})
    with pytest.raises(ValueError, match=message):
        open_checkpoint(folder)


def test_missing_meta_files_are_named(tmp_path: Path):
    weights = random_weights(tmp_path / "hf", CONFIG)
    folder = write_meta(tmp_path / "meta", weights, 4)
    (folder / "consolidated.03.pth").unlink()
    with pytest.raises(ValueError, match="3 shards of w1 make it 144; a shard may be missing"):
        open_checkpoint(folder)
    (folder / "consolidated.01.pth").unlink()
    with pytest.raises(FileNotFoundError, match=r"consolidated\.01\.pth: no such file"):
        open_checkpoint(folder)
    (folder / "params.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"params\.json: no such file"):
        open_checkpoint(folder)


LIT_CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=256,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=128,
    rms_norm_eps=1e-5,
    dtype="bfloat16",
)


@pytest.mark.parametrize("wrap", [{}, {"optimizer": {"step": 3}}])
def test_lit_llama_is_unfused(tmp_path: Path, wrap: dict):
    weights = random_weights(tmp_path / "hf", LIT_CONFIG)
    (tmp_path / "lit" / "7B").mkdir(parents=True)
    path = write_lit(tmp_path / "lit" / "7B" / "lit-llama.pth", weights, 128, **wrap)
    checkpoint = open_checkpoint(path)
    assert checkpoint.config == LIT_CONFIG
    assert checkpoint.folder == path.parent
    assert_same(checkpoint, weights)
    (tmp_path / "lit" / "tokenizer.model").touch()  # lit-llama keeps it one folder up
    assert open_checkpoint(path.parent).folder == tmp_path / "lit"


def test_lit_llama_with_given_heads(tmp_path: Path):
    weights = random_weights(tmp_path / "hf", CONFIG)
    path = write_lit(tmp_path / "lit.pth", weights, CONFIG.head_dim)
    with pytest.raises(ValueError, match=r"width 64 is no multiple of 128; put an HF config\.json"):
        open_checkpoint(path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    assert_same(open_checkpoint(path), weights)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"transformer.h.0.attn.c_attn.lora_A": 0}, r"holds adapter weights .*; merge them"),
        ({"transformer.h.2.attn.gating_factor": 0}, r"holds adapter weights .*; merge them"),
        ({"conv1.weight": 0}, "not a lit-llama checkpoint"),
        ({}, "not a lit-llama checkpoint"),
    ],
)
def test_other_pth_files_are_refused(tmp_path: Path, state: dict, message: str):
    torch.save({key: torch.ones(2) for key in state}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path / "a.pth")
