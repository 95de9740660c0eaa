"""NVIDIA's libraries: which a file needs, and how they are found; on libraries made here."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llamac.runtime.ort.gpu_libraries import (
    driver_problem,
    find_gpu,
    load_libraries,
    needed_libraries,
)

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")


def build(folder: Path, name: str, *needed: str, symbol: str = "answer") -> Path:
    """A library that links to others in the folder."""
    source = folder / "source.c"
    source.write_text(f"int {symbol}(void) {{ return 42; }}\n")
    words = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-Wl,--no-as-needed", source.name]
    words += ["-o", name, "-L.", *(f"-l:{other}" for other in needed)]
    subprocess.run(words, cwd=folder, check=True)
    return folder / name


@needs_gcc
def test_needed_libraries_are_nvidias_by_soname(tmp_path: Path):
    names = ["libcudart.so.13", "libother.so.1", "libnvinfer.so.10", "libcuda.so.1"]
    for name in names:
        build(tmp_path, name)
    library = build(tmp_path, "libprovider.so", *names)
    nvidias = [name for name in names if "other" not in name]
    assert needed_libraries(library) == nvidias
    assert needed_libraries(build(tmp_path, "libplain.so")) == []
    # What the linker's own tool says, whatever else it lists.
    listed = subprocess.run(
        ["objdump", "-p", library], capture_output=True, text=True, check=True
    ).stdout
    positions = [listed.index(f"NEEDED               {name}") for name in nvidias]
    assert positions == sorted(positions)


@needs_gcc
def test_libraries_in_site_packages_are_loaded_whatever_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The first needs the second, which only a loaded SONAME resolves: there is no rpath."""
    first, second, third = "libnvllamac_a.so.1", "libcullamac_b.so.1", "libnvllamac_c.so.10"
    build(tmp_path, second, symbol="llamac_b")
    build(tmp_path, first, second, symbol="llamac_a")
    build(tmp_path, third, symbol="llamac_c")
    site = tmp_path / "site-packages"
    for name, folder in (
        (first, "nvidia/cu13/lib"),
        (second, "nvidia/other/lib"),
        (third, "tensorrt_libs"),
    ):
        (site / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / name).rename(site / folder / name)
    assert load_libraries([first, second, third]) == [first, second, third]  # not on the path
    with pytest.raises(OSError, match=first):
        ctypes.CDLL(first)
    monkeypatch.setattr(sys, "path", [*sys.path, str(site)])
    assert load_libraries([first, second, third, "libnvabsent.so.9"]) == ["libnvabsent.so.9"]
    for name, symbol in ((first, "llamac_a"), (second, "llamac_b"), (third, "llamac_c")):
        assert getattr(ctypes.CDLL(name), symbol)() == 42  # now found by SONAME alone


def test_names_that_do_not_exist_are_missing():
    assert load_libraries(["libnvabsent.so.1", "libcuabsent.so.2"]) == [
        "libnvabsent.so.1",
        "libcuabsent.so.2",
    ]
    assert load_libraries([]) == []


def test_the_driver_is_there_or_named():
    problem = driver_problem()
    if find_gpu() is None:
        assert problem is not None
        assert problem.startswith(("libcuda.so.1 was not found", "the NVIDIA driver is here but"))
        assert "\n" not in problem
    else:
        assert problem is None
