from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gmsa import GMSA, Memory
from gmsa.errors import ConfigError, ContextTooLongError, InputError, MemoryFileError, MemoryMismatchError
from gmsa.io.backbones import Backbone
from gmsa.io.loading import GmsaModel
from gmsa.sentences import bm25

TEXTS = ["A short one.", "A second text that is a good deal longer than the first, over several windows.", "Third?"]


@pytest.fixture(scope="module")
def gmsa(tiny_backbone: Callable[..., Backbone], tiny_model: Callable[..., GmsaModel]) -> GMSA:
    return GMSA(tiny_model("llama", system_prompt=""), tiny_backbone("llama"))


def test_one_text_gives_one_memory_and_a_list_gives_a_list(gmsa: GMSA) -> None:
    one = gmsa.compress(TEXTS[0], 3)
    many = gmsa.compress(TEXTS, 3)
    assert isinstance(one, Memory)
    assert [m.origin_tokens for m in many] == [len(t) for t in TEXTS]
    torch.testing.assert_close(one.soft_tokens, many[0].soft_tokens, rtol=1e-4, atol=1e-4)
    assert gmsa.compress([], 3) == []


@pytest.mark.parametrize("size", [1, 2, 5, 16, 40])
def test_a_batch_equals_its_members(gmsa: GMSA, size: int) -> None:
    for batch_size in (1, 3, 8):
        for together, text in zip(gmsa.compress(TEXTS, size, batch_size=batch_size), TEXTS, strict=True):
            alone = gmsa.compress(text, size)
            torch.testing.assert_close(together.soft_tokens, alone.soft_tokens, rtol=1e-4, atol=1e-4)


def test_windows_equal_their_parts_compressed_alone(gmsa: GMSA) -> None:
    text = TEXTS[1]
    parts = [text[i : i + 16] for i in range(0, len(text), 16)]  # one byte is one token, windows hold 16
    whole = gmsa.compress(text, 3)
    joined = torch.cat([gmsa.compress(p, 3).soft_tokens for p in parts])
    torch.testing.assert_close(whole.soft_tokens, joined, rtol=1e-4, atol=1e-4)


