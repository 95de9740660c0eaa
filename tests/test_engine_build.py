"""Real TensorRT engines from the exported graphs, built without a GPU."""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import helper

from llamac.export import export_bundle
from llamac.export.engine_build import EngineBuild, build_engine, build_engines, load_tensorrt
from llamac.model.checkpoint import open_checkpoint
from llamac.model.checkpoint.random_weights import write_random_checkpoint
from llamac.model.config import LlamaConfig
from llamac.model.load import DEMO_FOLDER
from llamac.runtime.backend import BackendUnavailableError
from llamac.runtime.bundle.manifest import Manifest
from llamac.runtime.bundle.opening import open_bundle
from llamac.runtime.cli import main
from variants import VARIANTS

_PACKAGES = ("onnxruntime_ep_nv_tensorrt_rtx", "tensorrt_rtx_bindings")
_is_here = all(importlib.util.find_spec(name) for name in _PACKAGES)


def needs_tensorrt(test: Callable[..., None]) -> Callable[..., None]:
    reason = "the extra tensorrt-check is not installed"
    return pytest.mark.tensorrt(pytest.mark.skipif(not _is_here, reason=reason)(test))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """bfloat16 graphs for tensorrt alone, which no CPU provider runs."""
    folder = tmp_path_factory.mktemp("tiny")
    return export_variant(folder, "smollm")


def export_variant(folder: Path, variant: str) -> Manifest:
    config = LlamaConfig.from_dict({**VARIANTS[variant], "num_hidden_layers": 2})
    write_random_checkpoint(None, folder / "checkpoint", config=config)
    sizes = {"batch_size": 2, "prefill_len": 8, "max_seq_len": 64, "row_buckets": (16,)}
    checkpoint = open_checkpoint(folder / "checkpoint")
    return export_bundle(checkpoint, folder / "bundle", targets=("tensorrt",), **sizes)


def assert_built(manifest: Manifest) -> None:
    results = build_engines(manifest)
    assert [result.file for result in results] == [graph.file for graph in manifest.graphs]
    assert len(results) >= 3  # a chunk, a step on fewer rows, a step
    for result in results:
        assert result.problems == ()
        assert result.passed
        assert result.num_cache_updates == 2 * manifest.model.num_hidden_layers
        assert result.engine_bytes > 1000
        assert result.build_s > 0


@pytest.mark.slow
@needs_tensorrt
@pytest.mark.parametrize("dtype", [None, "float16"])
def test_the_demo_model(dtype: str | None, tmp_path: Path):
    """Its own float32 used to fail: TensorRT has no float32 kernel for Attention."""
    checkpoint = open_checkpoint(DEMO_FOLDER)
    assert_built(export_bundle(checkpoint, tmp_path / "bundle", targets=("tensorrt",), dtype=dtype))


@needs_tensorrt
def test_heads_of_8(tmp_path: Path):
    """These too used to fail: TensorRT's kernels begin at 16."""
    manifest = export_variant(tmp_path, "llama-3.1")
    assert manifest.model.head_dim == 8
    assert_built(manifest)


@needs_tensorrt
def test_a_llama_3_shape(tmp_path: Path):
    config = LlamaConfig.from_dict(
        {
            "model_type": "llama",
            "vocab_size": 4096,
            "hidden_size": 1024,
            "intermediate_size": 3584,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "max_position_embeddings": 131_072,
            "rope_theta": 500_000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        }
    )
    write_random_checkpoint(None, tmp_path / "checkpoint", config=config, dtype="bfloat16")
    sizes = {"batch_size": 4, "prefill_len": 128, "max_seq_len": 2048}
    checkpoint = open_checkpoint(tmp_path / "checkpoint")
    manifest = export_bundle(checkpoint, tmp_path / "b", targets=("tensorrt",), **sizes)
    assert {graph.dtype for graph in manifest.graphs} == {"bfloat16"}
    assert_built(manifest)


@pytest.fixture
def build_changed(tiny: Manifest, tmp_path: Path) -> Callable[..., EngineBuild]:
    """Builds the decode graph after a change to it."""

    def build(change: Callable[[onnx.GraphProto], None]) -> EngineBuild:
        folder = Path(shutil.copytree(tiny.folder, tmp_path / "changed"))
        path = folder / tiny.find_graph("decode", "tensorrt").file
        model = onnx.load(path, load_external_data=False)
        change(model.graph)
        onnx.save(model, path)
        result = build_engine(load_tensorrt(), path, num_hidden_layers=tiny.model.num_hidden_layers)
        assert result.file == path.name
        assert not result.passed
        return result

    return build


def find_nodes(graph: onnx.GraphProto, op: str) -> list[onnx.NodeProto]:
    return [node for node in graph.node if node.op_type == op]


