"""`llamac export`, `run` and `inspect`: what they print, what they refuse, how they end."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from test_cli import CONFIG, add_tokenizer, subprocess_args

from llamac.export import export_bundle
from llamac.model.checkpoint import open_checkpoint
from llamac.model.checkpoint.random_weights import write_random_checkpoint
from llamac.runtime.bundle.manifest import Manifest
from llamac.runtime.bundle.opening import open_bundle
from llamac.runtime.cli import main
from llamac.runtime.load import load
from llamac.runtime.ort.providers import PROVIDERS, provider_problem
from llamac.runtime.text.tokenizer_files import load_tokenizer

SIZES = {"batch_size": 2, "prefill_len": 8, "max_seq_len": 32}
MISSING = [name for name in PROVIDERS if provider_problem(name)]


def export_tiny(folder: Path, **options) -> Manifest:
    """A model of two layers on bytes."""
    write_random_checkpoint(None, folder / "tiny", config=CONFIG, dtype="float32", shards=2)
    add_tokenizer(folder / "tiny")
    checkpoint = open_checkpoint(folder / "tiny")
    return export_bundle(checkpoint, folder / "bundle", **{**SIZES, **options})


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return export_tiny(tmp_path_factory.mktemp("run"), targets=("cpu", "tensorrt"))


@pytest.fixture(scope="module")
def bundle(exported: Manifest) -> Path:
    return exported.folder


@pytest.fixture
def damaged(bundle: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return shutil.copytree(bundle, tmp_path / "damaged")


def run_words(bundle: Path, *words: str | Path) -> list[str | Path]:
    return ["run", bundle, "--threads", "1", *words]


# What succeeds


def test_text_is_prompt_and_continuation(run, bundle: Path):
    words = ("--prompt", "ab", "--max-new-tokens", "4", "--ignore-eos")
    code, out, err = run(*run_words(bundle, *words))
    assert code == 0
    assert out.startswith("ab")
    assert out.endswith("\n")
    rates = r"load .* s \| TTFT .* s \| prefill .* tok/s \| decode .* tok/s"
    line = rf"\[ort-cpu/cpu\] seed \d+ \| {rates}\n"
    assert re.fullmatch(line, err)


def test_json_is_that_of_generate(run, bundle: Path):
    """The same keys and, from one set of weights in float32, the same tokens."""
    words = ("--prompt", "ab", "--json", "--max-new-tokens", "20", "--logprobs", "2", "--seed", "3")
    ran = json.loads(run(*run_words(bundle, *words, "--ignore-eos"))[1])
    sizes = ("--max-seq-len", "32", "--prefill-len", "8", "--backend", "eager")
    torchs = json.loads(run("generate", "--model", bundle, *sizes, *words, "--ignore-eos")[1])
    assert list(ran) == list(torchs)
    assert ran["backend"] == "ort-cpu/cpu"
    assert len(ran["ids"]) == 20
    for key in ("prompt_ids", "ids", "text", "finish_reason"):
        assert ran[key] == torchs[key]
    assert ran["logprobs"] == pytest.approx(torchs["logprobs"], abs=1e-4)
    timing = ran["timing"]
    assert timing.keys() == {"load_s", "ttft_s", "prefill_tokens_per_s", "decode_tokens_per_s"}
    assert all(value > 0 for value in timing.values())


def test_the_graphs_of_another_target(run, bundle: Path):
    words = ("--prompt", "ab", "--json", "--max-new-tokens", "20", "--limit", "roll", "--seed", "1")
    results = [
        json.loads(run(*run_words(bundle, *words, "--target", target, *more))[1])
        for target, more in (("cpu", ()), ("tensorrt", ()), ("cpu", ("--prepack",)))
    ]
    names = [result["backend"] for result in results]
    assert names == ["ort-cpu/cpu", "ort-cpu/tensorrt", "ort-cpu/cpu"]
    assert results[0]["ids"] == results[1]["ids"] == results[2]["ids"]


def test_several_prompts_of_every_kind(run, bundle: Path, tmp_path: Path, monkeypatch):
    """The line, standard input and a file; more than slots, in their order, each as if alone."""
    file = tmp_path / "prompt.txt"
    file.write_text("of a file\n")
    words = ("--max-new-tokens", "3", "--ignore-eos", "--json", "--seed", "3")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("stdin é".encode())))
    prompts = ("--prompt", "a", "--prompt", "-", "--prompt-file", file)
    results = json.loads(run(*run_words(bundle, *prompts, *words))[1])
    texts = ["a", "stdin é", "of a file"]
    tokenizer = load_tokenizer(bundle)
    assert [result["prompt_ids"] for result in results] == [tokenizer.encode(t) for t in texts]
    for text, result in zip(texts, results, strict=True):
        alone = json.loads(run(*run_words(bundle, "--prompt", text, *words))[1])
        assert alone["ids"] == result["ids"]


def test_texts_come_in_the_order_of_their_prompts(run, bundle: Path):
    prompts = [word for letter in "abcde" for word in ("--prompt", f"<{letter}>")]
    code, out, _ = run(*run_words(bundle, *prompts, "--max-new-tokens", "2", "--ignore-eos"))
    assert code == 0
    assert re.findall("<.>", out) == ["<a>", "<b>", "<c>", "<d>", "<e>"]


def test_the_window_rolls_or_stops(run, bundle: Path):
    words = ("--prompt", "ab", "--json", "--ignore-eos", "--max-new-tokens", "90", "--seed", "1")
    stopped = json.loads(run(*run_words(bundle, *words))[1])
    rolled = json.loads(run(*run_words(bundle, *words, "--limit", "roll"))[1])
    assert (len(stopped["ids"]), stopped["finish_reason"]) == (30, "length")  # S + 1 - 3
    assert len(rolled["ids"]) == 90
    assert rolled["ids"][:30] == stopped["ids"]


@pytest.mark.slow
def test_export_prints_what_inspect_prints(run, exported: Manifest, tmp_path: Path):
    checkpoint, out = exported.folder.parent / "tiny", tmp_path / "new" / "bundle"
    words = ("export", checkpoint, out, "--target", "cpu", "--target", "tensorrt")
    code, printed, err = run(
        *words, "--batch-size", "2", "--prefill-len", "8", "--max-seq-len", "32"
    )
    assert (code, err) == (0, "")
    assert run("inspect", out, "--check") == (0, printed, "")
    assert open_bundle(out).files == exported.files
    by_default = tmp_path / "default"
    assert run("export", checkpoint, by_default, "--max-seq-len", "64")[0] == 0
    manifest = open_bundle(by_default)
    assert manifest.targets == ("cpu",)
    assert (manifest.shape.batch_size, manifest.shape.prefill_lens) == (1, (16, 64))


def test_inspect_text(run, exported: Manifest):
    code, out, err = run("inspect", exported.folder)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"{exported.folder}: tiny, float32"
    assert lines[1] == (
        "  batch 2, max_seq_len 32, prefill_len 8, vocab 258, 2 layers, hidden 32, "
        "4 heads on 2 of 8"
    )
    assert re.fullmatch(r"  \d+\.\d KiB on disk \(weights may be hard links\)", lines[2])
    for name in exported.files:
        assert any(re.fullmatch(rf" +\d[\d.]* \w+  {re.escape(name)}", line) for line in lines)
    # float32: weights 2 x 258 x 32 + 2 x (3072 + 4608 + 64) + 32, cache 2 x 2 x [2, 2, 32, 8].
    sizes = "float32, weights 125.1 KiB, cache 16.0 KiB"
    assert f"  target cpu: {sizes}; 141.1 KiB of host memory, the weights mapped once" in lines
    assert (
        f"  target tensorrt: {sizes}; 266.2 KiB of device memory, the weights once per engine (2)"
    ) in lines
    (decode,) = (
        line for line in lines if line.startswith("    decode 2 x 1: ") and "Group" in line
    )
    assert "Gemm 15," in decode
    assert "GroupQueryAttention 2," in decode


def test_inspect_json(run, exported: Manifest):
    code, out, err = run("inspect", exported.folder, "--json")
    assert (code, err) == (0, "")
    about = json.loads(out)
    assert about["digest"] == exported.digest
    assert about["shape"]["prefill_lens"] == [8]
    assert about["files"] == {name: record.bytes for name, record in exported.files.items()}
    assert about["disk_bytes"] == sum(about["files"].values())
    weight_bytes = 4 * (2 * 258 * 32 + 2 * (3072 + 4608 + 64) + 32)
    cache_bytes = 4 * 2 * 2 * 2 * 2 * 32 * 8
    assert about["targets"]["cpu"] == {
        "dtype": "float32",
        "weight_bytes": weight_bytes,
        "weight_copies": 1,
        "prepacked_bytes": 0,
        "cache_bytes": cache_bytes,
        "host_bytes": weight_bytes + cache_bytes,
        "device_bytes": 0,
    }
    # TensorRT holds the weights once per engine.
    tensorrt = about["targets"]["tensorrt"]
    assert tensorrt["device_bytes"] == 2 * weight_bytes + cache_bytes
    assert (tensorrt["host_bytes"], tensorrt["weight_copies"]) == (0, 2)
    assert [graph["role"] for graph in about["graphs"]] == ["prefill", "decode"] * 2
    assert about["graphs"][1]["ops"]["GroupQueryAttention"] == 2


def test_the_published_texts_come_from_a_bundle(run, stories260k, expected_texts, tmp_path: Path):
    """Char for char what llama2.c prints; it stops on BOS, id 1."""
    targets = ("--target", "cpu", "--target", "tensorrt")
    assert run("export", stories260k, tmp_path / "b", *targets, "--prefill-len", "16")[0] == 0
    tokenizer = load_tokenizer(stories260k)
    for target in ("cpu", "tensorrt"):
        for expected in expected_texts:
            num_prompt = len(tokenizer.encode(expected["prompt"])) - 1
            code, out, _ = run(
                *run_words(tmp_path / "b", "--prompt", expected["prompt"], "--target", target),
                *("--max-new-tokens", str(expected["total_positions"] - num_prompt)),
                *("--temperature", "0", "--stop-id", "1"),
            )
            assert code == 0
            assert out == expected["text"] + "\n"


def test_python_says_what_the_command_says(run, bundle: Path):
    words = ("--prompt", "ab", "--prompt", "c", "--json", "--max-new-tokens", "9", "--seed", "5")
    results = json.loads(run(*run_words(bundle, *words))[1])
    model = load(bundle, threads=1)
    sampling = {"max_new_tokens": 9, "temperature": 0.8, "seed": 5}
    completions = model.generate("ab", "c", **sampling)
    assert [done.ids for done in completions] == [result["ids"] for result in results]
    assert "".join(model.stream("ab", **sampling)) == results[0]["text"]


# What is refused


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--top-p", "2"), "top_p is 2.0; it must be"),
        (("--logprobs", "2"), "--logprobs is printed as JSON only; add --json"),
        (("--threads", "0"), "threads is 0; it must be between 1 and 1024"),
        (("--prompt", "x" * 32), "prompt has 33 tokens, max_seq_len is 32; shorten the prompt"),
        (("--prompt-file", "absent.txt"), "absent.txt: no such file"),
        (("--provider", "tpu"), "invalid choice: 'tpu'"),
        (("--target", "tpu"), "invalid choice: 'tpu'"),
        (
            ("--target", "cuda"),
            "no decode graph for target 'cuda'; it was exported for cpu, tensor",
        ),
        (("--max-seq-len", "64"), "unrecognized arguments: --max-seq-len; see llamac run --help"),
    ],
)
def test_bad_options(refused, bundle: Path, words: tuple[str, ...], message: str):
    refused(message, *run_words(bundle, *words))


@pytest.mark.parametrize("provider", MISSING)
def test_a_provider_that_is_missing_is_named_whatever_the_bundle_holds(
    refused, bundle: Path, provider: str
):
    """It used to ask for another export first, for a provider that can't run here."""
    problem = provider_problem(provider)
    assert problem is not None
    refused(rf"^llamac: --provider {provider}: {re.escape(problem)}\n$", *run_words(
        bundle, "--provider", provider
    ))  # fmt: skip
    assert re.search(r"pip install|driver", problem)


