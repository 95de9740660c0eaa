"""The measured systems behind one interface, against each other; what they say where they lack."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TOLERANCE
from numpy.typing import NDArray

from llamac.model.checkpoint import open_checkpoint
from llamac.model.checkpoint.random_weights import write_random_checkpoint
from llamac.model.compiled.torch_backend import TorchBackend
from llamac.model.config import LlamaConfig
from llamac.model.quantization import parse_recipe, quantize_checkpoint
from llamac.model.tables import rope_tables, rotate
from llamac.perf.llama_cpp_peer import permute_rope
from llamac.perf.setup import Runner, Setup
from llamac.perf.stand_in_tokenizer import write_stand_in_tokenizer
from llamac.perf.systems import PEERS, SYSTEMS, BackendRunner
from llamac.runtime.backend import BackendUnavailableError, StaticShape

CONFIG = LlamaConfig(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("perf") / "model"
    write_random_checkpoint(None, folder, config=CONFIG, dtype="float32")
    return folder


@pytest.fixture(autouse=True)
def _threads_as_they_were() -> Iterator[None]:
    """A system sets torch's threads, which belong to the whole process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def make_setup(checkpoint: Path, system: str, **sizes: int) -> Setup:
    shape = {"threads": 1, "batch_size": 2, "max_seq_len": 32, "prefill_len": 4} | sizes
    return Setup(system=system, model=str(checkpoint), dtype="float32", device="cpu", **shape)


def open_system(checkpoint: Path, system: str, folder: Path) -> Runner:
    """A system with its artifact, in this process; skips the test where it isn't installed."""
    setup = make_setup(checkpoint, system, batch_size=1 if system.startswith("genai") else 2)
    chosen = SYSTEMS[system]
    try:
        if chosen.build is not None:
            chosen.build(setup, folder)
            setup = replace(setup, artifact=str(folder))
        return chosen.open(setup)
    except BackendUnavailableError as error:
        pytest.skip(str(error))


def run_steps(runner: Runner, batch_size: int) -> NDArray[np.float32]:
    """Logits of a prompt of each sequence, of three steps, and of the same after a reset."""
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 9))[:batch_size]
    steps = []
    for prompt_len in (6, 3):
        runner.reset()
        steps.append(runner.extend(ids[:, :prompt_len]).copy())
        for i in range(3):
            steps.append(runner.decode(ids[:, prompt_len + i]).copy())
    return np.stack(steps)


