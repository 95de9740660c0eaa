import base64
import io
import json
import logging
import os
import random
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamac.runtime.text.library_errors import library_errors
from llamac.runtime.text.tokenizer import StreamDecoder, Tokenizer
from llamac.runtime.text.tokenizer_files import load_tokenizer

# sentencepiece's extension module lacks __module__ on its types.
pytestmark = pytest.mark.filterwarnings("ignore:builtin type .* has no __module__ attribute")

STORIES = Path(__file__).parents[2] / "shared" / "checkpoints" / "stories260K"
FORMATS = ["sentencepiece", "byte_level", "byte_fallback", "metaspace", "ranks"]
SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
SAMPLES = [
    "",
    " ",
    "hello",
    " two  spaces ",
    "\n\nline\n",
    "naïve 漢字 🙂‍↔️",
    "a<s>b</s> <unk>",
    "<|eot_id|>x",
    "they're 12345",
]


def words(seed=0):
    rng = random.Random(seed)
    syllables = ["he", "lo", "tha", "in", "er", "ran", "é", "12", "the", "two"]
    return ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(300)]


def sentencepiece_bytes():
    import sentencepiece

    out = io.BytesIO()
    text = words()
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore
        sentence_iterator=iter([" ".join(text[i : i + 9]) for i in range(0, 300, 9)]),
        model_writer=out,
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        num_threads=1,
        minloglevel=2,
    )
    return out.getvalue()


def byte_level_library():
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator([" ".join(words())], trainer)
    library.add_tokens(["<call>", "ünï code"])
    library.post_processor = processors.TemplateProcessing(
        single=f"{SPECIALS[0]} $A", special_tokens=[(SPECIALS[0], 0)]
    )
    return library


def byte_fallback_library(model_file):
    """The SentencePiece vocabulary as transformers writes it into a tokenizer.json."""
    import transformers
    from tokenizers import normalizers, processors

    library = transformers.LlamaTokenizer.from_pretrained(model_file.parent).backend_tokenizer
    library.pre_tokenizer = None  # Llama 2's own file
    library.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return library


def rank_lines():
    merges = [
        "th",
        "he",
        "the",
        " t",
        " the",
        "in",
        "er",
        "lo",
        "hel",
        "hello",
        "\n\n",
        "12",
        "123",
    ]
    tokens = [bytes([b]) for b in range(256)] + [m.encode() for m in merges]
    return b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    from tokenizers import decoders

    root = tmp_path_factory.mktemp("tokenizers")
    made = {name: root / name for name in FORMATS}
    for folder in made.values():
        folder.mkdir()
    (made["sentencepiece"] / "tokenizer.model").write_bytes(sentencepiece_bytes())
    (made["sentencepiece"] / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": True})
    )
    byte_level_library().save(str(made["byte_level"] / "tokenizer.json"))
    eos = {"__type": "AddedToken", "content": SPECIALS[1]}
    (made["byte_level"] / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": SPECIALS[0], "eos_token": eos})
    )
    library = byte_fallback_library(made["sentencepiece"] / "tokenizer.model")
    library.save(str(made["byte_fallback"] / "tokenizer.json"))
    library.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")]
    )
    library.save(str(made["metaspace"] / "tokenizer.json"))
    for name in ("byte_fallback", "metaspace"):
        (made[name] / "tokenizer_config.json").write_text(
            json.dumps({"bos_token": "<s>", "eos_token": "</s>"})
        )
    (made["ranks"] / "tokenizer.model").write_bytes(rank_lines())
    return made


@pytest.fixture(scope="module")
def loaded(folders):
    return {name: load_tokenizer(folder) for name, folder in folders.items()}


@pytest.fixture
def copied(folders, tmp_path):
    def copy(name, **files):
        folder = tmp_path / "copy"
        shutil.copytree(folders[name], folder)
        for file, value in files.items():
            (folder / f"{file}.json").write_text(json.dumps(value))
        return folder

    return copy


def byte_tokenizer(**fields):
    """Each byte its own id, written in Python: the streaming rules alone."""
    return Tokenizer(
        encoder=lambda text, special: list(text.encode()),
        pieces={b: bytes([b]) for b in range(256)},
        **fields,
    )


