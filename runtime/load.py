"""From a source - a checkpoint, a bundle, a name - to a model that is ready to generate."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

from .backend import StaticShape
from .bundle.manifest import MANIFEST_NAME, Manifest
from .bundle.opening import open_bundle
from .language_model import LanguageModel, RequestOptions
from .mixed_step import mixed_lens
from .sampling import SamplingParams
from .speculation import check_exported, parse_speculate
from .text.chat_template import ChatTemplate
from .text.tokenizer import Tokenizer
from .text.tokenizer_files import load_tokenizer
from .typed_json import read_json

if TYPE_CHECKING:
    from ..model.checkpoint import Checkpoint

__all__ = ["SAMPLING_KEYS", "LoadOptions", "Source", "load", "open_source"]

logger = logging.getLogger(__name__)

SAMPLING_KEYS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class LoadOptions(TypedDict, total=False):
    """How a source is loaded; what is left out has a default.

    Attributes:
        backend: "compile", "eager", or "ort" (bundles alone); default compile, or ort.
        threads: CPU threads, of each rank.
        tensor_parallel: Of a checkpoint: how many processes hold it together; default 1.
        device: Of a checkpoint: "cpu" or "cuda".
        dtype: Of a checkpoint: "float32", "float16" or "bfloat16"; default its own.
        kv_dtype: Of a checkpoint: "int8", of the cache; default dtype's.
        adapter: Of a checkpoint: the folder of a LoRA that PEFT saved, merged as it is read.
        quantize: Of a checkpoint: "int4" or "int8", which is done once and kept in the user's
            cache; default as it is.
        speculate: "lookup" or "lookup:K"; see speculation. Of a bundle as it was exported. Default
            one token a step.
        batch_size: Of a checkpoint: B, cache slots; default 1.
        max_seq_len: Of a checkpoint: S; default max_position_embeddings, at most 2048.
        prefill_len: Of a checkpoint: P; default 16 and 128, at most S.
        provider: Of a bundle: "cpu", "cuda" or "tensorrt".
        target: Of a bundle: whose graphs; default the provider's.
        prepack: Of a bundle on a CPU: faster steps for a slow start and more memory.
        engine_cache: Of a bundle: where TensorRT's engines are kept.
        device_id: Of a bundle: which GPU.
        check: Of a bundle: hash its weights first.
    """

    backend: Literal["compile", "eager", "ort"]
    threads: int
    tensor_parallel: int
    device: str
    dtype: str
    kv_dtype: str
    adapter: Path
    quantize: str
    speculate: str
    batch_size: int
    max_seq_len: int
    prefill_len: int
    provider: str
    target: str
    prepack: bool
    engine_cache: Path
    device_id: int
    check: bool


_OF_CHECKPOINTS = {"device", "dtype", "kv_dtype", "adapter", "quantize", "tensor_parallel"}
_OF_CHECKPOINTS |= {"batch_size", "max_seq_len", "prefill_len"}
_OF_BUNDLES = {"provider", "target", "prepack", "engine_cache", "device_id", "check"}


def load(
    source: str | Path | None = None,
    *,
    generation_config: bool = True,
    keep_prefixes: bool = False,
    announce: Callable[[str], None] = logger.info,
    progress: Callable[[str], None] = lambda _: None,
    **options: Unpack[LoadOptions],
) -> LanguageModel:
    """Loads a checkpoint or a bundle with its tokenizer; a bundle needs no torch.

    Args:
        source: A checkpoint's folder or file, its name in the local Hugging Face cache, or a
            bundle's folder; None is the demo model.
        generation_config: Whether the checkpoint's own sampling settings are the defaults.
        keep_prefixes: See Scheduler.
        announce: Told what is worth a line: the memory needed, the checkpoint's settings.
        progress: Told what is being done.
        options: See LoadOptions.

    Returns:
        The model, ready to generate.

    Raises:
        FileNotFoundError: There is no such source, or it has no tokenizer.
        ValueError: The source or an option is refused; the message says why.
        BackendUnavailableError: The machine lacks a device, a provider, a compiler or the memory.
    """
    return open_source(source, **options).load(
        generation_config=generation_config,
        keep_prefixes=keep_prefixes,
        announce=announce,
        progress=progress,
    )


def open_source(source: str | Path | None = None, **options: Unpack[LoadOptions]) -> Source:
    """Finds a source and checks it and the options; nothing big is read.

    Args:
        source: As for load.
        options: See LoadOptions.

    Returns:
        The open source.

    Raises:
        FileNotFoundError: There is no such source.
        ValueError: The source or an option is refused.
    """
    path = None if source is None else Path(os.path.expanduser(source))
    is_bundle = path is not None and (path / MANIFEST_NAME).exists()
    backend = options.get("backend", "ort" if is_bundle else "compile")
    if backend not in ("compile", "eager", "ort"):
        raise ValueError(f"backend is {backend!r}; it must be compile, eager or ort")
    if backend == "ort" and path is None:
        raise ValueError("backend ort runs bundles; llamac export a model first")
    if "speculate" in options:
        parse_speculate(options["speculate"])  # refused before long work
    if backend == "ort" and "tensor_parallel" in options:
        raise ValueError(
            "a bundle runs in one process; tensor_parallel is an option of checkpoints"
        )
    others = _OF_CHECKPOINTS if backend == "ort" else _OF_BUNDLES
    if wrong := sorted(others & options.keys()):
        remedy = "what an export fixed" if backend == "ort" else "an option of bundles"
        raise ValueError(f"{wrong[0]} is {remedy}; backend {backend} goes without it")
    if backend == "ort":
        assert path is not None
        manifest = open_bundle(path, check=options.get("check", False))
        if (speculate := options.get("speculate")) is not None:
            check_exported(speculate, manifest.shape.num_guesses)
        return Source(folder=manifest.folder, manifest=manifest, checkpoint=None, options=options)
    from ..model.checkpoint import open_checkpoint
    from ..model.load import DEMO_FOLDER

    if (recipe := options.get("quantize")) is not None:
        from ..model.quantization import parse_recipe

        parse_recipe(recipe)
    name = DEMO_FOLDER if source is None else source
    checkpoint = open_checkpoint(name, adapter=options.get("adapter"))
    return Source(
        folder=checkpoint.side_folder, manifest=None, checkpoint=checkpoint, options=options
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """An open checkpoint or bundle, and how to load it.

    Attributes:
        folder: Where the tokenizer's files are.
        manifest: The bundle, or None.
        checkpoint: The checkpoint, or None.
        options: See LoadOptions.
    """

    folder: Path
    manifest: Manifest | None
    checkpoint: Checkpoint | None
    options: LoadOptions

    def shape(self, *, default_batch: int = 1) -> StaticShape:
        """The backend's sizes.

        Args:
            default_batch: B where the options name none; a bundle has its own.

        Raises:
            ValueError: The options contradict each other.
        """
        if self.manifest is not None:
            return self.manifest.shape
        from ..model.load import static_shape

        assert self.checkpoint is not None
        return static_shape(
            self.checkpoint.config,
            batch_size=self.options.get("batch_size", default_batch),
            max_seq_len=self.options.get("max_seq_len"),
            prefill_len=self.options.get("prefill_len"),
        )

    def sampling_defaults(self) -> RequestOptions:
        """The sampling settings in the source's generation_config.json.

        Returns:
            What it names; `do_sample: false` is temperature 0.

        Raises:
            ValueError: A setting is none.
        """
        path = self.folder / "generation_config.json"
        stated = read_json(path, optional=True)
        found: dict[str, Any] = {
            key: stated[key] for key in SAMPLING_KEYS if stated.get(key) is not None
        }
        if stated.get("do_sample") is False:
            found["temperature"] = 0.0
        wrong = [key for key, value in found.items() if type(value) not in (int, float)]
        try:
            if wrong:
                raise ValueError(f"{wrong[0]} is {found[wrong[0]]!r:.60}; it must be a number")
            SamplingParams(**found)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return RequestOptions(**found)

    def load(
        self,
        *,
        tokenizer: Tokenizer | None = None,
        default_batch: int = 1,
        all_logits: bool = False,
        generation_config: bool = True,
        keep_prefixes: bool = False,
        adaptive: bool = False,
        template: ChatTemplate | None = None,
        announce: Callable[[str], None] = logger.info,
        progress: Callable[[str], None] = lambda _: None,
    ) -> LanguageModel:
        """Loads it; see the function.

        Args:
            tokenizer: The source's, if it was loaded before.
            default_batch: See shape.
            all_logits: Whether a checkpoint's backend can `score`.
            generation_config: As for the function.
            keep_prefixes: As for the function.
            adaptive: See Scheduler.
            template: Used instead of the source's own.
            announce: As for the function.
            progress: As for the function.

        Returns:
            The model.
        """
        tokenizer = load_tokenizer(self.folder) if tokenizer is None else tokenizer
        defaults = self.sampling_defaults() if generation_config else RequestOptions()
        if SamplingParams(**defaults) != SamplingParams():  # type: ignore[arg-type]
            stated = ", ".join(f"{key} {value}" for key, value in defaults.items())
            announce(f"sampling by the model's generation_config.json: {stated}")
        if self.manifest is not None:
            backend, name, startup = self._open_bundle(progress)
        else:
            shape = self.shape(default_batch=default_batch)
            if adaptive:
                shape = replace(shape, mixed_lens=mixed_lens(shape.batch_size))
            backend, name, startup = self._load_checkpoint(shape, all_logits, announce, progress)
        return LanguageModel(
            backend,
            tokenizer,
            folder=self.folder,
            template=template,
            name=name,
            startup=startup,
            defaults=defaults,
            keep_prefixes=keep_prefixes,
            adaptive=adaptive,
        )

    def _open_bundle(self, progress: Callable[[str], None]) -> tuple[Any, str, dict[str, Any]]:
        from .ort.ort_backend import OrtBackend

        assert self.manifest is not None
        kept = _OF_BUNDLES - {"check"} | {"threads"}
        chosen: dict[str, Any] = {k: v for k, v in self.options.items() if k in kept}
        speculate = self.options.get("speculate") is not None
        backend = OrtBackend(self.manifest, speculate=speculate, progress=progress, **chosen)
        return backend, f"ort-{backend.provider}/{backend.target}", {"load_s": backend.load_s}

    def _load_checkpoint(
        self,
        shape: StaticShape,
        all_logits: bool,
        announce: Callable[[str], None],
        progress: Callable[[str], None],
    ) -> tuple[Any, str, dict[str, Any]]:
        from ..model.load import load_backend

        checkpoint = self.checkpoint
        if (recipe := self.options.get("quantize")) is not None:
            from ..model.quantization import parse_recipe, quantized_copy

            assert checkpoint is not None
            checkpoint = quantized_copy(checkpoint, parse_recipe(recipe), progress=progress)
        kind = self.options.get("backend", "compile")
        device = self.options.get("device", "cpu")
        loaded = load_backend(
            checkpoint,
            compile=kind == "compile",
            device=device,
            dtype=self.options.get("dtype"),
            kv_dtype=self.options.get("kv_dtype"),
            batch_size=shape.batch_size,
            max_seq_len=shape.max_seq_len,
            prefill_len=self.options.get("prefill_len"),
            num_guesses=parse_speculate(self.options.get("speculate")),
            mixed_lens=shape.mixed_lens,
            threads=self.options.get("threads"),
            tensor_parallel=self.options.get("tensor_parallel", 1),
            all_logits=all_logits,
            announce=announce,
            progress=progress,
        )
        startup = loaded.backend.startup
        facts = {
            "load_s": loaded.load_s,
            "compile_s": startup.compile_s if startup.cache_hit is not None else None,
            "compile_cache_hit": startup.cache_hit,
            "warmup_s": startup.warmup_s,
        }
        ranks = self.options.get("tensor_parallel", 1)
        name = f"torch-{kind}/{device}" + (f" x {ranks}" if ranks > 1 else "")
        return loaded.backend, name, facts
