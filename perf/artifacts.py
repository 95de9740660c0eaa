"""The model that is measured, and what the systems make of it, in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ..model.checkpoint import open_checkpoint
from ..model.checkpoint.presets import preset_config, preset_names
from ..model.checkpoint.random_weights import write_random_checkpoint
from ..model.config import LlamaConfig
from ..model.load import DEMO_FOLDER
from ..runtime.bundle.manifest import MANIFEST_NAME
from .process import Worker
from .setup import Setup
from .stand_in_tokenizer import write_stand_in_tokenizer
from .systems import SYSTEMS

__all__ = ["SMALL", "Model", "build_artifact", "find_model", "quantize_model"]

# Large enough that a step on two cores is not all overhead, small enough for a coffee break.
SMALL = LlamaConfig(
    vocab_size=32_000,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    max_position_embeddings=2048,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What is measured.

    Attributes:
        name: As it was asked for.
        folder: The checkpoint, or its one file.
        config: Its facts.
        bundle: The folder again, if it is a bundle.
    """

    name: str
    folder: Path
    config: LlamaConfig
    bundle: Path | None


def find_model(
    name: str | None,
    *,
    dtype: str,
    cache: Path,
    layers: int | None = None,
    announce: Callable[[str], None],
) -> Model:
    """Finds a checkpoint or bundle, or writes a preset's once: random weights and tokenizer.

    Args:
        name: A path, a name in the local Hugging Face cache, "small", a preset's name, or None
            for the demo model.
        dtype: Of random weights.
        cache: Where random weights are kept.
        layers: A preset's depth, if not its own.
        announce: Told before something large is written.

    Returns:
        The model.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: The checkpoint is refused; the message says why.
    """
    if layers is not None and name != "small" and name not in preset_names():
        raise ValueError(f"--layers is for `small` and the presets, not for {name or 'the demo'}")
    if name is None:
        folder = DEMO_FOLDER
    elif name == "small" or name in preset_names():
        config = SMALL if name == "small" else preset_config(name)
        if layers is not None:
            config = replace(config, num_hidden_layers=layers)
        folder = cache / f"{name}-{config.num_hidden_layers}-{dtype}-{_digest(config.to_dict())}"
        if not (folder / "config.json").exists():
            announce(f"writing {name} with random weights to {folder}")
            shutil.rmtree(folder, ignore_errors=True)
            write_random_checkpoint(None, folder, dtype=dtype, config=config)
        if not (folder / "tokenizer.json").exists():
            write_stand_in_tokenizer(folder, config.vocab_size)
    else:
        folder = Path(os.path.expanduser(name))
    checkpoint = open_checkpoint(folder if folder.exists() else str(name))
    bundle = folder if (folder / MANIFEST_NAME).exists() else None
    return Model(
        name=name or "demo", folder=checkpoint.folder, config=checkpoint.config, bundle=bundle
    )


def build_artifact(setup: Setup, cache: Path, logs: Path) -> tuple[Setup, float | None]:
    """Builds what a system loads from, unless it is there.

    Args:
        setup: The system.
        cache: Where artifacts are kept.
        logs: See Worker.

    Returns:
        The setup with its artifact, on the quantized checkpoint if the system wants one, and the
        seconds it took; None if nothing was built.

    Raises:
        BackendUnavailableError: Something isn't installed.
        WorkerError: The build failed.
    """
    system = SYSTEMS[setup.system]
    build_s = None
    if system.on_quantized:
        assert system.weights is not None
        setup, build_s = quantize_model(setup, system.weights, cache, logs)
    if system.artifact is None or setup.artifact is not None:
        return setup, build_s
    out, more_s = _build_once("build", system.artifact(setup), setup, cache, logs)
    spent = [seconds for seconds in (build_s, more_s) if seconds is not None]
    return replace(setup, artifact=str(out)), sum(spent) if spent else None


def quantize_model(
    setup: Setup, weights: str, cache: Path, logs: Path
) -> tuple[Setup, float | None]:
    """Quantizes a setup's checkpoint as `llamac quantize` does, unless that has been done.

    Args:
        setup: Of any system.
        weights: "int8" or "int4".
        cache: Where the copy is kept.
        logs: See Worker.

    Returns:
        The setup on the copy, and the seconds it took; None if nothing was written.

    Raises:
        WorkerError: It failed.
    """
    out, build_s = _build_once(
        "quantize", f"quantized-{weights}", setup, cache, logs, weights=weights
    )
    return replace(setup, model=str(out)), build_s


def _build_once(
    command: str, name: str, setup: Setup, cache: Path, logs: Path, **arguments: str
) -> tuple[Path, float | None]:
    """Has a worker write a folder of that name, unless it is there for the checkpoint as it is."""
    # A changed checkpoint has another date; reading its weights for a hash would take seconds.
    source = Path(setup.model)
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    stamp = _digest([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files])
    out = cache / f"{name}-{stamp}"
    if out.exists():
        return out, None
    partial = out.with_name(f"{out.name}.new")
    shutil.rmtree(partial, ignore_errors=True)
    with Worker(f"{setup.system}-{command}", logs, threads=setup.threads) as worker:
        build_s = worker.call(command, setup=setup, out=str(partial), **arguments)["build_s"]
    partial.rename(out)
    return out, build_s


def _digest(value: object) -> str:
    text = json.dumps(value, default=str, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
