"""Llama to ONNX: static-shape prefill and decode graphs, traced without weights.

Every graph of every target has these inputs and outputs, all dimensions integers:

| name | shape | dtype | meaning |
|---|---|---|---|
| input_ids | [B, T] | int64 | token ids; padding ids must be valid too |
| positions | [B] | int64 | absolute position of each row's first token (RoPE, mask) |
| write_indices | [B] | int64 | cache row that token is written to |
| logit_indices | [B, N] | int64 | which of the T tokens get logits |
| past_key_values.{i}.key, .value | [B, K, S, D] | the graph's | cache of layer i |
| logits (output) | [B, N, V] | float32 | |
| present.{i}.key, .value (output) | [B, K, S, D] | the graph's | bind to the past's memory |

Prefill has B = 1, T = P; decode has B = batch_size, T = 1; N = 1 in both. Past the cache
(position >= S, decode only) graphs with TensorScatter (`tensorrt`, `cuda` in float32, and heads
whose size isn't a multiple of 8) take write_indices = position % S. GroupQueryAttention (all
others) appends at write_indices: copy row S-1 over row (position - S) % (S - 1), then pass
write_indices = S - 1.
"""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import onnxscript.optimizer
import torch
from onnx_ir.passes import common
from onnxscript.rewriter import rewrite
from onnxscript.rewriter.rules.common import reshape_reshape_rule
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..model.cache import KVCache, layer_buffers
from ..model.config import LlamaConfig
from ..model.llama import Llama
from ..runtime.backend import StepInputs
from ..runtime.bundle.manifest import WeightFile
from .operators import ExportAttention, GroupQueryAttention, StandardAttention

__all__ = [
    "OPSET",
    "TARGETS",
    "GraphSpec",
    "input_names",
    "output_names",
    "save_graph",
    "trace_graph",
]

# The first with TensorScatter; torch's exporter writes invalid models from 26 on.
OPSET = 24

TARGETS: dict[str, type[ExportAttention]] = {
    "tensorrt": StandardAttention,
    "cuda": GroupQueryAttention,
    "cpu": GroupQueryAttention,
}


_ONNX_DTYPES = {"float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16"}
_MAX_CONSTANT_SIZE = 1 << 20  # elements: arange(S) is the longest


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphSpec:
    """The sizes of one graph.

    Attributes:
        target: One of TARGETS.
        dtype: Of weights and cache.
        batch: B.
        tokens: T.
        rows: S.
        logits: N.
        num_positions: Rows of the RoPE tables.
    """

    target: str
    dtype: str
    batch: int
    tokens: int
    rows: int
    logits: int = 1
    num_positions: int


def _attention_type(config: LlamaConfig, spec: GraphSpec) -> type[ExportAttention]:
    # GroupQueryAttention has CUDA kernels for 16-bit types alone, and none for other head sizes.
    on_gpu_in_float32 = spec.target == "cuda" and spec.dtype == "float32"
    if on_gpu_in_float32 or config.head_dim % 8:
        return StandardAttention
    return TARGETS[spec.target]


def input_names(config: LlamaConfig) -> list[str]:
    """The graph's inputs in their order."""
    return [*StepInputs.graph_sizes(1, 1, 1), *_cache_names(config, "past_key_values")]


def output_names(config: LlamaConfig) -> list[str]:
    """The graph's outputs in their order."""
    return ["logits", *_cache_names(config, "present")]


