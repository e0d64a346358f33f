import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

from gmsa import GMSA
from gmsa.backbones import Backbone
from gmsa.baselines import METHODS, embedding_sentences, load_methods
from gmsa.baselines.base import Method, Models, Question, TextMethod
from gmsa.baselines.bm25_sentences import Bm25Sentences
from gmsa.baselines.sentences import split_sentences
from gmsa.cli import main
from gmsa.errors import InputError
from gmsa.evaluation.cache import AnswerCache
from gmsa.evaluation.qa import choose, evaluate_qa
from gmsa.modeling import GmsaModel

NO_LLMLINGUA = importlib.util.find_spec("llmlingua") is None
TRAINED = [f"{name}-trained" for name in ("original-prompt", "truncate-head")]
ALL = [*(name for name in METHODS if name != "llmlingua-2"), *TRAINED]
QUESTIONS = [
    Question(["The mill was built in 1731. It ground rye. Its owner was a widow from the north."], "Who owned it?"),
    Question(["Ants.", "Bees live in hives! Do wasps? They do not.\nSome do."], "Where do bees live?"),
    Question(["A."], "What?"),
]


@pytest.fixture(scope="module")
def gmsa(tiny_backbone: Callable[..., Backbone], trained_model: Callable[..., GmsaModel]) -> GMSA:
    return GMSA(trained_model("llama", system_prompt=""), tiny_backbone("llama"))


@pytest.fixture(scope="module")
def models(gmsa: GMSA, tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("text-decoder")
    gmsa.save_pretrained(folder)
    return Models(gmsa, str(folder))


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def load(models: Models, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Method]:
    monkeypatch.setattr(embedding_sentences, "find_model", lambda: str(tiny_bert))

    def load_one(name: str) -> Method:
        if "lingua" in name and NO_LLMLINGUA:
            pytest.skip("llmlingua is not installed")
        [method] = load_methods([name], models, lambda _: None)
        return method

    return load_one


def write_rows(path: Path) -> Path:
    rows = [{"input": q.documents, "prompt": q.prompt, "answer": "x", "id": f"q{i}"} for i, q in enumerate(QUESTIONS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [{"text": "a text"}, *rows]))
    return path


# -- every method ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 8])
@pytest.mark.parametrize("name", ALL)
def test_a_method_reads_within_its_budget(load: Callable[[str], Method], name: str, size: int) -> None:
    method = load(name)
    readings = method.read(QUESTIONS, size)
    for question, reading in zip(QUESTIONS, readings, strict=True):
        tokens = len(method.reader.template.encode(question.context))
        if name == "gmsa":  # windows of 16 tokens, and a memory for each document
            windows = [len(d.encode()) - i for d in question.documents for i in range(0, len(d.encode()), 16)]
            assert len(reading) == sum(math.ceil(min(w, 16) / size) for w in windows)
        elif method.compresses:
            assert len(reading) <= math.ceil(tokens / size)
        else:
            assert len(reading) == (0 if name.startswith("closed") else tokens)


@pytest.mark.parametrize("name", ALL)
def test_a_batch_answers_as_each_question_alone(load: Callable[[str], Method], name: str) -> None:
    method = load(name)

    def answers(questions: list[Question]) -> list[str]:
        contents = [reading.content for reading in method.read(questions, 2)]
        return method.reader.read([q.prompt for q in questions], contents, max_new_tokens=6)

    together = answers(QUESTIONS)
    assert together == [answers([question])[0] for question in QUESTIONS]
    assert answers(QUESTIONS[::-1]) == together[::-1]


@pytest.mark.parametrize("name", [name for name in ALL if name != "gmsa"])
def test_a_context_may_be_blank(load: Callable[[str], Method], name: str) -> None:
    method = load(name)
    [reading] = method.read([Question([" "], "What?")], 4)
    assert len(reading) <= 1
    assert len(method.reader.read(["What?"], [reading.content], max_new_tokens=2)) == 1


# -- what they choose --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"), [("truncate-head", "abcd"), ("truncate-tail", "ghij"), ("truncate-middle", "abij")]
)
def test_truncation(load: Callable[[str], TextMethod], name: str, expected: str) -> None:
    assert load(name).shorten("abcdefghij", "", 4) == expected


