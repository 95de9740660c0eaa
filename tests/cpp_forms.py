"""What the C++ is compiled for in tests: this processor, and what it also can."""

from __future__ import annotations

import pytest

from llamac.model.toolchain import instruction_set

# The compiler's options, and a flag of the processors that run what they make.
FORMS = {
    "native": (("-march=native",), ""),
    "avx512": (("-march=x86-64-v4",), "avx512bw"),
    "avx2": (("-mavx2", "-mfma"), "fma"),
    "avx2-f16c": (("-mavx2", "-mfma", "-mf16c"), "f16c"),
    "plain": (("-march=x86-64",), ""),
}


def options_of(form: str) -> tuple[str, ...]:
    """The compiler's options for a form; skips the test where the processor can't run it."""
    options, flag = FORMS[form]
    if flag not in instruction_set():
        pytest.skip(f"the processor has no {flag}")
    return options
