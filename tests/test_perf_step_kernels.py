"""The table of a step's kernels."""

from __future__ import annotations

import torch

from llamac.perf.step_kernels import own_times, time_kernels


def test_kernels_add_up_to_the_step():
    a = torch.randn(200, 200)

    def step() -> None:
        for _ in range(3):
            a.mm(a)
        a.exp()

    plain_s, profiled_s, kernels = time_kernels(step, num_steps=5)
    calls = {kernel.name: kernel.calls for kernel in kernels}
    assert (calls["aten::mm"], calls["aten::exp"]) == (3, 1)
    assert [kernel.step_s for kernel in kernels] == sorted(
        (kernel.step_s for kernel in kernels), reverse=True
    )
    assert 0 < sum(kernel.step_s for kernel in kernels) <= profiled_s
    assert plain_s > 0


def test_kernels_that_overlap_count_once():
    spans = [
        ("a", 0.0, 5.0),
        ("c", 10.0, 12.0),
        ("b", 3.0, 8.0),
        ("a", 11.0, 11.5),
        ("a", 20.0, 21.0),
    ]
    assert own_times(spans) == {"a": (3, 6.5), "b": (1, 3.0), "c": (1, 0.5)}


def test_what_it_refuses(refused):
    refused("--steps are above 0", "bench", "--kernels", "--steps", "0")