def test_a_folder_that_is_no_bundle(refused, bundle: Path, tmp_path: Path):
    refused("absent: no such folder", *run_words(tmp_path / "absent"))
    refused("not a bundle, it has no bundle.json", *run_words(tmp_path))
    refused("absent: no such folder", "inspect", tmp_path / "absent")
    unfinished = shutil.copytree(bundle, tmp_path / ".bundle.partial")
    refused("an unfinished export; run the export again", *run_words(unfinished))


def overwrite(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: overwrite(folder / "cpu-decode.onnx"), "cpu-decode.onnx: was changed"),
        (lambda folder: os.truncate(folder / "cpu-decode.onnx", 99), "has 99 bytes, exported with"),
        (lambda folder: (folder / "rope.safetensors").unlink(), "rope.safetensors: missing from"),
        (lambda folder: (folder / "more.bin").write_text(""), "more.bin: not part of this bundle"),
        (lambda folder: overwrite(folder / "tokenizer.json"), "tokenizer.json: was changed after"),
    ],
)
def test_damaged_bundles(refused, damaged: Path, damage: Callable[[Path], object], message: str):
    damage(damaged)
    refused(message, *run_words(damaged))
    refused(message, "inspect", damaged)


def test_changed_weights_are_found(refused, damaged: Path):
    name = "model-00001-of-00002.safetensors"
    overwrite(damaged / name)
    refused(f"{name}: was changed after the export", *run_words(damaged))
    refused(f"{name}: was changed after the export", *run_words(damaged, "--check"))
    refused(f"{name}: was changed after the export", "inspect", damaged, "--check")