# ids, against the libraries that define the formats


@pytest.mark.parametrize("text", SAMPLES)
def test_sentencepiece_ids_are_the_librarys(folders, loaded, text):
    import sentencepiece

    library = sentencepiece.SentencePieceProcessor(
        model_proto=(folders["sentencepiece"] / "tokenizer.model").read_bytes()
    )
    tokenizer = loaded["sentencepiece"]
    assert tokenizer.vocab_size == library.vocab_size()
    assert tokenizer.encode(text) == [1, *library.encode(text)]
    assert tokenizer.encode(text, bos=False) == library.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == library.decode(library.encode(text)) == text


@pytest.mark.parametrize("text", [*SAMPLES, "<s>[INST] hi [/INST] yes </s><s>[INST] so"])
@pytest.mark.parametrize("name", FORMATS[:4])
def test_special_text_is_parsed_as_transformers_does(folders, loaded, name, text):
    import transformers

    if name == "sentencepiece":
        # Llama 2's own tokenizer.json, built from the same vocabulary.
        reference = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(folders["byte_fallback"] / "tokenizer.json")
        )
    else:
        reference = transformers.PreTrainedTokenizerFast.from_pretrained(folders[name])
    ids = reference.encode(text, add_special_tokens=False)
    tokenizer = loaded[name]
    if name == "sentencepiece" and "<unk>" in text:
        text, ids = "a", tokenizer.encode("a", bos=False)  # only a control once it is listed
    assert tokenizer.encode(text, bos=False, special=True) == ids
    decoded = reference.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if name != "metaspace":  # drops every space of the first piece
        assert tokenizer.decode(ids) == decoded


@pytest.mark.parametrize("text", SAMPLES)
def test_rank_file_ids_are_what_transformers_converts(folders, loaded, text):
    from transformers.convert_slow_tokenizer import TikTokenConverter

    model = str(folders["ranks"] / "tokenizer.model")
    reference = TikTokenConverter(vocab_file=model).converted()
    tokenizer = loaded["ranks"]
    expected = reference.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text, bos=False) == expected
    assert tokenizer.decode(expected) == reference.decode(expected) == text


def test_llama3_specials_follow_the_ranks(loaded):
    tokenizer = loaded["ranks"]
    first = tokenizer.vocab_size - 256
    assert first == 256 + 13
    text = "<|start_header_id|>user<|end_header_id|>\n\nthe<|eot_id|>"
    ids = tokenizer.encode(text, special=True)
    assert ids[:2] == [first, first + 6]
    assert ids[-1] == first + 9
    assert tokenizer.decode(ids) == "user\n\nthe"
    assert tokenizer.bos_id == first
    assert tokenizer.eos_ids == (first + 1, first + 8, first + 9)
    last = "<|reserved_special_token_247|>"
    assert tokenizer.encode(last, bos=False, special=True) == [first + 255]


@pytest.mark.parametrize("name", FORMATS)
def test_special_text_in_a_prompt_stays_text(loaded, name):
    tokenizer = loaded[name]
    text = "x<s></s><|eot_id|><|begin_of_text|>"
    ids = tokenizer.encode(text, bos=False)
    assert not tokenizer.special_ids.intersection(ids)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", FORMATS)
def test_one_bos(loaded, name):
    tokenizer = loaded[name]
    bos = tokenizer.bos_id
    assert tokenizer.encode("", bos=True) == [bos]
    assert tokenizer.encode("a").count(bos) == 1
    written = tokenizer.token_bytes  # a special id has no text of its own
    assert written(bos) == b""
    begin = tokenizer.pieces[bos].decode()
    assert tokenizer.encode(begin + "a", special=True).count(bos) == 1
    assert bos not in tokenizer.encode("a", bos=False)


