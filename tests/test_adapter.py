"""LoRA adapters that PEFT made: merged while reading, they are the model that PEFT merges."""

from __future__ import annotations

import copy
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from references import one_forward, random_ids
from safetensors.torch import load_file, save_file
from test_foreign_formats import CONFIG, assemble, random_weights, write_lit, write_meta
from transformers import LlamaForCausalLM

from llamac.export import export_bundle
from llamac.export.verify import bundle_checkpoint
from llamac.model.checkpoint import load_model, open_checkpoint
from llamac.model.load import DEMO_FOLDER
from llamac.model.quantization import parse_recipe, quantized_copy
from llamac.runtime.bundle.opening import open_bundle
from variants import reference_model

IDS = random_ids(12)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"

# Of PEFT's LoraConfig, for a variant of the model.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "all modules": ("llama-2-gqa", {"target_modules": ALL}),
    "rslora": ("llama-2-gqa", {"target_modules": ALL, "use_rslora": True, "lora_alpha": 3}),
    "patterns": (
        "llama-1",
        {
            "target_modules": ALL,
            "rank_pattern": {"q_proj": 2, r"layers\.[12]\.mlp\.(up|down)_proj": 7},
            "alpha_pattern": {"layers.1.*": 3, "^model.layers.0.mlp.gate_proj": 40},
        },
    ),
    "some layers": (
        "llama-2-gqa",
        {"target_modules": ["q_proj", "mlp.up_proj"], "layers_to_transform": [0, 2]},
    ),
    "excluded": ("llama-2-gqa", {"target_modules": ALL, "exclude_modules": ["k_proj"]}),
    "regular expression": ("llama-2-gqa", {"target_modules": r".*\.1\.(self_attn|mlp)\..*_proj"}),
    "embedding and head": ("llama-2-gqa", {"target_modules": ["embed_tokens", "lm_head"]}),
    "saved modules": (
        "llama-2-gqa",
        {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "input_layernorm"]},
    ),
    "tied": ("llama-3.2-tied", {"target_modules": ALL}),
    "biased model": ("biases", {"target_modules": ALL}),
}


@pytest.fixture(scope="module")
def peft():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("peft")


@pytest.fixture
def adapt(peft, tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    """Saves a variant's random adapter; gives its folder and PEFT's model of it, unmerged."""

    def make(model: LlamaForCausalLM, **settings: Any) -> tuple[Path, Any]:
        config = peft.LoraConfig(**{"r": 4, "init_lora_weights": False, **settings})
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a tied head is adapted
            adapted = peft.get_peft_model(copy.deepcopy(model), config)
            for name, parameter in adapted.named_parameters():
                if "modules_to_save" in name:
                    parameter.data += torch.randn(parameter.shape) / 4
            adapted.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter", adapted.eval()

    return make


@pytest.fixture
def tiny(tmp_path: Path, adapt) -> tuple[Path, Path]:
    """A model's folder and an adapter's, to be damaged."""
    model = reference_model("llama-2-gqa")
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base", adapt(model, target_modules=["q_proj"])[0]


def our_logits(base: Path, adapter: Path) -> np.ndarray:
    model = load_model(
        open_checkpoint(base, adapter=adapter), num_positions=32, dtype=torch.float32
    )
    return one_forward(model, IDS)


def logits_of(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].numpy()


def merge(adapted: Any) -> LlamaForCausalLM:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that tied weights are tied no more
        return adapted.merge_and_unload()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_that_peft_merges(adapt, tmp_path: Path, kind: str):
    variant, settings = KINDS[kind]
    model = reference_model(variant)
    model.save_pretrained(tmp_path / "base")
    adapter, adapted = adapt(model, **settings)
    found, plain = our_logits(tmp_path / "base", adapter), logits_of(model)
    expected = logits_of(merge(adapted))
    largest = np.abs(expected).max()
    assert np.abs(expected - plain).max() > largest / 20
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["lm_head", "embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
)
def test_an_adapted_tied_embedding_or_head_is_tied_no_more(adapt, tmp_path: Path, settings):
    """PEFT's merge gives both the change that one of them was trained with."""
    model = reference_model("llama-3.2-tied")
    model.save_pretrained(tmp_path / "base")
    adapter, adapted = adapt(model, **settings)
    expected = logits_of(adapted)
    found = our_logits(tmp_path / "base", adapter)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_an_adapter_of_a_model_without_a_head(adapt, tmp_path: Path):
    """Names then begin with layers, and patterns with ^ mean those names."""
    model = reference_model("llama-2-gqa")
    model.save_pretrained(tmp_path / "base")
    patterns = {"^layers.1.self_attn.q_proj": 2}
    adapter, adapted = adapt(model.model, target_modules=ALL, rank_pattern=patterns)
    assert "base_model.model.layers.0.mlp.up_proj.lora_A.weight" in load_file(
        adapter / WEIGHTS_NAME
    )
    whole = copy.deepcopy(model)
    whole.model = merge(adapted)
    expected = logits_of(whole)
    found = our_logits(tmp_path / "base", adapter)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("layout", ["hf", "meta 1", "meta 2", "lit"])
def test_every_layout_is_merged_alike(adapt, tmp_path: Path, layout: str):
    """Meta's and lit-llama's rows of q and k lie in another order than the adapter's."""
    weights = random_weights(tmp_path / "hf", CONFIG)
    if layout == "lit":
        shutil.copytree(tmp_path / "hf", tmp_path / "lit")
        (tmp_path / "lit" / "model.safetensors").unlink()
        source = write_lit(tmp_path / "lit" / "lit.pth", weights, CONFIG.head_dim)
    elif layout == "hf":
        source = tmp_path / "hf"
    else:
        source = write_meta(tmp_path / "meta", weights, int(layout[-1]))
    model = LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    adapter, adapted = adapt(model, target_modules=[*ALL, "embed_tokens"])
    expected = merge(adapted).state_dict()
    found = assemble(open_checkpoint(source, adapter=adapter))
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6)