def trace_graph(config: LlamaConfig, spec: GraphSpec) -> ir.Model:
    """Traces one graph through the model's own forward; no weight exists or is read.

    Args:
        config: The model.
        spec: The graph's sizes.

    Returns:
        The graph, its initializers under HF's names (and rope.cos, rope.sin), without values.
    """
    dtype = getattr(torch, spec.dtype)
    names = input_names(config)
    with _quiet(), FakeTensorMode():
        step = _Step(config, spec, dtype)
        sizes = StepInputs.graph_sizes(spec.batch, spec.tokens, spec.logits)
        inputs = [torch.zeros(size, dtype=torch.int64) for size in sizes.values()]
        inputs += KVCache.allocate(config, spec.batch, spec.rows, dtype=dtype).buffers
        program = torch.onnx.export(
            torch.export.export(step, tuple(inputs), strict=False),
            dynamo=True,
            opset_version=OPSET,
            optimize=False,  # would read the weights
            input_names=names,
            output_names=output_names(config),
            verbose=False,
        )
        assert program is not None
        model = program.model
        _name_weights(model, config)
        # Not the whole optimizer, which merges weights of equal values under one name.
        onnxscript.optimizer.fold_constants(
            model, onnx_shape_inference=True, output_size_limit=_MAX_CONSTANT_SIZE
        )
        model = rewrite(model, [reshape_reshape_rule])
        for clean in (
            common.RemoveUnusedNodesPass(),
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            common.CommonSubexpressionEliminationPass(),
            common.RemoveUnusedNodesPass(),
            common.RemoveUnusedFunctionsPass(),
            common.RemoveUnusedOpsetsPass(),
            common.ClearMetadataAndDocStringPass(),  # stack traces, with this machine's paths
        ):
            clean(model)
    for value in _values(model.graph):
        value.metadata_props.clear()
    return model


def save_graph(model: ir.Model, path: Path, weights: Sequence[WeightFile]) -> None:
    """Writes a graph whose weights are places in files beside it.

    Args:
        model: What trace_graph returned.
        path: The file written.
        weights: Files in the graph's dtype, and the RoPE tables'.

    Raises:
        ValueError: The result isn't valid ONNX.
    """
    places = {name: (file, stored) for file in weights for name, stored in file.tensors.items()}
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            continue
        file, stored = places[name]
        assert value.shape == stored.shape
        dtype = ir.DataType[_ONNX_DTYPES[file.dtype]]
        value.const_value = ir.ExternalTensor(
            file.file,
            stored.offset,
            int(math.prod(stored.shape) * dtype.itemsize),
            dtype,
            shape=ir.Shape(stored.shape),
            name=name,
        )
    ir.save(model, path)


class _Step(nn.Module):
    """One call of the model on flat inputs: caches in as arguments, written caches out."""

    def __init__(self, config: LlamaConfig, spec: GraphSpec, dtype: torch.dtype) -> None:
        super().__init__()
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # fake parameters can't be converted
        try:
            self.llama = Llama(config, num_positions=spec.num_positions)
        finally:
            torch.set_default_dtype(before)
        self.requires_grad_(False)
        self.attention = _attention_type(config, spec)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        write_indices: Tensor,
        logit_indices: Tensor,
        *cache: Tensor,
    ) -> tuple[Tensor, ...]:
        attention = self.attention()
        size = len(cache) // self.llama.config.num_hidden_layers
        past = KVCache(tuple(zip(*[iter(cache)] * size, strict=True)))
        logits = self.llama(input_ids, positions, write_indices, logit_indices, past, attention)
        return (logits, *(buffer for layer in attention.written for buffer in layer))


def _cache_names(config: LlamaConfig, prefix: str) -> list[str]:
    declared = layer_buffers(config, 1, 1, dtype=torch.float32)
    layers = range(config.num_hidden_layers)
    return [f"{prefix}.{i}.{one.name}" for i in layers for one in declared]


def _name_weights(model: ir.Model, config: LlamaConfig) -> None:
    """HF's names for what was `llama.model...`, and no values, which are fake."""
    initializers = model.graph.initializers
    for name, value in list(initializers.items()):
        del initializers[name]
        value.const_value = None
        value.name = name.removeprefix("llama.")
        if value.name in ("cos", "sin"):
            value.name = f"rope.{value.name}"
        elif config.tie_word_embeddings and value.name == "lm_head.weight":
            value.name = "model.embed_tokens.weight"
        initializers.add(value)


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters say about themselves."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
