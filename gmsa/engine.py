"""The public object: text in, memories out; memories and questions in, text out."""

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase, TextIteratorStreamer

from gmsa import checkpoint
from gmsa.backbones import Backbone
from gmsa.config import GmsaConfig
from gmsa.data import make_windows, split_windows
from gmsa.errors import ContextTooLongError, InputError, MemoryMismatchError
from gmsa.memory import Memory
from gmsa.merging import check_merge_size
from gmsa.modeling import GmsaModel, load_model
from gmsa.prompts import Prompt, PromptTemplate

DEFAULT_MODEL = "default"
MERGE_SIZE = 4
BUNDLED = Path(__file__).parent / "models" / DEFAULT_MODEL
Content = Sequence[Memory] | Tensor  # what stands for a context: memories, or a text's decoder token ids (T,)


@dataclass
class Timings:
    """Seconds of the last call, as the command line prints them."""

    compress: float = 0.0
    prefill: float = 0.0  # until the first new token
    decode: float = 0.0  # all tokens after it


@dataclass(frozen=True)
class Score:
    """Teacher-forced prediction of a text: `right` of `tokens` were the likeliest; `nll` in nats over all."""

    tokens: int
    right: int
    nll: float


@dataclass
class _Clock:
    """Notes when the first token arrives; a stopping criterion that never stops anything."""

    started: float = field(default_factory=time.perf_counter)
    first: float | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if self.first is None:
            self.first = time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class GMSA:
    """A model that compresses texts into memories and answers from them.

    Make one with `GMSA.from_pretrained()`. One object serves one caller at a time.

    Attributes:
        model: the network.
        timings: seconds of the last call.
        fingerprint: of the compressor; every memory it makes carries it.
    """

    def __init__(self, model: GmsaModel, decoder: Backbone, encoder: Backbone | None = None) -> None:
        self.model = model.eval()
        self.config: GmsaConfig = model.config
        self.tokenizer: PreTrainedTokenizerBase = decoder.tokenizer
        self.encoder_tokenizer: PreTrainedTokenizerBase = (encoder or decoder).tokenizer
        self.template = PromptTemplate(self.tokenizer, self.config)
        self.fingerprint = checkpoint.compressor_fingerprint(model.compressor)
        self.timings = Timings()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path = DEFAULT_MODEL,
        *,
        revision: str | None = None,
        token: str | None = None,
        local_files_only: bool = False,
        dtype: str | torch.dtype | None = None,
        device_map: Any = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
    ) -> "GMSA":
        """Load a model.

        Args:
            name_or_path: "default" (bundled with the package), a folder, or a hub id.
            dtype: of weights and compute; None: bf16 where the processor multiplies it fast, else fp32.
            device_map: as in transformers, e.g. "cuda"; None: the GPU if there is one.
            attn_implementation: "sdpa", "eager", "flash_attention_2"; None: the backbone's default.

        Raises:
            CheckpointError, BackboneError: something is missing or damaged; the message says what to do.
        """
        name = str(BUNDLED) if str(name_or_path) == DEFAULT_MODEL else str(name_or_path)
        folder = checkpoint.find_folder(name, revision, token, local_files_only)
        model, decoder, encoder = load_model(
            folder,
            dtype=checkpoint.dtype_of(dtype) if dtype is not None else fast_dtype(),
            attn_implementation=attn_implementation,
            token=token,
            local_files_only=local_files_only,
            device_map=device_map or ("cuda" if torch.cuda.is_available() else None),
            trust_remote_code=trust_remote_code,
        )
        return cls(model, decoder, encoder)

    def save_pretrained(self, folder: str | Path, *, form: str = "exact", **kwargs: Any) -> None:
        """Write what training changed; see `GmsaModel.save_pretrained`."""
        self.model.save_pretrained(folder, form=form, **kwargs)

    # -- compress --------------------------------------------------------------------------------------------------

    @overload
    def compress(  # type: ignore[overload-overlap]  # a str is a sequence of str, too
        self, text: str, merge_size: int = ..., *, batch_size: int = ..., show_progress_bar: bool = ...
    ) -> Memory: ...
    @overload
    def compress(
        self, text: Sequence[str], merge_size: int = ..., *, batch_size: int = ..., show_progress_bar: bool = ...
    ) -> list[Memory]: ...

    @torch.no_grad()
    def compress(
        self,
        text: str | Sequence[str],
        merge_size: int = MERGE_SIZE,
        *,
        batch_size: int = 8,
        show_progress_bar: bool = False,
    ) -> Memory | list[Memory]:
        """Turn a text, or each of a list of texts, into a memory.

        Args:
            text: one or several; a list comes back in the same order.
            merge_size: tokens per soft token, any whole number >= 1.
            batch_size: windows encoded at once.
            show_progress_bar: over batches of windows, on stderr.

        Raises:
            ConfigError: a bad merge size.
            InputError: an empty text.
        """
        started = time.perf_counter()
        check_merge_size(merge_size)
        texts = [text] if isinstance(text, str) else list(text)
        tokens = [self._context_tokens(t, number) for number, t in enumerate(texts)]
        # All windows of all texts, the long ones first, so that batches hold windows of like length.
        windows = [(row, w) for row, t in enumerate(tokens) for w in split_windows(t, self.config.window_size)]
        order = sorted(range(len(windows)), key=lambda i: -len(windows[i][1]))
        parts: list[Tensor | None] = [None] * len(windows)
        starts = range(0, len(order), batch_size)
        for start in tqdm(starts, desc="compress", unit="batch", disable=not show_progress_bar):
            chosen = order[start : start + batch_size]
            batch = make_windows([[windows[i][1]] for i in chosen], None)
            ids, mask, rows = (tensor.to(self.model.device) for tensor in batch)
            for i, soft in zip(chosen, self.model.compress(ids, mask, rows, merge_size), strict=True):
                parts[i] = soft
        by_text: list[list[Tensor]] = [[] for _ in texts]
        for (row, _), soft in zip(windows, parts, strict=True):
            assert soft is not None
            by_text[row].append(soft)
        memories = [
            Memory(torch.cat(soft), merge_size, len(t), self.fingerprint)
            for soft, t in zip(by_text, tokens, strict=True)
        ]
        self.timings = Timings(compress=time.perf_counter() - started)
        return memories[0] if isinstance(text, str) else memories

    def _context_tokens(self, text: str, number: int) -> list[int]:
        if not isinstance(text, str):
            raise InputError(f"a context must be a text, got {type(text).__name__}")
        if not text.strip():
            raise InputError("the context is empty" if number == 0 else f"the context at place {number} is empty")
        return self.encoder_tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    # -- read ------------------------------------------------------------------------------------------------------

    @overload
    def restore(self, memory: Memory, *, batch_size: int = ...) -> str: ...
    @overload
    def restore(self, memory: Sequence[Memory], *, batch_size: int = ...) -> list[str]: ...

    def restore(self, memory: Memory | Sequence[Memory], *, batch_size: int = 8) -> str | list[str]:
        """The text of a memory, or of each of several, as the decoder can restate it (greedy).

        Windows were encoded independently, so each is restated on its own and any length works.

        Raises:
            MemoryMismatchError: made by another model. ContextTooLongError: a window too long for the decoder.
        """
        memories = [memory] if isinstance(memory, Memory) else list(memory)
        prompt = self.template.restore()
        windows = [(i, window) for i, m in enumerate(memories) for window in self._windows(m)]
        # In another tokenizer's words a text can be longer; half as much again and a little is ample.
        limits = [window.origin_tokens * 3 // 2 + 16 for _, window in windows]
        new = self._read([([window], prompt) for _, window in windows], max(limits, default=1), batch_size)
        ids: list[list[int]] = [[] for _ in memories]
        for (i, _), limit, tokens in zip(windows, limits, new, strict=True):
            ids[i] += tokens[:limit]
        texts = [self._text(tokens) for tokens in ids]
        return texts[0] if isinstance(memory, Memory) else texts

    @torch.no_grad()
    def score(self, memory: Memory, text: str) -> "Score":
        """How well the decoder predicts a memory's own text, token by token, given the true tokens before each.

        Windows are scored one by one, as they are restored. Encoder and decoder must share a tokenizer.
        """
        if self.encoder_tokenizer is not self.tokenizer:
            raise InputError(
                "scoring needs one tokenizer for encoder and decoder: windows cut a text between its tokens"
            )
        prompt = self.template.restore()
        tokens = self._context_tokens(text, 0)
        windows = split_windows(tokens, self.config.window_size)
        parts = self._windows(memory)
        targets = [torch.tensor(w, device=self.model.device) for w in windows]
        inputs = self._inputs([([part], prompt) for part in parts], max(map(len, windows)))
        out = self.model.score(**inputs, targets=targets)
        log_probabilities = torch.log_softmax(out["logits"].float(), dim=-1)
        chosen = log_probabilities.gather(1, out["labels"][:, None])[:, 0]
        return Score(len(tokens), int(out["correct"]), float(-chosen.sum()))

    def _windows(self, memory: Memory) -> list[Memory]:
        """A memory cut where the windows of its text met."""
        size = self.config.window_size
        if size is None or memory.origin_tokens <= size:
            return [memory]
        per_window = -(-size // memory.merge_size)
        parts = memory.soft_tokens.split(per_window)
        return [
            Memory(part, memory.merge_size, min(size, memory.origin_tokens - i * size), memory.fingerprint)
            for i, part in enumerate(parts)
        ]

    @overload
    def answer(
        self,
        question: str,
        memory: Memory | Sequence[Memory],
        *,
        max_new_tokens: int = ...,
        stream: Literal[False] = ...,
        batch_size: int = ...,
        **sampling: Any,
    ) -> str: ...
    @overload
    def answer(
        self,
        question: str,
        memory: Memory | Sequence[Memory],
        *,
        max_new_tokens: int = ...,
        stream: Literal[True],
        batch_size: int = ...,
        **sampling: Any,
    ) -> Iterator[str]: ...
    @overload
    def answer(
        self,
        question: Sequence[str],
        memory: Memory | Sequence[Memory] | Sequence[Sequence[Memory]],
        *,
        max_new_tokens: int = ...,
        stream: Literal[False] = ...,
        batch_size: int = ...,
        **sampling: Any,
    ) -> list[str]: ...

    def answer(
        self,
        question: str | Sequence[str],
        memory: Memory | Sequence[Memory] | Sequence[Sequence[Memory]],
        *,
        max_new_tokens: int = 128,
        stream: bool = False,
        batch_size: int = 8,
        **sampling: Any,
    ) -> str | list[str] | Iterator[str]:
        """Answer a question from one memory, or from several read one after the other.

        Args:
            question: one, or a list of questions on the same memories. To ask each question of its own memories, give
                a list of lists of memories, one per question.
            memory: what to answer from.
            max_new_tokens: longest answer.
            stream: yield the answer piece by piece (one question only).
            batch_size: questions answered at once.
            sampling: transformers' generation options (do_sample, temperature, top_p, ...); greedy by default.

        Raises:
            InputError: an empty question, or lists that do not match.
            MemoryMismatchError: a memory of another model. ContextTooLongError: too much for the decoder.
        """
        questions = [question] if isinstance(question, str) else list(question)
        groups: list[list[Memory]]
        if isinstance(memory, Memory):
            groups = [[memory]] * len(questions)
        elif all(isinstance(m, Memory) for m in memory):
            groups = [list(memory)] * len(questions)  # type: ignore[arg-type]
        else:
            groups = [[m] if isinstance(m, Memory) else list(m) for m in memory]
        if len(groups) != len(questions):
            raise InputError(f"{len(questions)} questions but {len(groups)} lists of memories: give one per question")
        if not all(groups):
            raise InputError("there is no memory to answer from")
        if stream:
            if len(questions) != 1:
                raise InputError("stream=True takes one question")
            return self._stream((groups[0], self.template(questions[0])), max_new_tokens, sampling)
        answers = self.read(questions, groups, max_new_tokens=max_new_tokens, batch_size=batch_size, **sampling)
        return answers[0] if isinstance(question, str) else answers

    def read(
        self,
        questions: Sequence[str],
        contents: Sequence[Content],
        *,
        max_new_tokens: int = 128,
        batch_size: int = 8,
        **sampling: Any,
    ) -> list[str]:
        """Answer each question from what the decoder reads in place of its context; what `answer` stands on.

        Args:
            questions: one per content.
            contents: of each question its memories, or token ids (T,) of a text in the decoder's vocabulary, T >= 0.
            max_new_tokens, batch_size, sampling: as for `answer`.

        Raises:
            InputError: an empty question.
            MemoryMismatchError: a memory of another model. ContextTooLongError: too much for the decoder.
        """
        rows = [(content, self.template(q)) for content, q in zip(contents, questions, strict=True)]
        return [self._text(tokens) for tokens in self._read(rows, max_new_tokens, batch_size, **sampling)]

    def _read(
        self,
        rows: Sequence[tuple[Content, Prompt]],
        max_new_tokens: int,
        batch_size: int,
        **sampling: Any,
    ) -> list[list[int]]:
        """New tokens of each row, without what ends them."""
        timings = Timings(compress=self.timings.compress)
        new_tokens: list[list[int]] = []
        ends = self._ends()
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            clock = _Clock()
            new = self.model.generate(
                **self._inputs(part, max_new_tokens),
                **self._generation(max_new_tokens, sampling),
                stopping_criteria=[clock],
            )
            done = time.perf_counter()
            timings.prefill += (clock.first or done) - clock.started
            timings.decode += done - (clock.first or done)
            for row in new.tolist():
                stop = next((i for i, token in enumerate(row) if token in ends), len(row))
                new_tokens.append(row[:stop])
        self.timings = timings
        return new_tokens

    def _text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip()

    def _stream(self, row: tuple[Content, Prompt], max_new_tokens: int, sampling: Any) -> Iterator[str]:
        """Generation runs in a thread that ends with the iterator, whether it was exhausted or dropped."""
        inputs = self._inputs([row], max_new_tokens)  # errors are raised here, not in the thread
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=False, skip_special_tokens=True)
        dropped = threading.Event()
        clock = _Clock()
        failed: list[BaseException] = []

        def stop(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            return torch.full((len(input_ids),), dropped.is_set(), device=input_ids.device)

        def run() -> None:
            try:
                options = self._generation(max_new_tokens, sampling)
                self.model.generate(**inputs, **options, streamer=streamer, stopping_criteria=[clock, stop])
            except BaseException as error:  # handed to the caller below
                failed.append(error)
                streamer.end()

        def pieces() -> Iterator[str]:
            thread = threading.Thread(target=run, daemon=True)
            thread.start()
            try:
                yield from (piece for piece in streamer if piece)
            finally:
                dropped.set()
                thread.join()
            if failed:
                raise failed[0]
            first = clock.first or clock.started
            self.timings = Timings(self.timings.compress, first - clock.started, time.perf_counter() - first)

        return pieces()

    @torch.no_grad()
    def _inputs(self, rows: Sequence[tuple[Content, Prompt]], max_new_tokens: int) -> dict[str, list[Tensor]]:
        device = self.model.device
        soft, before, after = [], [], []
        for content, prompt in rows:
            if isinstance(content, Tensor):
                vectors = self.model.get_input_embeddings()(content.to(device))
            else:
                for memory in content:
                    self.check(memory)
                vectors = torch.cat([m.soft_tokens.to(device) for m in content])
            self._check_length(len(vectors), len(prompt.before) + len(prompt.after), max_new_tokens)
            soft.append(vectors)
            before.append(prompt.before.to(device))
            after.append(prompt.after.to(device))
        return {"soft": soft, "before": before, "after": after}

    def check(self, memory: Memory) -> None:
        """Raise MemoryMismatchError unless this model's compressor made the memory."""
        if memory.fingerprint != self.fingerprint:
            raise MemoryMismatchError(
                f"the memory was made by another compressor ({memory.fingerprint}) than this model's "
                f"({self.fingerprint}): compress the text anew with this model"
            )

    def _check_length(self, soft: int, prompt: int, new: int) -> None:
        limit = getattr(self.model.decoder.config, "max_position_embeddings", None)
        if limit is not None and soft + prompt + new > limit:
            raise ContextTooLongError(
                f"{soft} soft tokens + {prompt} prompt tokens + {new} new tokens exceed the decoder's {limit}: "
                "use a larger merge size, fewer documents, or fewer new tokens"
            )

    def _ends(self) -> set[int]:
        """Tokens that end an answer."""
        return {self.template.end_id, self.tokenizer.eos_token_id} - {None}

    def _generation(self, max_new_tokens: int, sampling: dict[str, Any]) -> dict[str, Any]:
        options = {
            "max_new_tokens": max_new_tokens,
            "do_sample": False,
            "eos_token_id": sorted(self._ends()),
            "pad_token_id": self.tokenizer.pad_token_id,
            **sampling,
        }
        # A fresh configuration: a backbone's own may hold sampling defaults or a repetition penalty.
        return {"generation_config": GenerationConfig(**options)}


def fast_dtype() -> torch.dtype:
    """bf16 on a GPU or a CPU with bf16 products (AVX512-BF16, AMX); else fp32, which is then the faster one."""
    if torch.cuda.is_available():
        return torch.bfloat16
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return torch.float32
    return torch.bfloat16 if "avx512_bf16" in flags or "amx_bf16" in flags else torch.float32
