"""The real onnxruntime-gpu takes every option that the runtime sets, without a GPU.

NVIDIA's libraries are stand-ins made here, in which the memory of the "GPU" is the host's, so
that ONNX Runtime's own parser of options runs, and all that comes before TensorRT. The first
thing TensorRT is asked for, a builder, ends the process: then every option was accepted.

The wheel can't be installed beside onnxruntime: `make tensorrt-options` puts it in a folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from onnx import helper

from llamac.export import export_bundle
from llamac.model.checkpoint import open_checkpoint
from llamac.model.checkpoint.random_weights import write_random_checkpoint
from llamac.model.config import LlamaConfig
from llamac.runtime.bundle.manifest import Manifest
from llamac.runtime.ort.gpu_libraries import needed_libraries
from variants import VARIANTS

WHEEL = Path(__file__).parents[1] / "build" / "ort-gpu"
ACCEPTED = 42

pytestmark = [
    pytest.mark.tensorrt_options,
    pytest.mark.skipif(not WHEEL.is_dir(), reason="no build/ort-gpu; make tensorrt-options"),
    pytest.mark.skipif(
        not (shutil.which("gcc") and shutil.which("nm")), reason="no gcc and nm for stand-ins"
    ),
]

# What is more than `return 0`. Two GPUs, 64 GiB each.
FUNCTIONS = {
    "cudaGetDeviceCount": "int cudaGetDeviceCount(int *n) { *n = 2; return 0; }",
    "cudaMemGetInfo": "int cudaMemGetInfo(size_t *f, size_t *t) { *f = *t = 1l << 36; return 0; }",
    "cudaMalloc": "int cudaMalloc(void **p, size_t n) { return posix_memalign(p, 256, n); }",
    "cudaFree": "int cudaFree(void *p) { free(p); return 0; }",
    "cudaMemcpy": "int cudaMemcpy(void *a, void *b, size_t n) { memcpy(a, b, n); return 0; }",
}
DRIVER = """
int cuInit(int flags) { return 0; }
int cuDeviceGetCount(int *n) { *n = 2; return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return index > 1; }
int cuDeviceGetName(char *name, int size, int device) { strcpy(name, "stand-in"); return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = 9; return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuTensorMapEncodeTiled(void) { return 0; }
"""
# Any object is one whose methods return 0: no engine can be read.
TENSORRT = f"""
static long zero(void) {{ return 0; }}
static void *methods[64], *object[64];
static void *make(void) {{
    for (int i = 0; i < 64; i++) {{ methods[i] = (void *)zero; object[i] = object; }}
    object[0] = methods;
    return object;
}}
void *getPluginRegistry(void) {{ return make(); }}
void *createInferRuntime_INTERNAL(void) {{ return make(); }}
void *createInferRefitter_INTERNAL(void) {{ return make(); }}
void *createInferBuilder_INTERNAL(void) {{ _exit({ACCEPTED}); }}
int getInferLibVersion(void) {{ return 101601; }}
"""
PARSER = "void *createNvOnnxParser_INTERNAL(void) { return 0; }\n"
PARSER += "void *createNvOnnxParserRefitter_INTERNAL(void) { return 0; }\n"
INCLUDES = "#include <stdlib.h>\n#include <string.h>\n#include <unistd.h>\n"

OPEN_SESSION = """
import sys
from pathlib import Path
from llamac.runtime.bundle.opening import open_bundle
from llamac.runtime.ort.engine_cache import Engines
from llamac.runtime.ort.providers import SessionOptions, open_session, provider_problem
bundle, role, folder, built, change = sys.argv[1:]
assert provider_problem("tensorrt") is None, provider_problem("tensorrt")
manifest = open_bundle(bundle)
graph = manifest.find_graph(role, "tensorrt")
engines = Engines(folder=Path(folder), built=built == "built", device_id=1)
options = engines.provider_options(graph)
name, _, value = change.partition("=")
if name:
    options[name] = value
open_session(
    engines.model_path(manifest, graph),
    SessionOptions(provider="tensorrt", provider_options=options),
)
"""
OPEN_BACKEND = """
import sys
from pathlib import Path
from llamac.runtime.ort.ort_backend import OrtBackend
bundle, provider, device_id, cache = sys.argv[1:]
OrtBackend(bundle, provider=provider, device_id=int(device_id), engine_cache=Path(cache))
"""


def build(folder: Path, name: str, source: str, symbols: list[str] | None = None) -> None:
    path = folder / f"{name}.c"
    path.write_text(INCLUDES + source)
    words = ["gcc", "-w", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(folder / name)]
    if symbols:  # under the version that the wheel was linked against, which is the SONAME
        listed = folder / f"{name}.map"
        listed.write_text(f"{name} {{ global: {' '.join(f'{s};' for s in symbols)} local: *; }};")
        words.append(f"-Wl,--version-script,{listed}")
    subprocess.run([*words, str(path)], check=True)


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of stand-ins for all that the wheel's providers link to."""
    folder = tmp_path_factory.mktemp("nvidia")
    providers = [
        WHEEL / "onnxruntime" / "capi" / f"libonnxruntime_providers_{name}.so"
        for name in ("tensorrt", "cuda")
    ]
    wanted: dict[str, set[str]] = {n: set() for path in providers for n in needed_libraries(path)}
    for path in providers:
        words = ["nm", "--dynamic", "--undefined-only", str(path)]
        for line in subprocess.run(
            words, capture_output=True, text=True, check=True
        ).stdout.splitlines():
            symbol, _, library = line.split()[-1].partition("@")
            if library in wanted:
                wanted[library].add(symbol)
    own = {"libcuda.so.1": DRIVER, "libnvinfer.so.10": TENSORRT, "libnvonnxparser.so.10": PARSER}
    for name, symbols in wanted.items():
        if name == "libcudart.so.13":
            symbols |= {"cudaGetDevice", "cudaSetDevice", *FUNCTIONS}
        lines = [FUNCTIONS.get(s, f"int {s}(void) {{ return 0; }}") for s in sorted(symbols)]
        build(
            folder, name, own.get(name, "\n".join(lines)), None if name in own else sorted(symbols)
        )
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("model")
    config = LlamaConfig.from_dict(VARIANTS["smollm"])
    write_random_checkpoint(None, folder / "checkpoint", config=config)
    return export_bundle(
        open_checkpoint(folder / "checkpoint"),
        folder / "bundle",
        targets=("tensorrt", "cuda"),
        batch_size=2,
        max_seq_len=64,
        prefill_len=8,
    )


@pytest.fixture
def run_stubbed(libraries: Path):
    """Runs Python source with the wheel and the stand-ins; gives exit code and stderr."""

    def run_source(source: str, *argv: str | Path) -> tuple[int, str]:
        environment = os.environ | {"PYTHONPATH": str(WHEEL), "LD_LIBRARY_PATH": str(libraries)}
        words = [sys.executable, "-c", source, *map(str, argv)]
        done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=120)
        return done.returncode, done.stderr

    return run_source


