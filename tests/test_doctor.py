"""What the doctor finds on this machine, and where a package is missing."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llamac.runtime.cache_folder import cache_folder, cache_root
from llamac.runtime.cli import main
from llamac.runtime.ort.providers import PROVIDERS, provider_problem

BACKENDS = [
    *("torch-eager", "torch-compile", "torch-cuda", "export"),
    *("ort-cpu", "ort-cuda", "ort-tensorrt", "tensorrt-check"),
]

# As where the packages were never installed: no finder knows them.
BLOCK = """
import sys
class Blind:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *rest):
        if name.partition(".")[0] in {blocked!r}:
            return None
        return self.finder.find_spec(name, *rest)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = map(Blind, sys.meta_path)
from llamac.runtime.cli import main
raise SystemExit(main(["doctor", "--json"]))
"""


def diagnose(capsys: pytest.CaptureFixture[str]) -> dict:
    assert main(["doctor", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def diagnose_without(*blocked: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", BLOCK.format(blocked=blocked)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_this_machine(capsys: pytest.CaptureFixture[str]):
    result = diagnose(capsys)
    findings = result["findings"]
    assert list(findings) == BACKENDS
    for finding in findings.values():
        assert finding["needs"]
        assert finding["ready"] == (finding["problem"] is None)
        assert finding["problem"] is None or re.fullmatch("[^\n]+", finding["problem"])
    assert findings["torch-eager"]["found"] == f"torch {torch.__version__}"
    assert findings["torch-cuda"]["ready"] == torch.cuda.is_available()
    assert findings["export"]["ready"]
    assert f"onnx {importlib.metadata.version('onnx')}" in findings["export"]["found"]
    for provider in PROVIDERS:
        assert findings[f"ort-{provider}"]["problem"] == provider_problem(provider)
    assert result["llamac"] == importlib.metadata.version("llamac")
    assert 0 < result["available_bytes"] <= result["total_bytes"]
    assert result["num_cpus"] == os.cpu_count()


def test_the_table_says_the_same(capsys: pytest.CaptureFixture[str]):
    result = diagnose(capsys)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for name, finding in result["findings"].items():
        state = "ready" if finding["ready"] else "missing"
        here = finding["found"] if finding["ready"] else finding["problem"]
        assert re.search(rf"\n{name} +{state} +{re.escape(finding['needs'])} +", out)
        assert f" {here}\n" in out
    assert f"cache       {result['cache_folder']}: " in out
    assert re.search(r"\nmemory +[0-9.]+ [GM]iB free of [0-9.]+ GiB\n", out)


def test_the_sizes_of_the_caches(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What grew in the cache used to be seen by nobody."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert diagnose(capsys)["cache_bytes"] == {}
    assert main(["doctor"]) == 0
    assert f"cache       {tmp_path / 'llamac'}: empty\n" in capsys.readouterr().out
    (cache_folder("tensorrt") / "engine").write_bytes(bytes(3 << 20))
    (cache_folder("inductor") / "code").write_bytes(bytes(5))
    assert diagnose(capsys)["cache_bytes"] == {"inductor": 5, "tensorrt": 3 << 20}
    assert main(["doctor"]) == 0
    assert f"{tmp_path / 'llamac'}: inductor 5 B, tensorrt 3.0 MiB\n" in capsys.readouterr().out


def test_the_cache_folder_is_named_and_not_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert diagnose(capsys)["cache_folder"] == str(tmp_path / "cache" / "llamac")
    assert not (tmp_path / "cache").exists()
    assert cache_folder("inductor") == cache_root() / "inductor"
    assert (cache_root() / "inductor").stat().st_mode & 0o777 == 0o700


def test_without_a_compiler(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    finding = diagnose(capsys)["findings"]["torch-compile"]
    assert not finding["ready"]
    assert "no C++ compiler (no-such-compiler) found" in finding["problem"]


def test_without_anything():
    result = diagnose_without(
        *("torch", "onnx", "onnxscript", "onnxruntime", "tensorrt_rtx_bindings")
    )
    assert list(result["findings"]) == BACKENDS
    problems = {name: finding["problem"] for name, finding in result["findings"].items()}
    no_torch = "torch is not installed; pip install 'llamac[torch]'"
    assert [problems[name] for name in BACKENDS[:3]] == [no_torch] * 3
    assert problems["export"] == "torch is not installed; pip install 'llamac[export]'"
    assert problems["ort-cpu"] == "onnxruntime is not installed; pip install 'llamac[cpu]'"
    assert problems["ort-cuda"].startswith("onnxruntime is not installed; pip install 'llamac[gpu]")
    assert problems["ort-tensorrt"].startswith("onnxruntime is not installed; pip install")
    assert problems["tensorrt-check"].endswith("pip install 'llamac[tensorrt-check]'")


@pytest.mark.parametrize(
    ("package", "backends"),
    [
        ("torch", ["torch-eager", "torch-compile", "torch-cuda", "export"]),
        ("onnx", ["export"]),
        ("onnxruntime", ["ort-cpu", "ort-cuda", "ort-tensorrt"]),
    ],
)
def test_without_one_package(package: str, backends: list[str], capsys: pytest.CaptureFixture[str]):
    before, result = diagnose(capsys)["findings"], diagnose_without(package)["findings"]
    for name in BACKENDS:
        if name in backends:
            assert result[name]["problem"].startswith(f"{package} is not installed; pip install")
        else:
            assert result[name] == before[name]
