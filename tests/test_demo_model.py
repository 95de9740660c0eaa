"""The demo model: small, loadable, and as good at stories as its card says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor

from llamac.model.config import LlamaConfig
from llamac.model.demo.measure import BOS_ID, EOS_ID, encode, first_sentence, perplexity, tell
from llamac.model.demo.stories import accepts, explain, make_story, stories
from llamac.model.demo.train import train, train_tokenizer
from llamac.model.llama import Llama
from llamac.model.load import DEMO_FOLDER as DEMO
from llamac.runtime.language_model import LanguageModel
from llamac.runtime.load import load

# The test scores 100 of the card's 500 held-out stories.
PERPLEXITY_TOLERANCE = 0.02


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(DEMO / "tokenizer.model"))


@pytest.fixture(scope="module")
def model() -> Llama:
    config = LlamaConfig.from_json(DEMO / "config.json")
    model = Llama(config, num_positions=config.max_position_embeddings)
    weights = load_file(DEMO / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, strict=True)
    return model.eval()


def _stated(what: str) -> float:
    """A number from the card's table."""
    card = (DEMO / "README.md").read_text(encoding="utf-8")
    row = re.search(rf"^\| {what}.* \| ([\d.]+)", card, flags=re.M)
    assert row is not None
    return float(row[1])


def test_the_folder_is_small() -> None:
    assert sum(file.stat().st_size for file in DEMO.iterdir()) < 5_000_000


def test_the_folder_is_complete() -> None:
    code = {".py", ".txt"}  # what made the model lies beside it
    assert {file.name for file in DEMO.iterdir() if file.is_file() and file.suffix not in code} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.model",
        "tokenizer_config.json",
    }


def test_the_model_is_a_small_float32_gqa_llama(model: Llama) -> None:
    config = model.config
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.tie_word_embeddings
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert 900_000 < sum(parameter.numel() for parameter in model.parameters()) < 1_250_000


def test_the_tokenizer_has_the_models_ids(tokenizer: SentencePieceProcessor, model: Llama) -> None:
    assert tokenizer.vocab_size() == model.config.vocab_size
    assert (tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id()) == (0, 1, 2)
    assert model.config.bos_token_id == tokenizer.bos_id()
    assert model.config.eos_token_ids == (tokenizer.eos_id(),)


def test_stories_survive_the_tokenizer(tokenizer: SentencePieceProcessor) -> None:
    texts = [make_story(seed).text for seed in range(200)]
    rows = tokenizer.encode(texts)
    assert tokenizer.decode(rows) == texts
    assert max(map(len, rows)) < 256


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00\u2581")))
def test_any_text_survives_the_tokenizer(tokenizer: SentencePieceProcessor, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.fixture(scope="module")
def language_model() -> LanguageModel:
    return load(DEMO, backend="eager")


def test_the_greedy_story_is_accepted(language_model: LanguageModel) -> None:
    prompt = "Once upon a time"
    (completion,) = language_model.generate(prompt, temperature=0.0)
    assert completion.finish_reason == "stop"
    assert explain(prompt + completion.text) is None


def test_the_default_demo_is_accepted(language_model: LanguageModel) -> None:
    prompt = "Once upon a time"
    (completion,) = language_model.generate(prompt, temperature=0.8, seed=0)
    assert completion.finish_reason == "stop"
    assert explain(prompt + completion.text) is None


@pytest.mark.slow
def test_sampled_stories_are_accepted(language_model: LanguageModel) -> None:
    told = [language_model.generate("", temperature=0.8, seed=seed)[0] for seed in range(10)]
    assert [completion.finish_reason for completion in told] == ["stop"] * 10
    assert sum(accepts(completion.text) for completion in told) >= 8


def test_stories_go_on_from_their_prompts(tokenizer: SentencePieceProcessor, model: Llama) -> None:
    begun = [first_sentence(story.text) for story in stories(8, held_out=True)]
    told = tell(model, [[BOS_ID, *ids] for ids in tokenizer.encode(begun)], temperature=0)
    texts = tokenizer.decode(told)
    assert [first_sentence(text) for text in texts] == begun
    assert {ids[-1] for ids in told} == {EOS_ID}
    assert sum(map(accepts, texts)) >= 6


def test_the_sampled_stories_are_the_cards(tokenizer: SentencePieceProcessor, model: Llama) -> None:
    card = (DEMO / "README.md").read_text(encoding="utf-8")
    for text in tokenizer.decode(tell(model, [[BOS_ID]] * 3)):
        assert f"> {text}\n" in card


def test_held_out_perplexity_is_the_cards(tokenizer: SentencePieceProcessor, model: Llama) -> None:
    rows = encode(tokenizer, [story.text for story in stories(100, held_out=True)])
    assert perplexity(model, rows) == pytest.approx(
        _stated("held-out perplexity"), rel=PERPLEXITY_TOLERANCE
    )


def test_the_card_meets_the_goals() -> None:
    assert _stated("sampled stories that the grammar accepts") >= 90
    assert _stated("greedy stories that the grammar accepts") >= 90
    assert _stated("sampled stories that end by EOS") >= 99
    assert _stated("accepted stories that are not in the training corpus") >= 99


def test_the_tokenizer_is_reproduced(tokenizer: SentencePieceProcessor) -> None:
    again = SentencePieceProcessor(model_proto=train_tokenizer())
    ids = list(range(tokenizer.vocab_size()))
    assert again.id_to_piece(ids) == tokenizer.id_to_piece(ids)


class _CutOff(list[list[int]]):
    """Rows whose reading is interrupted after eight batches of two."""

    def __getitem__(self, index):
        if isinstance(index, slice) and index.start > 0:
            raise KeyboardInterrupt
        return super().__getitem__(index)


def test_a_run_that_was_cut_off_ends_the_same(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=2,
        tie_word_embeddings=True,
    )
    rows = [[1, *(3 + (i * j) % 13 for j in range(4 + i % 5)), 2] for i in range(20)]

    def run(rows: list[list[int]], file: str) -> Llama:
        torch.manual_seed(0)
        model = Llama(config, num_positions=16)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
        train(model, rows, num_steps=10, batch_size=2, snapshot=tmp_path / file, snapshot_steps=3)
        return model

    whole = run(rows, "whole.pt")
    with pytest.raises(KeyboardInterrupt):
        run(_CutOff(rows), "cut.pt")
    resumed = run(rows, "cut.pt")
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
