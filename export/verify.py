"""A bundle's logits against the eager float32 model, on every backend that runs here."""

from __future__ import annotations

import gc
import platform
from collections.abc import Callable, Sequence
from datetime import datetime
from importlib.metadata import version

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from ..model.checkpoint import Checkpoint, open_checkpoint
from ..model.checkpoint.hf_format import checkpoint_of
from ..model.checkpoint.pieces import Piece
from ..model.checkpoint.tensor_files import open_safetensors
from ..model.load import load_backend, static_shape
from ..runtime.backend import BackendUnavailableError
from ..runtime.bundle.manifest import Manifest, ModelSizes
from ..runtime.bundle.memory_needs import OF_TENSORRT
from ..runtime.chunks import check_prompt
from ..runtime.compare import (
    TOLERANCE,
    Quality,
    compare_logits,
    measure_quality,
    perplexity,
)
from ..runtime.ort.ort_backend import OrtBackend, check_choice
from ..runtime.ort.providers import PROVIDERS, provider_problem
from ..runtime.text.tokenizer_files import load_tokenizer
from .engine_build import build_engines
from .forced_steps import Group, record_groups, replay
from .verification import GroupResult, LeftOut, RunResult, Verification

__all__ = ["bundle_checkpoint", "choose_runs", "verify_bundle"]

_TEXT = (
    "Once upon a time there was a small red boat that lived by the sea. Every morning it looked "
    "at the waves and wanted to see the big island. One day a girl named Mia came with her dog. "
    '"Do you want to sail with us?" she asked. The boat was very happy. They went out together, '
    "and when the sun was low they came home and told everyone what they had found."
)
_MAX_TEXT_TOKENS = 256
_NUM_DRAWN = 64  # ids where there is no tokenizer
_SEED = 1
_INT8_LEVEL = 4  # of MatMulNBits


