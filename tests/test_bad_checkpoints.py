from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llamac.model.checkpoint import open_checkpoint
from llamac.model.checkpoint.build import build_checkpoint
from llamac.model.checkpoint.random_weights import write_random_checkpoint
from llamac.model.config import LlamaConfig
from llamac.model.packed import PackedFormat

CONFIG = LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound HF folder in one file, to be damaged."""
    write_random_checkpoint(None, tmp_path / "model", config=CONFIG, dtype="float32")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A sound HF folder in two files, to be damaged."""
    write_random_checkpoint(None, tmp_path / "sharded", config=CONFIG, shards=2)
    return tmp_path / "sharded"


def refused(error: type[Exception], source: Path | str, message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        open_checkpoint(source)
    assert "\n" not in str(caught.value)


def edit_json(path: Path, **keys: object) -> None:
    data = {**json.loads(path.read_text()), **keys}
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def test_nothing_there(tmp_path: Path):
    refused(FileNotFoundError, tmp_path / "absent", "absent: no such file or folder")
    refused(FileNotFoundError, "../absent/../../x", "no such file or folder")
    refused(FileNotFoundError, tmp_path, r"no checkpoint .looked for config\.json, ")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"hidden_size": None}, r"config\.json: config: hidden_size missing"),
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; only 'llama' is supported"),
        ({"quantization_config": {"bits": 4}}, "quant_method is None; only awq"),
        ({"num_hidden_layers": 3}, r"tensor model\.layers\.2\..* is missing .and 8 more"),
        ({"num_hidden_layers": 10**7}, "num_hidden_layers is 10000000; it must be an integer from"),
        ({"num_hidden_layers": 1}, r"tensor model\.layers\.1\..* is not part .*and 8 more"),
        ({"vocab_size": 33}, r"embed_tokens\.weight has shape \[32, 16\]; .* makes it \[33, 16\]"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; it must be true or"),
    ],
)
def test_config_and_weights_disagree(folder: Path, keys: dict, message: str):
    """Ten million layers used to be named one by one, for minutes."""
    edit_json(folder / "config.json", **keys)
    refused(ValueError, folder, message)


def test_weights_or_shards_missing(folder: Path, sharded: Path):
    (folder / "model.safetensors").unlink()
    refused(FileNotFoundError, folder, r"no model\.safetensors or pytorch_model\.bin")
    (sharded / "model-00002-of-00002.safetensors").unlink()
    refused(FileNotFoundError, sharded, "model-00002-of-00002.safetensors: no such file")


@pytest.mark.parametrize(
    "name", ["../model/model.safetensors", "/etc/passwd", "..", "", "a\\b", "C:x", 3, None, "a\0b"]
)
def test_an_index_may_not_leave_the_folder(sharded: Path, name: object):
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**weight_map, "model.norm.weight": name}}))
    refused(ValueError, sharded, "for model.norm.weight is not a file name in the folder")


def test_an_index_that_names_what_is_not_there(sharded: Path):
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**weight_map, "model.extra": "model-00001"}}))
    refused(FileNotFoundError, sharded, "model-00001: no such file")
    del weight_map["model.norm.weight"]
    first_only = {name: "model-00001-of-00002.safetensors" for name in weight_map}
    index.write_text(json.dumps({"weight_map": first_only}))
    refused(ValueError, sharded, "tensor model.* is missing .and")
    index.write_text("{}")
    refused(ValueError, sharded, "no weight_map")


@pytest.mark.parametrize("name", ["\x1b[31mred", "a" * 1000, "\u202ea", "A" * 100_000])
def test_names_in_an_index_are_echoed_short_and_plain(sharded: Path, name: str):
    """An index used to write to the terminal, and lines of 100 kB."""
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: name}}))
    with pytest.raises(ValueError, match="is not a file name in the folder") as caught:
        open_checkpoint(sharded)
    message = str(caught.value).removeprefix(str(index))
    assert message.isprintable()
    assert len(message) < 200


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -4])
def test_truncated_safetensors(folder: Path, kept: int):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    refused(ValueError, folder, r"model\.safetensors: truncated")


