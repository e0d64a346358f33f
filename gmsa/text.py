"""What a text is, and how it becomes tokens: a user's text is text, whatever it spells.

Tokenizers turn some spellings ("<|im_end|>", "<filename>") into tokens that end turns or are dropped when text is
written. Here only what a template itself writes becomes such a token; everywhere else the spelling is read as letters.
"""

import math
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from os import PathLike
from typing import TYPE_CHECKING, Any
from unicodedata import combining
from weakref import WeakKeyDictionary

from gmsa.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIECE = 1 << 16  # characters tokenised at once
OVERLAP = 1 << 10  # characters that two neighbouring pieces share
HALF_SURROGATE = re.compile("[\ud800-\udfff]")
Token = tuple[int, int]  # its id, and at which character of the text it begins


# -- what a text is ----------------------------------------------------------------------------------------------------


def check_text(value: Any, what: str = "the text") -> str:
    """The value, if it is a text: a `str` of whole characters. Every character is legal, NUL too.

    Raises:
        InputError: it is something else, or holds half a surrogate pair (a byte that was never decoded, for example).
    """
    if not isinstance(value, str):
        raise InputError(f"{what} must be a text (str), got {_described(value)}")
    if found := HALF_SURROGATE.search(value):
        raise InputError(
            f"{what} holds half a surrogate pair ({found[0]!r}) at character {found.start()}, so it is no text: "
            "decode it properly first"
        )
    return value


def check_texts(values: Any, what: str = "the texts") -> list[str]:
    """The texts of any sequence of them; a text alone, a mapping or a path is none.

    Raises:
        InputError: it is no sequence, or one of it is no text; names its place.
    """
    if isinstance(values, str | bytes | bytearray | Mapping | PathLike) or not isinstance(values, Iterable):
        raise InputError(f"{what} must be a list of texts (str), got {_described(values)}")
    return [check_text(value, f"{what}: number {number}") for number, value in enumerate(values, start=1)]


def _described(value: Any) -> str:
    """What a value that is no text is, and what to do about it."""
    if value is None:
        return "None"
    if isinstance(value, PathLike):
        return f"a path, {str(value)!r}: read the file first (Path.read_text)"
    if isinstance(value, bytes | bytearray | memoryview):
        return f"{type(value).__name__}: decode them first (.decode())"
    if isinstance(value, Mapping):
        return f"a mapping ({type(value).__name__}): give its values"
    return f"{value!r} ({type(value).__name__})" if isinstance(value, bool | int | float) else type(value).__name__


# -- tokens ------------------------------------------------------------------------------------------------------------


