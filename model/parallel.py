"""One model on several devices: which rows or columns of each weight a rank holds.

As in Megatron-LM, and in Meta's own code: q, k, v, gate and up are cut by rows, which are the
columns of their result, so that no sum crosses ranks before o and down, which are cut by columns
and whose results are summed over the ranks. The head is cut by the vocabulary.

Source: arXiv 1909.08053, section 3.
"""

from __future__ import annotations

from dataclasses import replace

from .checkpoint import Checkpoint
from .checkpoint.stored import StoredTensor
from .checkpoint.window import Window, cut
from .config import LlamaConfig
from .ranks import Rank, module_kind, role_of

__all__ = ["check_ranks", "shard_checkpoint", "shard_config"]


def check_ranks(checkpoint: Checkpoint, world_size: int) -> None:
    """Checks that so many ranks can hold a model; nothing is read.

    Args:
        checkpoint: The model.
        world_size: How many ranks.

    Raises:
        ValueError: A size isn't divided by them, or a group of a packed weight would lie on two.
    """
    if world_size == 1:
        return
    config = checkpoint.config
    for name in ("num_attention_heads", "intermediate_size", "vocab_size"):
        if (size := getattr(config, name)) % world_size:
            raise ValueError(f"{name} is {size}, which {world_size} ranks don't divide")
    kv_heads = config.num_key_value_heads
    if max(kv_heads, world_size) % min(kv_heads, world_size):
        raise ValueError(
            f"num_key_value_heads is {kv_heads}; {world_size} ranks must divide it, or be a "
            "multiple of it"
        )
    widths = {
        "self_attn.o_proj": config.num_attention_heads * config.head_dim,
        "mlp.down_proj": config.intermediate_size,
    }
    for module, form in checkpoint.packed.items():
        if (width := widths.get(module_kind(module))) is None:
            continue
        if form.has_order:
            raise ValueError(
                f"{module}: its columns are stored in another order (desc_act), which ranks can't "
                "divide; quantize the model without it"
            )
        if width // world_size % form.group_size:
            raise ValueError(
                f"{module}: {width} columns in groups of {form.group_size} can't be divided by "
                f"{world_size} ranks: a group would lie on two"
            )


def shard_config(config: LlamaConfig, rank: Rank) -> LlamaConfig:
    """What a rank's layers look like.

    Args:
        config: The whole model's.
        rank: Which one.

    Returns:
        The config with the rank's heads and MLP; the vocabulary stays whole.
    """
    first, last = rank.heads_of(config.num_key_value_heads)
    return replace(
        config,
        num_attention_heads=config.num_attention_heads // rank.world_size,
        num_key_value_heads=last - first,
        intermediate_size=config.intermediate_size // rank.world_size,
    )


def shard_checkpoint(checkpoint: Checkpoint, rank: Rank) -> Checkpoint:
    """Cuts out what a rank holds; only that is read, in whichever layout it is stored.

    Of the bytes that a tensor's rows lie in, a rank maps its own rows; of rows that are cut by
    columns, it keeps its own. Tensors that follow from several stored ones are computed whole and
    kept in part. A tied head stays the embedding, which is whole.

    Args:
        checkpoint: The whole model.
        rank: Which one.

    Returns:
        The checkpoint of the rank's tensors, under their names and shapes.

    Raises:
        ValueError: See check_ranks.
    """
    check_ranks(checkpoint, rank.world_size)
    windows = {
        name: window
        for name, stored in checkpoint.tensors.items()
        if (window := _window(checkpoint.config, name, stored.shape, rank)) is not None
    }
    tensors = dict(checkpoint.tensors)
    for name, window in windows.items():
        shape = tuple(last - first for first, last in window)
        dtype = checkpoint.tensors[name].dtype
        tensors[name] = StoredTensor(shape=shape, dtype=dtype, file=None, offset=None)
    pieces = [
        part if part.name not in windows else cut(part, windows[part.name])
        for part in checkpoint.pieces
    ]
    return replace(
        checkpoint,
        config=shard_config(checkpoint.config, rank),
        tensors=tensors,
        pieces=tuple(piece for piece in pieces if piece is not None),
    )


def _window(config: LlamaConfig, name: str, shape: tuple[int, ...], rank: Rank) -> Window | None:
    """What a rank holds of a tensor; None is all."""
    module, _, part = name.rpartition(".")
    role = role_of(module)
    if role is None or part == "weight_order":
        return None
    if role == "row":
        # A bias is added once, to the sum.
        return None if part == "bias" else ((0, shape[0]), rank.part_of(shape[1]))
    rows = rank.part_of(shape[0])
    if module.endswith(("k_proj", "v_proj")):
        first, last = rank.heads_of(config.num_key_value_heads)
        rows = first * config.head_dim, last * config.head_dim
    return (rows, *((0, n) for n in shape[1:]))
