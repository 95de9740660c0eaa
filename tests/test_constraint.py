"""Texts that must be of a grammar."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scheduler import letters

from llamac.model.load import DEMO_FOLDER
from llamac.runtime.language_model import LanguageModel
from llamac.runtime.load import load
from llamac.runtime.text.constraint import Grammar, GrammarCompiler
from llamac.runtime.text.tokenizer import Tokenizer

pytest.importorskip("llguidance")

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "pets": {"type": "array", "items": {"enum": ["cat", "dog"]}, "maxItems": 2},
    },
    "required": ["name", "age", "pets"],
    "additionalProperties": False,
}


def schema(value: Any) -> Grammar:
    return Grammar(kind="json_schema", text=json.dumps(value))


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return load(DEMO_FOLDER, backend="eager", batch_size=4, threads=1)


def is_person(text: str) -> bool:
    person = json.loads(text)
    return (
        list(person) == ["name", "age", "pets"]
        and isinstance(person["name"], str)
        and len(person["name"]) <= 12
        and type(person["age"]) is int
        and 0 <= person["age"] <= 120
        and len(person["pets"]) <= 2
        and set(person["pets"]) <= {"cat", "dog"}
    )


def test_texts_of_a_schema_parse_and_validate(model: LanguageModel):
    done = model.generate("Once", n=40, grammar=schema(PERSON), temperature=1.0, seed=1)
    assert {d.finish_reason for d in done} == {"stop"}
    assert all(is_person(d.text) for d in done)
    assert len({d.text for d in done}) > 30


def test_what_stands_beside_a_grammar_is_as_it_was(model: LanguageModel):
    (alone,) = model.generate("Once upon", max_new_tokens=20, seed=3)
    held = model.request("Once", grammar=schema(PERSON), seed=3)
    with_it = []
    model.scheduler.submit(held, sink=lambda event: None)
    with_it = model.generate("Once upon", max_new_tokens=20, seed=3)
    assert with_it[0].ids == alone.ids


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        (Grammar(kind="regex", text="(yes|no), [0-9]{3}"), r"(yes|no), [0-9]{3}"),
        (Grammar(kind="lark", text='start: "a" ("b" | "cd")~2 '), r"a(b|cd){2}"),
        (schema({"enum": [1, "two"]}), r'1|"two"'),
        (schema({"const": "caf\u00e9"}), '"caf\u00e9"'),
    ],
    ids=["regex", "lark", "enum", "bytes"],
)
def test_grammars_of_each_kind(model: LanguageModel, grammar: Grammar, pattern: str):
    for done in model.generate("The dog", n=6, grammar=grammar, temperature=1.5, seed=2):
        assert re.fullmatch(pattern, done.text), done.text
        assert done.finish_reason == "stop"


def test_a_text_may_end_where_the_grammar_allows_it(model: LanguageModel):
    grammar = Grammar(kind="regex", text="[ a-z]*")
    done = model.generate("The dog", n=20, grammar=grammar, temperature=1.0, max_new_tokens=60)
    assert {d.finish_reason for d in done} >= {"stop"}
    assert all(re.fullmatch("[ a-z]*", d.text) for d in done)


@settings(max_examples=40)
@given(data=st.data())
def test_what_is_allowed_can_be_said_and_nothing_else(data: st.DataObject):
    # Of all letters a grammar of words allows those that begin a word which is left.
    words = data.draw(st.sets(st.text("DEFGHI", min_size=1, max_size=4), min_size=1, max_size=4))
    tokenizer = letters()
    state = GrammarCompiler(tokenizer)(Grammar(kind="regex", text="|".join(sorted(words))))
    text = ""
    while not state.finished:
        allowed = [int(i) for i in np.flatnonzero(state.allowed())]
        named = {"" if i in tokenizer.eos_ids else chr(65 + i) for i in allowed}
        left = {word[len(text) :] for word in words if word.startswith(text)}
        assert named == {word[:1] for word in left}
        chosen = data.draw(st.sampled_from(allowed))
        if chosen in tokenizer.eos_ids:
            break
        state.accept(chosen)
        text += chr(65 + chosen)
    assert text in words


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Grammar(kind="json_schema", text="{"), "the JSON schema is not JSON"),
        (Grammar(kind="json_schema", text="[]"), "the JSON schema is not an object"),
        (schema({"type": "nope"}), "the json schema can't be used: Invalid type: nope"),
        (Grammar(kind="regex", text="("), "the regex can't be used"),
        (Grammar(kind="lark", text="x: y"), "the lark can't be used"),
    ],
)
def test_bad_grammars(grammar: Grammar, message: str):
    with pytest.raises(ValueError, match=message):
        grammar.check()
    with pytest.raises(ValueError, match=message):
        GrammarCompiler(letters())(grammar)


def test_a_tokenizer_without_an_end_has_no_grammars():
    tokenizer = Tokenizer(encoder=lambda text, special: [0], pieces={0: b"a"})
    with pytest.raises(ValueError, match="an id that ends a text"):
        GrammarCompiler(tokenizer)(Grammar(kind="regex", text="a"))


def test_generate_takes_a_schema(run, refused, tmp_path: Path):
    file = tmp_path / "person.json"
    file.write_text(json.dumps(PERSON))
    words = ("generate", "--backend", "eager", "--threads", "1", "-p", "Once", "--seed", "5")
    code, out, _ = run(*words, "--no-display-prompt", "--json-schema", file)
    assert code == 0
    assert is_person(out)
    file.write_text('{"type": "nope"}')
    refused("Invalid type: nope", *words, "--json-schema", file)
