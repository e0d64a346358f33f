"""The hub is never reached: what would be sent, and how names are told from folders."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel

from gmsa import GMSA, GmsaConfig, GmsaModel
from gmsa.errors import CheckpointError
from gmsa.io.backbones import Backbone


@pytest.fixture
def model(tiny_model: Callable[..., GmsaModel]) -> GmsaModel:
    return tiny_model("llama", system_prompt="")


def test_the_auto_classes_know_it(model: GmsaModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "m")
    assert isinstance(AutoConfig.from_pretrained(tmp_path / "m"), GmsaConfig)
    again = AutoModel.from_pretrained(tmp_path / "m", dtype=torch.float32)
    assert isinstance(again, GmsaModel)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_pushing_sends_the_checkpoint(model: GmsaModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils import hub

    sent: dict[str, Any] = {}

    def upload(self: GmsaModel, folder: str, repo_id: str, **_: Any) -> None:
        sent.update(repo=repo_id, files=sorted(p.name for p in Path(folder).iterdir()))

    api = SimpleNamespace(create_repo=lambda repo_id, **_: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(hub, "hf_api", lambda: api)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *_, **__: SimpleNamespace(save=lambda path: None))
    monkeypatch.setattr(GmsaModel, "_upload_modified_files", upload)
    model.push_to_hub("someone/model")
    assert sent == {"repo": "someone/model", "files": ["config.json", "model.safetensors"]}


def test_a_hub_name_is_looked_up_there(
    model: GmsaModel, tiny_backbone: Callable[..., Backbone], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    model.save_pretrained(tmp_path / "m")
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(name=name, **options)
        return str(tmp_path / "m")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    gmsa = GMSA.from_pretrained("someone/model", revision="v2", token="t", dtype="float32")
    assert gmsa.fingerprint == GMSA(model, tiny_backbone("llama")).fingerprint
    assert (asked["name"], asked["revision"], asked["token"]) == ("someone/model", "v2", "t")


def test_an_unreachable_hub_is_one_line() -> None:
    with pytest.raises(CheckpointError, match="cannot get model 'someone/model' from the hub") as caught:
        GMSA.from_pretrained("someone/model")
    assert "\n" not in str(caught.value)


def test_saving_may_push_with_the_form_and_all_arguments(
    model: GmsaModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    calls: list[dict[str, Any]] = []

    class Api:
        def __init__(self, token: str | None) -> None:
            calls.append({"token": token})

        def create_repo(self, repo_id: str, **options: Any) -> SimpleNamespace:
            calls.append({"repo_id": repo_id, **options})
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def upload_folder(self, **options: Any) -> None:
            calls.append(options)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    given = {"private": True, "token": "t", "revision": "dev", "commit_message": "m", "create_pr": True}
    model.save_pretrained(tmp_path / "m", form="int8", push_to_hub=True, **given)
    assert calls == [
        {"token": "t"},
        {"repo_id": "m", "private": True, "exist_ok": True},
        {
            **{"repo_id": "me/m", "folder_path": tmp_path / "m", "revision": "dev", "commit_message": "m"},
            **{"create_pr": True, "allow_patterns": ["config.json", "model.safetensors"]},
        },
    ]
    model.save_pretrained(tmp_path / "m", state_dict={}, is_main_process=True)  # as the Trainer does
    assert len(calls) == 3


def test_the_older_name_of_dtype(model: GmsaModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "m")
    assert GmsaModel.from_pretrained(tmp_path / "m", torch_dtype=torch.float32).dtype == torch.float32
