"""Several processes that compute one model: which of them this is, and what they exchange."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed._functional_collectives  # tells the compiler what they do
from torch import Tensor

__all__ = [
    "ALONE",
    "Rank",
    "Role",
    "gather_columns",
    "is_so_everywhere",
    "module_kind",
    "role_of",
    "sum_over_ranks",
]

# How a weight is cut: "column" is by its rows, which are columns of the result, as in Meta's names.
Role = Literal["column", "row", "vocabulary"]

_ROLES: dict[str, Role] = {
    "self_attn.q_proj": "column",
    "self_attn.k_proj": "column",
    "self_attn.v_proj": "column",
    "self_attn.o_proj": "row",
    "mlp.gate_proj": "column",
    "mlp.up_proj": "column",
    "mlp.down_proj": "row",
    "lm_head": "vocabulary",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """One of the processes that hold a model together.

    Attributes:
        index: Its number, from 0.
        world_size: How many there are.
        group: torch's name of their process group.
    """

    index: int
    world_size: int
    group: str = "0"

    def part_of(self, size: int) -> tuple[int, int]:
        """First and last + 1 of this rank's equal share of a size that the ranks divide."""
        share = size // self.world_size
        return self.index * share, (self.index + 1) * share

    def heads_of(self, num_heads: int) -> tuple[int, int]:
        """The same of key and value heads: of fewer than ranks, neighbours hold the same one."""
        if num_heads >= self.world_size:
            return self.part_of(num_heads)
        first = self.index * num_heads // self.world_size
        return first, first + 1


ALONE = Rank(index=0, world_size=1)


def role_of(module: str) -> Role | None:
    """How a module's weight is cut, by its name in the model; None is whole on every rank."""
    return _ROLES.get(module_kind(module))


def module_kind(module: str) -> str:
    """The module's name within its layer."""
    return module if module == "lm_head" else ".".join(module.split(".")[-2:])


def sum_over_ranks(x: Tensor, rank: Rank) -> Tensor:
    """Adds up what the ranks have; a collective inside a compiled step.

    Args:
        x: Of any shape, the same on every rank.
        rank: Whose group sums.

    Returns:
        The sum, on every rank.
    """
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_reduce(x, "sum", rank.group))


def is_so_everywhere(is_so: bool, rank: Rank, device: torch.device) -> bool:
    """Whether something is so on every rank, each of which asks.

    Args:
        is_so: Whether it is on this one.
        rank: Whose group is asked.
        device: Where the ranks exchange tensors.
    """
    if rank.world_size == 1:
        return is_so
    return int(sum_over_ranks(torch.tensor(int(is_so), device=device), rank)) == rank.world_size


def gather_columns(x: Tensor, rank: Rank) -> Tensor:
    """Puts the ranks' columns side by side; a collective inside a compiled step.

    Args:
        x: [M, N], a rank's own columns.
        rank: Whose group gathers.

    Returns:
        [M, N * world_size], on every rank.
    """
    ops = torch.ops._c10d_functional
    columns = x.t().contiguous()  # [N, M]: for one row the same memory
    size = rank.world_size
    return ops.wait_tensor(ops.all_gather_into_tensor(columns, size, rank.group)).t()
