import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gmsa import GMSA
from gmsa.cli.main import main
from gmsa.errors import InputError
from gmsa.evaluate.influence import MEASURES, evaluate_influence, influence, measures

APPENDED = {"merging": "appended", "lsa": "mlp", "max_appended": 64, "window_size": 64}


@pytest.fixture
def gmsa(make_gmsa: Callable[..., GMSA]) -> GMSA:
    return make_gmsa(window_size=64)


@pytest.fixture
def appended(make_gmsa: Callable[..., GMSA]) -> GMSA:
    fields = {**APPENDED, "trained": ["lsa"]}
    return make_gmsa(**fields)


def write_texts(path: Path) -> Path:
    path.write_text(
        "".join(json.dumps({"text": f"{i} was here, went on to {i + 1} and left."}) + "\n" for i in range(3))
    )
    return path


def test_influence_is_the_change_when_a_token_is_replaced(gmsa: GMSA) -> None:
    ids = gmsa.encoder_tokenizer("ababababab", add_special_tokens=False)["input_ids"]  # a is only ever replaced by b
    change, soft = influence(gmsa, ids, 4)
    whole, other = (gmsa.compress(text, 4).soft_tokens.float() for text in ("ababababab", "abababbbab"))
    torch.testing.assert_close(soft, whole)
    expected = (other - whole).norm(dim=-1) / whole.norm(dim=-1)
    torch.testing.assert_close(change[:, 6], expected, atol=1e-5, rtol=1e-4)
    assert change.shape == (3, 10)
    for group in range(3):  # the encoder is causal
        assert bool((change[group, 4 * (group + 1) :] < 1e-6).all())
        assert bool((change[group, 4 * group : 4 * (group + 1)] > 1e-3).all())


def test_appended_tokens_see_the_whole_text(appended: GMSA) -> None:
    ids = appended.encoder_tokenizer("The mill is old.", add_special_tokens=False)["input_ids"]
    change, soft = influence(appended, ids, 4)
    assert change.shape == (4, 16)
    assert soft.shape == (4, 48)
    assert bool((change > 1e-4).all())


def test_measures_by_hand() -> None:
    soft = torch.eye(4)
    own = measures(torch.eye(4).repeat_interleave(2, dim=1), soft)  # each its own two of eight tokens
    assert own == pytest.approx(
        {"effective_tokens": 2, "coverage": 1, "overlap": 0, "top_share": 1 / 8, "cosine": 0, "effective_rank": 1},
        abs=1e-5,
    )
    anchor = torch.zeros(4, 8)
    anchor[:, 3] = 1  # all hang on one token
    found = measures(anchor, torch.ones(4, 4) + 1e-3 * torch.tensor([[1.0], [2], [3], [4]]))
    assert found["effective_tokens"] == pytest.approx(1)
    assert found["coverage"] == pytest.approx(1 / 8)
    assert found["overlap"] == found["top_share"] == pytest.approx(1)
    assert found["cosine"] == pytest.approx(1)
    assert found["effective_rank"] == pytest.approx(1 / 3, abs=1e-3)  # one direction of three
    assert set(found) == set(MEASURES)
    same = measures(torch.zeros(2, 8), torch.ones(2, 4))  # nothing changes anything
    assert all(math.isfinite(value) for value in same.values())


def test_the_command_draws(gmsa: GMSA, appended: GMSA, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    for name, model in (("mean", gmsa), ("appended", appended)):
        model.save_pretrained(tmp_path / name)
    command = [
        "eval",
        "attention",
        "--data",
        str(write_texts(tmp_path / "texts.jsonl")),
        "--length",
        "24",
        "--limit",
        "2",
    ]
    command += [
        "--model",
        str(tmp_path / "mean"),
        "--methods",
        f"gmsa,icae={tmp_path / 'appended'}",
        "--dtype",
        "float32",
    ]
    assert main([*command, "-o", str(tmp_path / "out")]) == 0
    assert "icae, 24 tokens, 4x, n=2: effective_tokens" in capsys.readouterr().out
    rows = json.loads((tmp_path / "out/results.json").read_text())["rows"]
    assert [(row["task"], row["method"]) for row in rows] == [("attention", "gmsa"), ("attention", "icae")]
    assert set(rows[0]["metrics"]) == set(rows[0]["ci"]) == set(MEASURES)
    # Appended tokens all see everything; a merged group sees what stands before it.
    assert rows[1]["metrics"]["overlap"] > rows[0]["metrics"]["overlap"]
    examples = [json.loads(line) for line in (tmp_path / "out/examples.jsonl").read_text().splitlines()]
    assert ["influence" in e for e in examples] == [True, False, True, False]
    assert "".join(examples[0]["pieces"]) == examples[0]["text"]
    assert (tmp_path / "out/attention.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "out/report.html").read_text()
    assert "icae 4x: what each soft token hangs on" in page
    assert "Paired differences" in page
    again = json.loads((tmp_path / "out/results.json").read_text())
    assert main([*command, "-o", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out/results.json").read_text())["rows"] == again["rows"]


def test_what_cannot_be_compared(gmsa: GMSA, tmp_path: Path) -> None:
    path = str(write_texts(tmp_path / "texts.jsonl"))
    with pytest.raises(InputError, match="nothing to compare"):
        next(evaluate_influence(gmsa, path, 8, [4, 8]))
    (tmp_path / "same.jsonl").write_text(json.dumps({"text": "a" * 40}) + "\n")
    with pytest.raises(InputError, match="all the same"):
        next(evaluate_influence(gmsa, str(tmp_path / "same.jsonl"), 16, [4]))
