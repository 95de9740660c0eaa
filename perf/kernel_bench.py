"""How fast products of a few rows run on this CPU, next to a plain read.

`python -m llamac.perf.kernel_bench` prints GB/s of stored bytes, the median of interleaved rounds.
With one thread its own time counts, which other programs disturb less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from ..model.kernels.few_rows import load_operators, multiply_few
from ..model.kernels.packed_product import cpp_library, multiply_in_cpp
from ..runtime.cli.text_table import format_table

_NUM_BYTES = 160 << 20  # of the weights that take turns: many times the last cache
_FORMS = {"native": (), "AVX2": ("-mavx2", "-mfma", "-mf16c")}
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

_Run = tuple[Callable[[], object], int]  # and the bytes that it reads


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shape", nargs="+", default=["5632x2048", "2048x5632"], metavar="NxK")
    parser.add_argument("--rows", type=int, default=1, help="rows of x, up to 16")
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    table = [["NxK", "weight", "x", "form", "GB/s", "of the read"]]
    for shape in given.shape:
        num_rows, width = map(int, shape.split("x"))
        for names, runs in _groups(num_rows, width, given.rows):
            clock = time.thread_time if given.threads == 1 else time.perf_counter
            rates = _rates([_read(), *runs], given.rounds, clock)
            for name, rate in zip(names, rates[1:], strict=True):
                table.append([shape, *name, f"{rate:.1f}", f"{rate / rates[0]:.2f}"])
    print(f"{given.threads} threads, {given.rows} rows")
    print(format_table(table))


def _groups(
    num_rows: int, width: int, num_x: int
) -> Iterator[tuple[list[tuple[str, str, str]], list[_Run]]]:
    """What is measured side by side: names and runs."""
    if load_operators() is None:
        raise SystemExit("the C++ operators can't be compiled")
    for x_name, dtype in _DTYPES.items():
        x = torch.randn(num_x, width).to(dtype)
        dense = torch.randn(num_rows, width).to(dtype)
        copies = [dense.clone() for _ in range(_NUM_BYTES // dense.nbytes)]
        names = [(x_name, x_name, "F.linear"), (x_name, x_name, "native")]
        num_bytes = len(copies) * dense.nbytes
        runs: list[_Run] = [
            (lambda x=x, w=copies: [F.linear(x, c) for c in w], num_bytes),
            (lambda x=x, w=copies: [multiply_few(x, [c]) for c in w], num_bytes),
        ]
        for bits in (4, 8):
            for group in (32, 128):
                weights, num_bytes = _packed(num_rows, width, bits, group)
                for form, options in _FORMS.items():
                    library = cpp_library(*options)
                    if library is None:
                        raise SystemExit(f"the C++ library can't be compiled for {form}")

                    def run(library=library, x=x, weights=weights) -> None:
                        for weight in weights:
                            multiply_in_cpp(library, x, [weight])

                    names.append((f"int{bits} g{group}", x_name, form))
                    runs.append((run, num_bytes))
        yield names, runs


def _packed(
    num_rows: int, width: int, bits: int, group: int
) -> tuple[list[tuple[torch.Tensor, torch.Tensor, None]], int]:
    weights: list[tuple[torch.Tensor, torch.Tensor, None]] = []
    num_bytes = 0
    while num_bytes < _NUM_BYTES:
        packed = torch.randint(0, 256, (num_rows, width * bits // 8), dtype=torch.uint8)
        scale = torch.rand(num_rows, width // group).bfloat16()
        weights.append((packed, scale, None))
        num_bytes += packed.nbytes + scale.nbytes
    return weights, num_bytes


def _read() -> _Run:
    array = torch.rand(_NUM_BYTES // 4)
    return array.sum, array.nbytes


def _rates(runs: list[_Run], rounds: int, clock: Callable[[], float]) -> list[float]:
    """GB/s of each, the median of rounds in which each runs once."""
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds + 1):  # the first one warms up
        for taken, (run, _) in zip(seconds, runs, strict=True):
            begin = clock()
            run()
            taken.append(clock() - begin)
    return [
        num_bytes / statistics.median(taken[1:]) / 1e9
        for taken, (_, num_bytes) in zip(seconds, runs, strict=True)
    ]


if __name__ == "__main__":
    main()
