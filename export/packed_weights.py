"""Which files hold a packed checkpoint's weights in a bundle, in the forms that its graphs read."""

from __future__ import annotations

from collections.abc import Mapping

from ..model.checkpoint import Checkpoint
from ..model.packed import is_packed_part
from .weights import POSITIVE_SCALE, SIGNED, UNPACKED, WeightPlan, plan_conversion, plan_links

__all__ = ["plan_packed_weights"]

_EMBEDDING = "model.embed_tokens"

_Wanted = dict[str, tuple[tuple[int, ...], str]]


def plan_packed_weights(checkpoint: Checkpoint, dtypes: Mapping[str, str]) -> list[WeightPlan]:
    """Decides which files hold the weights.

    Packed weights and the embedding serve every target as they are stored, so the checkpoint's own
    files are hard linked where they hold them so. TensorRT gets signed values, of 8 bits positive
    scales, and a packed embedding unpacked. Norms, biases and weights that aren't packed are
    converted.

    Args:
        checkpoint: Where the weights are.
        dtypes: Target to the dtype that its graphs compute in.

    Returns:
        The files, under names that no other file of a bundle has.
    """
    as_stored: _Wanted = {}
    converted: dict[str, _Wanted] = {}
    signed: _Wanted = {}
    for name, stored in checkpoint.tensors.items():
        module, _, key = name.rpartition(".")
        if is_packed_part(name) or module == _EMBEDDING:
            as_stored[name] = stored.shape, stored.dtype
        else:
            for dtype in dtypes.values():
                if dtype == stored.dtype:
                    as_stored[name] = stored.shape, dtype
                else:
                    converted.setdefault(dtype, {})[name] = stored.shape, dtype
        if "tensorrt" in dtypes and key == "weight_packed":
            if module == _EMBEDDING:
                width = checkpoint.config.hidden_size
                signed[f"{module}.{UNPACKED}"] = (stored.shape[0], width), dtypes["tensorrt"]
            if module != _EMBEDDING or checkpoint.config.tie_word_embeddings:
                signed[f"{module}.{SIGNED}"] = stored.shape, "int8"
                if checkpoint.packed[module].bits == 8:
                    scale = checkpoint.tensors[f"{module}.weight_scale"]
                    signed[f"{module}.{POSITIVE_SCALE}"] = scale.shape, scale.dtype
    plans = plan_links(checkpoint, as_stored)
    if not plans:
        plans = [plan_conversion("model.safetensors", as_stored)]
    plans += [
        plan_conversion(f"model-{dtype}.safetensors", wanted) for dtype, wanted in converted.items()
    ]
    if signed:
        plans.append(plan_conversion("model-signed.safetensors", signed))
    return plans
