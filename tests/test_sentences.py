import math
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_tokenizer

from gmsa.errors import InputError
from gmsa.sentences import LEAST, NEIGHBOUR, bm25, kept, ranked, split_sentences, take

TOKENIZER = make_tokenizer()  # a token is a byte


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
    assert split_sentences("他走了。「下雨了！」她说。完") == ["他走了。", "「下雨了！」", "她说。", "完"]
    assert split_sentences("") == split_sentences(" \n") == []


@given(st.text(alphabet="aB. !?\n\"'", max_size=40))
def test_no_letter_of_a_text_is_in_no_sentence(text: str) -> None:
    assert "".join(split_sentences(text)) == text.lstrip()


def test_bm25_is_lucenes_formula() -> None:
    rng = random.Random(0)
    words = ["ant", "bee", "cat", "dog", "elk", "fox"]
    sentences = [" ".join(rng.choices(words, k=rng.choice([1, 2, 30]))) + ".\n\n" for _ in range(7)]
    documents = [Counter(sentence.strip(".\n").split()) for sentence in sentences]
    lengths = [sum(document.values()) for document in documents]
    mean = sum(lengths) / len(lengths)
    expected = []
    for document, length in zip(documents, lengths, strict=True):
        score = 0.0
        for word in ("cat", "fox"):
            having = sum(word in other for other in documents)
            rarity = math.log(1 + (len(documents) - having + 0.5) / (having + 0.5))
            score += rarity * document[word] / (document[word] + 1.5 * (0.25 + 0.75 * length / mean))
        expected.append(score)
    expected = [score if score > LEAST * max(expected) else 0.0 for score in expected]
    assert 0 < expected.count(0.0) < len(expected) - 1
    # Stop words of the question count for nothing; blank lines keep neighbours apart.
    assert bm25(sentences, "Is the Cat with a fox?") == pytest.approx(expected, abs=1e-5)


def test_jax_is_not_started(tmp_path: Path) -> None:
    (tmp_path / "jax").mkdir()
    for name in ("__init__", "lax"):
        (tmp_path / "jax" / f"{name}.py").write_text("raise SystemExit('JAX was started')")
    code = "from gmsa.sentences import bm25; import sys; print(bm25(['A mill. '], 'mill?'), 'jax.lax' in sys.modules)"
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
    ran = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert ran.stdout.endswith("] False\n")


def test_where_no_space_ends_words_each_character_is_one() -> None:
    cats, mill = bm25(["猫在睡觉。", "磨坊建于1731年。"], "磨坊是何时建的？")
    assert mill > cats


def test_a_sentence_has_a_share_of_its_neighbours_in_the_same_paragraph() -> None:
    alone = bm25(["Rye. \n\n", "A mill. \n\n", "Ants. \n\n", "Bees."], "mill?")
    beside = bm25(["Rye. ", "A mill. ", "Ants. \n\n", "Bees."], "mill?")
    assert alone == [0.0, pytest.approx(alone[1]), 0.0, 0.0]
    assert beside == pytest.approx([NEIGHBOUR * alone[1], alone[1], NEIGHBOUR * alone[1], 0.0])


@pytest.mark.parametrize("question", ["", "?!", "What is it about?", "zebra"])
def test_there_may_be_nothing_to_rank_by(question: str) -> None:
    assert bm25(["A mill. ", "It is old."], question) == [0.0, 0.0]
    assert bm25([], question) == []


def test_the_best_are_taken_whole_and_the_next_is_cut() -> None:
    sentences = ["One is here. ", "Two. ", "Three. "]
    assert take(sentences, [0.0, 2.0, 1.0], 12, TOKENIZER) == {1: "Two. ", 2: "Three. "}
    assert take(sentences, [0.0, 2.0, 1.0], 16, TOKENIZER) == {0: "One ", 1: "Two. ", 2: "Three. "}
    assert take(sentences, [1.0, 1.0, 1.0], 13, TOKENIZER) == {0: "One is here. "}  # of equals the first


@settings(deadline=None)
@given(st.lists(st.text(alphabet="ab. \n", max_size=30), max_size=4), st.integers(1, 60))
def test_what_is_kept_is_in_the_text_and_fits(texts: list[str], room: int) -> None:
    found = kept(ranked(texts, "b?", lambda sentences, _: [float(len(s)) for s in sentences]), room, TOKENIZER)
    assert len(found) == len(texts)
    assert sum(map(len, found)) <= room
    for text, part in zip(texts, found, strict=True):
        assert part == "" or part.strip()
        assert all(word in text for word in part.split())


def test_sentences_of_all_texts_compete_and_only_those_of_one_are_neighbours() -> None:
    texts = ["The mill is old. It is flat.", "Rye grows. ", "A mill. They say so."]
    documents = ranked(texts, "mill", bm25)
    assert [sentences for sentences, _ in documents] == [split_sentences(text) for text in texts]
    assert documents[1][1] == [0.0]  # although a mill begins the next text
    assert kept(documents, 100, TOKENIZER) == ["The mill is old. ", "", texts[2]]  # what fits far less is not
    assert kept(ranked(texts, "zebra", bm25), 100, TOKENIZER) == texts
    assert kept(documents, len("The mill is old. A mill. "), TOKENIZER) == ["The mill is old. ", "", "A mill. "]


def test_a_cut_leaves_no_part_of_a_character() -> None:
    text = "砖🧱" * 9
    for room in range(1, 40):
        taken = "".join(take([text], [1.0], room, TOKENIZER).values())
        assert text.startswith(taken.rstrip())


def test_a_rank_must_rank_every_sentence() -> None:
    with pytest.raises(InputError, match="rank gave 1 scores for 2 sentences"):
        ranked(["One. Two."], "one?", lambda sentences, question: [1.0])
    with pytest.raises(InputError, match="a score for each sentence, got NoneType"):
        ranked(["One. Two."], "one?", lambda sentences, question: None)  # type: ignore[arg-type, return-value]
    for scores in ([math.nan, 1.0], ["1", "2"], [None, 1.0]):
        with pytest.raises(InputError, match="a finite number for each sentence"):
            ranked(["One. Two."], "one?", lambda sentences, question, scores=scores: scores)
    with pytest.raises(InputError, match="rank must be a function"):
        ranked(["One. Two."], "one?", "bm25")  # type: ignore[arg-type]


def test_threads_may_be_the_first_to_rank_at_once() -> None:
    code = """
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from gmsa.sentences import bm25

together = Barrier(4)

def rank(_):
    together.wait()
    return bm25(["The mill was built in 1731. "], "mill")

with ThreadPoolExecutor(4) as pool:
    assert all(scores[0] > 0 for scores in pool.map(rank, range(4)))
"""
    subprocess.run([sys.executable, "-c", code], check=True)
