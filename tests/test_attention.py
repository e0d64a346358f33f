"""What the decoder attends to before it answers, and how sentences are ranked by it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gmsa import GMSA
from gmsa.api import LOOK_TOKENS
from gmsa.attention import last_attention, share_out
from gmsa.errors import InputError
from gmsa.io.backbones import Backbone
from gmsa.io.loading import GmsaModel
from gmsa.model.backbone import body_of
from gmsa.sentences import bm25, together, with_neighbours

SENTENCES = ["The mill was built in 1731. ", "It burnt down. ", "Larks sing over fields of rye.\n\n", "Bees hum."]
QUESTION = "When was the mill built?"


@pytest.fixture
def gmsa(tiny_model: Callable[..., GmsaModel], tiny_backbone: Callable[..., Backbone]) -> GMSA:
    return GMSA(tiny_model("llama"), tiny_backbone("llama"))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "phi3", "gpt2", "gpt_neox", "gemma3"])
def test_it_is_what_transformers_own_attention_says(tiny_backbone: Callable[..., Backbone], family: str) -> None:
    model = tiny_backbone(family).model
    body = body_of(model)
    embeds = torch.randn(40, model.config.hidden_size) / 10
    model.set_attn_implementation("sdpa")
    found = last_attention(body, embeds)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        layers = body(inputs_embeds=embeds[None], output_attentions=True, use_cache=False).attentions
    assert len(layers) == 4
    expected = layers[3][0, :, -1].mean(0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert float(found.sum()) == pytest.approx(1, abs=1e-5)
    assert last_attention(body, embeds) is None  # eager attention does not show


def test_it_is_the_mean_of_upper_layers(tiny_backbone: Callable[..., Backbone]) -> None:
    model = tiny_backbone("llama", num_hidden_layers=12).model
    embeds = torch.randn(9, model.config.hidden_size) / 10
    found = last_attention(body_of(model), embeds)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        layers = body_of(model)(inputs_embeds=embeds[None], output_attentions=True).attentions
    expected = (layers[8] + layers[9])[0, :, -1].mean(0) / 2  # from two thirds to five sixths of 12
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_runs_of_tokens_get_what_their_groups_have() -> None:
    shares, of_each = torch.tensor([0.4, 0.2, 0.3]), torch.tensor([4, 4, 2])
    assert share_out(shares, of_each, [2, 4, 4]) == pytest.approx([0.2, 0.3, 0.4])
    assert share_out(shares, of_each, [4, 8, 8]) == pytest.approx([0.2, 0.3, 0.4])  # as many, stretched alike
    assert share_out(shares, of_each, [0, 10, 0]) == pytest.approx([0, 0.9, 0])


def test_sentences_are_ranked_by_their_words_and_by_attention(gmsa: GMSA) -> None:
    text = "".join(SENTENCES)
    memory = gmsa.compress(text, 8)
    pieces = gmsa.template(QUESTION).around(memory.soft_tokens)
    (embeds,), (soft,) = gmsa.model.embed([pieces])
    shares = last_attention(body_of(gmsa.model.decoder), embeds)[soft]
    tokens = torch.cat([window.tokens_of_each for window in gmsa.windows(memory)])
    each = [float(share / count) for share, count in zip(shares, tokens, strict=True) for _ in range(int(count))]
    assert len(each) == len(text)  # a token is a byte
    attended, start = [], 0
    for sentence in SENTENCES:
        attended.append(sum(each[start : start + len(sentence)]))
        start += len(sentence)
    ranks = gmsa.rank(SENTENCES, QUESTION)
    assert ranks == pytest.approx(together(bm25(SENTENCES, QUESTION), with_neighbours(SENTENCES, attended)), abs=1e-5)
    assert ranks != bm25(SENTENCES, QUESTION)
    assert max(ranks) == ranks[0]


def test_words_alone_count_where_attention_cannot_be_seen(
    gmsa: GMSA, tiny_model: Callable[..., GmsaModel], tiny_backbone: Callable[..., Backbone]
) -> None:
    words = bm25(SENTENCES, QUESTION)
    long = ["Larks sing. "] * 200  # more than is looked at, and of none of it do the words say that it fits
    assert gmsa.rank(long, QUESTION) == bm25(long, QUESTION) == [0.0] * 200
    assert gmsa.rank([], QUESTION) == []
    gmsa.model.decoder.set_attn_implementation("eager")
    assert gmsa.rank(SENTENCES, QUESTION) == words
    entering = GMSA(tiny_model("llama", entry_layer=2, lsa="none", encoder_sink=False), tiny_backbone("llama"))
    assert entering.rank(SENTENCES, QUESTION) == words
    short = GMSA(tiny_model("llama"), tiny_backbone("llama"))
    short.model.decoder.config.max_position_embeddings = 8
    assert short.rank(SENTENCES, QUESTION) == words
    gmsa.drop_decoder()
    assert gmsa.rank(SENTENCES, QUESTION) == words
    assert gmsa.compress_for(QUESTION, "".join(SENTENCES), 8).merge_size == 2


def test_of_a_long_text_the_sentences_whose_words_fit_best_are_looked_at(
    gmsa: GMSA, monkeypatch: pytest.MonkeyPatch
) -> None:
    sentences = ["Larks sing. "] * 90 + ["The mill was sold. "] * 90 + ["Larks sing. "] * 90 + ["The mill was built. "]
    compressed: list[str] = []
    real = gmsa.compress

    def compress(text: str, *args: Any, **options: Any) -> Any:
        compressed.append(text)
        return real(text, *args, **options)

    monkeypatch.setattr(gmsa, "compress", compress)
    ranks = gmsa.rank(sentences, QUESTION)
    (text,) = compressed
    assert len(text) <= LOOK_TOKENS  # a token is a byte
    assert text.startswith("The mill was sold. ")
    assert text.endswith("The mill was built. ")  # the best by its words, wherever it stands
    words = bm25(sentences, QUESTION)
    places = [place for place, score in enumerate(words) if score > 0]
    assert all(ranks[place] == 0 for place in range(80))  # neither words nor attention
    assert [place for place, score in enumerate(ranks) if score > 0] != places  # attention counts
    assert all(rank >= 0 for rank in ranks)


def test_two_ways_of_ranking_are_added_and_little_of_both_is_nothing() -> None:
    assert together([0.0, 4.0, 1.0], [0.6, 0.3, 0.1]) == pytest.approx([1.8, 1.9, 0.0])
    assert together([0.0, 0.0], [0.3, 0.1]) == pytest.approx([2.25, 0.0])
    assert together([3.0, 0.0], [0.0, 0.0]) == [1.0, 0.0]
    assert together([], []) == []


def test_a_text_whose_first_token_is_no_character_is_read_whole(gmsa: GMSA, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gmsa.encoder_tokenizer, "decode", lambda *_, **__: "\ufffd")
    memory = gmsa.compress_for(QUESTION, "The mill was built.", 64)
    assert memory.origin_tokens == gmsa.count("The mill was built.")


def test_a_batch_size_reaches_the_look(gmsa: GMSA, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    real = gmsa.compress

    def compress(*args: Any, batch_size: int = 8) -> Any:
        given.append(batch_size)
        return real(*args, batch_size=batch_size)

    monkeypatch.setattr(gmsa, "compress", compress)
    gmsa.compress_for(QUESTION, "".join(SENTENCES), 4, batch_size=3)
    assert given == [3, 3]


def test_sentences_that_are_no_text(make_gmsa: Callable[..., GMSA]) -> None:
    with pytest.raises(InputError, match="the sentences: number 2"):
        make_gmsa().rank(["One. ", "Half \ud800. "], "Who?")
    with pytest.raises(InputError, match="must be a list of texts"):
        make_gmsa().rank("One.", "Who?")  # type: ignore[arg-type]


def test_a_decoder_of_one_layer(tiny_backbone: Callable[..., Backbone]) -> None:
    model = tiny_backbone("llama", num_hidden_layers=1).model
    found = last_attention(body_of(model), torch.randn(5, model.config.hidden_size))
    assert found is not None
    assert found.sum().item() == pytest.approx(1, abs=1e-5)
