"""Which weight gets how many bits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ...runtime.typed_json import shown
from ..config import LlamaConfig
from ..packed import PackedFormat

__all__ = ["RECIPES", "Recipe", "parse_recipe"]

RECIPES = "int4, int8, or with a group size as in int4-g64"

_DEFAULT_GROUPS = {4: 32, 8: 128}
_GROUPS = (128, 64, 32, 16)
_SENSITIVE = "mlp.down_proj"  # of the first layer and of the last a wrong value costs most
_HEAD, _HEAD_GROUP = "lm_head", 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a model is quantized.

    The norms and the embedding stay as they are. With 4 bits, the head and what is most sensitive
    get 8.

    Attributes:
        bits: 4 or 8, of most weights.
        group_size: Columns that share a scale, where that divides a weight's; else the largest of
            64, 32 and 16 that does.
    """

    bits: int
    group_size: int

    @property
    def name(self) -> str:
        """As the command line spells it."""
        return f"int{self.bits}-g{self.group_size}"

    def formats(
        self, config: LlamaConfig, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, PackedFormat]:
        """Chooses a format for each weight.

        Args:
            config: Supplies the layers and the dtype.
            shapes: HF's name to the shape of every weight.

        Returns:
            Module name to how its weight is packed; a weight of a width that 16 doesn't divide is
            left out.
        """
        scale_dtype = "float16" if config.dtype == "float16" else "bfloat16"
        found: dict[str, PackedFormat] = {}
        for name, shape in shapes.items():
            module, _, key = name.rpartition(".")
            if key != "weight" or len(shape) != 2 or module.endswith("embed_tokens"):
                continue
            bits = 8 if self.bits == 4 and _is_sensitive(module, config) else self.bits
            largest = min(self.group_size, _HEAD_GROUP) if module == _HEAD else self.group_size
            group = next((g for g in _GROUPS if g <= largest and shape[1] % g == 0), None)
            if group is not None:
                found[module] = PackedFormat(bits=bits, group_size=group, scale_dtype=scale_dtype)
        return found


def parse_recipe(text: str) -> Recipe:
    """Reads what the command line asks for.

    Args:
        text: Such as "int4" or "int8-g64".

    Returns:
        The recipe.

    Raises:
        ValueError: It is none.
    """
    match = re.fullmatch(r"int([48])(?:-g(16|32|64|128))?", text) if type(text) is str else None
    if match is None:
        raise ValueError(f"quantize is {shown(text)}; it must be {RECIPES} (16, 32, 64 or 128)")
    bits = int(match[1])
    return Recipe(bits=bits, group_size=int(match[2] or _DEFAULT_GROUPS[bits]))


def _is_sensitive(module: str, config: LlamaConfig) -> bool:
    ends = (0, config.num_hidden_layers - 1)
    return module == _HEAD or module in [f"model.layers.{i}.{_SENSITIVE}" for i in ends]
