"""What a measurement says about its machine."""

from __future__ import annotations

import platform

import pytest

from llamac.perf.machine import describe_cpu

ZEN_4 = """\
processor\t: 0
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC
flags\t\t: fpu avx2 avx512f avx512_bf16 fsrm

processor\t: 1
model name\t: another
"""


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        (ZEN_4, "AMD EPYC (cpu family 25, model 17, avx512_bf16)"),
        (ZEN_4.replace(" avx512f avx512_bf16", ""), "AMD EPYC (cpu family 25, model 17, avx2)"),
        ("processor\t: 0\nFeatures\t: fp asimd\n", platform.processor()),
    ],
)
def test_a_processor_is_told_from_others_of_its_name(cpuinfo: str, name: str) -> None:
    assert describe_cpu(cpuinfo) == name
