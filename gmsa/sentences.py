"""Sentences that fit a question, for memories that are made to answer it (`GMSA.compress_for`), and for baselines.

They are ranked by BM25 (Lucene's variant, https://arxiv.org/abs/2407.03618) without stemming, with or without what the
decoder attends to (gmsa/attention.py). A sentence has a share of what its neighbours have, too: it may say "he" where
they say whom.
"""

import functools
import logging
import math
import re
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from gmsa.errors import InputError
from gmsa.text import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# From a first letter to ., ! or ? (and closing quotes) before white space, or to a line break, with the space after it;
# Chinese and Japanese have no space. No list of abbreviations: "Dr. Smith" is cut in two.
SENTENCE = re.compile(r"\S.*?(?:[.!?][\"'”’)\]]*(?=\s|$)|[。！？][\"'”’」』）]*|(?=\n)|$)\s*")
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")
BLANK_LINE = re.compile(r"\n\s*\n")
FOR_A_QUESTION = 2  # merge size of memories for one question: what it loses of the default model's answers is 6 %
NEIGHBOUR = 0.3  # of a neighbour's score
LEAST = 0.25  # of the best one's score by words; less than NEIGHBOUR, so that the best one's neighbours stay
ATTENTION = 3.0  # what all of it weighs beside the best sentence's words
LEAST_OF_BOTH = 0.4  # where attention counts, too, of which every sentence has some
IMPORTING = threading.Lock()
# How well each of some sentences fits a question: higher is better, 0 not at all. Documents end with a blank line.
Rank = Callable[[list[str], str], Sequence[float]]


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, each with the white space after it: joined they are the text from its first word on."""
    return SENTENCE.findall(text)


def words_of(text: str) -> list[str]:
    """Runs of letters and digits, in lower case; Chinese and Japanese characters one by one, as no space ends words."""
    return WORD.findall(text.lower())


def bm25(sentences: list[str], question: str) -> list[float]:
    """How well each sentence fits a question by its words (`shared_words`); 0 where that is little.

    What has no more than LEAST of the best score has 0: it would distract.
    """
    return without_least(shared_words(sentences, question), LEAST)


def shared_words(sentences: list[str], question: str) -> list[float]:
    """BM25 of each sentence for a question, without English stop words; 0 where it shares no word.

    Document frequencies are those of these sentences. Neighbours have a share (`with_neighbours`).
    """
    bm25s = _bm25s()
    stop = set(bm25s.stopwords.STOPWORDS_EN_PLUS)
    query = [word for word in words_of(question) if word not in stop]
    if not sentences or not query:  # bm25s takes neither
        return [0.0] * len(sentences)
    index = bm25s.BM25()
    index.index([words_of(sentence) or [""] for sentence in sentences], show_progress=False)
    return with_neighbours(sentences, index.get_scores(query).tolist())


def _bm25s() -> Any:
    """The library, imported once, whichever threads ask for it first."""
    with IMPORTING:
        return _import_bm25s()


@functools.cache
def _import_bm25s() -> Any:
    """On import it would start JAX where that is installed: most of a GPU's memory in every process."""
    without = sys.modules.setdefault("jax.lax", None) is None  # type: ignore[arg-type]
    try:
        import bm25s
        import bm25s.stopwords
    finally:
        if without:
            del sys.modules["jax.lax"]
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it tells every index at DEBUG to whoever logs anything
    return bm25s


def with_neighbours(sentences: Sequence[str], scores: Sequence[float]) -> list[float]:
    """Scores with NEIGHBOUR of those of the sentences before and after added, but not across a blank line."""
    own = [0.0, *scores, 0.0]
    joined = [False, *(not BLANK_LINE.search(sentence) for sentence in sentences[:-1]), False]
    return [own[i + 1] + NEIGHBOUR * (joined[i] * own[i] + joined[i + 1] * own[i + 2]) for i in range(len(sentences))]


