"""A checkpoint of the authors' release, read: the arithmetic of theirs, stated anew below, on tiny random models."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from gmsa import GMSA
from gmsa.cli import main as cli
from gmsa.io.checkpoint import read_config

CONTEXT = "The mill was built in 1731 by two brothers, and it stands by the river still."
QUESTION = "When was the mill built?"
ANSWER = "In 1731."
RANK, ALPHA, LAYERS = 4, 8, 2
PREFIX = {"encoder": "encoder.base_model.model.", "lsa": "memory_fusion_layer.", "decoder": "decoder."}


@dataclass
class Release:
    """Their model: an encoder with LoRA beside it, LSA or a linear map, a decoder."""

    encoder: PreTrainedModel
    lora: dict[str, tuple[Tensor, Tensor]]  # A (r, in), B (out, r) of each linear of the encoder
    lsa: PreTrainedModel | None
    linear: torch.nn.Linear
    decoder: PreTrainedModel

    def state_dict(self) -> dict[str, Tensor]:
        """As their trainer writes it."""
        tensors = {}
        for name, tensor in self.encoder.state_dict().items():
            linear = name.removesuffix(".weight").removesuffix(".bias")
            kind = name.rpartition(".")[2]
            tensors[PREFIX["encoder"] + (f"{linear}.base_layer.{kind}" if linear in self.lora else name)] = tensor
        for name, (a, b) in self.lora.items():
            tensors[f"{PREFIX['encoder']}{name}.lora_A.default.weight"] = a
            tensors[f"{PREFIX['encoder']}{name}.lora_B.default.weight"] = b
        for part, module in (("lsa", self.lsa), ("decoder", self.decoder)):
            if module is not None:
                tensors |= {PREFIX[part] + name: tensor for name, tensor in module.state_dict().items()}
        tensors |= {f"semantic_alignment_layer.{name}": value for name, value in self.linear.state_dict().items()}
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}

    @torch.no_grad()
    def soft_tokens(self, ids: Tensor, size: int) -> Tensor:
        """Last states after the final norm, means of groups, LSA's last states after the final norm: (M, d)."""
        encoder = copy.deepcopy(self.encoder)
        for name, (a, b) in self.lora.items():
            encoder.get_submodule(name).weight += ALPHA / RANK * b @ a
        states = encoder(ids[None], output_hidden_states=True).hidden_states[-1][0]
        groups = [states[start : start + size].mean(0) for start in range(0, len(ids), size)]
        merged = torch.stack(groups)[None]
        if self.lsa is None:
            return self.linear(merged)[0]
        return self.lsa(inputs_embeds=merged, output_hidden_states=True).hidden_states[-1][0]

    @torch.no_grad()
    def loss(self, ids: Tensor, size: int, prompt: Tensor, target: Tensor) -> float:
        embeds = torch.cat(
            [self.soft_tokens(ids, size), self.decoder.get_input_embeddings()(torch.cat([prompt, target]))]
        )
        labels = torch.full((len(embeds),), -100)
        labels[-len(target) :] = target
        return float(self.decoder(inputs_embeds=embeds[None], labels=labels[None]).loss)

    @torch.no_grad()
    def write(self, ids: Tensor, size: int, prompt: Tensor, **options: Any) -> Tensor:
        embeds = torch.cat([self.soft_tokens(ids, size), self.decoder.get_input_embeddings()(prompt)])
        return self.decoder.generate(inputs_embeds=embeds[None], do_sample=False, max_new_tokens=12, **options)[0]


def shallow(folder: Path, layers: int) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(folder)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()


def moved(module: torch.nn.Module, seed: int, names: tuple[str, ...] = ("",)) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if any(part in name for part in names):
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.02


def release(folder: Path, lsa: bool = True, trained: tuple[str, ...] = ("",)) -> Release:
    """Trained a little from the backbone in a folder; of the decoder the weights of these names."""
    encoder, decoder = shallow(folder, LAYERS), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(3)
    lora = {}
    for name, module in encoder.named_modules():
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            a = torch.randn(RANK, module.in_features, generator=generator) * 0.1
            lora[name] = a, torch.randn(module.out_features, RANK, generator=generator) * 0.1
    fusion = shallow(folder, 1)
    moved(fusion, 4, (".layers.",))
    moved(decoder, 5, trained)
    width = decoder.config.hidden_size
    torch.manual_seed(6)
    return Release(encoder, lora, fusion if lsa else None, torch.nn.Linear(width, width), decoder)


def imported(made: Release, backbone: Path, tmp_path: Path, file: str = "model.safetensors") -> GMSA:
    source, out = tmp_path / "theirs", tmp_path / "ours"
    source.mkdir()
    tensors = made.state_dict()
    save_file(tensors, source / file) if file.endswith("safetensors") else torch.save(tensors, source / file)
    arguments = ["--backbone", str(backbone), "--lora-alpha", str(ALPHA), "-o", str(out)]
    assert cli.main(["import", "gmsa-release", str(source), *arguments]) == 0
    return GMSA.from_pretrained(out, dtype="float32", device_map="cpu")


