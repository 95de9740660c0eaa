"""The exported graphs: their shapes and operators, and their logits against the eager model."""

from __future__ import annotations

import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from llamac.export import TARGETS, export_bundle
from llamac.export.graphs import GraphSpec, input_names, output_names, save_graph, trace_graph
from llamac.model.checkpoint import load_model, open_checkpoint
from llamac.model.checkpoint.stored import weight_shapes
from llamac.model.compiled.torch_backend import TorchBackend
from llamac.model.config import LlamaConfig
from llamac.runtime.bundle.manifest import Manifest, StoredWeight, WeightFile
from llamac.runtime.ort.ort_backend import OrtBackend
from variants import VARIANTS, reference_model

B, P, S = 3, 8, 32
ONNX_TYPES = {"float32": onnx.TensorProto.FLOAT, "bfloat16": onnx.TensorProto.BFLOAT16}


def export(folder: Path, variant: str, **options) -> Manifest:
    reference_model(variant).save_pretrained(folder / "checkpoint")
    sizes = {"batch_size": B, "prefill_len": P, "max_seq_len": S}
    checkpoint = open_checkpoint(folder / "checkpoint")
    return export_bundle(checkpoint, folder / "bundle", **{**sizes, **options})


@pytest.fixture(scope="module")
def all_targets(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """float32 for cpu, bfloat16 for the others; heads of a width that TensorRT has kernels for."""
    folder = tmp_path_factory.mktemp("all")
    return export(folder, "smollm", targets=tuple(TARGETS), dtype="bfloat16")


def eager(bundle: Manifest, dtype: torch.dtype = torch.float32) -> TorchBackend:
    checkpoint = open_checkpoint(bundle.folder.parent / "checkpoint")
    shape = bundle.shape
    return TorchBackend(
        load_model(checkpoint, num_positions=shape.num_positions, dtype=dtype),
        batch_size=shape.batch_size,
        max_seq_len=shape.max_seq_len,
        prefill_lens=shape.prefill_lens,
        compile=False,
    )


def run_both(bundle: Manifest, target: str, last_position: int, dtype=torch.float32):
    """Chunks (one moved back to the last row) into two slots, then ragged steps; yields logits."""
    ours, theirs = OrtBackend(bundle, target=target, threads=1), eager(bundle, dtype)
    ids = np.random.default_rng(0).integers(0, bundle.shape.vocab_size, (B, last_position + 1))
    chunks = [(0, 0, 8), (2, 0, 3), (0, 8, 16), (0, 16, 21), (0, 21, 29), (0, 24, 30)]
    for slot, start, stop in chunks:
        chunk = ids[slot, start:stop].tolist()
        yield ours.prefill(slot, chunk, start), theirs.prefill(slot, chunk, start).copy()
    positions = np.array([30, 0, 3])  # the last row, an empty slot, a short one
    while positions[0] <= last_position:
        step = ids[np.arange(B), positions]
        yield ours.decode(step, positions).copy(), theirs.decode(step, positions).copy()
        positions = positions + 1


@pytest.fixture(scope="module")
def float16_bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Manifest]:
    """Attention as an operator, and written out: heads of 16 and of 8."""
    options = {"targets": ("tensorrt", "cuda"), "dtype": "float16"}
    return {
        variant: export(tmp_path_factory.mktemp("float16"), variant, **options)
        for variant in ("smollm", "llama-3.1")
    }


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["smollm", "llama-3.1"])
@pytest.mark.parametrize("target", ["tensorrt", "cuda"])
def test_float16_graphs_are_as_near_to_float32_as_eager_float16(
    float16_bundles: dict[str, Manifest], variant: str, target: str
):
    bundle = float16_bundles[variant]
    has_operator = (variant, target) == ("smollm", "tensorrt")
    assert ("Attention" in bundle.find_graph("decode", target).ops) == has_operator
    exact = [theirs for _, theirs in run_both(bundle, target, 31)]
    errors = np.array(
        [
            (np.abs(ours - reference).max(), np.abs(theirs - reference).max())
            for (ours, theirs), reference in zip(
                run_both(bundle, target, 31, torch.float16), exact, strict=True
            )
        ]
    )
    assert 0 < errors[:, 1].max() < 0.1
    assert errors[:, 0].max() <= 1.2 * errors[:, 1].max()


