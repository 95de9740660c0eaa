"""What a run's raw times become: statistics, tables, files, pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from llamac.perf.report import summarize, write_run
from llamac.perf.tables import to_markdown

CONFIG = {
    "model_type": "llama",
    "vocab_size": 10,
    "hidden_size": 4,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 2,
    "max_position_embeddings": 16,
}


def system(name: str, **facts: Any) -> dict[str, Any]:
    return {
        "name": name,
        "batch_size": 1,
        "status": "ok",
        "precision": "float32",
        "phases": {"load_s": 0.5, "compile_s": 3.0, "warmup_s": 0.25},
        "facts": {"cache_hit": True},
        "memory": {"peak_rss_bytes": 3 << 20},
        "check": {"errors": [0.0], "message": "16 of 16 predictions agree"},
        **facts,
    }


def case(prefill_s: list[float], step_s: list[list[float]]) -> dict[str, Any]:
    num_new = len(step_s[0]) + 1
    sizes = {"prompt_len": 4, "num_new": num_new, "limits": [0] * len(prefill_s)}
    return {**sizes, "prefill_s": prefill_s, "step_s": step_s}


def make_run(**parts: Any) -> dict[str, Any]:
    return {
        "command": ["llamac", "bench", "--model", "tiny"],
        "date": "2026-01-02T03:04:05+00:00",
        "commit": "0123456789ab",
        "machine": {"cpu": "A CPU", "cores": 2, "gpu": None, "load_average": 0.0},
        "versions": {"python": "3"},
        "model": {"name": "some/tiny", "config": CONFIG},
        "options": {
            "device": "cpu",
            "dtype": "float32",
            "threads": 2,
            "max_seq_len": 8,
            "prefill_len": 4,
            "trials": 5,
        },
        "limit_samples": [
            {"read_bytes_per_s": {"sum": 14_880.0}, "flops_per_s": {"float32": {"torch": 1e9}}},
        ],
        "systems": [],
        "sweeps": {},
        "cold_start": [],
        **parts,
    }


def make_timed_run() -> dict[str, Any]:
    """Ours takes 0.2 s a step and 0.5 s a prompt; the peer 0.4 s and 0.25 s."""
    ours = case([0.5, 0.6, 0.4], [[0.2, 0.1], [0.3, 0.2], [0.2, 0.2]])
    peer = case([0.25, 0.25, 0.25], [[0.4, 0.4], [0.4, 0.4], [0.4, 0.4]])
    wrong = {"name": "eager", "batch_size": 1, "status": "FAIL", "message": "wrong logits: all"}
    absent = {"name": "genai", "batch_size": 1, "status": "skipped", "message": "pip install it"}
    return make_run(
        systems=[
            system("compile", cases=[ours]),
            wrong,
            system("llama.cpp", cases=[peer]),
            absent,
        ]
    )


def lines_of(markdown: str, name: str) -> list[list[str]]:
    """The cells of a table's rows that begin with a name."""
    rows = [line.strip("|").split("|") for line in markdown.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in row] for row in rows]
    return [row for row in cells if row[0] == name]


def test_statistics_of_literal_times() -> None:
    run = make_timed_run()
    summarize(run)
    found = run["systems"][0]["cases"][0]
    assert found["ttft_s"] == 0.5
    assert found["prefill_tokens_per_s"] == 8.0
    # Sorted: 0.1, 0.2, 0.2, 0.2, 0.2, 0.3; p10 lies half way between the first two.
    assert found["tpot_s"] == pytest.approx({"median": 0.2, "p10": 0.15, "p90": 0.25})
    assert found["decode_tokens_per_s"] == pytest.approx(5.0)
    # Weights 304 x 4 bytes, 5 live rows of 32 bytes, logits 40 bytes.
    assert found["decode_bytes"] == 1416
    assert found["wasted_kv_bytes"] == 96
    assert found["decode_limit_s"] == pytest.approx(1416 / 14_880)
    assert found["decode_share"] == pytest.approx(1416 / 14_880 / 0.2)
    # 316 x 4 bytes of weights, 4 rows, logits.
    assert found["prefill_share"] == pytest.approx((1264 + 128 + 40) / 14_880 / 0.5)


