"""Random packed weights, and what they stand for."""

from __future__ import annotations

import torch


class PackedWeight:
    """A packed weight, and what it stands for in float64."""

    def __init__(
        self,
        num_rows: int,
        width: int,
        *,
        bits: int = 4,
        group: int = 32,
        dtype: torch.dtype = torch.bfloat16,
        with_minimum: bool = False,
    ) -> None:
        random = torch.Generator().manual_seed(num_rows + width + bits + group)
        group = group if width % group == 0 else width
        values = torch.randint(0, 2**bits, (num_rows, width), generator=random, dtype=torch.uint8)
        sizes = num_rows, width // group
        self.scale = (torch.rand(sizes, generator=random) + 0.1).to(dtype) / 2**bits
        minimum = torch.randn(sizes, generator=random).to(dtype)
        self.minimum = minimum if with_minimum else torch.empty(0)
        self.packed = values if bits == 8 else values[:, ::2] | values[:, 1::2] << 4
        scale, minimum = (
            part.double().repeat_interleave(group, dim=1) for part in (self.scale, minimum)
        )
        unpacked = values.double()
        self.exact = (
            unpacked * scale + minimum if with_minimum else (unpacked - 2 ** (bits - 1)) * scale
        )
