from __future__ import annotations

import io
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from llamac.model.checkpoint import open_checkpoint
from llamac.model.checkpoint.random_weights import write_random_checkpoint
from llamac.model.compiled import TorchBackend
from llamac.model.config import LlamaConfig
from llamac.model.load import load_backend
from llamac.runtime.cli.commands import generate_texts
from llamac.runtime.language_model import LanguageModel
from llamac.runtime.text.tokenizer_files import load_tokenizer

CONFIG = LlamaConfig(
    vocab_size=258,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=50_000,
    bos_token_id=256,
    eos_token_ids=(257,),
)
SIZES = ("--max-seq-len", "32", "--prefill-len", "8")
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"


def add_tokenizer(folder: Path) -> None:
    """One id a byte, then BOS and EOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads of a model this small mostly wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "tiny"
    write_random_checkpoint(None, folder, config=CONFIG, dtype="float32", shards=2)
    add_tokenizer(folder)
    return folder


@pytest.fixture
def damaged(tiny: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return shutil.copytree(tiny, tmp_path / "damaged")


def subprocess_args(*argv: str | Path, before: str = "") -> list[str]:
    code = f"{before}\nfrom llamac.runtime.cli import main\nraise SystemExit(main())"
    return [sys.executable, "-c", code, *map(str, argv)]


def eager(folder: Path, *argv: str) -> list[str | Path]:
    return ["generate", "--backend", "eager", "--model", folder, *SIZES, *argv]


def edit_json(path: Path, **keys: object) -> None:
    data = {**json.loads(path.read_text()), **keys}
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


# What succeeds


def test_version(run):
    code, out, err = run("--version")
    assert (code, err) == (0, "")
    assert re.fullmatch(r"llamac \d+\.\d+\.\d+\n", out)


def test_text_is_prompt_and_continuation(run, tiny: Path):
    code, out, err = run(*eager(tiny, "--prompt", "ab", "--max-new-tokens", "4", "--ignore-eos"))
    assert code == 0
    assert out.startswith("ab")
    assert out.endswith("\n")
    lines = err.splitlines()
    assert re.fullmatch(
        r"weights .* KiB, cache .* KiB, RoPE .* .float32, batch 1, max_seq_len 32.", lines[0]
    )
    assert re.match(
        r"\[torch-eager/cpu\] seed \d+ \| load .* s \| .* TTFT .* s \| .* decode .* tok/s", lines[1]
    )


def test_json_shape(run, tiny: Path):
    words = ("--json", "--temperature", "0", "--max-new-tokens", "5", "--ignore-eos")
    code, out, _ = run(*eager(tiny, "--prompt", "ab", *words, "--logprobs", "2"))
    result = json.loads(out)
    assert code == 0
    assert list(result) == [
        "prompt_ids",
        "ids",
        "text",
        "finish_reason",
        "seed",
        "logprobs",
        "top_logprobs",
        "timing",
        "backend",
    ]
    tokenizer = load_tokenizer(tiny)
    assert result["prompt_ids"] == tokenizer.encode("ab") == [256, *tokenizer.encode("ab")[1:]]
    assert len(result["ids"]) == len(result["logprobs"]) == len(result["top_logprobs"]) == 5
    assert result["text"] == tokenizer.decode(result["ids"])  # without the prompt
    assert result["finish_reason"] == "length"
    assert result["backend"] == "torch-eager/cpu"
    for token_id, logprob, best in zip(
        result["ids"], result["logprobs"], result["top_logprobs"], strict=True
    ):
        assert best[0] == [token_id, logprob]  # greedy
        assert len(best) == 2
    timing = result["timing"]
    assert all(key.endswith("_s") for key in timing.keys() - {"compile_cache_hit"})
    assert all(timing[key] > 0 for key in ("load_s", "ttft_s", "decode_tokens_per_s"))
    assert timing["compile_s"] is None
    assert timing["compile_cache_hit"] is None

    code, out, _ = run(*eager(tiny, "--prompt", "ab", *words))
    assert json.loads(out).keys() == result.keys() - {"logprobs", "top_logprobs"}
    assert json.loads(out)["ids"] == result["ids"]


def test_several_prompts_of_every_kind(run, tiny: Path, tmp_path: Path, monkeypatch):
    """The line, standard input and a file; a list in their order, each as if it were alone."""
    file = tmp_path / "prompt.txt"
    file.write_text("of a file\n")
    words = ("--max-new-tokens", "3", "--ignore-eos", "--json", "--seed", "3")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("stdin é".encode())))
    _, out, _ = run(
        *eager(tiny, "--prompt", "a", "--prompt", "-", "--prompt-file", str(file), *words)
    )
    results = json.loads(out)
    prompts = ["a", "stdin é", "of a file"]  # the newline that ends a file is not the text's
    tokenizer = load_tokenizer(tiny)
    assert [result["prompt_ids"] for result in results] == [tokenizer.encode(p) for p in prompts]
    for prompt, result in zip(prompts, results, strict=True):
        alone = json.loads(run(*eager(tiny, "--prompt", prompt, *words))[1])
        assert alone["ids"] == result["ids"]


def test_more_prompts_than_slots_print_in_order(run, tiny: Path):
    words = ("--max-new-tokens", "2", "--batch-size", "2", "--ignore-eos")
    prompts = [word for letter in "abcde" for word in ("--prompt", f"<{letter}>")]
    code, out, _ = run(*eager(tiny, *prompts, *words))
    assert code == 0
    assert re.findall("<.>", out) == ["<a>", "<b>", "<c>", "<d>", "<e>"]


def test_no_prompt_is_bos_alone(run, tiny: Path):
    _, out, _ = run(*eager(tiny, "--max-new-tokens", "2", "--json"))
    assert json.loads(out)["prompt_ids"] == [256]


@pytest.mark.parametrize("prefill_len", [4, 16, 64])
def test_published_texts(run, stories260k: Path, expected_texts, prefill_len: int):
    """Char for char what llama2.c prints; it stops on BOS, id 1."""
    tokenizer = load_tokenizer(stories260k)
    for expected in expected_texts:
        num_prompt = len(tokenizer.encode(expected["prompt"])) - 1
        code, out, _ = run(
            *("generate", "--model", stories260k, "--backend", "eager", "--temperature", "0"),
            *("--prompt", expected["prompt"], "--stop-id", "1"),
            *("--max-new-tokens", str(expected["total_positions"] - num_prompt)),
            *("--prefill-len", str(prefill_len)),
        )
        assert code == 0
        assert out == expected["text"] + "\n"


@pytest.mark.slow
def test_published_texts_compiled(run, stories260k: Path, expected_texts):
    """One process compiles once: all prompts in one run, so the shorter texts go on."""
    prompts = [word for expected in expected_texts for word in ("--prompt", expected["prompt"])]
    words = ("generate", "--model", stories260k, "--temperature", "0", "--stop-id", "1", "--json")
    sizes = ("--max-new-tokens", "200", "--prefill-len", "16", "--batch-size", "1")
    code, out, _ = run(*words, *sizes, *prompts)
    assert code == 0
    for expected, result in zip(expected_texts, json.loads(out), strict=True):
        assert result["backend"] == "torch-compile/cpu"
        assert result["timing"]["compile_s"] > 0
        assert (expected["prompt"] + result["text"]).startswith(expected["text"])


def test_score_equals_transformers(run, tiny: Path, tmp_path: Path):
    file = tmp_path / "text.txt"
    file.write_text("Twenty bytes of text")
    words = ("score", "--model", tiny, "--backend", "eager", "--text-file", file)
    _, out, _ = run(*words, *SIZES, "--json")
    result = json.loads(out)
    ids = load_tokenizer(tiny).encode(file.read_text())
    reference = transformers.LlamaForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        logprobs = reference(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    expected = logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    assert result["ids"] == ids[1:]
    assert result["num_tokens"] == 20
    assert result["logprobs"] == pytest.approx(expected, abs=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(-sum(expected) / 20), rel=1e-5)
    _, out, _ = run(*words, *SIZES)
    assert out == f"perplexity {result['perplexity']:.4f} over 20 tokens\n"

    # Windows of 8 - 1 tokens, each after its own BOS: the first is as before.
    _, out, _ = run(*words, "--json", "--max-seq-len", "8")
    windowed = json.loads(out)
    assert windowed["ids"] == ids[1:]
    assert windowed["logprobs"][:7] == pytest.approx(expected[:7], abs=1e-5)
    assert windowed["logprobs"][7] != pytest.approx(expected[7], abs=1e-5)


def test_a_perplexity_past_every_number_is_refused(run, damaged: Path, tmp_path: Path):
    """It used to end in "math range error"."""
    path, file = damaged / "model-00002-of-00002.safetensors", tmp_path / "text.txt"
    weights = load_file(path)
    weights["lm_head.weight"] *= 1e9
    save_file(weights, path)
    file.write_text("Twenty bytes of text")
    words = ("score", damaged, "--backend", "eager", "--text-file", file)
    code, out, err = run(*words, *SIZES)
    assert (code, out) == (2, "")
    assert re.search("llamac: the text's mean logprob is -.*; the weights may be damaged\n$", err)


def test_chat_answers_every_line(run, tiny: Path, tmp_path: Path, monkeypatch):
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\nyou\n"))
    words = ("chat", "--model", tiny, "--backend", "eager", "--max-seq-len", "128")
    words += ("--prefill-len", "32", "--max-new-tokens", "3", "--chat-template", template)
    code, out, _ = run(*words, "--system", "be kind", "--temperature", "0", "--ignore-eos")
    assert code == 0
    assert out.endswith("\n")

    def answer(prompt: str) -> str:
        ids = ("--temperature", "0", "--json", "--max-new-tokens", "3", "--prompt", prompt)
        sizes = ("--max-seq-len", "128", "--prefill-len", "32")
        result = json.loads(run(*eager(without_bos, *ids, *sizes))[1])
        return result["text"]

    without_bos = shutil.copytree(tiny, tmp_path / "without bos")  # as the template writes none
    edit_json(without_bos / "config.json", bos_token_id=None)
    (without_bos / "tokenizer_config.json").write_text('{"bos_token": null, "eos_token": "</s>"}')
    first = answer("[system]be kind[user]hi[assistant]")
    second = answer(f"[system]be kind[user]hi[assistant]{first}[user]you[assistant]")
    assert out == f"{first}\n{second}\n"


def test_init_writes_what_was_asked(run, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("llamac.model.checkpoint.random_weights.preset_config", lambda name: CONFIG)
    words = ("init", "--preset", "tinyllama-1.1b", "--dtype", "float16", "--shards", "3")
    assert run(*words, "--seed", "5", tmp_path / "new" / "a") == (0, "", "")
    checkpoint = open_checkpoint(tmp_path / "new" / "a")
    assert checkpoint.config == replace(CONFIG, dtype="float16")
    assert len(list((tmp_path / "new" / "a").glob("*.safetensors"))) == 3
    for seed, same in (("5", True), ("6", False)):
        run(*words, "--seed", seed, tmp_path / seed)
        files = [folder / "model-00002-of-00003.safetensors" for folder in
                 (tmp_path / "new" / "a", tmp_path / seed)]  # fmt: skip
        assert (files[0].read_bytes() == files[1].read_bytes()) == same


# What is refused


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--top-p", "2"), "top_p is 2.0; it must be"),
        (("--temperature", "-1"), "temperature is -1.0; it must be"),
        (("--max-new-tokens", "0"), "max_new_tokens is 0; it must be at least 1"),
        (("--stop", ""), "stop is .*; give"),
        (("--logprobs", "2"), "--logprobs is printed as JSON only; add --json"),
        (("--logprobs", "-1", "--json"), "logprobs is -1; it must be"),
        (("--max-seq-len", "0"), "max_seq_len is 0; it must be at least 1"),
        (("--max-seq-len", "-3"), "max_seq_len is -3; it must be at least 1"),
        (("--batch-size", "0"), "batch_size is 0; it must be at least 1"),
        (("--prefill-len", "0"), "prefill_len is 0; it must be between 1 and max_seq_len, 32"),
        (("--prefill-len", "33"), "prefill_len is 33; it must be between 1 and max_seq_len, 32"),
        (("--threads", "0"), "threads is 0; it must be between 1 and 1024"),
        (("--prompt", "x" * 32), "prompt has 33 tokens, max_seq_len is 32; shorten the prompt"),
        (("--prompt", "a", "--prompt", "x" * 99), "prompt has 100 tokens, max_seq_len is 32"),
        (("--prompt", "\udcff"), "--prompt .*: not UTF-8 text"),
        (("--prompt", "-", "--prompt", "-"), "--prompt - is given 2 times; stdin can be read once"),
        (("--prompt-file", "absent.txt"), "absent.txt: no such file"),
        (("--seed", "one"), "argument --seed: invalid int value: 'one'; see .* --help"),
        (("--backend", "fast"), "invalid choice: 'fast'"),
        (("--device", "tpu"), "invalid choice: 'tpu'"),
        (("--colour",), "unrecognized arguments: --colour"),
        (
            ("--max-seq-len", str(10**12)),
            r"cache .* GiB, RoPE .* do not fit in .* free memory; lower --max",
        ),
        (
            ("--batch-size", str(10**9)),
            r"cache .* GiB, RoPE .* do not fit in .* free memory; lower --max",
        ),
    ],
)
def test_bad_options(refused, tiny: Path, words: tuple[str, ...], message: str):
    refused(message, *eager(tiny, *words))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(refused, tiny: Path):
    refused("no CUDA device found .*; use --device cpu", *eager(tiny, "--device", "cuda"))


@pytest.mark.parametrize(("words", "message"), [((), "COMMAND"), (("fly",), "invalid choice")])
def test_bad_commands(refused, words: tuple[str, ...], message: str):
    refused(message, *words)


@pytest.mark.parametrize(
    ("raw", "message"), [(b"", "empty; write a text"), (b"\xff\n", "not UTF-8 text")]
)
def test_texts_that_are_none(refused, tiny: Path, tmp_path: Path, monkeypatch, raw, message):
    file = tmp_path / "text.txt"
    file.write_bytes(raw)
    refused(f"text.txt: {message}", *eager(tiny, "--prompt-file", str(file)))
    refused(f"text.txt: {message}", "score", "--model", tiny, "--text-file", file)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(raw)))
    refused(f"standard input: {message}", *eager(tiny, "--prompt", "-"))


def test_a_folder_that_is_not_there(refused, tmp_path: Path, monkeypatch):
    refused("absent: no such file or folder", *eager(tmp_path / "absent"))
    refused("no checkpoint .looked for config.json", *eager(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    refused("org/name: no such folder, and not in .*; download it", *eager(Path("org/name")))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"hidden_size": None}, r"config\.json.*hidden_size.*missing"),
        ({"model_type": "gpt2", "n_embd": 768}, "model_type is 'gpt2'; only 'llama' is supported"),
        ({"num_hidden_layers": 3}, r"tensor model\.layers\.2\..* is missing"),
    ],
)
def test_bad_configs(refused, damaged: Path, keys: dict, message: str):
    edit_json(damaged / "config.json", **keys)
    refused(message, *eager(damaged))


def test_damaged_files(refused, damaged: Path):
    index = damaged / "model.safetensors.index.json"
    shard = damaged / "model-00001-of-00002.safetensors"
    sound = index.read_text()
    os.truncate(shard, shard.stat().st_size - 1)
    refused(r"00001-of-00002\.safetensors: truncated, .*; download or copy", *eager(damaged))
    shard.unlink()
    refused(r"00001-of-00002\.safetensors: no such file", *eager(damaged))
    index.write_text(sound.replace(shard.name, f"../tiny/{shard.name}"))
    refused("is not a file name in the folder", *eager(damaged))
    index.write_text("{")
    refused("index.json is not JSON", *eager(damaged))


def test_a_model_without_tokenizer_or_template(refused, damaged: Path, tiny: Path):
    refused("template; .*--chat-template", "chat", "--model", tiny)
    words = ("chat", "--model", tiny, "--chat-template", "absent.jinja")
    refused("no chat template absent.jinja; give", *words)
    (damaged / "tokenizer.json").unlink()
    refused("no tokenizer in .*; copy", *eager(damaged))


class _Evil:
    """Unpickled by a careless reader, it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_malicious_pickle_is_not_run(refused, tmp_path: Path):
    marker, path = tmp_path / "executed", tmp_path / "model.pth"
    torch.save({"transformer.wte.weight": torch.ones(2, 128), "x": _Evil(marker)}, path)
    refused("model.pth: .*objects other than tensors; refusing to run them", *eager(path))
    path.write_bytes(pickle.dumps(_Evil(marker)))
    refused("model.pth: a bare pickle; save it again", *eager(path))
    assert not marker.exists()
    pickle.loads(path.read_bytes())  # it would have
    assert marker.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--preset", "llama-9b", "new"), "preset is 'llama-9b'; it must be one of .*llama-2-7b"),
        (("--preset", "llama-7b", "full"), "full: already there; remove it or name a new folder"),
        (
            ("--preset", "llama-7b", "full/file/x"),
            "full/file/x: can't be made .*; name a folder",
        ),
        (("--preset", "llama-7b", "new", "--shards", "0"), "shards is 0; this model takes 1 to"),
        (("--preset", "llama-7b", "new", "--dtype", "int8"), "invalid choice: 'int8'"),
        (("new",), "required: --preset"),
    ],
)
def test_bad_init(refused, tmp_path: Path, monkeypatch, words: tuple[str, ...], message: str):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    refused(message, "init", *words)
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "full", tmp_path / "full" / "file"]


