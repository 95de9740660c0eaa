"""HF's `config.json` as a frozen dataclass that refuses what the model does not compute."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..runtime.typed_json import read_json

__all__ = ["DTYPES", "LlamaConfig", "RopeScaling"]

logger = logging.getLogger(__name__)

DTYPES = ("float32", "float16", "bfloat16")

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)

_USED = {
    *_SIZES,
    "model_type",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "attention_bias",
    "mlp_bias",
    "tie_word_embeddings",
    "dtype",
    "torch_dtype",
    "bos_token_id",
    "eos_token_id",
    "original_max_position_embeddings",
}

_IGNORED = {
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "auto_map",
    "initializer_range",
    "max_sequence_length",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "pretraining_tp",
    "return_dict",
    "rope_interleaved",
    "tokenizer_class",
    "transformers_version",
    "use_cache",
}

# Keys that change what the model computes, with the values that leave it a plain LLaMA.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "sliding_window": (None,),
    "use_sliding_window": (None, False),
    "quantization_config": (None,),
    "partial_rotary_factor": (None, 1, 1.0),
    "layer_types": (None,),
    "attention_multiplier": (None, 1.0),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
}

_ROPE_KEYS = {
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
    """

    rope_type: str
    factor: float
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("rope_type", "truncate") and value is not None:
                _check_number(f"rope {field.name}", value)


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig:
    """The facts of one LLaMA checkpoint, under HF's names.

    Attributes:
        vocab_size: V, rows of the embedding and of the head.
        hidden_size: E, width of the residual stream.
        intermediate_size: Width of the MLP.
        num_hidden_layers: Number of decoder layers.
        num_attention_heads: H, query heads.
        num_key_value_heads: K, key and value heads; H is a multiple of K.
        head_dim: D, width of a head, even.
        max_position_embeddings: Context length the model was trained for.
        rms_norm_eps: Added to the mean square in RMSNorm.
        rope_theta: Base of the RoPE frequencies.
        rope_scaling: How the frequencies are stretched, or None.
        attention_bias: Whether q, k, v and o have a bias.
        mlp_bias: Whether gate, up and down have a bias.
        tie_word_embeddings: Whether the head is the embedding.
        dtype: The checkpoint's own dtype, one of DTYPES.
        bos_token_id: Id that begins a sequence, or None.
        eos_token_ids: Ids that end one.

    Raises:
        ValueError: A size is not positive, or sizes do not divide.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    dtype: str = "float32"
    bos_token_id: int | None = 1
    eos_token_ids: tuple[int, ...] = (2,)

    def __post_init__(self) -> None:
        sizes = (*_SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings")
        for name in sizes:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"config: {name} is {value!r}; it must be a positive integer")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"config: num_attention_heads is {self.num_attention_heads}; it must be a multiple "
                f"of num_key_value_heads, {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"config: head_dim is {self.head_dim}; it must be even")
        _check_number("rms_norm_eps", self.rms_norm_eps)
        _check_number("rope_theta", self.rope_theta)
        ids = (self.bos_token_id, *self.eos_token_ids)
        if any(type(token_id) is not int for token_id in ids if token_id is not None):
            raise ValueError(f"config: special ids are {ids}; they must be integers")
        if self.dtype not in DTYPES:
            raise ValueError(f"config: dtype is {self.dtype!r}; it must be one of {DTYPES}")

    @classmethod
    def from_json(cls, path: Path) -> LlamaConfig:
        """Reads a `config.json` file.

        Args:
            path: The file, in either spelling (transformers 4 or 5).

        Returns:
            The config.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is not JSON, lacks a size, or describes another model.
        """
        data = read_json(path)
        try:
            return cls.from_dict(data)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LlamaConfig:
        """Builds the config from HF's keys; see from_json.

        Args:
            data: The object in `config.json`.

        Returns:
            The config.

        Raises:
            ValueError: A size is missing, or a key asks for what the model does not compute.
        """
        if data.get("model_type") != "llama":
            raise ValueError(
                f"config: model_type is {data.get('model_type')!r}; only 'llama' is supported"
            )
        for key, neutral in _REFUSED.items():
            if key in data and data[key] not in neutral:
                raise ValueError(
                    f"config: {key} is {data[key]!r}; only {neutral[0]!r} is supported"
                )
        missing = [name for name in _SIZES if data.get(name) is None]
        if missing:
            raise ValueError(f"config: {', '.join(missing)} missing; a LLaMA config states it")
        unknown = sorted(data.keys() - _USED - _IGNORED - _REFUSED.keys())
        if unknown:
            logger.warning("config: unknown keys ignored: %s", ", ".join(unknown))

        def get(key: str, default: Any) -> Any:
            value = data.get(key)
            return default if value is None else value

        rope_theta, rope_scaling = _read_rope(data, get("max_position_embeddings", 2048))
        eos = get("eos_token_id", ())
        if "eos_token_id" not in data:
            eos = 2
        dtype = str(get("dtype", get("torch_dtype", "float32"))).removeprefix("torch.")
        num_heads = data["num_attention_heads"]
        head_dim = data.get("head_dim")
        sizes_are_int = isinstance(data["hidden_size"], int) and isinstance(num_heads, int)
        if head_dim is None and sizes_are_int and num_heads > 0:
            if data["hidden_size"] % num_heads:
                raise ValueError(
                    f"config: hidden_size is {data['hidden_size']}; without head_dim it must be a "
                    f"multiple of num_attention_heads, {num_heads}"
                )
            head_dim = data["hidden_size"] // num_heads
        return cls(
            **{name: data[name] for name in _SIZES},
            num_key_value_heads=get("num_key_value_heads", num_heads),
            head_dim=get("head_dim", head_dim),
            max_position_embeddings=get("max_position_embeddings", 2048),
            rms_norm_eps=get("rms_norm_eps", 1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            attention_bias=bool(get("attention_bias", False)),
            mlp_bias=bool(get("mlp_bias", False)),
            tie_word_embeddings=bool(get("tie_word_embeddings", False)),
            dtype=dtype,
            bos_token_id=data.get("bos_token_id", 1),
            eos_token_ids=tuple(eos) if isinstance(eos, list | tuple) else (eos,),
        )

    def to_dict(self) -> dict[str, Any]:
        """The config under HF's keys, readable by from_dict and by transformers 4 and 5."""
        data = asdict(self)
        eos = data.pop("eos_token_ids")
        scaling = data.pop("rope_scaling")
        dtype = data.pop("dtype")
        if scaling is not None:
            scaling = {k: v for k, v in scaling.items() if v is not None}
            if scaling["rope_type"] != "yarn":
                scaling.pop("truncate")
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            **data,
            "rope_scaling": scaling,
            "torch_dtype": dtype,
            "eos_token_id": eos[0] if len(eos) == 1 else list(eos),
        }


