"""Refinement: what moves, what it makes of a memory, and what it leaves alone."""

import hashlib
import json
import random
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gmsa import GMSA, Memory
from gmsa.errors import CheckpointError, InputError
from gmsa.lookups import gaps, quotes
from gmsa.refine import Refiner
from gmsa.store import MemoryStore

TEXTS = [
    "The quick brown fox jumps over the lazy dog while seven cats and Ada Lovelace watch from a wall in London.",
    "In 1815 a child was born who wrote of engines.",
]


@pytest.fixture(scope="module")
def reader(make_gmsa: Callable[..., GMSA]) -> GMSA:
    return make_gmsa()


def loss(gmsa: GMSA, memory: Any, text: str) -> float:
    score = gmsa.score(memory, text)
    return score.nll / score.tokens


def test_a_refined_memory_predicts_its_text_better(reader: GMSA) -> None:
    plain = reader.compress(TEXTS, 4)
    refined = reader.compress(TEXTS, 4, refine=8)
    for before, after, text in zip(plain, refined, TEXTS, strict=True):
        assert after.soft_tokens.shape == before.soft_tokens.shape
        assert after.soft_tokens.dtype == before.soft_tokens.dtype
        assert loss(reader, after, text) < loss(reader, before, text)


def test_more_steps_are_better(reader: GMSA) -> None:
    losses = [loss(reader, reader.compress(TEXTS[0], 4, refine=steps), TEXTS[0]) for steps in (0, 4, 16)]
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == 3


def test_batched_equals_single_and_again_is_the_same(reader: GMSA) -> None:
    together = reader.compress(TEXTS, 4, refine=3)
    for memory, text in zip(together, TEXTS, strict=True):
        torch.testing.assert_close(memory.soft_tokens, reader.compress(text, 4, refine=3).soft_tokens)
    again = reader.compress(TEXTS, 4, refine=3)
    assert all(torch.equal(a.soft_tokens, b.soft_tokens) for a, b in zip(together, again, strict=True))


def test_no_weight_changes(reader: GMSA) -> None:
    was = {name: weight.clone() for name, weight in reader.model.named_parameters()}
    reader.model.requires_grad_(True)
    reader.compress(TEXTS[0], 4, refine=2)
    assert all(torch.equal(weight, was[name]) for name, weight in reader.model.named_parameters())
    assert all(weight.requires_grad and weight.grad is None for weight in reader.model.parameters())


def test_a_window_too_short_for_questions_is_refined_too(reader: GMSA) -> None:
    plain, refined = reader.compress("Hi.", 2), reader.compress("Hi.", 2, refine=4)
    assert loss(reader, refined, "Hi.") < loss(reader, plain, "Hi.")


@pytest.mark.parametrize(
    "fields", [{"entry_layer": 2, "lsa": "none"}, {"memory_marks": ["<|im_start|>", "<|im_end|>"]}]
)
def test_other_designs(make_gmsa: Callable[..., GMSA], fields: dict[str, Any]) -> None:
    gmsa = make_gmsa(**fields)
    plain, refined = gmsa.compress(TEXTS[1], 4), gmsa.compress(TEXTS[1], 4, refine=8)
    assert loss(gmsa, refined, TEXTS[1]) < loss(gmsa, plain, TEXTS[1])
    gmsa.share_weights()  # nothing of a pass with gradients is left in the model


@pytest.mark.parametrize("steps", [-1, 1.5, True, "2"])
def test_a_bad_number_of_steps(reader: GMSA, steps: Any) -> None:
    with pytest.raises(InputError, match="refine must be a whole number >= 0"):
        reader.compress(TEXTS[0], 4, refine=steps)


