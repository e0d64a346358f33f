import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_tokenizer

from gmsa import GMSA, Memory
from gmsa.cli.main import main
from gmsa.errors import InputError
from gmsa.evaluate import metrics
from gmsa.evaluate.qa import choose, evaluate_qa
from gmsa.evaluate.restoration import evaluate_restoration
from gmsa.evaluate.results import FIELDS, AnswerCache
from gmsa.io.backbones import Backbone, fingerprint_of
from gmsa.io.loading import GmsaModel


@pytest.mark.parametrize(
    ("reference", "restored", "expected"),
    [
        (range(512), [*range(128), -1, *range(129, 512)], 0.25),  # the paper's own example
        ([1, 2, 3], [1, 2, 3], 1.0),
        ([1, 2, 3], [1, 2, 3, 4], 1.0),
        ([1, 2, 3, 4], [1, 2], 0.5),
        ([1, 2], [], 0.0),
        ([1, 2], [2, 1], 0.0),
    ],
)
def test_prefix_exact_match(reference: list[int], restored: list[int], expected: float) -> None:
    assert metrics.prefix_exact_match(list(reference), restored) == expected


def test_bleu_is_one_for_equal_texts_and_falls_with_errors() -> None:
    text = "The mill was built in 1731 by two brothers from the north."
    assert metrics.bleu([text], [text]) == pytest.approx(1)
    assert 0 < metrics.bleu([text], [text.replace("1731", "1713")]) < 1
    assert metrics.bleu([text], ["Nothing alike whatsoever here, friend."]) < 0.1


@pytest.mark.parametrize(
    ("prediction", "references", "acc", "em", "f1"),
    [
        ("The Eiffel Tower.", ["eiffel tower"], 100, 100, 100),
        ("in Paris, France", ["Paris"], 100, 0, 50),
        ("Paris", ["in Paris, France"], 0, 0, 50),
        ("London", ["Paris", "London"], 100, 100, 100),
        ("cat", ["category"], 0, 0, 0),  # a part of a word is no hit
        ("", ["Paris"], 0, 0, 0),
        ("a a b", ["a b b"], 0, 0, 100),  # "a" is an article and goes; one "b" of two is found: see below
    ],
)
def test_answers_are_judged_as_squad_does(
    prediction: str, references: list[str], acc: float, em: float, f1: float
) -> None:
    if references == ["a b b"]:
        f1 = 200 * (1 / 1) * (1 / 2) / (1 / 1 + 1 / 2)
    assert metrics.accuracy(prediction, references) == acc
    assert metrics.exact_match(prediction, references) == em
    assert metrics.f1(prediction, references) == pytest.approx(f1)


def test_f1_first_looks_at_the_first_reference_only() -> None:
    assert metrics.f1_first("London", ["Paris", "London"]) == 0
    assert metrics.f1("London", ["Paris", "London"]) == 100


@given(st.text(), st.lists(st.text(), min_size=1, max_size=3))
def test_an_exact_match_has_full_f1(prediction: str, references: list[str]) -> None:
    f1 = metrics.f1(prediction, references)
    assert 0 <= f1 <= 100.0001
    if metrics.exact_match(prediction, references):
        assert f1 == pytest.approx(100)
    assert metrics.f1_first(prediction, references) <= f1


def test_questions_are_spread_over_the_file() -> None:
    rows = [{"n": i} for i in range(100)]
    assert [r["n"] for r in choose(rows, 4)] == [0, 25, 50, 75]
    assert [r["n"] for r in choose(rows, 60)][-3:] == [95, 96, 98]  # up to the end, also where every second is too few
    assert choose(rows[:3], 10) == rows[:3]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    texts = [{"text": f"{i} was here, and went on to number {i + 1}."} for i in range(5)]
    questions = [{"input": t["text"], "prompt": "Who?", "answer": str(i)} for i, t in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*texts, *questions]))
    return path