def test_bfloat16_graphs_on_the_cpu(refused, exported: Manifest, tmp_path: Path):
    checkpoint = open_checkpoint(exported.folder.parent / "tiny")
    folder = tmp_path / "bfloat16"
    export_bundle(checkpoint, folder, targets=("tensorrt",), dtype="bfloat16", **SIZES)
    words = run_words(folder, "--target", "tensorrt")
    refused("graphs of tensorrt are bfloat16, which .* export with --dtype float32", *words)
    refused("no decode graph for target 'cpu'; it was exported for tensorrt", *run_words(folder))


def test_a_cache_that_does_not_fit(refused, exported: Manifest, tmp_path: Path):
    """Batch and rows are numbers in the graphs: such a bundle is as small as any."""
    checkpoint = open_checkpoint(exported.folder.parent / "tiny")
    export_bundle(checkpoint, tmp_path / "b", batch_size=10**6, max_seq_len=50_000)
    message = r"cache \d+\.\d\d GiB do not fit in .* of free memory; export with a smaller"
    refused(message, *run_words(tmp_path / "b"))


def test_a_bundle_without_a_tokenizer(refused, exported: Manifest, tmp_path: Path):
    write_random_checkpoint(None, tmp_path / "bare", config=replace(CONFIG, num_hidden_layers=1))
    export_bundle(open_checkpoint(tmp_path / "bare"), tmp_path / "b", **SIZES)
    refused("no tokenizer in .*; copy", *run_words(tmp_path / "b"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--target", "tpu"), "invalid choice: 'tpu'"),
        (("--target", "cpu", "--target", "cpu"), "name at least one, each once"),
        (("--dtype", "bfloat16"), "cpu graphs are always float32; leave --dtype out"),
        (("--batch-size", "0"), "batch_size is 0; it must be at least 1"),
        (("--prefill-len", "33"), "prefill_len is 33; it must be between 1 and max_seq_len, 32"),
    ],
)
def test_bad_exports(refused, exported: Manifest, tmp_path: Path, words, message: str):
    tiny = exported.folder.parent / "tiny"
    refused(message, "export", tiny, tmp_path / "b", "--max-seq-len", "32", *words)
    assert not [*tmp_path.iterdir()]


