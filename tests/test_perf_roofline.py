"""Bytes and FLOPs against numbers worked out by hand; the limits they are held against."""

from __future__ import annotations

import math
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from llamac.model.config import LlamaConfig
from llamac.model.linear import STORAGE_DTYPES
from llamac.perf.limit_probe import LimitProbe, ProbeSize
from llamac.perf.roofline import Limits, Work, bits_per_weight, decode_work, prefill_work
from llamac.perf.weight_sizes import WeightSizes

# A layer's matrices have q 16 + k 8 + v 8 + o 16 + 3 x 24 = 120 elements, its norms 8: two layers
# are 256. With the last norm's 4, the embedding's 40 and the head's 40 the model has 340.
CONFIG = LlamaConfig(
    vocab_size=10,
    hidden_size=4,
    intermediate_size=6,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=2,
    max_position_embeddings=16,
)


def test_a_decode_step_by_hand() -> None:
    work = decode_work(CONFIG, item_bytes=2, batch_size=1, context=5, max_seq_len=8)
    assert work == Work(
        weight_bytes=608,  # 304 elements: one of the embedding's 10 rows of 4 is read
        live_kv_bytes=96,  # 6 rows; k and v in 2 layers have 2 elements each: 16 bytes
        wasted_kv_bytes=32,  # 2 rows
        logits_bytes=40,
        flops=752,  # 2 x (2 x 120 + 40) + 4 x (2 layers x 2 heads x 2 x 6 rows)
    )
    assert work.needed_bytes == 744


def test_rows_of_a_batch_share_the_weights() -> None:
    work = decode_work(CONFIG, item_bytes=4, batch_size=3, context=5, max_seq_len=8)
    assert work == Work(
        weight_bytes=1248, live_kv_bytes=576, wasted_kv_bytes=192, logits_bytes=120, flops=2256
    )


def test_a_prompt_by_hand() -> None:
    work = prefill_work(CONFIG, item_bytes=2, batch_size=1, num_tokens=3, max_seq_len=8)
    assert work == Work(
        weight_bytes=624,
        live_kv_bytes=48,
        wasted_kv_bytes=80,
        logits_bytes=40,
        flops=1712,  # 2 x (3 x 240 + 40), the head once; 32 for each of 1 + 2 + 3 pairs
    )


def test_no_more_of_the_embedding_is_read_than_there_is() -> None:
    work = prefill_work(CONFIG, item_bytes=2, batch_size=1, num_tokens=16, max_seq_len=16)
    assert work.weight_bytes == 680


def test_a_tied_head_reads_the_whole_embedding_once() -> None:
    tied = replace(CONFIG, tie_word_embeddings=True)
    work = decode_work(tied, item_bytes=2, batch_size=1, context=0, max_seq_len=8)
    assert work.weight_bytes == 600
    assert work.flops == 592


def test_measured_weights_count_but_for_the_rows_of_the_table_that_are_not_read() -> None:
    sizes = WeightSizes.of(
        {"model.embed_tokens.weight": 80, "lm_head.weight_packed": 20, "model.norm.weight": 8}
    )
    assert sizes == WeightSizes(weight_bytes=108, lookup_bytes=80)
    assert bits_per_weight(CONFIG, sizes) == pytest.approx(8 * 108 / 340)
    work = decode_work(CONFIG, item_bytes=2, batch_size=3, context=5, max_seq_len=8, weights=sizes)
    assert (work.weight_bytes, work.live_kv_bytes) == (28 + 24, 288)
    tied = WeightSizes.of({"token_embd.weight": 80, "output_norm.weight": 8})
    assert tied == WeightSizes(weight_bytes=88, lookup_bytes=0)


def test_a_full_cache_wastes_nothing() -> None:
    work = decode_work(CONFIG, item_bytes=2, batch_size=1, context=7, max_seq_len=8)
    assert (work.live_kv_bytes, work.wasted_kv_bytes) == (128, 0)


def test_the_slower_of_memory_and_arithmetic_decides() -> None:
    work = decode_work(CONFIG, item_bytes=2, batch_size=1, context=5, max_seq_len=8)
    slow_memory = Limits(read_bytes_per_s=744.0, flops_per_s={"bfloat16": 7520.0})
    assert slow_memory.least_s(work, "bfloat16") == pytest.approx(1.0)
    slow_arithmetic = Limits(read_bytes_per_s=7440.0, flops_per_s={"bfloat16": 376.0})
    assert slow_arithmetic.least_s(work, "bfloat16") == pytest.approx(2.0)


def test_a_limit_is_the_fastest_kernel_s() -> None:
    """ONNX Runtime once reached 162 % of a limit that knew torch's own product only."""
    limits = Limits.of(
        {
            "read_bytes_per_s": {"sum": 10.0, "dot": 12.0},
            "flops_per_s": {
                "float32": {"torch": 100.0, "ONNX Runtime": 162.0},
                "bfloat16": {"torch": 300.0},
            },
        }
    )
    assert limits.read_bytes_per_s == 12.0
    # Nobody measured float16: widened, it has at least float32's rate.
    assert limits.flops_per_s == {"float32": 162.0, "float16": 162.0, "bfloat16": 300.0}


def test_the_probe_tries_every_product_that_a_system_has() -> None:
    # The sizes are far too small for a limit; only what is measured is looked at.
    size = ProbeSize(num_bytes=1 << 20, matrix_size=64)
    sample = LimitProbe(device="cpu", threads=1, size=size).measure(repeats=1)
    slow = {str(dtype).removeprefix("torch.") for dtype in STORAGE_DTYPES}
    assert set(sample["flops_per_s"]) == {"float32", "float16", "bfloat16"} - slow
    libraries = {"torch"}
    libraries |= {"oneDNN"} if torch.backends.mkldnn.is_available() else set()
    if find_spec("onnxruntime") and find_spec("onnx"):
        libraries.add("ONNX Runtime")
    assert set(sample["flops_per_s"]["float32"]) == libraries
    rates = list(sample["read_bytes_per_s"].values())
    rates += [rate for rates in sample["flops_per_s"].values() for rate in rates.values()]
    assert all(math.isfinite(rate) and rate > 0 for rate in rates)


@pytest.fixture(autouse=True)
def _threads_as_they_were():
    """The probe sets torch's threads, which belong to the whole process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
