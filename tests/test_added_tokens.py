"""Added tokens of every format, against transformers."""

import json
import shutil
from pathlib import Path

import pytest

import llamac.model
from llamac.runtime.text.tokenizer_files import load_tokenizer

# sentencepiece's extension module lacks __module__ on its types.
pytestmark = pytest.mark.filterwarnings("ignore:builtin type .* has no __module__ attribute")

DEMO = Path(next(iter(llamac.model.__path__))) / "demo"
MODEL_CONFIG = {"model_type": "llama", "vocab_size": 2060, "hidden_size": 64}
PLAIN = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized", "special"), False)
OWN = {
    str(i): {**PLAIN, "content": c, "special": True} for i, c in enumerate(("<unk>", "<s>", "</s>"))
}
TEXTS = [
    "",
    "hello",
    "a boat <|x|> the sea",
    "<|x|>user\nhello",
    "a<|x|>b<|x|><|x|> c",
    "boat<sep>the sea <sep> boat",
    "qzx aqzx qzxa qzx, qzxqzx <sep>qzx",
    "<s>the sea</s>  <|x|>  \n boat",
]


def token(content, **switches):
    return {**PLAIN, "content": content, **switches}


@pytest.fixture
def folder(tmp_path):
    """Writes a folder around the demo's SentencePiece model, or a tokenizer.json made of it."""

    def write(kind="model", **files):
        import transformers

        shutil.copy(DEMO / "tokenizer.model", tmp_path)
        (tmp_path / "config.json").write_text(json.dumps(MODEL_CONFIG))
        if kind == "json":
            made = transformers.LlamaTokenizer.from_pretrained(tmp_path).backend_tokenizer
            made.save(str(tmp_path / "tokenizer.json"))
            (tmp_path / "tokenizer.model").unlink()
        for name, value in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(value))
        return tmp_path

    return write


def assert_equal_to_transformers(folder, texts=TEXTS, *, plain=True):
    import transformers

    reference = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    for text in texts:
        ids = reference.encode(text, add_special_tokens=False)
        assert tokenizer.encode(text, bos=False, special=True) == ids, text
        if plain:  # the text of special tokens stays text
            ids = reference.encode(text, add_special_tokens=False, split_special_tokens=True)
            assert tokenizer.encode(text, bos=False) == ids, text
    return tokenizer


@pytest.mark.parametrize("kind", ["model", "json"])
@pytest.mark.parametrize("legacy", [None, False, True])
@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"lstrip": True},
        {"rstrip": True},
        {"lstrip": True, "rstrip": True},
        {"single_word": True},
        {"normalized": True},
    ],
)
def test_switches_of_added_tokens(folder, kind, legacy, switches):
    """Behind a SentencePiece model none was honoured, and plain words were only found in chats."""
    added = OWN | {
        "2048": token("<|x|>", special=True, **switches),
        "2049": token("<sep>"),
        "2050": token("qzx", **switches),
    }
    config = {"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": added, "legacy": legacy}
    assert_equal_to_transformers(folder(kind, tokenizer_config=config))


@pytest.mark.parametrize("kind", ["model", "json"])
@pytest.mark.parametrize("name", ["LlamaTokenizer", "PreTrainedTokenizerFast", None])
def test_added_tokens_json_with_the_special_tokens_map(folder, kind, name):
    """Tokens that a tokenizer.json lacks became letters, and no end was known."""
    config = {"tokenizer_class": name} if name else {}
    tokenizer = assert_equal_to_transformers(
        folder(
            kind,
            tokenizer_config=config,
            added_tokens={"<|x|>": 2048, "<sep>": 2049, "qzx": 2050, "</e>": 2051},
            special_tokens_map={
                "eos_token": {**PLAIN, "content": "</e>"},
                "unk_token": "<unk>",
                "additional_special_tokens": ["<|x|>"],
            },
        ),
        plain=False,  # there transformers forgets that <|x|> is special
    )
    assert 2048 not in tokenizer.encode("a <|x|> b")
    assert tokenizer.eos_ids == (2051,)
    assert tokenizer.special_names["<|x|>"] == 2048


@pytest.mark.parametrize("kind", ["model", "json"])
@pytest.mark.parametrize("key", ["additional_special_tokens", "extra_special_tokens"])
def test_tokens_that_are_named_without_an_id(folder, kind, key):
    extra = ["<|x|>"] if key.startswith("add") else {"x_token": "<|x|>"}
    config = {"tokenizer_class": "LlamaTokenizer", "eos_token": "</e>", "pad_token": "</s>"}
    where = folder(kind, tokenizer_config=config | {key: extra})
    tokenizer = assert_equal_to_transformers(where)
    assert tokenizer.eos_ids == (2048,)
    assert tokenizer.special_names == tokenizer.special_names | {"</e>": 2048, "<|x|>": 2049}
    # The model has no row for them.
    (where / "config.json").write_text(json.dumps(MODEL_CONFIG | {"vocab_size": 2048}))
    assert load_tokenizer(where).vocab_size == 2048


