"""The tensors of a quantized folder, module by module, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ....runtime.typed_json import shown
from ...config import DTYPES
from ...packed import PackedFormat
from ..pieces import Computed, Conversion, Part, Piece

__all__ = ["Modules"]


class Modules:
    """What a reader takes tensors from and puts weights into.

    Args:
        settings: config.json's quantization_config.
        pieces: HF's name to what the files hold.
        shapes: HF's name to the shape of every weight of the unquantized model.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        pieces: Mapping[str, Piece],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        self.settings = settings
        self._left: dict[str, Piece] = dict(pieces)
        self._shapes = shapes
        self._parts: list[Part] = []
        self._packed: dict[str, PackedFormat] = {}

    def with_tensor(self, part: str) -> list[tuple[str, int, int]]:
        """Finds the modules that have a tensor of that name.

        Returns:
            The module's name, and the rows N and columns K of its weight.
        """
        found: list[tuple[str, int, int]] = []
        for name, shape in self._shapes.items():
            module, _, key = name.rpartition(".")
            if key == "weight" and len(shape) == 2 and f"{module}.{part}" in self._left:
                found.append((module, shape[0], shape[1]))
        return found

    def size(self, module: str) -> tuple[int, int]:
        """Rows N and columns K of a module's weight."""
        num_rows, width = self._shapes[f"{module}.weight"]
        return num_rows, width

    def find(self, module: str, part: str) -> Piece | None:
        """Looks a module's tensor up; a lone number is a vector of one."""
        piece = self._left.get(f"{module}.{part}")
        if piece is not None and not piece.shape:
            piece = replace(piece, bytes_as=replace(piece.entry, shape=(1,)))
        return piece

    def take(
        self, module: str, part: str, *, shape: tuple[int, ...], dtypes: Sequence[str]
    ) -> Piece:
        """Takes a module's tensor, which is then spoken for.

        Args:
            module: Its name.
            part: The tensor's name within it.
            shape: What it must have.
            dtypes: What it may be stored in.

        Returns:
            The tensor.

        Raises:
            ValueError: It is missing, misshaped or of another dtype.
        """
        piece = self.find(module, part)
        if piece is None:
            raise ValueError(f"tensor {module}.{part} is missing")
        if piece.shape != shape or piece.dtype not in dtypes:
            raise ValueError(
                f"{piece.file.path}: tensor {piece.key} is {list(piece.shape)} {piece.dtype}; "
                f"the config makes it {list(shape)} {' or '.join(dtypes)}"
            )
        del self._left[f"{module}.{part}"]
        return piece

    def drop_zeros(self, module: str, part: str) -> None:
        """Leaves out a tensor that the model hasn't, if it holds zeros alone."""
        name = f"{module}.{part}"
        piece = self.find(module, part)
        if piece is None or name in self._shapes:
            return
        if piece.dtype in DTYPES and 0 not in piece.shape and not self.values(piece).any():
            del self._left[name]

    def take_words(self, module: str, part: str, shape: tuple[int, int]) -> Piece:
        """Takes a matrix of int32 as the bytes it is made of; a mapped file serves without a copy.

        Args:
            module: Its name.
            part: The tensor's name within it.
            shape: Of the bytes.

        Returns:
            The tensor, uint8.
        """
        words = (shape[0], shape[1] // 4)
        piece = self.take(module, part, shape=words, dtypes=("int32",))
        return replace(piece, bytes_as=replace(piece.entry, shape=shape, dtype="uint8"))

    def drop(self, *parts: str) -> None:
        """Leaves out tensors of these names, of every module: they change nothing here."""
        endings = tuple(f".{part}" for part in parts)
        for name in [name for name in self._left if name.endswith(endings)]:
            del self._left[name]

    def values(self, piece: Piece) -> Tensor:
        """Reads a small tensor."""
        return torch.cat([part for _, part in piece.read()])

    def setting(self, name: str, allowed: Sequence[object], default: object = None) -> Any:
        """Takes a setting, refusing what isn't supported.

        Args:
            name: Its key.
            allowed: The values that are.
            default: What an absent one means.

        Raises:
            ValueError: It has another value.
        """
        value = self.settings.get(name)
        value = default if value is None else value
        if not any(type(value) is type(one) and value == one for one in allowed):
            choices = ", ".join(map(str, allowed))
            raise ValueError(
                f"quantization_config: {name} is {shown(value)}; only {choices} can be read"
            )
        return value

    def num_words(self, module: str, count: int, bits: int) -> int:
        """How many int32 hold `count` values, refusing what fills the last one in part."""
        words, rest = divmod(count * bits, 32)
        if rest:
            raise ValueError(f"{module}: {count} weights of {bits} bits don't fill words of 32")
        return words

    def keep(self, module: str, part: str, piece: Piece) -> None:
        """Keeps a tensor as it is stored, under one of PackedFormat's names."""
        self._parts.append(replace(piece, name=f"{module}.{part}"))

    def convert(self, module: str, part: str, piece: Piece, conversion: Conversion) -> None:
        """Adds a tensor whose rows are converted ones."""
        self._parts.append(replace(piece, name=f"{module}.{part}", conversion=conversion))

    def compute(
        self,
        module: str,
        part: str,
        inputs: Sequence[Piece],
        compute: Callable[..., Tensor],
        *,
        shape: tuple[int, ...],
        dtype: str,
    ) -> None:
        """Adds a tensor that follows from whole stored ones."""
        self._parts.append(
            Computed(
                name=f"{module}.{part}",
                inputs=tuple(inputs),
                compute=compute,
                shape=shape,
                dtype=dtype,
            )
        )

    def pack(self, module: str, form: PackedFormat) -> None:
        """Says how a module's weight is packed.

        Args:
            module: Its name.
            form: How.

        Raises:
            ValueError: The weight can't have groups of that size.
        """
        try:
            form.tensors(*self.size(module))
        except ValueError as error:
            raise ValueError(f"{module}: {error}") from None
        self._packed[module] = form

    def read_order(self, module: str, part: str, group_size: int) -> Tensor | None:
        """Takes the group of each column, and adds the order that columns are stored in, if any.

        Args:
            module: Its name.
            part: The name of the groups, [K] integers; it may be missing.
            group_size: Columns of a group.

        Returns:
            [K] int32, the columns sorted by group; None if they are, or all groups are -1.

        Raises:
            ValueError: A group has another number of columns.
        """
        if self.find(module, part) is None:
            return None
        width = self.size(module)[1]
        groups = self.take(module, part, shape=(width,), dtypes=("int32", "int64"))
        found = self.values(groups).long()
        wanted = torch.arange(width) // group_size
        if bool((found == -1).all()) or torch.equal(found, wanted):
            return None
        order = torch.argsort(found, stable=True)
        if not torch.equal(found[order], wanted):
            raise ValueError(f"{module}: its groups don't have {group_size} columns each")
        order = order.to(torch.int32)
        self.compute(
            module, "weight_order", [groups], lambda _: order, shape=(width,), dtype="int32"
        )
        return order

    def finish(self) -> tuple[list[Part], dict[str, PackedFormat]]:
        """Returns all parts, those that no reader took as they are, and how weights are packed."""
        return [*self._parts, *self._left.values()], self._packed
