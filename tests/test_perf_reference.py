"""The gate before timing: what an error is compared with."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from llamac.perf.reference import Reference
from llamac.runtime.compare import TOLERANCE

LOGITS = np.array([[[4.0, 1.0, -2.0]], [[0.0, 3.0, 1.0]]], dtype=np.float32)


def check(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    *,
    precision: str,
    error: float,
    rounding: float,
    logits: np.ndarray = LOGITS,
) -> tuple[dict, list[str]]:
    """Shifts logits by errors that are shares of the largest; returns the result and the runs."""
    runs: list[str] = []

    def answer(_: Reference, dtype: str) -> np.ndarray:
        runs.append(dtype)
        return LOGITS + (0 if dtype == "float32" else 4.0 * rounding)

    monkeypatch.setattr(Reference, "_answer", answer)
    monkeypatch.setattr(Reference, "_ask", lambda _, worker: worker)
    sizes = SimpleNamespace(max_seq_len=32, prefill_len=8)
    plan = SimpleNamespace(
        setup=lambda *_, **__: sizes,
        model=SimpleNamespace(config=SimpleNamespace(vocab_size=3)),
    )
    result: dict = {"precision": precision, "status": "ok"}
    entry = SimpleNamespace(
        worker=logits + np.float32(4.0 * error),
        result=result,
        stop=lambda status, _: result.update(status=status),
    )
    Reference(plan, tmp_path, batch_size=1).check(entry)  # type: ignore[arg-type]
    return result, runs


def test_a_small_error_needs_no_second_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    result, runs = check(monkeypatch, tmp_path, precision="bfloat16", error=0.03, rounding=0.5)
    assert (result["status"], runs) == ("ok", ["float32"])


@pytest.mark.parametrize(
    ("error", "rounding", "status"),
    [(0.07, 0.06, "ok"), (0.07, 0.032, "FAIL"), (0.1, 0.06, "FAIL"), (0.05, 0.001, "FAIL")],
)
def test_rounding_is_measured_on_the_eager_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: float, rounding: float, status: str
):
    result, runs = check(
        monkeypatch, tmp_path, precision="bfloat16", error=error, rounding=rounding
    )
    assert (result["status"], runs) == (status, ["float32", "bfloat16"])
    assert f"{max(1.5 * rounding, TOLERANCE['bfloat16']):.0e}" in result["check"]["message"]


def test_a_wrong_prediction_fails_whatever_rounding_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    wrong = LOGITS[..., [1, 0, 2]]
    result, _ = check(
        monkeypatch, tmp_path, precision="bfloat16", error=0.0, rounding=0.06, logits=wrong
    )
    assert result["status"] == "FAIL"


def test_float32_has_one_tolerance(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    result, runs = check(monkeypatch, tmp_path, precision="float32", error=0.01, rounding=0.5)
    assert (result["status"], runs) == ("FAIL", ["float32"])
