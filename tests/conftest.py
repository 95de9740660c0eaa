"""What several test files share: one tiny config, the tolerances, the reference checkpoint."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from llamac.runtime.cli import main

# How fast examples are drawn says how busy the machine is, nothing of the code.
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")

SHARED_CHECKPOINT = Path(__file__).parents[2] / "shared" / "checkpoints" / "stories260K"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: the longest, begun last, would be waited for alone."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def stories260k() -> Path:
    """The folder of a published checkpoint with reference texts, where it is at hand."""
    if not SHARED_CHECKPOINT.is_dir():
        pytest.skip("the stories260K checkpoint is not beside the repository")
    return SHARED_CHECKPOINT


@pytest.fixture(scope="session")
def expected_texts(stories260k: Path) -> list[dict]:
    return json.loads((stories260k / "expected.json").read_text())


def lend_kernels(kernels: Path, cache: Path) -> None:
    """Makes the folder of libraries in C++ that of another cache, too."""
    kernels.mkdir(exist_ok=True)
    cache.mkdir(parents=True)
    (cache / "kernels").symlink_to(kernels)


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps compiled code and engines of the tests out of the user's cache.

    One folder for all runs would be faster, and would hide what a first run does. The processes of
    a run share the libraries in C++, which each would compile for itself.
    """
    cache = tmp_path_factory.mktemp("cache")
    if "PYTEST_XDIST_WORKER" in os.environ:
        lend_kernels(tmp_path_factory.getbasetemp().parent / "kernels", cache / "llamac")
    os.environ["XDG_CACHE_HOME"] = str(cache)
    yield
    del os.environ["XDG_CACHE_HOME"]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """Runs a command line; gives its exit code, stdout and stderr."""

    def run_main(*argv: str | Path) -> tuple[int, str, str]:
        try:
            code = main([str(word) for word in argv])
        except SystemExit as stop:  # argparse's own way out
            code = stop.code
        assert isinstance(code, int)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_main


@pytest.fixture
def refused(run):
    """Asserts one line on stderr, nothing on stdout, exit code 2."""

    def check(message: str, *argv: str | Path) -> None:
        code, out, err = run(*argv)
        assert re.search(message, err), err
        assert re.fullmatch(r"llamac.*: .+\n", err), err
        assert (code, out) == (2, "")

    return check


# Absolute and relative bounds on logits that two computations of the same model may differ by.
# float32: sums of a few hundred products in another order. 16-bit: one rounding step of values
# near the largest logit.
TOLERANCE = {"float32": (1e-4, 1e-5), "bfloat16": (2e-2, 2e-2), "float16": (3e-3, 3e-3)}
