from __future__ import annotations

import math

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llamac.model.config import LlamaConfig
from llamac.model.tables import causal_mask, rope_tables
from variants import SIZES, VARIANTS, reference_model

CONFIG = LlamaConfig(**SIZES, num_key_value_heads=2, head_dim=4)


def test_rope_rows_are_the_written_out_angles():
    cos, sin = rope_tables(CONFIG, 3)
    # head_dim 4: frequencies 10000^0 = 1 and 10000^(-2/4) = 0.01 radians per position.
    angles = torch.tensor([[0.0, 0.0], [1.0, 0.01], [2.0, 0.02]])
    torch.testing.assert_close(cos, angles.cos())
    torch.testing.assert_close(sin, angles.sin())


def test_mask_rows_are_the_written_out_matrix():
    mask = causal_mask(torch.tensor([1, 0]), 3, 5)
    assert mask.shape == (2, 1, 3, 5)
    assert mask[:, 0].int().tolist() == [
        [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]],
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]],
    ]


def test_every_row_is_visible_once_the_window_rolls():
    assert causal_mask(torch.tensor([5, 17]), 1, 5).all()


def test_positions_beyond_256_stay_distinct():
    cos, sin = rope_tables(CONFIG, 300)
    assert cos.dtype == sin.dtype == torch.float32
    assert math.isclose(float(sin[257, 0]), math.sin(257.0), abs_tol=1e-5)


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0},
        {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1.0001},
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 1e-6, "beta_slow": 1e6},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "linear", "factor": 3, "rope_theta": 2.0**64},
        {"rope_type": "default", "rope_theta": 2804339835.0},
    ],
)
@pytest.mark.parametrize("head_dim", [2, 8])
def test_rare_values_give_transformers_angles(keys: dict, head_dim: int):
    """Weights of zero were refused; dynamic with two dimensions divided by zero."""
    data = {
        **{**VARIANTS["llama-1"], "head_dim": head_dim, "max_position_embeddings": 64},
        "rope_parameters": {"rope_theta": 1e4, "original_max_position_embeddings": 64, **keys},
    }
    config = LlamaConfig.from_dict(data)
    if head_dim == 2 and keys["rope_type"] == "dynamic":  # where transformers divides by zero
        del data["rope_parameters"]
    rotary = LlamaRotaryEmbedding(transformers.LlamaConfig(**data))
    cos, sin = rotary(torch.zeros(1), torch.arange(64)[None])
    for mine, theirs in zip(rope_tables(config, 64), (cos[0], sin[0]), strict=True):
        assert torch.equal(mine, theirs[:, : head_dim // 2])


def test_dynamic_rope_has_no_row_past_the_trained_length():
    config = LlamaConfig.from_dict(VARIANTS["dynamic"])
    assert len(rope_tables(config, 128)[0]) == 128
    with pytest.raises(ValueError, match="type 'dynamic' it may be at most .*, 128"):
        rope_tables(config, 129)


@pytest.mark.parametrize("name", VARIANTS)
def test_tables_are_transformers_angles_exactly(name: str):
    reference = reference_model(name)
    config = LlamaConfig.from_dict(VARIANTS[name])
    rows = config.max_position_embeddings
    rotary = reference.model.rotary_emb
    cos, sin = rotary(torch.zeros(1), torch.arange(rows)[None])
    ours = rope_tables(config, rows)
    half = config.head_dim // 2
    for mine, theirs in zip(ours, (cos[0], sin[0]), strict=True):
        assert torch.equal(mine, theirs[:, :half])
        assert torch.equal(mine, theirs[:, half:])
