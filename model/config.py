"""HF's `config.json` as a frozen dataclass that refuses what the model does not compute."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..runtime.typed_json import check_bool, check_int, check_number, named, read_json, shown
from .rope_scaling import RopeScaling, check_theta, read_rope

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

# Many times those of the largest published models; a tensor of two of them still has a size.
_LARGEST = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_hidden_layers": 1024,
    "num_attention_heads": 1 << 14,
    "num_key_value_heads": 1 << 14,
    "head_dim": 1 << 14,
    "max_position_embeddings": 2**31 - 1,
}
_LARGEST_ID = 2**31 - 1

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
    "layer_types",
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
    "hidden_act": ("silu", "swish", None),
    "sliding_window": (None,),
    "use_sliding_window": (None, False),
    "partial_rotary_factor": (None, 1, 1.0),
    "attention_multiplier": (None, 1, 1.0),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
}


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
        for name, most in _LARGEST.items():
            check_int(f"config: {name}", getattr(self, name), most=most)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"config: num_attention_heads is {self.num_attention_heads}; it must be a multiple "
                f"of num_key_value_heads, {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"config: head_dim is {self.head_dim}; it must be even")
        check_number("config: rms_norm_eps", self.rms_norm_eps, most=1.0)
        check_theta(self.rope_theta)
        for name in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
            check_bool(f"config: {name}", getattr(self, name))
        if self.bos_token_id is not None:
            _check_id("bos_token_id", self.bos_token_id)
        for token_id in self.eos_token_ids:
            _check_id("eos_token_id", token_id)
        if self.dtype not in DTYPES:
            raise ValueError(
                f"config: dtype is {shown(self.dtype)}; it must be one of {', '.join(DTYPES)}"
            )

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
                f"config: model_type is {shown(data.get('model_type'))}; only 'llama' is supported"
            )
        for key, neutral in _REFUSED.items():
            if not any(_is_same(data.get(key), value) for value in neutral):
                raise ValueError(
                    f"config: {key} is {shown(data[key])}; only {neutral[0]!r} is supported"
                )
        missing = [name for name in _SIZES if data.get(name) is None]
        if missing:
            raise ValueError(f"config: {', '.join(missing)} missing; a LLaMA config states it")
        _check_layer_types(data)
        if unknown := data.keys() - _USED - _IGNORED - _REFUSED.keys():
            logger.warning("config: unknown keys ignored: %s", named(sorted(unknown)))

        def get(key: str, default: Any) -> Any:
            value = data.get(key)
            return default if value is None else value

        max_positions = get("max_position_embeddings", 2048)
        rope_theta, rope_scaling = read_rope(data, max_positions)
        eos = get("eos_token_id", ()) if "eos_token_id" in data else 2
        dtype = get("dtype", get("torch_dtype", "float32"))
        return cls(
            **{name: data[name] for name in _SIZES},
            num_key_value_heads=get("num_key_value_heads", data["num_attention_heads"]),
            head_dim=_head_dim(data) if data.get("head_dim") is None else data["head_dim"],
            max_position_embeddings=max_positions,
            rms_norm_eps=get("rms_norm_eps", 1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            attention_bias=get("attention_bias", False),
            mlp_bias=get("mlp_bias", False),
            tie_word_embeddings=get("tie_word_embeddings", False),
            dtype=dtype.removeprefix("torch.") if isinstance(dtype, str) else dtype,
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


def _is_same(value: object, other: object) -> bool:
    """Equal and of one type: True is not 1."""
    return type(value) is type(other) and value == other


def _check_id(name: str, value: object) -> None:
    check_int(f"config: {name}", value, least=-1, most=_LARGEST_ID)


def _check_layer_types(data: dict[str, Any]) -> None:
    types = data.get("layer_types")
    if types is None:
        return
    full = "full_attention"
    if not isinstance(types, list) or any(item != full for item in types):
        raise ValueError(f"config: layer_types is {shown(types)}; only {full!r} is supported")
    if len(types) != data["num_hidden_layers"]:
        raise ValueError(
            f"config: layer_types has {len(types)} entries; num_hidden_layers is "
            f"{shown(data['num_hidden_layers'])}"
        )


def _head_dim(data: dict[str, Any]) -> int:
    width, num_heads = (
        check_int(f"config: {name}", data[name], most=_LARGEST[name])
        for name in ("hidden_size", "num_attention_heads")
    )
    if width % num_heads:
        raise ValueError(
            f"config: hidden_size is {width}; without head_dim it must be a multiple of "
            f"num_attention_heads, {num_heads}"
        )
    return width // num_heads
