"""The bundle: what an export leaves, what opening refuses, what a killed export leaves."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llamac.export import export_bundle
from llamac.model.checkpoint import open_checkpoint
from llamac.model.checkpoint.random_weights import write_random_checkpoint
from llamac.model.config import LlamaConfig
from llamac.model.load import DEMO_FOLDER
from llamac.runtime.bundle.manifest import FileRecord, GraphFile, Manifest, StoredWeight
from llamac.runtime.bundle.opening import hash_file, open_bundle
from llamac.runtime.cache_folder import cache_folder

CONFIG = LlamaConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)
SIZES = {"batch_size": 2, "prefill_len": 8, "max_seq_len": 32}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    write_random_checkpoint(None, folder, config=CONFIG, shards=2)
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "notes.txt").write_text("not a tokenizer's")
    return folder


@pytest.fixture(scope="module")
def exported(checkpoint: Path) -> Manifest:
    out = checkpoint.parent / "bundle"
    messages: list[str] = []
    manifest = export_bundle(
        open_checkpoint(checkpoint),
        out,
        targets=("cpu", "tensorrt"),
        progress=messages.append,
        **SIZES,
    )
    assert messages[0] == "converting weights to float32"
    assert "exporting tensorrt decode of 2 x 1" in messages
    return manifest


@pytest.fixture
def bundle(exported: Manifest, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(exported.folder, tmp_path / "bundle"))


def test_the_manifest_says_what_was_exported(exported: Manifest, checkpoint: Path):
    assert open_bundle(exported.folder, check=True) == exported
    assert sorted(exported.files) == [
        "config.json",
        "cpu-decode.onnx",
        "cpu-prefill-8.onnx",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model-float32.safetensors",
        "model.safetensors.index.json",
        "rope.safetensors",
        "tensorrt-decode.onnx",
        "tensorrt-prefill-8.onnx",
        "tokenizer_config.json",
    ]
    assert {*os.listdir(exported.folder)} == {*exported.files, "bundle.json"}
    for name, record in exported.files.items():
        assert hash_file(exported.folder / name) == record
    assert exported.targets == ("cpu", "tensorrt")
    assert (exported.shape.batch_size, exported.shape.max_seq_len) == (2, 32)
    assert (exported.shape.prefill_lens, exported.shape.num_positions) == ((8,), 64)
    assert (exported.shape.vocab_size, exported.model.head_dim) == (97, 8)
    assert (exported.dtype, exported.bos_token_id, exported.eos_token_ids) == ("bfloat16", 1, (2,))
    assert exported.source == {"name": "tiny"}
    assert exported.versions.keys() >= {"llamac", "torch", "onnx"}
    assert str(checkpoint.parent) not in (exported.folder / "bundle.json").read_text()


def test_graphs_are_found_by_role_and_target(exported: Manifest):
    assert exported.find_graph("prefill", "cpu").file == "cpu-prefill-8.onnx"
    assert exported.find_graph("prefill", "tensorrt", 8).dtype == "bfloat16"
    assert exported.find_graph("decode", "cpu").batch == 2
    with pytest.raises(ValueError, match="no decode graph for target 'cuda'; .* cpu, tensorrt"):
        exported.find_graph("decode", "cuda")
    with pytest.raises(ValueError, match="no prefill graph"):
        exported.find_graph("prefill", "cpu", 16)


def test_a_bundle_is_a_checkpoint_too(exported: Manifest, checkpoint: Path):
    inner, outer = open_checkpoint(exported.folder), open_checkpoint(checkpoint)
    assert inner.config == outer.config
    assert inner.tensors.keys() == outer.tensors.keys()


def assert_refused(
    bundle: Path, names: str, message: str, *, check: bool = False, error: type = ValueError
) -> None:
    with pytest.raises(error, match=message) as caught:
        open_bundle(bundle, check=check)
    text = str(caught.value)
    assert str(bundle / names if names else bundle) in text
    assert "\n" not in text


def edit(path: Path, change: Callable[[bytearray], object]) -> None:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def flip(data: bytearray) -> None:
    data[len(data) // 2] ^= 1


def cut(data: bytearray) -> None:
    del data[-1]


GRAPH = "cpu-decode.onnx"
WEIGHTS = "model-float32.safetensors"
LINKED = "model-00002-of-00002.safetensors"


@pytest.mark.parametrize("name", [GRAPH, "config.json", "tokenizer_config.json"])
def test_a_flipped_byte_in_a_small_file_is_refused(bundle: Path, name: str):
    edit(bundle / name, flip)
    assert_refused(bundle, name, "was changed after the export")


@pytest.mark.parametrize("name", [WEIGHTS, LINKED, "rope.safetensors"])
def test_a_flipped_byte_in_the_weights_is_refused(bundle: Path, name: str):
    """It used to be found on request alone."""
    open_bundle(bundle)
    status = (bundle / name).stat()
    edit(bundle / name, flip)
    assert_refused(bundle, name, "was changed after the export")
    # Nor does it help to set the time back.
    edit(bundle / name, flip)
    open_bundle(bundle)
    edit(bundle / name, flip)
    os.utime(bundle / name, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert_refused(bundle, name, "was changed after the export")


def test_weights_are_hashed_once_for_every_copy(bundle: Path, exported: Manifest, tmp_path: Path):
    """Each copy has inodes of its own; a second start reads nothing."""
    known = cache_folder("weights")
    before = {*known.iterdir()}
    for _ in range(2):
        assert open_bundle(bundle).digest == exported.digest
        assert len({*known.iterdir()} - before) == len(exported.weights)
    shutil.copytree(bundle, tmp_path / "copy")
    assert open_bundle(tmp_path / "copy").digest == exported.digest
    assert len({*known.iterdir()} - before) == 2 * len(exported.weights)


def test_a_bundle_opens_where_nothing_can_be_noted(bundle: Path, monkeypatch: pytest.MonkeyPatch):
    (bundle.parent / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(bundle.parent / "file"))
    open_bundle(bundle)
    edit(bundle / WEIGHTS, flip)
    assert_refused(bundle, WEIGHTS, "was changed after the export")


@pytest.mark.parametrize("name", [GRAPH, WEIGHTS])
def test_a_truncated_file_is_refused(bundle: Path, name: str):
    edit(bundle / name, cut)
    assert_refused(bundle, name, r"has \d+ bytes, exported with \d+")


@pytest.mark.parametrize("name", [GRAPH, WEIGHTS, "config.json"])
def test_a_missing_file_is_refused(bundle: Path, name: str):
    (bundle / name).unlink()
    assert_refused(bundle, name, "missing from the bundle", error=FileNotFoundError)


def test_swapped_graphs_are_refused(bundle: Path):
    one, two = bundle / GRAPH, bundle / "tensorrt-decode.onnx"
    one_bytes, two_bytes = one.read_bytes(), two.read_bytes()
    one.write_bytes(two_bytes)
    two.write_bytes(one_bytes)
    assert_refused(bundle, GRAPH, "export again")


def test_swapped_names_in_the_manifest_are_refused(bundle: Path):
    path = bundle / "bundle.json"
    text = path.read_text().replace(GRAPH, "@").replace("tensorrt-decode.onnx", GRAPH)
    path.write_text(text.replace("@", "tensorrt-decode.onnx"))
    assert_refused(bundle, "bundle.json", "was changed after the export")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"max_seq_len": 32', '"max_seq_len": 64'),
        ('"rows": 32', '"rows": 31'),
        ('"bos_token_id": 1', '"bos_token_id": null'),
        ('"target": "cpu"', '"target": "cuda"'),
        ('"batch_size": 2', '"batch_size": 2.0'),
    ],
)
def test_an_edited_manifest_is_refused(bundle: Path, old: str, new: str):
    path = bundle / "bundle.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    assert_refused(bundle, "bundle.json", "was changed after the export")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": 1', "not JSON"),
        ("", "not JSON"),
        ("\xff", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not a bundle's manifest"),
        ("{}", "not a bundle's manifest"),
        ('{"format": 1}', "was changed"),
        ('{"format": 4, "digest": ""}', "format is 4; this llamac reads 1 to 3; export again"),
        ('{"format": true}', "format is True; this llamac reads 1"),
        ('{"format": "1"}', "format is '1'; this llamac reads 1"),
    ],
)
def test_what_is_no_manifest_of_this_version_is_refused(bundle: Path, text: str, message: str):
    (bundle / "bundle.json").write_text(text, encoding="latin-1")
    assert_refused(bundle, "bundle.json", message)


def test_a_manifest_that_cannot_be_read_is_named(bundle: Path):
    """Only "Input/output error" used to be said."""
    path = bundle / "bundle.json"
    path.unlink()
    path.symlink_to("/proc/self/mem")
    assert_refused(bundle, "bundle.json", "can't be read")


def test_a_foreign_file_is_refused_but_reports_may_come_and_go(bundle: Path, exported: Manifest):
    (bundle / "reports").mkdir()
    (bundle / "reports" / "verify.json").write_text("{}")
    assert open_bundle(bundle, check=True).digest == exported.digest
    (bundle / "run.sh").write_text("")
    assert_refused(bundle, "run.sh", "not part of this bundle; remove it")
    (bundle / "run.sh").unlink()
    (bundle / "engines").mkdir()
    assert_refused(bundle, "engines", "not part of this bundle")


def test_a_bundle_of_links_opens(bundle: Path, exported: Manifest, tmp_path: Path):
    """As in a Hub's snapshot; it used to be no bundle's manifest."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    snapshot.mkdir()
    bundle.rename(blobs)
    for number, path in enumerate(sorted(blobs.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../blobs/{number}")
    assert open_bundle(snapshot, check=True).digest == exported.digest
    (snapshot / "reports").symlink_to(blobs)
    (tmp_path / "link").symlink_to(snapshot)
    assert open_bundle(tmp_path / "link").digest == exported.digest
    weights = (snapshot / WEIGHTS).resolve()
    edit(weights, flip)
    assert_refused(snapshot, WEIGHTS, "was changed after the export")
    weights.unlink()
    assert_refused(snapshot, WEIGHTS, "missing from the bundle", error=FileNotFoundError)


def test_other_kinds_of_file_are_refused(bundle: Path, tmp_path: Path):
    (bundle / WEIGHTS).unlink()
    (bundle / WEIGHTS).symlink_to(LINKED)
    assert_refused(bundle, WEIGHTS, r"has \d+ bytes, exported with")
    (bundle / WEIGHTS).unlink()
    os.mkfifo(bundle / WEIGHTS)
    assert_refused(bundle, WEIGHTS, "not a regular file", check=True)
    (bundle / WEIGHTS).unlink()
    (bundle / WEIGHTS).mkdir()
    assert_refused(bundle, WEIGHTS, "not a regular file")


def test_what_hubs_and_people_put_beside_a_model_is_let_be(bundle: Path, exported: Manifest):
    """A README.md used to be "not part of this bundle"."""
    for name in ("README.md", "LICENSE", "NOTICE.txt", ".gitattributes", ".DS_Store"):
        (bundle / name).write_text("anything")
    (bundle / ".cache").mkdir()
    assert open_bundle(bundle, check=True).digest == exported.digest


def test_a_tokenizer_may_be_added_where_there_is_none(bundle: Path, exported: Manifest):
    """Running such a bundle asked for one to be copied in, and then refused it."""
    for name in ("tokenizer.model", "generation_config.json"):
        (bundle / name).write_text("{}")
    assert open_bundle(bundle).digest == exported.digest
    edit(bundle / "tokenizer_config.json", flip)  # was exported
    assert_refused(bundle, "tokenizer_config.json", "was changed after the export")


def test_a_second_tokenizer_is_refused(checkpoint: Path, tmp_path: Path):
    """It would win over the one that was exported."""
    folder = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    shutil.copy(DEMO_FOLDER / "tokenizer.model", folder)
    out = export_bundle(open_checkpoint(folder), tmp_path / "bundle", **SIZES).folder
    (out / "tokenizer.json").write_text("{}")
    assert_refused(out, "tokenizer.json", "not part of this bundle; remove it")


def test_what_is_no_bundle_is_refused(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    assert_refused(tmp_path / "empty", "", "has no bundle.json", error=FileNotFoundError)
    assert_refused(tmp_path / "none", "", "no such folder", error=FileNotFoundError)
    (tmp_path / "file").write_text("")
    assert_refused(tmp_path / "file", "", "no such folder", error=FileNotFoundError)


def first_graph(manifest: Manifest, **changes) -> tuple[GraphFile, ...]:
    return (replace(manifest.graphs[0], **changes), *manifest.graphs[1:])


FORGERIES: dict[str, tuple[Callable[[Manifest], dict], str]] = {
    "a path upwards": (
        lambda m: {"files": {**m.files, "../x": FileRecord(bytes=1, sha256="")}},
        "names '../x', which is not a file in the folder",
    ),
    "an absolute path": (
        lambda m: {"files": {**m.files, "/etc/passwd": FileRecord(bytes=1, sha256="")}},
        "names '/etc/passwd'",
    ),
    "a path downwards": (
        lambda m: {"files": {**m.files, "reports/x": FileRecord(bytes=1, sha256="")}},
        "names 'reports/x'",
    ),
    "a null byte": (
        lambda m: {"files": {**m.files, "a\0b": FileRecord(bytes=1, sha256="")}},
        "names 'a.*b'",
    ),
    "the manifest itself": (
        lambda m: {"files": {**m.files, "bundle.json": FileRecord(bytes=1, sha256="")}},
        "names 'bundle.json'",
    ),
    "an undescribed graph": (
        lambda m: {"graphs": first_graph(m, file="../../model.onnx")},
        "names ../../model.onnx, which it does not describe",
    ),
    "an unknown dtype": (
        lambda m: {"graphs": first_graph(m, dtype="int8")},
        "is int8; export again",
    ),
    "another batch": (
        lambda m: {"graphs": first_graph(m, batch=5)},
        "the graphs of cpu do not match the shape",
    ),
    "a graph of no rows": (
        lambda m: {"graphs": (*m.graphs, replace(m.find_graph("decode", "cpu"), attended_rows=0))},
        "the graphs of cpu do not match the shape",
    ),
    "two graphs of as many rows": (
        lambda m: {"graphs": (*m.graphs, m.find_graph("decode", "cpu"))},
        "the graphs of cpu do not match the shape",
    ),
    "no graph of all rows": (
        lambda m: {
            "graphs": tuple(
                replace(g, attended_rows=8) if g.role == "decode" else g for g in m.graphs
            )
        },
        "the graphs of cpu do not match the shape",
    ),
    "other rows": (lambda m: {"graphs": first_graph(m, rows=99)}, "the graphs of cpu do not match"),
    "no graph": (lambda m: {"graphs": ()}, "lists no graph"),
    "a weight past the end": (
        lambda m: {
            "weights": (
                replace(
                    m.weights[0],
                    tensors={
                        "lm_head.weight": StoredWeight(shape=(9, 9), offset=9**9, dtype="float32")
                    },
                ),
            )
        },
        "lm_head.weight lies past the end of model-",
    ),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_manifest_is_refused(bundle: Path, name: str):
    change, message = FORGERIES[name]
    manifest = open_bundle(bundle)
    (bundle / "bundle.json").write_text(replace(manifest, **change(manifest)).to_json())
    with pytest.raises(ValueError, match=message) as caught:
        open_bundle(bundle)
    assert str(bundle) in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("shape", "max_seq_len"), 0, "shape: max_seq_len is 0"),
        (("shape", "batch_size"), -1, "shape, batch_size: damaged, holds -1"),
        (("shape", "batch_size"), True, "shape, batch_size: damaged"),
        (("model", "head_dim"), None, "model, head_dim: damaged"),
        (("model", "extra"), 1, "model: damaged"),
        (("graphs",), {}, "damaged, holds {}"),
        (("files", GRAPH), "x", f"{GRAPH}: damaged"),
        (("eos_token_ids",), [1, "2"], "eos_token_ids: damaged, holds '2'"),
        (("source",), "x", "source: damaged"),
    ],
)
def test_a_forged_manifest_of_other_types_is_refused(
    bundle: Path, keys: tuple[str, ...], value: object, message: str
):
    from llamac.runtime.bundle.manifest import content_digest

    data = json.loads((bundle / "bundle.json").read_text())
    del data["digest"]
    *path, last = keys
    inner = data
    for key in path:
        inner = inner[key]
    inner[last] = value
    (bundle / "bundle.json").write_text(json.dumps({**data, "digest": content_digest(data)}))
    assert_refused(bundle, "bundle.json", message)


def opening_error(folder: Path) -> str | None:
    digest = open_bundle(folder.parent / "sound").digest
    try:
        assert open_bundle(folder, check=True).digest == digest
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return None


def test_no_byte_can_change_unnoticed(exported: Manifest, tmp_path: Path):
    folder = tmp_path / "bundle"
    shutil.copytree(exported.folder, folder)
    shutil.copytree(exported.folder, tmp_path / "sound")
    names = st.sampled_from([*exported.files, "bundle.json"])

    @settings(max_examples=150, deadline=None)
    @given(names, st.floats(0, 1, exclude_max=True), st.integers(1, 255), st.booleans())
    def check(name: str, where: float, bits: int, truncate: bool) -> None:
        path = folder / name
        original = path.read_bytes()
        data = bytearray(original)
        at = int(where * len(data))
        if truncate:
            del data[at:]
        else:
            data[at] ^= bits
        path.write_bytes(data)
        error = opening_error(folder)
        path.write_bytes(original)
        if error is None:  # one kind of white space in bundle.json for another
            assert name == "bundle.json"
        else:
            assert str(path) in error
            assert "\n" not in error

    check()


def test_a_damaged_tokenizer_is_not_exported(checkpoint: Path, tmp_path: Path):
    """It used to be copied; only who ran the bundle was told."""
    folder = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    (folder / "tokenizer.model").write_bytes(b"IQ== 0\n")
    with pytest.raises(ValueError, match=r"tokenizer\.model has no token for byte 0"):
        export_bundle(open_checkpoint(folder), tmp_path / "out", **SIZES)
    assert not (tmp_path / "out").exists()


def test_editing_the_checkpoint_in_place_is_found(checkpoint: Path, tmp_path: Path):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    save_file(
        {n: t.float() for p in folder.glob("*.safetensors") for n, t in load_file(p).items()},
        folder / "model.safetensors",
    )
    (folder / "model.safetensors.index.json").unlink()
    out = export_bundle(open_checkpoint(folder), tmp_path / "bundle", **SIZES).folder
    assert (out / "model.safetensors").samefile(folder / "model.safetensors")
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        last = stream.read(1)
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\x55")
    # It used to answer from the new weights.
    assert_refused(out, "model.safetensors", "was changed after the export")
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(last)
    open_bundle(out)  # written to, but what it was


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ("gpu",)}, "target is 'gpu'; it must be one of tensorrt, cuda, cpu"),
        ({"targets": ()}, "name at least one"),
        ({"targets": ("cpu", "cpu")}, "each once"),
        ({"targets": ("cuda",), "dtype": "int8"}, "dtype is 'int8'"),
        ({"dtype": "bfloat16"}, "cpu graphs are always float32; leave --dtype out"),
        ({"prefill_len": 33}, "prefill_len is 33; it must be between 1 and max_seq_len, 32"),
        ({"batch_size": 0}, "batch_size is 0"),
        # Used to end in the exporter's own traceback.
        ({"batch_size": 2**63}, r"a cache of batch_size 9223372036854775808 .* than 16384\.00 GiB"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(
    checkpoint: Path, tmp_path: Path, options: dict, message: str
):
    with pytest.raises(ValueError, match=message):
        export_bundle(open_checkpoint(checkpoint), tmp_path / "out", **{**SIZES, **options})
    assert not list(tmp_path.iterdir())


def test_a_name_in_use_is_left_alone(checkpoint: Path, exported: Manifest, tmp_path: Path):
    source = open_checkpoint(checkpoint)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for out in (exported.folder, tmp_path / "file", tmp_path / "link"):
        with pytest.raises(ValueError, match="already there; remove it or name a new folder"):
            export_bundle(source, out, **SIZES)
    assert open_bundle(exported.folder, check=True) == exported
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_the_folder_one_is_in_is_refused_before_anything_is_written(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The bundle was written, and the shell left in a folder that was no more."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match="here: can't be replaced; name a new folder in it"):
        export_bundle(open_checkpoint(checkpoint), Path("."), **SIZES)
    assert [path.name for path in tmp_path.rglob("*")] == ["here"]
    manifest = export_bundle(open_checkpoint(checkpoint), Path("new"), **SIZES)
    monkeypatch.chdir("/")
    assert open_bundle(manifest.folder, check=True).digest == manifest.digest


def test_a_failed_export_leaves_nothing(checkpoint: Path, tmp_path: Path):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    path = folder / "model-00002-of-00002.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
    weights["lm_head.weight"][0, 0] = 1e30
    save_file(weights, path)
    with pytest.raises(ValueError, match="lm_head.weight holds 1.00026e.30, past float16's range"):
        export_bundle(
            open_checkpoint(folder), tmp_path / "a/b", targets=("cuda",), dtype="float16", **SIZES
        )
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    assert open_checkpoint(folder).tensors


def test_two_exports_to_one_name_do_not_mix(checkpoint: Path, tmp_path: Path):
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "half").write_text("written by the other")
    handle = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is writing it"):
            export_bundle(open_checkpoint(checkpoint), tmp_path / "out", **SIZES)
    finally:
        os.close(handle)
    assert (partial / "half").exists()


# Imports and exports once, then forks an export for each moment, in one thread for fork's sake.
KILLED_EXPORTS = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
from llamac.export import export_bundle
from llamac.model.checkpoint import open_checkpoint
from llamac.runtime.bundle.opening import open_bundle

folder, moments = Path(sys.argv[1]), int(sys.argv[2])

def export(name):
    source = open_checkpoint(folder / "checkpoint")
    export_bundle(source, folder / name, batch_size=2, prefill_len=8, max_seq_len=32)

def start(name):
    process = os.fork()
    if process == 0:
        export(name)
        os._exit(0)
    return process

export("complete")
begin = time.monotonic()
assert os.waitpid(start("out"), 0)[1] == 0
whole_s = time.monotonic() - begin
shutil.rmtree(folder / "out")
states = []
for i in range(moments):
    process = start("out")
    time.sleep(whole_s * (i + random.random()) / moments)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    state = {"files": sorted(p.name for p in folder.iterdir())}
    for name in ("out", ".out.partial", "complete"):
        try:
            state[name] = open_bundle(folder / name, check=True).digest
        except (ValueError, FileNotFoundError) as error:
            state[name] = str(error)
    states.append(state)
    shutil.rmtree(folder / "out", ignore_errors=True)
last = os.waitpid(start("out"), 0)[1]
print(json.dumps({"states": states, "last": last}))
"""


@pytest.mark.slow
def test_kill_9_at_five_moments_leaves_nothing_that_looks_finished(
    checkpoint: Path, tmp_path: Path
):
    shutil.copytree(checkpoint, tmp_path / "checkpoint")
    before = {path.name: hash_file(path) for path in (tmp_path / "checkpoint").iterdir()}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED_EXPORTS, str(tmp_path), "5"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    complete = open_bundle(tmp_path / "complete", check=True)
    for state in found["states"]:
        # The last export below having the same digest, exports of the same things are the same.
        assert state["complete"] == complete.digest
        assert {*state["files"]} <= {"checkpoint", "complete", "out", ".out.partial"}
        if "out" in state["files"]:
            assert state["out"] == complete.digest
        if ".out.partial" in state["files"]:
            assert "an unfinished export; run the export again" in state[".out.partial"]
    assert any(".out.partial" in state["files"] for state in found["states"])
    assert found["last"] == 0
    assert open_bundle(tmp_path / "out", check=True).digest == complete.digest
    assert {*os.listdir(tmp_path)} == {"checkpoint", "complete", "out"}
    assert {path.name: hash_file(path) for path in (tmp_path / "checkpoint").iterdir()} == before
