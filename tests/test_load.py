from __future__ import annotations

from dataclasses import replace

import pytest

from llamac.model.config import LlamaConfig, RopeScaling
from llamac.model.load import load_backend, static_shape
from llamac.runtime.load import open_source
from variants import SIZES

CONFIG = LlamaConfig(**SIZES, num_key_value_heads=2, head_dim=8, max_position_embeddings=128)
DYNAMIC = replace(CONFIG, rope_scaling=RopeScaling(rope_type="dynamic", factor=2.0))


@pytest.mark.parametrize(
    ("trained", "max_seq_len", "rows", "num_positions"),
    [
        (128, None, 128, 128),
        (4_194_304, None, 2048, 32_768),
        (4_194_304, 256, 256, 4096),
        (128, 256, 256, 256),
        (128, 16, 16, 128),
    ],
)
def test_rope_reaches_sixteen_windows(
    trained: int, max_seq_len: int | None, rows: int, num_positions: int
):
    """A context of four million used to cost 4 GiB of tables, whatever the cache."""
    config = replace(CONFIG, max_position_embeddings=trained)
    shape = static_shape(config, max_seq_len=max_seq_len)
    assert (shape.max_seq_len, shape.num_positions) == (rows, num_positions)


def test_dynamic_rope_ends_at_the_trained_length():
    """Longer tables used to hold angles that transformers gives to no prompt but the longest."""
    assert static_shape(DYNAMIC, max_seq_len=100).num_positions == 128
    message = "max_seq_len is 129; with RoPE of type 'dynamic' it may be at most .*, 128"
    with pytest.raises(ValueError, match=message):
        static_shape(DYNAMIC, max_seq_len=129)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "foo"}, "dtype is 'foo'; it must be one of float32, float16, bfloat16"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"dtype": "float64"}, "dtype is 'float64'"),
        ({"device": "tpu"}, "device is 'tpu'; it must be one of cpu, cuda"),
        ({"device": "cuda:1"}, "device is 'cuda:1'"),
        ({"device": None}, "device is None"),
    ],
)
def test_unknown_devices_and_dtypes_are_refused(options: dict, message: str):
    """They used to run, or to end in errors of torch's own."""
    with pytest.raises(ValueError, match=message):
        load_backend(compile=False, **options)


def test_mixed_steps_are_made_for_servers_alone():
    source = open_source(None, backend="eager", batch_size=2, max_seq_len=32)
    assert source.load(adaptive=True).backend.shape.mixed_lens == (16, 128)
    assert source.load().backend.shape.mixed_lens == ()