def test_a_share_is_of_its_own_trial_s_limit() -> None:
    """Over the best rate of the run one speed became shares of 62 and of 89 %."""
    found = case([0.5, 0.25, 0.125], [[0.2, 0.2], [0.1, 0.1], [0.05, 0.05]])
    run = make_run(systems=[system("compile", cases=[found | {"limits": [0, 1, 2]}])])
    # A neighbour leaves half of the bandwidth, then all: the system is as good in every trial.
    run["limit_samples"] = [
        {"read_bytes_per_s": {"sum": rate}, "flops_per_s": {"float32": {"torch": 1e9}}}
        for rate in (14_160.0, 28_320.0, 56_640.0)
    ]
    summarize(run)
    found = run["systems"][0]["cases"][0]
    assert found["decode_share"] == pytest.approx(0.5)
    assert found["prefill_share"] == pytest.approx(1432 / 14_160 / 0.5)
    assert found["decode_limit_s"] == pytest.approx(0.05)
    assert run["limits"]["read_bytes_per_s"] == {
        "median": 28_320.0,
        "least": 14_160.0,
        "most": 56_640.0,
    }


def sampled(total_s: float, step_s: list[float]) -> dict[str, Any]:
    return {"total_s": total_s, "ttft_s": [0.5, 0.75, 1.0], "step_s": step_s}


def test_a_batch_from_end_to_end_has_a_rate_of_all_and_of_each() -> None:
    found = case([0.5], [[0.2, 0.2]])
    found["sampled"] = {"trials": [sampled(2.0, [0.25, 0.5]), sampled(3.0, [0.5])]}
    run = make_run(systems=[system("compile", cases=[found], batch_size=3)])
    summarize(run)
    assert lines_of(to_markdown(run), "compile")[1] == [
        "compile",
        "float32",
        "3",
        "4 + 3",
        "0.75",
        "500 (300 - 500)",
        "6 (3 x 2)",
        "3.6",  # 9 tokens in 2.5 seconds
    ]


def test_no_step_of_all_sequences_is_no_rate() -> None:
    found = case([0.5], [[0.2, 0.2]])
    found["sampled"] = {"trials": [sampled(2.0, [])]}
    run = make_run(systems=[system("compile", cases=[found])])
    summarize(run)
    assert lines_of(to_markdown(run), "compile")[1][5:7] == ["-", "-"]


def test_a_batch_counts_all_its_tokens() -> None:
    batch = system("compile", cases=[case([0.5], [[0.2, 0.2]])], batch_size=3)
    run = make_run(systems=[batch])
    summarize(run)
    found = run["systems"][0]["cases"][0]
    assert found["prefill_tokens_per_s"] == pytest.approx(24.0)
    assert found["decode_tokens_per_s"] == pytest.approx(15.0)


def test_a_wrong_system_gets_no_number() -> None:
    run = make_timed_run()
    run["systems"][1] |= {"precision": "float32", "cases": [case([0.1], [[0.123456, 0.123456]])]}
    summarize(run)
    text = to_markdown(run)
    assert lines_of(text, "eager") == [["eager", "FAIL"] + [""] * 11]
    assert "**eager: FAIL**: wrong logits: all" in text
    assert "123.5" not in text
    assert lines_of(text, "genai") == [["genai", "skipped"] + [""] * 11]
    assert "**genai: skipped**: pip install it" in text


