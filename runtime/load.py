"""From a bundle's folder to a model that is ready to generate."""

from __future__ import annotations

from pathlib import Path

from .bundle.manifest import Manifest, open_bundle
from .language_model import LanguageModel
from .ort.ort_backend import OrtBackend
from .text.tokenizer_files import load_tokenizer

__all__ = ["load"]


def load(bundle: Manifest | str | Path, **options: object) -> LanguageModel:
    """Loads a bundle with its tokenizer; the shortest way to text without torch.

    Args:
        bundle: The bundle or its folder.
        options: As for OrtBackend.

    Returns:
        The model, ready to generate.

    Raises:
        FileNotFoundError: There is no bundle, or it has no tokenizer.
        ValueError: The bundle is damaged, or an option is refused; the message says why.
        BackendUnavailableError: The machine lacks what the provider needs, or the memory.
    """
    manifest = bundle if isinstance(bundle, Manifest) else open_bundle(bundle)
    tokenizer = load_tokenizer(manifest.folder)
    backend = OrtBackend(manifest, **options)  # type: ignore[arg-type]
    return LanguageModel(backend=backend, tokenizer=tokenizer)