def test_without_torch_says_what_to_install():
    words = subprocess_args("generate", before="import sys; sys.modules['torch'] = None")
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.stderr == "llamac: torch is not installed; pip install 'llamac[torch]'\n"
    assert (done.returncode, done.stdout) == (2, "")


# How it ends early


class _Interrupted:
    """A backend during whose third decode Ctrl-C is pressed."""

    def __init__(self, backend) -> None:
        self.backend, self.shape, self.num_decodes = backend, backend.shape, 0

    def prefill(self, slot, ids, start):
        return self.backend.prefill(slot, ids, start)

    def decode(self, ids, positions):
        self.num_decodes += 1
        if self.num_decodes == 3:
            signal.raise_signal(signal.SIGINT)
        return self.backend.decode(ids, positions)


@pytest.mark.parametrize("as_json", [True, False])
def test_an_interrupt_loses_no_token(tiny: Path, capsys, as_json: bool):
    """It used to cut the step it fell in: a token sampled there could vanish from the JSON."""
    backend = load_backend(tiny, compile=False, max_seq_len=32, prefill_len=8).backend
    tokenizer = load_tokenizer(tiny)
    handler = signal.getsignal(signal.SIGINT)
    model = LanguageModel(_Interrupted(backend), tokenizer, name="x")
    texts = ["ab", "waits for a slot"]
    requests = [model.request(text, temperature=0.0, eos_ids=()) for text in texts]
    code = generate_texts(model, texts, requests, as_json=as_json)
    assert code == 130
    assert signal.getsignal(signal.SIGINT) == handler
    out = capsys.readouterr().out
    if as_json:
        first, second = json.loads(out)
        assert (len(first["ids"]), first["finish_reason"]) == (4, "cancelled")
        assert first["text"] == tokenizer.decode(first["ids"])
        assert (second["ids"], second["finish_reason"]) == ([], "cancelled")
    else:
        assert out.startswith("ab")
        assert out.endswith("\nwaits for a slot\n")


