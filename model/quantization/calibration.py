"""What reaches each weight when a model reads a text, a layer at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ...runtime.text.tokenizer import Tokenizer
from ..cache import KVCache
from ..config import LlamaConfig
from ..linear import Linear
from ..llama import Llama, TorchAttention

__all__ = ["CALIBRATION_TEXT", "LayerInputs", "calibration_ids"]

CALIBRATION_TEXT = Path(__file__).with_name("calibration.txt").read_text(encoding="utf-8")

_LENGTH, _MAX_SEQUENCES = 256, 10  # ids of a sequence, and sequences


def calibration_ids(tokenizer: Tokenizer, text: str) -> Tensor:
    """Cuts a text into sequences.

    Args:
        tokenizer: The model's.
        text: What is read.

    Returns:
        [n, T] int64, n at most 10 and T at most 256.

    Raises:
        ValueError: The text is empty.
    """
    if not text.strip():
        raise ValueError("the calibration text is empty")
    ids = torch.tensor(tokenizer.encode(text), dtype=torch.int64)
    if len(ids) < _LENGTH:
        return ids[None]
    return ids[: len(ids) // _LENGTH * _LENGTH].view(-1, _LENGTH)[:_MAX_SEQUENCES]


class LayerInputs:
    """Carries a text's hidden states from layer to layer.

    Args:
        config: The model's.
        hidden: [n, T, E] float32, the sequences' embeddings.
    """

    def __init__(self, config: LlamaConfig, hidden: Tensor) -> None:
        num_sequences, num_tokens, _ = hidden.shape
        # One layer, and next to nothing around it.
        config = replace(config, num_hidden_layers=1, vocab_size=1)
        self._model = Llama(config, num_positions=num_tokens).float()
        self._cache = KVCache.allocate(config, num_sequences, num_tokens, dtype=torch.float32)
        self._attention = TorchAttention()
        self._hidden = hidden.flatten(0, 1)  # [n*T, E]
        self._slots = torch.arange(num_sequences)

    @torch.no_grad()
    def run(
        self, fill: Callable[[str, Tensor], None], substitute: Callable[[str, Tensor, Tensor], None]
    ) -> None:
        """Runs the next layer, each of its weights rounded just before its product.

        Args:
            fill: Given a parameter's name within the layer and the float32 tensor it goes to.
            substitute: Given a module's name there, its weight [N, K], to be changed in place, and
                its input [n*T, K]; of modules with the same input it is the same tensor.
        """
        layer = self._model.model.layers[0]
        for name, parameter in layer.named_parameters():
            fill(name, parameter)

        def before(name: str, module: nn.Module, given: tuple[Tensor]) -> None:
            assert isinstance(module, Linear)
            substitute(name, module.weight.detach(), given[0])

        hooks = [
            module.register_forward_pre_hook(partial(before, name))
            for name, module in layer.named_modules()
            if isinstance(module, Linear)
        ]
        start = torch.zeros_like(self._slots)
        angles = (t.expand(len(start), *t.shape) for t in (self._model.cos, self._model.sin))
        self._hidden = layer(
            self._attention,
            self._hidden,
            *angles,
            start,
            start,
            self._slots,
            *self._cache.layers[0],
        )
        for hook in hooks:
            hook.remove()
