"""Makes the demo model: stories, tokenizer, weights, and the measurements on its card.

`python -m llamac.model.demo.train --out DIR` runs every step from seeds. A run that was cut off
goes on from its snapshot when started again with the same arguments.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import save_file

from ..config import LlamaConfig
from ..llama import Llama
from .measure import BOS_ID, EOS_ID, card, encode, measure, story_loss
from .stories import stories

__all__ = ["main", "train", "train_tokenizer"]

logger = logging.getLogger(__name__)

CONFIG = LlamaConfig(
    vocab_size=2048,
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=5,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=16,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
)
_PEAK_LR = 3e-3
_WARMUP_STEPS = 100
_TOKENIZER_STORIES = 20_000

_GENERATION = {
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "do_sample": True,
    "temperature": 0.8,
    "max_new_tokens": 256,
}
_TOKENIZER = {
    "tokenizer_class": "LlamaTokenizer",
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "clean_up_tokenization_spaces": False,
    "legacy": False,
    # A conversation is one story, told in turns.
    "chat_template": (
        "{{ bos_token }}{% for message in messages %}{{ message.content | trim }}"
        "{% if not loop.last %} {% endif %}{% endfor %}"
    ),
}


def train_tokenizer() -> bytes:
    """Trains a byte-fallback BPE, whose decoding returns every text, on the first stories.

    Returns:
        The bytes of `tokenizer.model`.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(s.text for s in stories(_TOKENIZER_STORIES, held_out=False)),
        model_writer=model,
        model_type="bpe",
        vocab_size=CONFIG.vocab_size,
        byte_fallback=True,
        split_digits=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def train(
    model: Llama,
    rows: Sequence[list[int]],
    *,
    num_steps: int,
    batch_size: int,
    snapshot: Path,
    snapshot_steps: int = 500,
) -> float:
    """Trains in place with AdamW and a cosine schedule; each story is seen at most once.

    Args:
        model: Freshly initialized.
        rows: Token ids of num_steps * batch_size stories, BOS and EOS included.
        num_steps: Optimizer steps.
        batch_size: Stories a step.
        snapshot: File of the run's state; where it exists, the run goes on from it.
        snapshot_steps: How often it is written.

    Returns:
        The seconds it took, those before an interruption included.
    """
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=_PEAK_LR, betas=(0.9, 0.98))
    first_step, spent_s = 0, 0.0
    if snapshot.exists():
        state = torch.load(snapshot)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first_step, spent_s = state["step"], state["spent_s"]
    start_s, running = time.perf_counter(), math.nan
    for step, batch in enumerate(_batches(rows, num_steps, batch_size)):
        if step < first_step:
            continue
        for group in optimizer.param_groups:
            group["lr"] = _PEAK_LR * _schedule(step, num_steps)
        optimizer.zero_grad(set_to_none=True)
        loss = story_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running = loss.item() if math.isnan(running) else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 50 == 0:
            pace = (time.perf_counter() - start_s) / (step + 1 - first_step)
            left_s = pace * (num_steps - step - 1)
            logger.info("step %d/%d loss %.4f, %.0f s left", step + 1, num_steps, running, left_s)
        if (step + 1) % snapshot_steps == 0 or step + 1 == num_steps:
            states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            now_s = spent_s + time.perf_counter() - start_s
            torch.save({**states, "step": step + 1, "spent_s": now_s}, snapshot)
    return spent_s + time.perf_counter() - start_s


def main(argv: Sequence[str] | None = None) -> None:
    """Makes every file of the demo folder; `--help` lists the options."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder that gets the files")
    parser.add_argument("--steps", type=int, default=4000, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=16, help="stories a step")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights")
    parser.add_argument("--threads", type=int, default=2, help="part of what is reproduced")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logger.info("telling stories")
    corpus = [s.text for s in stories(args.steps * args.batch_size, held_out=False)]
    proto = train_tokenizer()
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=proto)
    rows = encode(tokenizer, corpus)

    model = Llama(CONFIG, num_positions=CONFIG.max_position_embeddings)
    _initialize(model)
    snapshot = args.out.with_name(
        f"{args.out.name}-{args.steps}-{args.batch_size}-{args.seed}.snapshot"
    )
    train_s = train(
        model, rows, num_steps=args.steps, batch_size=args.batch_size, snapshot=snapshot
    )
    _write(args.out, model, proto)

    logger.info("measuring")
    results = {
        **measure(model, tokenizer, set(corpus)),
        "steps": args.steps,
        "batch": args.batch_size,
        "seed": args.seed,
        "threads": args.threads,
        "minutes": train_s / 60,
        "train_tokens": sum(len(row) - 1 for row in rows),
        "params": sum(p.numel() for p in model.parameters()),
        "weight_bytes": (args.out / "model.safetensors").stat().st_size,
        "tokenizer_bytes": len(proto),
        "config": CONFIG,
        "date": date.today().isoformat(),
        "torch": torch.__version__,
    }
    (args.out / "README.md").write_text(card(results), encoding="utf-8")
    snapshot.unlink()


def _write(out: Path, model: Llama, proto: bytes) -> None:
    """Writes the files that make a checkpoint."""
    weights = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    (out / "tokenizer.model").write_bytes(proto)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # safetensors lets nobody else read it
    for name, data in (
        ("config.json", CONFIG.to_dict()),
        ("generation_config.json", _GENERATION),
        ("tokenizer_config.json", _TOKENIZER),
    ):
        (out / name).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def _initialize(model: Llama) -> None:
    """Normal weights, except that attention starts out copying.

    Each head's output projection begins as its value projection transposed: whatever a head
    attends to becomes likelier. From independent weights it takes thousands of steps to discover
    that a story's names repeat.
    """
    config = model.config
    weights = dict(model.named_parameters())
    for name, weight in weights.items():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.1 if name.endswith("v_proj.weight") else 0.05)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        weights[prefix + "mlp.down_proj.weight"] *= (2 * config.num_hidden_layers) ** -0.5
        values = weights[prefix + "self_attn.v_proj.weight"].unflatten(0, (-1, config.head_dim))
        shared_by = config.num_attention_heads // config.num_key_value_heads
        copies = values.repeat_interleave(shared_by, dim=0).flatten(0, 1)  # [H*D, E]
        weights[prefix + "self_attn.o_proj.weight"].copy_(copies.t())


def _schedule(step: int, num_steps: int) -> float:
    """Linear warm-up, then a cosine down to 2 % of the peak."""
    if step < _WARMUP_STEPS:
        return (step + 1) / _WARMUP_STEPS
    progress = (step - _WARMUP_STEPS) / max(1, num_steps - _WARMUP_STEPS)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


def _batches(
    rows: Sequence[list[int]], num_steps: int, batch_size: int
) -> Iterator[Sequence[list[int]]]:
    """Sorts a few batches at a time by length, so that little is padded, and shuffles those."""
    group = 8 * batch_size
    for start in range(0, num_steps * batch_size, group):
        ordered = sorted(rows[start : min(start + group, num_steps * batch_size)], key=len)
        batches = [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]
        random.Random(start).shuffle(batches)
        yield from batches


if __name__ == "__main__":
    main()
