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

Prefill has B = 1, T = P; decode has B = batch_size, T = 1; N = 1 in both. Extend, for speculation,
has B = batch_size, T = N = 1 + num_guesses. Where attention costs what it may look at, live or not
(StandardAttention), there are several decode and extend graphs: each attends to the first R rows,
and is for steps whose tokens all lie in them. Past the cache
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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
from ..model.packed import PackedFormat
from ..runtime.backend import StepInputs
from ..runtime.bundle.manifest import WEIGHT_BYTES, WeightFile
from .operators import ExportAttention, GroupQueryAttention, StandardAttention
from .products import set_products
from .weights import SIGNED

__all__ = [
    "OPSET",
    "TARGETS",
    "GraphSpec",
    "attention_type",
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


_DTYPES = {"FLOAT": "float32", "FLOAT16": "float16", "BFLOAT16": "bfloat16"}
_DTYPES |= {"UINT8": "uint8", "INT8": "int8", "INT32": "int32", "INT4": "int8"}
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
        attended_rows: R, of StandardAttention; None is S.
        logits: N.
        num_positions: Rows of the RoPE tables.
        packed: Module name to how its weight is packed.
        embedding_dtype: Of a plain embedding; None is dtype.
        accuracy_level: Of MatMulNBits.
    """

    target: str
    dtype: str
    batch: int
    tokens: int
    rows: int
    attended_rows: int | None = None
    logits: int = 1
    num_positions: int
    packed: Mapping[str, PackedFormat] = field(default_factory=dict)
    embedding_dtype: str | None = None
    accuracy_level: int = 4


def attention_type(
    config: LlamaConfig, target: str, dtype: str, *, batch: int, tokens: int
) -> type[ExportAttention]:
    """Which form of attention a graph has; all forms leave a cache that the others go on with.

    Args:
        config: The model.
        target: One of TARGETS.
        dtype: Of the graph.
        batch: B.
        tokens: T.

    Returns:
        Its type.
    """
    # GroupQueryAttention has CUDA kernels for 16-bit types alone, none for other head sizes, and
    # refuses several rows of several tokens.
    on_gpu_in_float32 = target == "cuda" and dtype == "float32"
    if on_gpu_in_float32 or config.head_dim % 8 or min(batch, tokens) > 1:
        return StandardAttention
    return TARGETS[target]


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


def save_graph(
    model: ir.Model, path: Path, weights: Sequence[WeightFile], config: LlamaConfig
) -> tuple[str, ...]:
    """Writes a graph whose weights are places in files beside it.

    Args:
        model: What trace_graph returned.
        path: The file written.
        weights: The files that hold the weights, each in the dtype that the graph has for it.
        config: Says whether the head is the embedding.

    Returns:
        The files that the graph reads.

    Raises:
        ValueError: The result isn't valid ONNX.
    """
    places = {
        (name, stored.dtype): (file.file, stored)
        for file in weights
        for name, stored in file.tensors.items()
    }
    used: list[str] = []
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            continue
        assert value.dtype is not None
        assert value.shape is not None
        source = name
        if config.tie_word_embeddings and name.startswith("lm_head.weight_"):
            source = name.replace("lm_head", "model.embed_tokens", 1)
        file, stored = places[source, _DTYPES[value.dtype.name]]
        num_bytes = math.prod(stored.shape) * WEIGHT_BYTES[stored.dtype]
        shape = ir.Shape(value.shape)
        if name.endswith(SIGNED) and math.prod(shape.numpy()) == 2 * num_bytes:
            value.type = ir.TensorType(ir.DataType.INT4)  # torch has no such type to trace
        dtype = value.dtype
        assert math.ceil(math.prod(shape.numpy()) * dtype.itemsize) == num_bytes
        value.const_value = ir.ExternalTensor(
            file, stored.offset, num_bytes, dtype, shape=shape, name=name
        )
        used.append(file)
    ir.save(model, path)
    return tuple(dict.fromkeys(used))


class _Step(nn.Module):
    """One call of the model on flat inputs: caches in as arguments, written caches out."""

    def __init__(self, config: LlamaConfig, spec: GraphSpec, dtype: torch.dtype) -> None:
        super().__init__()
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # fake parameters can't be converted
        try:
            self.llama = Llama(config, num_positions=spec.num_positions, packed=spec.packed)
        finally:
            torch.set_default_dtype(before)
        set_products(self.llama, spec.target, dtype, accuracy_level=spec.accuracy_level)
        if spec.embedding_dtype is not None:
            table = torch.empty(
                config.vocab_size, config.hidden_size, dtype=getattr(torch, spec.embedding_dtype)
            )
            self.llama.model.embed_tokens = nn.Embedding.from_pretrained(table)
        self.requires_grad_(False)
        self.spec = spec

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        write_indices: Tensor,
        logit_indices: Tensor,
        *cache: Tensor,
    ) -> tuple[Tensor, ...]:
        attention = _make_attention(self.llama.config, self.spec)
        size = len(cache) // self.llama.config.num_hidden_layers
        past = KVCache(tuple(zip(*[iter(cache)] * size, strict=True)))
        logits = self.llama(input_ids, positions, write_indices, logit_indices, past, attention)
        return (logits, *(buffer for layer in attention.written for buffer in layer))


def _make_attention(config: LlamaConfig, spec: GraphSpec) -> ExportAttention:
    kind = attention_type(config, spec.target, spec.dtype, batch=spec.batch, tokens=spec.tokens)
    return kind(spec.attended_rows or spec.rows) if kind is StandardAttention else kind()


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
