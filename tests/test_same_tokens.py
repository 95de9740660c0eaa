"""One model, four ways to run it, the same tokens: eager, compiled, both kinds of ONNX graphs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llamac.export import export_bundle
from llamac.model.checkpoint import open_checkpoint
from llamac.model.load import DEMO_FOLDER, load_backend
from llamac.model.quantization import parse_recipe, quantize_checkpoint
from llamac.runtime.backend import Backend
from llamac.runtime.ort.ort_backend import OrtBackend
from llamac.runtime.request import Completion, Request
from llamac.runtime.sampling import SamplingParams
from llamac.runtime.scheduler import generate
from llamac.runtime.text.tokenizer import Tokenizer
from llamac.runtime.text.tokenizer_files import load_tokenizer

SIZES = {"batch_size": 4, "max_seq_len": 96, "prefill_len": 16}
PROMPTS = (
    "Once upon a time",
    "",
    "The little dog and the cat went to the park to play with a red ball",
)
SEEDS = (1, 2, 3)


@pytest.fixture(scope="module", params=["stories260K", "demo", "int4"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "demo":
        return DEMO_FOLDER
    if request.param == "stories260K":
        return request.getfixturevalue("stories260k")
    out = tmp_path_factory.mktemp("quantized") / request.param
    quantize_checkpoint(open_checkpoint(DEMO_FOLDER), out, parse_recipe(request.param))
    return out


@pytest.fixture(scope="module")
def backends(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Backend]]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("tokens") / "bundle"
    bundle = export_bundle(
        open_checkpoint(folder), out, targets=("cpu", "tensorrt"), accuracy_level=0, **SIZES
    )
    yield {
        "eager": load_backend(folder, compile=False, **SIZES).backend,
        "compile": load_backend(folder, **SIZES).backend,
        "ort cpu": OrtBackend(bundle, threads=1),
        "ort tensorrt": OrtBackend(bundle, target="tensorrt", threads=2),
        "ort prepacked": OrtBackend(bundle, prepack=True),
    }
    torch.set_num_threads(num_threads)


def assert_same(
    backends: dict[str, Backend], tokenizer: Tokenizer, requests: list[Request]
) -> list[Completion]:
    results = {
        name: generate(backend, tokenizer, requests, eos_ids=())
        for name, backend in backends.items()
    }
    first = results["eager"]
    for name, completions in results.items():
        assert [done.ids for done in completions] == [done.ids for done in first], name
        assert [done.text for done in completions] == [done.text for done in first], name
    return first


@pytest.mark.slow
@pytest.mark.parametrize("limit_policy", ["stop", "roll"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_three_prompts_in_one_batch(
    folder: Path, backends: dict[str, Backend], temperature: float, limit_policy
):
    tokenizer = load_tokenizer(folder)
    texts = set()
    for seed in SEEDS:
        sampling = SamplingParams(temperature=temperature, top_p=0.9, seed=seed)
        requests = [
            Request(
                prompt_ids=tuple(tokenizer.encode(prompt)),
                max_new_tokens=150,
                sampling=sampling,
                limit_policy=limit_policy,
            )
            for prompt in PROMPTS
        ]
        completions = assert_same(backends, tokenizer, requests)
        texts |= {done.text for done in completions}
        for done in completions:
            full = SIZES["max_seq_len"] + 1 - len(done.prompt_ids)
            assert len(done.ids) == (150 if limit_policy == "roll" else full)
    # Greedy ignores the seed; with a temperature all nine differ.
    assert len(texts) == (3 if temperature == 0 else 9)