def test_restoration_of_a_model_that_restores_perfectly(
    gmsa: GMSA, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_length: dict[int, str] = {}
    compress = gmsa.compress

    def remember(texts: list[str], *args: int, **options: int) -> object:
        memories = compress(texts, *args, **options)
        by_length.update({id(m): t for m, t in zip(memories, texts, strict=True)})
        return memories

    monkeypatch.setattr(gmsa, "compress", remember)
    monkeypatch.setattr(gmsa, "restore", lambda memories, **_: [by_length[id(m)].strip() for m in memories])
    [(row, examples)] = evaluate_restoration(gmsa, str(data), [20], [4], limit=3)
    assert row["metrics"]["bleu"] == pytest.approx(1)
    assert row["metrics"]["prefix_em"] == row["metrics"]["rougeL"] == 1
    assert row["metrics"]["bertscore_f1"] is None  # no scorer was given
    assert row["ci"]["prefix_em"] == [1, 1]
    low, high = row["ci"]["token_accuracy"]
    assert low <= row["metrics"]["token_accuracy"] <= high
    assert row["n"] == len(examples) == 3
    assert row["tokens"] == {"context": 20, "soft": 5}
    assert 0 <= row["metrics"]["token_accuracy"] < 0.5  # the tiny model itself knows nothing
    assert row["metrics"]["perplexity"] > 2
    assert row["metrics"]["perplexity_text"] > 2


def test_restoration_without_scores_where_tokenizers_differ(
    data: Path, tiny_backbone: Callable[..., Backbone], tiny_model: Callable[..., GmsaModel]
) -> None:
    encoder = tiny_backbone("gpt2")
    encoder.tokenizer = make_tokenizer(reverse=True)
    gmsa = GMSA(tiny_model("llama", encoder), tiny_backbone("llama"), encoder)
    cache = AnswerCache(None, print)
    [(row, examples)] = evaluate_restoration(gmsa, str(data), [20], [4], 3, cache=cache)
    assert len(cache.answers) == row["n"] == 3
    for name in ("token_accuracy", "perplexity", "perplexity_text"):
        assert row["metrics"][name] is None
    assert row["metrics"]["bleu"] is not None
    assert set(row["ci"]) == {"prefix_em", "rouge1", "rouge2", "rougeL"}
    assert "token_accuracy" not in examples[0]


def test_an_interrupted_restoration_goes_on(
    gmsa: GMSA, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cache.jsonl"
    restore, restored = gmsa.restore, []

    def run(cache: AnswerCache | None) -> list[object]:
        return list(evaluate_restoration(gmsa, str(data), [16, 20], [4, 2], 5, 2, cache=cache))

    def restore_some(memories: list[Memory], **options: int) -> list[str]:
        if len(restored) == 7:  # of 20 texts, in batches of 2, 2 and 1 for each length and merge size
            raise KeyboardInterrupt
        restored.extend(memories)
        return restore(memories, **options)

    expected = run(None)
    monkeypatch.setattr(gmsa, "restore", restore_some)
    with pytest.raises(KeyboardInterrupt):
        run(AnswerCache(path, print))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]) + lines[-1][:9])  # the write of the last line broke off
    done = [line for line in lines[:-1] if "restored" in line]
    assert len(done) == 6

    restored.clear()
    monkeypatch.setattr(gmsa, "restore", lambda m, **o: restored.extend(m) or restore(m, **o))
    assert run(AnswerCache(path, print)) == expected
    assert len(restored) == 20 - len(done) + 1  # the batch of the broken line is restored whole, as before
    restored.clear()
    monkeypatch.setattr(gmsa, "score", None)  # not needed any more, nor anything else of the model
    monkeypatch.setattr(gmsa, "compress", None)
    assert run(AnswerCache(path, print)) == expected
    assert restored == []


def test_restored_texts_of_other_settings_are_kept_apart(
    make_gmsa: Callable[..., GMSA], gmsa: GMSA, data: Path
) -> None:
    cache = AnswerCache(None, print)
    list(evaluate_restoration(gmsa, str(data), [20], [4, 2], 3, cache=cache))
    assert len(cache.answers) == 3 + 2 * 3  # the texts themselves, and at each merge size
    other = make_gmsa(system_prompt="Be brief.")
    list(evaluate_restoration(other, str(data), [20], [4], 3, cache=cache))
    assert len(cache.answers) == 9 + 6


def test_questions_and_budgets(gmsa: GMSA, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gmsa, "read", lambda questions, memories, **_: ["2"] * len(questions))
    rows = [row for row, _ in evaluate_qa(gmsa, str(data), [2, 4], limit=5)]
    assert [r["merge_size"] for r in rows] == [2, 4]
    assert rows[0]["metrics"]["em"] == 20  # one of five
    assert rows[0]["tokens"]["soft"] > rows[1]["tokens"]["soft"]


def test_the_command_writes_one_shape_of_results(
    gmsa: GMSA, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gmsa.save_pretrained(tmp_path / "model")
    arguments = ["--data", str(data), "--merge-size", "4", "--limit", "2", "-o", str(tmp_path / "out")]
    model = ["--model", str(tmp_path / "model"), "--dtype", "float32"]
    assert main(["eval", "restoration", "--lengths", "16", *arguments, *model]) == 0
    assert "gmsa, 16 tokens, 4x, n=2: bleu" in capsys.readouterr().out
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert [set(row) for row in results["rows"]] == [set(FIELDS)]
    assert results["meta"]["model_fingerprint"] == gmsa.fingerprint
    assert results["meta"]["weights_fingerprint"] == fingerprint_of(gmsa.model)
    assert len((tmp_path / "out/examples.jsonl").read_text().splitlines()) == 2
    with monkeypatch.context() as patch:  # again: the same numbers, and nothing is restored
        patch.setattr(GMSA, "restore", None)
        assert main(["eval", "restoration", "--lengths", "16", *arguments, *model]) == 0
    assert json.loads((tmp_path / "out/results.json").read_text())["rows"] == results["rows"]
    assert main(["eval", "restoration", "--lengths", "9999", *arguments, *model]) == 1
    assert "no text of 9999 tokens" in capsys.readouterr().err


def test_a_file_without_questions(gmsa: GMSA, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "x"}\n')
    with pytest.raises(InputError, match="no rows with input"):
        next(evaluate_qa(gmsa, str(path), [2]))