def test_a_sum_is_rounded_once(adapt, tmp_path: Path):
    """In bfloat16, a change that is rounded before it is added would be another."""
    model = copy.deepcopy(reference_model("llama-2-gqa")).bfloat16()
    model.save_pretrained(tmp_path / "base")
    adapter, adapted = adapt(model, target_modules=["down_proj"])
    adapted = adapted.float()
    expected = merge(adapted).state_dict()
    name = "model.layers.1.mlp.down_proj.weight"
    checkpoint = open_checkpoint(tmp_path / "base", adapter=adapter)
    loaded = load_model(checkpoint, num_positions=32).state_dict()
    assert torch.equal(loaded[name], expected[name].bfloat16())


def test_memory_holds_a_block_of_rows(adapt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = reference_model("llama-2-gqa")
    model.save_pretrained(tmp_path / "base")
    adapter, adapted = adapt(model, target_modules=["up_proj"])
    monkeypatch.setattr("llamac.model.checkpoint.pieces._BLOCK_BYTES", 10 * 32 * 4)
    name = "model.layers.2.mlp.up_proj.weight"
    checkpoint = open_checkpoint(tmp_path / "base", adapter=adapter)
    blocks = [(place, part) for _, place, part in checkpoint.read([name])]
    assert [len(part) for _, part in blocks] == [10, 10, 10, 10, 10, 2]
    whole = torch.cat([part for _, part in blocks])
    torch.testing.assert_close(whole, merge(adapted).state_dict()[name], rtol=0, atol=1e-6)


@pytest.fixture
def demo(adapt, tmp_path: Path) -> tuple[Path, Path]:
    """An adapter of the demo model, and the model that PEFT merges it into."""
    model = LlamaForCausalLM.from_pretrained(DEMO_FOLDER, dtype=torch.float32)
    adapter, adapted = adapt(model, target_modules=ALL, lora_alpha=1)
    merged = tmp_path / "merged"
    shutil.copytree(DEMO_FOLDER, merged, ignore=shutil.ignore_patterns("*.safetensors"))
    merge(adapted).save_pretrained(merged)
    return adapter, merged


def test_tokens_are_those_of_the_merged_model(demo: tuple[Path, Path], run, tmp_path: Path):
    adapter, merged = demo
    eager = ("--backend", "eager", "--dtype", "float32")
    words = ("Once upon a time", "--temperature", "0", "--max-new-tokens", "12")
    told = [
        run("generate", *source, *words, *eager)[:2]
        for source in ((merged,), (DEMO_FOLDER, "--adapter", adapter), (DEMO_FOLDER,))
    ]
    assert told[0] == told[1] != told[2]
    assert [code for code, _ in told] == [0, 0, 0]
    essay = tmp_path / "essay.txt"
    essay.write_text("Once upon a time there was a small dog.")
    score = ("score", "--text-file", essay, *eager)
    assert run(*score, merged)[1] == run(*score, DEMO_FOLDER, "--adapter", adapter)[1]


def test_an_export_holds_the_merged_weights(demo: tuple[Path, Path], run, tmp_path: Path):
    adapter, merged = demo
    sizes = ("--max-seq-len", "32", "--prefill-len", "8")
    bundle = tmp_path / "bundle"
    assert run("export", DEMO_FOLDER, bundle, "--adapter", adapter, *sizes)[0] == 0
    expected = export_bundle(
        open_checkpoint(merged), tmp_path / "other", max_seq_len=32, prefill_len=8
    )
    found = assemble(bundle_checkpoint(open_bundle(bundle)))
    for name, weight in assemble(bundle_checkpoint(expected)).items():
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6)


def test_quantize_rounds_the_merged_weights(tiny: tuple[Path, Path], run, tmp_path: Path):
    base, adapter = tiny
    assert run("quantize", base, tmp_path / "int8", "int8", "--adapter", adapter)[0] == 0
    merged = open_checkpoint(base, adapter=adapter)
    recipe = parse_recipe("int8")
    kept = quantized_copy(merged, recipe)
    written = (tmp_path / "int8" / "model.safetensors").read_bytes()
    assert (kept.folder / "model.safetensors").read_bytes() == written
    plain = quantized_copy(open_checkpoint(base), recipe)
    assert (plain.folder / "model.safetensors").read_bytes() != written
    assert kept.folder.exists()
    os.utime(adapter / WEIGHTS_NAME, (1, 1))  # another adapter of that name
    assert quantized_copy(merged, recipe).folder != kept.folder
    assert not kept.folder.exists()
    with pytest.raises(ValueError, match=r"q_proj is quantized, .*; merge before quantizing"):
        open_checkpoint(tmp_path / "int8", adapter=adapter)