@pytest.mark.parametrize("keep", [True, False])
def test_the_files_post_processor_decides_on_bos_as_in_transformers(copied, keep):
    import transformers

    config = {"bos_token": SPECIALS[0], "tokenizer_class": "PreTrainedTokenizerFast"}
    folder = copied("byte_level", tokenizer_config=config)
    if not keep:
        spec = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps(spec | {"post_processor": None}))
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    ids = load_tokenizer(folder).encode("hello the")
    assert ids == reference.encode("hello the")
    assert (ids[0] == 0) is keep


# what the checkpoint's files say


def test_eos_ids_are_the_union_in_order(copied):
    folder = copied(
        "byte_level",
        generation_config={"eos_token_id": [2, 5]},
        config={"eos_token_id": 5, "bos_token_id": 7},
    )
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_ids == (2, 5, 1)
    assert tokenizer.bos_id == 0


def test_named_eos_replaces_llama3s_default(copied):
    assert load_tokenizer(copied("ranks", config={"eos_token_id": 270})).eos_ids == (270,)


def test_ids_outside_the_tokenizer_are_dropped_with_a_warning(copied, caplog):
    folder = copied("sentencepiece", generation_config={"eos_token_id": [2, 99999, -1]})
    assert load_tokenizer(folder).eos_ids == (2,)
    assert "99999" in caplog.text


def test_add_bos_token_false_is_respected(copied):
    config = {"bos_token": "<s>", "add_bos_token": False}
    tokenizer = load_tokenizer(copied("sentencepiece", tokenizer_config=config))
    assert tokenizer.bos_id is not None
    assert tokenizer.encode("a") == tokenizer.encode("a", bos=False)


@pytest.mark.parametrize("config", [{"add_bos_token": False}, {"bos_token": None}, {}])
def test_a_post_processor_decides_on_bos_whatever_the_config_says(copied, config):
    """`add_bos_token: false` won, null took the BOS away, and none was put where none is named."""
    import transformers

    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    folder = copied("byte_level", tokenizer_config=config)
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("hello") == reference.encode("hello")
    assert tokenizer.encode("hello")[0] == tokenizer.bos_id == 0


def test_no_bos_where_the_files_say_null(copied):
    config = {"bos_token": None, "eos_token": SPECIALS[1]}
    folder = copied("byte_level", tokenizer_config=config, config={"bos_token_id": 0})
    spec = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(spec | {"post_processor": None}))
    assert load_tokenizer(folder).bos_id is None
    assert load_tokenizer(folder).encode("") == []


def test_empty_texts_are_no_names(copied):
    """The first public conversions name "" and wrong ids; BOS became `<unk>`."""
    config = {"bos_token": "", "eos_token": "", "tokenizer_class": "LlamaTokenizer"}
    ids = {"bos_token_id": 0, "eos_token_id": 1}
    tokenizer = load_tokenizer(copied("byte_fallback", tokenizer_config=config, config=ids))
    assert tokenizer.bos_id == 1
    assert set(tokenizer.eos_ids) == {1, 2}


@pytest.mark.parametrize(("kind", "adds"), [("GPT2Tokenizer", False), ("LlamaTokenizer", True)])
def test_without_a_post_processor_the_class_decides_on_bos(copied, kind, adds):
    folder = copied(
        "byte_level", tokenizer_config={"bos_token": SPECIALS[0], "tokenizer_class": kind}
    )
    spec = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(spec | {"post_processor": None}))
    assert (load_tokenizer(folder).encode("a")[0] == 0) is adds


def test_truncation_and_padding_in_the_file_are_switched_off(copied):
    folder = copied("byte_level")
    library = byte_level_library()
    library.enable_truncation(3)
    library.enable_padding(length=8)
    library.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    text = "xyz xyz xyz"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("x")) == 2