@pytest.mark.parametrize("kind", ["model", "json"])
@pytest.mark.parametrize("prefix", [True, False, None])
@pytest.mark.parametrize("name", ["LlamaTokenizer", "LlamaTokenizerFast"])
def test_add_prefix_space(folder, kind, prefix, name):
    config = {"tokenizer_class": name, "add_prefix_space": prefix, "added_tokens_decoder": OWN}
    tokenizer = assert_equal_to_transformers(folder(kind, tokenizer_config=config))
    assert tokenizer.decode(tokenizer.encode("the sea")) == "the sea"


def test_a_bare_sentencepiece_model_is_the_librarys(folder):
    """Without a class transformers does what SentencePiece does, after each added token too."""
    assert_equal_to_transformers(folder(), [*TEXTS, "a</s> the boat"])


def test_a_piece_of_the_model_can_end_a_text(tmp_path):
    """A user-defined piece is found by SentencePiece itself; a prompt could forge the end."""
    import io

    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore
        sentence_iterator=iter(["the boat and the sea and a red boat"] * 9),
        model_writer=out,
        vocab_size=290,
        model_type="bpe",
        byte_fallback=True,
        user_defined_symbols=["<|im_end|>"],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(out.getvalue())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    tokenizer = load_tokenizer(tmp_path)
    (end,) = tokenizer.eos_ids
    text = "the<|im_end|> boat<|im_end|>"
    assert tokenizer.encode(text, special=True).count(end) == 2
    assert end not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.token_bytes(end) == b""


def test_special_texts_in_a_prompt(folder):
    where = folder(tokenizer_config={"added_tokens_decoder": OWN | {"2048": token("<sep>")}})
    tokenizer = load_tokenizer(where)
    assert tokenizer.special_names == {"<unk>": 0, "<s>": 1, "</s>": 2}
    assert tokenizer.specials_in("a</s><sep><s>b</s>") == ["</s>", "<s>"]
    assert tokenizer.specials_in("a < s >") == []


# values of another type


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"add_bos_token": "false"}, "add_bos_token is 'false'; it must be true or false"),
        ({"legacy": 0}, "legacy is 0"),
        ({"add_prefix_space": [], "tokenizer_class": "LlamaTokenizer"}, "add_prefix_space is"),
        ({"bos_token": {}}, "bos_token is {}; it must be a text, null or an object"),
        ({"unk_token": "\ud800"}, r"unk_token is '.ud800'; it holds half a character"),
        ({"eos_token": 2}, "eos_token is 2"),
        ({"eos_token": ["</s>"]}, "eos_token is"),
        ({"tokenizer_class": 5}, "tokenizer_class is 5"),
        ({"added_tokens_decoder": []}, r"added_tokens_decoder is \[\]"),
        ({"added_tokens_decoder": {"x": token("a")}}, "adds the token 'a' as id 'x'"),
        ({"added_tokens_decoder": {"9" * 5000: token("a")}}, "adds the token"),
        ({"added_tokens_decoder": {"5": token("a", special="false")}}, "special is 'false'"),
        ({"additional_special_tokens": "abc"}, "additional_special_tokens is 'abc'"),
        ({"additional_special_tokens": [1]}, "additional_special_tokens is 1"),
    ],
)
@pytest.mark.parametrize("kind", ["model", "json"])
def test_values_of_another_type_are_refused_by_name(folder, kind, config, message):
    where = folder(kind, tokenizer_config=config)
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(where)
    assert len(str(caught.value)) < 400
    assert str(where) in str(caught.value)  # the value used to be shown without its place


@pytest.mark.parametrize("kind", ["model", "json"])
def test_null_is_absent(folder, kind):
    keys = ("add_bos_token", "legacy", "added_tokens_decoder", "additional_special_tokens")
    keys += ("tokenizer_class", "add_prefix_space", "unk_token", "pad_token")
    where = folder(kind, tokenizer_config=dict.fromkeys(keys))
    ids = load_tokenizer(where).encode("the sea")
    (where / "tokenizer_config.json").unlink()
    assert load_tokenizer(where).encode("the sea") == ids


def test_a_byte_order_mark_is_no_text(folder):
    where = folder("json", tokenizer_config={"bos_token": "<s>"})
    ids = load_tokenizer(where).encode("the sea")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (where / name).write_bytes(b"\xef\xbb\xbf" + (where / name).read_bytes())
    assert load_tokenizer(where).encode("the sea") == ids
