"""The public object: text in, memories out; memories and questions in, text out."""

import copy
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from gmsa.config import GmsaConfig
from gmsa.decode import batch as generation
from gmsa.decode.batch import Prefix
from gmsa.decode.checked import (
    CANDIDATES,
    CheckedGroup,
    CheckedPiece,
    CheckedText,
    checked_text,
    restored_groups,
    why_not,
)
from gmsa.decode.cpu import PackedLinears
from gmsa.decode.prompt import Prompt, PromptTemplate
from gmsa.decode.stream import TextPieces
from gmsa.errors import ContextTooLongError, InputError, MemoryMismatchError, check_whole
from gmsa.io import checkpoint, export
from gmsa.io.backbones import Backbone
from gmsa.io.compressor import drop_decoder
from gmsa.io.loading import GmsaModel, load_model
from gmsa.io.memory import Memory
from gmsa.model.backbone import layers_of
from gmsa.model.merging import check_merge_size
from gmsa.model.windows import Window, batch_windows, cut_windows, make_windows, split_windows
from gmsa.text import token_pieces

DEFAULT_MODEL = "default"
MERGE_SIZE = 4
BUNDLED = Path(__file__).parent / "models" / DEFAULT_MODEL
# What stands for a context: memories, a text's decoder token ids (T,), or either after the decoder has read it.
Content = Sequence[Memory] | Tensor | Prefix
Row = tuple[Content, Prompt]
PARTS = ("before", "after")  # of a prompt


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


