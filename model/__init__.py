"""The static-shape LLaMA in torch: config, checkpoints, model, compiled backend."""

from .cache import KVCache
from .compiled.torch_backend import TorchBackend
from .config import LlamaConfig
from .llama import Llama

__all__ = ["KVCache", "Llama", "LlamaConfig", "TorchBackend"]
