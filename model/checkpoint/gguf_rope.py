"""How a GGUF file states RoPE: keys of its metadata, and for Llama 3 the factors themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...runtime.typed_json import shown
from ..rope_scaling import RopeScaling

__all__ = ["ROPE_KEYS", "read_gguf_rope"]

# Every model of Llama 3.1 and later; the converter writes the factors that follow, not these.
_LOW, _HIGH = 1.0, 4.0
_LLAMA3_CONTEXTS = (8192, *(1 << power for power in range(4, 21)))
_TOLERANCE = 1e-4  # relative; the factors are float32

_YARN = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
# Keys that change the angles or their scale, with the value that doesn't.
_NEUTRAL = {"attn_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_ext_factor": 1.0}
_NEUTRAL |= {"yarn_log_multiplier": 0.0}
_SCALING = ("type", "factor", "original_context_length", "finetuned", *_YARN, *_NEUTRAL)

ROPE_KEYS = frozenset(
    {
        *("rope.dimension_count", "rope.freq_base", "rope.scale_linear"),
        *(f"rope.scaling.{key}" for key in _SCALING),
    }
)


def read_gguf_rope(
    path: Path, values: dict[str, Any], head_dim: int, factors: Sequence[float] | None
) -> tuple[float, RopeScaling | None]:
    """Reads the `rope.` keys.

    Args:
        path: The file, for messages.
        values: The metadata whose key begins with `llama.`, without that.
        head_dim: D.
        factors: rope_freqs.weight: what the D/2 frequencies are divided by, or None.

    Returns:
        The base of the frequencies, and how they are stretched.

    Raises:
        ValueError: The rotation is partial, of an unknown kind, or none that the factors follow
            from.
    """
    rotated = values.get("rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise ValueError(
            f"{path}: llama.rope.dimension_count is {shown(rotated)}; only {head_dim}, the whole "
            "head, is supported"
        )
    theta = values.get("rope.freq_base", 10000.0)
    scaling = {
        key.removeprefix("rope.scaling."): value
        for key, value in values.items()
        if key.startswith("rope.scaling.")
    }
    for key, neutral in _NEUTRAL.items():
        if scaling.get(key, neutral) != neutral:
            raise ValueError(
                f"{path}: llama.rope.scaling.{key} is {shown(scaling[key])}; only {neutral:g} is "
                "supported"
            )
    kind = scaling.get("type", "none")
    if "rope.scale_linear" in values and kind == "none":
        kind, scaling["factor"] = "linear", values["rope.scale_linear"]
    try:
        if factors is not None:
            if kind != "none":
                raise ValueError(f"rope type is {shown(kind)}, and there is rope_freqs.weight")
            return theta, _llama3(theta, head_dim, factors)
        if kind == "none":
            return theta, None
        if kind not in ("linear", "yarn"):
            raise ValueError(f"rope type is {shown(kind)}; supported are none, linear, yarn")
        stretched: dict[str, Any] = {"factor": scaling.get("factor")}
        if kind == "yarn":
            stretched["original_max_position_embeddings"] = scaling.get(
                "original_context_length", values.get("context_length")
            )
            stretched |= {new: scaling[old] for old, new in _YARN.items() if old in scaling}
        return theta, RopeScaling(rope_type=kind, **stretched)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _llama3(theta: object, head_dim: int, factors: Sequence[float]) -> RopeScaling:
    """Finds what the factors follow from: the largest is the stretch, the others tell the context.

    Source: transformers' `_compute_llama3_parameters`.
    """
    if type(theta) is not float or not 1 < theta < math.inf or len(factors) != head_dim // 2:
        raise ValueError(f"rope_freqs.weight has {len(factors)} factors for heads of {head_dim}")
    wavelengths = [2 * math.pi * theta ** (2 * i / head_dim) for i in range(head_dim // 2)]
    factor = float(round(max(factors), 4))
    for context in _LLAMA3_CONTEXTS:
        expected = [_llama3_factor(length, context, factor) for length in wavelengths]
        if all(
            math.isclose(a, b, rel_tol=_TOLERANCE) for a, b in zip(factors, expected, strict=True)
        ):
            return RopeScaling(
                rope_type="llama3",
                factor=factor,
                original_max_position_embeddings=context,
                low_freq_factor=_LOW,
                high_freq_factor=_HIGH,
            )
    raise ValueError("rope_freqs.weight holds factors other than Llama 3's, which aren't supported")


def _llama3_factor(wavelength: float, context: float, factor: float) -> float:
    smooth = min(1.0, max(0.0, (context / wavelength - _LOW) / (_HIGH - _LOW)))
    return 1 / ((1 - smooth) / factor + smooth)