def encode(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Token ids of a user's text; none of them steers a model, whatever the text spells.

    Special tokens are split by the tokenizer (`split_special_tokens`). Some tokenizers find their spelling all the
    same: word for word in a vocabulary that lists it (slow ones, Unigram), or because a token that the chat template
    writes is not marked as special ("<think>"). Such a token is replaced by those of its own letters, so that the text
    is still there in full.

    Args:
        tokenizer: slow or fast.
        text: any.
    """
    ids, unknown = _plain(tokenizer, text), tokenizer.unk_token
    if unknown and unknown in text and tokenizer.unk_token_id in ids:
        # Of an unknown letter, or of a text that spells the token for them: cut inside the spelling, only letters are.
        first, *others = re.split(f"(?<={re.escape(unknown[:1])})(?={re.escape(unknown[1:])})", text)
        ids = _plain(tokenizer, first)
        for part in others:
            ids += _inside(tokenizer, part)
    return _spelled_out(tokenizer, ids)


def encode_rendered(tokenizer: "PreTrainedTokenizerBase", run: Sequence[tuple[str, bool]]) -> list[int]:
    """Token ids of a prompt, in which the template's own marks steer the model and the users' texts do not.

    The ids are those of the whole prompt, tokenised in one go, unless a user's text holds the spelling of a mark (or
    completes one). There, and only there, the prompt is cut after the spelling's first letter and both sides are
    tokenised on their own.

    Args:
        tokenizer: slow or fast.
        run: texts that follow one another, each with whether it is the template's own.
    """
    whole, cuts = "".join(text for text, _ in run), [0]
    users = _users_spans(run)
    for start, end in _spellings(tokenizer, whole) if users else []:
        if any(start < to and end > begin for begin, to in users):
            cuts.append(start + 1)
    parts = [whole[start:end] for start, end in zip(cuts, [*cuts[1:], len(whole)], strict=True)]
    ids = _plain(tokenizer, parts[0], split=False)
    for part in parts[1:]:
        ids += _inside(tokenizer, part, split=False)
    return ids


@dataclass(frozen=True)
class Control:
    """The tokens that steer a model: the special ones, and others that its chat template writes ("<think>")."""

    ids: dict[str, int]  # by their spelling
    spellings: dict[int, str]  # by their id; without a token for unknown letters, which any text may give

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase") -> "Control":
        """Those of a tokenizer, gathered once as long as it stays as it is."""
        state = tokenizer.chat_template, len(tokenizer)
        kept = _CONTROL.get(tokenizer)
        if kept is not None and kept[0] == state:
            return kept[1]
        template = str(tokenizer.chat_template or "")
        ids = {token: tokenizer.convert_tokens_to_ids(token) for token in tokenizer.all_special_tokens}
        for number, token in tokenizer.added_tokens_decoder.items():
            spelling = token.content
            # Templates hold words and white space, which some tokenizers add as tokens, too.
            written = spelling in template and not spelling.isspace() and not spelling.isalnum()
            if token.special or written:
                ids[spelling] = number
        spellings = {number: spelling for spelling, number in ids.items()}
        roles = {role: str(token) for role, token in tokenizer.special_tokens_map.items()}
        unknown = roles.pop("unk_token", None)
        roles.pop("pad_token", None)  # often the unknown one by another name
        if unknown is not None and unknown not in roles.values():
            spellings.pop(ids[unknown], None)
        _CONTROL[tokenizer] = state, cls(ids, spellings)
        return _CONTROL[tokenizer][1]


_CONTROL: WeakKeyDictionary[Any, tuple[Any, Control]] = WeakKeyDictionary()


def _plain(tokenizer: "PreTrainedTokenizerBase", text: str, split: bool = True) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=split, verbose=False)["input_ids"]


def _inside(tokenizer: "PreTrainedTokenizerBase", text: str, split: bool = True) -> list[int]:
    """Token ids of a text that goes on from another: without the space that some tokenizers put before a text."""
    line_end = _plain(tokenizer, "\n", split)
    ids = _plain(tokenizer, f"\n{text}", split)
    return ids[len(line_end) :] if ids[: len(line_end)] == line_end else _plain(tokenizer, text, split)


def _spelled_out(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> list[int]:
    """The same tokens, each that steers a model replaced by the tokens of its letters."""
    spellings = Control.of(tokenizer).spellings
    if spellings.keys().isdisjoint(ids):
        return ids
    found: list[int] = []
    for token in ids:
        found += _letters(tokenizer, spellings[token]) if token in spellings else [token]
    return found


def _letters(tokenizer: "PreTrainedTokenizerBase", spelling: str) -> list[int]:
    """Tokens of a spelling that do not include the token it spells: its first letter and the rest, or all letters."""
    steers = Control.of(tokenizer).spellings
    for parts in ([spelling[:1], spelling[1:]], list(spelling)):
        ids = [token for part in parts if part for token in _inside(tokenizer, part)]
        if steers.keys().isdisjoint(ids):
            break
    return [token for token in ids if token not in steers]


def _spellings(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[tuple[int, int]]:
    """(start, end) of the spelling of every token that steers a model, overlapping ones too, in order."""
    known = sorted(Control.of(tokenizer).ids, key=len, reverse=True)
    if not known:
        return []
    pattern = re.compile(f"(?=({'|'.join(map(re.escape, known))}))")
    return [found.span(1) for found in pattern.finditer(text)]


def _users_spans(run: Sequence[tuple[str, bool]]) -> list[tuple[int, int]]:
    """From which character to which the texts stand that are not the template's."""
    spans, at = [], 0
    for text, own in run:
        if text and not own:
            spans.append((at, at + len(text)))
        at += len(text)
    return spans


# -- long texts --------------------------------------------------------------------------------------------------------


