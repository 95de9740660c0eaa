from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from pathlib import Path

import pytest
import transformers

from llamac.model.checkpoint.presets import num_parameters, preset_config, preset_names
from llamac.model.config import LlamaConfig, RopeScaling

SIZES = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def test_defaults_are_transformers_own(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    ours = LlamaConfig.from_json(tmp_path / "config.json")
    theirs = transformers.LlamaConfig(**{k: v for k, v in SIZES.items() if k != "model_type"})
    for name in (
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "attention_bias",
        "mlp_bias",
        "tie_word_embeddings",
        "bos_token_id",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.eos_token_ids == (theirs.eos_token_id,)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.rope_scaling is None


@pytest.mark.parametrize(
    "keys",
    [
        {"num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-5},
        {"eos_token_id": [5, 6, 7], "bos_token_id": 4, "max_position_embeddings": 99},
        {"dtype": "bfloat16"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    ],
)
def test_reads_what_transformers_writes(tmp_path: Path, keys: dict):
    sizes = {k: v for k, v in SIZES.items() if k != "model_type"}
    theirs = transformers.LlamaConfig(**sizes, **keys)
    theirs.save_pretrained(tmp_path)
    ours = LlamaConfig.from_json(tmp_path / "config.json")
    for key in keys.keys() - {"rope_parameters", "eos_token_id"}:
        assert getattr(ours, key) == keys[key]
    assert ours.head_dim == theirs.head_dim
    assert ours.num_key_value_heads == theirs.num_key_value_heads
    eos = theirs.eos_token_id
    assert ours.eos_token_ids == (tuple(eos) if isinstance(eos, list) else (eos,))
    rope = theirs.rope_parameters
    assert ours.rope_theta == rope["rope_theta"]
    if rope["rope_type"] == "default":
        assert ours.rope_scaling is None
    else:
        assert ours.rope_scaling is not None
        for key in rope.keys() - {"rope_theta"}:
            assert getattr(ours.rope_scaling, key) == rope[key]


def test_both_spellings_of_rope_and_dtype_agree():
    old = {**SIZES, "rope_theta": 5e5, "rope_scaling": LLAMA3, "torch_dtype": "float16"}
    new = {**SIZES, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}, "dtype": "float16"}
    oldest = {**old, "rope_scaling": {**LLAMA3, "type": "llama3"}}
    del oldest["rope_scaling"]["rope_type"]
    assert LlamaConfig.from_dict(old) == LlamaConfig.from_dict(new)
    assert LlamaConfig.from_dict(oldest) == LlamaConfig.from_dict(new)
    assert LlamaConfig.from_dict(new).rope_scaling == RopeScaling(**LLAMA3)


@pytest.mark.parametrize("name", preset_names())
def test_to_dict_round_trips_and_transformers_agrees(name: str):
    config = preset_config(name)
    assert LlamaConfig.from_dict(config.to_dict()) == config
    theirs = transformers.LlamaConfig.from_dict(config.to_dict())
    assert theirs.head_dim == config.head_dim
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    assert str(theirs.dtype).removeprefix("torch.") == config.dtype
    assert theirs.tie_word_embeddings == config.tie_word_embeddings
    if config.rope_scaling is not None:
        assert theirs.rope_parameters["factor"] == config.rope_scaling.factor


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "yarn", "llama3"])
def test_to_dict_round_trips_every_rope_type(rope_type: str):
    scaling = RopeScaling(**{**LLAMA3, "rope_type": rope_type})
    if rope_type in ("linear", "dynamic"):
        scaling = RopeScaling(rope_type=rope_type, factor=2.0)
    config = replace(LlamaConfig.from_dict(SIZES), rope_scaling=scaling, eos_token_ids=(2, 3))
    assert LlamaConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-7b", 6.74),
        ("llama-13b", 13.02),
        ("llama-30b", 32.53),
        ("llama-65b", 65.29),
        ("llama-2-7b", 6.74),
        ("llama-2-70b", 68.98),
        ("codellama-7b", 6.74),
        ("llama-3-8b", 8.03),
        ("llama-3-70b", 70.55),
        ("llama-3.2-1b", 1.24),
        ("llama-3.2-3b", 3.21),
        ("tinyllama-1.1b", 1.10),
    ],
)
def test_presets_have_the_published_number_of_parameters(name: str, billions: float):
    assert round(num_parameters(preset_config(name)) / 1e9, 2) == billions


def test_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match="preset is 'llama-9b'; it must be one of llama-7b, "):
        preset_config("llama-9b")


@pytest.mark.parametrize("name", [name for name in SIZES if name != "model_type"])
def test_a_config_without_a_size_is_refused(tmp_path: Path, name: str):
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in SIZES.items() if k != name}))
    with pytest.raises(ValueError, match=rf"config.json: config: {name} missing"):
        LlamaConfig.from_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; only 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"sliding_window": 4096}, "sliding_window is 4096"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope type is 'longrope'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "needs factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is set"),
        ({"num_attention_heads": 5}, "without head_dim it must be a multiple"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads, 3"),
        ({"vocab_size": "96"}, "vocab_size is '96'; it must be an integer from 1 to"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"head_dim": 7}, "head_dim is 7; it must be even"),
        ({"dtype": "float64"}, "dtype is 'float64'; it must be one of"),
    ],
)
def test_what_the_model_does_not_compute_is_refused(keys: dict, message: str):
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_dict({**SIZES, **keys})


