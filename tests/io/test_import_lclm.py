"""A folder of LCLM, read: their arithmetic, stated anew below, on tiny random models; and all that serves it then."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file
from server import running
from tiny import make_model, make_tokenizer
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from gmsa import GMSA, MemoryStore
from gmsa.cli import main as cli
from gmsa.serve.service import Service
from gmsa.serve.settings import Settings
from gmsa.train.examples import Document, Example, arguments, collate

CONTEXT = "The mill was built in 1731 by two brothers, and it stands by the river still, and grinds."
QUESTION = "When was the mill built?"
RATIO, WINDOW, NEW = 4, 16, 12
MARKS = ["<|memory|>", "<|memory_start|>", "<|memory_end|>"]


@dataclass
class Lclm:
    """Their model: a body, an adapter, a causal LM."""

    encoder: PreTrainedModel
    adapter: nn.ModuleDict
    decoder: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast

    def save(self, folder: Path, **settings: Any) -> Path:
        """In the published layout."""
        self.encoder.save_pretrained(folder / "encoder")
        self.decoder.save_pretrained(folder / "decoder")
        make_tokenizer().save_pretrained(folder / "encoder")
        self.tokenizer.save_pretrained(folder / "decoder")
        (folder / "adapter").mkdir()
        save_file(self.adapter.state_dict(), folder / "adapter/adapter.safetensors")
        written = {"compression_ratio": RATIO, "encoder_window_size": WINDOW, "pooling": "mean"}
        written |= {"encoder_mask_type": "causal", "boundary_overlap": 0, "adapter_type": "mlp"}
        (folder / "model_config.json").write_text(json.dumps(written | settings))
        return folder

    @torch.no_grad()
    def soft_tokens(self, text: str) -> Tensor:
        """Last hidden states of each window alone, means of groups, the adapter: (M, d)."""
        ids = torch.tensor(make_tokenizer()(text, add_special_tokens=False)["input_ids"])
        groups = []
        for window in ids.split(WINDOW):
            groups += [part.mean(0) for part in self.encoder(window[None]).last_hidden_state[0].split(RATIO)]
        x = torch.stack(groups)
        x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * self.adapter.get_parameter("norm.weight")
        return self.adapter["fc2"](nn.functional.gelu(self.adapter["fc1"](x)))

    @torch.no_grad()
    def write(self, prompt: str, contexts: list[str]) -> list[int]:
        """Greedy ids after a prompt in which `<|memory|>` stands for each memory."""
        embeddings, rows = self.decoder.get_input_embeddings(), []
        texts = prompt.split("<|memory|>")
        for number, text in enumerate(texts):
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            rows.append(embeddings(torch.tensor(ids)))
            rows += [self.soft_tokens(contexts[number])] if number < len(contexts) else []
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW}
        return self.decoder.generate(inputs_embeds=torch.cat(rows)[None], **options)[0].tolist()


def chat(content: str) -> str:
    return f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"


MEMORY = "<|memory_start|><|memory|><|memory_end|>"


@pytest.fixture(scope="module")
def theirs() -> Lclm:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    encoder = make_model("qwen3", 1, tie_word_embeddings=True).model
    decoder = make_model("qwen3", 2, hidden_size=64, vocab_size=len(tokenizer))
    torch.manual_seed(3)
    parts = {"norm": nn.RMSNorm(48, eps=1e-6), "fc1": nn.Linear(48, 64), "fc2": nn.Linear(64, 64)}
    adapter = nn.ModuleDict(parts)
    for parameter in adapter.parameters():
        parameter.data += torch.randn_like(parameter) * 0.3
    return Lclm(encoder, adapter, decoder, tokenizer)


@pytest.fixture(scope="module")
def gmsa(theirs: Lclm, tmp_path_factory: pytest.TempPathFactory) -> GMSA:
    folder = tmp_path_factory.mktemp("lclm")
    theirs.save(folder / "theirs")
    assert cli.main(["import", "lclm", str(folder / "theirs"), "-o", str(folder / "ours")]) == 0
    assert list(load_file(folder / "ours/model.safetensors")) == [
        f"compressor.lsa.map.{name}" for name in ("0.weight", "1.bias", "1.weight", "3.bias", "3.weight")
    ]
    return GMSA.from_pretrained(folder / "ours", dtype="float32", device_map="cpu")


def test_soft_tokens_are_theirs(theirs: Lclm, gmsa: GMSA) -> None:
    torch.testing.assert_close(
        gmsa.compress(CONTEXT, RATIO).soft_tokens, theirs.soft_tokens(CONTEXT), rtol=1e-4, atol=1e-5
    )


def test_greedy_answers_are_theirs(theirs: Lclm, gmsa: GMSA) -> None:
    first, second = gmsa.compress([CONTEXT, "It has two wheels."], RATIO)
    frame = gmsa.template(QUESTION)
    written = theirs.write(chat(f"{MEMORY}\n{QUESTION}"), [CONTEXT])
    assert gmsa.model.generate([list(frame.around(first.soft_tokens))], max_new_tokens=NEW)[0].tolist() == written
    assert gmsa.answer(QUESTION, first, max_new_tokens=NEW) == decoded(gmsa, written)
    # Each of several memories has its marks; a text has none.
    written = theirs.write(chat(f"{MEMORY}{MEMORY}\nHm.\n{QUESTION}"), [CONTEXT, "It has two wheels."])
    assert gmsa.answer(QUESTION, [first, second, "Hm."], max_new_tokens=NEW) == decoded(gmsa, written)


def decoded(gmsa: GMSA, ids: list[int]) -> str:
    ends = [place for place, token in enumerate(ids) if token in gmsa.ends]
    return gmsa.tokenizer.decode(ids[: ends[0]] if ends else ids, skip_special_tokens=True)


def test_the_store_keeps_it(theirs: Lclm, gmsa: GMSA, tmp_path: Path) -> None:
    expected = decoded(gmsa, theirs.write(chat(f"{MEMORY}\n{QUESTION}"), [CONTEXT]))
    with MemoryStore(tmp_path / "s", form="float32") as store:
        made = [store.get_or_compress(gmsa, CONTEXT, RATIO) for _ in range(2)]
        assert [was_there for _, _, was_there in made] == [False, True]
        assert gmsa.answer(QUESTION, made[1][1], max_new_tokens=NEW) == expected


def test_a_prefix_is_read_once(gmsa: GMSA, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = gmsa.compress(CONTEXT, RATIO)
    questions = [QUESTION, "Who?"]
    expected = [gmsa.answer(question, memory, max_new_tokens=NEW) for question in questions]
    prefix = gmsa.prefill(memory)
    assert len(prefix) == len(gmsa.template(QUESTION).before) + 2 + len(memory)  # and its marks
    assert gmsa.answer(questions, prefix, max_new_tokens=NEW) == expected
    assert gmsa.answer(questions, memory, max_new_tokens=NEW) == expected  # read once by the loop


def test_the_server_answers_from_it(theirs: Lclm, gmsa: GMSA, tmp_path: Path) -> None:
    settings = Settings(store=tmp_path / "s", max_prompt_tokens=512, merge_size=RATIO)
    with running(Service(gmsa.share_weights(), settings)) as url, httpx.Client(timeout=60) as http:
        stored = http.post(f"{url}/v1/memories", json={"text": CONTEXT}).raise_for_status().json()
        content = [{"type": "memory", "memory_id": stored["id"]}, {"type": "text", "text": QUESTION}]
        request = {"model": "gmsa", "messages": [{"role": "user", "content": content}], "max_tokens": NEW}
        said = [http.post(f"{url}/v1/chat/completions", json=request).raise_for_status().json() for _ in range(2)]
    memory = gmsa.compress(CONTEXT, RATIO)
    memory = dataclasses.replace(memory, soft_tokens=memory.soft_tokens.bfloat16().float())  # as the store keeps them
    expected = gmsa.answer(QUESTION, memory, max_new_tokens=NEW)
    assert [answer["choices"][0]["message"]["content"] for answer in said] == [expected, expected]
    frame = gmsa.template(QUESTION)
    assert said[0]["usage"]["prompt_tokens"] == len(frame.before) + len(frame.after) + 2 + len(memory)


def test_a_users_text_makes_no_marks(gmsa: GMSA) -> None:
    frame = gmsa.template("<|memory_start|>?<|memory_end|>")
    special = gmsa.tokenizer.convert_tokens_to_ids(MARKS)
    assert not set(frame.after.tolist()) & set(special)


def test_it_trains_with_its_marks(gmsa: GMSA) -> None:
    """Marks and documents come to `forward` as prompts of `answer` do."""
    ids = gmsa.encoder_tokenizer(CONTEXT, add_special_tokens=False)["input_ids"]
    frame, target = gmsa.template(QUESTION), gmsa.template.encode("In 1731.")
    example = Example(frame.around(*gmsa.template.contents([Document(ids)])), target, RATIO)
    with torch.no_grad():
        loss = gmsa.model(**arguments(collate([example], WINDOW)))["loss"]
        prompt = list(frame.around(gmsa.compress(CONTEXT, RATIO).soft_tokens))
        expected = gmsa.model.score([prompt], [torch.tensor(target)])["loss"]
    assert len(prompt) == 5
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)


def test_the_merge_size_is_told(theirs: Lclm, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = theirs.save(tmp_path / "theirs")
    assert cli.main(["import", "lclm", str(folder), "-o", str(tmp_path / "ours"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["merge_size"], facts["lsa"], facts["window_size"]) == (RATIO, "norm-mlp", WINDOW)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda f: (f / "model_config.json").unlink(), "it has no model_config.json"),
        (lambda f: (f / "model_config.json").write_text("[]"), "is not as LCLM writes it"),
        (lambda f: (f / "adapter/adapter.safetensors").unlink(), "adapter.safetensors is missing or damaged"),
        (
            lambda f: save_file({"norm.weight": torch.ones(48)}, f / "adapter/adapter.safetensors"),
            "is no adapter of these models",
        ),
        (lambda f: (f / "encoder/config.json").unlink(), "encoder holds no model"),
        (lambda f: (f / "decoder/tokenizer_config.json").unlink(), "decoder holds no tokenizer"),
        (lambda f: (f / "decoder/adapter_config.json").write_text("{}"), "decoder holds LoRA"),
    ],
)
def test_what_does_not_fit_is_named(
    theirs: Lclm, tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], Any], told: str
) -> None:
    folder = theirs.save(tmp_path / "theirs")
    spoil(folder)
    capsys.readouterr()
    assert cli.main(["import", "lclm", str(folder), "-o", str(tmp_path / "ours")]) == 1
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("pooling", "eos"),
        ("encoder_mask_type", "bidirectional"),
        ("boundary_overlap", 256),
        ("adapter_type", "mlp_attn"),
    ],
)
def test_unpublished_variants_are_named(
    theirs: Lclm, tmp_path: Path, capsys: pytest.CaptureFixture[str], field: str, value: Any
) -> None:
    folder = theirs.save(tmp_path / "theirs", **{field: value})
    capsys.readouterr()
    assert cli.main(["import", "lclm", str(folder), "-o", str(tmp_path / "ours")]) == 1
    assert f"says {field} {value!r}; only" in capsys.readouterr().err


def test_marks_that_are_no_tokens(theirs: Lclm, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = theirs.save(tmp_path / "theirs")
    make_tokenizer().save_pretrained(folder / "decoder")
    assert cli.main(["import", "lclm", str(folder), "-o", str(tmp_path / "ours")]) == 1
    assert "has no token '<|memory_start|>'" in capsys.readouterr().err
