"""RoPE rows and causal mask rows, each looked up by position, and the rotation by such rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .config import LlamaConfig
from .rope_scaling import RopeScaling

__all__ = ["causal_mask", "check_rope_rows", "rope_bytes", "rope_tables", "rotate"]


def rope_tables(config: LlamaConfig, num_rows: int) -> tuple[Tensor, Tensor]:
    """Builds the cos and sin rows that attention gathers by position.

    Angles are float32 whatever the model's dtype: bfloat16 positions collide above 256.

    Args:
        config: Supplies head_dim, rope_theta and rope_scaling.
        num_rows: Number of positions; later rows do not exist.

    Returns:
        cos and sin, each [num_rows, D/2] float32: dimensions i and i + D/2 share an angle.

    Raises:
        ValueError: See check_rope_rows.

    Source: arXiv 2104.09864, section 3.4.2; the order of float32 operations is transformers'.
    """
    check_rope_rows(config, num_rows)
    inv_freq, attention_factor = _inverse_frequencies(config)
    angles = torch.arange(num_rows, dtype=torch.float32)[:, None] * inv_freq
    return angles.cos() * attention_factor, angles.sin() * attention_factor


def rope_bytes(config: LlamaConfig, num_rows: int) -> int:
    """Bytes of both tables."""
    return num_rows * config.head_dim * torch.float32.itemsize


def check_rope_rows(config: LlamaConfig, num_rows: int) -> None:
    """Refuses rows that no table holds.

    Dynamic RoPE turns all earlier positions anew as a sequence grows past the trained length.

    Args:
        config: The model's facts.
        num_rows: Number of positions.

    Raises:
        ValueError: RoPE is dynamic and the rows pass the trained length.
    """
    is_dynamic = config.rope_scaling is not None and config.rope_scaling.rope_type == "dynamic"
    if is_dynamic and num_rows > config.max_position_embeddings:
        raise ValueError(
            f"max_seq_len is {num_rows}; with RoPE of type 'dynamic' it may be at most "
            f"max_position_embeddings, {config.max_position_embeddings}; lower --max-seq-len"
        )


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies rotate-half RoPE in float32.

    Args:
        x: [B, T, heads, D].
        cos: [B, T, D/2] float32.
        sin: [B, T, D/2] float32.

    Returns:
        [B, T, heads, D] in x's dtype.

    Source: arXiv 2104.09864, in HF's layout: dimension i pairs with i + D/2.
    """
    cos, sin = cos[:, :, None], sin[:, :, None]
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


def causal_mask(positions: Tensor, num_tokens: int, max_seq_len: int) -> Tensor:
    """Looks up the mask rows of T tokens: cache rows at or before each token's position.

    Example with S = 4, T = 2, positions = [1]: rows [1 1 0 0] and [1 1 1 0]. Once the window has
    rolled, position >= S, every row is visible.

    Args:
        positions: [B] int64, absolute position of each row's first token.
        num_tokens: T.
        max_seq_len: S.

    Returns:
        [B, 1, T, S] bool, True where attention may look.
    """
    slots = torch.arange(max_seq_len, device=positions.device)
    tokens = positions[:, None] + torch.arange(num_tokens, device=positions.device)
    return (slots <= tokens[..., None])[:, None]


def _inverse_frequencies(config: LlamaConfig) -> tuple[Tensor, float]:
    """[D/2] float32 radians per position, and the multiplier of cos and sin."""
    dim, theta, scaling = config.head_dim, float(config.rope_theta), config.rope_scaling
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    if scaling is None:
        return 1.0 / theta**exponents, 1.0
    factor = scaling.factor
    match scaling.rope_type:
        case "linear":
            return 1.0 / theta**exponents / factor, 1.0
        case "dynamic":
            return 1.0 / theta**exponents, 1.0  # not stretched before the trained length ends
        case "llama3":
            return _llama3(1.0 / theta**exponents, scaling), 1.0
        case "yarn":
            return _yarn(theta**exponents, theta, dim, scaling), _yarn_attention_factor(scaling)
    raise ValueError(f"rope type is {scaling.rope_type!r}; it has no table")


def _llama3(inv_freq: Tensor, scaling: RopeScaling) -> Tensor:
    """Long wavelengths are divided by the factor, short ones kept, those between are blended.

    Source: the Llama 3.1 model card's rope scaling.
    """
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    original = scaling.original_max_position_embeddings
    assert low is not None
    assert high is not None
    assert original is not None
    wavelength = 2 * math.pi / inv_freq
    scaled = torch.where(wavelength > original / low, inv_freq / scaling.factor, inv_freq)
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * scaled / scaling.factor + smooth * scaled
    between = (wavelength >= original / high) & (wavelength <= original / low)
    return torch.where(between, blended, scaled)


def _yarn(pos_freqs: Tensor, theta: float, dim: int, scaling: RopeScaling) -> Tensor:
    """Fast dimensions extrapolate, slow ones interpolate, a linear ramp joins them.

    Source: arXiv 2309.00071, section 3.2.
    """
    original = scaling.original_max_position_embeddings
    assert original is not None

    def dimension_of(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension_of(scaling.beta_fast or 32)
    high = dimension_of(scaling.beta_slow or 1)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = float(max(low, 0)), float(min(high, dim - 1))
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    keep = 1 - ramp
    return 1.0 / (scaling.factor * pos_freqs) * (1 - keep) + 1.0 / pos_freqs * keep


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def mscale(weight: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * weight * math.log(scaling.factor) + 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return mscale(scaling.mscale) / mscale(scaling.mscale_all_dim)
    return mscale(1.0)
