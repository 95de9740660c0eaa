"""The comparison of logits, on rows small enough to work out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from llamac.runtime.cli.text_table import format_table
from llamac.runtime.compare import TOLERANCE, compare_logits, perplexity


def rows(*values: list[float]) -> NDArray[np.float32]:
    return np.array(values, dtype=np.float32)


REFERENCE = rows([1.0, 4.0, 2.0, 0.0, -1.0, -8.0, 0.5], [3.0, -1.0, 2.9, 0.0, 1.0, 0.5, -2.0])


@pytest.mark.parametrize("precision", TOLERANCE)
def test_equal_logits_agree(precision: str):
    found = compare_logits(REFERENCE, REFERENCE.copy(), precision)
    assert found.passed
    assert (found.num_predictions, found.num_wrong, found.first_divergence) == (2, 0, None)
    assert (found.max_abs_error, found.relative_error, found.max_kl_nats) == (0, 0, 0)
    assert (found.top1_agreement, found.top5_agreement) == (1, 1)


def test_errors_are_a_share_of_the_largest_logit():
    logits = REFERENCE.copy()
    logits[1, 4] += 0.5
    found = compare_logits(REFERENCE, logits, "float32")
    assert found.max_abs_error == 0.5
    assert found.relative_error == 0.5 / 8
    assert not found.passed
    assert found.num_wrong == 0
    assert "largest error 6.2e-02" in found.message


def test_a_narrow_flip_is_wrong_in_float32_alone():
    """The best two ids of row 1 are 0.1 apart; the tolerances are 0.008, 0.08 and 0.32."""
    logits = REFERENCE.copy()
    logits[1, 2] = 3.002
    for precision, num_wrong in (("float32", 1), ("float16", 1), ("bfloat16", 0)):
        found = compare_logits(REFERENCE, logits, precision)
        assert found.num_wrong == num_wrong
        assert found.passed == (num_wrong == 0)
        assert found.first_divergence == 1
        assert (found.top1_agreement, found.top5_agreement) == (0.5, 1)

    # Narrower than float32's tolerance of the error is wrong all the same.
    near = rows([8.0, 0.0, 7.999])
    found = compare_logits(near, rows([8.0, 0.0, 8.001]), "float32")
    assert found.relative_error < TOLERANCE["float32"]
    assert not found.passed


def test_kl_divergence():
    reference, logits = rows([math.log(3), 0.0]), rows([0.0, 0.0])
    found = compare_logits(reference, logits, "bfloat16")
    assert found.max_kl_nats == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))


def test_top_five():
    reference = rows([9, 8, 7, 6, 5, 4, 3])
    found = compare_logits(reference, rows([9, 8, 3, 2, 5, 4, 7]), "bfloat16")
    assert found.top5_agreement == pytest.approx(3 / 5)  # ids 0, 1, 4 of 0 to 4
    few = compare_logits(rows([1, 2, 3]), rows([1, 2, 3]), "bfloat16")
    assert few.top5_agreement == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("precision", TOLERANCE)
def test_what_is_not_finite_never_passes(value: float, precision: str):
    logits = REFERENCE.copy()
    logits[0, 3] = value
    assert not compare_logits(REFERENCE, logits, precision).passed
    assert not compare_logits(logits, REFERENCE, precision).passed
    assert not compare_logits(logits, logits, precision).passed


def test_other_shapes_never_pass():
    found = compare_logits(REFERENCE, REFERENCE[:, :-1], "bfloat16")
    assert not found.passed
    assert found.message == "logits are [2, 6], the reference's [2, 7]"
    assert found.num_wrong == 2


def test_leading_dimensions_are_rows_in_order():
    reference = np.random.default_rng(0).normal(size=(3, 2, 9)).astype(np.float32)
    logits = reference.copy()
    logits[1, 1] *= -1
    found = compare_logits(reference, logits, "float32")
    assert (found.num_predictions, found.num_wrong, found.first_divergence) == (6, 1, 3)


def test_perplexity():
    logits = rows([math.log(3), 0.0], [0.0, 0.0])
    assert perplexity(logits, np.array([0, 1])) == pytest.approx((0.75 * 0.5) ** -0.5)


def test_tables():
    table = format_table([("a", "bb", "c"), ("long", "left out: of any length"), ("d", "e", "f")])
    assert table == "a     bb  c\nlong  left out: of any length\nd     e   f"
    assert format_table([("x", "")]) == "x"