def test_the_table_says_what_was_measured() -> None:
    run = make_timed_run()
    summarize(run)
    text = to_markdown(run)
    assert "each the replay of one graph" not in text
    speed, startup = lines_of(text, "compile")
    assert speed == [
        "compile",
        "float32",
        "-",
        "1",
        "4 + 3",
        "0.5",
        "8",
        "19%",
        "200 (150 - 250)",
        "5",
        "7.08e-06",
        "48%",
        "3.0 MiB",
    ]
    assert startup == [
        "compile",
        "-",
        "-",
        "3 (cached)",
        "0.5",
        "0.25",
        "16 of 16 predictions agree",
    ]
    assert lines_of(text, "compile / llama.cpp")[0][-2:] == ["2.00", "0.50"]
    for part in ("llamac bench --model tiny", "A CPU, 2 cores", "2026-01-02", "0123456789ab"):
        assert part in text
    assert "load average" not in text


def test_ratios_are_of_one_precision() -> None:
    run = make_timed_run()
    run["systems"][2]["precision"] = "bfloat16"
    summarize(run)
    assert " / llama.cpp" not in to_markdown(run)


def make_quantized_run() -> dict[str, Any]:
    """Ours in 4 and in 8 bits beside peers of both; a step takes ours half of the time."""

    def quantized(name: str, weights: str, step_s: float, **facts: Any) -> dict[str, Any]:
        sizes = {"weight_bytes": 255, "lookup_bytes": 80}
        times = case([0.5], [[step_s, step_s]])
        return system(name, weights=weights, cases=[times], facts=sizes | facts)

    ours = [quantized(f"compile-{weights}", weights, 0.2) for weights in ("int8", "int4")]
    peers = {"llama.cpp-q8_0": "int8", "llama.cpp-q4_0": "int4", "llama.cpp-q4_k_m": "int4"}
    peers |= {"genai-int4": "int4"}
    dense = system("llama.cpp", cases=[case([0.5], [[0.4, 0.4]])])
    others = [
        quantized(name, weights, 0.4, cache_dtype="float16") for name, weights in peers.items()
    ]
    return make_run(systems=[*ours, dense, *others])


def test_the_limit_of_quantized_weights_is_of_their_measured_bytes() -> None:
    run = make_quantized_run()
    summarize(run)
    ours, peer = run["systems"][1], run["systems"][4]
    assert ours["bits_per_weight"] == 6.0  # 255 bytes, 340 weights
    # 175 bytes but the table's, one of its 10 rows; 5 live rows of 32 or 16 bytes; logits 40 bytes.
    assert ours["cases"][0]["decode_bytes"] == 175 + 8 + 160 + 40
    assert peer["cases"][0]["decode_bytes"] == 175 + 8 + 80 + 40
    row = lines_of(to_markdown(run), "compile-int4")[0]
    assert row[1:3] == ["int4, float32", "6.00"]


def test_quantized_systems_are_compared_with_peers_of_as_many_bits() -> None:
    run = make_quantized_run()
    summarize(run)
    lines = [line for line in to_markdown(run).splitlines() if " / " in line]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [(row[0], row[1], row[5]) for row in cells] == [
        ("compile-int8 / llama.cpp-q8_0", "int8", "2.00"),
        ("compile-int4 / llama.cpp-q4_0", "int4", "2.00"),
        ("compile-int4 / llama.cpp-q4_k_m", "int4", "2.00"),
        ("compile-int4 / genai-int4", "int4", "2.00"),
    ]


def test_a_busy_machine_is_named() -> None:
    run = make_timed_run()
    run["machine"]["load_average"] = 1.5
    run["systems"][0]["idle_cpu_share"] = 0.25
    summarize(run)
    text = to_markdown(run)
    assert "- the load average was 1.50 before the run" in text
    assert "- compile took 25% of a core while the others were timed" in text


def test_a_single_new_token_has_no_step_time() -> None:
    run = make_run(systems=[system("compile", cases=[case([0.5, 0.5], [[], []])])])
    summarize(run)
    assert "tpot_s" not in run["systems"][0]["cases"][0]
    assert lines_of(to_markdown(run), "compile")[0][8:12] == ["-", "-", "-", "-"]


def test_replays_are_a_remark() -> None:
    run = make_timed_run()
    run["systems"][0]["facts"] |= {"recompiles": 0, "steps": 99, "graph_replays": 99}
    summarize(run)
    assert "- compile, batch 1: 99 steps, each the replay of one graph" in to_markdown(run)