def test_questions_are_drawn_anew_at_each_step(reader: GMSA, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def note(self: Refiner, text: str, soft: int, rng: Any) -> None:
        asked.append(tuple(question for question, _ in quotes(text, "{words}", 3, rng) + gaps(text, "{words}", 3, rng)))

    monkeypatch.setattr(Refiner, "_look_up", note)
    reader.compress(TEXTS[1], 4, refine=3)
    assert len(set(asked) - {()}) > 1


def test_no_more_is_asked_than_the_decoder_can_read(reader: GMSA) -> None:
    refiner = Refiner(reader.model, reader.template, reader.tokenizer)
    text, limit = " ".join(f"{i:08d}" for i in range(40)), reader.model.decoder.config.max_position_embeddings
    sizes = []
    for seed in range(10):
        row = refiner._look_up(text, 20, random.Random(seed))
        assert row is not None
        frame, target, learned = row
        assert len(target) == len(learned)
        sizes.append(len(frame.before) + 20 + len(frame.after) + len(target))
    assert limit / 2 < max(sizes) <= limit
    assert refiner._look_up(text, limit, random.Random(0)) is None


def test_a_compressor_alone_cannot_refine(make_gmsa: Callable[..., GMSA]) -> None:
    gmsa = make_gmsa()
    gmsa.drop_decoder()
    gmsa.compress(TEXTS[0], 4)
    with pytest.raises(CheckpointError, match="cannot write"):
        gmsa.compress(TEXTS[0], 4, refine=1)


# -- a refined memory elsewhere ----------------------------------------------------------------------------------------


def test_a_file_says_that_it_is_refined(reader: GMSA, tmp_path: Path) -> None:
    memory = reader.compress(TEXTS[0], 4, refine=2)
    memory.save(tmp_path / "m.safetensors")
    assert memory.refined == Memory.load(tmp_path / "m.safetensors").refined == 2
    assert {window.refined for window in reader.windows(memory)} == {2}


def test_it_cannot_be_checked(reader: GMSA, make_gmsa: Callable[..., GMSA]) -> None:
    gmsa = make_gmsa(encoder_sink=True)
    memory = gmsa.compress(TEXTS[1], 2, refine=1)
    for call in (gmsa.restore_checked, gmsa.stream_checked):
        with pytest.raises(InputError, match="a refined memory cannot be checked"):
            call(memory)


def test_a_store_keeps_both(reader: GMSA, tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "store.sqlite", form="float32") as store:
        plain, _, _ = store.get_or_compress(reader, TEXTS[0], 4)
        refined, memory, there = store.get_or_compress(reader, TEXTS[0], 4, refine=2)
        assert not there
        assert plain.id != refined.id
        assert (plain.refined, refined.refined, memory.refined) == (0, 2, 2)
        again, loaded, there = store.get_or_compress(reader, TEXTS[0], 4, refine=2)
        assert there
        assert again.id == refined.id == store.put(TEXTS[0], memory).id
        assert torch.equal(loaded.soft_tokens, memory.soft_tokens)
        assert loaded.refined == 2
        found = store.find(TEXTS[0], reader.fingerprint, 4, 2)
        assert found is not None
        assert found.id == refined.id
        assert store.find(TEXTS[0], reader.fingerprint, 4, 3) is None
        store.export(None, tmp_path / "all.tar")
    with MemoryStore(tmp_path / "other.sqlite") as other:
        assert sorted(other.import_(tmp_path / "all.tar").added) == sorted([plain.id, refined.id])
        assert other.load(refined.id).refined == 2


def test_a_store_from_before_there_was_refinement(reader: GMSA, tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    with MemoryStore(path) as store:
        entry, _, _ = store.get_or_compress(reader, TEXTS[0], 4)
    db = sqlite3.connect(path)
    (facts,) = db.execute("SELECT facts FROM memories").fetchone()
    old = json.dumps(json.loads(facts)[:-1]).encode()
    db.execute("UPDATE memories SET facts = ?, sha256 = ?", (old, hashlib.sha256(old).digest()))
    db.commit()
    db.close()
    with MemoryStore(path) as store:
        assert store.load(entry.id).refined == 0
        assert store.entry(entry.id).fingerprint == reader.fingerprint
