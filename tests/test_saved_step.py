"""Compiled steps on disk: found by what they were made of, and only while they are whole."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import lend_kernels
from torch import Tensor, nn

from llamac.model import KVCache, LlamaConfig
from llamac.model.compiled import step_key as step_keys
from llamac.model.compiled.saved_step import SavedStep
from llamac.model.compiled.step_key import step_key
from llamac.model.linear import Linear
from llamac.model.llama import Llama
from llamac.runtime.cache_folder import cache_folder

_START = """
import json, sys, torch
from llamac.model import *
torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48,
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
model = Llama(config, num_positions=64).requires_grad_(False)
for weight in model.parameters():
    torch.nn.init.normal_(weight)
backend = TorchBackend(model, max_seq_len=32, prefill_lens=(8, 20))
logits = backend.prefill(0, [1, 2, 3], 0).tolist()
compiler = ("torch._dynamo", "torch._inductor", "sympy")
imported = any(name.startswith(compiler) for name in sys.modules)
print(json.dumps([backend.startup.cache_hit, imported, logits]))
"""


def start(home: Path, before: str = "") -> tuple[bool, bool, list[float]]:
    """Whether the steps came from disk, whether torch's compiler was imported, and the logits."""
    done = subprocess.run(
        [sys.executable, "-c", before + _START],
        env={"PATH": "/usr/bin:/bin", "HOME": str(home)},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.slow
def test_the_second_start_loads_from_the_disk_cache(tmp_path: Path):
    hit, imported, logits = start(tmp_path)
    assert (hit, imported) == (False, True)
    assert start(tmp_path) == [True, False, logits]  # and torch's compiler isn't even imported
    steps = sorted((tmp_path / ".cache/llamac/inductor").glob("*.step"))
    assert [step.name.split("-")[0] for step in steps] == ["decode", "prefill_20", "prefill_8"]
    decode, prefill, _ = steps
    assert decode.parent.stat().st_mode & 0o777 == 0o700
    assert all(step.stat().st_mode & 0o077 == 0 for step in steps)

    # A cut file, and a whole one whose kernels are gone or cut: compiled again, then found.
    decode.write_bytes(decode.read_bytes()[:1000])
    header = prefill.read_bytes()[32:].partition(b"\n")[0]
    gone, *cut = (prefill.parent / path for path in json.loads(header)["kernels"])
    gone.unlink()
    for kernel in cut:
        kernel.write_bytes(kernel.read_bytes()[:1000])
    assert start(tmp_path) == [False, True, logits]
    assert start(tmp_path) == [True, False, logits]


# Of one step it doesn't know the code, of the other it makes a wrong one.
_TORCH_OF_ANOTHER_DAY = """
from llamac.model.compiled import frozen_step
right, sources = frozen_step.cut_down, []
def cut_down(source):
    sources.append(source)
    if len(sources) == 1:
        raise frozen_step.UnknownCodeError("line 1 has news")
    code, kernels = right(source)
    return code + "; inner = call; call = lambda args: (inner(args)[0] + 1,)", kernels
frozen_step.cut_down = cut_down
"""


@pytest.mark.slow
def test_code_that_is_not_known_or_not_right_is_loaded_by_torch(tmp_path: Path):
    lend_kernels(cache_folder("kernels"), tmp_path / ".cache" / "llamac")
    first = start(tmp_path, _TORCH_OF_ANOTHER_DAY)
    assert first[:2] == [False, True]
    assert start(tmp_path) == [True, True, first[2]]


CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)


class Doubled(Linear):
    """A form of Linear that this package knows nothing of."""


def key(
    model: Llama | None = None,
    *,
    rows: int = 16,
    dtype: torch.dtype = torch.float32,
    world_size: int = 1,
    **facts: object,
) -> str:
    model = model or Llama(CONFIG, num_positions=64)
    cache = KVCache.allocate(CONFIG, 1, rows, dtype=dtype)
    return step_key((model,), cache.buffers, world_size=world_size, **facts)


def changed(change) -> Llama:
    """A model of the same config, changed where no config says so."""
    model = Llama(CONFIG, num_positions=64)
    change(model.model.layers[1])
    return model


