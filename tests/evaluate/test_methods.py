import importlib.util
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import BEGIN, END, VOCABULARY, make_model, make_tokenizer
from transformers import BertConfig, BertModel, DebertaV2Config, DebertaV2Model, ModernBertConfig, ModernBertModel

from gmsa import GMSA
from gmsa.cli.main import main
from gmsa.errors import CheckpointError, InputError
from gmsa.evaluate.methods import METHODS, RESTORE, kv_cache, load_methods, provence, semanticache, sentences
from gmsa.evaluate.methods import exit as exit_method
from gmsa.evaluate.methods.base import Method, Models, Question, TextMethod
from gmsa.evaluate.methods.sentences import Bm25Sentences
from gmsa.evaluate.qa import AnswerRun, choose, evaluate_qa
from gmsa.evaluate.results import AnswerCache
from gmsa.io.loading import GmsaModel

UNAVAILABLE = ("llmlingua-2", "provence", "open-provence", "exit")  # offline; the last three have tests of their own
NO_LLMLINGUA = importlib.util.find_spec("llmlingua") is None
TRAINED = [f"{name}-trained" for name in ("original-prompt", "truncate-head")]
ALL = [*(name for name in METHODS if name not in UNAVAILABLE), *TRAINED]
QUESTIONS = [
    Question(["The mill was built in 1731. It ground rye. Its owner was a widow from the north."], "Who owned it?"),
    Question(["Ants.", "Bees live in hives! Do wasps? They do not.\nSome do."], "Where do bees live?"),
    Question(["A."], "What?"),
]


@pytest.fixture(scope="module")
def gmsa(make_gmsa: Callable[..., GMSA]) -> GMSA:
    return make_gmsa(taught=True)


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
    monkeypatch.setattr(sentences, "find_minilm", lambda: str(tiny_bert))

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
        return method.answer(questions, method.read(questions, 2), 6, 8)

    together = answers(QUESTIONS)
    assert together == [answers([question])[0] for question in QUESTIONS]
    assert answers(QUESTIONS[::-1]) == together[::-1]


