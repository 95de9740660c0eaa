"""Writes a checkpoint anew with packed weights, a layer or a block of rows at a time."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ...runtime.atomic_write import new_folder
from ...runtime.bundle.manifest import TOKENIZER_NAMES
from ...runtime.cache_folder import cache_folder
from ...runtime.memory import format_bytes
from ...runtime.text.tokenizer_files import load_tokenizer
from ..checkpoint import Checkpoint, open_checkpoint
from ..checkpoint.dequantized import read_dequantized
from ..checkpoint.quantized import quantization_settings
from ..checkpoint.stored import copy_finite, weight_shapes
from .calibration import CALIBRATION_TEXT, LayerInputs, calibration_ids
from .packed_writer import PackedWriter, QuantizedKind
from .recipe import Recipe
from .rounding import InputMoments, input_moments

__all__ = ["QuantizedKind", "quantize_checkpoint", "quantized_copy"]

logger = logging.getLogger(__name__)

_FILE = "model.safetensors"
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_LAYERS = "model.layers."
_ROUNDING = (
    "rounding.py",
    "calibration.py",
    "calibration.txt",
)  # what may change what a recipe makes


def quantize_checkpoint(
    checkpoint: Checkpoint,
    out: Path,
    recipe: Recipe,
    *,
    calibration: str | None = CALIBRATION_TEXT,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[QuantizedKind, ...]:
    """Writes a Hugging Face folder of packed weights, with all that is beside them.

    The model reads a text, a layer at a time, and each weight of a layer is rounded so that what
    it makes of the text changes least; a checkpoint without a tokenizer reads none. What is written
    is compressed-tensors' pack-quantized, which transformers and vLLM read. A tied head becomes a
    packed one of its own beside the embedding, which has no packed form that others read.

    Args:
        checkpoint: Of any format; packed weights are unpacked first.
        out: A new name, or an empty folder.
        recipe: Which weight gets how many bits.
        calibration: The text; None rounds to the nearest values.
        progress: Called with the weights done and their number.

    Returns:
        The kinds of weights, in the order in which they first appear.

    Raises:
        ValueError: `out` is in use, a weight isn't finite, the text is empty, or the disk is too
            small; nothing is left behind.
    """
    ids = None if calibration is None else _encode(checkpoint, calibration)
    config = replace(checkpoint.config, tie_word_embeddings=False)
    shapes = weight_shapes(config)
    packed = recipe.formats(config, shapes)
    plain = tuple(
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if len(shape) == 2 and name.removesuffix(".weight") not in packed and name != _EMBEDDING
    )
    total, done = sum(map(math.prod, shapes.values())), 0

    def tell(name: str) -> None:
        nonlocal done
        done += math.prod(shapes[name])
        progress(done, total)

    num_cores = len(os.sched_getaffinity(0))
    with new_folder(out) as folder, ThreadPoolExecutor(num_cores) as pool:
        writer = PackedWriter(
            folder / _FILE,
            shapes,
            packed,
            dtype=config.dtype,
            source=str(checkpoint.folder),
            pool=pool,
        )
        free_bytes = shutil.disk_usage(folder).free
        if writer.num_bytes > free_bytes:
            raise ValueError(
                f"{out}: needs {format_bytes(writer.num_bytes)}, {format_bytes(free_bytes)} are "
                "free there"
            )
        writer.create()
        if ids is not None:
            inputs = LayerInputs(config, _embed(checkpoint, ids))
            _round_layers(checkpoint, writer, inputs, tell)
        for name in shapes:
            if ids is None or not name.startswith(_LAYERS):
                for rows, part in _read(checkpoint, name):
                    writer.add(name, rows, part)
                tell(name)
        facts = {**config.to_dict(), "quantization_config": quantization_settings(packed, plain)}
        text = json.dumps(facts, indent=2) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")
        for side in TOKENIZER_NAMES:
            if (checkpoint.side_folder / side).is_file():
                shutil.copyfile(checkpoint.side_folder / side, folder / side)
    if calibration is not None and ids is None:
        logger.warning("%s has no tokenizer: rounded without a text", checkpoint.folder)
    return writer.summary()


def quantized_copy(
    checkpoint: Checkpoint, recipe: Recipe, *, progress: Callable[[str], None] = lambda _: None
) -> Checkpoint:
    """Quantizes a checkpoint into the user's cache, once.

    Args:
        checkpoint: What is quantized; the copy is known by its files' names, sizes and times, an
            adapter's among them, and replaces one of what they were before.
        recipe: Which weight gets how many bits.
        progress: Told what is being done.

    Returns:
        The packed checkpoint.

    Raises:
        ValueError: See quantize_checkpoint.
    """
    common, rest = _name(checkpoint, recipe)
    parent = cache_folder("quantized")
    folder = parent / f"{common}{rest}"
    if folder.exists():
        try:
            return open_checkpoint(folder)
        except (ValueError, OSError) as error:
            logger.warning("%s; it is made again", error)
            shutil.rmtree(folder)
    quantize_checkpoint(
        checkpoint,
        folder,
        recipe,
        progress=lambda done, total: progress(f"quantizing, {done / total:.0%}"),
    )
    for older in parent.glob(f"{common}-*"):
        if older != folder:  # of files that have changed since
            shutil.rmtree(older, ignore_errors=True)
    return open_checkpoint(folder)


def _encode(checkpoint: Checkpoint, text: str) -> Tensor | None:
    """A text's ids; None where there is no tokenizer."""
    try:
        tokenizer = load_tokenizer(checkpoint.side_folder)
    except FileNotFoundError:
        return None
    return calibration_ids(tokenizer, text)