def test_an_export_never_overwrites(refused, exported: Manifest, tmp_path: Path):
    tiny = exported.folder.parent / "tiny"
    before = exported.folder.stat().st_mtime_ns
    refused("already there; remove it or name a new folder", "export", tiny, exported.folder)
    assert exported.folder.stat().st_mtime_ns == before
    refused("absent: no such file or folder", "export", tmp_path / "absent", tmp_path / "b")
    # "Could not determine home directory" was a traceback.
    for command in (("generate",), ("generate", "--model"), ("run",)):
        refused("~nobody-here: no such (file or )?folder", *command, "~nobody-here")


# How it ends early


def endless(bundle: Path) -> list[str]:
    words = ("--prompt", "ab", "--limit", "roll", "--max-new-tokens", "49000", "--ignore-eos")
    return subprocess_args(*run_words(bundle, *words))


def test_ctrl_c_keeps_the_text_so_far(bundle: Path):
    with subprocess.Popen(
        endless(bundle),
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
    assert re.fullmatch(r"\[ort-cpu/cpu\] seed .* tok/s\n", err)


def test_a_closed_pipe_ends_quietly(bundle: Path):
    with subprocess.Popen(
        endless(bundle), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(3)
        process.stdout.close()
        err = process.stderr.read()
    assert (process.returncode, err) == (141, b"")


def test_ctrl_c_while_loading(bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """The session of a large model takes seconds."""

    def press(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("llamac.runtime.ort.graph_opener.open_session", press)
    # A shell starts what it runs in the background without Ctrl-C.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(["run", str(bundle)]) == 130
    finally:
        signal.signal(signal.SIGINT, previous)
    assert capsys.readouterr() == ("", "")


# The process around it


def llamac(*words: str | Path, shell: str = "", **options) -> subprocess.CompletedProcess[str]:
    """A process of its own, its streams as a shell would redirect them."""
    code = "import sys; from llamac.runtime.cli import main; sys.exit(main())"
    line = shlex.join([sys.executable, "-c", code, *map(str, words)])
    return subprocess.run(
        ["bash", "-c", f"{line} {shell}"], capture_output=True, text=True, check=False, **options
    )


def test_streams_that_are_closed_or_full(bundle: Path):
    words = ("run", bundle, "ab", "--max-new-tokens", "2", "--seed", "1")
    # A closed stdout was a traceback; with a closed stderr the speed line went to stdout.
    done = llamac(*words, shell=">&-")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (0, "", 1)
    done = llamac(*words, shell="2>&-")
    assert (done.returncode, done.stderr) == (0, "")
    assert "tok/s" not in done.stdout
    done = llamac(*words, shell=">/dev/full")
    assert done.returncode == 2
    assert done.stderr == "llamac: standard output: No space left on device\n"
    done = llamac(*words, shell="2>/dev/full")
    assert (done.returncode, done.stdout[:2]) == (0, "ab")
    done = llamac("run", bundle, "-", shell="<&-")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "llamac: standard input is closed; pipe a text into it\n"


def test_sigterm_and_ctrl_c_while_modules_are_imported(bundle: Path):
    # It was a traceback of whatever was being imported.
    code = """
import os, signal, sys
class Press:
    def find_spec(self, name, path=None, target=None):
        if name == "numpy":
            os.kill(os.getpid(), signal.Signals[sys.argv.pop()])
sys.meta_path.insert(0, Press())
from llamac.runtime.cli import main
sys.exit(main())
"""
    for name, expected in (("SIGINT", 130), ("SIGTERM", 143)):
        words = [sys.executable, "-c", code, "run", str(bundle), name]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (expected, "", "")


def test_what_a_file_holds_reaches_the_terminal_as_plain_text(refused, damaged: Path):
    path = damaged / "tokenizer_config.json"
    path.rename(damaged / "esc\x1b]0;title\x07.json")
    refused(r"esc\?\]0;title\?\.json: not part of this bundle|missing", "run", damaged)


def test_a_value_of_megabytes_is_echoed_in_part(run):
    """It used to come back whole."""
    for words in (("run", "A" * 1_000_000), ("run", "b", "--top-p", "9" * 1_000_000)):
        code, _, err = run(*words)
        assert code == 2
        assert err.count("\n") == 1
        assert len(err) < 480


@pytest.mark.parametrize("number", [0, -1, 10_001, 2**31])
def test_the_number_of_samples_has_bounds(refused, number: int):
    """Billions of requests used to be queued, until the memory was full."""
    refused(f"-n is {number}; it must be between 1 and 10000", "generate", "-n", number)


def test_the_caches_sizes_and_none_of_them(run, monkeypatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernel = tmp_path / "llamac" / "inductor" / "kernel.so"
    kernel.parent.mkdir(parents=True)
    kernel.write_bytes(bytes(2048))
    code, out, _ = run("cache")
    assert code == 0
    assert re.search(r"inductor +2.0 KiB", out)
    code, _, _ = run("cache", "--clear")
    assert code == 0
    assert not kernel.exists()