@pytest.mark.parametrize("where", ["added_tokens", "tokenizer_config"])
def test_tokens_added_behind_a_sentencepiece_model(copied, loaded, where):
    size = loaded["sentencepiece"].vocab_size
    added = {"[PAD]": size, "<call>": size + 2}
    decoder = {str(i): {"content": t, "special": t == "[PAD]"} for t, i in added.items()}
    config: dict[str, object] = {"pad_token": "[PAD]"}
    if where == "added_tokens":
        folder = copied("sentencepiece", added_tokens=added, tokenizer_config=config)
    else:
        config["added_tokens_decoder"] = decoder
        folder = copied("sentencepiece", tokenizer_config=config)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.vocab_size == size + 3
    ids = tokenizer.encode("he<call>lo[PAD]", bos=False, special=True)
    assert [i for i in ids if i >= size] == [size + 2, size]
    assert tokenizer.decode(ids) == "he<call> lo"
    assert tokenizer.decode([size + 1]) == ""
    # A prompt holds the plain one, and can't hold the special one.
    assert [i for i in tokenizer.encode("he<call>lo[PAD]") if i >= size] == [size + 2]


@pytest.mark.parametrize("added", [{"[PAD]": -1}, {"[PAD]": "x"}, {"": 400}])
def test_added_tokens_without_an_id_or_a_text_are_refused(copied, added):
    with pytest.raises(ValueError, match="adds the token"):
        load_tokenizer(copied("sentencepiece", added_tokens=added))


def test_legacy_false_puts_no_space_after_a_special_token(copied, loaded):
    folder = copied("sentencepiece", tokenizer_config={"legacy": False})
    text = "hello</s>hello the"
    ids = load_tokenizer(folder).encode(text, special=True)
    assert load_tokenizer(folder).decode(ids) == "hellohello the"
    assert loaded["sentencepiece"].decode(loaded["sentencepiece"].encode(text, special=True)) == (
        "hello hello the"
    )


def test_tokenizer_json_wins_and_differing_sizes_warn(folders, copied, caplog):
    folder = copied("byte_fallback")
    model = folder / "tokenizer.model"
    shutil.copy(folders["sentencepiece"] / "tokenizer.model", model)
    assert load_tokenizer(folder).encode("a") == load_tokenizer(folders["byte_fallback"]).encode(
        "a"
    )
    assert not caplog.records
    model.write_bytes(rank_lines())
    load_tokenizer(folder)
    assert "has 525" in caplog.text
    model.write_bytes(b"no model of any kind\n")
    load_tokenizer(folder)
    assert "neither SentencePiece nor a rank file" in caplog.text
    assert all(record.levelno == logging.WARNING for record in caplog.records)


# damaged files


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_link_to_nowhere_is_no_missing_tokenizer(copied, name):
    """An export went on without a tokenizer, and generate said that there was none."""
    path = copied("ranks") / name
    path.unlink(missing_ok=True)
    path.symlink_to("blobs/0123")
    with pytest.raises(ValueError, match=f"{name}: not a file, or a link to nowhere"):
        load_tokenizer(path.parent)


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer in"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        load_tokenizer(tmp_path / "nothing")


@pytest.mark.parametrize("data", [b"", b"\x00\x01", b"version https://git-lfs", b"\n\x00"])
def test_a_damaged_model_is_refused(tmp_path, data):
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(ValueError, match="neither SentencePiece nor a rank file"):
        load_tokenizer(tmp_path)


@given(cut=st.floats(0, 0.99))
@settings(deadline=None, max_examples=30)
def test_a_cut_model_is_refused(folders, tmp_path_factory, cut):
    data = (folders["sentencepiece"] / "tokenizer.model").read_bytes()
    folder = tmp_path_factory.mktemp("cut")
    (folder / "tokenizer.model").write_bytes(data[: int(cut * len(data))])
    with pytest.raises(ValueError, match="copy it again"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"dGg= 256", b"dGg 256", "line 257"),
        (b"dGg= 256", b"dGg=", "line 257"),
        (b"dGg= 256", b"dGg= x", "line 257"),
        (b"dGg= 256", b"dGg= 300", "line 257.*count up"),
        (b"dGg= 256", b"AA== 256", "line 257.*count up"),
        (b"dGg= 256", b"", "line 257"),
    ],
)
def test_a_bad_rank_line_is_named(tmp_path, old, new, message):
    data = rank_lines()
    assert old in data
    (tmp_path / "tokenizer.model").write_bytes(data.replace(old, new))
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


