"""Commands that several processes run together."""

from __future__ import annotations

import argparse

from ..launcher import launched_rank

__all__ = ["follow_launcher"]


def follow_launcher(args: argparse.Namespace) -> int | None:
    """Of processes that torchrun started, lets all but the first follow that one.

    Args:
        args: A command's; its number of ranks becomes that of the processes.

    Returns:
        The exit code, once the first has ended; None where this process runs the command.

    Raises:
        ValueError: The command line asks for another number.
    """
    if not hasattr(args, "tensor_parallel") or (launched := launched_rank()) is None:
        return None
    index, world_size = launched
    if args.tensor_parallel not in (None, world_size):
        raise ValueError(
            f"--tensor-parallel is {args.tensor_parallel}, {world_size} ranks were started; leave "
            "it out"
        )
    args.tensor_parallel = world_size
    if index == 0:
        return None
    from ...model.distributed.follower import main as follow

    return follow()