def load_graph(bundle: Manifest, file: str) -> onnx.ModelProto:
    return onnx.load(bundle.folder / file, load_external_data=False)


def test_inputs_and_outputs_are_the_documented_table(all_targets: Manifest):
    config = LlamaConfig.from_dict(VARIANTS["smollm"])
    assert len(all_targets.graphs) == 6
    for entry in all_targets.graphs:
        graph = load_graph(all_targets, entry.file).graph
        batch, tokens = (1, P) if entry.role == "prefill" else (B, 1)
        assert (entry.batch, entry.tokens, entry.rows, entry.logits) == (batch, tokens, S, 1)
        assert entry.dtype == ("float32" if entry.target == "cpu" else "bfloat16")
        integer, cache_type = onnx.TensorProto.INT64, ONNX_TYPES[entry.dtype]
        cache = ((batch, config.num_key_value_heads, S, config.head_dim), cache_type)
        layers = range(config.num_hidden_layers)

        def caches(prefix: str, layers=layers, cache=cache) -> dict:
            return {f"{prefix}.{i}.{x}": cache for i in layers for x in ("key", "value")}

        assert described(graph.input) == {
            "input_ids": ((batch, tokens), integer),
            "positions": ((batch,), integer),
            "write_indices": ((batch,), integer),
            "logit_indices": ((batch, 1), integer),
            **caches("past_key_values"),
        }
        assert described(graph.output) == {
            "logits": ((batch, 1, config.vocab_size), onnx.TensorProto.FLOAT),
            **caches("present"),
        }
        assert [value.name for value in graph.input] == input_names(config)
        assert [value.name for value in graph.output] == output_names(config)


def described(values) -> dict[str, tuple[tuple[int, ...], int]]:
    return {value.name: (dims(value), value.type.tensor_type.elem_type) for value in values}