def _embed(checkpoint: Checkpoint, ids: Tensor) -> Tensor:
    """[n, T, E] float32 of ids [n, T]."""
    hidden = torch.zeros(*ids.shape, checkpoint.config.hidden_size)
    for rows, part in _read(checkpoint, _EMBEDDING):
        is_here = (ids >= rows.start) & (ids < rows.start + len(part))
        hidden[is_here] = part[ids[is_here] - rows.start].float()
    return hidden


def _round_layers(
    checkpoint: Checkpoint, writer: PackedWriter, inputs: LayerInputs, tell: Callable[[str], None]
) -> None:
    """Writes all layers, their weights rounded for what the layers before them make of the text."""
    seen: tuple[Tensor, Sequence[InputMoments]] | None = None

    def fill(prefix: str, name: str, target: Tensor) -> None:
        name = prefix + name
        for rows, part in _read(checkpoint, name):
            copy_finite(f"{checkpoint.folder}: {name}", part, target[rows])
            if not writer.is_packed(name):
                writer.add(name, rows, part)
        if not writer.is_packed(name):
            tell(name)

    def substitute(prefix: str, module: str, weight: Tensor, x: Tensor) -> None:
        nonlocal seen
        name = f"{prefix}{module}.weight"
        if writer.is_packed(name):
            if seen is None or seen[0] is not x:
                seen = x, input_moments(x)
            writer.replace(name, weight, seen[1])
            tell(name)

    for index in range(checkpoint.config.num_hidden_layers):
        prefix = f"{_LAYERS}{index}."
        inputs.run(partial(fill, prefix), partial(substitute, prefix))


def _read(checkpoint: Checkpoint, name: str) -> Iterator[tuple[slice, Tensor]]:
    """A weight in float32 or as stored, by rows; a tied head is the embedding."""
    if name == _HEAD and checkpoint.config.tie_word_embeddings:
        name = _EMBEDDING
    yield from read_dequantized(checkpoint, name)


def _name(checkpoint: Checkpoint, recipe: Recipe) -> tuple[str, str]:
    """Of a copy: what all copies of the source have in common, and the rest for its files now."""
    folders = {checkpoint.folder, checkpoint.side_folder}
    paths = {piece.file.path for piece in checkpoint.pieces}
    own = str(min(paths).resolve())
    if checkpoint.adapter is not None:
        own += f" {checkpoint.adapter.resolve()}"
        folders.add(checkpoint.adapter)
        paths.update(checkpoint.adapter.glob("*.safetensors"))
    paths |= {path for folder in folders for path in folder.glob("*.json")}
    paths |= {checkpoint.side_folder / name for name in TOKENIZER_NAMES}
    facts = [
        (str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(paths)
        if path.is_file()
    ]
    config = checkpoint.config
    # What a recipe is, and how it rounds, may change.
    forms = sorted(recipe.formats(config, weight_shapes(config)).items())
    rounding = [Path(__file__).with_name(name).read_bytes() for name in _ROUNDING]
    return f"{_digest(own)}-{recipe.name}", f"-{_digest(repr((facts, forms, rounding)))}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]
