"""Text to token ids and back, whole or one id at a time.

A loaded tokenizer is a table from id to bytes and one encoding function, so whole and streamed
decoding are the same computation: join bytes, drop the space the format put in front, read UTF-8.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["StreamDecoder", "Tokenizer", "check_text"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizer:
    """A tokenizer of any format.

    Attributes:
        encoder: Text and whether special-token text is parsed, to ids; never adds a BOS.
        pieces: The bytes of each id; ids that are missing decode to nothing.
        bos_id: The id that begins a sequence, if the checkpoint names one.
        eos_ids: Every id that ends one, in the order the files name them.
        special_ids: Ids with no text, skipped by decode.
        special_names: The id of each special token's text, for stop texts and warnings.
        adds_bos: False where the checkpoint's files say that prompts go without a BOS.
        leading_spaces: Spaces the format may put before a text, which decode takes off again.
        replace_each_byte: Whether U+FFFD stands for each invalid byte (SentencePiece) or for each
            longest invalid sequence (byte-level BPE).
        vocab_size: Number of ids; an id at or past it does not exist.
    """

    encoder: Callable[[str, bool], list[int]]
    pieces: Mapping[int, bytes]
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    special_ids: frozenset[int] = frozenset()
    special_names: Mapping[str, int] = field(default_factory=dict)
    adds_bos: bool = True
    leading_spaces: int = 0
    replace_each_byte: bool = False
    vocab_size: int = field(init=False)

    def __post_init__(self) -> None:
        """Derives vocab_size: ids may have holes, so it is not the number of pieces."""
        object.__setattr__(self, "vocab_size", max(self.pieces, default=-1) + 1)

    def encode(self, text: str, *, bos: bool = True, special: bool = False) -> list[int]:
        """Encodes text.

        Args:
            text: The text.
            bos: Begin with one BOS, unless the checkpoint has none or says `add_bos_token: false`.
            special: Parse the text of special tokens, as in a rendered chat template (which holds
                its own BOS). False leaves it text, so that a prompt cannot forge one.

        Returns:
            Token ids, each below vocab_size.

        Raises:
            ValueError: The text holds half a character (a surrogate), or its library failed.
        """
        check_text(text)
        ids = self.encoder(text, special)
        if bos and self.adds_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def specials_in(self, text: str) -> list[str]:
        """Finds special tokens' texts, which `encode(text)` leaves text.

        Args:
            text: A prompt.

        Returns:
            Each that occurs, once, in the order of first occurrence.
        """
        return sorted((name for name in self.special_names if name in text), key=text.find)

    def decode(self, ids: Sequence[int]) -> str:
        """Decodes ids, special ones skipped; invalid or incomplete UTF-8 becomes U+FFFD.

        Valid characters beside an invalid byte are kept, where `tokenizers` replaces a whole run
        of byte-fallback tokens: text that was streamed out cannot be taken back.

        Args:
            ids: Token ids, with or without a BOS.

        Returns:
            The text.

        Raises:
            ValueError: An id does not exist.
        """
        text = _Utf8(self)
        return text.feed(ids) + text.finish()

    def token_bytes(self, token_id: int) -> bytes:
        """Returns the bytes one id adds to the text, none for a special id.

        Raises:
            ValueError: The id does not exist.
        """
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(
                f"token id is {token_id}; the tokenizer's ids are 0 to {self.vocab_size - 1}"
            )
        return b"" if token_id in self.special_ids else self.pieces.get(token_id, b"")


def check_text(text: str) -> None:
    """Refuses what no UTF-8 file holds.

    Args:
        text: A prompt or a rendered template.

    Raises:
        ValueError: It holds a surrogate, as bytes that aren't UTF-8 leave behind.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text is not UTF-8: character {error.start} is U+{ord(text[error.start]):04X}, "
            "half a character; convert it"
        ) from None


class StreamDecoder:
    """Turns one generated id at a time into text that never has to be taken back.

    All text returned, flush included, is `decode(prompt + new)[len(decode(prompt)):]`, up to the
    first stop string. A character that the prompt left incomplete belongs to the new text. What
    is held back is at most 3 bytes and the longest stop string; each token costs its own length.

    Attributes:
        stopped: A stop string was completed; no more text comes.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str] = ()
    ) -> None:
        """Starts after a prompt.

        Args:
            tokenizer: Decodes the ids.
            prompt_ids: The ids before the first new one.
            stop: Texts that end the stream. The first one completed counts, of those completed by
                the same character the longest.

        Raises:
            ValueError: A stop string is empty, `stop` is one string, or a prompt id does not exist.
        """
        if isinstance(stop, str) or "" in stop:
            raise ValueError(f"stop is {stop!r}; give a list of texts, none of them empty")
        self.stopped = False
        self._stop = tuple(stop)
        self._held = ""
        self._text = _Utf8(tokenizer)
        self._text.feed(prompt_ids)

    def push(self, token_id: int) -> str:
        """Takes the next id.

        Args:
            token_id: The id; a special one adds no text.

        Returns:
            The text that is now certain, often empty; always empty once stopped.

        Raises:
            ValueError: The id does not exist.
        """
        return self._release(self._text.feed((token_id,)))

    def flush(self) -> str:
        """Ends the stream.

        Returns:
            The rest of the text, an incomplete character as U+FFFD. A second call returns nothing.
        """
        rest = self._release(self._text.finish()) + self._held
        self._held = ""
        return rest

    def _release(self, text: str) -> str:
        if self.stopped or not text:
            return ""
        held = self._held + text
        matches = [(held.find(stop) + len(stop), held.find(stop)) for stop in self._stop]
        matches = [match for match in matches if match[1] >= 0]
        if matches:
            self.stopped, self._held = True, ""
            return held[: min(matches)[1]]
        # The longest end of the text that some stop string could still begin with.
        longest = max(map(len, self._stop), default=1) - 1
        cut = next(
            (
                start
                for start in range(max(0, len(held) - longest), len(held))
                if any(stop.startswith(held[start:]) for stop in self._stop)
            ),
            len(held),
        )
        self._held = held[cut:]
        return held[:cut]


class _Utf8:
    """Ids to text piece by piece, holding back an incomplete character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        errors = "surrogateescape" if tokenizer.replace_each_byte else "replace"
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors)
        self._token_bytes = tokenizer.token_bytes
        self._spaces = tokenizer.leading_spaces

    def feed(self, ids: Iterable[int]) -> str:
        data = b"".join(map(self._token_bytes, ids))
        while self._spaces and data.startswith(b" "):
            data = data[1:]
            self._spaces -= 1
        if data:
            self._spaces = 0
        return self._mark(self._decoder.decode(data))

    def finish(self) -> str:
        return self._mark(self._decoder.decode(b"", final=True))

    def _mark(self, text: str) -> str:
        # surrogateescape leaves one surrogate for each invalid byte.
        return re.sub("[\udc80-\udcff]", "\ufffd", text)
