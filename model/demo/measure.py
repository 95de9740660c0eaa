"""Measures a model that tells the demo stories, and writes what was measured on its card."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from sentencepiece import SentencePieceProcessor
from torch import Tensor

from ..cache import KVCache
from ..llama import Llama, TorchAttention
from ..tables import rotate
from .stories import explain, stories

__all__ = [
    "CausalAttention",
    "card",
    "encode",
    "first_sentence",
    "measure",
    "perplexity",
    "story_loss",
    "tell",
]

logger = logging.getLogger(__name__)

BOS_ID, EOS_ID = 1, 2
_IGNORED_TARGET = -100
_HELD_OUT_STORIES = 500
_SAMPLED_STORIES = 500
_GREEDY_STORIES = 200

_CARD = """\
# The demo model

A LLaMA of {params:,} float32 parameters that tells short stories. It was trained from nothing on
stories that `model/demo/stories.py` generates, a grammar of thirteen plots that also checks them:
the same people, pronouns, objects and places from the opening to the ending. All text is the
project's own; no other data or weights were used. It knows nothing but these stories: it is a
demonstration, a test fixture and a yardstick for other forms of itself, not a language model for
any other use.

## Measured

| what | value |
|---|---|
| held-out perplexity per token, {held_out} stories, {held_out_tokens:,} tokens | {perplexity:.4f} |
| the lowest possible, from the probabilities of the grammar's choices | {floor:.4f} |
| sampled stories that the grammar accepts, of {sampled} | {accepted:.1%} |
| sampled stories that end by EOS within 256 tokens | {ended:.1%} |
| accepted stories that are not in the training corpus | {novel:.1%} |
| accepted stories that are distinct | {distinct:.1%} |
| mean length of a sampled story, EOS included | {tokens:.0f} tokens |
| greedy stories that the grammar accepts, of {greedy_stories} | {greedy:.1%} |

Held out are one in ten combinations of plot, hero and the plot's key word (a toy, an animal, a
goal, ...), chosen by a hash: training sees no story with such a combination. Samples start from
BOS at temperature 0.8, no top-k or top-p, seeds 0 to {last_seed}; greedy stories start from the
first sentences of held-out stories. An accepted story is one that the grammar can tell, word for
word; one wrong name or pronoun and it is refused. Measured in float32 by the command below.

## Made by

    python -m llamac.model.demo.train --out model/demo --steps {steps} --batch-size {batch} \\
        --seed {seed} --threads {threads}

{steps} steps of {batch} stories, {train_tokens:,} tokens, each story seen once; {minutes:.0f}
minutes on a shared 2-core AMD EPYC, {date}, torch {torch}. Corpus and tokenizer come out the same
everywhere (one sentencepiece version). Weights come out bit for bit with the same torch build,
the same kind of CPU and the same number of threads; elsewhere rounding differs and the numbers
above move by a little.

## Three stories

Temperature 0.8, seeds 0, 1 and 2, from BOS, not selected:

{examples}

## Files