@pytest.fixture(scope="module")
def expected(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> NDArray[np.float32]:
    return run_steps(open_system(checkpoint, "eager", tmp_path_factory.mktemp("none")), 2)


@pytest.mark.parametrize(
    "system", ["ort-cpu", "ort-cpu-standard", "transformers", "genai", "llama.cpp"]
)
def test_systems_compute_the_same(
    system: str, checkpoint: Path, expected: NDArray[np.float32], tmp_path: Path
) -> None:
    runner = open_system(checkpoint, system, tmp_path / "artifact")
    assert runner.precision == "float32"
    assert runner.phases["load_s"] > 0
    if system == "genai":
        expected = expected[:, :1]
    logits = run_steps(runner, expected.shape[1])
    assert np.unique(expected.argmax(axis=-1)).size > 4  # else equal choices would mean little
    np.testing.assert_array_equal(logits.argmax(axis=-1), expected.argmax(axis=-1))
    rtol, atol = TOLERANCE["float32"]
    np.testing.assert_allclose(logits, expected, rtol=rtol, atol=atol)


@pytest.fixture(scope="module")
def quantized(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "int4"
    quantize_checkpoint(open_checkpoint(checkpoint), folder, parse_recipe("int4"))
    return folder


@pytest.mark.parametrize("system", ["eager", "ort-cpu"])
def test_a_quantized_folder_says_what_its_weights_take(
    system: str, quantized: Path, tmp_path: Path
) -> None:
    """Two layers: 4 bits and 2 of a scale for each 32 columns, 8 where they matter most."""
    facts = open_system(quantized, system, tmp_path / "artifact").facts
    table_bytes = 4 * CONFIG.vocab_size * CONFIG.hidden_size
    assert facts["lookup_bytes"] == table_bytes
    stored = (quantized / "model.safetensors").stat().st_size
    assert 0.8 * stored < facts["weight_bytes"] < stored  # but for the header and the shapes
    assert facts.get("activations") == ("int8" if system == "ort-cpu" else None)


@pytest.mark.parametrize("system", ["genai-int4", "genai-int8", "llama.cpp-q8_0", "llama.cpp-q4_0"])
def test_quantized_peers_are_built_and_run(
    system: str, checkpoint: Path, expected: NDArray[np.float32], tmp_path: Path
) -> None:
    runner = open_system(checkpoint, system, tmp_path / "artifact")
    assert runner.precision == "float32"
    assert not list(tmp_path.glob("tmp*"))
    weight_bytes = runner.facts["weight_bytes"]
    assert isinstance(weight_bytes, int)
    assert weight_bytes < sum(path.stat().st_size for path in (tmp_path / "artifact").iterdir())
    logits = run_steps(runner, 1 if system.startswith("genai") else 2)
    assert logits.shape[2] == CONFIG.vocab_size
    for row, right in zip(logits[:, 0], expected[:, 0], strict=True):
        assert np.corrcoef(row, right)[0, 1] > 0.9


@pytest.mark.parametrize("system", ["genai-int4", "llama.cpp-q4_0"])
def test_peers_quantize_what_is_not_quantized(system: str, quantized: Path, tmp_path: Path) -> None:
    build = SYSTEMS[system].build
    assert build is not None
    with pytest.raises(BackendUnavailableError, match="aren't quantized|is not installed"):
        build(make_setup(quantized, system), tmp_path / "artifact")


def test_transformers_seeks_with_rows_of_zeros(checkpoint: Path, tmp_path: Path) -> None:
    """As our cache has where nothing was written, once its warm-up's rows are cleared."""
    ours = open_system(checkpoint, "eager", tmp_path)
    assert isinstance(ours, BackendRunner)
    assert isinstance(ours.backend, TorchBackend)
    for buffer in ours.backend.cache.buffers:
        buffer.zero_()
    logits = []
    for runner in (ours, open_system(checkpoint, "transformers", tmp_path)):
        runner.seek(7)
        runner.decode(np.array([1, 2]))
        runner.seek(8)
        logits.append(runner.decode(np.array([5, 6])).copy())
    rtol, atol = TOLERANCE["float32"]
    np.testing.assert_allclose(*logits, rtol=rtol, atol=atol)


@pytest.mark.parametrize("system", ["genai", "llama.cpp"])
def test_peers_seek_by_feeding_tokens(system: str, checkpoint: Path, tmp_path: Path) -> None:
    runner = open_system(checkpoint, system, tmp_path / "artifact")
    ids = np.array([5] if system == "genai" else [5, 6])
    runner.extend(np.zeros((len(ids), 7), dtype=np.int64))
    after_prompt = runner.decode(ids).copy()
    runner.reset()
    runner.extend(np.zeros((len(ids), 3), dtype=np.int64))
    runner.seek(7)
    rtol, atol = TOLERANCE["float32"]
    np.testing.assert_allclose(runner.decode(ids), after_prompt, rtol=rtol, atol=atol)


def test_requests_run_from_end_to_end(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    write_stand_in_tokenizer(folder, 90)  # of 97 ids
    runner = open_system(folder, "eager", tmp_path)
    assert isinstance(runner, BackendRunner)
    assert runner.phases["tokenizer_s"] > 0
    times = runner.generate([[1, 2, 3, 4, 96], [6]], num_new=4, seed=0)
    assert len(times["ttft_s"]) == 2
    # One request is a step ahead of the other, so of three steps each two are shared.
    assert len(times["step_s"]) == 2
    assert max(times["ttft_s"]) + sum(times["step_s"]) <= times["total_s"]
    times = runner.generate([[1, 2, 3]] * 2, num_new=1, seed=0)
    assert times["step_s"] == []


@pytest.mark.slow
def test_a_compiled_system_says_that_nothing_was_compiled_later(
    checkpoint: Path, tmp_path: Path
) -> None:
    runner = open_system(checkpoint, "compile", tmp_path)
    run_steps(runner, 2)
    assert runner.facts["recompiles"] == 0
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
    assert runner.facts["recompiles"] == 1


@pytest.mark.parametrize(
    ("system", "module"),
    [
        ("ort-cpu", "onnxruntime"),
        ("transformers", "transformers"),
        ("genai", "onnxruntime_genai"),
        ("llama.cpp", "llama_cpp"),
    ],
)
def test_what_is_missing_is_named_with_the_line_that_installs_it(
    system: str, module: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    setup = make_setup(checkpoint, system)
    with pytest.raises(BackendUnavailableError, match="is not installed; .*pip install") as opened:
        SYSTEMS[system].open(setup)
    assert "\n" not in str(opened.value)


@pytest.mark.parametrize(
    ("system", "module"),
    [("genai", "onnxruntime_genai"), ("llama.cpp", "llama_cpp"), ("ort-cpu", "onnxscript")],
)
def test_a_build_names_what_is_missing_too(
    system: str, module: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    for name in [name for name in sys.modules if name.startswith("llamac.export")]:
        monkeypatch.delitem(sys.modules, name)
    build = SYSTEMS[system].build
    assert build is not None
    with pytest.raises(BackendUnavailableError, match="is not installed; .*pip install"):
        build(make_setup(checkpoint, system), tmp_path / "artifact")


def test_peers_are_systems() -> None:
    assert set(PEERS) < set(SYSTEMS)


def test_permuted_rows_in_order() -> None:
    rows = torch.arange(8.0)[:, None]  # two heads of four: rows 0, 1 pair with 2, 3
    assert permute_rope(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_rotating_permuted_pairs_is_rotating_halves() -> None:
    """q of rotate-half weights, and of permuted weights rotated pair by pair, are the same."""
    heads, dim, position = CONFIG.num_attention_heads, CONFIG.head_dim, 5
    weight = torch.randn(heads * dim, CONFIG.hidden_size, generator=torch.manual_seed(0))
    x = torch.randn(CONFIG.hidden_size, generator=torch.manual_seed(1))
    cos, sin = (table[position] for table in rope_tables(CONFIG, 8))  # [D/2]

    halves = rotate((weight @ x).view(1, 1, heads, dim), cos[None, None], sin[None, None])[0, 0]
    pairs = (permute_rope(weight, heads) @ x).view(heads, dim // 2, 2)
    first, second = pairs.unbind(-1)
    rotated = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1)
    back = rotated.transpose(-1, -2).reshape(heads, dim)
    rtol, atol = TOLERANCE["float32"]
    torch.testing.assert_close(back, halves, rtol=rtol, atol=atol)


class _Recorder:
    """A backend that notes its calls."""

    shape = StaticShape(
        batch_size=2, max_seq_len=10, prefill_lens=(4,), num_positions=10, vocab_size=3
    )

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def prefill(self, slot: int, ids: Sequence[int], start: int) -> NDArray[np.float32]:
        self.calls.append(("prefill", slot, list(ids), start))
        return np.full(3, slot, dtype=np.float32)

    def decode(self, ids: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.float32]:
        self.calls.append(("decode", ids.tolist(), positions.tolist()))
        return np.zeros((2, 3), dtype=np.float32)


def make_runner() -> tuple[BackendRunner, _Recorder]:
    backend = _Recorder()
    return BackendRunner(backend, precision="float32", phases={}, facts={}), backend


def test_a_backend_is_fed_as_the_generation_loop_does() -> None:
    runner, backend = make_runner()
    logits = runner.extend(np.array([[1, 2, 0, 1, 2], [0, 0, 0, 0, 1]]))
    assert logits[:, 0].tolist() == [0, 1]
    runner.decode(np.array([2, 1]))
    runner.decode(np.array([1, 1]))
    assert backend.calls == [
        ("prefill", 0, [1, 2, 0, 1], 0),
        ("prefill", 0, [2], 4),
        ("prefill", 1, [0, 0, 0, 0], 0),
        ("prefill", 1, [1], 4),
        ("decode", [2, 1], [5, 5]),
        ("decode", [1, 1], [6, 6]),
    ]


def test_seek_and_reset_move_the_position() -> None:
    runner, backend = make_runner()
    runner.seek(7)
    runner.decode(np.array([0, 0]))
    with pytest.raises(ValueError, match="seek instead"):
        runner.extend(np.array([[1], [1]]))
    runner.reset()
    runner.decode(np.array([0, 0]))
    assert [call[2] for call in backend.calls] == [[7, 7], [0, 0]]


def test_calls_are_counted() -> None:
    """On a GPU as many replays are expected."""
    backend = _Recorder()
    runner = BackendRunner(
        backend, precision="float32", phases={}, facts={}, count=lambda calls: {"steps": calls}
    )
    runner.extend(np.array([[1, 2, 0, 1, 2], [0, 0, 0, 0, 1]]))
    runner.decode(np.array([2, 1]))
    runner.generate([[1, 2, 0, 1, 2], [1]], num_new=3, seed=0)
    assert runner.facts == {"steps": len(backend.calls)}