@pytest.mark.parametrize(
    ("trained", "group"),
    [((), []), ((".q_proj.", ".k_proj.", ".v_proj."), ["decoder-qkv"]), (("",), ["decoder"])],
    ids=["stage 1", "v1", "v2"],
)
@pytest.mark.parametrize(("family", "fields"), [("llama", {}), ("qwen3", {"tie_word_embeddings": True})])
@pytest.mark.parametrize("lsa", [True, False])
def test_soft_tokens_loss_and_answers_are_theirs(
    save_backbone: Callable[..., Path],
    tmp_path: Path,
    family: str,
    fields: dict,
    trained: tuple,
    group: list,
    lsa: bool,
) -> None:
    backbone = save_backbone(family, **fields)
    made = release(backbone, lsa, trained)
    gmsa = imported(made, backbone, tmp_path, "model.safetensors" if lsa else "pytorch_model.bin")
    assert gmsa.config.trained == sorted(["encoder", "lsa", *group])
    assert gmsa.config.lsa == ("decoder" if lsa else "linear")

    def ids_of(text: str) -> Tensor:
        return torch.tensor(gmsa.tokenizer(text, add_special_tokens=False)["input_ids"])

    context, question = ids_of(CONTEXT), ids_of(QUESTION)
    target = torch.cat([ids_of(ANSWER), torch.tensor([gmsa.tokenizer.eos_token_id])])
    for size in (4, 7):
        memory = gmsa.compress(CONTEXT, size)
        torch.testing.assert_close(memory.soft_tokens, made.soft_tokens(context, size), rtol=1e-4, atol=1e-5)
        frame = gmsa.template(QUESTION)
        with torch.no_grad():
            loss = gmsa.model.score([list(frame.around(memory.soft_tokens))], [target])["loss"]
        assert float(loss) == pytest.approx(made.loss(context, size, question, target), rel=1e-4)
        for options in (dict[str, Any](), {"repetition_penalty": 1.3}):  # theirs is 1.3
            written = made.write(context, size, question, **options)
            mine = gmsa.model.generate([list(frame.around(memory.soft_tokens))], max_new_tokens=12, **options)[0]
            assert mine.tolist() == written.tolist()
            answer = gmsa.answer(QUESTION, memory, max_new_tokens=12, **options)
            assert answer == gmsa.tokenizer.decode(written, skip_special_tokens=True)


def test_the_newest_checkpoint_is_read_and_told(
    save_backbone: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone = save_backbone("llama")
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    made = release(backbone)
    save_file(made.state_dict(), tmp_path / "checkpoint-10/model.safetensors")
    (tmp_path / "checkpoint-9/model.safetensors").write_bytes(b"older")
    command = [
        "import",
        "gmsa-release",
        str(tmp_path),
        "--backbone",
        str(backbone),
        "-o",
        str(tmp_path / "out"),
        "--json",
    ]
    assert cli.main(command) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["folder"] == str(tmp_path / "out")
    assert (facts["encoder_layers"], facts["lsa"]) == (LAYERS, "decoder x 1")
    config = read_config(tmp_path / "out")
    assert (config.encoder_lora or {})["alpha"] == 32
    assert (config.final_norm, config.prompt, config.encoder_sink, config.window_size) == (True, "bare", False, None)
    assert cli.main(command) == 1
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda t: t.pop("decoder.model.norm.weight"), "lacks 1 tensor(s): decoder.model.norm.weight"),
        (lambda t: t.update({"decoder.extra": torch.ones(1)}), "has 1 unexpected tensor(s): decoder.extra"),
        (lambda t: [t.pop(name) for name in list(t) if "lora_" in name], "no checkpoint of the authors' release"),
        (
            lambda t: t["encoder.base_model.model.model.norm.weight"].add_(1),
            "was not made from BACKBONE: encoder.base_model.model.model.norm.weight is another, though frozen",
        ),
        (
            lambda t: t.update({"encoder.base_model.model.model.norm.weight": torch.ones(3)}),
            "was not made from BACKBONE: encoder.base_model.model.model.norm.weight has shape (3,), the model (48,)",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    save_backbone: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Any, told: str
) -> None:
    backbone = save_backbone("llama")
    tensors = release(backbone).state_dict()
    damage(tensors)
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    out = tmp_path / "out"
    capsys.readouterr()
    assert cli.main(["import", "gmsa-release", str(file), "--backbone", str(backbone), "-o", str(out)]) == 1
    error = capsys.readouterr().err
    assert told.replace("BACKBONE", str(backbone)) in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_what_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["import", "gmsa-release", str(tmp_path), "--backbone", "x/y", "-o", str(tmp_path / "out")]
    assert cli.main(command) == 1
    assert "has no model.safetensors or pytorch_model.bin" in capsys.readouterr().err
    for name in ("pytorch_model.bin", "model.safetensors"):
        (tmp_path / name).write_bytes(b"no tensors at all")
        assert cli.main(command) == 1
        assert "cannot be read as tensors" in capsys.readouterr().err


def test_weights_are_stored_as_they_were(save_backbone: Callable[..., Path], tmp_path: Path) -> None:
    backbone = save_backbone("llama")
    made = release(backbone)
    imported(made, backbone, tmp_path)
    stored, theirs = load_file(tmp_path / "ours/model.safetensors"), made.state_dict()
    assert torch.equal(stored["decoder.lm_head.weight"], theirs["decoder.lm_head.weight"])
    assert not any("encoder" in name and "lora_" not in name for name in stored)
