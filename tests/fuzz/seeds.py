"""Sound checkpoints of every format, and a bundle: what the fuzzer damages."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path

import torch
from gguf_files import bpe_vocabulary, sentencepiece_vocabulary, write_gguf
from rounded import Rounded
from safetensors.torch import load_file, save_file
from test_foreign_formats import CONFIG, PARAMS, write_lit, write_meta
from test_tokenizer import SPECIALS, byte_fallback_library, byte_level_library, rank_lines
from torch import Tensor

from llamac.export import export_bundle
from llamac.model.checkpoint import open_checkpoint
from llamac.model.checkpoint.stored import weight_shapes
from llamac.model.config import LlamaConfig, RopeScaling
from llamac.model.load import DEMO_FOLDER
from llamac.model.quantization import parse_recipe, quantize_checkpoint
from llamac.runtime.cli import main

__all__ = ["COMMANDS", "PROMPT", "Seeds", "make_seeds", "read_options"]

PROMPT = "Once upon a time the"
COMMANDS = ("generate", "run", "score", "chat", "export", "inspect", "verify", "init")

_SENTENCEPIECE = {
    "tokenizer_class": "LlamaTokenizer",
    "add_bos_token": True,
    "bos_token": "<s>",
    "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True},
    "unk_token": "<unk>",
    "legacy": False,
}
_BYTE_LEVEL = {"bos_token": SPECIALS[0], "eos_token": SPECIALS[1]}
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<' + message['role'] + '> ' + message['content'] | trim + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
_SCALING = {
    "shards": RopeScaling(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=32,
    ),
    "bin": RopeScaling(rope_type="yarn", factor=2.0, original_max_position_embeddings=32),
    "bin-shards": RopeScaling(rope_type="linear", factor=2.0),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Seeds:
    """Where the sound folders lie.

    Attributes:
        root: Each seed is a folder in it, under the name that the kinds of trial use.
        options: Every option of each command, with whether it takes a value.
    """

    root: Path
    options: dict[str, dict[str, bool]]


def make_seeds(root: Path) -> None:
    """Writes the seeds, the same ones each time.

    Args:
        root: An empty folder, which then holds hf, shards, bin, bin-shards, meta1, meta2, lit,
            one-file, one-bpe, chat, chat-config, packed, gptq, adapter (with one in its folder
            lora) and bundle, options.json, and text.txt, which score reads.
    """
    torch.manual_seed(0)
    base = replace(CONFIG, max_position_embeddings=64, bos_token_id=1, eos_token_ids=(2,))
    pieces = replace(base, vocab_size=2048)
    bytewise = replace(base, vocab_size=len(byte_level_library().get_vocab()))
    bytewise = replace(bytewise, bos_token_id=0, eos_token_ids=(1,))
    _write_hf(root / "hf", pieces, _SENTENCEPIECE)
    _write_hf(root / "shards", bytewise, _BYTE_LEVEL, shards=2)
    _write_hf(root / "bin", pieces, _SENTENCEPIECE, suffix=".bin")
    _write_hf(root / "bin-shards", pieces, _SENTENCEPIECE, suffix=".bin", shards=2)
    byte_level_library().save(str(root / "shards" / "tokenizer.json"))
    for name in ("hf", "bin-shards"):
        shutil.copy(DEMO_FOLDER / "tokenizer.model", root / name)
    library = byte_fallback_library(root / "hf" / "tokenizer.model")
    library.save(str(root / "bin" / "tokenizer.json"))

    ranks = len(rank_lines().splitlines()) + 256
    for name, size, shards in (("meta1", ranks, 1), ("meta2", 2048, 2)):
        params = {**PARAMS, "vocab_size": size, "max_seq_len": 64, "rope_theta": 10000.0}
        params["use_scaled_rope"] = shards == 2
        write_meta(root / name, _weights(replace(base, vocab_size=size)), shards, params=params)
    (root / "meta1" / "tokenizer.model").write_bytes(rank_lines())
    shutil.copy(DEMO_FOLDER / "tokenizer.model", root / "meta2")

    heads = replace(pieces, num_key_value_heads=pieces.num_attention_heads)
    _write_hf(root / "lit", heads, _SENTENCEPIECE)
    (root / "lit" / "model.safetensors").unlink()
    shutil.copy(DEMO_FOLDER / "tokenizer.model", root / "lit")
    write_lit(root / "lit" / "lit-llama.pth", _weights(heads), heads.head_dim)

    (root / "one-file").mkdir()
    vocabulary = sentencepiece_vocabulary(DEMO_FOLDER / "tokenizer.model")
    write_gguf(
        root / "one-file" / "model.gguf",
        pieces,
        _weights(pieces),
        kinds=("Q8_0", "F16", "Q4_1", "F32", "Q5_0"),
        vocabulary={**vocabulary, "chat_template": _TEMPLATE},
    )
    (root / "one-bpe").mkdir()
    ids = {"ggml.bos_token_id": 0, "ggml.eos_token_id": 1}
    write_gguf(
        root / "one-bpe" / "model.gguf",
        bytewise,
        _weights(bytewise),
        kinds=("BF16", "Q4_0", "Q5_1"),
        vocabulary={**bpe_vocabulary(byte_level_library(), "llama-bpe"), **ids},
        changes={"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0},
    )

    shutil.copytree(root / "hf", root / "chat")
    (root / "chat" / "chat_template.jinja").write_text(_TEMPLATE)
    shutil.copytree(root / "hf", root / "chat-config")
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": _TEMPLATE}]
    _write_json(
        root / "chat-config" / "tokenizer_config.json", {**_SENTENCEPIECE, "chat_template": named}
    )
    (root / "text.txt").write_text(PROMPT)
    quantize_checkpoint(open_checkpoint(root / "hf"), root / "packed", parse_recipe("int4"))
    _write_gptq(root / "gptq", root / "hf")
    shutil.copytree(root / "hf", root / "adapter")
    _write_adapter(root / "adapter" / "lora", pieces)
    export_bundle(open_checkpoint(root / "shards"), root / "bundle", prefill_len=8, max_seq_len=32)
    _write_json(root / "options.json", {name: read_options(name) for name in COMMANDS})


def read_options(command: str) -> dict[str, bool]:
    """Reads a command's options out of its own help, so that new ones are fuzzed too.

    Args:
        command: One of COMMANDS.

    Returns:
        Option to whether it takes a value.
    """
    out = StringIO()
    with redirect_stdout(out):
        try:
            main([command, "--help"])
        except SystemExit:
            pass
    found = re.findall(r"^  (?:-\w [A-Z]+, )?(--?[a-z][a-z-]*)( [A-Z{]\S*)?", out.getvalue(), re.M)
    # With --verbose a traceback is what was asked for.
    return {name: bool(value) for name, value in found if name not in ("-h", "--verbose")}


def _write_hf(
    folder: Path,
    config: LlamaConfig,
    tokenizer: dict[str, object],
    *,
    suffix: str = ".safetensors",
    shards: int = 1,
) -> None:
    folder.mkdir()
    config = replace(config, rope_scaling=_SCALING.get(folder.name))
    _write_json(folder / "config.json", config.to_dict())
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": list(config.eos_token_ids)}
    _write_json(folder / "generation_config.json", {**ids, "do_sample": True})
    _write_json(folder / "tokenizer_config.json", tokenizer)
    tokens = {key: text for key, text in tokenizer.items() if key.endswith("os_token")}
    _write_json(folder / "special_tokens_map.json", tokens)
    weights = _weights(config)
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    names = [f"{stem}-{i + 1:05}-of-{shards:05}{suffix}" for i in range(shards)]
    if shards == 1:
        names = [f"{stem}{suffix}"]
    weight_map = {key: names[i * shards // len(weights)] for i, key in enumerate(weights)}
    for name in names:
        part = {key: weights[key] for key, file in weight_map.items() if file == name}
        if suffix == ".safetensors":
            save_file(part, folder / name, metadata={"format": "pt"})
        else:
            torch.save(part, folder / name)
    if shards > 1:
        size = sum(weight.nbytes for weight in weights.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        _write_json(folder / f"{stem}{suffix}.index.json", index)


def _write_adapter(folder: Path, config: LlamaConfig) -> None:
    """A LoRA of the attention, as PEFT saves one."""
    folder.mkdir()
    targets = ["q_proj", "v_proj", "o_proj"]
    _write_json(
        folder / "adapter_config.json",
        {
            **{"peft_type": "LORA", "target_modules": targets, "r": 4, "lora_alpha": 8},
            **{"rank_pattern": {"v_proj": 2}, "alpha_pattern": {r"layers\.1\..*": 4}},
            **{"use_rslora": False, "bias": "none", "use_dora": False, "modules_to_save": None},
        },
    )
    weights: dict[str, Tensor] = {}
    for name, (rows, width) in (
        (name, shape) for name, shape in weight_shapes(config).items() if len(shape) == 2
    ):
        module = name.removesuffix(".weight")
        if module.endswith(tuple(targets)):
            rank = 2 if module.endswith("v_proj") else 4
            weights[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, width) / 4
            weights[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, rank) / 4
    save_file(weights, folder / "adapter_model.safetensors")


def _write_gptq(folder: Path, source: Path) -> None:
    """As GPTQ leaves it: zero points, and columns in an order of their own."""
    shutil.copytree(source, folder)
    config = json.loads((source / "config.json").read_bytes())
    settings = {"bits": 4, "group_size": 32, "desc_act": True, "sym": False, "lm_head": False}
    settings |= {"quant_method": "gptq", "checkpoint_format": "gptq", "dynamic": None}
    _write_json(folder / "config.json", {**config, "quantization_config": settings})
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors.pop(name)
        order = torch.randperm(weight.shape[1]).numpy()
        rounded = Rounded(weight, bits=4, group=32, sym=False, order=order)
        for key, tensor in rounded.gptq(version=1).items():
            tensors[f"{name.removesuffix('weight')}{key}"] = tensor.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _weights(config: LlamaConfig) -> dict[str, Tensor]:
    """Wide enough that any other weight gives another text."""
    return {
        name: 1 + 0.1 * torch.randn(shape) if len(shape) == 1 else 0.3 * torch.randn(shape)
        for name, shape in weight_shapes(config).items()
    }


def _write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=1))