def token_pieces(
    tokenizer: "PreTrainedTokenizerBase", text: str, piece: int = PIECE, overlap: int = OVERLAP
) -> Iterator[list[int]]:
    """Token ids of a user's text of any length, in bounded memory: pieces that join to what `encode` makes of it.

    Pieces overlap and are joined within the overlap, where both have the same tokens at the same places. As long as
    they do not agree, inside a word longer than the overlap (a run of spaces, say), the earlier one is made twice as
    long. So a text's characters are read five times at most, whatever it holds.

    Args:
        tokenizer: a slow one, which does not tell where its tokens stand, takes every text whole.
        text: any.
        piece: characters tokenised at once.
        overlap: characters that neighbouring pieces share; fewer than `piece`.

    Yields:
        The ids of each piece. They give the whole text, always, and are those of `encode` wherever what follows a
        word more than `overlap / 4` characters on has no say in how it is split. That holds for byte-pair encoding
        with any vocabulary in use; with a Unigram model a run of one letter may be split at other places.
    """
    if len(text) <= piece or not tokenizer.is_fast:
        yield encode(tokenizer, text)
        return
    start, end, joint = 0, piece, 0  # the piece is text[start:end]; what stands before joint has been yielded
    tokens = _read(tokenizer, text, start, end)
    while end < len(text):
        next_start = end - overlap
        next_end = min(len(text), next_start + piece)
        following = _read(tokenizer, text, next_start, next_end)
        last = min(end - overlap // 4, _settled(text, next_start, end))
        border = _joint(text, tokens, following, next_start + overlap // 4, last)
        if border is None:
            end = min(len(text), start + 2 * (end - start))
            rest = _after(_read(tokenizer, text, start, end), joint)
            if rest is None:  # read further, a token before the joint reaches beyond it: begin at the joint
                start = joint
                rest = _read(tokenizer, text, start, end)
            tokens = rest
            continue
        left, right = border
        yield [token for token, _ in tokens[:left]]
        joint = tokens[left][1]
        start, end, tokens = next_start, next_end, following[right:]
    yield [token for token, _ in tokens]


def _read(tokenizer: "PreTrainedTokenizerBase", text: str, start: int, end: int) -> list[Token]:
    """Tokens of a piece of a text, and where in the text each begins."""
    spellings = Control.of(tokenizer).spellings
    tokens: list[Token] = []
    for before in ["\n", ""] if start else [""]:  # a piece that goes on from another: see _inside
        found = tokenizer(
            before + text[start:end],
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=True,
            verbose=False,
        )
        tokens = []
        for token, (first, _) in zip(found["input_ids"], found["offset_mapping"], strict=True):
            place = start + first - len(before)
            if place >= start:
                letters = _letters(tokenizer, spellings[token]) if token in spellings else [token]
                tokens += [(letter, place) for letter in letters]
        if tokens and tokens[0][1] == start:  # the line end was a token of its own
            break
    return tokens


def _after(tokens: list[Token], joint: int) -> list[Token] | None:
    """The tokens from the one that begins at a character on; None: none does."""
    first = bisect_left(tokens, joint, key=itemgetter(1)) if joint else 0
    return tokens[first:] if not joint or (first < len(tokens) and tokens[first][1] == joint) else None


def _settled(text: str, start: int, end: int) -> int:
    """Up to which character a piece that ends within a text is tokenised as it would be if it went on.

    How a run of white space is split hangs on whether a line ends after it, however far on; accents are sorted (NFC)
    and put together with the letter before them.
    """
    place = end
    while place > start and (text[place - 1].isspace() or combining(text[place - 1])):
        place -= 1
    return place if place == end else place - 1


def _joint(text: str, left: list[Token], right: list[Token], start: int, end: int) -> tuple[int, int] | None:
    """Where to pass from one piece to the next, as a place in both: amid the tokens both have between two characters.

    There a character begins (some are made of several tokens) that is no accent.
    """
    first, other = (bisect_left(tokens, start, key=itemgetter(1)) for tokens in (left, right))
    length = bisect_left(left, end, key=itemgetter(1)) - first
    shared = left[first : first + length]
    if not shared or shared != right[other : bisect_left(right, end, key=itemgetter(1))]:
        return None
    for step in range(max(1, length // 2), length):
        place = shared[step][1]
        if shared[step - 1][1] < place and not combining(text[place]):
            return first + step, other + step
    return None


def finite(value: Any) -> Any:
    """The same with null in place of numbers that JSON has not."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value
