"""How a prompt is cut into the chunks that a backend of fixed sizes takes."""

from __future__ import annotations

from collections.abc import Sequence

from .backend import StaticShape

__all__ = ["check_prompt", "chunks_cost", "next_chunk"]

# Of a chunk, in tokens: reading the weights takes as long as computing some 9 of them on a CPU and
# 200 on a GPU.
_FIXED_COST = 32


def check_prompt(prompt_ids: Sequence[int], shape: StaticShape) -> None:
    """Refuses a prompt that a backend of this shape can't take.

    Args:
        prompt_ids: The prompt.
        shape: The backend's.

    Raises:
        ValueError: The prompt is empty or doesn't fit the cache, or an id is outside the
            vocabulary.
    """
    if not prompt_ids:
        raise ValueError("the prompt has no token, and this model has no BOS; give a text")
    if len(prompt_ids) > shape.max_seq_len:
        raise ValueError(
            f"prompt has {len(prompt_ids)} tokens, max_seq_len is {shape.max_seq_len}; "
            "shorten the prompt or raise max_seq_len"
        )
    if not 0 <= min(prompt_ids) <= max(prompt_ids) < shape.vocab_size:
        raise ValueError(
            f"prompt has ids from {min(prompt_ids)} to {max(prompt_ids)}, vocab_size is "
            f"{shape.vocab_size}; use the tokenizer of this model"
        )


def next_chunk(
    prompt_len: int, num_prefilled: int, shape: StaticShape, *, longest: int | None = None
) -> tuple[int, int]:
    """Cuts the next chunk of a prompt, of the length that takes the least time for what is left.

    With S = 10, P = 4 and a prompt of 9 the chunks are [0, 4), [4, 8) and [6, 9): a third one from
    8 would have its padding run to row 12, so it begins at S - P and two ids are fed again.

    Args:
        prompt_len: Ids in the prompt, at most max_seq_len.
        num_prefilled: How many of them are in the cache, fewer than prompt_len.
        shape: The chunk lengths and the cache's.
        longest: No chunk is longer, unless it is the shortest there is; None is no limit.

    Returns:
        The chunk's first index and the one after its last.
    """
    remaining = prompt_len - num_prefilled
    longest = shape.prefill_len if longest is None else longest
    lens = [n for n in shape.prefill_lens if n <= longest] or shape.prefill_lens[:1]
    chunk_len = min(reversed(lens), key=lambda n: chunks_cost(remaining, n))
    start = min(num_prefilled, shape.max_seq_len - chunk_len)
    return start, min(start + chunk_len, prompt_len)


def chunks_cost(num_tokens: int, chunk_len: int, *, num_others: int = 0) -> int:
    """How long tokens take in chunks of one length, in the time of computing one of them.

    Args:
        num_tokens: How many there are.
        chunk_len: Of each chunk.
        num_others: How many tokens of a chunk are none of these.
    """
    return -(-num_tokens // (chunk_len - num_others)) * (_FIXED_COST + chunk_len)
