"""The kinds of trial: which seed is damaged where, and which command meets it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from contents import damage_content, damage_quantization
from damage import Allowed, damage_bytes, damage_file, damage_json, odd_word
from seeds import COMMANDS, PROMPT, Seeds
from templates import odd_template

__all__ = ["KINDS", "Trial", "make_trial", "seal_manifest", "sound_command"]

KINDS = (
    *("config", "index", "safetensors", "bin", "meta", "lit", "gguf", "tokenizer", "ranks"),
    *("template", "quantized", "adapter", "bundle", "options"),
)

_CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json")
# Per kind, the seed and the files of it that are damaged.
_FILES: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "config": (
        ("hf", (*_CONFIGS, "special_tokens_map.json")),
        ("shards", (*_CONFIGS, "special_tokens_map.json")),
        ("bin", _CONFIGS),
        ("bin-shards", _CONFIGS),
        ("chat-config", _CONFIGS),
    ),
    "index": (
        ("shards", ("model.safetensors.index.json",)),
        ("bin-shards", ("pytorch_model.bin.index.json",)),
    ),
    "safetensors": (
        ("hf", ("model.safetensors",)),
        ("shards", ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")),
    ),
    "bin": (
        ("bin", ("pytorch_model.bin",)),
        ("bin-shards", ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")),
    ),
    "meta": (
        ("meta1", ("params.json", "params.json", "consolidated.00.pth")),
        ("meta2", ("params.json", "consolidated.00.pth", "consolidated.01.pth")),
    ),
    "lit": (("lit", ("lit-llama.pth", "lit-llama.pth", "config.json")),),
    "gguf": (("one-file", ("model.gguf",)), ("one-bpe", ("model.gguf",))),
    "tokenizer": (
        ("hf", ("tokenizer.model", "tokenizer_config.json")),
        ("shards", ("tokenizer.json",)),
        ("bin", ("tokenizer.json", "tokenizer.json", "tokenizer_config.json")),
    ),
    "ranks": (("meta1", ("tokenizer.model",)),),
    "template": (
        ("chat", ("chat_template.jinja",)),
        ("chat-config", ("tokenizer_config.json",)),
    ),
    "quantized": (
        ("packed", ("config.json", "model.safetensors")),
        ("gptq", ("config.json", "model.safetensors")),
    ),
    "adapter": (("adapter", ("lora/adapter_config.json", "lora/adapter_model.safetensors")),),
}
# A checkpoint without them has everything; damaged they are refused, but they may be away.
_OPTIONAL = {
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One command to run in a folder that holds a damaged seed.

    Attributes:
        argv: The words after `llamac`.
        note: What was done.
        allowed: What an accepted try may print.
        seed: The seed's name, or "" where the command line itself is odd.
    """

    argv: list[str]
    note: str
    allowed: Allowed
    seed: str


def sound_command(command: str, seed: str) -> list[str]:
    """The words of a command that succeeds on the sound seed.

    Args:
        command: One of COMMANDS, or "check", which is `run --check`.
        seed: The seed, a folder in the working directory.

    Returns:
        The words after `llamac`.
    """
    model = ["--model", seed, "--backend", "ort" if seed == "bundle" else "eager"]
    adapter = ["--adapter", "adapter/lora"] if seed == "adapter" else []
    model += adapter
    greedy = ["--max-new-tokens", "2", "--temperature", "0"]
    text = ["--prompt", PROMPT, "--json", "--logprobs", "1"]
    return {
        "generate": ["generate", *model, *greedy, *text],
        "chat": ["chat", *model, *greedy],
        "score": ["score", *model, "--text-file", "text.txt"],
        "export": ["export", seed, "out", "--prefill-len", "8", *adapter],
        "run": ["run", seed, *greedy, *text],
        "check": ["run", seed, "--check", *greedy, *text],
        "inspect": ["inspect", seed],
        "verify": ["verify", seed, "--provider", "cpu"],
        "init": ["init", "out", "--preset", "tinyllama-1.1b", "--num-hidden-layers", "1"],
    }[command]


