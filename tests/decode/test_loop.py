"""Writing tokens: the same as transformers' `generate`, and the same when what was read once serves many questions."""

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tiny import FAMILIES, random_ids
from transformers import GenerationConfig

from gmsa import GMSA, Memory
from gmsa.api import DRAWING_ELSEWHERE, SEARCHING, PrefixCache
from gmsa.decode.loop import Row
from gmsa.decode.prompt import Frame
from gmsa.decode.sampler import Sampling
from gmsa.errors import ContextTooLongError, GmsaError, InputError, MemoryMismatchError
from gmsa.io.backbones import Backbone
from gmsa.io.loading import GmsaModel
from gmsa.model.backbone import body_of

QUESTIONS = ["Who?", "And what about a rather longer question?", "Why", "When was it, and where?", "How"]
TEXT = "The mill was built in 1731 by two brothers."


@pytest.fixture(scope="module", params=list(FAMILIES))
def any_gmsa(
    request: pytest.FixtureRequest, tiny_backbone: Callable[..., Backbone], tiny_model: Callable[..., GmsaModel]
) -> GMSA:
    return GMSA(tiny_model(request.param, system_prompt=""), tiny_backbone(request.param))


@pytest.fixture(scope="module")
def gmsa(tiny_backbone: Callable[..., Backbone], tiny_model: Callable[..., GmsaModel]) -> GMSA:
    return GMSA(tiny_model("llama", system_prompt=""), tiny_backbone("llama"))


