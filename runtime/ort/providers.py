"""Opens ONNX Runtime sessions on exactly the provider that was asked for.

ONNX Runtime by itself falls back to the CPU, for a whole session or node by node, and says so in a
log at most. Here a library that is missing is named before a session is made, and a node that
another provider would run is refused.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..backend import BackendUnavailableError
from .gpu_libraries import driver_problem, load_libraries, needed_libraries

__all__ = [
    "ORT_PACKAGES",
    "PROVIDERS",
    "TENSORRT_PACKAGES",
    "SessionOptions",
    "installed_versions",
    "named_errors",
    "open_session",
    "provider_libraries",
    "provider_problem",
    "quiet_run_options",
]

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
TENSORRT_PACKAGES = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12")
ORT_PACKAGES = ("onnxruntime", "onnxruntime-gpu")
_CUDA_PACKAGES = ("nvidia-cuda-runtime", "nvidia-cublas", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12")

_PIP = {
    "cpu": "pip install 'llamac[cpu]'",
    "cuda": "pip install 'llamac[gpu]'",
    "tensorrt": "pip install 'llamac[tensorrt]' --extra-index-url https://pypi.nvidia.com",
}
_CUDA_PIP = "pip install 'onnxruntime-gpu[cuda,cudnn]'"

_LOG_ERRORS, _LOG_FATAL_ERRORS = 3, 4
# It makes a weight the right factor of a product again, which the CPU provider copies into another
# layout at every step, unless that copy is kept.
_UNPACKED_WITHOUT = ["GemmTransposeFusion"]
_SOURCE_PLACE = re.compile(r"^/onnxruntime_src/\S+:\d+ .*?\)(?: const)? ")
_MAX_REASON = 4000  # characters: the longest seen name every node of a graph


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionOptions:
    """How a session is opened.

    Attributes:
        provider: One of PROVIDERS.
        threads: Of the CPU provider; None takes one per physical core.
        prepack: Whether the CPU provider makes its own copy of every weight in the layout its
            kernels like best; without, it reads the mapped file.
        provider_options: Passed on to the provider.
        initializers: Name to onnxruntime.OrtValue: weights that the session reads from there
            instead of the graph's files; they must outlive it.
    """

    provider: str
    threads: int | None = None
    prepack: bool = False
    provider_options: Mapping[str, str] = field(default_factory=dict)
    initializers: Mapping[str, Any] = field(default_factory=dict)


def provider_problem(provider: str) -> str | None:
    """What a provider lacks on this machine.

    NVIDIA's libraries that are found stay loaded, so that ONNX Runtime finds them too.

    Args:
        provider: One of PROVIDERS.

    Returns:
        One line that names what is missing, what was found, and what mends it; None if nothing is.

    Raises:
        ValueError: There is no such provider.
    """
    if provider not in PROVIDERS:
        raise ValueError(f"provider is {provider!r}; it must be one of {', '.join(PROVIDERS)}")
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise
        return f"onnxruntime is not installed; {_PIP[provider]}"
    if PROVIDERS[provider] not in onnxruntime.get_available_providers():
        found = installed_versions(ORT_PACKAGES) or f"onnxruntime {onnxruntime.__version__}"
        # Both packages are one folder, which the one installed last has overwritten.
        mend = f"pip uninstall -y {' '.join(ORT_PACKAGES)}; {_PIP[provider]}"
        return f"{found} has no {PROVIDERS[provider]}; {mend}"
    if provider == "cpu":
        return None
    missing = load_libraries(provider_libraries(provider))
    if any(name.startswith("libnv") for name in missing):
        found = installed_versions(TENSORRT_PACKAGES) or "no TensorRT"
        lacking = ", ".join(name for name in missing if name.startswith("libnv"))
        return f"{lacking} (TensorRT 10) was not found, {found} is installed; {_PIP[provider]}"
    libraries = [name for name in missing if name != "libcuda.so.1"]
    if libraries:
        found = installed_versions(_CUDA_PACKAGES) or "none of NVIDIA's packages"
        cuda = f"CUDA {onnxruntime.cuda_version}"
        lacking = ", ".join(libraries)
        return f"{lacking} ({cuda}, cuDNN 9) was not found, {found} is installed; {_CUDA_PIP}"
    return driver_problem()


def provider_libraries(provider: str) -> list[str]:
    """NVIDIA libraries that the installed onnxruntime's provider links to, by SONAME."""
    import onnxruntime

    folder = Path(onnxruntime.__file__).parent / "capi"
    # TensorRT's provider needs CUDA's for memory and copies.
    names = {"cpu": (), "cuda": ("cuda",), "tensorrt": ("tensorrt", "cuda")}[provider]
    paths = [folder / f"libonnxruntime_providers_{name}.so" for name in names]
    found = [name for path in paths if path.is_file() for name in needed_libraries(path)]
    return list(dict.fromkeys(found))