def make_trial(kind: str, rng: Random, seeds: Seeds, copy: Callable[[str], Path]) -> Trial:
    """Damages a copy of a seed.

    Args:
        kind: One of KINDS.
        rng: Decides everything.
        seeds: The sound ones.
        copy: Copies a seed into the working directory under its name; gives the copy's path.

    Returns:
        What is to be run, the damage being done.
    """
    if kind == "options":
        return _odd_options(rng, seeds, copy)
    if kind == "bundle":
        return _damaged_bundle(rng, copy)
    seed, names = rng.choice(_FILES[kind])
    folder = copy(seed)
    name = rng.choice(names)
    path = folder / name
    if kind == "template" and rng.random() < 0.7:
        damage = odd_template(rng, path)
    elif rng.random() < 0.12:
        elsewhere = folder.parent / "elsewhere"
        elsewhere.mkdir()
        required = name not in _OPTIONAL and seed not in ("lit",)
        damage = damage_file(rng, path, required=required, elsewhere=elsewhere)
    elif kind == "quantized" and name == "config.json":
        damage = damage_quantization(rng, path)
    else:
        damage = damage_content(rng, path)
    commands = ["chat"] if kind == "template" else ["generate"] * 90 + ["score"] * 9 + ["export"]
    argv = sound_command(rng.choice(commands), seed)
    if seed == "lit":
        argv = ["lit/lit-llama.pth" if word == "lit" else word for word in argv]
    allowed = damage.allowed
    if argv[0] == "export" and name.startswith("tokenizer") and not path.is_file():
        allowed = "any"  # a bundle may be fed ids alone
    if kind == "adapter" and allowed == "same":
        allowed = "any"  # 64.0 is as good an alpha as 4
    return Trial(argv=argv, note=f"{name}: {damage.note}", allowed=allowed, seed=seed)


def seal_manifest(data: dict[str, object]) -> bytes:
    """A manifest's text with the digest that belongs to it, as a forger would write it."""
    data = {key: value for key, value in data.items() if key != "digest"}
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return json.dumps({**data, "digest": hashlib.sha256(text.encode()).hexdigest()}).encode()


def _damaged_bundle(rng: Random, copy: Callable[[str], Path]) -> Trial:
    """Honest: a file or the manifest changed after the export. Forged: the digests agree."""
    folder = copy("bundle")
    manifest = json.loads((folder / "bundle.json").read_bytes())
    weights = {weight["file"] for weight in manifest["weights"]}
    name = rng.choice(["bundle.json"] * len(manifest["files"]) + list(manifest["files"]))
    path, raw = folder / name, (folder / name).read_bytes()
    command = rng.choice(["run"] * 9 + ["check"] * 8 + ["inspect"] * 2 + ["score", "verify"])
    is_forged = rng.random() < 0.5
    allowed: Allowed = "any" if is_forged else "refused"
    if rng.random() < 0.1:
        elsewhere = folder.parent / "elsewhere"
        elsewhere.mkdir()
        damage = damage_file(rng, path, required=True, elsewhere=elsewhere)
        return Trial(
            argv=sound_command(command, "bundle"),
            note=f"{name}: {damage.note}",
            allowed=damage.allowed,
            seed="bundle",
        )
    if name == "bundle.json":
        new, damage = damage_json(rng, raw, typed=False)
        if is_forged:
            new = _sealed(new)
    else:
        new, damage = damage_bytes(rng, raw)
        if is_forged:
            record = {"bytes": len(new), "sha256": hashlib.sha256(new).hexdigest()}
            manifest["files"][name] = record
            (folder / "bundle.json").write_bytes(seal_manifest(manifest))
        elif name in weights and command != "check" and len(new) == len(raw):
            allowed = "any"  # hashing gigabytes is asked for with --check
    if not is_forged and (new == raw or (name == "bundle.json" and _same_json(new, raw))):
        allowed = "same"
    path.write_bytes(new)
    return Trial(
        argv=sound_command(command, "bundle"),
        note=f"{name}, {'forged' if is_forged else 'honest'} digest: {damage.note}",
        allowed=allowed,
        seed="bundle",
    )


def _sealed(raw: bytes) -> bytes:
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError):
        return raw
    return seal_manifest(data) if isinstance(data, dict) else raw


def _same_json(new: bytes, raw: bytes) -> bool:
    try:
        return json.dumps(json.loads(new)) == json.dumps(json.loads(raw))
    except (ValueError, RecursionError):
        return False


def _odd_options(rng: Random, seeds: Seeds, copy: Callable[[str], Path]) -> Trial:
    command = rng.choice(["generate"] * 20 + ["run"] * 20 + [*COMMANDS] * 2)
    seed = "bundle" if command in ("run", "inspect", "verify") else "hf"
    copy(seed)
    argv = sound_command(command, seed)
    options = seeds.options[command]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        name = rng.choice(list(options))
        word = odd_word(rng)
        match rng.randrange(12):
            case 0:
                argv.pop(rng.randrange(len(argv)))
            case 1:
                argv.insert(rng.randrange(len(argv) + 1), word)
            case 2:
                argv[rng.randrange(len(argv))] = word
            case 3:
                argv.insert(rng.randrange(1, len(argv) + 1), name)
            case 4:
                argv += [name[: rng.randrange(1, len(name) + 1)], word]
            case 5 | 6 | 7:
                argv.append(f"{name}={word}")
            case _:
                argv += [name, word] if options[name] else [name]
    # Last, and so what counts: nothing that is only slow, as compiling and rolling on for ever are.
    if "--backend" in options:
        argv += ["--backend", "eager"]
    if "--limit" in options:
        argv += ["--max-new-tokens", "2"] if "roll" in " ".join(argv) else []
    return Trial(argv=argv, note="options", allowed="any", seed="")
