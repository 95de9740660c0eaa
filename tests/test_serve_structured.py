"""Texts that must be JSON of a schema: many, drawn at temperature 1, checked by another library."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from llamac.export import export_bundle
from llamac.model.checkpoint import open_checkpoint
from llamac.model.load import DEMO_FOLDER
from serving import Served, serving

NUM_REQUESTS = 500
NAME = {"type": "string", "maxLength": 12}
POINT = {
    "type": "object",
    "properties": {axis: {"type": "integer", "minimum": -20, "maximum": 99} for axis in "xy"},
    "required": ["x", "y"],
    "additionalProperties": False,
}
SCHEMAS: list[dict[str, Any]] = [
    {"type": "array", "items": POINT, "minItems": 1, "maxItems": 4},
    {
        "type": "object",
        "properties": {"name": NAME, "kind": {"enum": ["cat", "dog", None]}, "at": POINT},
        "required": ["name", "kind"],
        "additionalProperties": False,
    },
    {"anyOf": [{"type": "boolean"}, {"type": "null"}, NAME]},
    {"type": "string", "pattern": "^[A-Z][a-z]{2,8} [0-9]{1,3}$"},
    # Nothing that may go on for ever, as a tree may: it would be cut where the cache ends.
    {
        "$defs": {"pair": {"type": "array", "items": NAME, "minItems": 2, "maxItems": 2}},
        "type": "object",
        "properties": {"first": {"$ref": "#/$defs/pair"}, "more": {"enum": [1.5, -2]}},
        "required": ["first"],
        "additionalProperties": False,
    },
]


@pytest.mark.slow
def test_each_of_many_texts_is_of_its_schema(tmp_path: Path):
    bundle = export_bundle(open_checkpoint(DEMO_FOLDER), tmp_path / "demo", batch_size=8).folder
    with serving(bundle, "--max-queue", "64") as served, ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda seed: ask(served, seed), range(NUM_REQUESTS)))
    for seed, (status, answer, _) in enumerate(answers):
        assert status == 200, answer
        (choice,) = answer["choices"]
        assert choice["finish_reason"] == "stop", choice
        jsonschema.validate(json.loads(choice["message"]["content"]), schema_of(seed))
    assert len({json.dumps(answer["choices"]) for _, answer, _ in answers}) > NUM_REQUESTS // 3


def schema_of(seed: int) -> dict[str, Any]:
    return SCHEMAS[seed % len(SCHEMAS)]


def ask(served: Served, seed: int) -> tuple[int, Any, Any]:
    body = {
        "messages": [{"role": "user", "content": "Tell me of the hill."}],
        "temperature": 1,
        "seed": seed,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "it", "schema": schema_of(seed)},
        },
    }
    return served.ask("/v1/chat/completions", body)
