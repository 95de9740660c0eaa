"""A step on inputs that stay where they are; on a GPU it can be replayed as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["BoundStep"]


class BoundStep:
    """Takes int64 arrays, gives logits.

    Args:
        run: From tensors on the device to logits there.
        sizes: Of the tensors.
        device: Where they lie.

    Attributes:
        num_replays: Runs so far that were replays of a recording.
    """

    def __init__(
        self,
        run: Callable[..., Tensor],
        sizes: Sequence[tuple[int, ...]],
        device: torch.device,
    ) -> None:
        self._run = run
        on_gpu = device.type == "cuda"
        # Pinned, so that a graph can copy them.
        self._host = [torch.zeros(size, dtype=torch.int64, pin_memory=on_gpu) for size in sizes]
        self._inputs = [host.to(device) for host in self._host]  # on a CPU the same tensors
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits = torch.empty(0)
        self.num_replays = 0

    def __call__(self, *values: NDArray[np.int64]) -> NDArray[np.float32]:
        """Runs the step.

        Args:
            values: What the tensors hold.

        Returns:
            The logits; a recorded step's are overwritten by its next run.
        """
        for host, value in zip(self._host, values, strict=True):
            host.copy_(torch.from_numpy(value))
        if self._graph is None:
            return self._run_copied().cpu().numpy()
        self._graph.replay()
        self.num_replays += 1
        torch.cuda.current_stream().synchronize()
        return self._logits.numpy()

    def record(self, pool: Any) -> None:
        """Records the step, copies to and from the GPU included.

        Args:
            pool: From torch.cuda.graph_pool_handle(): working memory that recorded steps share,
                as only one runs at a time.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            logits = self._run_copied()
            self._logits = torch.empty(logits.shape, pin_memory=True)
            self._logits.copy_(logits, non_blocking=True)
        self._graph = graph

    def _run_copied(self) -> Tensor:
        for tensor, host in zip(self._inputs, self._host, strict=True):
            if tensor is not host:
                tensor.copy_(host, non_blocking=True)
        return self._run(*self._inputs)
