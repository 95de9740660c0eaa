"""Decode graphs that attend to the first rows alone: which runs when, and that none can be told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from references import assert_close, decode_slot, one_forward, prefill_chunks, random_ids

from llamac.export import export_bundle
from llamac.export.verify import verify_bundle
from llamac.model.checkpoint import open_checkpoint
from llamac.model.checkpoint.random_weights import write_random_checkpoint
from llamac.model.config import LlamaConfig
from llamac.runtime.backend import StepInputs
from llamac.runtime.bundle.inspect import print_bundle
from llamac.runtime.bundle.manifest import GraphFile, Manifest
from llamac.runtime.bundle.memory_needs import memory_needs
from llamac.runtime.ort.bound_graph import BoundGraph
from llamac.runtime.ort.ort_backend import OrtBackend
from llamac.runtime.request import Request
from llamac.runtime.sampling import SamplingParams
from llamac.runtime.scheduler import generate
from variants import VARIANTS, our_model, reference_model

B, P, S = 3, 8, 28
BUCKETS = (8, 16)
NUM_POSITIONS = 3 * S


def export(folder: Path, **options) -> Manifest:
    sizes = {"batch_size": B, "prefill_len": P, "max_seq_len": S}
    checkpoint = open_checkpoint(folder / "checkpoint")
    return export_bundle(
        checkpoint, folder / "bundle", targets=("tensorrt",), **{**sizes, **options}
    )


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """float32, heads of 8."""
    folder = tmp_path_factory.mktemp("buckets")
    reference_model("llama-3.1").save_pretrained(folder / "checkpoint")
    return export(folder, row_buckets=(16, 99, S, 8, 8))


def decode_graphs(bundle: Manifest) -> list[GraphFile]:
    return [g for g in bundle.graphs if g.role == "decode"]


class Noted:
    """A bound graph that notes when it runs."""

    def __init__(self, graph: BoundGraph, ran: list[int]) -> None:
        self.graph, self.ran, self.attended_rows = graph, ran, graph.attended_rows
        self.tokens = graph.tokens

    def run(self, inputs: StepInputs):
        self.ran.append(self.attended_rows)
        return self.graph.run(inputs)


def open_noted(bundle: Manifest) -> tuple[OrtBackend, list[int]]:
    """A backend, and the rows that each of its steps attends to."""
    backend, ran = OrtBackend(bundle, target="tensorrt", threads=1), []
    graphs = backend._decode._graphs
    graphs[:] = [Noted(graph, ran) for graph in graphs]  # type: ignore[list-item]
    return backend, ran


def without_buckets(bundle: Manifest) -> Manifest:
    return replace(bundle, graphs=tuple(g for g in bundle.graphs if g.attended_rows == S))


def test_there_is_a_graph_for_each_number_of_rows_below_the_cache(bundle: Manifest, capsys):
    assert [g.attended_rows for g in decode_graphs(bundle)] == [*BUCKETS, S]
    assert [g.file for g in decode_graphs(bundle)] == [
        "tensorrt-decode-8.onnx",
        "tensorrt-decode-16.onnx",
        "tensorrt-decode.onnx",
    ]
    assert bundle.find_graph("decode", "tensorrt").file == "tensorrt-decode.onnx"
    assert bundle.row_buckets == BUCKETS
    print_bundle(bundle)
    assert "    decode 3 x 1 on 16 rows: " in capsys.readouterr().out


def test_row_buckets_that_are_not_asked_for_are_far_below_the_cache(tmp_path: Path):
    config = LlamaConfig.from_dict({**VARIANTS["llama-3.1"], "num_hidden_layers": 1})
    write_random_checkpoint(None, tmp_path / "checkpoint", config=config)
    found = export(tmp_path, row_buckets=None, max_seq_len=1024)
    assert [g.attended_rows for g in decode_graphs(found)] == [256, 1024]
    with pytest.raises(ValueError, match=r"row_buckets are \[8, 0\]; each must be at least 1"):
        export(tmp_path, row_buckets=(8, 0))


def test_every_position_equals_one_forward_on_the_fewest_rows(bundle: Manifest):
    """The edges of 8, 16 and 28 rows, and past the roll."""
    ids = random_ids(S + 12, seed=3)
    expected = one_forward(our_model("llama-3.1", num_positions=NUM_POSITIONS), ids, window=S)
    backend, ran = open_noted(bundle)
    assert backend._decode.first_positions == [0, 8, 16]  # what a GPU is warmed up with
    for position, token_id in enumerate(ids):
        assert_close(decode_slot(backend, 1, token_id, position), expected[position])
    assert ran == [8] * 8 + [16] * 8 + [S] * (S - 16 + 12)


def test_the_longest_slot_decides(bundle: Manifest):
    lengths = (3, 15, 9)
    backend, ran = open_noted(bundle)
    prompts = [random_ids(length + 2, seed=length) for length in lengths]
    model = our_model("llama-3.1")
    for slot, (ids, length) in enumerate(zip(prompts, lengths, strict=True)):
        prefill_chunks(backend, slot, ids[:length])
    for step in range(2):
        positions = np.array(lengths) + step
        fed = np.array([ids[p] for ids, p in zip(prompts, positions, strict=True)])
        for ids, position, row in zip(
            prompts, positions, backend.decode(fed, positions), strict=True
        ):
            assert_close(row, one_forward(model, ids[: position + 1])[-1])
    assert ran == [16, S]


@pytest.mark.parametrize("rows", BUCKETS)
def test_rows_behind_are_not_read(bundle: Manifest, rows: int):
    ids = random_ids(rows, seed=4)
    backend, ran = open_noted(bundle)
    prefill_chunks(backend, 1, ids[:-1])
    for buffer in backend._cache._buffers:
        buffer.read()[:, :, rows:] = np.nan
    assert_close(
        decode_slot(backend, 1, ids[-1], rows - 1), one_forward(our_model("llama-3.1"), ids)[-1]
    )
    assert ran == [rows]


def test_a_step_copies_the_rows_it_attends_to_and_no_more(
    bundle: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    original = onnxruntime.SessionOptions

    def options():
        made = original()
        made.enable_profiling = True
        made.profile_file_prefix = str(tmp_path / "profile")
        return made

    monkeypatch.setattr(onnxruntime, "SessionOptions", options)
    backend, _ = open_noted(bundle)
    decode_slot(backend, 0, 1, 7)
    profile = backend._decode._graphs[0].graph._session.end_profiling()
    nodes = [event["args"] for event in json.loads(Path(profile).read_text()) if "args" in event]
    sizes: dict[str, set[int]] = {}
    for node in nodes:
        if "op_name" in node and "output_size" in node:
            sizes.setdefault(node["op_name"], set()).add(int(node["output_size"]))
    row_bytes = bundle.model.num_key_value_heads * bundle.model.head_dim * 4
    assert sizes.pop("TensorScatter") == {B * S * row_bytes}  # in place: no copy is warned of
    assert sizes["Slice"] == {B * 8 * row_bytes}
    assert max(max(found) for found in sizes.values()) < B * S * row_bytes


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_texts_are_those_of_the_graph_of_all_rows(bundle: Manifest, temperature: float):
    requests = [
        Request(
            prompt_ids=tuple(random_ids(length, seed=length)),
            max_new_tokens=S,
            limit_policy="roll",
            sampling=SamplingParams(temperature=temperature, seed=5),
        )
        for length in (2, 6, 13, 20)
    ]
    backend, ran = open_noted(bundle)
    whole, whole_ran = open_noted(without_buckets(bundle))
    ours, theirs = (generate(x, None, requests) for x in (backend, whole))
    assert [x.ids for x in ours] == [x.ids for x in theirs]
    assert {*ran} == {8, 16, S}
    assert {*whole_ran} == {S}


def test_a_copy_of_the_weights_for_each_graph_is_too_much_on_a_cpu(bundle: Manifest):
    def num_decode_graphs(**options) -> int:
        backend = OrtBackend(bundle, target="tensorrt", threads=1, **options)
        return len(backend._decode._graphs)

    assert num_decode_graphs() == 3
    assert num_decode_graphs(prepack=True) == 1
    needs = memory_needs(bundle, "tensorrt")
    assert needs.weight_copies == 4  # engines: a chunk, and three steps


def test_verify_runs_every_decode_graph(bundle: Manifest):
    def verify(manifest: Manifest) -> dict[str, tuple[bool, int]]:
        found = verify_bundle(manifest, providers=["cpu"], targets=["tensorrt"]).runs[0].groups
        return {g.name: (g.passed, g.comparison.num_predictions) for g in found if g.comparison}

    passed = verify(bundle)
    assert all(ok for ok, _ in passed.values())
    # A prompt each for two slots, then for each edge a prompt (of one chunk, of two) and three
    # steps of three slots.
    assert passed["row buckets"] == (True, 2 + (1 + 9) + (2 + 9))
    # A graph that sees fewer rows than the manifest says.
    wrong = tuple(
        replace(g, attended_rows=12) if g.attended_rows == 8 else g for g in bundle.graphs
    )
    assert not verify(replace(bundle, graphs=wrong))["row buckets"][0]
