"""Long texts: tokens in pieces, windows in batches, and that both change nothing about the memory."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from gmsa import GMSA
from gmsa import api as engine
from gmsa.errors import InputError
from gmsa.io.backbones import Backbone
from gmsa.io.loading import GmsaModel
from gmsa.model.backbone import layers_of
from gmsa.model.windows import Window, batch_windows, cut_windows, split_windows
from gmsa.text import token_pieces

WORDS = "The mill, built in 1731 by two brothers, stands by the river still:  it's  their heirs' own. "
TEXT = (
    WORDS * 3
    + "Ein Müller – naïve, œuvre; 水車小屋は川のそばに立つ。 🎉🎉👩‍👩‍👧\n\n\t\tx = {1: [2, 3]}\n"
    + "ha" * 40
    + " "
) * 6


def trained_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A small BPE tokenizer of one of the kinds that families use, trained on the text itself."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    if kind == "byte-level":  # GPT-2, Llama 3, Qwen, SmolLM
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:  # Llama 2, Mistral, Gemma: a mark in place of spaces, also before the first word
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        alphabet = []
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.fixture(scope="module", params=["byte-level", "metaspace", "bytes"])
def any_tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return make_tokenizer() if request.param == "bytes" else trained_tokenizer(request.param)


@pytest.mark.parametrize(("piece", "overlap"), [(150, 60), (401, 100), (1000, 200), (10_000, 100)])
def test_pieces_join_to_the_tokens_of_the_whole(
    any_tokenizer: PreTrainedTokenizerFast, piece: int, overlap: int
) -> None:
    whole = any_tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    pieces = list(token_pieces(any_tokenizer, TEXT, piece, overlap))
    assert [token for part in pieces for token in part] == whole
    assert len(pieces) > 1 or piece > len(TEXT)


def test_a_text_whose_pieces_never_agree_is_taken_whole() -> None:
    # "aaa" is a token, so where the tokens stand depends on how many letters come before: 100 is no multiple of 3.
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "aa": 1, "aaa": 2}, merges=[("a", "a"), ("aa", "a")]))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    text = "a" * 1000
    pieces = list(token_pieces(fast, text, 120, 20))
    assert [token for part in pieces for token in part] == fast(text)["input_ids"]


@pytest.fixture(scope="module")
def make_gmsa(
    tiny_backbone: Callable[..., Backbone], tiny_model: Callable[..., GmsaModel]
) -> Callable[[int | None], GMSA]:
    return lambda window: GMSA(tiny_model("llama", system_prompt="", window_size=window), tiny_backbone("llama"))


def by_hand(gmsa: GMSA, tokens: list[int], size: int) -> Tensor:
    """Soft tokens of one window, straight from the definition: sink, encoder layers, mean of every group, LSA."""
    compressor = gmsa.model.compressor
    encoder = compressor.encoder
    states = encoder.get_input_embeddings()(torch.tensor([[compressor.sink_id, *tokens]]))
    length = states.shape[1]
    mask = torch.full((1, 1, length, length), -torch.inf).triu(1)
    around = encoder.rotary_emb(states, torch.arange(length)[None])
    for layer in layers_of(encoder):
        states = layer(states, attention_mask=mask, position_embeddings=around)
        states = states[0] if isinstance(states, tuple) else states
    groups = torch.stack([group.mean(0) for group in states[0, 1:].split(size)])
    return compressor.lsa(groups[None])[0]


@pytest.mark.parametrize("window", [16, 40, None])
@pytest.mark.parametrize("size", [1, 3, 8])
@torch.no_grad()
def test_windowed_equals_manual(make_gmsa: Callable[[int | None], GMSA], window: int | None, size: int) -> None:
    gmsa = make_gmsa(window)
    text = WORDS * 2
    tokens = gmsa.encoder_tokenizer(text, add_special_tokens=False)["input_ids"]
    windows = [tokens[i : i + window] for i in range(0, len(tokens), window)] if window else [tokens]
    expected = torch.cat([by_hand(gmsa, w, size) for w in windows])
    memory = gmsa.compress(text, size, batch_size=3)
    torch.testing.assert_close(memory.soft_tokens, expected, rtol=1e-4, atol=1e-4)
    # No group holds tokens of two windows.
    assert len(memory) == sum(-(-len(w) // size) for w in windows)


def test_cost_is_linear_and_memory_bounded(
    make_gmsa: Callable[[int | None], GMSA], monkeypatch: pytest.MonkeyPatch
) -> None:
    gmsa = make_gmsa(16)
    shapes: list[torch.Size] = []
    real = GmsaModel.compress

    def note(self: GmsaModel, ids: Tensor, *rest: Tensor) -> list[Tensor]:
        shapes.append(ids.shape)
        return real(self, ids, *rest)

    monkeypatch.setattr(GmsaModel, "compress", note)
    monkeypatch.setattr(engine, "token_pieces", lambda *a: token_pieces(*a, piece=100, overlap=20))
    for length in (160, 1600, 6400):
        shapes.clear()
        memory = gmsa.compress("x" * (length + 5), 4, batch_size=4)
        assert memory.origin_tokens == length + 5
        assert all(rows <= 4 and columns <= 16 for rows, columns in shapes)
        assert sum(shape.numel() for shape in shapes) <= length + 5 + 16  # padding of the last window alone


def test_texts_in_pieces_and_whole_give_the_same_memories(
    make_gmsa: Callable[[int | None], GMSA], monkeypatch: pytest.MonkeyPatch
) -> None:
    gmsa = make_gmsa(16)
    texts = [TEXT[:700], "short", TEXT[100:420], "x" * 32]
    whole = gmsa.compress(texts, 3)
    monkeypatch.setattr(engine, "token_pieces", lambda *a: token_pieces(*a, piece=100, overlap=20))
    for one, other in zip(gmsa.compress(texts, 3, batch_size=2), whole, strict=True):
        assert one.origin_tokens == other.origin_tokens
        torch.testing.assert_close(one.soft_tokens, other.soft_tokens, rtol=1e-4, atol=1e-4)


def test_a_text_without_tokens(make_gmsa: Callable[[int | None], GMSA], monkeypatch: pytest.MonkeyPatch) -> None:
    gmsa = make_gmsa(16)
    monkeypatch.setattr(engine, "token_pieces", lambda _, text: iter([[1] * text.count("x")]))
    assert len(gmsa.compress("xx", 1)) == 2
    with pytest.raises(InputError, match="at place 1 has no tokens"):
        gmsa.compress(["x", "y"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=8), st.one_of(st.none(), st.integers(1, 12)))
def test_windows_of_pieces_are_windows_of_the_whole(lengths: list[int], size: int | None) -> None:
    tokens = list(range(sum(lengths)))
    pieces, start = [], 0
    for length in lengths:
        pieces.append(tokens[start : start + length])
        start += length
    assert list(cut_windows(pieces, size)) == split_windows(tokens, size)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(1, 12), st.integers(1, 5))
def test_batches_hold_every_window_once_and_little_padding(lengths: list[int], size: int, batch_size: int) -> None:
    windows = [Window(row, w) for row, n in enumerate(lengths) for w in split_windows(range(n), size)]
    batches = list(batch_windows(windows, size, batch_size))
    found = [window for batch in batches for window in batch]
    assert len(found) == len(windows)
    for row, length in enumerate(lengths):  # those of a row in order
        assert [t for window in found if window.row == row for t in window.tokens] == list(range(length))
    for batch in batches:
        positions = [len(window.tokens) for window in batch]
        assert len(batch) * max(positions) <= batch_size * size
    # Sorted by length, so that a batch pads to its own longest alone: at most one size more than its own.
    short = [len(window.tokens) for batch in batches for window in batch if len(window.tokens) < size]
    assert short == sorted(short, reverse=True)


def test_without_windows_batches_hold_so_many_texts() -> None:
    windows = [Window(row, [0] * length) for row, length in enumerate([5, 90, 7, 80, 6])]
    assert [[w.row for w in batch] for batch in batch_windows(windows, None, 2)] == [[1, 3], [2, 4], [0]]
