"""PEFT's adapter_config.json, as far as a plain LoRA needs it; whatever else it asks is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...runtime.typed_json import check_bool, check_int, check_number, read_json, shown

__all__ = ["AdapterSettings", "read_adapter_settings"]

_MAX_RANK = 65536
_MAX_ALPHA = 1e9
_USED = {
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias"),
    *("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform"),
    "init_lora_weights",
}
# Of training, or where things came from.
_IGNORED = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "lora_dropout", "layers_pattern", "megatron_core", "qalora_group_size"),
    *("eva_config", "runtime_config"),
}
# The others begin by changing the model's own weights, which then aren't the adapter's base.
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
# A pattern is a regular expression out of a file: these can't take long on a module's name.
_PATTERN = re.compile(r"[\w.^$|()\\*+\[\]-]{1,200}")
_MAX_REPEATS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSettings:
    """What adapter_config.json says of a LoRA.

    Attributes:
        path: The file.
        rank: r, of modules that no pattern names.
        alpha: Numerator of the scale, of modules that no pattern names.
        use_rslora: Whether the scale is alpha / sqrt(r), not alpha / r.
        rank_pattern: Regular expression of a module name's end to its rank.
        alpha_pattern: The same to its alpha.
        targets: Ends of the adapted modules' names; None leaves it to the weights.
        excluded: Ends of names that are no targets.
        layers: Numbers of the layers with targets; None is all.
        replaced: Parts of names of modules that are stored whole, instead of the model's.
    """

    path: Path
    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    targets: tuple[str, ...] | None
    excluded: tuple[str, ...]
    layers: tuple[int, ...] | None
    replaced: tuple[str, ...]

    def rank_of(self, module: str) -> int:
        """The rank of a module's adapter."""
        return _first_match(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """What a module's product is multiplied by."""
        alpha, rank = _first_match(self.alpha_pattern, module, self.alpha), self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def is_replaced(self, module: str) -> bool:
        """Whether a module is one of modules_to_save."""
        return any(f".{name}." in f".{module}." for name in self.replaced)

    def adapted(self, modules: Iterable[str]) -> set[str] | None:
        """Finds the modules that are adapted, as PEFT does.

        Args:
            modules: Names of all that could be.

        Returns:
            Their names; None if only the weights tell.
        """
        if self.targets is None:
            return None
        found = {m for m in modules if _ends(m, self.targets) and not _ends(m, self.excluded)}
        if self.layers is not None:
            found = {m for m in found if _layer(m) in self.layers}
        return {module for module in found if not self.is_replaced(module)}


def read_adapter_settings(path: Path) -> AdapterSettings:
    """Reads an adapter_config.json.

    Args:
        path: The file.

    Returns:
        Its settings.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It isn't JSON, a value is out of its bounds, or it asks for more than a plain
            LoRA; the key is named.
    """
    data = read_json(path)
    kind = data.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{path}: peft_type is {shown(kind)}; only 'LORA' can be merged")
    for key in sorted(data.keys() - _USED - _IGNORED):
        if data[key] not in (None, False) and data[key] not in ({}, []):
            _refuse(path, key, data[key], "of a plain LoRA it is unset")
    if data.get("bias", "none") != "none":
        _refuse(path, "bias", data["bias"], "only 'none' is supported")
    start = data.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS and str(start).lower() not in _PLAIN_STARTS:
        _refuse(path, "init_lora_weights", start, "it changes the base model's weights")
    targets = data.get("target_modules")
    layers = data.get("layers_to_transform")
    layers = [layers] if type(layers) is int else layers
    for layer in layers if isinstance(layers, list) else []:
        check_int(f"{path}: layers_to_transform", layer, least=0, most=_MAX_RANK)
    if layers is not None and not isinstance(layers, list):
        _refuse(path, "layers_to_transform", layers, "it must be a list of numbers")
    if not isinstance(targets, str) and not _names(path, data, "target_modules"):
        _refuse(path, "target_modules", targets, "it must name modules")
    return AdapterSettings(
        path=path,
        rank=check_int(f"{path}: r", data.get("r", 8), most=_MAX_RANK),
        alpha=check_number(f"{path}: lora_alpha", data.get("lora_alpha", 8), most=_MAX_ALPHA),
        use_rslora=check_bool(f"{path}: use_rslora", data.get("use_rslora") or False),
        rank_pattern={
            key: check_int(f"{path}: rank_pattern", value, most=_MAX_RANK)
            for key, value in _patterns(path, data, "rank_pattern")
        },
        alpha_pattern={
            key: check_number(f"{path}: alpha_pattern", value, most=_MAX_ALPHA)
            for key, value in _patterns(path, data, "alpha_pattern")
        },
        # Not tried where it is a regular expression: the file holds what it had found.
        targets=None if isinstance(targets, str) else _names(path, data, "target_modules"),
        excluded=_names(path, data, "exclude_modules"),
        layers=tuple(layers) if layers else None,
        replaced=_names(path, data, "modules_to_save"),
    )


def _refuse(path: Path, key: str, value: object, reason: str) -> None:
    raise ValueError(
        f"{path}: {shown(key)[1:-1]} is {shown(value)}; {reason}; merge it with PEFT's "
        "merge_and_unload and name the model that this makes"
    )


def _names(path: Path, data: dict[str, Any], key: str) -> tuple[str, ...]:
    value = data.get(key)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise ValueError(f"{path}: {key} is {shown(value)}; it must be a list of names")
    return tuple(value)


def _patterns(path: Path, data: dict[str, Any], key: str) -> Iterable[tuple[str, Any]]:
    """The entries of rank_pattern or alpha_pattern, each a regular expression that is harmless."""
    value = data.get(key) or {}
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {key} is {shown(value)}; it must be an object")
    for pattern in value:
        repeats = sum(pattern.count(sign) for sign in "*+")
        is_plain = _PATTERN.fullmatch(pattern) and not re.search(r"\)[*+]|\\\d", pattern)
        if not is_plain or repeats > _MAX_REPEATS:
            _refuse(path, key, pattern, "too much of a pattern")
        try:
            re.compile(pattern)
        except (re.error, OverflowError):
            raise ValueError(f"{path}: {key} has {shown(pattern)}, which is no pattern") from None
    return value.items()


def _first_match(patterns: dict[str, Any], module: str, default: Any) -> Any:
    """The first pattern that is the end of the name, from a dot on, or all of it."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _ends(module: str, names: tuple[str, ...]) -> bool:
    return any(f".{module}".endswith(f".{name}") for name in names)


def _layer(module: str) -> int | None:
    found = re.fullmatch(r"model\.layers\.(\d+)\..+", module)
    return None if found is None else int(found[1])