def test_bytes_past_the_last_tensor(folder: Path):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"\0")
    refused(ValueError, folder, "1 bytes past the last tensor")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"data_offsets": [4, 68]}, "overlap or leave a gap"),
        ({"data_offsets": [-4, 60]}, "entry for 'model.norm.weight' is damaged"),
        ({"data_offsets": [64, 0]}, "is damaged"),
        ({"shape": [17]}, "is damaged"),
        ({"shape": [True] * 16}, "is damaged"),
        ({"shape": 16}, "is damaged"),
        ({"dtype": 3}, "is damaged"),
        ({"dtype": "F32" * 1000}, "is damaged"),
        ({"dtype": "\x1b[31m"}, "is damaged"),
    ],
)
def test_a_header_that_lies(folder: Path, keys: dict, message: str):
    entry = {"dtype": "F32", "shape": [16], "data_offsets": [0, 64], **keys}
    header = json.dumps({"model.norm.weight": entry}).encode()
    raw = len(header).to_bytes(8, "little") + header + bytes(64)
    (folder / "model.safetensors").write_bytes(raw)
    refused(ValueError, folder, message)


@pytest.mark.parametrize("header", [b"{", b"[]", b'{"a":1,"a":2}', b"[" * 50_000, b"\xff"])
def test_a_header_that_is_not_an_object(folder: Path, header: bytes):
    raw = len(header).to_bytes(8, "little") + header
    (folder / "model.safetensors").write_bytes(raw)
    refused(ValueError, folder, "not a safetensors file")


def test_a_header_of_a_million_tensors_is_refused_at_once(folder: Path):
    """Each used to be checked, which took 23 seconds."""
    entry = '"{}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    header = ("{" + ",".join(entry.format(i) for i in range(60_000)) + "}").encode()
    for raw in (header, b'{"__metadata__":{' + b" " * (17 << 20) + b"}}"):
        (folder / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw)
        refused(ValueError, folder, "its header describes more than a LLaMA's tensors")


def test_a_tensors_name_is_short_and_plain(folder: Path):
    for name in ("a" * 201, "\x1b[31m", "\u202e"):
        header = json.dumps({name: {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}).encode()
        raw = len(header).to_bytes(8, "little") + header + bytes(4)
        (folder / "model.safetensors").write_bytes(raw)
        with pytest.raises(ValueError, match="the header's entry for .* is damaged") as caught:
            open_checkpoint(folder)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < len(str(folder)) + 120


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json"])
def test_git_lfs_pointers_are_named_as_such(folder: Path, name: str):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"
    (folder / name).write_text(pointer)
    refused(ValueError, folder, f"{name} is a Git LFS pointer; run git lfs pull")


@pytest.mark.parametrize("value", [{}, "2", True, 2.0, [2, {}], [None], [False], 2**31, [[2]], -2])
def test_end_ids_that_are_no_tokens_are_refused(folder: Path, value: object):
    """They used to be passed over in silence."""
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    refused(
        ValueError, folder, r"generation_config\.json: eos_token_id is .*; it must be an integer"
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "F31"])
def test_a_dtype_that_safetensors_does_not_know_is_refused(folder: Path, dtype: str):
    """torch's own names were taken at their word, whatever the number of bytes."""
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    header = raw[8 : (end := 8 + int.from_bytes(raw[:8], "little"))]
    header = header.replace(b'"F32"', f'"{dtype}"'.encode(), 1)
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[end:])
    refused(ValueError, folder, f"is stored as '{dtype}'; only float32, float16, bfloat16 are")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float64])
def test_quantized_weights_are_refused_by_name(folder: Path, dtype: torch.dtype):
    weights = load_file(folder / "model.safetensors")
    key = "model.layers.1.mlp.up_proj.weight"
    weights |= {key: weights[key].to(dtype), f"{key}_scale": torch.ones(1)}
    save_file(weights, folder / "model.safetensors")
    refused(
        ValueError, folder, f"tensor {key} is stored as .*; only float32, float16, bfloat16 are"
    )
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    refused(
        ValueError, folder, f"tensor {key} is stored as .*; only float32, float16, bfloat16 are"
    )