def test_memories_for_a_question_are_of_the_sentences_that_fit_it(gmsa: GMSA) -> None:
    text = "The mill was built in 1731. " + "Larks sing over fields of rye. " * 8 + "The mill burnt down."
    memory = gmsa.compress_for("When was the mill built?", text, 2**10)
    assert len(memory) == 1  # however little there is room for
    memory = gmsa.compress_for("When was the mill built?", text, 4, rank=bm25)
    kept = "The mill was built in 1731. Larks sing over fields of rye. The mill burnt down."  # a lark as its neighbour
    assert gmsa.choose_for("When was the mill built?", [text], 4, bm25) == ([kept], 2)
    assert gmsa.choose_for("When was the mill built?", [text], 3, bm25) == ([kept], 1)  # it fits as it is
    assert (memory.merge_size, memory.origin_tokens) == (2, len(kept))
    torch.testing.assert_close(memory.soft_tokens, gmsa.compress(kept, 2).soft_tokens)
    texts = [text, "Rooks do not sing.", "So does the mill."]
    memories = gmsa.compress_for("mill", texts, 8, rank=bm25)
    stays, _ = gmsa.choose_for("mill", texts, 8, bm25)
    assert [not part for part in stays] == [False, True, False]
    assert [m.origin_tokens for m in memories] == [len(part) for part in stays if part]
    assert sum(map(len, memories)) <= -(-sum(map(len, texts)) // 8)


@pytest.mark.parametrize(("question", "size"), [("Zebras?", 8), ("What is it about?", 8), ("mill", 2), ("mill", 1)])
def test_where_there_is_nothing_to_choose_all_of_a_text_stays(gmsa: GMSA, question: str, size: int) -> None:
    text = "The mill was built in 1731. Larks sing over fields of rye."
    assert gmsa.choose_for(question, [text], size, bm25) == ([text], size)
    memories = gmsa.compress_for(question, [text, text], size, rank=bm25)
    for one, other in zip(memories, gmsa.compress([text, text], size), strict=True):
        assert torch.equal(one.soft_tokens, other.soft_tokens)


@pytest.mark.parametrize("size", [3, 5, 64, 1000])
def test_memories_for_a_question_keep_to_the_budget(gmsa: GMSA, size: int) -> None:
    texts = ["A mill. " * 3, "The mill stands here, for all to see. " * 4, "x"]
    memories = gmsa.compress_for("mill", texts, size)
    assert 1 <= sum(map(len, memories)) <= -(-sum(map(len, texts)) // size)


def test_a_question_to_compress_for_is_a_text_that_says_something(gmsa: GMSA) -> None:
    for question, text, message in (
        (" ", "A mill.", "question is empty"),
        (None, "A mill.", "question must be a text"),
        ("Who?", " ", "context is empty"),
        ("Who?", ["a", 3], "context at place 1 must be a text"),
        ("Who?", None, "context must be a text or a list"),
    ):
        with pytest.raises(InputError, match=message):
            gmsa.compress_for(question, text)  # type: ignore[call-overload]
    with pytest.raises(ConfigError, match="merge_size"):
        gmsa.compress_for("Who?", "A mill.", 0)
    assert gmsa.compress_for("Who?", []) == []


def test_answers_in_a_batch_equal_answers_alone(gmsa: GMSA) -> None:
    memories = gmsa.compress(TEXTS, 2)
    questions = ["Who?", "And what about a longer question?", "Why"]
    together = gmsa.answer(questions, [[m] for m in memories], max_new_tokens=12)
    alone = [gmsa.answer(q, m, max_new_tokens=12) for q, m in zip(questions, memories, strict=True)]
    assert together == alone
    assert len(set(alone)) > 1  # the comparison above would mean nothing if all answers were the same
    assert gmsa.answer(questions, [[m] for m in memories], max_new_tokens=12, batch_size=1) == alone


def test_several_memories_are_read_in_order(gmsa: GMSA) -> None:
    a, _, b = gmsa.compress(TEXTS, 2)
    both = gmsa.answer("Who?", [a, b], max_new_tokens=12)
    joined = Memory(torch.cat([a.soft_tokens, b.soft_tokens]), 2, a.origin_tokens + b.origin_tokens, a.fingerprint)
    assert both == gmsa.answer("Who?", joined, max_new_tokens=12)
    assert both != gmsa.answer("Who?", [b, a], max_new_tokens=12)


def test_a_stream_is_the_answer_in_pieces(gmsa: GMSA) -> None:
    memory = gmsa.compress(TEXTS[1], 2)
    pieces = list(gmsa.answer("Who?", memory, max_new_tokens=20, stream=True))
    assert "".join(pieces) == gmsa.answer("Who?", memory, max_new_tokens=20)
    assert gmsa.timings.prefill > 0


def test_a_dropped_stream_writes_no_more(gmsa: GMSA, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = gmsa.compress(TEXTS[1], 2)
    steps = []
    real = type(gmsa.model.decoder).forward
    monkeypatch.setattr(type(gmsa.model.decoder), "forward", lambda *a, **k: steps.append(1) or real(*a, **k))
    stream = gmsa.answer("Who?", memory, max_new_tokens=400, min_new_tokens=400, stream=True)
    next(stream)
    stream.close()
    assert len(steps) < 10
    assert gmsa.answer("Who?", memory, max_new_tokens=3)


def test_restoring_goes_window_by_window(gmsa: GMSA) -> None:
    memory = gmsa.compress(TEXTS[1], 2)
    parts = gmsa.windows(memory)
    assert [p.origin_tokens for p in parts] == [16, 16, 16, 16, len(TEXTS[1]) - 64]
    assert torch.equal(torch.cat([p.soft_tokens for p in parts]), memory.soft_tokens)
    short = gmsa.compress(TEXTS[0], 2)
    assert gmsa.restore([memory, short]) == [gmsa.restore(memory), gmsa.restore(short)]


def test_a_restoration_is_no_longer_than_its_text(gmsa: GMSA, monkeypatch: pytest.MonkeyPatch) -> None:
    memories = gmsa.compress(TEXTS, 2)
    asked: list[int] = []
    run = gmsa.run
    monkeypatch.setattr(
        gmsa, "run", lambda rows, size: asked.extend(row.max_new_tokens for row in rows) or run(rows, size)
    )
    monkeypatch.setattr(GMSA, "ends", set())  # one that never comes to an end
    restored = gmsa.restore(memories)
    assert asked == [window.origin_tokens for memory in memories for window in gmsa.windows(memory)]
    for text, memory in zip(restored, memories, strict=True):
        assert len(gmsa.template.encode(text)) <= 3 * memory.origin_tokens  # a byte that is no character becomes three


def test_scores_agree_with_the_decoder_read_token_by_token(gmsa: GMSA) -> None:
    text = TEXTS[0]
    memory = gmsa.compress(text, 2)
    score = gmsa.score(memory, text)
    prompt = gmsa.template.restore()
    ids = gmsa.template.encode(text)
    embed = gmsa.model.get_input_embeddings()
    right, nll = 0, 0.0
    for i, token in enumerate(ids):
        tail = embed(torch.cat([prompt.after, torch.tensor(ids[:i], dtype=torch.long)]))
        row = torch.cat([embed(prompt.before), memory.soft_tokens, tail])
        with torch.no_grad():
            logits = gmsa.model.decoder(inputs_embeds=row[None]).logits[0, -1]
        right += int(logits.argmax()) == token
        nll -= float(torch.log_softmax(logits, -1)[token])
    assert score.tokens == len(ids)
    assert score.right == right
    assert score.nll == pytest.approx(nll, rel=1e-4)


def test_the_rate_may_change_from_call_to_call(gmsa: GMSA) -> None:
    assert [len(gmsa.compress(TEXTS[0], s)) for s in (1, 2, 4, 12)] == [12, 6, 3, 1]


@pytest.mark.parametrize("size", [0, -1, 2.0, "four", True, None])
def test_bad_merge_sizes(gmsa: GMSA, size: object) -> None:
    with pytest.raises(ConfigError, match="merge_size must be a whole number >= 1"):
        gmsa.compress("text", size)  # type: ignore[call-overload]


def test_bad_input(gmsa: GMSA) -> None:
    memory = gmsa.compress(TEXTS[0])
    with pytest.raises(InputError, match="the context is empty"):
        gmsa.compress("  \n")
    with pytest.raises(InputError, match="at place 1 is empty"):
        gmsa.compress(["a", ""])
    with pytest.raises(InputError, match="the question is empty"):
        gmsa.answer(" ", memory)
    with pytest.raises(InputError, match="2 questions but 1"):
        gmsa.answer(["a", "b"], [[memory]])
    with pytest.raises(InputError, match="no memory"):
        gmsa.answer("a", [])
    with pytest.raises(InputError, match="one question"):
        gmsa.answer(["a", "b"], memory, stream=True)  # type: ignore[call-overload]
    with pytest.raises(InputError, match=f"of {len(TEXTS[0])} tokens, this one has {len(TEXTS[1])}"):
        gmsa.score(memory, TEXTS[1])


@pytest.mark.parametrize("size", [0, -1, True, "8"])
def test_bad_batch_sizes(gmsa: GMSA, size: Any) -> None:
    memory = gmsa.compress(TEXTS[0])
    for act in (
        lambda: gmsa.compress(TEXTS, batch_size=size),
        lambda: gmsa.answer("Who?", memory, batch_size=size),
        lambda: gmsa.restore(memory, batch_size=size),
        lambda: gmsa.restore_checked(memory, batch_size=size),
    ):
        with pytest.raises(InputError, match="batch_size must be a whole number >= 1, got"):
            act()


# A value where several, or one of another kind, are wanted; what is said of it.
NO_SEQUENCES = [
    ({"a": "b"}, "a mapping \\(dict\\): give its values"),
    (None, "got None"),
    (5, "got int"),
    (b"text", "got bytes"),
    ({"text"}, "a set, which has no order"),
]


@pytest.mark.parametrize(("value", "message"), NO_SEQUENCES, ids=[str(value) for value, _ in NO_SEQUENCES])
def test_what_only_looks_like_a_list_is_named(gmsa: GMSA, value: Any, message: str) -> None:
    memory = gmsa.compress(TEXTS[0])
    calls: list[Callable[[], object]] = [
        lambda: gmsa.compress(value),
        lambda: gmsa.answer(value, memory),
        lambda: gmsa.answer("Who?", value),
        lambda: gmsa.restore(value),
        lambda: gmsa.restore_checked(value),
        lambda: gmsa.prefill(value),
        lambda: gmsa.prompt_embeddings("Who?", value),
        lambda: gmsa.read(value, [[memory]]),
        lambda: gmsa.read(["Who?"], value),
        lambda: gmsa.read(["Who?"], [value]),
        lambda: gmsa.score(value, TEXTS[0]),
        lambda: gmsa.stream_checked(value),
        lambda: gmsa.check(value),
    ]
    for call in calls:
        with pytest.raises(InputError, match=message):
            call()
    if value is not None:
        with pytest.raises(InputError, match=message):
            gmsa.answer("Who?", memory, stop=value)


def test_a_string_or_path_is_not_taken_for_a_list(gmsa: GMSA, tmp_path: Path) -> None:
    memory = gmsa.compress(TEXTS[0])
    path = tmp_path / "x.safetensors"
    with pytest.raises(InputError, match=r"a path .*x.safetensors.: read its text first"):
        gmsa.compress(path)  # type: ignore[call-overload]
    with pytest.raises(InputError, match="a memory file as a Path"):
        gmsa.answer("Who?", str(path))
    with pytest.raises(InputError, match="questions must be a list of texts, got str"):
        gmsa.read("Who?", [[memory]])
    with pytest.raises(InputError, match="must be a list, got str"):
        gmsa.read(["Who?"], ["text"])  # type: ignore[list-item]
    with pytest.raises(InputError, match="must be as many"):
        gmsa.read(["Who?", "When?"], [[memory]])
    with pytest.raises(InputError, match="1 questions but 2 lists"):
        gmsa.answer("Who?", [[memory], [memory]])
    with pytest.raises(InputError, match=r"the context at place 1 must be a text .*None"):
        gmsa.compress(["text", None])  # type: ignore[list-item]
    with (tmp_path / "lines.txt").open("w+") as file, pytest.raises(InputError, match="got TextIOWrapper"):
        gmsa.compress(file)  # type: ignore[call-overload]
    for candidates in (4, "4", [], [0], [True], None):
        with pytest.raises(InputError, match="candidates must be"):
            gmsa.restore_checked(memory, candidates=candidates)  # type: ignore[arg-type]


def test_a_path_is_taken_where_a_memory_is(gmsa: GMSA, tmp_path: Path) -> None:
    memory, path = gmsa.compress(TEXTS[0]), tmp_path / "x.safetensors"
    memory.save(path)
    answer = gmsa.answer("Who?", memory, max_new_tokens=5)
    assert gmsa.answer("Who?", path, max_new_tokens=5) == answer
    assert gmsa.answer("Who?", [path], max_new_tokens=5) == answer
    assert gmsa.answer(["Who?"], [[path]], max_new_tokens=5) == [answer]
    assert gmsa.read(["Who?"], [[path]], max_new_tokens=5) == [answer]
    prefix = gmsa.prefill(path)
    path.unlink()  # it has been read
    assert gmsa.answer("Who?", prefix, max_new_tokens=5) == answer
    memory.save(path)
    assert gmsa.restore(str(path)) == gmsa.restore(path) == gmsa.restore(memory)
    assert gmsa.restore([path, memory]) == [gmsa.restore(memory)] * 2
    assert gmsa.restore_checked(path) == gmsa.restore_checked(memory)
    assert [*gmsa.stream_checked(path)] == [*gmsa.stream_checked(memory)]
    assert gmsa.score(path, TEXTS[0]) == gmsa.score(memory, TEXTS[0])
    gmsa.check(path)
    assert gmsa.restore_checked(path, candidates=[np.int64(4)]) == gmsa.restore_checked(memory, candidates=[4])
    for missing in (tmp_path, tmp_path / "none"):
        with pytest.raises(MemoryFileError, match=r"folder|no such memory file"):
            gmsa.answer("Who?", missing)


@pytest.mark.parametrize(
    "ids", [torch.tensor([[1, 2]]), torch.tensor(1), torch.tensor([10**6]), torch.tensor([-1]), torch.ones(2, 48)]
)
def test_tensors_that_are_no_token_ids(gmsa: GMSA, ids: torch.Tensor) -> None:
    with pytest.raises(InputError, match="token ids from 0 to 260 in one dimension"):
        gmsa.answer("Who?", [ids])


def test_memories_of_other_models_are_refused(gmsa: GMSA) -> None:
    good = gmsa.compress(TEXTS[0])
    other = Memory(good.soft_tokens, 4, 12, "0123456789abcdef")
    for call in (lambda: gmsa.answer("q", other), lambda: gmsa.answer("q", [good, other]), lambda: gmsa.restore(other)):
        with pytest.raises(MemoryMismatchError, match="another compressor"):
            call()


@pytest.mark.parametrize(("value", "dtype"), [(1e300, torch.float64), (1e25, torch.float32)])
def test_memories_the_decoder_could_not_read_are_refused(gmsa: GMSA, value: float, dtype: torch.dtype) -> None:
    width = gmsa.compress(TEXTS[0]).soft_tokens.shape[1]
    huge = Memory(torch.full((3, width), value, dtype=dtype), 4, 12, gmsa.fingerprint)
    with pytest.raises(MemoryMismatchError, match="values are too large for this model"):
        gmsa.answer("q", huge)


def test_the_fingerprint_follows_the_compressor_not_the_decoder(
    gmsa: GMSA, tiny_backbone: Callable[..., Backbone], tiny_model: Callable[..., GmsaModel]
) -> None:
    model = tiny_model("llama", system_prompt="")
    assert GMSA(model, tiny_backbone("llama")).fingerprint == gmsa.fingerprint
    with torch.no_grad():
        next(iter(model.group_parameters("decoder-qkv").values())).mul_(2)
    assert GMSA(model, tiny_backbone("llama")).fingerprint == gmsa.fingerprint
    with torch.no_grad():
        next(iter(model.group_parameters("lsa").values())).mul_(2)
    assert GMSA(model, tiny_backbone("llama")).fingerprint != gmsa.fingerprint


def test_too_long_for_the_decoder(gmsa: GMSA) -> None:
    memory = gmsa.compress("x" * 600, 1)
    with pytest.raises(
        ContextTooLongError, match=r"600 soft tokens .* exceed the decoder's 512: use a larger merge size"
    ):
        gmsa.answer("q", memory)
    gmsa.answer("q", gmsa.compress("x" * 600, 4), max_new_tokens=2)


def test_loading_what_was_saved(gmsa: GMSA, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("model") / "m"
    gmsa.save_pretrained(folder)
    again = GMSA.from_pretrained(folder, dtype="float32")
    assert again.fingerprint == gmsa.fingerprint
    memory = gmsa.compress(TEXTS[1], 2)
    assert torch.equal(again.compress(TEXTS[1], 2).soft_tokens, memory.soft_tokens)
    assert again.answer("Who?", memory, max_new_tokens=8) == gmsa.answer("Who?", memory, max_new_tokens=8)


def test_a_twin_shares_the_weights_and_nothing_that_a_call_changes(gmsa: GMSA) -> None:
    twin = gmsa.share_weights()
    pairs = list(zip(gmsa.model.parameters(), twin.model.parameters(), strict=True))
    assert pairs
    assert all(mine is other for mine, other in pairs)
    assert not {id(m) for m in gmsa.model.modules()} & {id(m) for m in twin.model.modules()}
    assert twin.tokenizer is not gmsa.tokenizer
    assert twin.fingerprint == gmsa.fingerprint
    memory = gmsa.compress(TEXTS[1], 2)
    spent = gmsa.timings
    assert torch.equal(twin.compress(TEXTS[1], 2).soft_tokens, memory.soft_tokens)
    assert gmsa.timings is spent
    assert twin.answer("Who?", memory, max_new_tokens=12) == gmsa.answer("Who?", memory, max_new_tokens=12)


def test_a_window_longer_than_the_models_is_refused(
    tiny_backbone: Callable[..., Backbone], tiny_model: Callable[..., GmsaModel]
) -> None:
    gmsa = GMSA(tiny_model("gpt2", system_prompt="", window_size=None), tiny_backbone("gpt2"))
    limit = gmsa.encoder_config.max_position_embeddings
    with pytest.raises(ContextTooLongError, match=f"exceeds the encoder's {limit}: give the model a window_size"):
        gmsa.compress("x" * (limit + 1), 4)
    with pytest.raises(ContextTooLongError, match=f"exceed the decoder's {limit}"):
        gmsa.compress("x" * (limit - 10), 2, refine=1)
    # What cannot be looked at is ranked by its words.
    sentences = [f"Line {i} of the ledger. " for i in range(limit // 10)]
    assert gmsa.rank(sentences, "What is line 7?")[7] > 0
    appended = tiny_model("gpt2", system_prompt="", window_size=300, merging="appended", max_appended=300, lsa="none")
    with pytest.raises(ContextTooLongError, match="a window of 300 tokens"):
        GMSA(appended, tiny_backbone("gpt2")).compress("x" * 300, 1)
