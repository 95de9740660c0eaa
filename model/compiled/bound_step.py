"""A step on inputs that stay where they are; on a GPU it can be replayed as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...runtime.backend import StepInputs

__all__ = ["BoundStep"]


class BoundStep:
    """Takes a step's inputs, gives its logits.

    Args:
        run: From the inputs as tensors on the device, in their order, to logits there.
        sizes: Of the inputs, by name.
        device: Where they lie.

    Attributes:
        num_replays: Runs so far that were replays of a recording.
    """

    def __init__(
        self,
        run: Callable[..., Tensor],
        sizes: Mapping[str, tuple[int, ...]],
        device: torch.device,
    ) -> None:
        self._run = run
        on_gpu = device.type == "cuda"
        # Pinned, so that a graph can copy them.
        self._host = {
            name: torch.zeros(size, dtype=torch.int64, pin_memory=on_gpu)
            for name, size in sizes.items()
        }
        # On a CPU the same tensors.
        self._inputs = {name: host.to(device) for name, host in self._host.items()}
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits = torch.empty(0)
        self.num_replays = 0

    def __call__(self, inputs: StepInputs) -> NDArray[np.float32]:
        """Runs the step.

        Args:
            inputs: In the step's sizes.

        Returns:
            [B, N, V] logits; a recorded step's are overwritten by its next run.
        """
        for name, host in self._host.items():
            host.copy_(torch.from_numpy(getattr(inputs, name)))
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
        for name, tensor in self._inputs.items():
            if tensor is not self._host[name]:
                tensor.copy_(self._host[name], non_blocking=True)
        return self._run(*self._inputs.values())
