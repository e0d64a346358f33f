"""scripts/average_models.py: the weighted mean of models, and what cannot be averaged."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gmsa import GMSA
from gmsa.io.backbones import Backbone
from gmsa.io.checkpoint import stored_parameters
from gmsa.io.loading import GmsaModel

SCRIPT = Path(__file__).parents[2] / "scripts" / "average_models.py"
MADE = runpy.run_path(str(SCRIPT))
merge_in_bases, vocabulary_grams = MADE["merge_in_bases"], MADE["vocabulary_grams"]


@pytest.fixture
def saved(
    tmp_path: Path, tiny_backbone: Callable[..., Backbone], trained_model: Callable[..., GmsaModel]
) -> Callable[..., GMSA]:
    """saved(name, shift): a model in a folder of that name, its weights moved by so much."""

    def save(name: str, shift: float, form: str = "exact", **fields: Any) -> GMSA:
        model = trained_model("llama", system_prompt="", **fields)
        with torch.no_grad():
            for parameter in stored_parameters(model).values():
                parameter += shift
        gmsa = GMSA(model, tiny_backbone("llama"))
        gmsa.save_pretrained(tmp_path / name, form=form)
        return gmsa

    return save


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["average_models.py", *map(str, arguments)])
    runpy.run_path(str(SCRIPT))["main"]()


@pytest.mark.parametrize("form", ["exact", "int8"])
def test_the_mean_counts_each_model_by_its_weight(
    saved: Callable[..., GMSA], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    first = saved("first", 0.0)
    saved("second", 0.08, form)
    saved("third", 0.04)
    folders = [f"{tmp_path / name}={share}" for name, share in (("first", 1), ("second", 2), ("third", 1))]
    run(monkeypatch, tmp_path / "mean", *folders)
    mean = stored_parameters(GMSA.from_pretrained(tmp_path / "mean", dtype=torch.float32).model)
    for name, parameter in stored_parameters(first.model).items():
        atol = 1e-6 if form == "exact" else 2e-3
        torch.testing.assert_close(mean[name], parameter + 0.05, rtol=0, atol=atol)


def test_what_cannot_be_averaged_is_one_line(
    saved: Callable[..., GMSA],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    saved("first", 0.0)
    saved("other", 0.0, encoder_sink=False)
    first, other = tmp_path / "first", tmp_path / "other"
    with pytest.raises(SystemExit) as raised:
        run(monkeypatch, tmp_path / "mean", f"{first}=1", f"{other}=1")
    assert raised.value.code == 2
    assert "different configurations" in capsys.readouterr().err
    assert not (tmp_path / "mean").exists()
    for wrong in (f"{first}", f"{first}=much", f"{first}=0", "=1"):
        with pytest.raises(SystemExit) as raised:
            run(monkeypatch, tmp_path / "mean", wrong)
        assert raised.value.code == 2
        assert "expected FOLDER=WEIGHT" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path / "mean", f"{first}=1", f"{first}=2")
    assert "named twice" in capsys.readouterr().err


# -- in bases of the vocabulary ----------------------------------------------------------------------------------------


def test_each_matrix_counts_where_its_own_inputs_are() -> None:
    first, second = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[10.0, 20.0], [30.0, 40.0]])
    apart = [torch.diag(torch.tensor([1e4, 0.0])), torch.diag(torch.tensor([0.0, 1e4]))]
    found = merge_in_bases([first, second], apart, [0.5, 0.5])
    torch.testing.assert_close(found, torch.tensor([[1.0, 20.0], [3.0, 40.0]]), rtol=0.01, atol=0.05)
    alike = [torch.eye(2), torch.eye(2)]
    torch.testing.assert_close(merge_in_bases([first, second], alike, [0.75, 0.25]), 0.75 * first + 0.25 * second)


def test_the_least_squares_on_what_the_models_read() -> None:
    torch.manual_seed(0)
    matrices, inputs = [torch.randn(3, 4) for _ in range(2)], [torch.randn(4, 50), torch.randn(4, 50) * 3]
    shares = [0.3, 0.7]
    found = merge_in_bases(matrices, [x @ x.T for x in inputs], shares)

    def error(matrix: torch.Tensor) -> float:
        parts = zip(shares, matrices, inputs, strict=True)
        return sum(share * float(((matrix - own) @ x).pow(2).sum()) for share, own, x in parts)

    plain = shares[0] * matrices[0] + shares[1] * matrices[1]
    assert error(found) < error(plain)
    for _ in range(20):
        assert error(found) < error(found + torch.randn(3, 4) * 0.1)


def test_models_are_averaged_in_bases(
    saved: Callable[..., GMSA], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = saved("first", 0.0), saved("second", 0.08)
    grams = vocabulary_grams(first.model)
    stored = stored_parameters(first.model)
    assert {name for name, parameter in stored.items() if parameter.dim() == 2} == set(grams)
    assert all(bool((gram.diagonal() > 0).all()) for gram in grams.values())
    folders = [f"{tmp_path / name}=1" for name in ("first", "second")]
    run(monkeypatch, tmp_path / "mean", *folders, "--bases")
    mean = stored_parameters(GMSA.from_pretrained(tmp_path / "mean", dtype=torch.float32).model)
    name = "decoder.model.layers.2.self_attn.q_proj.weight"
    both = [stored_parameters(gmsa.model)[name].detach() for gmsa in (first, second)]
    expected = merge_in_bases(both, [vocabulary_grams(gmsa.model)[name] for gmsa in (first, second)], [0.5, 0.5])
    torch.testing.assert_close(mean[name].detach(), expected, rtol=1e-3, atol=1e-4)
    assert float((expected - sum(both) / 2).abs().max()) > 1e-3  # another than the plain mean
    vector = "compressor.encoder.layers.0.input_layernorm.weight"
    torch.testing.assert_close(mean[vector], stored[vector] + 0.04)
    run(monkeypatch, tmp_path / "same", f"{tmp_path / 'first'}=1", "--bases")
    same = stored_parameters(GMSA.from_pretrained(tmp_path / "same", dtype=torch.float32).model)
    torch.testing.assert_close(same[name], stored[name], rtol=1e-3, atol=1e-4)
