"""The ONNX Runtime backend: equal to eager torch, in place, on one copy of the weights."""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import TOLERANCE
from numpy.typing import NDArray
from references import (
    assert_close,
    decode_slot,
    one_forward,
    prefill_chunks,
    random_ids,
)

from llamac.export import export_bundle
from llamac.model import Llama
from llamac.model.checkpoint import open_checkpoint
from llamac.runtime.backend import BackendUnavailableError
from llamac.runtime.bundle.manifest import Manifest
from llamac.runtime.ort.ort_backend import OrtBackend, check_choice
from llamac.runtime.ort.providers import provider_problem
from llamac.runtime.request import Request
from llamac.runtime.scheduler import generate
from variants import our_model, reference_model

B, P, S = 4, 8, 28  # S is no multiple of P
NUM_POSITIONS = 4 * S
FAMILIES = ("smollm", "llama-3.2-tied", "biases", "yarn")
TARGETS = ("cpu", "tensorrt")
COPY_WARNING = "copying past_cache"  # of TensorScatter, when past and present lie apart
LOG_WARNINGS = 2


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Two threads of a model this small mostly wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Manifest]:
    """Exports a variant for all targets, float32, when it is first asked for."""
    exported: dict[str, Manifest] = {}

    def export(variant: str) -> Manifest:
        if variant not in exported:
            folder = tmp_path_factory.mktemp(variant)
            reference_model(variant).save_pretrained(folder / "checkpoint")
            exported[variant] = export_bundle(
                open_checkpoint(folder / "checkpoint"),
                folder / "bundle",
                targets=("cpu", "tensorrt"),
                batch_size=B,
                prefill_len=P,
                max_seq_len=S,
            )
        return exported[variant]

    return export


@pytest.fixture
def bundle(bundles: Callable[[str], Manifest]) -> Manifest:
    return bundles("llama-3.1")


@pytest.fixture(params=TARGETS)
def backend(request: pytest.FixtureRequest, bundle: Manifest) -> OrtBackend:
    """Of each target, with a cache nobody has used."""
    return open_backend(bundle, request.param)


def open_backend(bundle: Manifest, target: str, **options) -> OrtBackend:
    return OrtBackend(bundle, target=target, threads=1, **options)


def expected_logits(variant: str, ids: Sequence[int]) -> NDArray[np.float32]:
    """[T, V] of one eager forward over the whole sequence."""
    model = our_model(variant, num_positions=NUM_POSITIONS)
    return one_forward(model, ids)


# Equal to eager


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("variant", FAMILIES)
def test_families_equal_one_forward(bundles: Callable[[str], Manifest], variant: str, target: str):
    backend = open_backend(bundles(variant), target)
    ids = random_ids(S)
    expected = expected_logits(variant, ids)
    assert_close(prefill_chunks(backend, 1, ids[: P + 1]), expected[P])
    for position in range(P + 1, S):
        assert_close(decode_slot(backend, 1, ids[position], position), expected[position])


@pytest.mark.parametrize("target", TARGETS)
def test_a_cache_of_one_row_sees_the_token_alone(tmp_path: Path, target: str):
    reference_model("llama-1").save_pretrained(tmp_path / "checkpoint")
    bundle = export_bundle(
        open_checkpoint(tmp_path / "checkpoint"),
        tmp_path / "bundle",
        targets=(target,),
        max_seq_len=1,
    )
    backend = open_backend(bundle, target)
    ids = random_ids(4)
    expected = one_forward(our_model("llama-1"), ids, window=1)
    assert_close(backend.prefill(0, ids[:1], 0), expected[0])
    for position in range(1, 4):
        step = np.array([ids[position]]), np.array([position])
        assert_close(backend.decode(*step)[0], expected[position])


def test_prepacked_weights_give_the_same_logits(bundle: Manifest):
    ids = random_ids(P + 1)
    expected = expected_logits("llama-3.1", ids)
    backend = open_backend(bundle, "cpu", prepack=True)
    assert_close(backend.prefill(0, ids[:P], 0), expected[P - 1])
    assert_close(decode_slot(backend, 0, ids[P], P), expected[P])