def use_a_subclass(layer) -> None:
    layer.mlp.down_proj.__class__ = Doubled


def add_a_bias(layer) -> None:
    layer.self_attn.q_proj.bias = nn.Parameter(torch.zeros(32))


def transpose(layer) -> None:
    weight = layer.self_attn.q_proj.weight
    weight.data = weight.data.t().contiguous().t()


def halve(layer) -> None:
    layer.mlp.up_proj.half()


def scale(layer) -> None:
    layer.self_attn.scale = 0.5


def test_two_models_of_one_config_share_a_step_only_if_their_modules_are_equal():
    """A swapped Linear or an extra bias used to get the other model's step: wrong logits."""
    changes = (use_a_subclass, add_a_bias, transpose, halve, scale)
    keys = [key(), *(key(changed(change)) for change in changes)]
    assert len(set(keys)) == len(keys)
    assert key() == keys[0]


def test_a_step_is_told_apart_by_what_its_code_depends_on(monkeypatch: pytest.MonkeyPatch):
    keys = [
        key(),
        key(rows=32),
        key(dtype=torch.bfloat16),
        key(world_size=2),
        key(all_logits=True),
        key(all_logits=False),
    ]
    for name, value in (
        ("llamac.model.linear.STORAGE_DTYPES", frozenset({torch.complex64})),
        ("llamac.model.compiled.step_key.instruction_set", lambda: "flags: mmx"),
        ("torch.get_num_threads", lambda: 77),
        ("torch.__version__", "0.1"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(name, value)
            keys.append(key())
    assert len(set(keys)) == len(keys)


def test_a_tied_head_is_told_apart_from_one_of_its_own():
    model = Llama(CONFIG, num_positions=64)
    model.lm_head.weight = model.model.embed_tokens.weight
    assert key(model) != key()


def test_the_code_that_is_traced_is_in_the_key_and_the_demo_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Editing a story used to throw every compiled step away."""
    package = Path(step_keys.__file__).parents[1]
    sources = {path.relative_to(package).as_posix() for path in step_keys._sources(())}
    assert {"llama.py", "kernels/live_attention.py", "kernels/packed_product.cpp"} < sources
    assert not {path for path in sources if path.startswith(("demo", "checkpoint"))}
    folders = tuple(tmp_path / name for name in ("model", "kernels"))
    for folder in folders:
        folder.mkdir()
    monkeypatch.setattr(step_keys, "_SOURCES", folders)
    before = key()
    (folders[1] / "new.py").write_text("x = 1\n")
    assert key() != before


def test_a_class_from_elsewhere_brings_its_own_file():
    assert Path(__file__) in step_keys._sources((changed(use_a_subclass),))


def saved_step(path: Path, compiled: object = None) -> SavedStep:
    cache = KVCache.allocate(CONFIG, 1, 16, dtype=torch.float32)
    return SavedStep(lambda: compiled, path, nn.Identity(), nn.Identity(), cache)


def test_a_damaged_file_is_a_miss_that_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = tmp_path / "decode-0.step"
    step = saved_step(path)
    assert not step.load()
    assert not caplog.records
    path.write_bytes(b"x" * 100)
    with caplog.at_level(logging.INFO, "llamac.model.compiled.saved_step"):
        assert not step.load()
    assert "damaged" in caplog.text


def test_a_whole_file_that_torch_cannot_load_is_a_miss_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """It used to be passed over without a word."""
    path = tmp_path / "decode-0.step"
    payload = b'{"is_frozen": false, "kernels": {}}\nnot what torch saves'
    path.write_bytes(hashlib.sha256(payload).digest() + payload)
    assert not saved_step(path).load()
    assert "does not load" in caplog.text


class Compiled:
    """A compiled function on a full disk."""

    def aot_compile(self, example: object) -> Compiled:
        return self

    def save_compiled_function(self, path: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def __call__(self, model: object, attention: object, cache: object, x: Tensor) -> Tensor:
        return x + 1


def test_a_step_that_cannot_be_saved_still_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    step = saved_step(tmp_path / "decode-0.step", Compiled())
    assert step(torch.tensor(1)) == 2
    assert "No space left on device" in caplog.text
    assert not list(tmp_path.iterdir())
    assert step(torch.tensor(2)) == 3
