"""Token ids of texts of any length, in bounded memory: piece by piece, the same as in one go."""

from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from gmsa.errors import InputError

PIECE = 1 << 16  # characters tokenised at once
OVERLAP = 1 << 10  # characters that two neighbouring pieces share
Token = tuple[int, int]  # its id, and at which character of the text it begins


def token_pieces(
    tokenizer: PreTrainedTokenizerBase, text: str, piece: int = PIECE, overlap: int = OVERLAP
) -> Iterator[list[int]]:
    """Token ids of a text, without special tokens, in pieces that join to what the tokenizer makes of the whole.

    Pieces overlap and are joined within the overlap, where both have the same tokens at the same places. As long as
    they do not agree, the earlier one is made longer; a text whose pieces never agree is thus tokenised as a whole.

    Args:
        tokenizer: a slow one, which does not tell where its tokens stand, takes every text whole.
        text: any.
        piece: characters tokenised at once.
        overlap: characters that neighbouring pieces share; fewer than `piece`.

    Yields:
        The ids of each piece.
    """
    if len(text) <= piece or not tokenizer.is_fast:
        yield tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return

    def read(start: int, end: int) -> list[Token]:
        found = tokenizer(text[start:end], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [(i, start + first) for i, (first, _) in zip(found["input_ids"], found["offset_mapping"], strict=True)]

    start, end, joint = 0, piece, 0  # the piece is text[start:end]; what stands before joint has been yielded
    tokens = read(start, end)
    while end < len(text):
        next_start, next_end = end - overlap, min(len(text), end - overlap + piece)
        following = read(next_start, next_end)
        found = _joint(tokens, following, next_start + overlap // 4, end - overlap // 4)
        if found is None:
            end = next_end
            tokens = [token for token in read(start, end) if token[1] >= joint]
            continue
        yield [i for i, place in tokens if place < found]
        joint = found
        start, end, tokens = next_start, next_end, [token for token in following if token[1] >= joint]
    yield [i for i, _ in tokens]


def _joint(left: list[Token], right: list[Token], start: int, end: int) -> int | None:
    """Where to pass from one piece to the next: amid tokens that both have between these characters."""
    both = [[token for token in tokens if start <= token[1] < end] for tokens in (left, right)]
    if not both[0] or both[0] != both[1]:
        return None
    return both[0][len(both[0]) // 2][1]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text, in which no spelling is a special token and around which none is put."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def check_text(value: object, what: str) -> str:
    """The value, if it is a text.

    Raises:
        InputError: it is something else.
    """
    if not isinstance(value, str):
        raise InputError(f"{what} must be a text, got a {type(value).__name__}")
    return value