def test_a_rank_file_cut_between_lines_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"".join(rank_lines().splitlines(True)[:200]))
    with pytest.raises(ValueError, match="no token for byte 200"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a tokenizer"),
        ('{"model": {', "is not a tokenizer"),
        ("[]", "is not a tokenizer"),
        ("{}", "is not a tokenizer"),
        ('{"model": {"type": "none"}}', "is not a tokenizer"),
    ],
)
def test_a_damaged_json_is_refused(tmp_path, text, message):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


def test_an_unknown_decoder_is_refused(copied):
    folder = copied("byte_level")
    spec = json.loads((folder / "tokenizer.json").read_text())
    for decoder in (None, {"type": "WordPiece", "prefix": "##", "cleanup": True}):
        (folder / "tokenizer.json").write_text(json.dumps(spec | {"decoder": decoder}))
        with pytest.raises(ValueError, match="allowed are ByteLevel"):
            load_tokenizer(folder)


@pytest.mark.parametrize("value", ["2", [1, None], True, 2.0])
def test_an_eos_that_is_no_id_is_refused(copied, value):
    """The message used not to say in which file."""
    with pytest.raises(ValueError, match=r"/config\.json: eos_token_id is"):
        load_tokenizer(copied("ranks", config={"eos_token_id": value}))


@pytest.mark.parametrize("name", FORMATS)
def test_ids_that_do_not_exist_are_refused(loaded, name):
    tokenizer = loaded[name]
    for i in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match="token id is"):
            tokenizer.decode([i])
        with pytest.raises(ValueError, match="token id is"):
            StreamDecoder(tokenizer, []).push(i)


# damage that was taken, or ended in a traceback


def small_ranks(folder, vocab_size, **files):
    (folder / "tokenizer.model").write_bytes(rank_lines())
    for name, value in {"config": {"vocab_size": vocab_size}, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(value))


@pytest.mark.parametrize("name", ["config", "params"])
@pytest.mark.parametrize("lines", [256, 260, 268])
def test_ranks_cut_after_any_line_are_refused(tmp_path, name, lines):
    """The special ids move with the number of ranks: another text, exit code 0."""
    small_ranks(tmp_path, -1, **{name: {"vocab_size": 525}})
    assert load_tokenizer(tmp_path).vocab_size == 525
    (tmp_path / "tokenizer.model").write_bytes(b"".join(rank_lines().splitlines(True)[:lines]))
    with pytest.raises(ValueError, match=f"tokenizer.model has {lines} ranks.*cut short"):
        load_tokenizer(tmp_path)


def test_ranks_with_tokens_added_behind_them(tmp_path):
    """The model has rows for what a fine-tune added, and a cut file is found all the same."""
    added = {"525": {"content": "<|x|>", "special": True}, "526": {"content": "word"}}
    names = {"269": {"content": "<|begin_of_text|>", "special": True}}
    small_ranks(tmp_path, 528, tokenizer_config={"added_tokens_decoder": added | names})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("he<|x|>word", bos=False, special=True) == [257, 525, 526]
    assert 525 not in tokenizer.encode("he<|x|>word")
    (tmp_path / "tokenizer.model").write_bytes(b"".join(rank_lines().splitlines(True)[:-1]))
    with pytest.raises(ValueError, match="has another id; it is cut short"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("seed", range(8))
def test_a_changed_byte_of_a_sentencepiece_model_names_the_file(folders, tmp_path, seed):
    """A piece that was no UTF-8 ended in a codec's message without a file."""
    data = bytearray((folders["sentencepiece"] / "tokenizer.model").read_bytes())
    rng, messages = random.Random(seed), []
    for _ in range(60):
        changed = bytearray(data)
        changed[rng.randrange(len(data))] = rng.choice((0x80, 0xB0, 0xFF, rng.randrange(256)))
        (tmp_path / "tokenizer.model").write_bytes(changed)
        try:
            tokenizer = load_tokenizer(tmp_path)
            tokenizer.decode(tokenizer.encode("hello <s> 漢", special=True))
        except ValueError as error:
            messages.append(str(error))
    assert [m for m in messages if not re.search(r"tokenizer\.model.*copy it again", m)] == []
    assert messages


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda spec: spec.update(
                pre_tokenizer={
                    "type": "Split",
                    "pattern": {"Regex": "(a+)+$"},
                    "behavior": "Isolated",
                    "invert": False,
                }
            ),
            "a" * 30 + "!",
        ),
        (
            lambda spec: spec.update(
                post_processor={
                    "type": "TemplateProcessing",
                    "single": [{"SpecialToken": {"id": "absent", "type_id": 0}}],
                    "pair": [{"Sequence": {"id": "B", "type_id": 1}}],
                    "special_tokens": {},
                }
            ),
            "a",
        ),
    ],
)
def test_a_panic_names_the_file(copied, capfd, change, text):
    """A panic of tokenizers is no Exception: nothing caught it. It was also printed."""
    folder = copied("byte_level")
    spec = json.loads((folder / "tokenizer.json").read_text())
    change(spec)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(ValueError, match=r"tokenizer\.json .*copy the file again"):
        load_tokenizer(folder).encode(text)
    assert capfd.readouterr() == ("", "")


