"""Opens a bundle's graphs, all with the same options, and binds each to the cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..backend import BackendUnavailableError
from ..bundle.manifest import GraphFile, Manifest
from .bound_graph import BoundGraph
from .buffers import CacheBuffers
from .engine_cache import Engines
from .providers import SessionOptions, open_session

__all__ = ["GraphOpener"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphOpener:
    """Opens graphs with one set of options and binds them to a cache.

    Attributes:
        manifest: The bundle.
        provider: Who runs.
        threads: Of the CPU provider; None takes one per physical core.
        device_id: Which GPU.
        engines: Of TensorRT, or None.
        prepack: Whether steps on the CPU get their own copy of the weights.
        weights: Name to onnxruntime.OrtValue, for all sessions; empty where each reads its own.
        report: Told what is being loaded or built.
    """

    manifest: Manifest
    provider: str
    threads: int | None
    device_id: int
    engines: Engines | None
    prepack: bool
    weights: Mapping[str, Any]
    report: Callable[[str], None]

    def open(self, graph: GraphFile, cache: CacheBuffers) -> BoundGraph:
        """Opens a graph on a cache.

        Raises:
            BackendUnavailableError: The provider refuses it, or a kept engine can't be used.
        """
        building = self.engines is not None and not self.engines.built
        self.report(
            f"building the TensorRT engine of {graph.role} (minutes, kept for the next start)"
            if building
            else f"loading {graph.role}"
        )
        options = SessionOptions(
            provider=self.provider,
            threads=self.threads,
            # Products with packed weights are a hundred times slower without.
            prepack=graph.accuracy_level is not None or (self.prepack and graph.is_step),
            provider_options=self._provider_options(graph),
            initializers=self.weights,
        )
        return BoundGraph(
            self._open_session(graph, options),
            graph,
            vocab_size=self.manifest.shape.vocab_size,
            cache=cache,
        )

    def _open_session(self, graph: GraphFile, options: SessionOptions) -> Any:
        if self.engines is None:
            return open_session(self.manifest.folder / graph.file, options)
        try:
            return open_session(self.engines.model_path(self.manifest, graph), options)
        except BackendUnavailableError as error:
            if not self.engines.built:
                raise
            raise BackendUnavailableError(
                f"the engine kept for {graph.file} can't be used; delete {self.engines.folder}, "
                f"the next start builds it again: {error}"
            ) from None

    def _provider_options(self, graph: GraphFile) -> dict[str, str]:
        if self.engines is not None:
            return self.engines.provider_options(graph)
        if self.provider == "cuda":
            return {
                "device_id": str(self.device_id),
                "use_tf32": "0",
                "enable_cuda_graph": str(int(graph.is_step)),
            }
        return {}
