"""From tokens, one at a time, to pieces of text that can be sent: whole characters, cut at stop strings."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

REPLACEMENT = "�"  # what a tokenizer writes for bytes that are no whole character yet


class TextPieces:
    """Decodes one answer as its tokens arrive.

    Args:
        tokenizer: the decoder's.
        stops: strings that end the answer; the text stops before the first of them.
        skip_special_tokens: whether these are left out.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = (), skip_special_tokens: bool = True
    ) -> None:
        self.tokenizer = tokenizer
        self.skip_special_tokens = skip_special_tokens
        self.stops = [stop for stop in stops if stop]
        self.stopped = False
        self._tokens: list[int] = []
        # Tokens before `_read` have been turned into text; those from `_context` on are decoded along with new ones,
        # because some tokenizers write a token differently at the start of a text.
        self._context = self._read = 0
        self._held = ""  # decoded, but may be the beginning of a stop string

    def add(self, token: int) -> str:
        """The text that this token completes, which may be none."""
        self._tokens.append(token)
        return self._release(self._fresh(final=False), final=False)

    def finish(self) -> str:
        """What was held back."""
        return self._release(self._fresh(final=True), final=True)

    def _fresh(self, final: bool) -> str:
        known = self._decode(self._tokens[self._context : self._read])
        text = self._decode(self._tokens[self._context :])
        # The last bytes may be the beginning of a character, for which some tokenizers write nothing at all.
        if not final and (text.endswith(REPLACEMENT) or text == known):
            return ""
        self._context, self._read = self._read, len(self._tokens)
        return text[len(known) :]

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=self.skip_special_tokens)

    def _release(self, fresh: str, final: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + fresh
        found = [at for at in (text.find(stop) for stop in self.stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = 0 if final else max((_overlap(text, stop) for stop in self.stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """The longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