def make_sweep_run() -> dict[str, Any]:
    def swept(name: str, factor: float) -> dict[str, Any]:
        points = {"1": [[factor], [3 * factor]], "6": [[2 * factor], [2 * factor]]}
        return system(name, sweep=points, limits=[0, 0])

    failed = {"name": "genai", "batch_size": 1, "status": "FAIL", "message": "broke", "sweep": {}}
    return make_run(
        sweeps={
            "8": [swept("compile", 0.01), swept("ort-cpu", 0.02), failed],
            "16": [swept("compile", 0.03), swept("ort-cpu", 0.02), dict(failed)],
        }
    )


def test_a_sweep_is_a_row_of_step_times() -> None:
    run = make_sweep_run()
    summarize(run)
    text = to_markdown(run)
    assert lines_of(text, "compile") == [
        ["compile", "float32", "20", "20"],
        ["compile", "float32", "60", "60"],
    ]
    assert lines_of(text, "genai") == [["genai", "FAIL", "", ""]] * 2
    assert text.count("genai: FAIL") == 1


def make_cold_run() -> dict[str, Any]:
    def start(total_s: float, rss: int) -> dict[str, Any]:
        phases = {"python_s": 0.5, "import_s": total_s - 1.5, "first_chunk_s": 1.0}
        return {"phases": phases, "total_s": total_s, "peak_rss_bytes": rss}

    starts = [start(4.0, 5 << 20), start(2.0, 7 << 20), start(3.0, 6 << 20)]
    ours = system("compile", starts=starts, first_start=start(9.0, 1), prompt_len=8, prefill_len=16)
    wrong = {"name": "ort-cpu", "batch_size": 1, "status": "FAIL", "message": "wrong logits"}
    return make_run(cold_start=[ours, wrong], limit_samples=[])


def test_a_cold_start_is_the_median_start() -> None:
    run = make_cold_run()
    summarize(run)
    found = run["cold_start"][0]
    assert found["total_s"] == 3.0
    assert sum(found["phases"].values()) == pytest.approx(3.0)
    text = to_markdown(run)
    assert lines_of(text, "compile") == [
        ["compile", "float32", "3.00", "0.5", "1.5", "1", "7.0 MiB", "9.00"]
    ]
    assert lines_of(text, "ort-cpu") == [["ort-cpu", "FAIL"] + [""] * 6]


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (make_timed_run, ["speed"]),
        (make_sweep_run, ["sweep"]),
        (make_cold_run, ["cold-start"]),
    ],
)
def test_files_are_written_and_drawn(make: Any, names: list[str], tmp_path: Path) -> None:
    run = make()
    summarize(run)
    data, table, *charts = write_run(run, tmp_path / "new")
    stem = "tiny-cpu-float32-2026-01-02-030405"
    assert [path.name for path in charts] == [f"{stem}-{name}.png" for name in names]
    assert json.loads(data.read_text()) == run
    assert table.read_text() == to_markdown(run)
    for path in charts:
        pixels = matplotlib.image.imread(path)
        assert pixels.shape[1] > 700
        assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 50


def test_nothing_is_drawn_of_wrong_systems(tmp_path: Path) -> None:
    run = make_run(
        systems=[
            system("eager", status="FAIL", message="wrong", cases=[case([0.5], [[0.2, 0.2]])]),
            system("compile", cases=[case([0.5], [[]])]),
        ]
    )
    summarize(run)
    assert [path.suffix for path in write_run(run, tmp_path)] == [".json", ".md"]


def test_each_case_has_its_own_picture(tmp_path: Path) -> None:
    cases = [case([0.5], [[0.2]]), case([0.5], [[0.2, 0.2]])]
    run = make_run(systems=[system("compile", cases=cases)])
    summarize(run)
    names = [path.name for path in write_run(run, tmp_path)]
    assert sum("-speed-b1-4+2.png" in name or "-speed-b1-4+3.png" in name for name in names) == 2