class _Clock:
    """When the first token arrived. transformers' `generate` takes it as a stopping criterion that never stops."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.first: float | None = None

    def note(self) -> None:
        """A token is there."""
        if self.first is None:
            self.first = time.perf_counter()

    def add_to(self, timings: Timings) -> None:
        """All tokens are there."""
        ended = time.perf_counter()
        first = self.first or ended
        timings.prefill += first - self.started
        timings.decode += ended - first

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.note()
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
        self.encoder_config: PreTrainedConfig = (encoder or decoder).model.config  # of the whole backbone
        self.template = PromptTemplate(self.tokenizer, self.config)
        self.fingerprint = checkpoint.compressor_fingerprint(model.compressor)
        self.timings = Timings()
        self._packed = PackedLinears(model.decoder)

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

    def export_decoder(self, folder: str | Path) -> None:
        """Write the decoder as a plain Hugging Face folder; see `gmsa.io.export.export_decoder`."""
        export.export_decoder(self.model, self.tokenizer, sorted(self._ends()), self.fingerprint, Path(folder))

    def export_compressor(self, folder: str | Path) -> None:
        """Write the compressor alone; see `gmsa.io.export.export_compressor`."""
        parts = (self.model.decoder.config, self.tokenizer), (self.encoder_config, self.encoder_tokenizer)
        export.export_compressor(self.model, *parts, self.fingerprint, Path(folder))

    def drop_decoder(self) -> None:
        """Let go of the decoder, all but its token embeddings: what remains compresses and embeds prompts."""
        drop_decoder(self.model.decoder)
        self._packed = PackedLinears(self.model.decoder)  # the one before holds on to the layers

    @property
    def shares_tokenizer(self) -> bool:
        """Whether encoder and decoder have one tokenizer, so that a window's tokens are those it is restored to."""
        return self.encoder_tokenizer is self.tokenizer

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
            batch_size: full windows encoded at once, or as many shorter ones as have no more tokens.
            show_progress_bar: over characters, on stderr.

        Raises:
            ConfigError: a bad merge size.
            InputError: an empty text, a bad batch size.
        """
        started = time.perf_counter()
        check_merge_size(merge_size)
        check_whole("batch_size", batch_size, error=InputError)
        texts = [text] if isinstance(text, str) else list(text)
        for number, one in enumerate(texts):
            self._check_context(one, number)
        parts: list[list[Tensor]] = [[] for _ in texts]
        tokens = [0] * len(texts)
        with tqdm(
            total=sum(map(len, texts)), desc="compress", unit="char", unit_scale=True, disable=not show_progress_bar
        ) as bar:
            for batch in batch_windows(self._windows_of(texts, bar), self.config.window_size, batch_size):
                arguments = make_windows([[window.tokens] for window in batch], None)
                ids, mask, rows = (tensor.to(self.model.device) for tensor in arguments)
                for window, soft in zip(batch, self.model.compress(ids, mask, rows, merge_size), strict=True):
                    parts[window.row].append(soft)  # those of a text come in order
                    tokens[window.row] += len(window.tokens)
        memories = []
        for number, count in enumerate(tokens):
            if not count:
                raise InputError(f"the context at place {number} has no tokens")
            soft_tokens = torch.cat(parts[number])
            parts[number] = []  # of a long text, most of the memory in use
            memories.append(Memory(soft_tokens, merge_size, count, self.fingerprint))
        self.timings = Timings(compress=time.perf_counter() - started)
        return memories[0] if isinstance(text, str) else memories

    def _windows_of(self, texts: Sequence[str], bar: tqdm) -> Iterator[Window]:
        """Windows of all texts; the bar counts characters."""
        for row, text in enumerate(texts):
            left = len(text)
            for tokens in cut_windows(token_pieces(self.encoder_tokenizer, text), self.config.window_size):
                yield Window(row, tokens)
                done = min(left, 4 * len(tokens))  # about
                left -= done
                bar.update(done)
            bar.update(left)

    def _context_tokens(self, text: str) -> list[int]:
        self._check_context(text, 0)
        return [token for piece in token_pieces(self.encoder_tokenizer, text) for token in piece]

    def _check_context(self, text: str, number: int) -> None:
        if not isinstance(text, str):
            raise InputError(f"a context must be a text, got {type(text).__name__}")
        if not text.strip():
            raise InputError("the context is empty" if number == 0 else f"the context at place {number} is empty")

    def twin(self) -> "GMSA":
        """Another object over the same weights, for another thread: one object serves one caller at a time.

        Make it while nothing else uses this one.
        """
        twin = copy.copy(self)
        twin.model = copy.deepcopy(self.model, {id(weight): weight for weight in self.model.parameters()})
        twin.tokenizer, twin.encoder_tokenizer = copy.deepcopy((self.tokenizer, self.encoder_tokenizer))
        twin.template = PromptTemplate(twin.tokenizer, self.config)
        twin.timings = Timings()
        twin._packed = PackedLinears(twin.model.decoder)
        return twin

    def compile(self) -> None:
        """Compile encoder and LSA, block by block: compressing is faster after the first batches, which are far slower.

        For corpora. On CPU it needs a C++ compiler; docs/speed.md says from how much text on it pays.
        """
        for part in (self.model.compressor.encoder, self.model.compressor.lsa.blocks):
            for block in layers_of(part) if part is not None else ():
                block.compile(dynamic=True)

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
        windows = self._windows(memories)
        limits = [self.longest_restoration(window.origin_tokens) for _, window in windows]
        new = self._read([([window], prompt) for _, window in windows], max(limits, default=1), batch_size)
        ids: list[list[int]] = [[] for _ in memories]
        for (i, _), limit, tokens in zip(windows, limits, new, strict=True):
            ids[i] += tokens[:limit]
        texts = [self._text(tokens) for tokens in ids]
        return texts[0] if isinstance(memory, Memory) else texts

    def longest_restoration(self, origin_tokens: int) -> int:
        """Tokens a window of so many can be restored to: a memory knows how many its text had, so none runs on.

        In another tokenizer's words a text can be longer; half as much again and a little is ample.
        """
        return origin_tokens if self.shares_tokenizer else origin_tokens * 3 // 2 + 16

    @overload
    def restore_checked(
        self, memory: Memory, *, candidates: Sequence[int] = ..., batch_size: int = ..., show_progress_bar: bool = ...
    ) -> CheckedText: ...
    @overload
    def restore_checked(
        self,
        memory: Sequence[Memory],
        *,
        candidates: Sequence[int] = ...,
        batch_size: int = ...,
        show_progress_bar: bool = ...,
    ) -> list[CheckedText]: ...

    def restore_checked(
        self,
        memory: Memory | Sequence[Memory],
        *,
        candidates: Sequence[int] = CANDIDATES,
        batch_size: int = 8,
        show_progress_bar: bool = False,
    ) -> CheckedText | list[CheckedText]:
        """The text of a memory, or of each of several, group by group checked against the memory's own soft tokens.

        Slower than `restore` and far more faithful: the decoder proposes continuations, and the compressor tells which
        of them the memory was made of (gmsa/decode/checked.py).

        Args:
            memory: one or several.
            candidates: continuations weighed for a group; where none fits, the next number of them, and so on.
            batch_size: windows restored at once.
            show_progress_bar: over windows, on stderr.

        Raises:
            InputError: this model's restorations cannot be checked; the message says why.
            MemoryMismatchError: made by another model. ContextTooLongError: a window too long for the decoder.
        """
        self._check_candidates(candidates)
        check_whole("batch_size", batch_size, error=InputError)
        memories = [memory] if isinstance(memory, Memory) else list(memory)
        windows = self._windows(memories)
        # Batches hold windows of one merge size and of like length.
        order = sorted(range(len(windows)), key=lambda n: (windows[n][1].merge_size, -windows[n][1].origin_tokens))
        found: list[list[CheckedGroup]] = [[] for _ in windows]
        started = time.perf_counter()
        with tqdm(total=len(windows), desc="restore", unit="window", disable=not show_progress_bar) as bar:
            while order:
                size = windows[order[0]][1].merge_size
                chosen = [n for n in order[:batch_size] if windows[n][1].merge_size == size]
                order = order[len(chosen) :]
                for groups in self._restored_groups([windows[n][1] for n in chosen], candidates):
                    for n, group in zip(chosen, groups, strict=True):
                        found[n] += [group] if group is not None else []
                bar.update(len(chosen))
        self.timings = Timings(self.timings.compress, decode=time.perf_counter() - started)
        texts = []
        for number in range(len(memories)):
            mine = [group for (i, _), groups in zip(windows, found, strict=True) if i == number for group in groups]
            texts.append(checked_text(mine, self.tokenizer.decode))
        return texts[0] if isinstance(memory, Memory) else texts

    def stream_checked(
        self,
        memory: Memory,
        *,
        candidates: Sequence[int] = CANDIDATES,
        on_step: Callable[[], None] = lambda: None,
    ) -> Iterator[CheckedPiece]:
        """`restore_checked` of one memory, soft token by soft token as they are restored.

        Args:
            memory: one.
            candidates: as in `restore_checked`.
            on_step: called many times for a soft token; what it raises ends the restoration.

        Yields:
            The text each soft token adds, whole characters only, so it may be empty, and whether it is confirmed.

        Raises:
            InputError, MemoryMismatchError, ContextTooLongError: as `restore_checked`, at once.
        """
        self._check_candidates(candidates)
        windows = [window for _, window in self._windows([memory])]
        for window in windows:
            self._checked(([window], self.template.restore()), window.origin_tokens)
        return self._checked_pieces(windows, candidates, on_step)

    def _checked_pieces(
        self, windows: Sequence[Memory], candidates: Sequence[int], on_step: Callable[[], None]
    ) -> Iterator[CheckedPiece]:
        text = TextPieces(self.tokenizer, skip_special_tokens=False)
        last: CheckedPiece | None = None
        for window in windows:
            for group, *_ in self._restored_groups([window], candidates, on_step):
                assert group is not None  # one window ends where its batch does
                if last is not None:  # bytes in doubt are not to be shown as confirmed
                    changes = last.confirmed != group.confirmed
                    yield last._replace(text=last.text + text.finish()) if changes else last
                last = CheckedPiece("".join(map(text.add, group.tokens)), group.confirmed)
        if last is not None:
            yield last._replace(text=last.text + text.finish())

    def require_checkable(self) -> None:
        """Raise InputError if this model's restorations cannot be checked; the message says why."""
        if why := why_not(self.model, self.shares_tokenizer):
            raise InputError(f"this model's restorations cannot be checked: {why}")

    def _check_candidates(self, candidates: Sequence[int]) -> None:
        self.require_checkable()
        if not candidates or not all(type(n) is int and n >= 1 for n in candidates):
            raise InputError(f"candidates must be whole numbers >= 1, got {candidates!r}")

    def _restored_groups(
        self, windows: Sequence[Memory], candidates: Sequence[int], on_step: Callable[[], None] = lambda: None
    ) -> Iterator[list[CheckedGroup | None]]:
        """Windows of one merge size, restored and checked group by group."""
        lengths = [window.origin_tokens for window in windows]
        prompt = self.template.restore()
        inputs = self._inputs([([window], prompt) for window in windows], max(lengths))
        with self._packed.applied():
            yield from restored_groups(
                self.model,
                **inputs,
                lengths=lengths,
                merge_size=windows[0].merge_size,
                candidates=candidates,
                banned=sorted(self._ends()),
                on_step=on_step,
            )

    @torch.no_grad()
    def score(self, memory: Memory, text: str) -> "Score":
        """How well the decoder predicts a memory's own text, token by token, given the true tokens before each.

        Windows are scored one by one, as they are restored.

        Raises:
            InputError: encoder and decoder have tokenizers of their own, or the memory is of a text of another length.
            MemoryMismatchError: made by another model. ContextTooLongError: a window too long for the decoder.
        """
        if not self.shares_tokenizer:
            raise InputError(
                "scoring needs one tokenizer for encoder and decoder: windows cut a text between its tokens"
            )
        prompt = self.template.restore()
        tokens = self._context_tokens(text)
        if len(tokens) != memory.origin_tokens:
            raise InputError(f"the memory is of a text of {memory.origin_tokens} tokens, this one has {len(tokens)}")
        windows = split_windows(tokens, self.config.window_size)
        parts = [part for _, part in self._windows([memory])]
        targets = [torch.tensor(w, device=self.model.device) for w in windows]
        inputs = self._inputs([([part], prompt) for part in parts], max(map(len, windows)))
        out = self.model.score(**inputs, targets=targets)
        log_probabilities = torch.log_softmax(out["logits"].float(), dim=-1)
        chosen = log_probabilities.gather(1, out["labels"][:, None])[:, 0]
        return Score(len(tokens), int(out["correct"]), float(-chosen.sum()))

    def _windows(self, memories: Sequence[Memory]) -> list[tuple[int, Memory]]:
        """Memories cut where the windows of their texts met, each part with the number of its memory."""
        size = self.config.window_size
        found = []
        for number, memory in enumerate(memories):
            if size is None or memory.origin_tokens <= size:
                found.append((number, memory))
                continue
            per_window = -(-size // memory.merge_size)
            for i, part in enumerate(memory.soft_tokens.split(per_window)):
                tokens = min(size, memory.origin_tokens - i * size)
                found.append((number, Memory(part, memory.merge_size, tokens, memory.fingerprint)))
        return found

    @overload
    def answer(
        self,
        question: str | Prompt,
        memory: Memory | Prefix | Sequence[Memory],
        *,
        max_new_tokens: int = ...,
        stream: Literal[False] = ...,
        batch_size: int = ...,
        stop: str | Sequence[str] = ...,
        **sampling: Any,
    ) -> str: ...
    @overload
    def answer(
        self,
        question: str | Prompt,
        memory: Memory | Prefix | Sequence[Memory],
        *,
        max_new_tokens: int = ...,
        stream: Literal[True],
        batch_size: int = ...,
        stop: str | Sequence[str] = ...,
        **sampling: Any,
    ) -> Iterator[str]: ...
    @overload
    def answer(
        self,
        question: Sequence[str | Prompt],
        memory: Memory | Prefix | Sequence[Memory] | Sequence[Prefix | Sequence[Memory]],
        *,
        max_new_tokens: int = ...,
        stream: Literal[False] = ...,
        batch_size: int = ...,
        stop: str | Sequence[str] = ...,
        **sampling: Any,
    ) -> list[str]: ...

    def answer(
        self,
        question: str | Prompt | Sequence[str | Prompt],
        memory: Memory | Prefix | Sequence[Memory] | Sequence[Prefix | Sequence[Memory]],
        *,
        max_new_tokens: int = 128,
        stream: bool = False,
        batch_size: int = 8,
        stop: str | Sequence[str] = (),
        **sampling: Any,
    ) -> str | list[str] | Iterator[str]:
        """Answer a question from one memory, or from several read one after the other.

        What several questions are asked of is read once for all of them.

        Args:
            question: one, or a list of questions on the same memories. To ask each question of its own memories, give
                a list of lists of memories, one per question. A `Prompt` is read as it is, for chats of several turns.
            memory: what to answer from; a `Prefix` from `prefill` in place of memories spares reading them.
            max_new_tokens: longest answer.
            stream: yield the answer piece by piece (one question only).
            batch_size: questions answered at once.
            stop: texts before which an answer ends, if it comes to one.
            sampling: transformers' generation options (do_sample, temperature, top_p, ...); greedy by default.

        Raises:
            InputError: an empty question, or lists that do not match.
            MemoryMismatchError: a memory of another model. ContextTooLongError: too much for the decoder.
        """
        questions = [question] if isinstance(question, str | Prompt) else list(question)
        groups: list[Content]
        if isinstance(memory, Memory):
            groups = [[memory]] * len(questions)
        elif isinstance(memory, Prefix):
            groups = [memory] * len(questions)
        elif all(isinstance(m, Memory) for m in memory):
            groups = [list(memory)] * len(questions)  # type: ignore[arg-type]
        else:
            groups = [[m] if isinstance(m, Memory) else m if isinstance(m, Prefix) else list(m) for m in memory]
        if len(groups) != len(questions):
            raise InputError(f"{len(questions)} questions but {len(groups)} lists of memories: give one per question")
        if not all(map(len, groups)):
            raise InputError("there is no memory to answer from")
        if stream:
            if len(questions) != 1:
                raise InputError("stream=True takes one question")
            return self._stream((groups[0], self._prompt(questions[0])), max_new_tokens, _stops(stop), sampling)
        answers = self.read(
            questions, groups, max_new_tokens=max_new_tokens, batch_size=batch_size, stop=stop, **sampling
        )
        return answers[0] if isinstance(question, str | Prompt) else answers

    def prefill(self, memory: Memory | Sequence[Memory]) -> Prefix:
        """Let the decoder read memories ahead of questions: `answer` takes the result in their place.

        It holds the decoder's keys and values (`Prefix.nbytes`), far more than the memories themselves, and belongs to
        this object. A decoder with local attention cannot share them; its prefix holds none and saves nothing.

        Raises:
            InputError: no memory. MemoryMismatchError: a memory of another model. ContextTooLongError: too much.
        """
        memories = [memory] if isinstance(memory, Memory) else list(memory)
        if not memories:
            raise InputError("there is no memory to read")
        started = time.perf_counter()
        prompt = self.template.restore()
        with self._packed.applied():
            prefix = self._prefix(*self._checked((memories, prompt), 1))
        self.timings = Timings(prefill=time.perf_counter() - started)
        return prefix

    def read(
        self,
        questions: Sequence[str | Prompt],
        contents: Sequence[Content],
        *,
        max_new_tokens: int = 128,
        batch_size: int = 8,
        stop: str | Sequence[str] = (),
        **sampling: Any,
    ) -> list[str]:
        """Answer each question from what the decoder reads in place of its context; what `answer` stands on.

        Args:
            questions: one per content.
            contents: of each question its memories, or token ids (T,) of a text in the decoder's vocabulary, T >= 0, or
                a prefix. One object given for several questions is read once.
            max_new_tokens, batch_size, stop, sampling: as for `answer`.

        Raises:
            InputError: an empty question.
            MemoryMismatchError: a memory of another model. ContextTooLongError: too much for the decoder.
        """
        stops = _stops(stop)
        rows = [(content, self._prompt(q)) for content, q in zip(contents, questions, strict=True)]
        new = self._read(rows, max_new_tokens, batch_size, stops, **sampling)
        return [self._text(tokens, stops) for tokens in new]

    def _prompt(self, question: str | Prompt) -> Prompt:
        return question if isinstance(question, Prompt) else self.template(question)

    def _read(
        self,
        rows: Sequence[Row],
        max_new_tokens: int,
        batch_size: int,
        stops: Sequence[str] = (),
        **sampling: Any,
    ) -> list[list[int]]:
        """New tokens of each row, without what ends them."""
        check_whole("batch_size", batch_size, error=InputError)
        rows = [self._checked(row, max_new_tokens) for row in rows]
        choose = self._chooser(sampling)
        share = choose is not None and generation.shares_prefixes(self.model.decoder)
        uses = Counter(map(_key, rows))
        shared = [share and _length(r[0]) > 0 and (isinstance(r[0], Prefix) or uses[_key(r)] > 1) for r in rows]
        # Batches hold rows of like length, and those that share something one after the other.
        order = sorted(range(len(rows)), key=lambda i: (-_length(rows[i][0]), _key(rows[i])))
        prefixes: dict[Any, Prefix] = {}
        timings = Timings(compress=self.timings.compress)
        found: list[list[int]] = [[] for _ in rows]
        with self._packed.applied():
            for chosen in (*_cut(order, batch_size, shared, True), *_cut(order, batch_size, shared, False)):
                clock = _Clock()
                batch = [rows[i] for i in chosen]
                # What the batch before has read may serve this one, too; the rest is let go.
                once = {_key(row): row for row in batch} if shared[chosen[0]] else {}
                prefixes = {key: prefixes.get(key) or self._prefix(*row) for key, row in once.items()}
                batch = [(prefixes.get(_key(row), row[0]), row[1]) for row in batch]
                for new in self._write(batch, choose, max_new_tokens, stops, sampling, clock):
                    clock.note()
                    written = new
                clock.add_to(timings)
                for i, tokens in zip(chosen, written, strict=True):
                    found[i] = self._without_end(tokens)
        self.timings = timings
        return found

    def _stream(self, row: Row, max_new_tokens: int, stops: Sequence[str], sampling: dict[str, Any]) -> Iterator[str]:
        row = self._checked(row, max_new_tokens)  # errors are raised here, not at the first piece
        choose = self._chooser(sampling)

        def pieces() -> Iterator[str]:
            clock = _Clock()
            text = TextPieces(self.tokenizer, stops)
            seen = 0
            with self._packed.applied():
                for (tokens,) in self._write([row], choose, max_new_tokens, stops, sampling, clock):
                    clock.note()
                    fresh = "".join(map(text.add, self._without_end(tokens)[seen:]))
                    seen = len(tokens)
                    if fresh:
                        yield fresh
            if rest := text.finish():
                yield rest
            timings = Timings(self.timings.compress)
            clock.add_to(timings)
            self.timings = timings

        return pieces()

    def _write(
        self,
        rows: Sequence[Row],
        choose: generation.Chooser | None,
        max_new_tokens: int,
        stops: Sequence[str],
        sampling: dict[str, Any],
        clock: "_Clock",
    ) -> Iterator[list[list[int]]]:
        """The tokens of each row so far, after every step; all at once where transformers does the writing."""
        before, after = ([getattr(prompt, part).to(self.model.device) for _, prompt in rows] for part in PARTS)
        prefixes = [content for content, _ in rows if isinstance(content, Prefix) and content.keys]
        if choose is not None and len(prefixes) == len(rows):
            start = generation.read_after(self.model, prefixes, after, max_new_tokens)
        else:
            soft = [self._soft(content) for content, _ in rows]
            if choose is None:
                options = self._generation(max_new_tokens, sampling)
                yield self.model.generate(soft, before, after, stopping_criteria=[clock], **options).tolist()
                return
            start = generation.read_whole(self.model, soft, before, after, max_new_tokens)

        def ended(tokens: list[int]) -> bool:
            return tokens[-1] in ends or (bool(stops) and any(stop in self._decode(tokens) for stop in stops))

        ends = self._ends()
        yield from generation.write(self.model, start, choose, max_new_tokens, ended, self.tokenizer.pad_token_id)

    def _chooser(self, sampling: dict[str, Any]) -> generation.Chooser | None:
        """What picks tokens; None for options that only transformers' own loop knows."""
        if not generation.OPTIONS.issuperset(sampling):
            return None
        return generation.Chooser(sorted(self._ends()), self.model.device, **sampling)

    def _checked(self, row: Row, max_new_tokens: int) -> Row:
        """The row, once it is known that this model can read it; its prefix's content where the prefix does not fit."""
        content, prompt = row
        check_whole("max_new_tokens", max_new_tokens, error=InputError)
        if isinstance(content, Prefix):
            if content.decoder is not self.model.decoder:
                raise MemoryMismatchError("the prefix was read by another model: call prefill of the one that answers")
            if not torch.equal(content.before.cpu(), prompt.before):  # a template that puts the question first
                content = content.content
        memories = content.content if isinstance(content, Prefix) else content
        if not isinstance(memories, Tensor):
            for memory in memories:
                self.check(memory)
        self._check_length(_length(content), len(prompt.before) + len(prompt.after), max_new_tokens)
        return content, prompt

    @torch.no_grad()
    def _soft(self, content: Content) -> Tensor:
        """(M, d): what the decoder reads in place of a context."""
        if isinstance(content, Prefix):
            return self._soft(content.content)
        if isinstance(content, Tensor):
            return self.model.get_input_embeddings()(content.to(self.model.device))
        return torch.cat([memory.soft_tokens.to(self.model.device) for memory in content])

    def _prefix(self, content: Content, prompt: Prompt) -> Prefix:
        if isinstance(content, Prefix):
            return content
        return generation.read_prefix(self.model, content, prompt.before.to(self.model.device), self._soft(content))

    def _without_end(self, tokens: list[int]) -> list[int]:
        ends = self._ends()
        return tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))]

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def _text(self, tokens: list[int], stops: Sequence[str] = ()) -> str:
        text = self._decode(tokens)
        return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))].strip()

    @torch.no_grad()
    def _inputs(self, rows: Sequence[Row], max_new_tokens: int) -> dict[str, list[Tensor]]:
        rows = [self._checked(row, max_new_tokens) for row in rows]
        before, after = ([getattr(prompt, part).to(self.model.device) for _, prompt in rows] for part in PARTS)
        return {"soft": [self._soft(content) for content, _ in rows], "before": before, "after": after}

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