@pytest.mark.parametrize("name", ALL)
def test_questions_about_one_text_are_answered_as_each_alone(
    load: Callable[[str], Method], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = load(name)
    questions = [Question(QUESTIONS[0].documents, prompt) for prompt in ("Who?", "What is it about?", "Where, then?")]

    def answers(questions: list[Question]) -> list[str]:
        run = AnswerRun(method, 2 if method.compresses else None, 6, 8, AnswerCache(None, pytest.fail))
        return [entry["predicted"] for entry in run.answer(questions, lambda _: None)]

    alone = [answers([question])[0] for question in questions]
    read, reads = method.read, list[int]()
    monkeypatch.setattr(method, "read", lambda part, size: reads.append(len(part)) or read(part, size))
    assert answers(questions) == alone
    assert reads == [1 if method.query_agnostic else 3]


@pytest.mark.parametrize("name", [name for name in ALL if name not in RESTORE])
def test_a_context_may_be_blank(load: Callable[[str], Method], name: str) -> None:
    method = load(name)
    question = Question([" "], "What?")
    [reading] = method.read([question], 4)
    assert len(reading) <= 1
    assert len(method.answer([question], [reading], 2, 8)) == 1


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


def test_bm25_takes_the_sentence_with_the_rare_word(load: Callable[[str], Bm25Sentences]) -> None:
    text = "The town is old. The town has a zeppelin hangar. The town is small. The town is flat."
    method = load("bm25-sentences")
    budget = len("The town has a zeppelin hangar. ")
    assert method.shorten(text, "What about the zeppelin in the town?", budget) == "The town has a zeppelin hangar. "
    assert method.shorten(text, "What about the zeppelin in the town?", 9) == "The town "  # of the best one
    # What is left of the budget goes to the next best, in the order of the text.
    assert method.shorten(text, "zeppelin", budget + 3) == "Th The town has a zeppelin hangar. "
    assert method.shorten(text, "?", 9) == "The town "  # no words to rank by: from the beginning


def test_hybrid_reads_the_best_sentences_and_memories_of_the_rest(load: Callable[[str], Any]) -> None:
    method = load("gmsa-hybrid")
    assert method.reader is method.models.gmsa  # whose soft tokens nobody else can read
    rests: list[list[str]] = []
    compress = method.reader.compress
    method.reader.compress = lambda texts, size: rests.append([*texts, size]) or compress(texts, size)
    first = "It is old. It has a zeppelin. It is flat, and it is far from all others. "
    try:
        [output] = method.read([Question([first, "Rye grows. "], "zeppelin?")], 2)
    finally:
        del method.reader.compress
    *_, ids = output.content
    # 21 of 43 tokens: the best sentence, the beginning of the next, and a line break before them.
    assert method.reader.tokenizer.decode(ids) == "\nI It has a zeppelin. "
    rest = "It is old. It is flat, and it is far from all others. "  # with the sentence that was cut
    assert rests == [[rest, "Rye grows. ", 4]]
    assert len(output) <= 43 == math.ceil(len(first + "\n\nRye grows. ") / 2)
    # Nothing of the text for a budget of one token, and no memory where all of it is taken.
    assert [len(part) for part in method.read([Question(["abc"], "?")], 3)[0].content] == [1, 0]


@pytest.mark.parametrize("name", ["gmsa-chosen-sentences", "gmsa-bm25-sentences", "gmsa-embedding-sentences"])
def test_soft_tokens_of_chosen_sentences(load: Callable[[str], Any], name: str) -> None:
    method = load(name)
    assert method.reader is method.models.gmsa  # whose soft tokens nobody else can read
    best = "Who owned it? "
    documents = ["Some rye was sold. Nothing else. ", f"The mill burnt down. {best}Nothing at all is known, dear."]
    [output] = method.read([Question(documents, best)], 8)
    kept, size = method.reader.choose_for(best, documents, 8, method.rank)
    assert size == 2
    if name != "gmsa-chosen-sentences":  # an untrained model attends to everything
        assert not kept[0]
        assert best in kept[1]
    texts = [text for text in kept if text]
    assert len(output) <= math.ceil(len("".join(documents)) / 8)
    for memory, text in zip(output.content, texts, strict=True):
        assert len(memory) == math.ceil(len(text) / 2)
        torch.testing.assert_close(memory.soft_tokens, method.reader.compress(text, 2).soft_tokens)


def test_chosen_sentences_are_those_that_soft_tokens_are_made_of(load: Callable[[str], Any]) -> None:
    method = load("chosen-sentences")
    text = "Some rye was sold. Nothing else. The mill burnt down. Who owned it? Nothing at all is known, dear."
    stays, _ = method.models.gmsa.choose_for("Who owned it?", [text], 4)
    assert method.shorten(text, "Who owned it?", 2 * math.ceil(len(text) / 4)) == stays[0]
    # What another model chooses is not found in a cache.
    weight = next(method.models.gmsa.model.compressor.encoder.parameters())
    was = weight.detach().clone()
    weight.data += 1
    assert load("chosen-sentences").fingerprint != method.fingerprint
    weight.data = was
    assert load("chosen-sentences").fingerprint == method.fingerprint


def test_embeddings_prefer_the_same_words(load: Callable[[str], TextMethod]) -> None:
    method = load("embedding-sentences")
    text = "Some rye was sold. Who owned it? Nothing else."
    assert method.shorten(text, "Who owned it? ", len("Who owned it? ")) == "Who owned it? "


TOPICS = ["Ants dig. ", "Rye grows. ", "Ants eat. ", "Rye is sold. ", "Ants run, too. "]  # three of ants, two of rye


@pytest.fixture
def topical(load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Load a method that finds ants and rye at right angles, and the second sentence of ants the most central one."""
    angles = {"Ants dig. ": -0.4, "Ants eat. ": 0.0, "Ants run, too. ": 0.5, "Rye grows. ": 1.6, "Rye is sold. ": 1.7}

    def load_one(name: str) -> Any:
        method = load(name)
        vectors = {text: [math.cos(angle), max(0.0, math.sin(angle)), max(0.0, -math.sin(angle))]
                   for text, angle in angles.items()}  # fmt: skip
        monkeypatch.setattr(method, "embed", lambda texts: torch.tensor([vectors[text] for text in texts]))
        return method

    return load_one


def test_semantic_compression_takes_the_middle_of_every_topic(topical: Callable[[str], Any]) -> None:
    method = topical("semantic-compression")
    [ants, rye] = method.topics(TOPICS)
    assert [ants[0], rye[0]] == [[0, 2, 4], [1, 3]]
    assert ants[1][0] == 2
    scores = method.rank(TOPICS, "?")
    assert sorted(range(5), key=lambda i: -scores[i]) == [2, rye[1][0], *ants[1][1:2], rye[1][1], ants[1][2]]
    text = "".join(TOPICS)
    first = [TOPICS[2], TOPICS[rye[1][0]]]  # both topics within a budget for two sentences
    assert method.shorten(text, "?", sum(map(len, first))) == "".join(sorted(first, key=TOPICS.index))


def test_semantic_summaries_are_of_every_topic(topical: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    method = topical("semantic-summary")
    read, asked = method.models.backbone.read, []

    def note(prompts: list[str], contents: list[Any], **options: int) -> list[str]:
        asked.append([method.decode(ids) for [ids] in contents])
        read(prompts, contents, **options)
        return [{"A": "About ants.", "R": "About the rye."}[text[0]] for text in asked[-1]]

    monkeypatch.setattr(method.models.backbone, "read", note)
    text = "".join(TOPICS)
    assert method.shorten(text, "?", 24) == "About ants.\nAbout th"  # 14 and 9 of 24 tokens, less a line break each
    ants, rye = "Ants dig. Ants eat. Ants run, too. ", "Rye grows. Rye is sold. "
    assert asked.pop() == [ants, rye]
    assert method.shorten("", "?", 1) == ""
    # Topics of several texts are written side by side, the longest summaries first.
    first, second = method.shorten_all([Question([text], "?"), Question([ants], "?")], [24, 16])
    assert (first, second) == ("About ants.\nAbout th", "About ants.")
    assert asked == [[ants, ants, rye]]


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


# -- models of others, as tiny random ones -----------------------------------------------------------------------------


@pytest.fixture
def provence_folder(tmp_path: Path) -> Path:
    """Files laid out as the published model's: a configuration that names code, and one file of weights."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    fields = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0}
    config = DebertaV2Config(vocab_size=VOCABULARY, initializer_range=0.5, **sizes, **fields)
    torch.manual_seed(0)
    parts = {"deberta.": DebertaV2Model(config), "token_classifier.": torch.nn.Linear(16, 2),
             "classifier.": torch.nn.Linear(16, 1)}  # fmt: skip
    weights = {prefix + k: v for prefix, part in parts.items() for k, v in part.state_dict().items()}
    make_tokenizer(cls_token="<|begin|>", sep_token="<|end|>").save_pretrained(tmp_path)
    save_file(weights, tmp_path / "model.safetensors")
    config.save_pretrained(tmp_path)
    entries = json.loads((tmp_path / "config.json").read_text())
    entries |= {"model_type": "Provence", "auto_map": {"AutoModel": "modeling_provence.Provence"}}
    (tmp_path / "config.json").write_text(json.dumps(entries))
    return tmp_path


def test_provence_ranks_by_the_mean_over_a_sentence(
    gmsa: GMSA, provence_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provence.Provence, "made_with", str(provence_folder))
    [method] = load_methods(["provence"], Models(gmsa), print)
    question, sentences = "Who?", ["It was she. ", "He left. "]
    ids = [BEGIN, *b"Who?", END, *b"It was she. He left. ", END]
    shift = {byte: method.tokenizer.encode(chr(byte), add_special_tokens=False)[0] for byte in range(32, 127)}
    row = torch.tensor([[token if token >= 256 else shift[token] for token in ids]])
    with torch.no_grad():
        keep = torch.sigmoid(method.head(method.body(row).last_hidden_state) @ torch.tensor([-1.0, 1.0]))[0]
    expected = [float(keep[6:18].mean()), float(keep[18:27].mean())]
    assert method.rank(sentences, question) == pytest.approx(expected, abs=1e-5)
    # What does not fit beside them is read in windows of its own, with the question again.
    monkeypatch.setattr(provence, "LONGEST", 4 + 3 + 12)
    alone = [method.rank([s], question)[0] for s in sentences]
    assert method.rank(sentences, question) == pytest.approx(alone, abs=1e-5)
    assert alone[1] != pytest.approx(expected[1], abs=1e-5)
    [reading] = method.read(QUESTIONS[:1], 2)
    assert len(reading) == math.ceil(len(QUESTIONS[0].context) / 2)


def test_other_weights_than_provence(gmsa: GMSA, provence_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provence.Provence, "made_with", str(provence_folder))
    save_file({"deberta.x": torch.zeros(1)}, provence_folder / "model.safetensors")
    notes: list[str] = []
    assert load_methods(["provence"], Models(gmsa), notes.append) == []
    assert "are not those of a Deberta" in notes[0]


def test_open_provence_reads_the_states_before_the_last_norm(
    gmsa: GMSA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = ModernBertConfig(vocab_size=VOCABULARY, initializer_range=0.5, pad_token_id=0, **sizes)
    torch.manual_seed(0)
    body, head = ModernBertModel(config).eval(), torch.nn.Linear(16, 2)
    torch.nn.init.uniform_(body.final_norm.weight)
    parts = {"ranking_model.model.": body, "ranking_model.classifier.": torch.nn.Linear(16, 1),
             "pruning_head.classifier.": head}  # fmt: skip
    save_file({a + b: w for a, part in parts.items() for b, w in part.state_dict().items()},
              tmp_path / "model.safetensors")  # fmt: skip
    make_tokenizer(cls_token="<|begin|>", sep_token="<|end|>").save_pretrained(tmp_path)
    entries = {"model_type": "open_provence", "base_model_config": config.to_dict()}
    (tmp_path / "config.json").write_text(json.dumps(entries))
    monkeypatch.setattr(provence.OpenProvence, "made_with", str(tmp_path))
    [method] = load_methods(["open-provence"], Models(gmsa), print)
    byte = {i: method.tokenizer.encode(chr(i), add_special_tokens=False)[0] for i in range(32, 127)}
    ids = [BEGIN, *(byte[i] for i in b"Who?"), END, *(byte[i] for i in b"It was she. He left. "), END]
    states: list[torch.Tensor] = []
    body.final_norm.register_forward_pre_hook(lambda _, given: states.append(given[0]))
    with torch.no_grad():
        body(torch.tensor([ids]))
        keep = head(states[0])[0].softmax(-1)[:, 1]
    expected = [float(keep[6:18].mean()), float(keep[18:27].mean())]
    assert method.rank(["It was she. ", "He left. "], "Who?") == pytest.approx(expected, abs=1e-5)


def test_windows_hold_whole_parts() -> None:
    assert provence.windows([[1, 2], [3], [4, 5, 6, 7, 8], [9]], 4) == [[[1, 2], [3]], [[4, 5, 6, 7]], [[9]]]
    assert provence.windows([], 4) == []


def test_exit_asks_of_every_sentence(
    gmsa: GMSA, save_backbone: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = pytest.importorskip("peft")
    base = save_backbone("llama", max_position_embeddings=2048)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(make_model("llama", max_position_embeddings=2048), lora).save_pretrained(tmp_path)
    monkeypatch.setattr(exit_method, "BASE", str(base))
    monkeypatch.setattr(exit_method, "ADAPTER", str(tmp_path))
    [method] = load_methods(["exit"], Models(gmsa), print)
    sentences = ["It was she who left. ", "He did. ", "They all did, then. "]
    found = method.rank(sentences, "Who?")
    model = peft.PeftModel.from_pretrained(make_model("llama", max_position_embeddings=2048), tmp_path)
    for sentence, score in zip(sentences, found, strict=True):
        text = (
            "<start_of_turn>user\nQuery:\nWho?\nFull context:\nIt was she who left. He did. They all did, then. \n"
            f"Sentence:\n{sentence.strip()}\nIs this sentence useful in answering the query? "
            'Answer only "Yes" or "No".<end_of_turn>\n<start_of_turn>model\n'
        )
        with torch.no_grad():
            logits = model(**method.tokenizer(text, return_tensors="pt")).logits[0, -1]
        yes, no = (method.tokenizer.encode(word, add_special_tokens=False)[0] for word in ("Y", "N"))
        assert score == pytest.approx(float(torch.sigmoid(logits[yes] - logits[no])), abs=1e-4)
    assert len(set(found)) == 3
    monkeypatch.setattr(exit_method, "LONGEST", 200)
    assert len(method.prompt("A.", "Who?", "x" * 300)) == 200
    assert method.tokenizer.decode(method.prompt("A.", "Who?", "x" * 300)).endswith("<start_of_turn>model\n")


# -- parts of a cache --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "cohere"])
@pytest.mark.parametrize("name", ["snapkv", "kvzip", "streaming-llm", "semanticache"])
def test_a_cache_kept_whole_answers_as_the_original_prompt(
    make_gmsa: Callable[..., GMSA], name: str, family: str
) -> None:
    models = Models(make_gmsa(family))
    found = []
    for method in load_methods([name, "original-prompt"], models, print):
        found.append(method.answer(QUESTIONS, method.read(QUESTIONS, 1), 8, 2))
    assert found[0] == found[1]
    assert len({*found[0]}) > 1


def prefilled(method: Method, question: Question) -> tuple[Any, tuple[int, int]]:
    """The model's output after the whole prompt, attention included, and where the context stands."""
    prompt, ids = method.reader.template(question.prompt), method.reader.template.encode(question.context)
    decoder = method.reader.model.decoder
    row = torch.cat([prompt.before, torch.tensor(ids), prompt.after])[None]
    try:
        decoder.set_attn_implementation("eager")
        with torch.no_grad():
            out = decoder(row, output_attentions=True, use_cache=True)
    finally:
        decoder.set_attn_implementation("sdpa")
    return out, (len(prompt.before), len(prompt.before) + len(ids))


def test_snapkv_keeps_what_the_question_attends_to(load: Callable[[str], Any]) -> None:
    method = load("snapkv")
    for question, reading in zip(QUESTIONS[:2], method.read(QUESTIONS, 4), strict=False):  # a batch with padding
        out, (start, end) = prefilled(method, question)
        for layer, (keys, values) in enumerate(reading.content.layers):
            weights = out.attentions[layer][0, :, end:, start:end].mean(dim=1)  # (4 heads, L)
            weights = weights.unflatten(0, (2, 2)).mean(dim=1)  # (2 of keys, L)
            padded = torch.nn.functional.pad(weights, (2, 2))
            smooth = sum(padded[:, i : i + end - start] for i in range(5))
            cache = out.past_key_values.layers[layer]
            for head in range(2):
                places = [start + i for i in sorted(smooth[head].argsort(descending=True)[: len(reading)].tolist())]
                expected = cache.keys[0, head, [*range(start), *places]]
                torch.testing.assert_close(keys[head], expected, atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(values[head, start:], cache.values[0, head, places], atol=1e-4, rtol=1e-4)


def test_kvzip_keeps_what_repeating_the_context_attends_to(
    load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_cache, "QUERIES", 7)  # so that the highest is one of several parts
    method = load("kvzip")
    question = QUESTIONS[1]
    [reading], [other] = method.read([question], 4), method.read([Question(question.documents, "Whose?")], 4)
    frame, ids = method.reader.template(kv_cache.REPEAT), torch.tensor(method.reader.template.encode(question.context))
    start, end = len(frame.before), len(frame.before) + len(ids)
    decoder = method.reader.model.decoder
    try:
        decoder.set_attn_implementation("eager")
        with torch.no_grad():
            row = torch.cat([frame.before, ids, frame.after, ids])[None]
            out = decoder(row, output_attentions=True, use_cache=True)
    finally:
        decoder.set_attn_implementation("sdpa")
    for layer, (keys, values) in enumerate(reading.content.layers):
        highest = out.attentions[layer][0, :, end:, start:end].amax(dim=1).unflatten(0, (2, 2)).amax(dim=1)
        cache = out.past_key_values.layers[layer]
        for head in range(2):
            places = [start + i for i in sorted(highest[head].argsort(descending=True)[: len(reading)].tolist())]
            torch.testing.assert_close(keys[head, start:], cache.keys[0, head, places], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(values[head, start:], cache.values[0, head, places], atol=1e-4, rtol=1e-4)
        assert torch.equal(keys, other.content.layers[layer][0])  # whatever is asked


def test_semanticache_cuts_at_delimiters() -> None:
    tokens = ["It", " was", ",", " then", ".", " No", ".", " End"]
    assert semanticache.chunk_ends(tokens, 2) == [3, 5, 7, 8]
    assert semanticache.chunk_ends(tokens, 4) == [5, 8]  # one must be long enough for the budget
    assert semanticache.chunk_ends([], 1) == []
    assert semanticache.chunk_ends(["x"] * 100, 1) == [64, 100]


def test_semanticache_merges_alike_keys_of_a_chunk() -> None:
    east, north, west = [1.0, 0.0], [0.0, 2.0], [-1.0, 0.1]
    keys = torch.tensor([[east, north, [2.0, 0.1], east, west]])  # two chunks: three tokens and two
    clusters = semanticache.cluster(keys, [3, 5], 4)
    assert clusters.tolist() == [[0, 1, 0, 3, 4]]  # alike, and never across chunks
    assert semanticache.cluster(keys, [3, 5], 5).tolist() == [[0, 1, 2, 3, 4]]
    assert semanticache.cluster(keys, [3, 5], 2).tolist() == [[0, 0, 0, 3, 3]]
    torch.testing.assert_close(
        semanticache.mean_of_clusters(keys, clusters),
        torch.tensor([[[1.5, 0.05], north, [1.5, 0.05], east, west]]),
    )


def test_semanticache_attends_to_a_core_as_to_all_that_it_stands_for(load: Callable[[str], Any]) -> None:
    method = load("semanticache")
    [output] = method.read(QUESTIONS[:1], 4)
    assert len(output) <= math.ceil(len(QUESTIONS[0].context) / 4)
    start = len(method.reader.template("?").before)
    for keys, values in output.content.layers:
        for head in range(2):
            cores, number, counts = keys[head, start:].unique(dim=0, return_inverse=True, return_counts=True)
            assert len(cores) <= len(output)
            query = torch.randn(12)
            found = (keys[head, start:] @ query).softmax(0) @ values[head, start:]
            core_values = torch.stack([values[head, start:][number == i][0] for i in range(len(cores))])
            weights = (cores @ query + counts.log()).softmax(0)  # the paper's proportional attention
            torch.testing.assert_close(found, weights @ core_values, atol=1e-4, rtol=1e-4)


def test_streaming_keeps_both_ends(make_gmsa: Callable[..., GMSA]) -> None:
    models = Models(make_gmsa(prompt="plain"))
    [method] = load_methods(["streaming-llm"], models, print)
    [reading] = method.read(QUESTIONS[:1], 4)
    out, (start, end) = prefilled(method, QUESTIONS[0])
    assert start == 1  # the begin token, which is the first of 4
    places = [0, 1, 2, 3, *range(end - (len(reading) - 3), end)]
    expected = out.past_key_values.layers[2].keys[0][:, places]
    torch.testing.assert_close(reading.content.layers[2][0], expected, atol=1e-4, rtol=1e-4)


def test_what_is_dropped_from_a_cache_does_not_reach_the_answer(load: Callable[[str], Any]) -> None:
    method = load("snapkv")
    [reading] = method.read(QUESTIONS[:1], 4)
    kept = reading.content
    keys, values = kept.layers[0]
    assert keys.shape == values.shape == (2, len(method.reader.template("?").before) + len(reading), 12)
    assert kept.position == len(method.reader.template("?").before) + len(QUESTIONS[0].context)
    changed = [(k, v + 1) for k, v in kept.layers]
    other = type(reading)(type(kept)(changed, kept.context, kept.position))
    answers = [method.answer(QUESTIONS[:1], [r], 8, 8) for r in (reading, other)]
    assert answers[0] != answers[1]  # nothing else holds the text


def test_local_attention_has_no_cache_to_choose_from(make_gmsa: Callable[..., GMSA]) -> None:
    notes: list[str] = []
    models = Models(make_gmsa("gemma3"))
    assert load_methods(["snapkv"], models, notes.append) == []
    assert notes == ["snapkv is skipped: it needs a decoder that attends to everything in every layer, without windows"]


# -- the registry ------------------------------------------------------------------------------------------------------


def test_an_unknown_method_names_the_nearest(models: Models, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="unknown method 'bm25': did you mean 'bm25-sentences'"):
        load_methods(["bm25"], models, print)
    for command in (
        ["eval", "qa", "--data", "x.jsonl", "--methods", "gmsa,orignal-prompt"],
        ["eval", "qa", "--data", "x.jsonl", "--methods", "gmsa,gmsa=folder"],
        ["eval", "qa", "--data", "x.jsonl", "--methods", "gmsa,a b=folder"],
        ["eval", "qa", "--data", "x.jsonl", "--methods", "a=folder,a=other"],
        ["eval", "restoration", "--data", "x.jsonl", "--methods", "gmsa,truncate-head"],
    ):
        assert main(command) == 1
        assert capsys.readouterr().err.count("\n") == 1


def test_the_documentation_lists_every_method() -> None:
    lines = (Path(__file__).parents[2] / "docs/baselines.md").read_text().splitlines()
    named = [name for line in lines if line.startswith("| `") for name in re.findall(r"`([^`]+)`", line.split("|")[1])]
    assert [name for name in METHODS if name not in named] == []


def test_other_checkpoints_are_methods(make_gmsa: Callable[..., GMSA], gmsa: GMSA, tmp_path: Path) -> None:
    fields = {"merging": "appended", "lsa": "mlp", "max_appended": 64, "window_size": 64, "trained": ["lsa"]}
    make_gmsa(**fields).save_pretrained(tmp_path / "appended")
    methods = load_methods(["gmsa", f"icae-like={tmp_path / 'appended'}"], Models(gmsa), print)
    assert [method.name for method in methods] == ["gmsa", "icae-like"]
    assert len({method.fingerprint for method in methods}) == 2
    data = str(write_rows(tmp_path / "rows.jsonl"))
    rows = [row for row, _ in evaluate_qa(gmsa, data, [5], 3, 4, methods=methods)]
    assert [row["method"] for row in rows] == ["gmsa", "icae-like"]
    # One window of 64 tokens against several of 16, each rounded up.
    assert rows[1]["tokens"]["soft"] < rows[0]["tokens"]["soft"]
    assert rows[1]["tokens"]["context"] == rows[0]["tokens"]["context"]
    make_gmsa("qwen2", trained=["encoder"]).save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="another decoder backbone"):
        load_methods([f"other={tmp_path / 'other'}"], Models(gmsa), print)
    with pytest.raises(CheckpointError):
        load_methods([f"other={tmp_path / 'none'}"], Models(gmsa), print)


def test_what_is_not_at_hand_is_skipped_in_one_line(gmsa: GMSA) -> None:
    notes: list[str] = []
    found = load_methods(["original-prompt-trained", *UNAVAILABLE, "closed-book"], Models(gmsa), notes.append)
    assert [method.name for method in found] == ["closed-book"]
    assert "needs --text-decoder FOLDER" in notes[0]
    for name, note in zip(UNAVAILABLE, notes[1:], strict=True):
        assert note.startswith(f"{name} is skipped: it needs")
        assert "download" in note or "pip install" in note
        assert "\n" not in note


def test_a_text_decoder_stands_on_the_same_backbone(make_gmsa: Callable[..., GMSA], gmsa: GMSA, tmp_path: Path) -> None:
    make_gmsa("qwen2", trained=["encoder"]).save_pretrained(tmp_path / "other")
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
    methods = load_methods(["original-prompt", "snapkv", "gmsa"], models, notes.append)
    found = evaluate_qa(gmsa, str(tmp_path / "long.jsonl"), [4], 5, 4, methods=methods, note=notes.append)
    assert [row["method"] for row, _ in found] == ["gmsa"]
    assert len(notes) == 2
    assert "original-prompt is skipped" in notes[0]
    assert "snapkv, 4x is skipped" in notes[1]


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
