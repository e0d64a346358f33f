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
