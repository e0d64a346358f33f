"""What stands around the soft tokens."""

from typing import Any

import pytest
from tiny import BEGIN, CHAT_TEMPLATE, END, TURN_END, make_tokenizer
from transformers import PreTrainedTokenizerFast

from gmsa.config import RESTORE_INSTRUCTION, GmsaConfig
from gmsa.decode.prompt import MARK, PromptTemplate
from gmsa.errors import BackboneError, InputError

CONTEXT = "The mill was built in 1731."
QUESTION = "When was the mill built? Ünïcode ✓"


def template(tokenizer: PreTrainedTokenizerFast | None = None, **fields: Any) -> PromptTemplate:
    return PromptTemplate(tokenizer or make_tokenizer(), GmsaConfig(**fields))


def turned(*turns: str) -> str:
    """ChatML by hand, from "role: content" strings."""
    parts = [f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in (t.split(": ", 1) for t in turns)]
    return "".join(parts) + "<|im_start|>assistant\n"


CHAT = turned(f"user: {CONTEXT}\n{QUESTION}")
PLAIN = f"<|begin|>{CONTEXT}\n{QUESTION}\n"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"prompt": "chat"}, CHAT),
        ({"prompt": "plain"}, PLAIN),
        ({"prompt": "chat", "system_prompt": "Be brief."}, turned("system: Be brief.", f"user: {CONTEXT}\n{QUESTION}")),
        ({"prompt": "chat", "system_prompt": ""}, turned("system: ", f"user: {CONTEXT}\n{QUESTION}")),
        ({"prompt": "plain", "system_prompt": "Be brief."}, PLAIN),
    ],
)
def test_before_context_and_after_make_the_prompt(fields: dict[str, Any], expected: str) -> None:
    made = template(**fields)
    assert made.text(CONTEXT, QUESTION) == expected
    prompt, decode = made(QUESTION), made.tokenizer.decode
    assert decode(prompt.before) + CONTEXT + decode(prompt.after) == expected
    tokens = [*prompt.before.tolist(), *made.encode(CONTEXT), *prompt.after.tolist()]
    assert tokens == made.encode(expected)


@pytest.mark.parametrize("system_prompt", [None, "", "Be brief."])
def test_a_further_question_goes_on_where_the_answer_ended(system_prompt: str | None) -> None:
    made = template(system_prompt=system_prompt)
    turns = [{"role": "user", "content": f"{CONTEXT}\n{QUESTION}"}, {"role": "assistant", "content": "In 1731."}]
    turns += [{"role": "user", "content": "By whom?"}]
    if system_prompt is not None:
        turns = [{"role": "system", "content": system_prompt}, *turns]
    whole = made.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    tokens = made.encode(made.text(CONTEXT, QUESTION))
    assert [*tokens, *made.encode("In 1731."), made.end_id, *made.following("By whom?")] == made.encode(whole)


def test_a_further_question_in_plain() -> None:
    made = template(prompt="plain")
    assert made.tokenizer.decode(made.following(QUESTION)) == f"\n{QUESTION}\n"


def test_a_further_question_cannot_be_empty() -> None:
    with pytest.raises(InputError, match="empty"):
        template().following(" ")


def test_a_chat_template_that_forgets_answers() -> None:
    forgetful = make_tokenizer()
    forgetful.chat_template = "{% for m in messages if m.role == 'user' %}{{ m.content }}\n{% endfor %}"
    with pytest.raises(BackboneError, match="questions_per_context"):
        template(forgetful).following(QUESTION)


def test_special_tokens_of_the_prompt_are_single_tokens() -> None:
    prompt = template()(QUESTION)
    assert prompt.before[0] == 259  # <|im_start|>
    assert (prompt.after == TURN_END).sum() == 1
    plain = template(prompt="plain")(QUESTION)
    assert plain.before.tolist() == [BEGIN]


def test_a_plain_prompt_without_a_begin_token() -> None:
    made = template(make_tokenizer(bos_token=None), prompt="plain")
    assert made(QUESTION).before.tolist() == []
    assert made(QUESTION).before.dtype == made(QUESTION).after.dtype
    assert made.text(CONTEXT, QUESTION) == f"{CONTEXT}\n{QUESTION}\n"


def test_restoring_asks_with_the_configured_instruction() -> None:
    for fields, instruction in (({}, RESTORE_INSTRUCTION), ({"restore_instruction": "Say it again."}, "Say it again.")):
        made = template(**fields)
        assert made.tokenizer.decode(made.restore().after) == f"\n{instruction}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("question", ["", " ", "\n\t "])
@pytest.mark.parametrize("prompt", ["chat", "plain"])
def test_an_empty_question(prompt: str, question: str) -> None:
    with pytest.raises(InputError, match="the question is empty"):
        template(prompt=prompt)(question)


def test_a_question_that_holds_the_mark() -> None:
    made = template()
    prompt = made(f"What is {MARK}?")
    assert made.tokenizer.decode(prompt.before) == "<|im_start|>user\n"
    assert f"What is {MARK}?" in made.tokenizer.decode(prompt.after)


def test_no_chat_template() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(BackboneError, match="has no chat template: set prompt to 'plain'"):
        template(tokenizer)
    assert template(tokenizer, prompt="plain").text("a", "b") == "<|begin|>a\nb\n"


def test_a_chat_template_that_drops_the_message() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['role'] }}{% endfor %}"
    with pytest.raises(BackboneError, match="drops the user's message"):
        template(tokenizer)(QUESTION)


# -- the token that ends an answer -------------------------------------------------------------------------------------


def test_an_answer_ends_as_the_chat_template_ends_a_turn() -> None:
    assert template().end_id == TURN_END
    # Also where the turn's end is no named special token of the tokenizer, as with Gemma 3 and Phi-3.
    tokenizer = make_tokenizer(eos_token="<|end|>")
    assert TURN_END not in tokenizer.all_special_ids
    assert template(tokenizer).end_id == TURN_END


def test_a_plain_answer_ends_with_the_end_of_text() -> None:
    assert template(prompt="plain").end_id == TURN_END
    assert template(make_tokenizer(eos_token="<|end|>"), prompt="plain").end_id == END


@pytest.mark.parametrize("ending", ["", "\n", "###"])
def test_a_turn_without_an_end_of_its_own_ends_with_the_end_of_text(ending: str) -> None:
    tokenizer = make_tokenizer(eos_token="<|end|>")
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|im_end|>\n", ending)
    assert template(tokenizer).end_id == END


def test_no_end_of_text() -> None:
    with pytest.raises(BackboneError, match="has no end-of-text token"):
        template(make_tokenizer(eos_token=None), prompt="plain")
    assert template(make_tokenizer(eos_token=None)).end_id == TURN_END