`model.safetensors` ({weight_bytes:,} bytes, float32, input and output embedding shared),
`tokenizer.model` ({tokenizer_bytes:,} bytes, SentencePiece BPE with byte fallback,
{config.vocab_size:,} pieces), `config.json` ({config.num_hidden_layers} layers of width
{config.hidden_size}, {config.num_attention_heads} query heads and
{config.num_key_value_heads} key/value heads),
`generation_config.json`, `tokenizer_config.json`. License: Apache-2.0, as the rest
of the project.
"""


class CausalAttention:
    """Attention of whole sequences among themselves, with no cache: for training and scoring."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: tuple[Tensor, ...],
        *,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        write_indices: Tensor,
        slots: Tensor,
        scale: float,
    ) -> Tensor:
        """See Attention; the cache is neither read nor written."""
        q, k, v = (x.transpose(1, 2) for x in (rotate(q, cos, sin), rotate(k, cos, sin), v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        return out.transpose(1, 2)


def encode(tokenizer: SentencePieceProcessor, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of whole stories, BOS and EOS included."""
    return [[BOS_ID, *ids, EOS_ID] for ids in tokenizer.encode(list(texts))]


def story_loss(model: Llama, rows: Sequence[list[int]]) -> Tensor:
    """Scores the tokens of each row after its first.

    Args:
        model: The model.
        rows: Token ids of the stories, BOS and EOS included.

    Returns:
        [] float32, the mean negative log-likelihood.
    """
    batch_size, num_tokens = len(rows), max(map(len, rows)) - 1
    ids = torch.zeros(batch_size, num_tokens, dtype=torch.int64)
    targets = torch.full((batch_size, num_tokens), _IGNORED_TARGET)
    for i, row in enumerate(rows):
        ids[i, : len(row) - 1] = torch.tensor(row[:-1])
        targets[i, : len(row) - 1] = torch.tensor(row[1:])
    starts = torch.zeros(batch_size, dtype=torch.int64)
    every = torch.arange(num_tokens).expand(batch_size, num_tokens)
    unused = KVCache.allocate(model.config, 1, 1, dtype=torch.float32)
    logits = model(ids, starts, starts, every, unused, CausalAttention())
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=_IGNORED_TARGET)


@torch.inference_mode()
def perplexity(model: Llama, rows: Sequence[list[int]]) -> float:
    """Scores whole stories.

    Args:
        model: The model.
        rows: Token ids of the stories, BOS and EOS included.

    Returns:
        exp of the mean negative log-likelihood of all tokens after BOS, EOS included.
    """
    total, num_targets = 0.0, 0
    for start in range(0, len(rows), 32):
        batch = rows[start : start + 32]
        targets = sum(len(row) - 1 for row in batch)
        total += story_loss(model, batch).item() * targets
        num_targets += targets
    return math.exp(total / num_targets)


@torch.inference_mode()
def tell(
    model: Llama,
    prompts: Sequence[list[int]],
    *,
    temperature: float = 0.8,
    max_new_tokens: int = 256,
) -> list[list[int]]:
    """Continues stories, all at once; story i draws from its own seed i.

    Args:
        model: The model.
        prompts: B beginnings, token ids with BOS.
        temperature: Divides the logits; 0 takes the most likely token.
        max_new_tokens: Length limit of a story, prompt included.

    Returns:
        Per story its ids without BOS, ending with EOS unless the limit came first.
    """
    num_stories = len(prompts)
    positions = torch.zeros(num_stories, dtype=torch.int64)
    last = torch.zeros(num_stories, 1, dtype=torch.int64)
    ids = torch.full((num_stories, 1), BOS_ID)
    cache = KVCache.allocate(model.config, num_stories, max_new_tokens, dtype=torch.float32)
    generators = [random.Random(seed) for seed in range(num_stories)]
    told = [[BOS_ID] for _ in range(num_stories)]
    attention = TorchAttention()
    for step in range(max_new_tokens):
        logits = model(ids, positions + step, positions + step, last, cache, attention)[:, 0]
        if temperature == 0:
            sampled = logits.argmax(dim=-1)
        else:
            cdf = (logits.double() / temperature).softmax(dim=-1).cumsum(dim=-1)
            draws = torch.tensor([[rng.random()] for rng in generators], dtype=torch.float64)
            sampled = torch.searchsorted(cdf, draws * cdf[:, -1:], right=True)[:, 0]
        for story, prompt, token_id in zip(told, prompts, sampled.tolist(), strict=True):
            if story[-1] != EOS_ID:
                story.append(prompt[step + 1] if step + 1 < len(prompt) else token_id)
        if all(story[-1] == EOS_ID for story in told):
            break
        ids = torch.tensor([story[-1:] for story in told])
    return [story[1:] for story in told]


def measure(model: Llama, tokenizer: SentencePieceProcessor, corpus: set[str]) -> dict[str, Any]:
    """Measures what the card states.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        corpus: The stories it was trained on.

    Returns:
        The numbers by the names that the card uses.
    """
    unseen = list(stories(_HELD_OUT_STORIES, held_out=True))
    rows = encode(tokenizer, [story.text for story in unseen])
    num_targets = sum(len(row) - 1 for row in rows)
    told = tell(model, [[BOS_ID]] * _SAMPLED_STORIES)
    accepted = _accepted(tokenizer, told)
    begun = [first_sentence(story.text) for story in unseen[:_GREEDY_STORIES]]
    prompts = [[BOS_ID, *ids] for ids in tokenizer.encode(begun)]
    greedy = tell(model, prompts, temperature=0)
    return {
        "perplexity": perplexity(model, rows),
        "floor": math.exp(sum(story.nats for story in unseen) / num_targets),
        "held_out": len(unseen),
        "held_out_tokens": num_targets,
        "sampled": len(told),
        "ended": sum(ids[-1] == EOS_ID for ids in told) / len(told),
        "accepted": len(accepted) / len(told),
        "novel": sum(text not in corpus for text in accepted) / max(1, len(accepted)),
        "distinct": len(set(accepted)) / max(1, len(accepted)),
        "tokens": sum(len(ids) for ids in told) / len(told),
        "greedy": len(_accepted(tokenizer, greedy)) / len(greedy),
        "greedy_stories": len(greedy),
        "examples": "\n\n".join(f"> {tokenizer.decode(ids)}" for ids in told[:3]),
        "last_seed": len(told) - 1,
    }


def first_sentence(text: str) -> str:
    """The opening of a story, full stop included."""
    return text[: text.index(".") + 1]


def _accepted(tokenizer: SentencePieceProcessor, told: Sequence[list[int]]) -> list[str]:
    """The texts of those stories that end by EOS and that the grammar accepts."""
    accepted = []
    for index, ids in enumerate(told):
        text = tokenizer.decode(ids)
        reason = explain(text) if ids[-1] == EOS_ID else "it does not end"
        if reason is None:
            accepted.append(text)
        else:
            logger.info("story %d is refused: %s", index, reason)
    return accepted


def card(results: Mapping[str, Any]) -> str:
    """The text of the demo's README.md, from what `measure` and the training run returned."""
    return _CARD.format_map(results)
