"""Providers: what is missing is named in one line, and nothing else runs instead."""

from __future__ import annotations

import re
from pathlib import Path

import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from llamac.runtime.backend import BackendUnavailableError
from llamac.runtime.ort.providers import (
    PROVIDERS,
    SessionOptions,
    _check_assignment,
    installed_versions,
    open_session,
    provider_libraries,
    provider_problem,
)

ABSENT = [
    name for name in ("cuda", "tensorrt")
    if PROVIDERS[name] not in onnxruntime.get_available_providers()
]  # fmt: skip


def save_graph(path: Path, op_type: str, *, element_type: int = TensorProto.FLOAT) -> Path:
    """One node on [2, 2]."""
    x, y = (helper.make_tensor_value_info(name, element_type, [2, 2]) for name in "xy")
    node = helper.make_node(op_type, ["x", "x"], ["y"])
    graph = helper.make_graph([node], "g", [x], [y])
    opset = helper.make_opsetid("", 24)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=11), path)
    return path


def test_the_cpu_lacks_nothing():
    assert provider_problem("cpu") is None
    assert provider_libraries("cpu") == []


def test_an_unknown_provider():
    with pytest.raises(ValueError, match="provider is 'tpu'; it must be one of cpu, cuda, tensor"):
        provider_problem("tpu")


@pytest.mark.parametrize("provider", ABSENT)
def test_a_build_without_the_provider_is_named_with_the_line_that_mends_it(provider: str):
    problem = provider_problem(provider) or ""
    version = re.escape(installed_versions(("onnxruntime", "onnxruntime-gpu")))
    assert version
    extra = {"cuda": "gpu"}.get(provider, provider)
    line = rf"{version} has no {PROVIDERS[provider]}; pip uninstall -y onnxruntime onnxruntime-gpu"
    assert re.match(rf"{line}; pip install 'llamac\[{extra}\]'", problem)
    # TensorRT's packages are on NVIDIA's own index.
    assert ("--extra-index-url https://pypi.nvidia.com" in problem) == (provider == "tensorrt")
    assert "\n" not in problem


def test_installed_versions_leave_out_what_is_not_there():
    found = installed_versions(("onnx", "no-such-package", "numpy"))
    assert re.fullmatch(r"onnx \d[\d.]+, numpy \d[\d.]+", found)


def test_without_onnxruntime(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    assert provider_problem("cpu") == "onnxruntime is not installed; pip install 'llamac[cpu]'"
    assert "pip install 'llamac[gpu]'" in (provider_problem("cuda") or "")
    assert "pip install 'llamac[tensorrt]' --extra-index" in (provider_problem("tensorrt") or "")


def test_a_session_runs_on_the_cpu_with_the_threads_asked_for(tmp_path: Path):
    path = save_graph(tmp_path / "add.onnx", "Add")
    session = open_session(path, SessionOptions(provider="cpu", threads=3))
    assert session.get_providers() == ["CPUExecutionProvider"]
    assert session.get_session_options().intra_op_num_threads == 3
    settings = session.get_session_options()
    assert settings.get_session_config_entry("session.disable_prepacking") == "1"
    settings = open_session(
        path, SessionOptions(provider="cpu", prepack=True)
    ).get_session_options()
    assert settings.get_session_config_entry("session.disable_prepacking") == "0"


@pytest.mark.parametrize("provider", ABSENT)
@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_is_not_there_never_becomes_the_cpu(tmp_path: Path, provider: str):
    """ONNX Runtime makes a CPU session of it, and says so in a Python warning."""
    path = save_graph(tmp_path / "add.onnx", "Add")
    made = onnxruntime.InferenceSession(path, providers=[PROVIDERS[provider]])
    assert made.get_providers() == ["CPUExecutionProvider"]
    with pytest.raises(BackendUnavailableError, match=f"--provider {provider}"):
        open_session(path, SessionOptions(provider=provider))


def test_a_node_without_a_kernel_is_refused_in_one_line(tmp_path: Path):
    path = save_graph(tmp_path / "product.onnx", "MatMul", element_type=TensorProto.BFLOAT16)
    with pytest.raises(BackendUnavailableError) as caught:
        open_session(path, SessionOptions(provider="cpu"))
    message = str(caught.value)
    assert re.match(r"--provider cpu cannot run product\.onnx: .*MatMul", message)
    assert "\n" not in message


def test_a_graph_that_is_none_is_refused(tmp_path: Path):
    path = tmp_path / "graph.onnx"
    path.write_bytes(b"not a graph")
    with pytest.raises(BackendUnavailableError, match=r"cannot run graph\.onnx: "):
        open_session(path, SessionOptions(provider="cpu"))


def test_a_graph_with_names_that_are_not_text_is_refused(tmp_path: Path):
    """ONNX Runtime quotes the name in its error, which could not be made: no file was named."""
    path = save_graph(tmp_path / "graph.onnx", "MatMul")
    path.write_bytes(path.read_bytes().replace(b"MatMul", b"Mat\xfful"))
    with pytest.raises(BackendUnavailableError, match=r"cannot run graph\.onnx: "):
        open_session(path, SessionOptions(provider="cpu"))


def test_onnx_runtime_prints_nothing_of_its_own(tmp_path: Path, capfd):
    """Of a graph with everything twice it warned on stderr, in colours."""
    path = save_graph(tmp_path / "graph.onnx", "MatMul")
    model = onnx.load(path)
    weight = helper.make_tensor("weight", TensorProto.FLOAT, [2, 2], [0.0] * 4)
    model.graph.initializer.extend([weight, weight])
    path.write_bytes(model.SerializeToString() * 2)
    onnxruntime.set_default_logger_severity(2)  # its default, which other tests may have changed
    with pytest.raises(BackendUnavailableError, match=r"cannot run graph\.onnx: "):
        open_session(path, SessionOptions(provider="cpu"))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_node_that_another_provider_took_is_refused(tmp_path: Path, provider: str):
    """Checked on what ONNX Runtime reports of a session whose nodes did go to the CPU."""
    path = save_graph(tmp_path / "add.onnx", "Add")
    settings = onnxruntime.SessionOptions()
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    message = rf"leaves nodes of add\.onnx to CPUExecutionProvider; .* --target {provider}"
    with pytest.raises(BackendUnavailableError, match=message):
        _check_assignment(session, path, provider)
    _check_assignment(session, path, "cpu")