def test_ctrl_c_keeps_the_text_so_far(tiny: Path):
    words = eager(tiny, "--prompt", "ab", "--limit", "roll", "--max-new-tokens", "49000")
    with subprocess.Popen(
        subprocess_args(*words, "--ignore-eos", "--threads", "1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        start = process.stdout.read(10)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert start.startswith("ab")
    assert len(start + out) < 49_000
    assert out.endswith("\n")
    lines = err.splitlines()
    assert len(lines) == 2  # the sizes and the speed
    assert lines[1].startswith("[torch-eager/cpu] seed ")


def test_a_closed_pipe_ends_quietly(tiny: Path):
    words = eager(tiny, "--prompt", "ab", "--limit", "roll", "--max-new-tokens", "49000")
    with subprocess.Popen(
        subprocess_args(*words, "--ignore-eos", "--threads", "1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(3)
        process.stdout.close()
        err = process.stderr.read().decode()
    assert process.returncode == 141
    assert len(err.splitlines()) == 1
    assert err.startswith("weights ")


# What people type


def test_words_without_options(run, tiny: Path):
    words = ("--max-new-tokens", "3", "--temperature", "0", "--backend", "eager", *SIZES, "--json")
    _, named, _ = run("generate", "--model", tiny, "-p", "ab", *words)
    for line in (("generate", tiny, "ab", *words), ("generate", *words, tiny, "ab")):
        assert json.loads(run(*line)[1])["ids"] == json.loads(named)["ids"]
    two = json.loads(run("generate", tiny, *words, "ab", "-p", "cd")[1])
    assert [len(one["prompt_ids"]) for one in two] == [3, 3]


def test_a_text_where_the_source_belongs(refused):
    refused("Once upon: no such source; a text for the demo model", "generate", "Once upon")


def test_samples_and_prompts_that_are_not_shown(run, tiny: Path):
    words = ("--max-new-tokens", "4", "--ignore-eos", "--seed", "3", "--prompt", "ab", "-n", "3")
    three = json.loads(run(*eager(tiny, *words, "--json"))[1])
    assert len({tuple(one["ids"]) for one in three}) == 3
    alone = json.loads(run(*eager(tiny, *words[:-2], "--json"))[1])
    assert alone["ids"] == three[0]["ids"]
    _, out, _ = run(*eager(tiny, *words[:-2], "--no-display-prompt"))
    assert out == alone["text"] + "\n"


def test_a_seed_is_drawn_and_shown(run, tiny: Path):
    words = ("--max-new-tokens", "8", "--ignore-eos", "--prompt", "ab", "--json")
    results = [json.loads(run(*eager(tiny, *words))[1]) for _ in range(2)]
    assert results[0]["seed"] != results[1]["seed"]
    assert results[0]["ids"] != results[1]["ids"]
    again = run(*eager(tiny, *words, "--seed", str(results[0]["seed"])))[1]
    assert json.loads(again)["ids"] == results[0]["ids"]


def test_prompts_in_lines_of_json(run, refused, tiny: Path, tmp_path: Path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"prompt": "ab", "max_new_tokens": 2, "temperature": 0}\n\n"cd"\n'
        '{"prompt": "e", "stop_ids": [9], "seed": 4}\n'
    )
    words = ("--prompt-file", str(file), "--max-new-tokens", "3", "--ignore-eos", "--json")
    results = json.loads(run(*eager(tiny, *words))[1])
    assert [len(one["prompt_ids"]) for one in results] == [3, 3, 2]
    assert len(results[0]["ids"]) == 2
    assert results[2]["seed"] == 4
    for line, message in (
        ("[1]", "line 1: .1. is neither a text nor an object"),
        ("{", "line 1: not JSON"),
        ('{"prompt": "a", "beams": 4}', "line 1: unknown option 'beams'; allowed are max_new"),
        ('{"prompt": "a", "top_k": true}', "line 1: top_k is True, not of its type"),
        ('{"prompt": "a", "top_p": 3}', "top_p is 3; it must be in"),
    ):
        file.write_text(line)
        refused(message, *eager(tiny, *words))


def test_special_tokens_in_a_prompt(run, tiny: Path):
    words = ("--prompt", "<s>ab</s>", "--max-new-tokens", "1", "--json")
    _, out, err = run(*eager(tiny, *words))
    assert 257 not in json.loads(out)["prompt_ids"]
    assert "warning: <s> in the prompt is plain text; with --special it is the token" in err
    _, out, err = run(*eager(tiny, *words, "--special"))
    assert json.loads(out)["prompt_ids"][::3] == [256, 257]
    assert "warning" not in err


def test_a_stop_text_that_names_a_special_token(run, tiny: Path):
    # Its text is never printed, so that it never ended anything.
    words = ("--prompt", "ab", "--max-new-tokens", "400", "--limit", "roll", "--ignore-eos")
    more = ("--json", "--temperature", "5", "--seed", "1")
    assert 257 in json.loads(run(*eager(tiny, *words, *more))[1])["ids"]
    result = json.loads(run(*eager(tiny, *words, *more, "--stop", "</s>"))[1])
    assert result["finish_reason"] == "stop"
    assert 257 not in result["ids"]


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"ab\n", "ab"),
        (b"ab\r\n", "ab"),
        (b"\xef\xbb\xbfab", "ab"),
        (b"ab\r\ncd", "ab\r\ncd"),
        (b"ab\n\n", "ab\n"),
    ],
)
def test_what_a_file_adds_to_a_text(run, tiny: Path, tmp_path: Path, monkeypatch, raw, text):
    (tmp_path / "prompt.txt").write_bytes(raw)
    expected = load_tokenizer(tiny).encode(text)
    words = ("--max-new-tokens", "1", "--json")
    out = run(*eager(tiny, "--prompt-file", str(tmp_path / "prompt.txt"), *words))[1]
    assert json.loads(out)["prompt_ids"] == expected
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(raw)))
    assert json.loads(run(*eager(tiny, "--prompt", "-", *words))[1])["prompt_ids"] == expected