def test_what_others_write_to_stderr_meanwhile_is_kept(capfd):
    with library_errors("x"):
        os.write(2, b"a warning\n")
    assert capfd.readouterr().err == "a warning\n"


def test_marks_of_parts_of_words_are_refused(copied, capfd):
    """The library panicked on some of them, and printed that itself."""
    folder = copied("byte_level")
    spec = json.loads((folder / "tokenizer.json").read_text())
    for value in ("##", 5, "😀"):
        spec["model"]["continuing_subword_prefix"] = value
        (folder / "tokenizer.json").write_text(json.dumps(spec))
        with pytest.raises(ValueError, match=r"tokenizer\.json marks parts of words"):
            load_tokenizer(folder)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("where", ["normalizer", "decoder"])
def test_replacements_that_fill_the_memory_are_refused(copied, where):
    """Six of them made 10**12 characters of one; the process was aborted."""
    folder = copied("byte_fallback")
    spec = json.loads((folder / "tokenizer.json").read_text())
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}
    key = f"{where}s"
    spec[where] = {"type": "Sequence", key: [{"type": "Sequence", key: [step] * 3}, step]}
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(ValueError, match=r"replaces one character by up to 1e\+08, at most 64"):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_file_that_is_too_large_is_not_read(tmp_path, name):
    with (tmp_path / name).open("wb") as stream:
        stream.truncate(2**33)
    with pytest.raises(ValueError, match=f"{name}: larger than 64 MiB"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("text", ["a\ud800", "\udcff"])
def test_half_a_character_is_refused(loaded, name, text):
    """SentencePiece raised a RuntimeError; the others wrote U+FFFD."""
    for special in (False, True):
        with pytest.raises(ValueError, match="not UTF-8"):
            loaded[name].encode(text, special=special)


@pytest.mark.parametrize("rows", [None, 400])
def test_the_size_of_a_vocabulary_with_holes(copied, rows):
    """With the model's size known, ids are counted without asking for all of them."""
    folder = copied("byte_level", **({"config": {"vocab_size": rows}} if rows else {}))
    spec = json.loads((folder / "tokenizer.json").read_text())
    token = next(reversed(spec["model"]["vocab"]))
    spec["model"]["vocab"][token] = 350
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    import tokenizers

    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.vocab_size == max(library.get_vocab().values()) + 1
    assert tokenizer.vocab_size == 351
    assert dict(tokenizer.pieces)[350] == tokenizer.token_bytes(350) != b""
    assert tokenizer.decode([349]) == ""


# properties


@pytest.mark.parametrize("name", FORMATS)
@given(text=st.text() | st.text("he lo\n<s>é🙂"))
@settings(deadline=None)
def test_text_comes_back(loaded, name, text):
    if name not in ("byte_level", "ranks"):
        text = text.replace("▁", "_")  # SentencePiece writes spaces as this character
    tokenizer = loaded[name]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def some_ids(tokenizer):
    """Any ids, with runs of single bytes, valid and not, more often than chance gives."""
    single = {piece[0]: i for i, piece in tokenizer.pieces.items() if len(piece) == 1}
    byte_runs = st.lists(st.sampled_from([*single.values()]), min_size=1, max_size=5)
    cut_characters = st.sampled_from("é€漢🙂").flatmap(
        lambda char: st.integers(1, len(char.encode())).map(
            lambda end: [single[b] for b in char.encode()[:end]]
        )
    )
    texts = st.text(max_size=4).map(lambda text: tokenizer.encode(text, bos=False))
    anything = st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=4)
    return st.lists(byte_runs | cut_characters | texts | anything, max_size=6).map(
        lambda parts: sum(parts, [])
    )