def test_adapters_are_refused(folder: Path, tmp_path: Path):
    weights = load_file(folder / "model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({**weights, key: torch.ones(2, 16)}, folder / "model.safetensors")
    refused(ValueError, folder, r"holds adapter weights .*lora_A.*; merge them")
    (folder / "adapter_config.json").write_text("{}")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    refused(ValueError, folder, "holds an adapter; name its model, and it with --adapter")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"step": 3}, "'step' is a int, not a tensor"),
        ({7: torch.ones(1)}, "the name 7 is not that of a tensor"),
        ({"a\nb": torch.ones(1)}, "the name .* is not that of a tensor"),
        ({"a": torch.ones(4, 2).t()}, "tensor a is not plain bytes; save it contiguous"),
        ({"a": torch.eye(3).to_sparse()}, "tensor a is sparse, quantized or without data"),
    ],
)
def test_bin_files_hold_plain_tensors(folder: Path, extra: dict, message: str):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({**weights, **extra}, folder / "pytorch_model.bin")
    refused(ValueError, folder, message)


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("kept", [0, 3, 100, 5000, -1])
def test_truncated_bin(folder: Path, kept: int, is_zip: bool):
    path = folder / "pytorch_model.bin"
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, path, _use_new_zipfile_serialization=is_zip)
    (folder / "model.safetensors").unlink()
    path.write_bytes(path.read_bytes()[:kept])
    refused(ValueError, folder, "pytorch_model.bin: ")


