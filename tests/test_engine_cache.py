"""Where TensorRT's engines are kept: a folder for every bundle, version and GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from llamac.runtime.backend import StaticShape
from llamac.runtime.bundle.manifest import GraphFile, Manifest, ModelSizes
from llamac.runtime.ort.engine_cache import Engines, prune_engines

SIZES = dict.fromkeys(ModelSizes.__dataclass_fields__, 1)
DECODE = GraphFile(
    role="decode",
    target="tensorrt",
    file="tensorrt-decode.onnx",
    batch=4,
    tokens=1,
    rows=32,
    attended_rows=32,
    logits=1,
    dtype="float16",
    ops={},
    accuracy_level=None,
)
PREFILL = replace(DECODE, role="prefill", file="tensorrt-prefill-12.onnx", batch=1, tokens=12)


def engines(folder: Path, *, built: bool) -> Engines:
    return Engines(folder=folder, built=built, device_id=1)


def test_options_of_a_build_name_the_model_that_later_starts_open(tmp_path: Path):
    """See test_tensorrt_options.py, where ONNX Runtime itself reads them."""
    options = engines(tmp_path, built=False).provider_options(DECODE)
    assert options["trt_ep_context_file_path"] == str(tmp_path / "tensorrt-decode.onnx")
    assert options["trt_engine_cache_prefix"] == "tensorrt-decode"
    assert "trt_engine_cache_path" not in options  # beside the model, which names no folder
    # Strongly typed: no flag changes the graph's dtypes.
    assert not [name for name in options if "fp16" in name or "bf16" in name or "int8" in name]


def test_decode_is_captured_and_prefill_is_not(tmp_path: Path):
    """Prefill is bound to one address a slot, and a captured graph to one."""
    for built in (False, True):
        place = engines(tmp_path, built=built)
        assert place.provider_options(DECODE)["trt_cuda_graph_enable"] == "True"
        assert place.provider_options(PREFILL)["trt_cuda_graph_enable"] == "False"
        assert place.provider_options(PREFILL)["device_id"] == "1"


def make_engines(base: Path, name: str, size: int, age_s: int) -> Path:
    folder = base / (name * 32)
    folder.mkdir(parents=True)
    (folder / "decode.engine").write_bytes(bytes(size))
    os.utime(folder, (1_000_000_000 - age_s,) * 2)
    return folder


def test_the_engines_unused_for_longest_make_room(tmp_path: Path):
    """Every new bundle or version used to leave gigabytes for ever."""
    oldest, newer, newest = (
        make_engines(tmp_path, name, 100, age_s) for name, age_s in (("a", 3), ("b", 2), ("c", 1))
    )
    keep = make_engines(tmp_path, "d", 100, 9)
    others = tmp_path / "mine"
    others.mkdir()
    abandoned = tmp_path / f".{'e' * 32}.partial"
    abandoned.mkdir()
    prune_engines(tmp_path, keep=keep, max_bytes=400)
    assert oldest.exists()
    assert not abandoned.exists()
    prune_engines(tmp_path, keep=keep, max_bytes=399)
    assert sorted(tmp_path.iterdir()) == [newer, newest, keep, others]
    prune_engines(tmp_path, keep=keep, max_bytes=1)
    assert sorted(tmp_path.iterdir()) == [keep, others]


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


BUILD = """
import ctypes, os, sys
from pathlib import Path
from llamac.runtime.backend import StaticShape
from llamac.runtime.bundle.manifest import Manifest, ModelSizes
from llamac.runtime.ort.engine_cache import kept_engines
ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
base, content = Path(sys.argv[2]), sys.argv[3].encode()
try:
    with kept_engines({manifest}, ["decode.onnx"], base) as engines:
        print(engines.built)
        if not engines.built:
            (engines.folder / "decode.onnx").write_bytes(b"model")
            (engines.folder / "decode.engine").write_bytes(content)
        if content == b"fails":
            raise ValueError("TensorRT refuses")
except ValueError as error:
    print(error)
"""


def build(library: Path, base: Path, digest: str, content: str = "x", tf32: str | None = None):
    """Builds stand-ins of engines, or finds them, with a TensorRT of some version."""
    words = [sys.executable, "-c", BUILD.format(manifest=manifest(digest)), library, base, content]
    environment = {k: v for k, v in os.environ.items() if k != "NVIDIA_TF32_OVERRIDE"}
    if tf32 is not None:
        environment["NVIDIA_TF32_OVERRIDE"] = tf32
    return subprocess.run(words, capture_output=True, text=True, check=True, env=environment)


@pytest.fixture
def libraries(tmp_path: Path) -> list[Path]:
    """Two versions of TensorRT."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc")
    paths = []
    for version in (101500, 101601):
        source = tmp_path / f"{version}.c"
        source.write_text(f"int getInferLibVersion(void) {{ return {version}; }}\n")
        paths.append(tmp_path / f"lib{version}.so")
        words = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libnvinfer.so.10", source, "-o", paths[-1]]
        subprocess.run(words, check=True)
    return paths


def test_every_setting_that_changes_an_engine_has_its_own_folder(
    libraries: list[Path], tmp_path: Path
):
    """An engine built with TF32 used to be taken where it was then turned off."""
    base = tmp_path / "engines" / "here"
    settings = [(libraries[0], "a", None), (libraries[1], "a", None)]
    settings += [(libraries[0], "b", None), (libraries[0], "a", "0")]
    for built in ("False\n", "True\n"):
        for library, digest, tf32 in settings:
            assert build(library, base, digest, tf32=tf32).stdout == built
    assert len(list(base.iterdir())) == len(settings)
    assert {folder.stat().st_mode & 0o777 for folder in base.iterdir()} == {0o700}


def test_engines_that_are_not_whole_are_not_kept(libraries: list[Path], tmp_path: Path):
    base = tmp_path / "engines"
    done = build(libraries[0], base, "a", content="fails")
    assert done.stdout == "False\nTensorRT refuses\n"
    assert not base.exists()
    # ONNX Runtime doesn't look whether what it writes arrives.
    done = build(libraries[0], base, "a", content="")
    assert done.stdout == "False\n"
    assert "engines are not kept: ONNX Runtime wrote an empty engine" in done.stderr
    assert not base.exists()