def edit_config(folder: Path, **keys: Any) -> None:
    path = folder / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only 'LORA' can be merged"),
        ({"use_dora": True}, "use_dora is True; .*merge_and_unload"),
        ({"something_new": 1}, "something_new is 1; of a plain LoRA it is unset"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"bias": "all"}, "bias is 'all'; only 'none' is supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'; it chan"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is "),
        ({"r": 0}, "r is 0; it must be an integer from 1"),
        ({"r": 8}, r"lora_A.weight has shape \[4, 32\]; .* and rank 8 make it \[8, 32\]"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'; it must be a number"),
        ({"rank_pattern": {"q_proj": 2}}, "rank 2 make it"),
        ({"rank_pattern": {"(a*)*": 2}}, r"rank_pattern is '\(a\*\)\*'; too much of a pattern"),
        ({"alpha_pattern": {"(q": 2}}, r"alpha_pattern has '\(q', which is no pattern"),
        ({"alpha_pattern": [1]}, "alpha_pattern is .*; it must be an object"),
        ({"target_modules": None}, "target_modules is None; it must name modules"),
        ({"target_modules": ["q_proj", 3]}, "it must be a list of names"),
        ({"target_modules": ["q_proj", "v_proj"]}, "has no weights for .*v_proj.*target_modules"),
        ({"target_modules": ["v_proj"]}, "has no weights for .*v_proj"),
        ({"layers_to_transform": [0]}, r"adapts model.layers.1.self_attn.q_proj, .*don't"),
        ({"modules_to_save": ["lm_head"]}, "has no weights for lm_head.weight, .*modules_to_save"),
    ],
)
def test_settings_that_are_refused(tiny: tuple[Path, Path], refused, keys, message: str):
    base, adapter = tiny
    edit_config(adapter, **keys)
    refused(message, "generate", base, "x", "--adapter", adapter)


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({FIRST: None}, "model.layers.0.self_attn.q_proj has no lora_A"),
        ({FIRST: torch.ones(4, 33)}, r"has shape \[4, 33\]; .* make it \[4, 32\]"),
        ({FIRST: torch.ones(4)}, r"has shape \[4\]"),
        ({FIRST: torch.ones(4, 32, dtype=torch.int8)}, "stored as int8; only float32"),
        ({FIRST.replace(".0.", ".9."): torch.ones(4, 32)}, r"layers.9.* is not part of .*base"),
        ({FIRST.replace("lora_A", "lora_magnitude_vector"): torch.ones(4)}, "is not part of"),
        ({FIRST.removeprefix("base_model.model."): torch.ones(4, 32)}, "none of a LoRA's"),
        ({"base_model.model.lm_head.weight": torch.ones(102, 32)}, r"shape \[102, 32\]"),
    ],
)
def test_weights_that_are_refused(tiny: tuple[Path, Path], refused, change, message: str):
    base, adapter = tiny
    weights = {**load_file(adapter / WEIGHTS_NAME), **change}
    save_file({k: w for k, w in weights.items() if w is not None}, adapter / WEIGHTS_NAME)
    refused(message, "generate", base, "x", "--adapter", adapter)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers(tiny: tuple[Path, Path], value: float):
    base, adapter = tiny
    weights = load_file(adapter / WEIGHTS_NAME)
    weights[FIRST][1, 2] = value
    save_file(weights, adapter / WEIGHTS_NAME)
    with pytest.raises(ValueError, match=r"adapter_model.*lora_A.weight holds what is not a num"):
        our_logits(base, adapter)


def test_files_that_are_refused(tiny: tuple[Path, Path], refused, tmp_path: Path):
    base, adapter = tiny
    words = ("generate", base, "x", "--adapter")
    raw = (adapter / WEIGHTS_NAME).read_bytes()
    (adapter / WEIGHTS_NAME).write_bytes(raw[:-8])
    refused("adapter_model.safetensors: truncated", *words, adapter)
    (adapter / WEIGHTS_NAME).rename(adapter / "adapter_model.bin")
    refused("adapter_model.bin: holds pickled objects; save", *words, adapter)
    (adapter / "adapter_model.bin").unlink()
    refused("adapter_model.safetensors: no such file", *words, adapter)
    save_file({}, adapter / WEIGHTS_NAME)
    refused("holds no weights", *words, adapter)
    (adapter / CONFIG_NAME).unlink()
    refused("adapter_config.json: no such file", *words, adapter)
    refused("gone: no such folder; an adapter is one", *words, tmp_path / "gone")


def test_a_bundle_has_its_adapter_already(refused, tmp_path: Path):
    words = ("generate", tmp_path, "x", "--backend", "ort", "--adapter", tmp_path)
    refused("adapter is what an export fixed", *words)