@pytest.mark.parametrize("target", ["cuda", "tensorrt"])
def test_float16_graphs_run_on_the_cpu(tmp_path: Path, target: str):
    reference_model("llama-3.1").save_pretrained(tmp_path / "checkpoint")
    checkpoint = open_checkpoint(tmp_path / "checkpoint")
    sizes = {"batch_size": B, "prefill_len": P, "max_seq_len": S}
    bundle = export_bundle(
        checkpoint, tmp_path / "bundle", targets=(target,), dtype="float16", **sizes
    )
    backend = open_backend(bundle, target)
    assert backend._cache._buffers[0].read().dtype == np.float16
    ids = random_ids(S)
    expected = expected_logits("llama-3.1", ids)
    errors = [backend.prefill(1, ids[:P], 0) - expected[P - 1]]
    errors += [decode_slot(backend, 1, ids[p], p) - expected[p] for p in range(P, S)]
    # 11 bits of mantissa, through three layers.
    assert 1e-5 < np.abs(errors).max() < 5e-3 * np.abs(expected).max()


# Rows are independent, calls leave nothing behind


def test_a_step_writes_one_row_of_each_slot_and_a_chunk_its_own_rows(backend: OrtBackend):
    def changed_rows(call: Callable[[], object]) -> set[tuple[int, int]]:
        before = [buffer.read().copy() for buffer in backend._cache._buffers]
        call()
        found = [
            {(int(slot), int(row)) for slot, row in np.argwhere((old != new.read()).any((1, 3)))}
            for old, new in zip(before, backend._cache._buffers, strict=True)
        ]
        assert all(rows == found[0] for rows in found)
        return found[0]

    chunk = changed_rows(lambda: backend.prefill(2, [1, 2, 3], 4))
    assert chunk == {(2, row) for row in range(4, 4 + P)}  # padding too
    positions = np.array([0, 9, 5, S - 1])
    step = changed_rows(lambda: backend.decode(np.array([5, 6, 7, 8]), positions))
    assert step == set(enumerate(positions.tolist()))
    prefill_chunks(backend, 3, random_ids(S))
    rolled = changed_rows(lambda: backend.decode(np.full(B, 9), np.array([1, 1, 1, S])))
    # GroupQueryAttention appends only: its last row goes over the oldest, then the token over it.
    rows = (0,) if backend.target == "tensorrt" else (0, S - 1)
    assert rolled == {(0, 1), (1, 1), (2, 1), *((3, row) for row in rows)}


class Interrupted:
    """A bound graph during or after whose run Ctrl-C is pressed once."""

    def __init__(self, graph, *, after: bool) -> None:
        self.graph, self.after, self.pending = graph, after, True

    def run(self, *args):
        if self.after:
            result = self.graph.run(*args)
        if self.pending:
            self.pending = False
            raise KeyboardInterrupt
        return result if self.after else self.graph.run(*args)


@pytest.mark.parametrize("after", [False, True])
def test_an_interrupted_step_can_be_run_again(backend: OrtBackend, after: bool):
    ids = random_ids(S + 12, seed=6)
    model = our_model("llama-3.1", num_positions=NUM_POSITIONS)
    expected = one_forward(model, ids, window=S)
    prefill_chunks(backend, 3, ids[: S - 2])
    graph = backend._decode
    for position in range(S - 2, len(ids)):
        backend._decode = Interrupted(graph, after=after)  # type: ignore[assignment]
        with pytest.raises(KeyboardInterrupt):
            decode_slot(backend, 3, ids[position], position)
        logits = decode_slot(backend, 3, ids[position], position)
        np.testing.assert_allclose(logits, expected[position], rtol=1e-4, atol=1e-4)


# Nothing is copied, nothing is allocated


def test_the_cache_stays_where_it_is(backend: OrtBackend):
    addresses = backend._cache.pointers()
    arrays = [buffer.read() for buffer in backend._cache._buffers]
    assert [array.ctypes.data for array in arrays] == addresses
    assert len(set(addresses)) == 2 * 3
    assert all(address % 64 == 0 for address in addresses)
    assert not any(array.any() for array in arrays)  # zeros
    rolled = Request(prompt_ids=(1, 2), max_new_tokens=S, limit_policy="roll")
    generate(backend, None, [rolled])
    assert backend._cache.pointers() == addresses
    assert all(array[0].any() for array in arrays)  # what was bound is what was written


def test_a_slot_is_a_part_of_the_cache(backend: OrtBackend):
    cache = backend._cache
    heads, rows, dim = cache.shape[1:]
    assert cache.slot_bytes == heads * rows * dim * 4
    for slot in range(B):
        expected = [buffer.read()[slot].ctypes.data for buffer in cache._buffers]
        assert cache.pointers(slot) == expected