@pytest.fixture
def positions_read(gmsa: GMSA, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows times positions of every pass of the decoder, as they come."""
    found: list[int] = []
    body = body_of(gmsa.model.decoder)
    real = body.forward

    def note(*args: Any, **kwargs: Any) -> Any:
        given = kwargs.get("inputs_embeds") if kwargs.get("input_ids") is None else kwargs["input_ids"]
        found.append(given.shape[0] * given.shape[1])
        return real(*args, **kwargs)

    monkeypatch.setattr(body, "forward", note)
    return found


def tokens_of(gmsa: GMSA, contents: Sequence[Any], questions: Sequence[str] = QUESTIONS, **options: Any) -> Any:
    """The tokens themselves: texts of a random model may hide differences."""
    rows = gmsa._rows(questions, contents, 12)
    batch_size = options.pop("batch_size", 8)
    for row in rows:
        row.sampling = Sampling.of(options)
    gmsa.run(rows, batch_size)
    return [row.tokens for row in rows]


def generated(gmsa: GMSA, memory: Memory, question: str, **options: Any) -> list[int]:
    """What transformers' `generate` writes, without what ends it."""
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": gmsa.tokenizer.pad_token_id, **options}
    configuration = GenerationConfig(eos_token_id=sorted(gmsa.ends), **settings)
    prompt = gmsa.template(question).around(memory.soft_tokens)
    (row,) = gmsa.model.generate([prompt], generation_config=configuration).tolist()
    return row[: next((n for n, token in enumerate(row) if token in gmsa.ends), len(row))]


def text_of(gmsa: GMSA, tokens: list[int]) -> str:
    return gmsa.tokenizer.decode(tokens, skip_special_tokens=True)


# -- the loop ----------------------------------------------------------------------------------------------------------


# No token twice in an answer: random models like to repeat one, and what comes second and third is compared as well.
VARIED = {"no_repeat_ngram_size": 1}


@pytest.mark.filterwarnings("ignore:Passing `no_repeat_ngram_size`")
def test_every_family_writes_what_generate_writes(any_gmsa: GMSA) -> None:
    memories = any_gmsa.compress(["A short one.", TEXT, "Third?", TEXT[::-1], "x"], 2)
    expected = [generated(any_gmsa, m, q, **VARIED) for m, q in zip(memories, QUESTIONS, strict=True)]
    assert tokens_of(any_gmsa, [[m] for m in memories], **VARIED) == expected  # in one batch, padded
    assert len({tuple(row) for row in expected}) > 1


OPTIONS = {
    "sampled": {"do_sample": True},
    "hot": {"do_sample": True, "temperature": 3.0, "top_k": 0},
    "nucleus": {"do_sample": True, "temperature": 0.8, "top_p": 0.7, "top_k": 30},
    "min-p": {"do_sample": True, "min_p": 0.2},
    "penalised": {"repetition_penalty": 1.7},
    "no repeats": {"no_repeat_ngram_size": 2},
    "long": {"min_new_tokens": 12},
}


@pytest.mark.filterwarnings("ignore:Passing")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("seed", [0, 1])
def test_options_do_what_they_do_in_generate(gmsa: GMSA, options: dict[str, Any], seed: int) -> None:
    memory = gmsa.compress(TEXT, 2)
    torch.manual_seed(seed)
    expected = generated(gmsa, memory, "Who?", **options)
    torch.manual_seed(seed)
    assert tokens_of(gmsa, [[memory]], ["Who?"], **options) == [expected]
    if "do_sample" not in options:
        return
    torch.manual_seed(seed + 100)
    assert tokens_of(gmsa, [[memory]], ["Who?"], **options) != [expected]


def test_other_options_are_left_to_generate(gmsa: GMSA) -> None:
    memory = gmsa.compress(TEXT, 2)
    expected = text_of(gmsa, generated(gmsa, memory, "Who?", num_beams=3))
    assert gmsa.answer("Who?", memory, max_new_tokens=12, num_beams=3) == expected
    assert gmsa.answer("Who?", gmsa.prefill(memory), max_new_tokens=12, num_beams=3) == expected
    assert gmsa.timings.decode > 0
    with pytest.raises(InputError, match=r"generation options: .*early_stopping"):
        gmsa.answer("Who?", memory, num_beams=3, early_stopping="maybe")
    with pytest.raises(InputError, match="stream=True does not go with num_beams"):
        gmsa.answer("Who?", memory, num_beams=3, stream=True)


BAD = [
    ({"do_sample": True, "temperature": -1.0}, "temperature must be a number from 0 to 10000"),
    ({"do_sample": True, "top_k": -5}, "top_k must be a whole number >= 0"),
    ({"do_sample": True, "top_p": "much"}, "top_p must be a number from 0 to 1"),
    ({"repetition_penalty": -1.0}, "repetition_penalty must be a number from 0.0001 to 10000"),
    ({"do_sample": "yes"}, "do_sample must be true or false"),
    ({"temprature": 2.0}, "unknown option 'temprature'; did you mean 'temperature'"),
    ({"max_token": 2}, "unknown option 'max_token'; did you mean"),
    ({"temperature": 5.0}, "temperature says how tokens are drawn: give do_sample=True"),
    ({"seed": 1}, "seed says how tokens are drawn"),
    ({"num_return_sequences": 3}, "num_return_sequences is not to be had here"),
    ({"return_dict_in_generate": True}, "return_dict_in_generate is not to be had here"),
    ({"logits_processor": []}, "logits_processor is not to be had here"),
    ({"streamer": 1}, "streamer is not to be had here"),
    ({"stopping_criteria": []}, "stopping_criteria is not to be had here"),
    ({"guidance_scale": 2.0}, "guidance_scale is not to be had here"),
    ({"penalty_alpha": 0.6}, "penalty_alpha is not to be had here"),
    ({"do_sample": True, "seed": 2**70}, "seed must be below"),
    ({"do_sample": True, "temperature": float("nan")}, "temperature must be a number from 0 to 10000"),
    ({"typical_p": 0.5}, "typical_p says how tokens are drawn: give do_sample=True"),
    ({"length_penalty": 2.0}, "length_penalty is about beams: give num_beams"),
    ({"num_beams": 0}, "num_beams must be a whole number >= 1"),
    ({"num_beams": 2.5}, "num_beams must be a whole number >= 1"),
    ({"stop": ""}, "none of them empty"),
    ({"stop": ["a", 1]}, "stop must be a text"),
    ({"stop": {"a": 1}}, "stop must be a text or a list of texts, got a mapping"),
    ({"stop": b"a"}, "stop must be a text or a list of texts, got bytes"),
    ({"num_beams": 2, "presence_penalty": 1.0}, "presence_penalty does not go with num_beams"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[str(options) for options, _ in BAD])
def test_options_that_cannot_work(gmsa: GMSA, options: dict[str, Any], message: str) -> None:
    memory = gmsa.compress(TEXT, 2)
    for stream in (False, True):
        with pytest.raises(InputError, match=message):
            gmsa.answer("Who?", memory, stream=stream, **options)


# What transformers' `generate` does for `answer`, each with what it needs beside it.
SEARCHES: list[dict[str, Any]] = [
    {"num_beams": 2, "length_penalty": 0.5, "early_stopping": True},
    *({"do_sample": True, name: 0.5} for name in DRAWING_ELSEWHERE),
    {"max_time": 100.0},
    {"watermarking_config": {"greenlist_ratio": 0.5}},
    {"renormalize_logits": True, "remove_invalid_values": True},
    {"bad_words_ids": [[3]]},
    {"suppress_tokens": [3], "begin_suppress_tokens": [4]},
    {"sequence_bias": [[[3], 1.0]]},
    {"forced_bos_token_id": 3, "forced_eos_token_id": 4},
    {"exponential_decay_length_penalty": (2, 1.1)},
]


def test_all_that_transformers_searches_by_works(gmsa: GMSA) -> None:
    assert {name for options in SEARCHES for name in options} - {"do_sample"} == set(SEARCHING)
    memory = gmsa.compress(TEXT, 2)
    for options in SEARCHES:
        torch.manual_seed(0)
        answer = gmsa.answer("Who?", memory, max_new_tokens=4, **options)
        if not options.get("do_sample"):
            assert answer == text_of(gmsa, generated(gmsa, memory, "Who?", **{"max_new_tokens": 4, **options}))


def test_numbers_of_numpy_are_numbers(gmsa: GMSA) -> None:
    memory = gmsa.compress(TEXT, np.int64(2))
    theirs = {"temperature": np.float32(0.5), "top_k": np.int64(4), "seed": np.int32(3)}
    ours = {"temperature": 0.5, "top_k": 4, "seed": 3}
    answers = [gmsa.answer("Who?", memory, max_new_tokens=np.int64(6), do_sample=True, **o) for o in (theirs, ours)]
    assert answers[0] == answers[1]


def test_one_string_is_one_stop(gmsa: GMSA) -> None:
    memory = gmsa.compress(TEXT, 2)
    whole = gmsa.answer("Who?", memory, max_new_tokens=9, min_new_tokens=9)
    apart = f"{whole[4]}{whole[1]}"
    assert apart not in whole
    assert gmsa.answer("Who?", memory, max_new_tokens=9, min_new_tokens=9, stop=apart) == whole


def test_an_answer_is_copied_and_pickled_whole(gmsa: GMSA) -> None:
    answer = gmsa.answer("Who?", gmsa.compress(TEXT, 2), max_new_tokens=3)
    for other in (copy.copy(answer), copy.deepcopy(answer), pickle.loads(pickle.dumps(answer))):
        assert (other, other.finish_reason, other.tokens) == (answer, answer.finish_reason, answer.tokens)


def test_none_is_not_given(gmsa: GMSA) -> None:
    memory = gmsa.compress(TEXT, 2)
    options: dict[str, Any] = {"temperature": None, "top_p": None, "seed": None, "stop": None, "num_beams": None}
    assert gmsa.answer("Who?", memory, max_new_tokens=9, **options) == gmsa.answer("Who?", memory, max_new_tokens=9)


def test_an_answer_says_how_it_ended(gmsa: GMSA) -> None:
    memory = gmsa.compress(TEXT, 2)
    cut = gmsa.answer("Who?", memory, max_new_tokens=9, min_new_tokens=9)
    assert (cut.finish_reason, cut.tokens) == ("length", 9)
    stopped = gmsa.answer("Who?", memory, max_new_tokens=9, min_new_tokens=9, stop=str(cut)[3:5])
    assert (stopped, stopped.finish_reason) == (cut[: cut.find(cut[3:5])], "stop")
    stream = gmsa.answer("Who?", memory, max_new_tokens=9, min_new_tokens=9, stream=True)
    assert stream.answer is None
    assert "".join(stream) == cut == stream.answer
    assert stream.answer.finish_reason == "length"
    beams = gmsa.answer(["Who?", "When?"], memory, max_new_tokens=3, min_new_tokens=3, num_beams=2)
    assert [answer.finish_reason for answer in beams] == ["length", "length"]


@pytest.mark.parametrize("bad", [0, -1, 2.0, True])
def test_bad_numbers_of_tokens(gmsa: GMSA, bad: Any) -> None:
    with pytest.raises(InputError, match="max_new_tokens must be a whole number >= 1"):
        gmsa.answer("Who?", gmsa.compress(TEXT), max_new_tokens=bad)


def test_rows_that_have_ended_do_not_change_the_others(gmsa: GMSA) -> None:
    memories = gmsa.compress(["a", TEXT, "bc"], 1)
    full = tokens_of(gmsa, [[m] for m in memories], QUESTIONS[:3], min_new_tokens=12)
    assert [len(row) for row in full] == [12] * 3
    rows = gmsa._rows(QUESTIONS[:3], [[m] for m in memories], 12)
    for row, limit in zip(rows, (2, 12, 5), strict=True):
        row.max_new_tokens, row.sampling = limit, Sampling(min_new_tokens=12)
    gmsa.run(rows, 8)
    assert [row.tokens for row in rows] == [full[0][:2], full[1], full[2][:5]]


# -- what was read once ------------------------------------------------------------------------------------------------


def test_questions_on_one_memory_are_answered_as_if_alone(any_gmsa: GMSA) -> None:
    memory = any_gmsa.compress(TEXT, 2)
    alone = [tokens_of(any_gmsa, [[memory]], [q], **VARIED)[0] for q in QUESTIONS]
    assert tokens_of(any_gmsa, [[memory]] * 5, **VARIED) == alone
    prefix = any_gmsa.prefill(memory)
    for _ in range(2):  # what was read is not written to
        assert tokens_of(any_gmsa, [prefix] * 5, **VARIED) == alone
        assert [tokens_of(any_gmsa, [prefix], [q], **VARIED)[0] for q in QUESTIONS] == alone
    assert len({tuple(row) for row in alone}) > 1


def test_memories_of_unlike_length_share_batches(gmsa: GMSA) -> None:
    a, b, c = gmsa.compress([TEXT, "A short one.", TEXT * 2], 2)
    contents = [[a], [b], [a], [c, b], [b]]
    questions = ["Who?", "Which of the two?", "And when?", "Why", "How"]
    alone = [tokens_of(gmsa, [content], [q])[0] for content, q in zip(contents, questions, strict=True)]
    for batch_size in (1, 2, 3, 8):
        assert tokens_of(gmsa, contents, questions, batch_size=batch_size) == alone
    prefixes = [gmsa.prefill(content) for content in contents]
    mixed = [prefixes[0], contents[1], prefixes[2], contents[3], prefixes[4]]
    assert tokens_of(gmsa, mixed, questions) == alone
    answers = gmsa.answer(questions, [a, [b], prefixes[2], [c, b], b], max_new_tokens=12)  # type: ignore[list-item]
    assert answers == [text_of(gmsa, row) for row in alone]


def test_a_memory_is_read_once_for_all_questions(gmsa: GMSA, positions_read: list[int]) -> None:
    memory = gmsa.compress(TEXT * 3, 1)
    gmsa.answer(QUESTIONS, memory, max_new_tokens=1, batch_size=2)
    longest = max(len(gmsa.template(q).after) for q in QUESTIONS)
    assert positions_read[0] == len(gmsa.template("q").before) + len(memory) + longest  # the first, with its question
    assert sum(positions_read[1:]) <= 4 * longest


def test_a_prefix_costs_only_the_question(gmsa: GMSA, positions_read: list[int]) -> None:
    memory = gmsa.compress(TEXT * 3, 1)
    prefix = gmsa.prefill(memory)
    assert gmsa.timings.prefill > 0
    assert len(prefix) == positions_read[0] == len(gmsa.template("q").before) + len(memory)
    config = gmsa.model.decoder.config
    width = 2 * config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    assert prefix.nbytes == len(prefix) * width * config.num_hidden_layers * 4
    positions_read.clear()
    gmsa.answer("Who?", prefix, max_new_tokens=3, min_new_tokens=3)
    assert positions_read == [len(gmsa.template("Who?").after), 1, 1]
    assert "".join(gmsa.answer("Who?", prefix, max_new_tokens=9, stream=True)) == gmsa.answer(
        "Who?", memory, max_new_tokens=9
    )


def test_texts_are_read_once_too(gmsa: GMSA, positions_read: list[int]) -> None:
    (text,) = random_ids(60)
    alone = [gmsa.read([q], [[text]], max_new_tokens=6)[0] for q in QUESTIONS]
    positions_read.clear()
    assert gmsa.read(QUESTIONS, [[text]] * 5, max_new_tokens=6) == alone
    longest = max(len(gmsa.template(q).after) for q in QUESTIONS)
    assert positions_read[0] == 60 + len(gmsa.template("q").before) + longest
    assert positions_read[1] <= 4 * longest


def test_nothing_at_all_is_read_for_many_questions(
    tiny_backbone: Callable[..., Backbone], tiny_model: Callable[..., GmsaModel]
) -> None:
    gmsa = GMSA(tiny_model("llama", prompt="plain"), tiny_backbone("llama"))
    gmsa.template.tokenizer.bos_token = None  # so that nothing stands before the context either
    nothing = torch.zeros(0, dtype=torch.long)
    assert len(gmsa.template("q").before) == 0
    alone = [gmsa.read([q], [[nothing]], max_new_tokens=6)[0] for q in QUESTIONS]
    assert gmsa.read(QUESTIONS, [[nothing]] * 5, max_new_tokens=6) == alone


def test_prefixes_that_do_not_fit(gmsa: GMSA, tiny_backbone: Any, tiny_model: Any) -> None:
    memory = gmsa.compress(TEXT, 2)
    other = GMSA(tiny_model("llama", system_prompt=""), tiny_backbone("llama"))
    with pytest.raises(MemoryMismatchError, match="read by another model: call prefill"):
        other.answer("Who?", gmsa.prefill(memory))
    with pytest.raises(MemoryMismatchError, match="another compressor"):
        gmsa.prefill(Memory(memory.soft_tokens, 2, memory.origin_tokens, "0123456789abcdef"))
    with pytest.raises(InputError, match="no memory to answer from"):
        gmsa.prefill([])
    long = gmsa.compress("x" * 490, 1)
    with pytest.raises(ContextTooLongError, match="490 soft tokens"):
        gmsa.answer("Who?", gmsa.prefill(long), max_new_tokens=128)


def test_a_prefix_made_with_another_beginning_is_not_used(gmsa: GMSA, positions_read: list[int]) -> None:
    memory = gmsa.compress(TEXT, 2)
    made = gmsa.prefill(memory)
    moved = PrefixCache(made.contents, (made.pieces[0][1:], *made.pieces[1:]), made.states, made.decoder)
    positions_read.clear()
    assert gmsa.answer("Who?", moved, max_new_tokens=8) == gmsa.answer("Who?", memory, max_new_tokens=8)
    assert positions_read[0] > len(memory)


# -- the text of an answer ---------------------------------------------------------------------------------------------


def test_an_answer_ends_before_a_stop(gmsa: GMSA) -> None:
    memories = gmsa.compress([TEXT, "A short one."], 2)
    full = [gmsa.answer("Who?", m, max_new_tokens=40, min_new_tokens=40) for m in memories]
    stops = [full[0][10:13], full[1][20:22]]
    assert all(stops)
    expected = []
    for text in full:
        places = [text.find(stop) for stop in stops if stop in text]
        expected.append(text[: min(places)])
    options: dict[str, Any] = {"max_new_tokens": 40, "min_new_tokens": 40, "stop": stops}
    assert gmsa.answer(["Who?"] * 2, [[m] for m in memories], **options) == expected
    for memory, text in zip(memories, expected, strict=True):
        assert "".join(gmsa.answer("Who?", memory, stream=True, **options)) == text
    one = gmsa.answer(
        "Who?", memories[0], max_new_tokens=40, min_new_tokens=40, stop=stops[0], renormalize_logits=False
    )
    assert one == full[0][: full[0].find(stops[0])]  # transformers' own loop


def test_writing_ends_with_a_stop(gmsa: GMSA, positions_read: list[int]) -> None:
    memory = gmsa.compress(TEXT, 2)
    full = gmsa.answer("Who?", memory, max_new_tokens=40, min_new_tokens=40)
    positions_read.clear()
    gmsa.answer("Who?", memory, max_new_tokens=40, min_new_tokens=40, stop=full[10:13])
    assert len(positions_read) < 40


@pytest.mark.parametrize("bad", ["", [""], ["a", 3]])
def test_bad_stops(gmsa: GMSA, bad: Any) -> None:
    with pytest.raises(InputError, match="stop must be"):
        gmsa.answer("Who?", gmsa.compress(TEXT), stop=bad)


def test_the_first_piece_does_not_wait_for_the_last(gmsa: GMSA, positions_read: list[int]) -> None:
    stream = gmsa.answer("Who?", gmsa.compress(TEXT, 2), max_new_tokens=100, min_new_tokens=100, stream=True)
    next(stream)
    assert len(positions_read) < 10
    assert len(list(stream)) > 20
    assert len(positions_read) == 100


# -- memories and texts in any order -----------------------------------------------------------------------------------


def test_memories_and_texts_in_any_order_are_what_their_pieces_are(gmsa: GMSA) -> None:
    a, b = gmsa.compress([TEXT, "A short one."], 2)
    frame = gmsa.template("Who?")
    ids = torch.tensor(gmsa.template.encode("\nin between"))
    line = torch.tensor(gmsa.template.encode("\n"))
    rows = [Row([frame.before, a.soft_tokens, ids, line, b.soft_tokens, frame.after], 9)]
    gmsa.run(rows, 1)
    assert gmsa.answer("Who?", [a, "in between", b], max_new_tokens=9) == rows[0].text
    prefix = gmsa.prefill([a, "in between", b])
    assert gmsa.answer("Who?", prefix, max_new_tokens=9) == rows[0].text


def test_a_text_alone_is_read_as_text(gmsa: GMSA) -> None:
    frame = gmsa.template("Who?")
    rows = [Row([torch.cat([frame.before, torch.tensor(gmsa.template.encode(TEXT)), frame.after])], 9)]
    gmsa.run(rows, 1)
    assert gmsa.answer("Who?", [TEXT], max_new_tokens=9) == rows[0].text


def test_a_prompt_that_ends_with_a_memory_may_be_asked_twice(any_gmsa: GMSA) -> None:
    """All of it is shared then, and its last position is read anew all the same."""
    memory = any_gmsa.compress(TEXT, 2)
    frame = Frame(any_gmsa.template("Who?").before, torch.tensor([], dtype=torch.long))
    alone = tokens_of(any_gmsa, [[memory]], [frame])
    assert tokens_of(any_gmsa, [[memory]] * 3, [frame] * 3) == alone * 3
    assert tokens_of(any_gmsa, [any_gmsa.prefill(memory)], [frame]) == alone


def test_an_empty_prompt(gmsa: GMSA) -> None:
    nothing = torch.tensor([], dtype=torch.long)
    with pytest.raises(InputError, match="the prompt is empty"):
        gmsa.read([Frame(nothing, nothing)], [[]])


def test_marks_tell_beginnings_apart(
    tiny_backbone: Callable[..., Backbone], tiny_model: Callable[..., GmsaModel]
) -> None:
    model = tiny_model("llama", system_prompt="", memory_marks=["<", ">"])
    gmsa = GMSA(model, tiny_backbone("llama"))
    marked = gmsa.template("Who?")
    assert marked.marks is not None
    bare = Frame(marked.before, marked.after)
    memory = gmsa.compress(TEXT, 2)
    alone = [tokens_of(gmsa, [[memory]], [frame])[0] for frame in (marked, bare)]
    assert alone[0] != alone[1]
    assert tokens_of(gmsa, [[memory]] * 2, [marked, bare]) == alone
    prefix = gmsa.prefill(memory)
    assert [tokens_of(gmsa, [prefix], [frame])[0] for frame in (marked, bare)] == alone
    with pytest.raises(InputError, match="has been read already"):
        gmsa.prefill(prefix)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(do_sample=True, seed=1)])
