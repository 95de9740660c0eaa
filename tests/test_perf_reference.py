"""The gate before timing: real systems at it, and what an error is compared with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from llamac.model.checkpoint.random_weights import write_random_checkpoint
from llamac.model.config import LlamaConfig
from llamac.perf.artifacts import build_artifact, find_model
from llamac.perf.plan import Entry, Plan
from llamac.perf.reference import Reference, judge, judge_quantized
from llamac.runtime.compare import TOLERANCE

pytestmark = pytest.mark.slow

CONFIG = LlamaConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=1024,
)


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Reference]:
    folder = tmp_path_factory.mktemp("reference")
    plan = make_plan(folder)
    return plan, Reference(plan, folder, batch_size=1)


def make_plan(folder: Path, seed: int = 0, **changes: Any) -> Plan:
    """A plan for one system with random weights, and a config that may differ."""
    checkpoint = folder / f"model-{seed}-{len(changes)}"
    config = replace(CONFIG, **changes)
    write_random_checkpoint(None, checkpoint, config=config, dtype="float32", seed=seed)
    weights = load_file(checkpoint / "model.safetensors")
    for name in weights:
        if "q_proj" in name or "k_proj" in name:
            weights[name] *= 15  # of so few columns, else attention would be a plain mean
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    model = find_model(str(checkpoint), dtype="float32", cache=folder, announce=lambda _: None)
    return Plan(
        model=model,
        systems=("eager",),
        device="cpu",
        dtype="float32",
        threads=1,
        max_seq_len=1024,
        prefill_len=8,
        trials=5,
        cold=False,
        cache=folder,
        logs=folder / "logs",
        options={},
        say=lambda _: None,
    )


def check(plan: Plan, reference: Reference) -> dict[str, Any]:
    """Starts the plan's system and puts it to the gate."""
    entry = Entry.of(plan, "eager", batch_size=1)
    ready = entry.start(plan)
    entry.result |= {key: ready[key] for key in ("precision", "facts")}
    reference.check(entry)
    entry.close()
    return entry.result


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_itself_is_right(dtype: str, gate: tuple[Plan, Reference]) -> None:
    plan, reference = gate
    result = check(replace(plan, dtype=dtype), reference)
    assert (result["status"], result["precision"]) == ("ok", dtype)
    assert result["check"]["message"].startswith("16 of 16 predictions agree")
    assert len(result["check"]["errors"]) == 2
    assert max(result["check"]["errors"]) < TOLERANCE[dtype]


def test_other_weights_are_wrong(gate: tuple[Plan, Reference], tmp_path: Path) -> None:
    result = check(make_plan(tmp_path, seed=1), gate[1])
    assert result["status"] == "FAIL"
    assert "wrong logits" in result["message"]


def test_what_is_wrong_at_late_positions_only_is_wrong(
    gate: tuple[Plan, Reference], tmp_path: Path
) -> None:
    """Logits used to be compared below position 150 alone, and sweeps reach thousands."""
    # Its angles stray with the position.
    near = make_plan(tmp_path, rope_theta=CONFIG.rope_theta * (1 + 1e-3))
    result = check(near, gate[1])
    assert result["status"] == "FAIL"
    assert result["message"].endswith("at the end of the cache")
    early, late = result["check"]["errors"]
    assert early < TOLERANCE["float32"] < late


LOGITS = np.array([[[4.0, 1.0, -2.0]], [[0.0, 3.0, 1.0]]], dtype=np.float32)


def shifted(share: float) -> np.ndarray:
    """Off by a share of the largest logit."""
    return LOGITS + np.float32(4.0 * share)


def never() -> np.ndarray:
    pytest.fail("the eager model ran again")


def test_a_small_error_needs_no_second_run() -> None:
    assert judge(LOGITS, shifted(0.03), "bfloat16", never).passed


@pytest.mark.parametrize(
    ("error", "rounding", "passed"),
    [(0.07, 0.06, True), (0.07, 0.032, False), (0.1, 0.06, False), (0.05, 0.001, False)],
)
def test_rounding_is_measured_on_the_eager_model(
    error: float, rounding: float, passed: bool
) -> None:
    verdict = judge(LOGITS, shifted(error), "bfloat16", lambda: shifted(rounding))
    assert verdict.passed == passed
    assert f"{max(1.5 * rounding, TOLERANCE['bfloat16']):.0e}" in verdict.message


def test_a_wrong_prediction_fails_whatever_rounding_does() -> None:
    wrong = LOGITS[..., [1, 0, 2]]
    assert not judge(LOGITS, wrong, "bfloat16", lambda: shifted(0.06)).passed


def test_float32_has_one_tolerance() -> None:
    assert not judge(LOGITS, shifted(0.01), "float32", never).passed


@pytest.mark.parametrize(
    ("error", "rounding", "passed"),
    [(0.25, 0.1, True), (0.35, 0.1, False), (0.05, 0.0, True), (0.15, 0.01, False)]
    + [(0.9, 0.5, False)],
)
def test_a_peer_s_rounding_is_measured_by_ours(error: float, rounding: float, passed: bool) -> None:
    verdict = judge_quantized(LOGITS, shifted(error), "int4", lambda: shifted(rounding))
    assert verdict.passed == passed


def test_a_peer_s_small_error_needs_no_quantized_copy() -> None:
    assert judge_quantized(LOGITS, shifted(0.09), "int8", never).passed


def test_our_quantized_weights_are_held_to_themselves(gate: tuple[Plan, Reference]) -> None:
    """Against the unquantized ones the same logits are wrong."""
    plan, reference = gate
    plan = replace(plan, systems=("ort-cpu-int4",))
    entry = Entry.of(plan, "ort-cpu-int4", batch_size=1)
    entry.setup, build_s = build_artifact(entry.setup, plan.cache, plan.logs)
    assert build_s is not None
    ready = entry.start(plan)
    entry.result |= {key: ready[key] for key in ("precision", "facts")}
    reference.check(entry)
    assert (entry.result["status"], entry.result["weights"]) == ("ok", "int4")
    entry.setup = replace(entry.setup, model=str(plan.model.folder))
    reference.check(entry)
    entry.close()
    assert entry.result["status"] == "FAIL"