@pytest.fixture
def profiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every session writes a profile into tmp_path when it is told to."""
    original = onnxruntime.SessionOptions

    def options():
        made = original()
        made.enable_profiling = True
        made.profile_file_prefix = str(tmp_path / "profile")
        return made

    monkeypatch.setattr(onnxruntime, "SessionOptions", options)
    # What is looked for is a warning, which the backend leaves out.
    monkeypatch.setattr("llamac.runtime.ort.providers._LOG_ERRORS", LOG_WARNINGS)
    onnxruntime.set_default_logger_severity(LOG_WARNINGS)


@pytest.mark.parametrize("target", TARGETS)
def test_a_step_runs_the_nodes_of_the_graph_and_copies_nothing(
    profiled: None, bundle: Manifest, target: str, capfd: pytest.CaptureFixture[str]
):
    backend = open_backend(bundle, target)
    request = Request(prompt_ids=tuple(random_ids(P + 2)), max_new_tokens=S, limit_policy="roll")
    generate(backend, None, [request])
    cache_bytes = B * backend._cache.slot_bytes
    (decode,) = backend._decode._graphs
    for role, graph in (("decode", decode), ("prefill", backend._prefill[P])):
        profile = json.loads(Path(graph._session.end_profiling()).read_text())
        nodes = [event["args"] for event in profile if event["name"].endswith("_kernel_time")]
        assert {node["provider"] for node in nodes} == {"CPUExecutionProvider"}
        names = {node["op_name"] for node in nodes}
        exported = set(bundle.find_graph(role, target).ops)
        # Fused: x * sigmoid(x), and a product with a transposed cache. A Memcpy would be one more.
        assert "Gemm" in names
        assert names <= exported | {"QuickGelu", "FusedMatMul"}
        # On the CPU weights stay left factors, unless they are packed beforehand.
        assert "Transpose" in names
        writes = {"TensorScatter", "GroupQueryAttention"} & names
        assert writes
        for node in nodes:
            # What isn't the write makes no value of the cache's size; a chunk's scores are larger.
            if role == "decode" and node["op_name"] not in writes:
                assert int(node["output_size"]) < cache_bytes / 2, node
    assert COPY_WARNING not in capfd.readouterr().err


def test_an_unbound_cache_would_be_warned_of(bundle: Manifest, capfd: pytest.CaptureFixture[str]):
    """What the test above looks for does appear when the cache is passed by value."""
    path = bundle.folder / bundle.find_graph("decode", "tensorrt").file
    onnxruntime.set_default_logger_severity(LOG_WARNINGS)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    types = {"tensor(int64)": np.int64, "tensor(float)": np.float32}
    session.run(None, {i.name: np.zeros(i.shape, types[i.type]) for i in session.get_inputs()})
    assert COPY_WARNING in capfd.readouterr().err


def mapped_bytes(path: Path) -> int:
    """How much of this process's address space is a file; parts mapped twice count twice."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    parts = [line.split()[0].split("-") for line in lines if line.endswith(str(path))]
    return sum(int(end, 16) - int(start, 16) for start, end in parts)


