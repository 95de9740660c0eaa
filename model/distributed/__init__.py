"""A model on several processes: how they find, follow and miss each other."""

from .backend import ParallelBackend
from .group import RankGroup

__all__ = ["ParallelBackend", "RankGroup"]