def _check_number(name: str, value: Any) -> None:
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"config: {name} is {value!r}; it must be a positive number")


def _read_rope(data: dict[str, Any], max_positions: int) -> tuple[float, RopeScaling | None]:
    """Both spellings: `rope_theta` + `rope_scaling`, and transformers 5's `rope_parameters`."""
    rope: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(data.get(key), dict | None):
            raise ValueError(f"config: {key} is {data[key]!r}; it must be an object")
        rope |= data.get(key) or {}
    theta = rope.pop("rope_theta", None) or data.get("rope_theta") or 10000.0
    rope_type = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    if rope.pop("partial_rotary_factor", 1.0) not in (None, 1, 1.0):
        raise ValueError("config: partial_rotary_factor is set; only 1.0 is supported")
    if rope_type == "default":
        return theta, None
    if not isinstance(rope_type, str) or rope_type not in _ROPE_KEYS:
        raise ValueError(
            f"config: rope type is {rope_type!r}; supported are default, {', '.join(_ROPE_KEYS)}"
        )
    if rope_type in ("yarn", "llama3"):
        rope["original_max_position_embeddings"] = (
            data.get("original_max_position_embeddings")
            or rope.get("original_max_position_embeddings")
            or max_positions
        )
    missing = [key for key in _ROPE_KEYS[rope_type] if rope.get(key) is None]
    if missing:
        raise ValueError(f"config: rope type {rope_type!r} needs {', '.join(missing)}")
    known = {key: rope.pop(key) for key in RopeScaling.__dataclass_fields__ if key in rope}
    if rope:
        logger.warning("config: unknown rope keys ignored: %s", ", ".join(sorted(rope)))
    return theta, RopeScaling(rope_type=rope_type, **known)