def stream(tokenizer, prompt, new, stop=()):
    decoder = StreamDecoder(tokenizer, prompt, stop)
    parts = [decoder.push(i) for i in new]
    return [*parts, decoder.flush()], decoder.stopped


@pytest.mark.parametrize("name", FORMATS)
@given(data=st.data())
@settings(deadline=None, max_examples=200)
def test_streaming_equals_decoding_the_whole(loaded, name, data):
    tokenizer = loaded[name]
    prompt = data.draw(some_ids(tokenizer))
    new = data.draw(some_ids(tokenizer))
    whole = tokenizer.decode(prompt + new)
    complete = StreamDecoder(tokenizer, [])
    before = "".join(complete.push(i) for i in prompt)  # without an incomplete character
    if not complete.flush():
        assert before == tokenizer.decode(prompt)
    parts, _ = stream(tokenizer, prompt, new)
    assert before + "".join(parts) == whole
    # What is out early is never half a character: each part is itself whole text.
    for end in range(len(new)):
        assert whole.startswith(before + "".join(parts[:end]))


@pytest.mark.parametrize("name", FORMATS)
@given(data=st.data())
@settings(deadline=None)
def test_every_character_is_out_with_its_last_byte(loaded, name, data):
    tokenizer = loaded[name]
    text = data.draw(st.text())
    decoder = StreamDecoder(tokenizer, [])
    assert "".join(decoder.push(i) for i in tokenizer.encode(text)) == tokenizer.decode(
        tokenizer.encode(text)
    )
    assert decoder.flush() == ""


@pytest.mark.parametrize("name", ["sentencepiece", "byte_level"])
@given(data=st.data())
@settings(deadline=None)
def test_any_ids_decode_as_the_library_does(folders, loaded, name, data):
    import sentencepiece
    import tokenizers

    tokenizer = loaded[name]
    ids = data.draw(some_ids(tokenizer))
    if name == "byte_level":
        library = tokenizers.Tokenizer.from_file(str(folders[name] / "tokenizer.json"))
        assert tokenizer.decode(ids) == library.decode(ids, skip_special_tokens=True)
        return
    library = sentencepiece.SentencePieceProcessor(
        model_proto=(folders[name] / "tokenizer.model").read_bytes()
    )
    # Its decoder keeps a leading space that isn't from a word, and breaks a character at a
    # special id; no text encodes to either.
    ids = [i for i in ids if i not in tokenizer.special_ids]
    while ids and (library.is_byte(ids[0]) or library.is_unknown(ids[0])):
        ids.pop(0)
    assert tokenizer.decode(ids) == library.decode(ids)


# stop texts


def first_stop(text, stops):
    """The definition, one character at a time: the text before the first stop completed."""
    for end in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            return text[: end - max(map(len, ended))], True
    return text, False


@given(
    text=st.text("abc\né"),
    stops=st.lists(st.text("abc\né", min_size=1, max_size=5), max_size=4),
    data=st.data(),
)
@settings(deadline=None, max_examples=400)
def test_stop_texts_never_leak(text, stops, data):
    expected, stopped = first_stop(text, stops)
    pieces = [text[i : i + 3].encode() for i in range(0, len(text), 3)]
    chunked = Tokenizer(
        encoder=lambda text, special: [], pieces=dict(enumerate([*pieces, b"prompt a"]))
    )
    for tokenizer, prompt, new in (
        (byte_tokenizer(), b"prompt a", text.encode()),
        (chunked, [len(pieces)], range(len(pieces))),
    ):
        decoder = StreamDecoder(tokenizer, list(prompt), stops)
        out = ""
        for i in new:
            out += decoder.push(i)
            assert expected.startswith(out)
        assert decoder.stopped is stopped
        assert out + decoder.flush() == expected
        assert decoder.push(new[0] if new else 0) == "" or not stopped


