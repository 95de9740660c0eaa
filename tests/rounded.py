"""Weights rounded in groups, packed word by word after GPTQ's and AWQ's own layouts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["AWQ_ORDER", "Rounded", "words"]

# Where AutoAWQ puts each of eight neighbours: the i-th nibble of a word holds column AWQ_ORDER[i].
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def words(values: NDArray[Any], bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """[R, C] values to [R, C * bits / 32] words, the first of `order` in the lowest bits."""
    count = 32 // bits
    found = values.astype(np.uint64).reshape(len(values), -1, count)
    shifted = [found[..., j] << np.uint64(i * bits) for i, j in enumerate(order or range(count))]
    summed = np.bitwise_or.reduce(shifted).astype(np.uint32)
    return torch.from_numpy(summed.view(np.int32))


class Rounded:
    """A weight in groups, asymmetric or not: [N, K] values, [N, G] scales and zero points."""

    def __init__(
        self, weight: Tensor, *, bits: int, group: int, sym: bool, order: NDArray[Any] | None = None
    ) -> None:
        self.bits = bits
        dense = weight.numpy()
        num_rows, width = dense.shape
        self.group_of = np.arange(width) // group
        if order is not None:
            self.group_of = self.group_of[order]
        num_groups = width // group
        columns = [dense[:, self.group_of == g] for g in range(num_groups)]
        if sym:
            half = 2 ** (bits - 1)
            scale = np.stack([np.abs(c).max(1) / (half - 1) for c in columns], 1)
            self.zero = np.full((num_rows, num_groups), half)
        else:
            low = np.stack([np.minimum(c.min(1), 0) for c in columns], 1)
            high = np.stack([np.maximum(c.max(1), 0) for c in columns], 1)
            scale = (high - low) / (2**bits - 1)
            self.zero = np.rint(-low / scale).astype(int)
        self.scale = scale.astype(np.float16)
        spread = self.scale.astype(np.float32)[:, self.group_of]
        values = np.rint(dense / spread) + self.zero[:, self.group_of]
        self.values: NDArray[np.uint8] = values.clip(0, 2**bits - 1).astype(np.uint8)
        self.weight = torch.from_numpy(
            (self.values.astype(np.float32) - self.zero[:, self.group_of]) * spread
        )

    def gptq(self, *, version: int) -> dict[str, Tensor]:
        zeros = words(self.zero.T, self.bits)
        if version == 1:  # as GPTQModel does it, borrows included
            zeros -= {4: 0x11111111, 8: 0x01010101}[self.bits]
        return {
            "qweight": words(self.values, self.bits).t(),
            "qzeros": zeros,
            "scales": torch.from_numpy(self.scale.T.copy()),
            "g_idx": torch.from_numpy(self.group_of.astype(np.int32)),
        }

    def awq(self) -> dict[str, Tensor]:
        return {
            "qweight": words(self.values.T, 4, AWQ_ORDER),
            "qzeros": words(self.zero.T, 4, AWQ_ORDER),
            "scales": torch.from_numpy(self.scale.T.copy()),
        }