def installed_versions(packages: tuple[str, ...]) -> str:
    """The packages that are installed, as "name version, name version"."""
    found = []
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def open_session(path: Path, options: SessionOptions) -> Any:
    """Opens a graph on a provider without a problem.

    Args:
        path: The ONNX file.
        options: How.

    Returns:
        An onnxruntime.InferenceSession, every node of which the provider runs; with TensorRT, as
        one engine.

    Raises:
        BackendUnavailableError: The provider, or onnxruntime for it, refuses the graph or a node.
    """
    import onnxruntime as ort

    name = PROVIDERS[options.provider]
    settings = ort.SessionOptions()
    if options.threads is not None:
        settings.intra_op_num_threads = options.threads
    settings.add_session_config_entry("session.disable_prepacking", str(int(not options.prepack)))
    for weight, value in options.initializers.items():
        settings.add_initializer(weight, value)
    if options.provider == "tensorrt":  # its parser gets the graph as it was exported and verified
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if options.provider != "cpu":
        settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    # Of a damaged graph it would warn in colours; TensorRT names the node it refuses as an error.
    settings.log_severity_level = _LOG_ERRORS
    ort.set_default_logger_severity(_LOG_ERRORS)
    with named_errors(f"--provider {options.provider} cannot run {path.name}"):
        session = ort.InferenceSession(
            os.fspath(path),
            settings,
            providers=[(name, dict(options.provider_options))],
            enable_fallback=0,
            disabled_optimizers=[] if options.prepack else _UNPACKED_WITHOUT,
        )
    if session.get_providers()[0] != name:
        raise BackendUnavailableError(
            f"--provider {options.provider}: onnxruntime chose {session.get_providers()[0]} for "
            f"{path.name}; see llamac doctor"
        )
    if options.provider != "cpu":
        _check_assignment(session, path, options.provider)
    return session


def quiet_run_options() -> Any:
    """onnxruntime.RunOptions of runs whose errors are raised alone, not printed as well."""
    import onnxruntime as ort

    options = ort.RunOptions()
    options.log_severity_level = _LOG_FATAL_ERRORS
    return options


@contextlib.contextmanager
def named_errors(what: str) -> Iterator[None]:
    """Turns ONNX Runtime's errors, each of a type of its own, into one that says what failed.

    Args:
        what: Begins the message.

    Raises:
        BackendUnavailableError: For any of them.
    """
    from onnxruntime.capi import onnxruntime_pybind11_state as state  # pyright: ignore[reportAttributeAccessIssue]

    try:
        yield
    except (
        RuntimeError,
        UnicodeDecodeError,  # of an error that quotes a damaged name
        state.EPFail,
        state.Fail,
        state.InvalidArgument,
        state.InvalidGraph,
        state.InvalidProtobuf,
        state.NoSuchFile,
        state.NotImplemented,
        state.RuntimeException,
    ) as error:
        raise BackendUnavailableError(f"{what}: {_one_line(str(error))}") from None


def _one_line(text: str) -> str:
    """All that ONNX Runtime says, but not where in its sources it says it, which comes first."""
    return _SOURCE_PLACE.sub("", " ".join(text.split()))[:_MAX_REASON]


def _check_assignment(session: Any, path: Path, provider: str) -> None:
    """Every node on the provider; with TensorRT all in one engine."""
    parts = session.get_provider_graph_assignment_info()
    others = {part.ep_name for part in parts} - {PROVIDERS[provider]}
    if others:
        raise BackendUnavailableError(
            f"--provider {provider} leaves nodes of {path.name} to {', '.join(sorted(others))}; "
            f"export again with --target {provider}"
        )
    if provider == "tensorrt" and len(parts) != 1:
        raise BackendUnavailableError(
            f"TensorRT cuts {path.name} into {len(parts)} engines, it must be one; export again"
        )