def test_only_a_possible_stop_is_held_back():
    decoder = StreamDecoder(byte_tokenizer(), b"", ["###", "#!"])
    assert [decoder.push(b) for b in b"a#b##c#"] == ["a", "", "#b", "", "", "##c", ""]
    assert not decoder.stopped
    assert decoder.push(ord("!")) == ""
    assert decoder.stopped
    assert decoder.push(ord("x")) == decoder.flush() == ""


def test_the_longest_of_two_stops_that_end_together():
    parts, stopped = stream(byte_tokenizer(), b"", b"xab", ["b", "ab"])
    assert "".join(parts) == "x"
    assert stopped


def test_the_first_stop_completed_counts_however_the_text_arrives():
    whole = Tokenizer(encoder=lambda text, special: [], pieces={0: b"xabcd"})
    for tokenizer, new in ((whole, [0]), (byte_tokenizer(), b"xabcd")):
        parts, stopped = stream(tokenizer, [], new, ["abcd", "bc"])
        assert "".join(parts) == "xa"
        assert stopped


def test_a_stop_text_in_the_prompt_does_not_count():
    parts, stopped = stream(byte_tokenizer(), b"User:", b"er: hi", ["User:"])
    assert "".join(parts) == "er: hi"
    assert not stopped


def test_flush_finishes_an_incomplete_character_once():
    decoder = StreamDecoder(byte_tokenizer(), b"", ["\ufffd!"])
    assert [decoder.push(b) for b in "é€".encode()[:4]] == ["", "é", "", ""]
    assert decoder.flush() == "\ufffd"
    assert decoder.flush() == ""


def test_a_character_the_prompt_left_incomplete_belongs_to_the_new_text():
    euro = "€".encode()
    parts, _ = stream(byte_tokenizer(), b"a" + euro[:2], euro[2:] + b"b")
    assert parts == ["€", "b", ""]


def test_each_invalid_byte_is_marked_where_the_format_does_so():
    data = "a€".encode()[:3] + b"b"
    assert byte_tokenizer().decode(data) == "a\ufffdb"
    assert byte_tokenizer(replace_each_byte=True).decode(data) == "a\ufffd\ufffdb"


def test_a_long_stream_costs_each_token_once():
    calls = []

    class Counting(dict):
        def get(self, key, default=None):
            calls.append(key)
            return super().get(key, default)

    tokenizer = Tokenizer(encoder=lambda t, s: [], pieces=Counting({0: b"ab "}))
    parts, _ = stream(tokenizer, [0] * 5, [0] * 1000, ["zz"])
    assert "".join(parts) == "ab " * 1000
    assert len(calls) == 1005


@pytest.mark.parametrize("stop", ["text", [""], ("a", "")])
def test_bad_stop_texts_are_refused(stop):
    with pytest.raises(ValueError, match="stop is"):
        StreamDecoder(byte_tokenizer(), [], stop)


@pytest.mark.skipif(not STORIES.is_dir(), reason="the stories260K checkpoint is not here")
def test_a_real_checkpoint():
    tokenizer = load_tokenizer(STORIES)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids) == (512, 1, (2,))
    text = "Once upon a time, there was a 漢 girl.\n\n  She"
    ids = tokenizer.encode(text)
    assert ids[0] == 1
    assert tokenizer.decode(ids) == text
    parts, _ = stream(tokenizer, ids[:5], ids[5:])
    assert tokenizer.decode(ids[:5]) + "".join(parts) == text


def test_the_import_is_light():
    import subprocess
    import sys

    code = (
        "import sys, llamac.runtime.text.tokenizer_files, llamac.runtime.text.chat_template;"
        "print({'torch', 'tokenizers', 'tiktoken', 'sentencepiece', 'jinja2'} & {*sys.modules})"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
