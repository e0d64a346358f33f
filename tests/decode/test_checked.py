"""Restoring with proof: the compressor tells which of the decoder's proposals the memory was made of."""

from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import FAMILIES, random_ids, windows_of
from torch import Tensor

from gmsa import GMSA
from gmsa.cli import main as cli
from gmsa.decode import checked as verification
from gmsa.decode.checked import CheckedGroup, CheckedText, Proposer, Verifier, checked_text, why_not
from gmsa.decode.stream import REPLACEMENT
from gmsa.errors import InputError, MemoryMismatchError
from gmsa.evaluate.restoration import evaluate_restoration
from gmsa.evaluate.results import AnswerCache
from gmsa.io.backbones import Backbone
from gmsa.io.loading import GmsaModel

pytestmark = pytest.mark.slow

LOCAL = {"mistral", "gemma2", "gemma3"}
CHECKABLE = sorted(set(FAMILIES) - LOCAL)
TEXTS = ["A short one.", "A second text that is a good deal longer than the first, over several windows.", "Third?"]
ALL = (4, 261)  # every token there is


@pytest.fixture(scope="module")
def gmsa(tiny_backbone: Callable[..., Backbone], trained_model: Callable[..., GmsaModel]) -> GMSA:
    return GMSA(trained_model("llama", system_prompt="", encoder_sink=True), tiny_backbone("llama"))


def soft_of(model: GmsaModel, rows: Sequence[Tensor], size: int) -> list[Tensor]:
    with torch.no_grad():
        return model.compress(*windows_of(rows), size)


# -- the judge ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "fields"),
    [(family, {"encoder_sink": True}) for family in CHECKABLE]
    + [
        ("llama", {"lsa": "none"}),
        ("llama", {"lsa": "mlp"}),
        ("llama", {"lsa_layers": 2}),
        ("llama", {"final_norm": True}),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 8])
@torch.no_grad()
def test_the_right_tokens_give_the_soft_tokens_of_the_memory(
    trained_model: Callable[..., GmsaModel], family: str, size: int, fields: dict[str, Any]
) -> None:
    """Group by group, among wrong continuations, in a batch of rows of unlike length."""
    model = trained_model(family, **fields)
    rows = random_ids(13, 8, 16)
    soft = soft_of(model, rows, size)
    verifier = Verifier(model.compressor, len(rows))
    for group in range(max(map(len, soft))):
        parts = [row[group * size : (group + 1) * size] for row in rows]
        sizes = torch.tensor([max(1, len(part)) for part in parts])
        tokens = torch.zeros(len(rows), int(sizes.max()), dtype=torch.long)
        for line, part in zip(tokens, parts, strict=True):
            line[: len(part)] = part
        wrong = (tokens[:, None] + torch.arange(4)[:, None]) % 256
        made = verifier.soft_tokens(torch.arange(len(rows)), wrong, sizes)
        some = verifier.soft_tokens(torch.tensor([2, 0]), wrong[[2, 0]], sizes[[2, 0]])
        torch.testing.assert_close(some, made[[2, 0]], rtol=1e-4, atol=1e-4)
        for row, wanted in enumerate(soft):
            if group < len(wanted):
                torch.testing.assert_close(made[row, 0], wanted[group], rtol=1e-4, atol=1e-4)
                assert (made[row, 1:] - wanted[group]).norm(dim=-1).min() > 1e-2 * wanted[group].norm()
        verifier.accept(tokens, sizes)


# -- the proposer ------------------------------------------------------------------------------------------------------


def beams(score: Callable[[list[int]], Tensor], steps: int, width: int) -> list[list[int]]:
    """A beam search that reads every beam anew."""
    found: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(steps):
        longer = [
            (total + float(value), [*path, token])
            for total, path in found
            for token, value in enumerate(score(path).tolist())
        ]
        found = sorted(longer, key=lambda pair: -pair[0])[:width]
    return [path for _, path in found]


