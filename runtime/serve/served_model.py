"""What the front knows of the model that its engines run: names, sizes, tokenizer, template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..backend import StaticShape
from ..language_model import RequestOptions
from ..text.chat_template import ChatTemplate
from ..text.tokenizer import Tokenizer
from ..text.tokenizer_files import load_tokenizer
from .errors import ApiError
from .messages import Ready

__all__ = ["ServedModel"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A model's outside.

    Attributes:
        name: What clients call it.
        shape: The sizes of one engine.
        tokenizer: The checkpoint's.
        template: The checkpoint's, or why there is none.
        defaults: Sampling options of requests that name none.
        created_s: When the server started, in seconds since 1970.
    """

    name: str
    shape: StaticShape
    tokenizer: Tokenizer
    template: ChatTemplate | str
    defaults: RequestOptions
    created_s: int

    @classmethod
    def load(
        cls, ready: Ready, *, name: str | None, template_file: Path | None, created_s: int
    ) -> ServedModel:
        """Loads what belongs to an engine's model.

        Args:
            ready: What the engine said.
            name: What clients call it; None is the name of its folder.
            template_file: Used instead of the checkpoint's chat template.
            created_s: When the server started.

        Raises:
            ValueError: The tokenizer or the template that was named can't be loaded.
        """
        try:
            template: ChatTemplate | str = ChatTemplate.load(ready.folder, template_file)
        except ValueError as error:
            if template_file is not None:
                raise
            template = str(error)
        return cls(
            name=name or ready.folder.resolve().name,
            shape=ready.shape,
            tokenizer=load_tokenizer(ready.folder),
            template=template,
            defaults=ready.defaults,
            created_s=created_s,
        )

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
    ) -> list[int]:
        """Writes a conversation as a prompt's ids.

        Raises:
            ApiError: There is no template, or it refuses the messages.
        """
        if isinstance(self.template, str):
            raise ApiError(400, f"this model can't chat: {self.template}", param="messages")
        try:
            text = self.template.render(messages, tools=tools)
            return self.tokenizer.encode(text, bos=False, special=True)
        except ValueError as error:
            raise ApiError(400, str(error), param="messages") from None

    def check_prompt(self, ids: Sequence[int], param: str) -> None:
        """Refuses a prompt that doesn't fit.

        Raises:
            ApiError: It is empty, too long, or has ids that don't exist.
        """
        if not ids:
            raise ApiError(400, f"{param} has no token; give a text", param=param)
        if len(ids) > self.shape.max_seq_len:
            raise ApiError(
                400,
                f"{param} has {len(ids)} tokens; this model's maximum context length is "
                f"{self.shape.max_seq_len}",
                param=param,
                code="context_length_exceeded",
            )
        size = min(self.shape.vocab_size, self.tokenizer.vocab_size)
        if not 0 <= min(ids) <= max(ids) < size:
            raise ApiError(400, f"{param} has ids outside 0 to {size - 1}", param=param)

    def token_text(self, token_id: int) -> str:
        """A token alone, as log-probabilities name it; a piece of a character by its bytes."""
        tokenizer = self.tokenizer
        if token_id in tokenizer.special_ids:
            names = (name for name, i in tokenizer.special_names.items() if i == token_id)
            return next(names, "")
        raw = tokenizer.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