def test_an_odd_budget_gives_the_beginning_one_token_more(load: Callable[[str], TextMethod]) -> None:
    method = load("truncate-middle")
    assert method.shorten("abcdefghij", "", 5) == "abcij"
    assert method.shorten("abcdefghij", "", 1) == "a"
    assert method.shorten("abc", "", 3) == "abc"


def test_sentences_joined_are_the_text() -> None:
    text = 'It cost 3.5 million. "Why?" he said... Then\n\nnothing!  The end'
    assert split_sentences(text) == [
        "It cost 3.5 million. ",
        '"Why?" ',
        "he said... ",
        "Then\n\n",
        "nothing!  ",
        "The end",
    ]
    assert split_sentences("") == split_sentences(" \n") == []


def test_bm25_takes_the_sentence_with_the_rare_word(load: Callable[[str], Bm25Sentences]) -> None:
    text = "The town is old. The town has a zeppelin hangar. The town is small. The town is flat."
    method = load("bm25-sentences")
    budget = len("The town has a zeppelin hangar. ")
    assert method.shorten(text, "What about the zeppelin in the town?", budget) == "The town has a zeppelin hangar. "
    assert method.shorten(text, "What about the zeppelin in the town?", 9) == "The town "  # of the best one
    # What is left of the budget goes to the next best, in the order of the text.
    assert method.shorten(text, "zeppelin", budget + 3) == "Th The town has a zeppelin hangar. "
    assert method.shorten(text, "?", 9) == "The town "  # no words to rank by: from the beginning


def test_embeddings_prefer_the_same_words(load: Callable[[str], TextMethod]) -> None:
    method = load("embedding-sentences")
    text = "Some rye was sold. Who owned it? Nothing else."
    assert method.shorten(text, "Who owned it? ", len("Who owned it? ")) == "Who owned it? "


def test_a_text_beyond_the_budget_is_cut_and_counted(models: Models) -> None:
    class Repeat(TextMethod):
        name = "repeat"

        def shorten(self, context: str, question: str, budget: int) -> str:
            return context

    [reading] = Repeat(models, models.backbone).read([Question(["abcdefghi"], "?")], 4)
    assert (len(reading), reading.cut) == (3, 6)


def test_the_untouched_backbone_reads_unless_told_otherwise(models: Models, load: Callable[[str], Method]) -> None:
    plain, trained = load("original-prompt"), load("original-prompt-trained")
    name = "model.layers.0.self_attn.q_proj.weight"
    weights = [m.model.decoder.state_dict()[name] for m in (plain.reader, trained.reader, models.gmsa)]
    assert torch.equal(weights[1], weights[2])  # the same checkpoint here
    assert not torch.equal(weights[0], weights[2])
    assert len({plain.fingerprint, trained.fingerprint, load("gmsa").fingerprint}) == 3


# -- the registry ------------------------------------------------------------------------------------------------------