def test_no_bos_and_no_prompt(refused, damaged: Path):
    edit_json(damaged / "tokenizer_config.json", add_bos_token=False)
    refused("the prompt has no token", *eager(damaged))


def test_an_option_that_is_unknown_points_at_its_command(refused, tiny: Path):
    refused("unrecognized arguments: --top_p; see llamac generate --help", *eager(tiny, "--top_p"))
    refused("--top-p has the value '--'; give another", *eager(tiny, "--top-p=--"))
    refused("-n has the value '--'; give another", *eager(tiny, "-n=--"))
    refused("unrecognized arguments: --taget=cpu; see llamac chat", "chat", "--taget=cpu")


# Chat


def talk(run, folder: Path, lines: str, monkeypatch, *words: str):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    template = folder.parent / "talk.jinja"
    template.write_text(TEMPLATE)
    words = ("--chat-template", str(template), "--temperature", "0", "--backend", "eager", *words)
    return run("chat", folder, *SIZES, *words)


def test_a_conversation_that_outgrows_the_cache_loses_its_oldest_turns(
    run, tiny: Path, monkeypatch
):
    # It ended the program with code 2 at the third turn.
    lines = "a\nb\nc\n/reset\na\n/exit\nnever"
    code, out, err = talk(run, tiny, lines, monkeypatch, "--max-new-tokens", "2")
    assert code == 0
    answers = out.splitlines()
    assert len(answers) == 4
    assert answers[3] == answers[0]
    assert "turns were left out: the cache holds 32" in err
    assert "a new conversation" in err
    long = "x" * 40 + "\na\n"
    code, out, err = talk(run, tiny, long, monkeypatch, "--max-new-tokens", "2")
    assert (code, len(out.splitlines())) == (0, 1)
    assert "shorten it" in err