@pytest.mark.parametrize("target", TARGETS)
def test_both_sessions_read_one_mapping_of_the_weights(bundle: Manifest, target: str):
    """Each session mapped the file by itself: twice the resident memory."""
    before = {
        weights.file: mapped_bytes(bundle.folder / weights.file) for weights in bundle.weights
    }
    backend = open_backend(bundle, target)
    backend.prefill(0, [1], 0)
    backend.decode(np.zeros(B, np.int64), np.zeros(B, np.int64))
    page = mmap.PAGESIZE
    for name, mapped in before.items():
        size = -(-bundle.files[name].bytes // page) * page
        assert mapped_bytes(bundle.folder / name) - mapped == size


# What is refused


def test_bad_options_are_refused(bundle: Manifest):
    for options, message in (
        ({"threads": 0}, "threads is 0; it must be between 1 and 1024"),
        # Used to end in a traceback of onnxruntime's bindings.
        ({"threads": 2**31}, "threads is 2147483648; it must be between 1 and 1024"),
        ({"device_id": 1}, "device_id is 1; there is only 0"),
        ({"device_id": "0"}, "device_id is '0'; there is only 0"),
        ({"provider": "tpu"}, "provider is 'tpu'; it must be one of cpu, cuda, tensorrt"),
        ({"target": "tpu"}, "no decode graph for target 'tpu'; it was exported for cpu, tensorrt"),
        ({"target": "cuda"}, "no decode graph for target 'cuda'; .* again with --target cuda"),
    ):
        with pytest.raises(ValueError, match=message):
            OrtBackend(bundle, **options)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        OrtBackend(bundle.folder / "absent")


def test_a_provider_gets_graphs_it_has_kernels_for(bundle: Manifest):
    assert check_choice(bundle, "cpu", None) == "cpu"
    assert check_choice(bundle, "cpu", "tensorrt") == "tensorrt"
    assert check_choice(bundle, "cuda", "tensorrt") == "tensorrt"
    assert check_choice(bundle, "tensorrt", None) == "tensorrt"
    for provider, target, message in (
        ("tensorrt", "cpu", "provider tensorrt runs graphs of tensorrt; target is cpu"),
        ("cuda", "cpu", "provider cuda runs graphs of cuda, tensorrt; target is cpu"),
        ("cuda", None, "no decode graph for target 'cuda'"),
    ):
        with pytest.raises(ValueError, match=message):
            check_choice(bundle, provider, target)


def test_bfloat16_graphs_are_refused_on_the_cpu(bundle: Manifest):
    graphs = tuple(replace(graph, dtype="bfloat16") for graph in bundle.graphs)
    with pytest.raises(ValueError, match="the graphs of tensorrt are bfloat16, .* --dtype float32"):
        OrtBackend(replace(bundle, graphs=graphs), target="tensorrt")


def test_slots_must_begin_where_tensorrt_can_bind_them(bundle: Manifest):
    # 2 heads of 8 floats are 64 bytes a row.
    for batch_size, rows in ((1, 27), (2, 28), (4, 32)):
        shape = replace(bundle.shape, batch_size=batch_size, max_seq_len=rows)
        assert check_choice(replace(bundle, shape=shape), "tensorrt", None) == "tensorrt"
    shape = replace(bundle.shape, max_seq_len=27)
    message = "a cache slot has 1728 bytes a layer, TensorRT wants a multiple of 256; export with"
    with pytest.raises(ValueError, match=message):
        check_choice(replace(bundle, shape=shape), "tensorrt", None)


def test_too_little_memory_is_refused_before_anything_is_loaded(bundle: Manifest):
    shape = replace(bundle.shape, batch_size=10**9)
    told: list[str] = []
    message = r"weights .* KiB, cache \d+\.\d+ GiB do not fit in .* of free memory; export with a"
    with pytest.raises(BackendUnavailableError, match=message):
        OrtBackend(replace(bundle, shape=shape), progress=told.append)
    assert not told


def test_what_is_told_and_kept(bundle: Manifest):
    told: list[str] = []
    backend = OrtBackend(str(bundle.folder), progress=told.append)
    assert told == ["loading prefill", "loading decode"]
    assert (backend.shape, backend.provider, backend.target) == (bundle.shape, "cpu", "cpu")
    assert 0 < backend.load_s < 60


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(("provider", "dtype"), [
    ("cuda", "float32"),
    ("cuda", "bfloat16"),
    pytest.param("tensorrt", "float32", marks=pytest.mark.tensorrt),
])  # fmt: skip
def test_gpu_providers_equal_one_forward_and_roll(tmp_path: Path, provider: str, dtype: str):
    if problem := provider_problem(provider):
        pytest.skip(problem)
    folder = tmp_path / "checkpoint"
    reference_model("llama-3.1").save_pretrained(folder)
    bundle = export_bundle(
        open_checkpoint(folder),
        tmp_path / "bundle",
        targets=(provider,),
        batch_size=B,
        prefill_len=P,
        max_seq_len=S,
        dtype=dtype,
    )
    backend = OrtBackend(bundle, provider=provider, engine_cache=tmp_path / "engines")
    # TensorRT's float32 products are TF32, whose mantissa is float16's.
    rtol, atol = TOLERANCE[dtype if provider == "cuda" else "float16"]
    ids = random_ids(NUM_POSITIONS, seed=2)
    model: Llama = our_model("llama-3.1", num_positions=NUM_POSITIONS)
    expected = one_forward(model, ids, window=S)
    scale = np.abs(expected).max()
    addresses = backend._cache.pointers()
    logits = prefill_chunks(backend, 2, ids[:S])
    np.testing.assert_allclose(logits, expected[S - 1], rtol, atol * scale)
    for position in range(S, NUM_POSITIONS):
        logits = decode_slot(backend, 2, ids[position], position)
        np.testing.assert_allclose(logits, expected[position], rtol, 4 * atol * scale)
    assert backend._cache.pointers() == addresses
