"""What each of several ranks holds of a model: together it is the model, and computes the same."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_files import write_gguf
from quantized_folders import read_parts, write_folder
from references import one_forward, random_ids
from safetensors.torch import save_file
from test_foreign_formats import CONFIG, random_weights, write_lit, write_meta
from test_quantized_gptq_awq import AWQ, round_all, write_gptq
from torch import Tensor

from llamac.model.cache import KVCache
from llamac.model.checkpoint import Checkpoint, load_model, open_checkpoint
from llamac.model.checkpoint.random_weights import write_random_checkpoint
from llamac.model.checkpoint.tensor_files import TensorFile
from llamac.model.llama import Llama, TorchAttention
from llamac.model.packed import PackedFormat
from llamac.model.parallel import check_ranks, shard_checkpoint
from llamac.model.quantization import parse_recipe, quantize_checkpoint
from llamac.model.ranks import Rank

WHOLE_HEADS = replace(CONFIG, num_key_value_heads=CONFIG.num_attention_heads)
# Columns that 16 divides for up to four ranks.
WIDE = replace(CONFIG, num_attention_heads=16, intermediate_size=256)


def write_source(folder: Path, kind: str) -> Path:
    if kind == "lit":
        weights = random_weights(folder / "hf", WHOLE_HEADS)
        (folder / "lit").mkdir()
        shutil.copy(folder / "hf" / "config.json", folder / "lit")
        return write_lit(folder / "lit" / "lit.pth", weights, WHOLE_HEADS.head_dim)
    if kind.startswith("meta"):
        return write_meta(folder / "meta", random_weights(folder / "hf", CONFIG), int(kind[-1]))
    config = replace(CONFIG, tie_word_embeddings=kind == "tied")
    if kind.startswith("int"):
        config = WIDE
    if kind.endswith("biased"):
        config = replace(config, attention_bias=True, mlp_bias=True)
    write_random_checkpoint(None, folder / "hf", config=config, dtype="float32", shards=2)
    if kind.startswith("int"):
        recipe = parse_recipe(f"{kind[:4]}-g16")
        quantize_checkpoint(open_checkpoint(folder / "hf"), folder / "packed", recipe)
        return folder / "packed"
    return folder / "hf"


def write_foreign(folder: Path, kind: str) -> Path:
    """Weights that are computed from several stored tensors, converted, or cut in blocks."""
    if kind == "gguf":
        config = replace(CONFIG, hidden_size=256, intermediate_size=512, head_dim=32)
        kinds = ("Q4_0", "Q8_0", "Q6_K", "F16")
        write_gguf(folder / "m.gguf", config, random_weights(folder / "hf", config), kinds=kinds)
        return folder / "m.gguf"
    weights, rounded = round_all(bits=4, group=16, sym=kind == "gptq")
    if kind == "gptq":
        return write_gptq(folder / "gptq", weights, rounded, group_size=16)
    for name, one in rounded.items():
        weights |= {f"{name}.{key}": value for key, value in one.awq().items()}
    return write_folder(folder / "awq", weights, AWQ)


def write_adapter(folder: Path, checkpoint: Checkpoint) -> Path:
    """A LoRA of every matrix of the layers."""
    torch.manual_seed(3)
    factors: dict[str, Tensor] = {}
    for name, stored in checkpoint.tensors.items():
        if "_proj.weight" in name:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            factors[f"{module}.lora_A.weight"] = torch.randn(4, stored.shape[1])
            factors[f"{module}.lora_B.weight"] = torch.randn(stored.shape[0], 4)
    folder.mkdir()
    save_file(factors, folder / "adapter_model.safetensors")
    names = sorted({name.split(".")[-3] for name in factors})
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": names}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def assemble(checkpoint: Checkpoint) -> dict[str, Tensor]:
    modules = {name.rpartition(".")[0] for name in checkpoint.tensors}
    found: dict[str, Tensor] = {}
    for module in modules:
        parts = read_parts(checkpoint, module)
        found |= {f"{module}.{name}": tensor for name, tensor in parts.items()}
        if f"{module}.bias" in checkpoint.tensors:
            name = f"{module}.bias"
            found[name] = torch.cat([part for _, _, part in checkpoint.read([name])])
    return found


def joined(shards: list[Tensor], whole: Tensor, copies: int) -> Tensor:
    """The shards side by side, of neighbours that hold the same head one."""
    if all(shard.shape == whole.shape for shard in shards):
        assert all(torch.equal(shard, shards[0]) for shard in shards)
        return shards[0]
    dim = next(d for d, (a, b) in enumerate(zip(shards[0].shape, whole.shape)) if a != b)  # noqa: B905
    return torch.cat(shards[::copies], dim)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(
    "kind", ["hf", "tied", "biased", "meta 1", "meta 2", "lit", "int8", "int4"]
)
def test_the_ranks_together_hold_the_model(tmp_path: Path, kind: str, world_size: int):
    """With 4 ranks, most have half as many key/value heads: neighbours hold the same one."""
    check_shards(open_checkpoint(write_source(tmp_path, kind)), world_size)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("kind", ["gptq", "awq", "gguf"])
def test_ranks_hold_parts_of_what_is_computed(tmp_path: Path, kind: str, world_size: int):
    checkpoint = open_checkpoint(write_foreign(tmp_path, kind))
    assert {form.bits for form in checkpoint.packed.values()} >= {4}
    check_shards(checkpoint, world_size)


@pytest.mark.parametrize("kind", ["hf", "meta 2", "lit"])
def test_ranks_hold_parts_of_what_an_adapter_changes(tmp_path: Path, kind: str):
    source = write_source(tmp_path, kind)
    plain = open_checkpoint(source)
    adapted = open_checkpoint(source, adapter=write_adapter(tmp_path / "adapter", plain))
    name = "model.layers.1.mlp.down_proj.weight"
    assert not torch.allclose(assemble(adapted)[name], assemble(plain)[name], atol=0.1)
    check_shards(adapted, 2)


def check_shards(checkpoint: Checkpoint, world_size: int) -> None:
    whole = assemble(checkpoint)
    shards = [
        shard_checkpoint(checkpoint, Rank(index=i, world_size=world_size))
        for i in range(world_size)
    ]
    found = [assemble(shard) for shard in shards]
    for name, tensor in whole.items():
        copies = copies_of(name, checkpoint, world_size)
        assert torch.equal(joined([own[name] for own in found], tensor, copies), tensor), name
    names = [name for name in whole if "proj" in name and "bias" not in name]
    names = [name for name in names if copies_of(name, checkpoint, world_size) == 1]
    for shard, own in zip(shards, found, strict=True):
        assert all(own[name].numel() * world_size == whole[name].numel() for name in names)
        assert {n: t.shape for n, t in own.items()} == {
            n: s.shape for n, s in shard.tensors.items()
        }


def copies_of(name: str, checkpoint: Checkpoint, world_size: int) -> int:
    is_kv = "k_proj" in name or "v_proj" in name
    return max(1, world_size // checkpoint.config.num_key_value_heads) if is_kv else 1


def forward(shards: list[Checkpoint], ids: list[int]) -> np.ndarray:
    """[T, V] logits of a sequence, the ranks' shares of each sum added one after the other."""
    models: list[Llama] = []
    for i, shard in enumerate(shards):
        model = Llama(shard.config, num_positions=64, packed=shard.packed)
        weights = {n: w for n, w in assemble(shard).items() if not n.startswith("lm_head")}
        if i:  # added once
            weights |= {
                n: torch.zeros_like(w)
                for n, w in weights.items()
                if n.endswith(("o_proj.bias", "down_proj.bias"))
            }
        model.load_state_dict(weights, strict=False)
        models.append(model.eval())
    caches = [KVCache.allocate(m.config, 1, len(ids), dtype=torch.float32) for m in models]
    zero = torch.zeros(1, dtype=torch.int64)
    first = models[0]
    cos, sin = first.cos[None, : len(ids)], first.sin[None, : len(ids)]
    with torch.no_grad():
        hidden = first.model.embed_tokens(torch.tensor(ids))
        for i in range(first.config.num_hidden_layers):
            layers = [model.model.layers[i] for model in models]
            x = layers[0].input_layernorm(hidden)
            where = {"positions": zero, "write_indices": zero, "slots": zero}
            for layer, cache in zip(layers, caches, strict=True):
                attend = partial(TorchAttention(), cache=cache.layers[i], cos=cos, sin=sin, **where)
                hidden = hidden + layer.self_attn(x, attend, batch_size=1)
            x = layers[0].post_attention_layernorm(hidden)
            hidden = hidden + sum(layer.mlp(x) for layer in layers)
        hidden = first.model.norm(hidden)
        heads = [assemble(shard).get("lm_head.weight") for shard in shards]
        if heads[0] is None:
            return (hidden @ first.model.embed_tokens.weight.T).numpy()
        return torch.cat([hidden @ head.T for head in heads], dim=1).numpy()