def test_a_row_nothing_can_be_said_for_ends_alone(
    sampling: Sampling, gmsa: GMSA, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = gmsa._rows(["Who?", "Who?"], [[gmsa.compress(TEXT, 2)], [gmsa.compress(TEXT, 4)]], 4)
    for row in rows:
        row.sampling = sampling
    loop = gmsa._loop(8)
    real, calls = loop._logits, list[int]()

    def broken(states: torch.Tensor) -> torch.Tensor:
        logits = real(states)
        calls.append(len(states))
        if len(calls) == 1:
            logits[0, 3] = torch.nan
        return logits

    monkeypatch.setattr(loop, "_logits", broken)
    for row in rows:
        loop.submit(row)
    while loop.busy:
        loop.turn()
    assert [row.finish for row in rows].count("error") == 1
    assert sorted(len(row.tokens) > 0 for row in rows) == [False, True]
    assert calls[:2] == [2, 1]


@pytest.mark.parametrize("together", [True, False])
def test_what_is_not_finite_leaves_nothing_in_its_place(together: bool, gmsa: GMSA) -> None:
    prompt = gmsa.template("Who?")
    text = torch.cat([prompt.before, prompt.after])
    expected = Row([text], 6)
    gmsa.run([expected], 1)
    loop = gmsa._loop(8)
    endless = torch.full((300, gmsa.model.decoder.config.hidden_size), torch.inf)
    long, bad, short = Row([text] * 4, 60), Row([endless], 6), Row([text], 6)
    assert len(short) < len(long) < len(bad)
    loop.submit(long)
    if not together:  # else one group, of which the first stays
        loop.turn()
    loop.submit(bad)
    while bad.finish is None:
        loop.turn()
    assert bad.finish == "error"
    loop.submit(short)
    while short.finish is None:
        loop.turn()
    assert (short.tokens, long.finish) == (expected.tokens, None)


def test_numbers_that_are_not_finite_are_told(gmsa: GMSA, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = gmsa.compress(TEXT)
    monkeypatch.setattr("gmsa.decode.loop.head_logits", lambda decoder, states: torch.full((len(states), 9), torch.nan))
    for call in (lambda: gmsa.answer("Who?", memory), lambda: list(gmsa.answer("Who?", memory, stream=True))):
        with pytest.raises(GmsaError, match="the decoder's numbers in"):
            call()
