"""What one measured system is asked for, and what each of them can do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Runner", "Setup", "System"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """One system with its sizes.

    Attributes:
        system: A name of systems.SYSTEMS.
        model: Folder of the checkpoint.
        dtype: The precision asked for; see Runner.precision.
        device: "cpu" or "cuda".
        threads: CPU threads.
        batch_size: B, sequences.
        max_seq_len: S, cache rows of a sequence.
        prefill_len: P, tokens of a prefill chunk, for systems that have one.
        artifact: What the system's `build` wrote, or None.
        options: The system's own options.
    """

    system: str
    model: str
    dtype: str
    device: str
    threads: int
    batch_size: int
    max_seq_len: int
    prefill_len: int
    artifact: str | None = None
    options: dict[str, str] = field(default_factory=dict)


class Runner(Protocol):
    """A loaded model; every call returns when the logits are on the host.

    Attributes:
        precision: What it computes in, whatever its weights are stored in: "float32", "float16" or
            "bfloat16".
        phases: Seconds of getting ready: `import_s`, `load_s`, and where there is such a phase
            `tokenizer_s`, `compile_s` or `first_call_s`, `warmup_s`.
    """

    precision: str
    phases: dict[str, float]

    @property
    def facts(self) -> dict[str, object]:
        """What else is worth recording: where compiled code came from, what was counted so far.

        Where they aren't those of the precision: `weight_bytes` and `lookup_bytes` of WeightSizes,
        `cache_dtype`, and `activations`, "int8" if products round what they multiply to that.
        """
        ...

    def reset(self) -> None:
        """Empties the cache: the next token has position 0."""
        ...

    def extend(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Appends n tokens to every sequence, as a prompt.

        Args:
            ids: [B, n] int64.

        Returns:
            [B, V] float32 logits of the last ones.
        """
        ...

    def decode(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Appends one token to every sequence.

        Args:
            ids: [B] int64.

        Returns:
            [B, V] float32 logits, valid until the next call.
        """
        ...

    def seek(self, position: int) -> None:
        """Makes `position` the next token's; what lies before it may be anything.

        Args:
            position: At least the present one.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """How a system is made.

    Attributes:
        open: Loads it; raises BackendUnavailableError if it can't run here.
        build: Writes what `open` loads from into a folder, unless the checkpoint itself serves.
        artifact: Name of what is built, shared by the systems and setups that give the same one.
        compiles: Whether getting ready fills a cache, so that a first start is worth measuring.
        device: The device it is tied to, or None.
        weights: What its weights are always stored in, "int8" or "int4"; None follows the setup.
        on_quantized: Whether it loads llamac's own quantized copy of the checkpoint, of `weights`.
    """

    open: Callable[[Setup], Runner]
    build: Callable[[Setup, Path], None] | None = None
    artifact: Callable[[Setup], str] | None = None
    compiles: bool = False
    device: str | None = None
    weights: str | None = None
    on_quantized: bool = False
