"""How a checkpoint stretches RoPE, in both spellings of transformers."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from typing import Any

from ..runtime.typed_json import check_bool, check_number, named, shown

__all__ = ["RopeScaling", "check_theta", "read_rope"]

logger = logging.getLogger(__name__)

_MAX_FACTOR = 1e9
_MAX_THETA = 1e30  # float32 holds its powers

_NEEDED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How RoPE frequencies are stretched; keys and meaning are transformers'.

    Attributes:
        rope_type: "linear", "dynamic", "yarn" or "llama3".
        factor: How many times longer the context became.
        original_max_position_embeddings: Context length before stretching (yarn, llama3).
        low_freq_factor: llama3: wavelengths above original / low_freq_factor are stretched.
        high_freq_factor: llama3: wavelengths below original / high_freq_factor are kept.
        attention_factor: yarn: multiplier of cos and sin; None derives it from the factor.
        beta_fast: yarn: rotations above which a dimension is kept.
        beta_slow: yarn: rotations below which a dimension is stretched.
        mscale: yarn: numerator weight of the derived attention_factor.
        mscale_all_dim: yarn: denominator weight of the derived attention_factor.
        truncate: yarn: round the ramp's ends to whole dimensions.

    Raises:
        ValueError: A value is missing or out of bounds.
    """

    rope_type: str
    factor: float
    original_max_position_embeddings: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.rope_type, str) or self.rope_type not in _NEEDED:
            raise ValueError(
                f"config: rope type is {shown(self.rope_type)}; "
                f"supported are default, {', '.join(_NEEDED)}"
            )
        missing = [key for key in _NEEDED[self.rope_type] if getattr(self, key) is None]
        if missing:
            raise ValueError(f"config: rope type {self.rope_type!r} needs {', '.join(missing)}")
        check_bool("config: rope truncate", self.truncate)
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("rope_type", "truncate") and value is not None:
                check_number(f"config: rope {field.name}", value, most=_MAX_FACTOR, above=1e-9)
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and high <= low:
            raise ValueError(
                f"config: rope high_freq_factor is {high:g}; it must be above low_freq_factor, "
                f"{low:g}"
            )


def check_theta(theta: object) -> float:
    """Returns the base of the RoPE frequencies, or raises ValueError if it can't be one."""
    return check_number("config: rope_theta", theta, most=_MAX_THETA, above=1.0)


def read_rope(data: dict[str, Any], max_positions: object) -> tuple[float, RopeScaling | None]:
    """Reads `rope_theta` and `rope_scaling`, or transformers 5's `rope_parameters`.

    Args:
        data: The object in `config.json`.
        max_positions: Its max_position_embeddings.

    Returns:
        The base of the frequencies, and how they are stretched.

    Raises:
        ValueError: The type is unknown, or a value is missing or out of bounds.
    """
    rope: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        stated = data.get(key)
        if not isinstance(stated, dict | None):
            raise ValueError(f"config: {key} is {shown(stated)}; it must be an object")
        rope |= {name: value for name, value in (stated or {}).items() if value is not None}
    theta = check_theta(_first(rope.pop("rope_theta", None), data.get("rope_theta"), 10000.0))
    rope_type = _first(rope.pop("rope_type", None), rope.pop("type", None), "default")
    rotated = check_number(
        "config: partial_rotary_factor", rope.pop("partial_rotary_factor", 1), most=1
    )
    if rotated != 1:
        raise ValueError("config: partial_rotary_factor is set; only 1.0 is supported")
    if rope_type in ("yarn", "llama3"):
        rope["original_max_position_embeddings"] = _first(
            data.get("original_max_position_embeddings"),
            rope.get("original_max_position_embeddings"),
            max_positions,
        )
    # transformers takes a weight of zero for one that isn't given.
    for key in ("mscale", "mscale_all_dim"):
        if type(rope.get(key)) in (int, float) and rope[key] == 0:
            del rope[key]
    keys = RopeScaling.__dataclass_fields__ if rope_type != "default" else ()
    known = {key: rope.pop(key) for key in keys if key in rope}
    if rope:
        logger.warning("config: unknown rope keys ignored: %s", named(rope))
    if rope_type == "default":
        return theta, None
    return theta, RopeScaling(**{"factor": None, **known, "rope_type": rope_type})


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)