def save_context(folder: Path, manifest: Manifest, role: str) -> None:
    """The EP-context model that building an engine leaves, and a file that is no engine."""
    graph = manifest.find_graph(role, "tensorrt")
    model = onnx.load(manifest.folder / graph.file, load_external_data=False)
    engine = f"{Path(graph.file).stem}_1_sm90.engine"
    node = helper.make_node(
        "EPContext",
        [value.name for value in model.graph.input],
        [value.name for value in model.graph.output],
        domain="com.microsoft",
        embed_mode=0,
        ep_cache_context=engine,
    )
    kept = helper.make_graph([node], "g", model.graph.input, model.graph.output)
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
    folder.mkdir(exist_ok=True)
    onnx.save(helper.make_model(kept, opset_imports=opsets, ir_version=11), folder / graph.file)
    (folder / engine).write_bytes(b"cut")


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_every_option_is_accepted_when_an_engine_is_built(
    role: str, bundle: Manifest, run_stubbed, tmp_path: Path
):
    """All booleans used to be "1" or "0", with which no session could ever open."""
    code, err = run_stubbed(OPEN_SESSION, bundle.folder, role, tmp_path, "new", "")
    assert code == ACCEPTED, err


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_every_option_is_accepted_when_an_engine_is_there(
    role: str, bundle: Manifest, run_stubbed, tmp_path: Path
):
    """The engine's file is reached without the graph or a weight being read."""
    save_context(tmp_path, bundle, role)
    code, err = run_stubbed(OPEN_SESSION, bundle.folder, role, tmp_path, "built", "")
    assert code == 1
    assert "TensorRT EP could not deserialize engine from cache" in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("trt_cuda_graph_enable=1", "'trt_cuda_graph_enable' should be 'True' or 'False'"),
        ("trt_bogus=1", "Invalid TensorRT EP option: trt_bogus"),
    ],
)
def test_the_parser_refuses_what_it_does_not_know(
    change: str, message: str, bundle: Manifest, run_stubbed, tmp_path: Path
):
    """So the tests above can fail."""
    code, err = run_stubbed(OPEN_SESSION, bundle.folder, "decode", tmp_path, "new", change)
    assert code == 1
    assert message in err
    assert "/onnxruntime_src" not in err


def test_a_cut_engine_is_named_with_the_folder_to_delete(
    bundle: Manifest, run_stubbed, tmp_path: Path
):
    """It used to stop every later start, and the message named a file of ONNX Runtime's naming."""
    begun = (OPEN_BACKEND, bundle.folder, "tensorrt", 0, tmp_path)
    assert run_stubbed(*begun)[0] == ACCEPTED
    (partial,) = tmp_path.iterdir()  # the process died while it built
    assert run_stubbed(*begun)[0] == ACCEPTED  # which stops nobody
    assert list(tmp_path.iterdir()) == [partial]
    folder = tmp_path / partial.name.removeprefix(".").removesuffix(".partial")
    partial.rename(folder)
    for role in ("prefill", "decode"):
        save_context(folder, bundle, role)
    code, err = run_stubbed(*begun)
    assert code == 1
    assert "BackendUnavailableError: the engine kept for tensorrt-prefill-8.onnx" in err
    assert f"can't be used; delete {folder}, the next start builds it again" in err
    shutil.rmtree(folder)
    assert run_stubbed(*begun)[0] == ACCEPTED


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_device_that_is_not_there(provider: str, bundle: Manifest, run_stubbed, tmp_path: Path):
    code, err = run_stubbed(OPEN_BACKEND, bundle.folder, provider, 2, tmp_path)
    assert code == 1
    assert "ValueError: device_id is 2; there is 0 to 1" in err