def test_an_unknown_method_names_the_nearest(models: Models, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="unknown method 'bm25': did you mean 'bm25-sentences'"):
        load_methods(["bm25"], models, print)
    assert main(["eval", "qa", "--data", "x.jsonl", "--methods", "gmsa,orignal-prompt"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_what_is_not_at_hand_is_skipped_in_one_line(gmsa: GMSA) -> None:
    notes: list[str] = []
    found = load_methods(["original-prompt-trained", "llmlingua-2", "closed-book"], Models(gmsa), notes.append)
    assert [method.name for method in found] == ["closed-book"]
    assert "needs --text-decoder FOLDER" in notes[0]
    assert notes[1].startswith("llmlingua-2 is skipped: it needs")


def test_a_text_decoder_stands_on_the_same_backbone(
    gmsa: GMSA, tmp_path: Path, tiny_backbone: Callable[..., Backbone], tiny_model: Callable[..., GmsaModel]
) -> None:
    GMSA(tiny_model("qwen2", trained=["encoder"]), tiny_backbone("qwen2")).save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="another decoder backbone"):
        load_methods(["closed-book-trained"], Models(gmsa, str(tmp_path / "other")), print)


# -- evaluation and its cache ------------------------------------------------------------------------------------------


def test_questions_can_be_drawn() -> None:
    rows = [{"n": i} for i in range(50)]
    assert choose(rows, 5, seed=1) == choose(rows, 5, seed=1) != choose(rows, 5, seed=2)
    assert choose(rows, 99, seed=1) == rows


def test_a_context_too_long_for_the_decoder_skips_the_method(gmsa: GMSA, models: Models, tmp_path: Path) -> None:
    row = {"input": "word " * 110, "prompt": "?", "answer": "x"}
    (tmp_path / "long.jsonl").write_text(json.dumps(row) + "\n")
    notes: list[str] = []
    methods = load_methods(["original-prompt", "gmsa"], models, notes.append)
    found = evaluate_qa(gmsa, str(tmp_path / "long.jsonl"), [4], 5, 4, methods=methods, note=notes.append)
    assert [row["method"] for row, _ in found] == ["gmsa"]
    assert len(notes) == 1
    assert "original-prompt is skipped" in notes[0]


def test_the_command_can_be_repeated(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write_rows(tmp_path / "rows.jsonl"), tmp_path / "out"
    command = ["eval", "qa", "--data", str(data), "--merge-size", "2,4", "--limit", "3", "--max-new-tokens", "4"]
    command += ["--methods", "gmsa,original-prompt,closed-book,truncate-tail-trained", "-o", str(out)]
    command += ["--model", str(models.text_decoder), "--text-decoder", str(models.text_decoder), "--dtype", "float32"]
    assert main(command) == 0
    first, rows = capsys.readouterr(), json.loads((out / "results.json").read_text())["rows"]
    sizes = [(row["method"], row["merge_size"]) for row in rows]
    assert sizes == [
        *[("gmsa", 2), ("gmsa", 4), ("original-prompt", None), ("closed-book", None)],
        *[("truncate-tail-trained", 2), ("truncate-tail-trained", 4)],
    ]
    assert rows[3]["tokens"]["soft"] == 0 < rows[5]["tokens"]["soft"] < rows[2]["tokens"]["soft"]
    assert rows[2]["tokens"]["soft"] == rows[2]["tokens"]["context"] < rows[2]["tokens"]["prompt"]
    assert set(rows[0]["seconds"]) == {"compress", "answer"}
    assert "answer_tokens" in rows[0]["metrics"]
    examples = (out / "examples.jsonl").read_text()
    assert [json.loads(line)["id"] for line in examples.splitlines()] == ["q0", "q1", "q2"] * 6

    with (out / "cache.jsonl").open("a") as file:
        file.write('{"key": "half of a li')  # as an interrupted run leaves it
    monkeypatch.setattr(GmsaModel, "generate", lambda *_, **__: pytest.fail("an answer was made again"))
    assert main(command) == 0
    second = capsys.readouterr()
    assert second.out == first.out
    assert "line 19 is damaged and ignored" in second.err
    assert (out / "examples.jsonl").read_text() == examples
    assert json.loads((out / "results.json").read_text())["rows"] == rows


def test_an_interrupted_evaluation_goes_on(
    gmsa: GMSA, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = str(write_rows(tmp_path / "rows.jsonl"))
    path = tmp_path / "cache.jsonl"
    methods = load_methods(["truncate-head"], models, print)
    reader, read = models.backbone, models.backbone.read
    asked: list[str] = []

    def read_two(questions: list[str], *args: Any, **options: Any) -> list[str]:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.extend(questions)
        return read(questions, *args, **options)

    def run() -> list[Any]:
        cache = AnswerCache(path, print)
        return list(evaluate_qa(gmsa, data, [2], 3, 4, batch_size=1, methods=methods, cache=cache))

    monkeypatch.setattr(reader, "read", read_two)
    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.setattr(reader, "read", lambda questions, *a, **o: asked.extend(questions) or read(questions, *a, **o))
    [(row, _)] = run()
    assert row["n"] == 3
    assert sorted(asked) == sorted(q.prompt for q in QUESTIONS)  # each once
    assert run()[0][0] == row
    assert len(asked) == 3


def test_a_cache_keeps_different_settings_apart(gmsa: GMSA, models: Models, tmp_path: Path) -> None:
    data = str(write_rows(tmp_path / "rows.jsonl"))
    cache = AnswerCache(None, print)
    for name, new in (("truncate-head", 2), ("truncate-head", 3), ("truncate-tail", 2), ("closed-book", 2)):
        list(evaluate_qa(gmsa, data, [2, 4], 3, new, methods=load_methods([name], models, print), cache=cache))
    assert len(cache.answers) == 3 * (2 + 2 + 2 + 1)


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot use"):
        AnswerCache(tmp_path / "file" / "cache.jsonl", print)