def together(words: Sequence[float], attention: Sequence[float]) -> list[float]:
    """Two ways of ranking sentences as one; what has no more than LEAST_OF_BOTH of the best has 0.

    Words count relative to the best sentence, attention as the share that a sentence has of all of it: among hundreds
    of sentences no share is large, and then it is less to be trusted, too.

    Args:
        words: from `bm25`.
        attention: as many, with neighbours.
    """
    most, whole = max(words, default=0.0) or 1.0, sum(attention) or 1.0
    scores = [word / most + ATTENTION * share / whole for word, share in zip(words, attention, strict=True)]
    return without_least(scores, LEAST_OF_BOTH)


def without_least(scores: list[float], share: float) -> list[float]:
    """Scores, 0 in place of those that have no more than a share of the best one."""
    best = max(scores, default=0.0)
    return [score if score > share * best else 0.0 for score in scores]


def take(
    sentences: Sequence[str], scores: Sequence[float], room: int, tokenizer: "PreTrainedTokenizerBase"
) -> dict[int, str]:
    """What is taken of which sentence, by its place: the best first, whole while they fit in `room` tokens.

    The first that does not fit is cut to what is left, so that all of the room is used.
    """
    taken: dict[int, str] = {}
    for place in sorted(range(len(sentences)), key=lambda i: -scores[i]):  # stable: the earlier of equals first
        ids = encode(tokenizer, sentences[place])
        # What follows a cut sentence must not run into it.
        whole = len(ids) <= room
        part = sentences[place] if whole else tokenizer.decode(ids[: room - 1]).rstrip("\ufffd").rstrip() + " "
        if part.strip():  # a cut may leave but a part of a character
            taken[place] = part
        room -= len(ids)
        if room <= 0:
            break
    return taken


def ranked(texts: Sequence[str], question: str, rank: Rank) -> list[tuple[list[str], Sequence[float]]]:
    """The sentences of each text and how well they fit a question, ranked among those of all texts."""
    documents = [split_sentences(text) for text in texts]
    sentences: list[str] = []
    for document in documents:
        if sentences and document:
            sentences[-1] += "\n\n"
        sentences += document
    if not callable(rank):
        raise InputError(f"rank must be a function of sentences and a question, got {type(rank).__name__}")
    given: object = rank(sentences, question)
    if not isinstance(given, Iterable):
        raise InputError(f"rank must give a score for each sentence, got {type(given).__name__}")
    try:
        scores = [math.nan if isinstance(score, str) else float(score) for score in given]
    except (TypeError, ValueError):
        scores = [math.nan]
    if not all(map(math.isfinite, scores)):
        raise InputError("rank must give a finite number for each sentence")
    if len(scores) != len(sentences):
        raise InputError(f"rank gave {len(scores)} scores for {len(sentences)} sentences")
    found: list[tuple[list[str], Sequence[float]]] = []
    place = 0
    for document in documents:
        found.append((document, scores[place : place + len(document)]))
        place += len(document)
    return found


def kept(
    documents: Sequence[tuple[list[str], Sequence[float]]], room: int, tokenizer: "PreTrainedTokenizerBase"
) -> list[str]:
    """What is kept of each text: the best sentences of all of them, in their order, in `room` tokens.

    Those with a score of 0 are not kept, even if there is room, unless all have it.

    Args:
        documents: from `ranked`.
        room: tokens, sentence by sentence.
        tokenizer: that counts them.

    Returns:
        A text for each; "" where nothing is kept.
    """
    sentences = [sentence for document, _ in documents for sentence in document]
    scores = [score for _, scores in documents for score in scores]
    none = not any(scores)
    places = [place for place, score in enumerate(scores) if none or score != 0]
    taken = take([sentences[i] for i in places], [scores[i] for i in places], room, tokenizer)
    parts = {places[i]: part for i, part in taken.items()}
    texts, place = [], 0
    for document, _ in documents:
        text = "".join(parts[i] for i in range(place, place + len(document)) if i in parts)
        texts.append(text if text.strip() else "")
        place += len(document)
    return texts
