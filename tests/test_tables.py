from __future__ import annotations

import math

import pytest
import torch

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
