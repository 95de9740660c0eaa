"""torch's compiler where it is missing, broken, or has no room: one line instead of a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import lend_kernels

from llamac.model import TorchBackend
from llamac.model.compiled.inductor import compiler_problem, kernel_compiler
from llamac.model.kernels.few_rows import load_operators
from llamac.runtime.backend import BackendUnavailableError
from llamac.runtime.cache_folder import cache_folder
from variants import our_model


def refused(message: str) -> None:
    with pytest.raises(BackendUnavailableError, match=message) as error:
        TorchBackend(our_model("llama-1"), max_seq_len=16, prefill_lens=(4,))
    assert "--backend eager" in str(error.value)
    assert "\n" not in str(error.value)


def test_without_a_compiler_one_line_names_eager(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "g++" in (compiler_problem() or "")
    refused("no C\\+\\+ compiler")


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_a_compiler_that_does_not_run_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("CXX", script(tmp_path / "broken-cxx", "exit 1"))
    refused("broken-cxx.* does not run")


def test_a_compiler_with_an_option_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "g++ -O1")
    refused("g\\+\\+ -O1.*without options")


_START = """
from llamac.model import *
from llamac.runtime.backend import BackendUnavailableError
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48,
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
try:
    TorchBackend(Llama(config, num_positions=64).requires_grad_(False),
        max_seq_len=32, prefill_lens=(8,))
except BackendUnavailableError as error:
    print(error)
"""


def failing_start(tmp_path: Path, **env: str) -> str:
    """What a start in a process of its own prints: it would remember a compiler that failed."""
    assert load_operators() is not None
    lend_kernels(cache_folder("kernels"), tmp_path / ".cache" / "llamac")
    done = subprocess.run(
        [sys.executable, "-c", _START],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)} | env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert not done.stderr
    assert done.stdout.count("\n") == 1
    assert "--backend eager" in done.stdout
    return done.stdout


def test_a_compiler_that_fails_is_one_line(tmp_path: Path):
    fail = 'case "$1" in -*) exec g++ "$@";; *) echo "x.h:1: error: no room" >&2; exit 1;; esac'
    text = failing_start(tmp_path, CXX=script(tmp_path / "failing-cxx", fail))
    assert "no room" in text


def test_a_cache_folder_that_cannot_be_written_is_one_line(tmp_path: Path):
    """Used to be a traceback of the compiler's."""
    (tmp_path / "file").touch()
    text = failing_start(tmp_path, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "file"))
    assert "torch.compile failed" in text
    assert "XDG_CACHE_HOME" in text


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError("disk is full"), "a kernel can't be compiled: disk is full; free space"),
        (RuntimeError("Failed to find C compiler."), "no C compiler found, which Triton needs; "),
    ],
)
def test_a_kernel_that_cannot_be_compiled_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, message: str
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    with pytest.raises(BackendUnavailableError, match=message):
        fail_with(error, tmp_path / "llamac" / "triton")
    assert "TRITON_CACHE_DIR" not in os.environ


def fail_with(error: Exception, expected: Path) -> None:
    with kernel_compiler() as folder:
        assert os.environ["TRITON_CACHE_DIR"] == str(folder)
        assert folder == expected
        raise error


def test_other_errors_of_kernels_and_a_given_folder_are_left_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with pytest.raises(RuntimeError, match="out of memory"):
        fail_with(RuntimeError("CUDA out of memory"), tmp_path)
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path)