@pytest.mark.parametrize("family", ["llama", "gpt2", "granite"])
@torch.no_grad()
def test_continuations_are_those_of_a_beam_search(
    tiny_model: Callable[..., GmsaModel], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setattr(verification, "LIKELIEST", 261)
    model = tiny_model(family)
    soft = soft_of(model, random_ids(13, 8), 2)
    before, after, banned = random_ids(3)[0], random_ids(4, seed=5)[0], [260]
    proposer = Proposer(model, [[before, one, after] for one in soft], 16, banned)
    said: list[list[int]] = [[], []]
    for _ in range(2):
        paths = proposer.propose(torch.tensor([1, 0]), torch.tensor([2, 3]), 5)
        for place, row in enumerate((1, 0)):

            def score(path: list[int], row: int = row, earlier: list[int] = said[row]) -> Tensor:
                tail = torch.cat([after, torch.tensor([*earlier, *path], dtype=torch.long)])
                (embeds,), _ = model.embed([[before, soft[row], tail]])
                scores = model.decoder(inputs_embeds=embeds[None]).logits[0, -1].log_softmax(-1)
                scores[banned] = -torch.inf
                return scores

            steps = (2, 3)[place]
            assert paths[place, :, :steps].tolist() == beams(score, steps, 5)
            assert not paths[place, :, steps:].any()
        chosen = random_ids(3, 3, seed=len(said[0]))
        proposer.accept(torch.stack(chosen))
        said = [line + new.tolist() for line, new in zip(said, chosen, strict=True)]


# -- both --------------------------------------------------------------------------------------------------------------


def test_every_text_comes_back_where_every_token_is_weighed(gmsa: GMSA) -> None:
    memories = gmsa.compress(TEXTS, 1)
    found = gmsa.restore_checked(memories, candidates=ALL)
    assert [one.text for one in found] == TEXTS
    assert all(one.exact and one.spans == [(text, True)] for one, text in zip(found, TEXTS, strict=True))
    assert [one.text for one in found] != gmsa.restore(memories)  # the decoder alone knows nothing
    assert gmsa.restore_checked(memories[1], candidates=ALL, batch_size=2) == found[1]


@pytest.mark.parametrize("size", [2, 3, 8])
def test_the_right_continuation_is_found_among_others(gmsa: GMSA, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """The loop, with a decoder that knows the text but not which of its proposals it is."""
    texts = [TEXTS[0], TEXTS[1][:16], TEXTS[1][16:27], TEXTS[2]]
    order = sorted(range(len(texts)), key=lambda n: -len(texts[n]))
    ids = [gmsa.template.encode(texts[n]) for n in order]
    asked: list[tuple[list[int], int]] = []
    written = [0] * len(ids)

    def propose(self: Proposer, rows: Tensor, sizes: Tensor, width: int) -> Tensor:
        asked.append((rows.tolist(), width))
        paths = torch.randint(0, 256, (len(rows), width, int(sizes.max())))
        if width > 2:
            for line, row in zip(paths, rows.tolist(), strict=True):
                part = ids[row][written[row] : written[row] + size]
                line[width // 2, : len(part)] = torch.tensor(part)
        return paths

    def accept(self: Proposer, tokens: Tensor) -> None:
        for row in range(len(ids)):
            written[row] += size

    monkeypatch.setattr(Proposer, "propose", propose)
    monkeypatch.setattr(Proposer, "accept", accept)
    found = gmsa.restore_checked(gmsa.compress(texts, size), candidates=(2, 7))
    assert [one.text for one in found] == texts
    assert all(one.exact for one in found)
    groups = -(-16 // size)
    assert [width for _, width in asked] == [2, 7] * groups  # where the first two do not fit, seven are tried
    last = [row for row, line in enumerate(ids) if len(line) > (groups - 1) * size]
    assert asked[-1][0] == last  # rows that are done are left out


@pytest.mark.parametrize("size", [2, 5])
def test_windows_of_memories_in_files_are_restored_together(
    gmsa: GMSA, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, size: int
) -> None:
    memories = gmsa.compress(TEXTS, size)
    for number, memory in enumerate(memories):
        memory.save(tmp_path / f"{number}.safetensors")
    windows = [window for memory in memories for window in gmsa.windows(memory)]
    order = sorted(range(len(windows)), key=lambda n: -windows[n].origin_tokens)
    whole = [gmsa.template.encode(text) for text in TEXTS]
    parts = [ids[start : start + 16] for ids in whole for start in range(0, len(ids), 16)]
    ids = [parts[number] for number in order]
    written = [0] * len(ids)

    def propose(self: Proposer, rows: Tensor, sizes: Tensor, width: int) -> Tensor:
        paths = torch.randint(0, 256, (len(rows), width, int(sizes.max())))
        for line, row, count in zip(paths, rows.tolist(), sizes.tolist(), strict=True):
            line[1, :count] = torch.tensor(ids[row][written[row] : written[row] + count])
        return paths

    accept = Proposer.accept

    def accepted(self: Proposer, tokens: Tensor) -> None:
        for row in range(len(ids)):
            written[row] += size
        accept(self, tokens)

    monkeypatch.setattr(Proposer, "propose", propose)
    monkeypatch.setattr(Proposer, "accept", accepted)
    paths = [tmp_path / f"{number}.safetensors" for number in range(len(memories))]
    found = gmsa.restore_checked(paths, candidates=(2,), batch_size=len(windows))
    assert [one.text for one in found] == TEXTS
    assert all(one.exact for one in found)


@pytest.mark.parametrize("size", [2, 3])
def test_single_tokens_are_exchanged_at_last(gmsa: GMSA, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """A decoder that is wrong in one token of every group, and never proposes the right one."""
    text = TEXTS[1][:15]
    ids = gmsa.template.encode(text)
    written = 0

    def propose(self: Proposer, rows: Tensor, sizes: Tensor, width: int) -> Tensor:
        part = torch.zeros(1, 1, int(sizes.max()), dtype=torch.long)
        part[0, 0, : int(sizes[0])] = torch.tensor(ids[written : written + size])
        place = (written // size) % int(sizes[0])
        part[0, 0, place] = (part[0, 0, place] + 1) % 256
        return part

    accept = Proposer.accept

    def accepted(self: Proposer, tokens: Tensor) -> None:
        nonlocal written
        written += size
        accept(self, tokens)

    monkeypatch.setattr(Proposer, "propose", propose)
    monkeypatch.setattr(Proposer, "accept", accepted)
    monkeypatch.setattr(verification, "_commonest", lambda paths: paths[:, :1].transpose(1, 2))  # changes nothing
    found = gmsa.restore_checked(gmsa.compress(text, size), candidates=(1,))
    assert found.text == text
    assert found.exact
    monkeypatch.setattr(verification, "EXCHANGED_AT_LAST", 0)  # one token a place: the decoder's own choice
    written = 0
    assert not gmsa.restore_checked(gmsa.compress(text, size), candidates=(1,)).exact


def test_what_is_not_found_is_in_doubt(gmsa: GMSA) -> None:
    memory = gmsa.compress(TEXTS[1], 4)
    found = gmsa.restore_checked(memory, candidates=(1,))
    assert not found.exact
    assert found.confirmed < found.soft_tokens == len(memory)
    assert len(gmsa.template.encode(found.text)) >= len(TEXTS[1])  # as many tokens as there were
    assert any(not confirmed for _, confirmed in found.spans)
    again = gmsa.restore_checked(memory, candidates=(1,))
    assert again == found


def test_spans_are_runs_of_groups_alike() -> None:
    groups = [([1, 2], 0.0), ([3, 4], 0.01), ([5, 6], 0.5), ([7], 0.0), ([8], 0.0)]
    found = checked_text([CheckedGroup(*group) for group in groups], lambda tokens: "".join(map(str, tokens)))
    assert found == CheckedText("12345678", [("1234", True), ("56", False), ("78", True)], 4, 5)
    assert CheckedText("", [], 3, 3).exact
    assert not CheckedText("", [], 2, 3).exact


@pytest.mark.parametrize(("size", "text"), [(1, TEXTS[1]), (4, TEXTS[1]), (1, "Ærøskøbing, naïve, 日本語 and é")])
def test_streamed_it_is_the_same(gmsa: GMSA, size: int, text: str) -> None:
    memory = gmsa.compress(text, size)
    whole = gmsa.restore_checked(memory, candidates=(8,) if size > 1 else ALL)
    stream = gmsa.stream_checked(memory, candidates=(8,) if size > 1 else ALL)
    pieces = [next(stream)]
    assert gmsa.restore(memory) == gmsa.restore(memory)  # others may read meanwhile
    pieces += stream
    streamed = "".join(piece.text for piece in pieces)  # of bytes that are no character, as many marks as pieces have
    assert streamed.replace(REPLACEMENT, "") == "".join(text for text, _ in whole.spans).replace(REPLACEMENT, "")
    doubted = "".join(piece.text for piece in pieces if not piece.confirmed)
    assert doubted.replace(REPLACEMENT, "") == "".join(t for t, sure in whole.spans if not sure).replace(
        REPLACEMENT, ""
    )
    assert len(pieces) == whole.soft_tokens == len(memory)
    assert sum(piece.confirmed for piece in pieces) == whole.confirmed
    if size == 1:
        assert streamed == whole.text == text
        assert len(pieces) > gmsa.config.window_size
        assert ("é" in text) == any(not piece.text for piece in pieces)  # nothing until a character is whole


def test_memories_of_several_merge_sizes_at_once(gmsa: GMSA) -> None:
    memories = [gmsa.compress(text, size) for text, size in zip(TEXTS, (1, 4, 1), strict=True)]
    found = gmsa.restore_checked(memories, candidates=ALL)
    assert [one.text for one in found[::2]] == TEXTS[::2]
    assert found[1].soft_tokens == len(memories[1])


# -- what cannot be checked --------------------------------------------------------------------------------------------


def test_models_that_cannot_be_checked(
    tiny_model: Callable[..., GmsaModel], tiny_backbone: Callable[..., Backbone]
) -> None:
    for family in LOCAL:
        assert "local attention" in str(why_not(tiny_model(family), True))
    assert "appended" in str(why_not(tiny_model(merging="appended", lsa="mlp"), True))
    assert "tokenizers" in str(why_not(tiny_model(), False))
    for family, sink in product(CHECKABLE, (True, False)):
        assert why_not(tiny_model(family, encoder_sink=sink), True) is None
    gmsa = GMSA(tiny_model("gemma2"), tiny_backbone("gemma2"))
    with pytest.raises(InputError, match="cannot be checked: its backbone has local attention"):
        gmsa.restore_checked(gmsa.compress("text", 2))
    with pytest.raises(InputError, match="cannot be checked: its backbone has local attention"):
        gmsa.stream_checked(gmsa.compress("text", 2))


@pytest.mark.parametrize("candidates", [(), (0,), (8, -1), (True,), ("8",)])
def test_bad_candidates(gmsa: GMSA, candidates: Any) -> None:
    with pytest.raises(InputError, match="candidates must be whole numbers >= 1"):
        gmsa.restore_checked(gmsa.compress("text", 2), candidates=candidates)


def test_a_memory_of_another_model(gmsa: GMSA, tiny_model: Callable[..., GmsaModel],
                                   tiny_backbone: Callable[..., Backbone]) -> None:  # fmt: skip
    other = GMSA(tiny_model("llama"), tiny_backbone("llama"))
    with pytest.raises(MemoryMismatchError):
        gmsa.restore_checked(other.compress("text", 2))
    with pytest.raises(MemoryMismatchError):  # at once, not when it is read
        gmsa.stream_checked(other.compress("text", 2))


# -- command line and evaluation ---------------------------------------------------------------------------------------


def test_restore_check_says_what_is_in_doubt(gmsa: GMSA, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gmsa.save_pretrained(tmp_path / "model")
    out = str(tmp_path / "m.safetensors")
    common = ["--model", str(tmp_path / "model"), "--dtype", "float32"]
    gmsa.compress(TEXTS[0], 1).save(out)
    assert cli.main(["restore", out, "--check", *common]) == 0
    shown = capsys.readouterr()
    assert shown.out == TEXTS[0] + "\n"
    assert f"{len(TEXTS[0])} of {len(TEXTS[0])} soft tokens confirmed" in shown.err
    gmsa.compress(TEXTS[0], 8).save(out)
    assert cli.main(["restore", out, "--check", *common]) == 0
    assert "in doubt: " in capsys.readouterr().err


def test_evaluation_of_checked_restorations(gmsa: GMSA, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(f'{{"text": "{text}"}}\n' for text in TEXTS))
    ((row, examples),) = evaluate_restoration(gmsa, str(path), [12], [1], check=True)
    assert row["method"] == "gmsa-checked"
    assert row["metrics"]["confirmed"] == row["metrics"]["prefix_em"] == row["metrics"]["bleu"] == 1
    assert [e["restored"] for e in examples] == [text[:12].strip() for text in TEXTS[:2]]
    ((plain, _),) = evaluate_restoration(gmsa, str(path), [12], [1])
    assert plain["method"] == "gmsa"
    assert "confirmed" not in plain["metrics"]


def test_an_evaluation_of_checked_restorations_goes_on_where_it_stopped(
    gmsa: GMSA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, kept = tmp_path / "texts.jsonl", tmp_path / "cache.jsonl"
    path.write_text("".join(f'{{"text": "{text}"}}\n' for text in TEXTS))

    def run() -> Any:
        return list(evaluate_restoration(gmsa, str(path), [12], [1], check=True, cache=AnswerCache(kept, pytest.fail)))

    first = run()
    monkeypatch.setattr(gmsa, "restore_checked", pytest.fail)
    assert run() == first


def test_restoring_nothing(gmsa: GMSA) -> None:
    assert gmsa.restore_checked([]) == []