def dims(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    found = value.type.tensor_type.shape.dim
    assert all(dim.WhichOneof("value") == "dim_value" for dim in found), value.name
    return tuple(dim.dim_value for dim in found)


def test_every_dimension_of_every_value_is_an_integer(all_targets: Manifest):
    for entry in all_targets.graphs:
        graph = load_graph(all_targets, entry.file).graph
        known = {value.name for value in (*graph.value_info, *graph.output)}
        assert known >= {name for node in graph.node for name in node.output}
        for value in graph.value_info:
            dims(value)


def test_graphs_pass_the_checker_where_the_weights_are_not_links(
    all_targets: Manifest, tmp_path: Path
):
    for name in all_targets.files:
        (tmp_path / name).write_bytes((all_targets.folder / name).read_bytes())
    for entry in all_targets.graphs:
        onnx.checker.check_model(str(tmp_path / entry.file), full_check=True)


def test_operators_are_these_and_no_others(all_targets: Manifest):
    # Three layers; each product one Gemm on the stored weight, which nothing transposes or copies.
    common = {
        "Add": 9,  # 6 residuals; positions, write or mask row, logit row
        "Gather": 4,  # embedding, cos, sin, logit rows
        "Gemm": 22,
        "RMSNormalization": 7,
        "Reshape": 15,  # q, k, v, output; ids, logit rows, logits
        "RotaryEmbedding": 6,
        "Sigmoid": 3,
    }
    fused = {**common, "GroupQueryAttention": 3, "Mul": 6, "Unsqueeze": 1}
    standard = {
        **common,
        "Attention": 3,
        "LessOrEqual": 1,
        "Mul": 9,
        "TensorScatter": 6,
        "Transpose": 12,
        "Unsqueeze": 3,
    }
    rotated = 4 * 3  # q and k of each layer, to float32 and back
    expected = {
        "cpu": {**fused, "Cast": 1},  # seqlens_k
        "cuda": {**fused, "Cast": 1 + rotated + 1},  # and logits
        "tensorrt": {**standard, "Cast": rotated + 1},
    }
    for entry in all_targets.graphs:
        nodes = load_graph(all_targets, entry.file).graph.node
        turned = {}
        if entry.target == "cpu":  # the weight is the left factor, but of a chunk's one logit row
            turned["Transpose"] = 22 if entry.role == "decode" else 21
        assert entry.ops == expected[entry.target] | turned, entry.file
        assert len(nodes) == sum(entry.ops.values())
        standard_only = {node.domain for node in nodes} == {""}
        assert standard_only == (entry.target == "tensorrt")


@pytest.mark.parametrize(
    ("dtype", "operator"),
    [("float32", "TensorScatter"), ("float16", "GroupQueryAttention")],
)
def test_cuda_graphs_have_operators_with_cuda_kernels(dtype: str, operator: str):
    config = replace(LlamaConfig.from_dict(VARIANTS["llama-3.1"]), num_hidden_layers=1)
    spec = GraphSpec(target="cuda", dtype=dtype, batch=2, tokens=1, rows=S, num_positions=S)
    ops = {node.op_type for node in trace_graph(config, spec).graph}
    assert ops & {"TensorScatter", "GroupQueryAttention"} == {operator}


@pytest.mark.parametrize(
    ("dtype", "head_dim", "has_kernel"),
    [
        ("bfloat16", 16, True),
        ("float16", 24, True),
        ("bfloat16", 256, True),
        ("float32", 64, False),
        ("float16", 8, False),
        ("bfloat16", 20, False),
        ("float16", 264, False),
    ],
)
def test_attention_is_an_operator_where_tensorrt_has_a_kernel(
    dtype: str, head_dim: int, has_kernel: bool
):
    config = replace(
        LlamaConfig.from_dict(VARIANTS["llama-3.1"]), num_hidden_layers=1, head_dim=head_dim
    )
    spec = GraphSpec(target="tensorrt", dtype=dtype, batch=2, tokens=1, rows=S, num_positions=S)
    ops = [node.op_type for node in trace_graph(config, spec).graph]
    assert (ops.count("Attention"), ops.count("Softmax")) == (int(has_kernel), int(not has_kernel))
    assert ops.count("MatMul") == (0 if has_kernel else 2)


def test_every_weight_is_a_place_in_a_file_under_its_own_name(all_targets: Manifest):
    config = LlamaConfig.from_dict(VARIANTS["smollm"])
    wanted = {*weight_shapes(config), "rope.cos", "rope.sin"}
    places = {
        dtype: {
            name: (weight.file, str(stored.offset))
            for weight in all_targets.weights
            for name, stored in weight.tensors.items()
            if stored.dtype == dtype or weight.file == "rope.safetensors"
        }
        for dtype in ("float32", "bfloat16")
    }
    for entry in all_targets.graphs:
        found = {}
        for tensor in load_graph(all_targets, entry.file).graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                data = {item.key: item.value for item in tensor.external_data}
                found[tensor.name] = (data["location"], data["offset"])
            else:
                assert len(tensor.raw_data) <= 8 * S, tensor.name
        assert found.keys() == wanted
        assert found == places[entry.dtype]


def test_a_graph_holds_nothing_of_the_machine_that_made_it(all_targets: Manifest):
    for entry in all_targets.graphs:
        graph = load_graph(all_targets, entry.file).graph
        for part in (graph, *graph.node, *graph.input, *graph.value_info, *graph.initializer):
            assert not part.doc_string
            assert not part.metadata_props


def test_tracing_the_shape_of_a_large_model_takes_no_memory_for_it():
    config = replace(
        LlamaConfig.from_dict(VARIANTS["llama-3.1"]),
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=1,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
    )
    spec = GraphSpec(
        target="tensorrt", dtype="float32", batch=8, tokens=1, rows=131072, num_positions=131072
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = trace_graph(config, spec)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
    shape = model.graph.initializers["lm_head.weight"].shape
    assert shape is not None
    assert shape.numpy() == (128256, 8192)  # 4 GiB, were it real


def test_tracing_twice_writes_the_same_bytes(tmp_path: Path):
    config = replace(LlamaConfig.from_dict(VARIANTS["llama-3.1"]), num_hidden_layers=1)
    shapes = {**weight_shapes(config), "rope.cos": (64, 4), "rope.sin": (64, 4)}
    places = {
        name: StoredWeight(shape=shape, offset=0, dtype="float32") for name, shape in shapes.items()
    }
    file = WeightFile(file="model.safetensors", tensors=places)
    spec = GraphSpec(target="cpu", dtype="float32", batch=2, tokens=1, rows=S, num_positions=64)
    for name in ("one", "two"):
        save_graph(trace_graph(config, spec), tmp_path / name, [file], config)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