def test_a_turn_reuses_the_rows_of_the_turns_before(run, tiny: Path, monkeypatch):
    starts: list[int] = []
    original = TorchBackend.prefill

    def prefill(self, slot, ids, start):
        starts.append(start)
        return original(self, slot, ids, start)

    monkeypatch.setattr(TorchBackend, "prefill", prefill)
    code, _, _ = talk(run, tiny, "a\nb\n", monkeypatch, "--max-new-tokens", "1")
    assert code == 0
    assert starts[0] == 0
    assert starts.count(0) == 1  # the second turn's prompt begins where the first one's rows end


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "{# messages #}{% if tools %}{{ tools }}{% endif %}",
            "writes nothing for these messages; give another",
        ),
        ("{# messages #}{{ '\\ud800' }}", "failed: the text is not UTF-8: character 0 is U\\+D800"),
    ],
)
def test_a_template_that_writes_no_prompt(
    run, tiny: Path, tmp_path: Path, monkeypatch, source: str, message: str
):
    """The message used to be about a prompt that nobody had given."""
    template = tmp_path / "odd.jinja"
    template.write_text(source)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hi")))
    words = ("chat", tiny, *SIZES, "--backend", "eager", "--chat-template", template)
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert re.search(f"llamac: the chat template {message}", err)


def test_tools_reach_the_template(run, refused, tiny: Path, tmp_path: Path, monkeypatch):
    file, template = tmp_path / "tools.json", tmp_path / "tools.jinja"
    template.write_text(
        "{% for tool in tools %}{{ tool.name }}{% endfor %}{{ messages[0].content }}"
    )
    prompts: list[str] = []
    original = TorchBackend.prefill

    def prefill(self, slot, ids, start):
        prompts.append(load_tokenizer(tiny).decode(ids))
        return original(self, slot, ids, start)

    monkeypatch.setattr(TorchBackend, "prefill", prefill)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hi")))
    words = ("chat", tiny, *SIZES, "--backend", "eager", "--chat-template", template)
    file.write_text('[{"name": "sun"}]')
    code, _, _ = run(*words, "--tools", file, "--max-new-tokens", "1")
    assert (code, "".join(prompts)) == (0, "sunhi")
    for text in ("{", '{"name": "sun"}', "[1]", "[" * 100_000):
        file.write_text(text)
        refused("tools.json: not", *words, "--tools", file)
