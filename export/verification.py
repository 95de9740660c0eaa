"""What verifying a bundle found: as a table, as JSON, as a report in the bundle's folder."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from ..runtime.atomic_write import write_file
from ..runtime.bundle.manifest import REPORTS_NAME
from ..runtime.cli.text_table import format_table
from ..runtime.compare import Comparison, Quality
from ..runtime.memory import format_bytes
from .engine_build import EngineBuild

__all__ = [
    "GroupResult",
    "LeftOut",
    "RunResult",
    "Verification",
    "format_verification",
    "verification_json",
    "write_report",
]

logger = logging.getLogger(__name__)

_HEAD = (
    "provider",
    "target",
    "dtype",
    "group",
    "result",
    "rows",
    "max error",
    "relative",
    "KL",
    "top-1",
    "top-5",
    "first divergence",
    "perplexity",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """What was not compared, and why.

    Attributes:
        provider: Of the backend.
        target: Of the graphs; None is all of them.
        reason: One line.
    """

    provider: str
    target: str | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupResult:
    """One group of calls on one backend.

    Attributes:
        name: What the group shows.
        passed: Whether logits and perplexity are within the tolerance.
        skipped: Why there is nothing to compare, or None.
        comparison: Of the logits; None if skipped.
        divergence: Slot and position of the first id that greedy generation would choose
            otherwise, or None.
        perplexity: Of the text on the backend; None in other groups.
        reference_perplexity: And on the reference.
    """

    name: str
    passed: bool
    skipped: str | None = None
    comparison: Comparison | None = None
    divergence: tuple[int, int] | None = None
    perplexity: float | None = None
    reference_perplexity: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """One provider on the graphs of one target.

    Attributes:
        provider: Who ran.
        target: Whose graphs.
        dtype: Of the graphs' activations; "int8" where products with packed weights round them.
        tolerance: Of an error, as a share of the largest logit, and of the perplexity's change.
        groups: In the order they ran.
        quality: Of packed weights, by the model they were made of; None where that isn't given.
    """

    provider: str
    target: str
    dtype: str
    tolerance: float
    groups: tuple[GroupResult, ...]
    quality: Quality | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """The outcome.

    Attributes:
        passed: Whether everything that ran is right.
        time: When, in ISO 8601.
        bundle: The bundle's folder.
        digest: The bundle's.
        reference: The checkpoint's folder.
        text: Where the text came from.
        num_text_tokens: Tokens of it that were fed.
        num_given_tokens: Tokens it has.
        versions: Of the libraries.
        machine: Processor and system.
        runs: What was compared.
        left_out: What was not.
        engines: What TensorRT for RTX built; None if it wasn't asked for.
    """

    passed: bool
    time: str
    bundle: str
    digest: str
    reference: str
    text: str
    num_text_tokens: int
    num_given_tokens: int
    versions: dict[str, str]
    machine: str
    runs: tuple[RunResult, ...]
    left_out: tuple[LeftOut, ...]
    engines: tuple[EngineBuild, ...] | None


def format_verification(result: Verification) -> str:
    """Writes the outcome as people read it.

    Args:
        result: The outcome.

    Returns:
        A table and a verdict, in lines.
    """
    given = f"{result.num_text_tokens} of {result.num_given_tokens} tokens"
    lines = [
        f"{result.bundle} against {result.reference}, eager in float32; text: {given} of "
        f"{result.text}"
    ]
    if result.runs or result.left_out:
        rows = [_HEAD, *_run_rows(result.runs)]
        rows += [(x.provider, x.target or "all", f"left out: {x.reason}") for x in result.left_out]
        lines.append(format_table(rows))
    lines += [
        f"{run.provider} on {run.target} graphs, {run.quality}"
        for run in result.runs
        if run.quality is not None
    ]
    lines += [line for engine in result.engines or () for line in _engine_lines(engine)]
    num_failed = sum(not group.passed for run in result.runs for group in run.groups)
    num_failed += sum(not engine.passed for engine in result.engines or ())
    limits = {run.dtype: run.tolerance for run in result.runs}
    may = ", ".join(f"{dtype} may have {limit:g}" for dtype, limit in limits.items())
    lines.append(
        ("PASS" if result.passed else f"FAIL: {num_failed} failed")
        + (f" (relative error: {may})" if may else "")
    )
    return "\n".join(lines)


def verification_json(result: Verification) -> str:
    """Writes the outcome as JSON.

    Args:
        result: The outcome.

    Returns:
        One object; a number that isn't finite is null.
    """
    return json.dumps(_finite(asdict(result)), indent=1)


def write_report(result: Verification, bundle: Path) -> Path | None:
    """Adds the outcome to the bundle's reports, under the date and time.

    Args:
        result: The outcome.
        bundle: The bundle's folder.

    Returns:
        The report; None, and a warning, where the bundle can't be written to.
    """
    folder = bundle / REPORTS_NAME
    path = folder / f"verify-{datetime.now():%Y%m%d-%H%M%S-%f}.json"
    try:
        folder.mkdir(exist_ok=True)
        write_file(path, verification_json(result) + "\n")
    except OSError as error:
        logger.warning("no report is kept: %s can't be written (%s)", folder, error.strerror)
        return None
    return path


def _run_rows(runs: tuple[RunResult, ...]) -> Iterator[tuple[str, ...]]:
    for run in runs:
        for group in run.groups:
            place = (run.provider, run.target, run.dtype, group.name)
            found = group.comparison
            if found is None:
                yield (*place, f"left out: {group.skipped}")
                continue
            yield (
                *place,
                "ok" if group.passed else "FAIL",
                str(found.num_predictions),
                f"{found.max_abs_error:.1e}",
                f"{found.relative_error:.1e}",
                f"{found.max_kl_nats:.1e}",
                f"{found.top1_agreement:.1%}",
                f"{found.top5_agreement:.1%}",
                _place(group.divergence),
                _perplexity(group),
            )


def _place(divergence: tuple[int, int] | None) -> str:
    return "none" if divergence is None else f"slot {divergence[0]}, position {divergence[1]}"


def _perplexity(group: GroupResult) -> str:
    ours, theirs = group.perplexity, group.reference_perplexity
    if ours is None or theirs is None:
        return ""
    return f"{ours:.4f} ({ours / theirs - 1:+.1e})"


def _engine_lines(engine: EngineBuild) -> list[str]:
    if engine.passed:
        return [
            f"engine of {engine.file}: ok, {engine.num_cache_updates} caches in place, "
            f"{format_bytes(engine.engine_bytes)}, built in {engine.build_s:.1f} s"
        ]
    return [f"engine of {engine.file}: FAIL: {problem}" for problem in engine.problems]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