@pytest.mark.parametrize(
    "keys",
    [
        {"hidden_size": "64"},
        {"hidden_size": 64.5},
        {"rope_theta": "much"},
        {"rms_norm_eps": []},
        {"rope_scaling": "linear"},
        {"rope_scaling": {"rope_type": ["linear"], "factor": 2.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": "two"}},
        {"max_position_embeddings": "long"},
        {"eos_token_id": {"a": 1}},
        {"eos_token_id": "end"},
        {"bos_token_id": 1.5},
        {"hidden_act": ["silu"]},
        {"dtype": 16},
    ],
)
def test_values_of_the_wrong_type_are_refused_as_values(keys: dict):
    with pytest.raises(ValueError, match="config"):
        LlamaConfig.from_dict({**SIZES, **keys})


@pytest.mark.parametrize("key", ["tie_word_embeddings", "attention_bias", "mlp_bias"])
@pytest.mark.parametrize("value", ["false", "no", 0, 1, 2.5, [0], {"a": 1}])
def test_what_is_not_true_or_false_is_no_boolean(key: str, value: object):
    """The text "false" used to count as true."""
    with pytest.raises(ValueError, match=rf"config: {key} is .*; it must be true or false"):
        LlamaConfig.from_dict({**SIZES, key: value})


@pytest.mark.parametrize(
    "key",
    [
        *(
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
            "rms_norm_eps",
            "rope_theta",
        ),
        *("rope_scaling", "rope_parameters", "attention_bias", "tie_word_embeddings", "hidden_act"),
        *("dtype", "torch_dtype", "layer_types", "sliding_window", "partial_rotary_factor"),
    ],
)
def test_null_is_absent(key: str):
    assert LlamaConfig.from_dict({**SIZES, key: None}) == LlamaConfig.from_dict(SIZES)


HUGE = 10**400


@pytest.mark.parametrize(
    "keys",
    [
        *({key: 2**31} for key in ("max_position_embeddings", "eos_token_id", "bos_token_id")),
        *({key: HUGE} for key in ("vocab_size", "hidden_size", "num_hidden_layers", "head_dim")),
        {"num_hidden_layers": 10**7},
        {"num_attention_heads": HUGE},
        {"num_key_value_heads": HUGE},
        *({"rms_norm_eps": eps} for eps in (HUGE, 0, 2, math.nan, math.inf, "1e-5", True)),
        *({"rope_theta": theta} for theta in (HUGE, 1, 0, False, -5.0, math.inf, "10000", {})),
        *({"rope_scaling": {"type": "linear", "factor": f}} for f in (HUGE, 0, math.nan, True)),
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "rope_theta": 1}},
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 1e-320}},
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "attention_factor": 2**64}},
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": -1}},
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": "false"}},
        {"rope_scaling": {"type": "yarn", "factor": 2.0}, "original_max_position_embeddings": 0},
        {"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}},
        {"rope_scaling": {"type": "", "factor": 2.0}},
        {"rope_scaling": {"type": 0, "factor": 2.0}},
        {"rope_scaling": [], "rope_parameters": False},
        {"partial_rotary_factor": True},
        {"use_sliding_window": 0},
        {"eos_token_id": [2, None]},
        {"eos_token_id": [True]},
        {"bos_token_id": [1]},
        {"dtype": "torch.torch.float16"},
        {"dtype": {}},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"layer_types": ["full_attention"]},
        {"layer_types": "full_attention"},
    ],
)
def test_values_out_of_bounds_are_refused_in_a_short_line(keys: dict):
    """They used to end in OverflowError, ZeroDivisionError, or errors of torch's allocator."""
    with pytest.raises(ValueError, match=r"^config: ") as caught:
        LlamaConfig.from_dict({**SIZES, **keys})
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "keys",
    [
        {"vocab_size": "A" * 100_000},
        {"model_type": "\x1b[31mred\u202e"},
        {"rope_scaling": {"type": "\x1b[31m" * 1000, "factor": 2.0}},
        {"hidden_act": ["silu" * 100] * 1000},
    ],
)
def test_echoed_values_are_short_and_plain(keys: dict):
    """A config used to write to the terminal, and lines of 100 kB."""
    with pytest.raises(ValueError, match=r"^config: ") as caught:
        LlamaConfig.from_dict({**SIZES, **keys})
    assert len(str(caught.value)) < 200
    assert str(caught.value).isprintable()


def test_layers_that_all_attend_fully_are_plain():
    """The key used to be refused whatever it said."""
    keys = {"layer_types": ["full_attention"] * 2}
    assert LlamaConfig.from_dict({**SIZES, **keys}) == LlamaConfig.from_dict(SIZES)


def test_a_yarn_weight_of_zero_is_unset():
    """It used to be refused; transformers takes it for absent."""
    scaling = {"type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0}
    config = LlamaConfig.from_dict({**SIZES, "rope_scaling": scaling})
    assert config.rope_scaling is not None
    assert config.rope_scaling.mscale_all_dim is None


def test_many_unknown_keys_make_one_short_warning(caplog: pytest.LogCaptureFixture):
    """All of them used to be listed: megabytes."""
    odd = {"a\x1b[31m": 1, **{f"k{i}": i for i in range(1000)}}
    with caplog.at_level(logging.WARNING):
        LlamaConfig.from_dict({**SIZES, **odd, "rope_scaling": odd})
    assert [len(record.getMessage()) < 200 for record in caplog.records] == [True, True]
    assert all(record.getMessage().isprintable() for record in caplog.records)
    assert "k0, k1, k10, k100, k101, k102, k103 and 993 more" in caplog.text


def test_known_neutral_keys_are_silent_and_unknown_ones_warn(caplog: pytest.LogCaptureFixture):
    LlamaConfig.from_dict({**SIZES, "pretraining_tp": 1, "use_cache": True, "hidden_act": "silu"})
    assert caplog.records == []
    with caplog.at_level(logging.WARNING):
        LlamaConfig.from_dict({**SIZES, "new_trick": 3})
    assert "unknown keys ignored: new_trick" in caplog.text
