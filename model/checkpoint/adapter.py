"""LoRA adapters, as PEFT saves them, merged into a checkpoint while it is read."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ...runtime.typed_json import named, shown
from ..config import DTYPES
from .adapter_settings import AdapterSettings, read_adapter_settings
from .pieces import LowRank, Merged, Part, Piece
from .stored import Checkpoint, StoredTensor, weight_shapes
from .tensor_files import TensorFile, open_safetensors

__all__ = ["merge_adapter"]

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_PREFIX = "base_model.model."
_BASE_PARTS = ("embed_tokens", "layers", "norm")  # of names, where a LlamaModel was adapted
_HEAD, _EMBEDDING = "lm_head", "model.embed_tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Weights:
    """What an adapter's file holds.

    Attributes:
        file: The file.
        factors: Module name to "A" and "B" to the file's name of the factor.
        whole: HF name to the file's name of a tensor that takes the place of the model's.
        prefix: What HF's names have and the names that were adapted haven't.
    """

    file: TensorFile
    factors: dict[str, dict[str, str]] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)
    prefix: str = ""


def merge_adapter(checkpoint: Checkpoint, folder: str | Path) -> Checkpoint:
    """Adds an adapter to a checkpoint: what it changes is computed block by block as it is read.

    Sums are float32, whatever the model is stored in, and rounded once to what they are copied to.
    Where a tied embedding or head is adapted, the two are tied no more: each gets its own change.

    Args:
        checkpoint: The adapter's base, of any format; what is adapted isn't quantized.
        folder: Holds adapter_config.json and adapter_model.safetensors.

    Returns:
        The checkpoint with the changed parts in place of its own.

    Raises:
        FileNotFoundError: The folder or a file of it is missing.
        ValueError: A file is damaged, it asks for more than a plain LoRA, its weights aren't those
            that its config and the model make, or the model's are quantized.
    """
    folder = Path(os.path.expanduser(folder))
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; an adapter is one, as PEFT saves it")
    settings = read_adapter_settings(folder / _CONFIG)
    weights = _sort(_open(folder))
    shapes = weight_shapes(replace(checkpoint.config, tie_word_embeddings=False))
    _check(settings, weights, shapes, checkpoint)
    changed = weights.whole.keys() | {f"{module}.weight" for module in weights.factors}
    if checkpoint.config.tie_word_embeddings and changed & {
        f"{_HEAD}.weight",
        f"{_EMBEDDING}.weight",
    }:
        checkpoint = _untie(checkpoint)
    parts: list[Part] = [part for part in checkpoint.pieces if part.name not in weights.whole]
    parts += [Piece(name=n, file=weights.file, key=key) for n, key in weights.whole.items()]
    tensors = dict(checkpoint.tensors)
    for name in changed:
        key = weights.whole.get(name)
        dtype = "float32" if key is None else weights.file.entries[key].dtype
        if name.removesuffix(".weight") in weights.factors:
            dtype = "float32"
        tensors[name] = StoredTensor(shape=shapes[name], dtype=dtype, file=None, offset=None)
    return replace(
        checkpoint,
        tensors=tensors,
        pieces=tuple(_merge(part, weights, settings) for part in parts),
        adapter=folder,
    )


def _open(folder: Path) -> TensorFile:
    if not (folder / _WEIGHTS).exists() and (folder / _PICKLE).exists():
        raise ValueError(
            f"{folder / _PICKLE}: holds pickled objects; save the adapter as {_WEIGHTS}"
        )
    return open_safetensors(folder / _WEIGHTS)


def _sort(file: TensorFile) -> _Weights:
    """Sorts the file's names into factors and whole tensors."""
    found = _Weights(file=file)
    if any(re.match(rf"{re.escape(_PREFIX)}({'|'.join(_BASE_PARTS)})\.", k) for k in file.entries):
        found = replace(found, prefix="model.")
    for key, entry in file.entries.items():
        if entry.dtype not in DTYPES:
            raise ValueError(
                f"{file.path}: tensor {key} is stored as {entry.dtype}; only {', '.join(DTYPES)} "
                "are supported"
            )
        name = f"{found.prefix}{key.removeprefix(_PREFIX)}"
        factor = re.fullmatch(r"(.+)\.lora_(?:([AB])\.weight|embedding_([AB]))", name)
        if not key.startswith(_PREFIX):
            raise ValueError(f"{file.path}: tensor {key} is none of a LoRA's that PEFT saved")
        if factor is not None:
            module, plain, embedding = factor.groups()
            if (embedding is not None) != (module == _EMBEDDING):
                raise ValueError(f"{file.path}: tensor {key} is not a factor of {shown(module)}")
            found.factors.setdefault(module, {})[plain or embedding] = key
            continue
        name = name.replace(".base_layer.", ".")
        if name in found.whole:
            raise ValueError(f"{file.path}: tensors {key} and {found.whole[name]} are the same")
        found.whole[name] = key
    return found


