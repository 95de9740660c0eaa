"""Where TensorRT's engines are kept: a folder for every bundle, version and GPU."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from llamac.runtime.backend import StaticShape
from llamac.runtime.bundle.manifest import GraphFile, Manifest, ModelSizes
from llamac.runtime.ort.engine_cache import has_engine, tensorrt_options

SIZES = dict.fromkeys(ModelSizes.__dataclass_fields__, 1)
DECODE = GraphFile(
    role="decode",
    target="tensorrt",
    file="tensorrt-decode.onnx",
    batch=4,
    tokens=1,
    rows=32,
    logits=1,
    dtype="float16",
    ops={},
)
PREFILL = replace(DECODE, role="prefill", file="tensorrt-prefill-12.onnx", batch=1, tokens=12)


def test_options_name_the_folder_the_graph_and_what_is_captured(tmp_path: Path):
    options = tensorrt_options(tmp_path, DECODE)
    assert options["trt_engine_cache_path"] == options["trt_timing_cache_path"] == str(tmp_path)
    assert options["trt_engine_cache_prefix"] == "tensorrt-decode"
    assert options["trt_engine_cache_enable"] == options["trt_timing_cache_enable"] == "1"
    # Prefill is bound to one address a slot, and a captured graph to one.
    assert options["trt_cuda_graph_enable"] == "1"
    assert tensorrt_options(tmp_path, PREFILL)["trt_cuda_graph_enable"] == "0"
    # Strongly typed: no flag changes the graph's dtypes.
    assert not [name for name in options if "fp16" in name or "bf16" in name or "int8" in name]


def test_an_engine_is_found_under_its_graphs_name(tmp_path: Path):
    assert not has_engine(tmp_path, DECODE)
    (tmp_path / "tensorrt-prefill-128_TRTKernel_graph_0_0_sm90.engine").touch()
    assert not has_engine(tmp_path, DECODE)
    assert not has_engine(tmp_path, PREFILL)  # 12 is not 128
    (tmp_path / "tensorrt-prefill-12_TRTKernel_graph_0_0_sm90.engine").touch()
    assert has_engine(tmp_path, PREFILL)
    (tmp_path / "tensorrt-decode_sm90.timing").touch()
    assert not has_engine(tmp_path, DECODE)


def manifest(digest: str) -> str:
    """Source text of a bundle with nothing in it but a name."""
    shape = StaticShape(
        batch_size=1, max_seq_len=1, prefill_lens=(1,), num_positions=1, vocab_size=1
    )
    value = Manifest(
        folder=Path("b"),
        digest=digest,
        shape=shape,
        model=ModelSizes(**SIZES),
        dtype="float16",
        bos_token_id=None,
        eos_token_ids=(),
        source={},
        versions={},
        graphs=(),
        weights=(),
        files={},
    )
    return repr(value).replace("PosixPath", "Path")


def engine_folder(library: Path, base: Path, digest: str) -> Path:
    """What engine_folder says in a process that has loaded a TensorRT of some version."""
    code = (
        "import ctypes, sys; from pathlib import Path\n"
        "from llamac.runtime.backend import StaticShape\n"
        "from llamac.runtime.ort.engine_cache import engine_folder\n"
        "from llamac.runtime.bundle.manifest import Manifest, ModelSizes\n"
        "ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)\n"
        f"print(engine_folder({manifest(digest)}, Path(sys.argv[2])))\n"
    )
    words = [sys.executable, "-c", code, str(library), str(base)]
    return Path(subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip())


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")
def test_another_bundle_or_version_has_another_folder(tmp_path: Path):
    libraries = []
    for version in (101500, 101601):
        source = tmp_path / f"{version}.c"
        source.write_text(f"int getInferLibVersion(void) {{ return {version}; }}\n")
        library = tmp_path / f"lib{version}.so"
        words = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libnvinfer.so.10", source, "-o", library]
        subprocess.run(words, check=True)
        libraries.append(library)
    base = tmp_path / "engines" / "here"
    first = engine_folder(libraries[0], base, "a")
    assert first.parent == base
    assert first.stat().st_mode & 0o777 == 0o700
    assert engine_folder(libraries[0], base, "a") == first
    assert (
        len({first, engine_folder(libraries[1], base, "a"), engine_folder(libraries[0], base, "b")})
        == 3
    )