def verify_bundle(
    manifest: Manifest,
    *,
    against: str | None = None,
    providers: Sequence[str] = (),
    targets: Sequence[str] = (),
    text: str | None = None,
    engine_build: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Verification:
    """Compares a bundle with the eager float32 model; one of them is in memory at a time.

    Args:
        manifest: The bundle.
        against: The checkpoint of the reference; None takes the bundle's own weights. A bundle of
            packed weights is always proved equal to its own; from this one, which they were made
            of, it is said how far they are.
        providers: Who runs; () is everyone that can.
        targets: Which graphs; () is all.
        text: Whose perplexity is compared; None takes a short story, or drawn ids where the
            bundle has no tokenizer.
        engine_build: Also build the `tensorrt` graphs into engines.
        progress: Told what is being done.

    Returns:
        The outcome.

    Raises:
        FileNotFoundError: There is no such checkpoint, or no tokenizer for the text.
        ValueError: What was asked for doesn't fit the bundle.
        BackendUnavailableError: What was asked for, or all there is, can't run here.
    """
    runs, left_out = choose_runs(manifest, providers, targets)
    if not runs and not engine_build:
        reason = next((item for item in left_out if item.target), left_out[0]).reason
        raise BackendUnavailableError(f"no graph of {manifest.folder} runs here: {reason}")
    own, given = bundle_checkpoint(manifest), None if against is None else open_checkpoint(against)
    if given is not None:
        _check_sizes(manifest, given)
    original = given if own.packed else None
    checkpoint = own if original is not None or given is None else given
    text_ids, origin = _text_ids(manifest, text)
    fed_ids = text_ids[: min(_MAX_TEXT_TOKENS, manifest.shape.max_seq_len)]
    engines = tuple(build_engines(manifest, progress=progress)) if engine_build else None
    results = _compare(manifest, checkpoint, original, runs, fed_ids, progress)
    return Verification(
        passed=all(group.passed for run in results for group in run.groups)
        and all(engine.passed for engine in engines or ()),
        time=datetime.now().astimezone().isoformat(timespec="seconds"),
        bundle=str(manifest.folder),
        digest=manifest.digest,
        reference=str(checkpoint.folder),
        text=origin,
        num_text_tokens=len(fed_ids),
        num_given_tokens=len(text_ids),
        versions={
            "python": platform.python_version(),
            "onnxruntime": onnxruntime.__version__,
            **{name: version(name) for name in ("llamac", "numpy", "torch")},
        },
        machine=f"{platform.machine()}, {platform.platform()}",
        runs=tuple(results),
        left_out=tuple(left_out),
        engines=engines,
    )


def choose_runs(
    manifest: Manifest, providers: Sequence[str], targets: Sequence[str]
) -> tuple[list[tuple[str, str]], list[LeftOut]]:
    """Pairs providers with the graphs they run.

    Args:
        manifest: The bundle.
        providers: Asked for; () is all.
        targets: Asked for; () is all of the bundle's.

    Returns:
        Pairs of provider and target, and what was left out.

    Raises:
        ValueError: A target that was asked for isn't in the bundle, or no provider runs it.
        BackendUnavailableError: A provider that was asked for lacks something here.
    """
    runs: list[tuple[str, str]] = []
    left_out: list[LeftOut] = []
    for provider in dict.fromkeys(providers or PROVIDERS):
        if problem := provider_problem(provider):
            if provider in providers:
                raise BackendUnavailableError(f"--provider {provider}: {problem}")
            left_out.append(LeftOut(provider=provider, target=None, reason=problem))
            continue
        for target in dict.fromkeys(targets or manifest.targets):
            try:
                runs.append((provider, check_choice(manifest, provider, target)))
            except ValueError as error:
                left_out.append(LeftOut(provider=provider, target=target, reason=str(error)))
    for provider in providers:
        if provider not in {pair[0] for pair in runs}:
            raise ValueError(next(x.reason for x in left_out if x.provider == provider))
    for target in targets:
        if target not in {pair[1] for pair in runs}:
            manifest.find_graph("decode", target)
            raise ValueError(next(x.reason for x in left_out if x.target in (target, None)))
    return runs, left_out


def bundle_checkpoint(manifest: Manifest) -> Checkpoint:
    """Opens a bundle's own weights, in float32 where it has them so.

    An export to a narrower dtype can leave two files of the same weights, and only the manifest
    says which is which.

    Args:
        manifest: The bundle.

    Returns:
        The checkpoint.
    """
    pieces: dict[str, Piece] = {}
    for file in manifest.weights:
        opened = open_safetensors(manifest.folder / file.file)
        for name in file.tensors:
            if name.startswith("rope.") or name.endswith(OF_TENSORRT):
                continue
            if name not in pieces or file.tensors[name].dtype == "float32":
                pieces[name] = Piece(name=name, file=opened, key=name)
    return checkpoint_of(manifest.folder, pieces)


def _check_sizes(manifest: Manifest, checkpoint: Checkpoint) -> None:
    config, shape = checkpoint.config, manifest.shape
    wanted = {name: getattr(manifest.model, name) for name in ModelSizes.__slots__}
    wanted["vocab_size"] = shape.vocab_size
    for name, size in wanted.items():
        if getattr(config, name) != size:
            raise ValueError(
                f"{checkpoint.folder}: {name} is {getattr(config, name)}, the bundle's {size}; "
                "name the checkpoint it was exported from"
            )
    if static_shape(config, max_seq_len=shape.max_seq_len).num_positions != shape.num_positions:
        raise ValueError(
            f"{checkpoint.folder}: max_position_embeddings is {config.max_position_embeddings}, "
            f"the bundle has {shape.num_positions} RoPE rows; name the checkpoint it was exported "
            "from"
        )


def _text_ids(manifest: Manifest, text: str | None) -> tuple[list[int], str]:
    """The ids that are fed one by one, and where they come from."""
    try:
        tokenizer = load_tokenizer(manifest.folder)
    except FileNotFoundError:
        if text is not None:
            raise
        random = np.random.default_rng(_SEED)
        return random.integers(0, manifest.shape.vocab_size, _NUM_DRAWN).tolist(), "drawn ids"
    ids = tokenizer.encode(_TEXT if text is None else text)
    if len(ids) < 2:
        raise ValueError(f"the text has {len(ids)} tokens; a perplexity needs at least 2")
    check_prompt(ids[: manifest.shape.max_seq_len], manifest.shape)
    return ids, "a short story" if text is None else "the text given"


def _compare(
    manifest: Manifest,
    checkpoint: Checkpoint,
    original: Checkpoint | None,
    runs: Sequence[tuple[str, str]],
    text_ids: Sequence[int],
    progress: Callable[[str], None],
) -> list[RunResult]:
    if not runs:
        return []
    groups = _record(manifest, checkpoint, text_ids, progress)
    expected = None
    if original is not None:
        expected = np.stack(_record(manifest, original, text_ids, progress)[0].logits)
    results: list[RunResult] = []
    for provider, target in runs:
        backend = OrtBackend(
            manifest,
            provider=provider,
            target=target,
            speculate=manifest.shape.num_guesses > 0,
            progress=progress,
        )
        graph = manifest.find_graph("decode", target)
        dtype = "int8" if graph.accuracy_level == _INT8_LEVEL else graph.dtype
        compared: list[GroupResult] = []
        for group in groups:
            progress(f"{provider} on {target} graphs: {group.name}")
            compared.append(_compare_group(backend, group, dtype, text_ids))
        results.append(
            RunResult(
                provider=provider,
                target=target,
                dtype=dtype,
                tolerance=TOLERANCE[dtype],
                groups=tuple(compared),
                quality=_quality(backend, groups[0], expected, text_ids),
            )
        )
        del backend
        gc.collect()
    return results


def _record(
    manifest: Manifest,
    checkpoint: Checkpoint,
    text_ids: Sequence[int],
    progress: Callable[[str], None],
) -> list[Group]:
    shape = manifest.shape
    reference = load_backend(
        checkpoint,
        compile=False,
        dtype="float32",
        batch_size=shape.batch_size,
        max_seq_len=shape.max_seq_len,
        prefill_len=shape.prefill_lens,
        num_guesses=shape.num_guesses,
        progress=progress,
    ).backend
    groups = record_groups(
        reference,
        text_ids,
        bos_token_id=manifest.bos_token_id,
        row_buckets=manifest.row_buckets,
        progress=progress,
    )
    del reference
    gc.collect()  # before another copy of the weights is loaded
    return groups


def _quality(
    backend: OrtBackend,
    group: Group,
    original: NDArray[np.float32] | None,
    text_ids: Sequence[int],
) -> Quality | None:
    if original is None or len(text_ids) < 2:
        return None
    found = replay(backend, group)
    return measure_quality(original[:-1], found[:-1], text_ids[1:])


def _compare_group(
    backend: OrtBackend, group: Group, dtype: str, text_ids: Sequence[int]
) -> GroupResult:
    if group.skipped is not None:
        return GroupResult(name=group.name, passed=True, skipped=group.skipped)
    expected, found = np.stack(group.logits), replay(backend, group)
    comparison = compare_logits(expected, found, dtype)
    first = comparison.first_divergence
    passed = comparison.passed
    perplexities: tuple[float | None, float | None] = (None, None)
    if group.name == "text" and len(text_ids) > 1:
        next_ids = np.array(text_ids[1:])
        ours, theirs = (perplexity(logits[:-1], next_ids) for logits in (found, expected))
        passed = passed and abs(ours / theirs - 1) <= TOLERANCE[dtype]
        perplexities = (ours, theirs)
    return GroupResult(
        name=group.name,
        comparison=comparison,
        divergence=None if first is None else group.places[first],
        perplexity=perplexities[0],
        reference_perplexity=perplexities[1],
        passed=passed,
    )
