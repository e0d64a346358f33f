"""Rows that are decoded together say what each says alone, whoever joins and leaves, in every family."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import FAMILIES, random_ids

from gmsa.decode.batch import Batch, Places, PreallocatedLayer, attends_to_all
from gmsa.io.backbones import Backbone
from gmsa.model.backbone import body_of, head_logits

NEW = 10
LOCAL = {"mistral", "gemma2", "gemma3"}  # families whose attention is local in some layers


def embedded(backbone: Backbone, *lengths: int) -> list[torch.Tensor]:
    with torch.no_grad():
        return [backbone.model.get_input_embeddings()(ids) for ids in random_ids(*lengths)]


def generated(backbone: Backbone, prompt: torch.Tensor) -> list[int]:
    """What transformers' own greedy generation says."""
    out = backbone.model.generate(
        inputs_embeds=prompt[None], attention_mask=torch.ones(1, len(prompt)), max_new_tokens=NEW, min_new_tokens=NEW,
        do_sample=False, pad_token_id=0,
    )  # fmt: skip
    return out[0].tolist()


def likeliest(backbone: Backbone, states: torch.Tensor) -> list[int]:
    return head_logits(backbone.model, states).argmax(-1).tolist()


@pytest.mark.parametrize("family", list(FAMILIES))
def test_rows_that_join_and_leave_say_what_they_say_alone(family: str, tiny_backbone: Callable[..., Backbone]) -> None:
    backbone = tiny_backbone(family)
    # No token ends a row: both sides then have the same number of tokens to compare.
    backbone.model.generation_config.eos_token_id = None
    prompts = embedded(backbone, 5, 23, 11)
    alone = [generated(backbone, prompt) for prompt in prompts]
    body = body_of(backbone.model)
    batch = Batch(body, 0)
    rows: list[int] = []
    said: list[list[int]] = [[], [], []]

    def join(number: int) -> None:
        other = Batch(body, 1)
        for piece in prompts[number].split(7):  # in pieces
            states = other.extend([piece])
        said[number] += likeliest(backbone, states)
        batch.join(other)
        rows.append(number)

    for step in range(3 * NEW):
        if step in (0, 3, 6):  # the longest joins a shorter one, then a shorter one joins both
            join(step // 3)
        states = batch.step(torch.tensor([said[n][-1] for n in rows]))
        for number, token in zip(rows, likeliest(backbone, states), strict=True):
            said[number].append(token)
        kept = [i for i, number in enumerate(rows) if len(said[number]) < NEW]
        batch.keep(kept)
        rows = [rows[i] for i in kept]
        if not rows:
            break
    assert said == alone
    assert len({tuple(tokens) for tokens in alone}) == 3
    assert len(batch) == 0


@pytest.mark.parametrize("family", list(FAMILIES))
def test_rows_go_on_from_unlike_places(family: str, tiny_backbone: Callable[..., Backbone]) -> None:
    backbone = tiny_backbone(family)
    body = body_of(backbone.model)
    prompts = embedded(backbone, 30, 9, 17)
    begins = []
    for prompt, length in zip(prompts, (21, 4, 0), strict=True):
        one = Batch(body, 1)
        if length:
            one.extend([prompt[:length]])
        begins.append(one.states(0) if length else None)
    together = Batch(body, begins)
    states = together.extend([prompt[length:] for prompt, length in zip(prompts, (21, 4, 0), strict=True)])
    alone = torch.cat([Batch(body, 1).extend([prompt]) for prompt in prompts])
    assert torch.allclose(states, alone, atol=1e-4)
    assert together.lengths == together.positions == [30, 9, 17]
    assert attends_to_all(body) is (family not in LOCAL)


def test_rows_may_be_kept_in_another_order(tiny_backbone: Callable[..., Backbone]) -> None:
    backbone = tiny_backbone("llama")
    body = body_of(backbone.model)
    prompts = embedded(backbone, 6, 13, 9)
    batch = Batch(body, 3)
    batch.extend(prompts)
    batch.keep([2, 0])
    states = batch.step(torch.tensor([7, 8]))
    for row, (prompt, token) in enumerate([(prompts[2], 7), (prompts[0], 8)]):
        one = Batch(body, 1)
        one.extend([prompt])
        assert torch.allclose(states[row], one.step(torch.tensor([token]))[0], atol=1e-5)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in LOCAL])
def test_a_draft_is_what_its_branches_are(family: str, tiny_backbone: Callable[..., Backbone]) -> None:
    backbone = tiny_backbone(family)
    body = body_of(backbone.model)
    prompts = embedded(backbone, 6, 13)
    batch = Batch(body, 2)
    batch.extend(prompts)
    first, second = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[5, 6], [7, 8]])
    own = torch.eye(2, dtype=torch.bool).expand(2, -1, -1)
    batch.draft(first, torch.zeros(2, dtype=torch.long), own)
    states = batch.draft(second, torch.ones(2, dtype=torch.long), torch.cat([own, own], dim=-1))
    for row, prompt in enumerate(prompts):
        for branch in range(2):
            one = Batch(body, 1)
            one.extend([prompt])
            one.step(first[row, branch : branch + 1])
            expected = one.step(second[row, branch : branch + 1])[0]
            assert torch.allclose(states[row, branch], expected, atol=1e-4)
    assert batch.lengths == [6, 13]  # nothing has been taken
    assert torch.allclose(batch.step(torch.tensor([1, 3]))[0], _after(body, prompts[0], 1), atol=1e-4)


def _after(body: Any, prompt: torch.Tensor, token: int) -> torch.Tensor:
    one = Batch(body, 1)
    one.extend([prompt])
    return one.step(torch.tensor([token]))[0]


def test_buffers_grow_where_their_room_was_too_small() -> None:
    torch.manual_seed(0)
    parts = [torch.randn(2, 3, n, 4) for n in (5, 1, 1, 30, 1)]
    places = Places()
    layer = PreallocatedLayer(places, 6)
    for i, part in enumerate(parts):
        done = sum(before.shape[2] for before in parts[:i])
        places.set([done, done])
        keys, values = layer.update(part, 2 * part)
        assert torch.equal(keys, torch.cat(parts[: i + 1], dim=2))
        assert torch.equal(values, 2 * keys)
        assert layer.get_seq_length() == done