def _stops(stop: str | Sequence[str]) -> list[str]:
    stops = [stop] if isinstance(stop, str) else list(stop)
    if not all(isinstance(text, str) and text for text in stops):
        raise InputError("stop must be one or more texts, none of them empty")
    return stops


def _key(row: Row) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The same for rows that begin with the same objects."""
    content, prompt = row
    objects = content if isinstance(content, Sequence) else (content,)
    return tuple(map(id, objects)), tuple(prompt.before.tolist())


def _length(content: Content) -> int:
    """Positions it takes in the decoder."""
    if isinstance(content, Prefix):
        return _length(content.content)
    return len(content) if isinstance(content, Tensor) else sum(map(len, content))


def _cut(order: Sequence[int], size: int, kinds: Sequence[bool], kind: bool) -> Iterator[list[int]]:
    """Batches of the rows of one kind."""
    rows = [i for i in order if kinds[i] is kind]
    return (rows[start : start + size] for start in range(0, len(rows), size))


def fast_dtype() -> torch.dtype:
    """bf16 on a GPU or a CPU with bf16 products (AVX512-BF16, AMX); else fp32, which is then the faster one."""
    if torch.cuda.is_available():
        return torch.bfloat16
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return torch.float32
    return torch.bfloat16 if "avx512_bf16" in flags or "amx_bf16" in flags else torch.float32
