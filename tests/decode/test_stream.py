"""Text comes out whole, however tokens cut it."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import make_tokenizer
from tokenizers_of_families import TEXT, TOKENIZERS, tokenizer_of

from gmsa.decode.stream import TextPieces
from gmsa.text import encode


def said(text: str, stops: list[str]) -> tuple[list[str], bool]:
    tokenizer = make_tokenizer()
    pieces = TextPieces(tokenizer, stops)
    out = []
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:  # one per byte
        out.append(pieces.add(token))
        if pieces.stopped:
            return out, True
    return [*out, pieces.finish()], pieces.stopped


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=4), max_size=3))
def test_pieces_are_the_text_up_to_the_first_stop(text: str, stops: list[str]) -> None:
    pieces, stopped = said(text, stops)
    ends = [text.find(stop) for stop in stops if stop in text]
    assert stopped == bool(ends)
    if not ends:
        assert "".join(pieces) == text
    else:  # a stop that is complete earlier wins over one that begins earlier
        first = min(text.find(stop) + len(stop) for stop in stops if stop in text)
        assert "".join(pieces) == text[: min(text[:first].find(s) for s in stops if s in text[:first])]


def test_characters_and_possible_stops_are_held_back() -> None:
    assert said("a😀b", [])[0] == ["a", "", "", "", "😀", "b", ""]
    assert said("xENyEND", ["END"]) == (["x", "", "", "ENy", "", "", ""], True)
    assert said("xEN", ["END"]) == (["x", "", "", "EN"], False)


CODE = "    x = width * height\n    y = x + 1\n"
WHITE = st.sampled_from([" ", "    ", "\n", "\r\n", "\t", "x", "if", "水", "🎉", ".", "<|im_end|>"])


@pytest.mark.parametrize("family", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(st.lists(WHITE, max_size=14).map("".join))
@example(CODE)
@example(TEXT)
def test_a_stream_is_the_whole_in_every_family(family: str, text: str) -> None:
    tokenizer = tokenizer_of(family)
    ids = encode(tokenizer, text)
    pieces = TextPieces(tokenizer)
    streamed = "".join([*map(pieces.add, ids), pieces.finish()])
    assert streamed == tokenizer.decode(ids, skip_special_tokens=True)
