"""A short, seeded share of what tests/fuzz/run.py does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parent / "fuzz"
sys.path.append(str(FUZZ))

from judge import TRACEBACK, Ended, judge  # noqa: E402

REFUSAL = "llamac: hf/config.json: config: head_dim is 7; it must be even\n"


@pytest.mark.slow
def test_damaged_input_ends_in_a_result_or_in_one_line():
    """Of 16,523 tries, 168 ended in a traceback, 19 hung and others told another model's story."""
    command = [sys.executable, str(FUZZ / "run.py"), "--seed", "0", "--tries", "360", "--jobs", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "360 tries" in ended.stdout


@pytest.mark.parametrize(
    ("code", "out", "err", "verdict"),
    [
        (2, "", REFUSAL, "refused"),
        (2, "", "weights 1 MiB, cache 1 MiB (float32)\n" + REFUSAL, "refused"),
        (0, "the sound text", "[torch-eager/cpu] load 0.1 s\n", "accepted"),
        (0, "another text", "", "nonsense"),
        (2, "", "", "bad message"),
        (2, "", REFUSAL + "and more\n", "bad message"),
        (2, "", "llamac: head_dim is 7\n", "bad message"),
        (2, "", REFUSAL.replace("7", "\x1b[31m7"), "bad message"),
        (2, "", REFUSAL.replace("7", "7" * 500), "bad message"),
        (0, "the sound text", "[E:onnxruntime] what\n", "bad message"),
        (1, "", "", "bad message"),
        (TRACEBACK, "", "KeyError: 'a'\n", "traceback"),
        (-11, "", "", "crash"),
        (None, "", "", "hang"),
    ],
)
def test_the_judge_tells_faults_from_refusals(code: int | None, out: str, err: str, verdict: str):
    ended = Ended(code=code, out=out, err=err)
    judged = judge(ended, allowed="same", sound="the sound text", names=("config.json",))
    assert judged.partition(":")[0] == verdict


def test_what_must_be_refused_is_not_accepted():
    ended = Ended(code=0, out="the sound text", err="")
    assert judge(ended, allowed="refused", sound=None, names=()).startswith("nonsense")