def _check(
    settings: AdapterSettings,
    weights: _Weights,
    shapes: Mapping[str, tuple[int, ...]],
    checkpoint: Checkpoint,
) -> None:
    """The file holds what the settings say of this model, and the model's own can be changed."""
    path = weights.file.path
    if not weights.factors and not weights.whole:
        raise ValueError(f"{path}: holds no weights")
    modules = {name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2}
    for module, keys in weights.factors.items():
        if module not in modules:
            raise _not_part(path, next(iter(keys.values())), checkpoint)
        rows, width = shapes[f"{module}.weight"]
        rank = settings.rank_of(module.removeprefix(weights.prefix))
        wanted = {"A": (rank, width), "B": (rows, rank)}
        if module == _EMBEDDING:
            wanted = {"A": (rank, rows), "B": (width, rank)}
        for letter, shape in wanted.items():
            if letter not in keys:
                raise ValueError(f"{path}: {module} has no lora_{letter}; copy the adapter again")
            found = weights.file.entries[keys[letter]].shape
            if found != shape:
                raise ValueError(
                    f"{path}: tensor {keys[letter]} has shape {list(found)}; {checkpoint.folder} "
                    f"and rank {rank} make it {list(shape)}"
                )
    for name, key in weights.whole.items():
        if name not in shapes:
            raise _not_part(path, key, checkpoint)
        if (found := weights.file.entries[key].shape) != shapes[name]:
            raise ValueError(
                f"{path}: tensor {key} has shape {list(found)}; {checkpoint.folder} makes it "
                f"{list(shapes[name])}"
            )
    adapted = settings.adapted(modules)
    replaced = {name for name in shapes if settings.is_replaced(name.rpartition(".")[0])}
    if adapted is not None and (missing := sorted(adapted - weights.factors.keys())):
        raise ValueError(
            f"{path}: has no weights for {named(missing)}, which {_CONFIG}'s target_modules name"
        )
    if adapted is not None and (extra := sorted(weights.factors.keys() - adapted)):
        raise ValueError(f"{path}: adapts {named(extra)}, which {_CONFIG}'s target_modules don't")
    if missing := sorted(replaced - weights.whole.keys()):
        raise ValueError(
            f"{path}: has no weights for {named(missing)}, which {_CONFIG}'s modules_to_save name"
        )
    _check_unpacked(weights, checkpoint)


def _not_part(path: Path, key: str, checkpoint: Checkpoint) -> ValueError:
    return ValueError(f"{path}: tensor {key} is not part of {checkpoint.folder}; name its model")


def _check_unpacked(weights: _Weights, checkpoint: Checkpoint) -> None:
    changed = [*weights.factors, *(name.rpartition(".")[0] for name in weights.whole)]
    for module in changed:
        own = _EMBEDDING if checkpoint.config.tie_word_embeddings and module == _HEAD else module
        if own in checkpoint.packed:
            raise ValueError(
                f"{checkpoint.folder}: {module} is quantized, and the adapter changes it; merge "
                "before quantizing: llamac quantize MODEL OUT RECIPE --adapter FOLDER"
            )


def _untie(checkpoint: Checkpoint) -> Checkpoint:
    """The same model with a head of its own, which is the embedding's bytes."""
    name, head = f"{_EMBEDDING}.weight", f"{_HEAD}.weight"
    parts = [replace(part, name=head) for part in checkpoint.pieces if part.name == name]
    stored = replace(checkpoint.tensors[name], file=None, offset=None)
    return replace(
        checkpoint,
        config=replace(checkpoint.config, tie_word_embeddings=False),
        tensors={**checkpoint.tensors, head: stored},
        pieces=(*checkpoint.pieces, *parts),
    )


def _merge(part: Part, weights: _Weights, settings: AdapterSettings) -> Part:
    module = part.name.removesuffix(".weight")
    keys = weights.factors.get(module)
    if keys is None:
        return part
    a, b = (Piece(name=keys[x], file=weights.file, key=keys[x]) for x in "AB")
    is_embedding = module == _EMBEDDING
    change = LowRank(
        left=a if is_embedding else b,
        right=b if is_embedding else a,
        scale=settings.scale_of(module.removeprefix(weights.prefix)),
        transposed=is_embedding,
    )
    return Merged(part=part, change=change)