@pytest.mark.parametrize(("kind", "world_size"), [("hf", 2), ("hf", 4), ("tied", 8), ("biased", 4)])
def test_the_ranks_together_compute_the_model(tmp_path: Path, kind: str, world_size: int):
    checkpoint = open_checkpoint(write_source(tmp_path, kind))
    ids = random_ids(9)
    ids = [i % CONFIG.vocab_size for i in ids]
    shards = [
        shard_checkpoint(checkpoint, Rank(index=i, world_size=world_size))
        for i in range(world_size)
    ]
    expected = one_forward(load_model(checkpoint, num_positions=64), ids)
    found = forward(shards, ids)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_rank_maps_its_own_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of q and up, each of two ranks opens half."""
    checkpoint = open_checkpoint(write_source(tmp_path, "hf"))
    read: list[int] = []
    rows = TensorFile.rows

    def record(file: TensorFile, *args) -> Tensor:
        found = rows(file, *args)
        read.append(found.nbytes)
        return found

    monkeypatch.setattr(TensorFile, "rows", record)
    names = [n for n in checkpoint.tensors if n.endswith(("q_proj.weight", "up_proj.weight"))]
    total = sum(part.nbytes for _, _, part in checkpoint.read(names))
    read.clear()
    shard = shard_checkpoint(checkpoint, Rank(index=1, world_size=2))
    assert sum(part.nbytes for _, _, part in shard.read(names)) == total // 2 == sum(read)
    mapped = shard.map(names[0], torch.float32)
    assert mapped is not None
    whole = torch.cat([part for _, _, part in checkpoint.read([names[0]])])
    assert torch.equal(mapped, whole[len(whole) // 2 :])


@pytest.mark.parametrize(
    ("keys", "world_size", "message"),
    [
        ({}, 3, "num_attention_heads is 8, which 3 ranks don't divide"),
        ({"intermediate_size": 194}, 4, "intermediate_size is 194, which 4"),
        ({"vocab_size": 97}, 2, "vocab_size is 97, which 2"),
        (
            {"num_attention_heads": 12, "num_key_value_heads": 4},
            6,
            "num_key_value_heads is 4; 6 ranks must divide it",
        ),
    ],
)
def test_ranks_that_a_model_can_not_be_divided_by(tmp_path: Path, keys, world_size, message):
    write_random_checkpoint(None, tmp_path / "hf", config=replace(CONFIG, **keys))
    with pytest.raises(ValueError, match=message):
        check_ranks(open_checkpoint(tmp_path / "hf"), world_size)


def test_groups_of_packed_weights_lie_on_one_rank(tmp_path: Path):
    checkpoint = open_checkpoint(write_source(tmp_path, "int8"))
    with pytest.raises(ValueError, match="o_proj: 128 columns in groups of 16 can't be divided by"):
        check_ranks(checkpoint, 16)
    form = PackedFormat(bits=8, group_size=16, scale_dtype="float32", has_order=True)
    packed = {**checkpoint.packed, "model.layers.0.mlp.down_proj": form}
    with pytest.raises(ValueError, match=r"down_proj: its columns .* another order \(desc_act\)"):
        check_ranks(replace(checkpoint, packed=packed), 2)
    check_ranks(replace(checkpoint, packed=packed), 1)  # one process may hold any order