@needs_tensorrt
def test_an_attribute_that_is_refused_is_named(build_changed):
    """The export used to ask for a float32 softmax, which TensorRT's parser refuses."""

    def change(graph: onnx.GraphProto) -> None:
        for node in find_nodes(graph, "Attention"):
            node.name = f"attention of {node.output[0]}"
            node.attribute.append(helper.make_attribute("softmax_precision", 1))

    result = build_changed(change)
    assert len(result.problems) == 2  # one for each layer
    for problem in result.problems:
        assert re.match(r"node attention of .+ \(Attention\): .*softmax precision", problem)
        assert "\n" not in problem
    assert (result.engine_bytes, result.num_cache_updates) == (0, 0)


@needs_tensorrt
def test_an_unknown_operator_is_named(build_changed):
    def change(graph: onnx.GraphProto) -> None:
        node = find_nodes(graph, "Sigmoid")[1]
        node.name, node.op_type, node.domain = "the second gate", "Wish", "com.example"

    (problem,) = build_changed(change).problems
    assert re.match(r"node the second gate \(Wish\): ", problem)


@needs_tensorrt
def test_a_cache_that_is_copied_is_named(build_changed):
    """The engine builds, but what it returns is not the memory it was given."""

    def change(graph: onnx.GraphProto) -> None:
        name = "present.1.value"
        for node in graph.node:
            for names in (node.input, node.output):
                names[:] = ["inner" if used == name else used for used in names]
        graph.node.append(helper.make_node("Neg", ["inner"], ["negative"]))
        graph.node.append(helper.make_node("Neg", ["negative"], [name]))

    result = build_changed(change)
    assert result.problems[0] == (
        "past_key_values.1.value is not written in place to present.1.value"
    )
    assert result.num_cache_updates == 3


@needs_tensorrt
def test_what_is_not_onnx_is_refused(tiny: Manifest, tmp_path: Path):
    path = tmp_path / "decode.onnx"
    path.write_bytes((tiny.folder / "tensorrt-decode.onnx").read_bytes()[:-7])
    result = build_engine(load_tensorrt(), path, num_hidden_layers=2)
    assert not result.passed
    assert all("\n" not in problem for problem in result.problems)


@needs_tensorrt
def test_on_the_command_line(tiny: Manifest, capsys: pytest.CaptureFixture[str]):
    """Where no provider runs the graphs, the engines are what is verified."""
    words = ["verify", str(tiny.folder), "--engine-build"]
    assert main(words) == 0
    out = capsys.readouterr().out.splitlines()
    for line, graph in zip(out[-4:-1], tiny.graphs, strict=True):
        start = f"engine of {re.escape(graph.file)}: ok, 4 caches in place, "
        assert re.match(start + r"[0-9.]+ [KM]iB, built in [0-9.]+ s$", line)
    assert out[-1] == "PASS"
    assert open_bundle(tiny.folder, check=True) == tiny


def test_a_failed_engine_fails_the_verification(
    tiny: Manifest, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    broken = EngineBuild(
        file="tensorrt-decode.onnx",
        problems=("node x (Y): no", "node z (Y): no"),
        num_cache_updates=0,
        engine_bytes=0,
        build_s=1.0,
    )
    monkeypatch.setattr("llamac.export.verify.build_engines", lambda *_, **__: [broken])
    assert main(["verify", str(tiny.folder), "--engine-build"]) == 1
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "engine of tensorrt-decode.onnx: FAIL: node x (Y): no",
        "engine of tensorrt-decode.onnx: FAIL: node z (Y): no",
        "FAIL: 1 failed",
    ]


@pytest.mark.parametrize("package", _PACKAGES)
def test_a_missing_package_is_named(
    package: str,
    tiny: Manifest,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *rest: None if name == package else find_spec("json"),
    )
    with pytest.raises(BackendUnavailableError, match=f"{package}, which is not installed; pip"):
        load_tensorrt()
    assert main(["verify", str(tiny.folder), "--engine-build"]) == 2
    assert re.fullmatch(
        rf"llamac: --engine-build needs {package}, .*llamac\[tensorrt-check\]'\n",
        capsys.readouterr().err,
    )


def test_a_bundle_without_such_graphs_is_refused(
    tmp_path: Path, tiny: Manifest, capsys: pytest.CaptureFixture[str]
):
    checkpoint = open_checkpoint(tiny.folder.parent / "checkpoint")
    export_bundle(checkpoint, tmp_path / "b", prefill_len=8, max_seq_len=64)
    assert main(["verify", str(tmp_path / "b"), "--engine-build"]) == 2
    assert "export again with --target tensorrt" in capsys.readouterr().err