def test_a_compressed_bin_is_refused(folder: Path):
    """Its bytes used to be taken for weights as they stand in the file."""
    torch.save(load_file(folder / "model.safetensors"), folder / "plain.bin")
    (folder / "model.safetensors").unlink()
    out = zipfile.ZipFile(folder / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(folder / "plain.bin") as plain, out:
        for item in plain.infolist():
            out.writestr(item.filename, plain.read(item))
    refused(ValueError, folder, "pytorch_model.bin: compressed")


class _Evil:
    """Unpickled by a careless reader, it writes a file."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self):
        return os.system, (f"touch {self.sentinel}",)


@pytest.mark.parametrize("how", ["zip", "legacy", "plain"])
def test_a_malicious_pickle_is_not_run(folder: Path, tmp_path: Path, how: str):
    sentinel = tmp_path / "executed"
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    data = {"model.norm.weight": torch.ones(64), "more": _Evil(sentinel)}
    if how == "plain":
        path.write_bytes(pickle.dumps(_Evil(sentinel)))
    else:
        torch.save(data, path, _use_new_zipfile_serialization=how == "zip")
    message = "objects other than tensors; refusing" if how == "zip" else "a bare pickle; save it"
    refused(ValueError, folder, message)
    assert not sentinel.exists()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_refused_in_one_line(tmp_path_factory, data: st.DataObject):
    folder = tmp_path_factory.getbasetemp() / "damaged"
    if not folder.exists():
        write_random_checkpoint(None, folder, config=CONFIG)
        (folder / "sound").write_bytes((folder / "model.safetensors").read_bytes())
    raw = bytearray((folder / "sound").read_bytes())
    header_end = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(0, 3))):
        raw[data.draw(st.integers(0, header_end))] = data.draw(st.integers(0, 255))
    size = data.draw(st.sampled_from([0, 7, 8, header_end - 1, header_end, len(raw) - 1, len(raw)]))
    (folder / "model.safetensors").write_bytes(raw[:size])
    try:
        list(open_checkpoint(folder).read())
    except ValueError as error:
        message = str(error)
    else:
        message = ""
    assert "\n" not in message


def save_bin(folder: Path) -> Path:
    """Replaces the folder's safetensors by a `.bin` of the same weights."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder / "pytorch_model.bin"


def test_a_record_that_the_directory_misplaces_is_refused(folder: Path):
    """One byte of the zip directory used to give other weights."""
    path = save_bin(folder)
    with zipfile.ZipFile(path) as archive:
        items = archive.infolist()
        start = archive.start_dir
    raw = path.read_bytes()
    record = next(item for item in items if item.filename.endswith("data/3"))
    other = next(item for item in items if item.filename.endswith("data/5"))
    old, new = (item.header_offset.to_bytes(4, "little") for item in (record, other))
    at = raw.index(old, start)
    path.write_bytes(raw[:at] + new + raw[at + 4 :])
    refused(ValueError, folder, "pytorch_model.bin: .*damaged")
    extra_at = record.header_offset + 28  # its extra field's length: where the data begins
    length = int.from_bytes(raw[extra_at : extra_at + 2], "little") + 16
    path.write_bytes(raw[:extra_at] + length.to_bytes(2, "little") + raw[extra_at + 2 :])
    refused(ValueError, folder, "pytorch_model.bin: damaged, a record is not where")


def test_an_archive_written_by_another_program_is_refused(folder: Path):
    """torch computes where its own writer puts a tensor; other weights used to be read there."""
    path = save_bin(folder)
    with zipfile.ZipFile(path) as archive:
        records = {item.filename: archive.read(item) for item in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    refused(ValueError, folder, "is not where torch would have put it; save it again")


def test_a_changed_pickle_is_refused(folder: Path):
    """Its CRC-32 used not to be compared: names and shapes could change places."""
    path = save_bin(folder)
    raw = path.read_bytes()
    assert raw.count(b"gate_proj") == 2
    path.write_bytes(raw.replace(b"gate_proj", b"up_p_proj"))
    refused(ValueError, folder, "pytorch_model.bin: .*damaged")


def test_a_changed_small_weight_is_refused(folder: Path):
    """A byte of a norm used to give other text; what is cheap to check is checked."""
    path = save_bin(folder)
    raw = path.read_bytes()
    at = raw.index(torch.ones(16).numpy().tobytes())
    path.write_bytes(raw[: at + 3] + b"\x66" + raw[at + 4 :])
    refused(ValueError, folder, "pytorch_model.bin: .*damaged")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_bin_is_refused_in_one_line(tmp_path_factory, data: st.DataObject):
    """Names that are not UTF-8 and offsets past the end used to escape as zipfile's errors.

    What is taken has the weights of the sound file.
    """
    folder = tmp_path_factory.getbasetemp() / "damaged bin"
    if not folder.exists():
        write_random_checkpoint(None, folder, config=CONFIG)
        torch.save(load_file(folder / "model.safetensors"), folder / "sound")
        (folder / "model.safetensors").unlink()
    raw = bytearray((folder / "sound").read_bytes())
    pickle_end, directory = raw.find(b"PK\x03\x04", 100), raw.find(b"PK\x01\x02")
    for _ in range(data.draw(st.integers(1, 3))):
        where = st.integers(0, pickle_end) | st.integers(directory, len(raw) - 1)
        raw[data.draw(where)] = data.draw(st.integers(0, 255))
    (folder / "pytorch_model.bin").write_bytes(raw)
    expected = torch.load(folder / "sound")
    try:
        for name, place, part in open_checkpoint(folder).read():
            assert torch.equal(part, expected[name][place])
    except ValueError as error:
        message = str(error)
    else:
        message = str(folder)
    assert str(folder) in message
    assert "\n" not in message


def test_a_big_endian_bin_is_refused(folder: Path):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save(weights, folder / "plain.bin")
    with zipfile.ZipFile(folder / "plain.bin") as plain, zipfile.ZipFile(path, "w") as out:
        for item in plain.infolist():
            is_order = item.filename.endswith("byteorder")
            out.writestr(item.filename, b"big" if is_order else plain.read(item))
    refused(ValueError, folder, "pytorch_model.bin: not little-endian; save it again")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_file_cut_after_it_was_opened(folder: Path, name: str):
    """Touching pages past the end of a mapping would kill the process."""
    if name.endswith(".bin"):
        torch.save(load_file(folder / "model.safetensors"), folder / name)
        (folder / "model.safetensors").unlink()
    checkpoint = open_checkpoint(folder)
    os.truncate(folder / name, 100)
    with pytest.raises(ValueError, match=f"{name}: changed while it was read"):
        list(checkpoint.read())


def test_finds_a_model_in_the_local_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    repo = tmp_path / "home" / "hub" / "models--org--tiny-llama"
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.delenv("HUGGINGFACE_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    refused(
        FileNotFoundError, "org/tiny-llama", "not in the Hugging Face cache .looked for .*org--"
    )
    (repo / "snapshots" / "abc123").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc123")
    refused(FileNotFoundError, "org/tiny-llama", "no checkpoint")
    (repo / "blobs").mkdir()
    for i, file in enumerate(folder.iterdir()):  # the cache holds links to blobs
        file.rename(repo / "blobs" / str(i))
        (repo / "snapshots" / "abc123" / file.name).symlink_to(f"../../blobs/{i}")
    checkpoint = open_checkpoint("org/tiny-llama")
    assert checkpoint.folder == repo / "snapshots" / "abc123"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.delenv("HF_HOME")
    assert open_checkpoint("org/tiny-llama").tensors == checkpoint.tensors
    (repo / "refs" / "main").write_text("../../../..")
    refused(ValueError, "org/tiny-llama", "not a commit")


def test_groups_that_do_not_fit_are_said_of_the_checkpoint(folder: Path):
    """The message named a weight, and no file."""
    config = LlamaConfig.from_json(folder / "config.json")
    form = PackedFormat(bits=4, group_size=32, scale_dtype="float16")
    with pytest.raises(ValueError, match=rf"{folder}: lm_head: a weight of 16 columns"):
        build_checkpoint(config, folder, [], {"lm_head": form})
