"""The public object: text in, memories out; memories and questions in, text out."""

import contextlib
import copy
import functools
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import IOBase
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from gmsa.attention import last_attention, share_out
from gmsa.config import GmsaConfig
from gmsa.decode.batch import Batch, CachedStates
from gmsa.decode.checked import (
    CANDIDATES,
    CheckedGroup,
    CheckedPiece,
    CheckedText,
    checked_text,
    restored_groups,
    why_not,
)
from gmsa.decode.cpu import DecoderWeights, FastDecoder
from gmsa.decode.loop import Finish, Loop, PrefixStore, Row
from gmsa.decode.prompt import Frame, Piece, PromptTemplate
from gmsa.decode.sampler import Sampling
from gmsa.decode.stream import TextPieces
from gmsa.errors import (
    ContextTooLongError,
    GmsaError,
    InputError,
    MemoryMismatchError,
    check_options,
    check_whole,
)
from gmsa.io import checkpoint, export
from gmsa.io.backbones import Backbone
from gmsa.io.loading import drop_decoder, load_model
from gmsa.io.memory import Memory
from gmsa.model.backbone import body_of, layers_of
from gmsa.model.entry import check_enters_at_input
from gmsa.model.gmsa import GmsaNetwork
from gmsa.model.merging import check_merge_size
from gmsa.model.windows import Window, batch_windows, cut_windows, make_windows, split_windows
from gmsa.refine import Refiner
from gmsa.sentences import (
    FOR_A_QUESTION,
    LEAST,
    Rank,
    kept,
    ranked,
    shared_words,
    take,
    together,
    with_neighbours,
    without_least,
)
from gmsa.text import Control, check_text, check_texts, encode, token_pieces

DEFAULT_MODEL = "default"
MERGE_SIZE = 4
BUNDLED = Path(__file__).parent / "models" / DEFAULT_MODEL
LOOK_SIZE = 8  # merge size of a memory that is looked at to choose sentences, ...
LOOK_TOKENS = 1024  # ... which is of no more tokens than this: among more the decoder looks at much that distracts it
PREFILL_TOKENS = 4096  # of prompts, read together
KEPT_PREFIXES = 1 << 30  # bytes of what questions have in common
# What errors say is taken.
QUESTIONS = "a question must be a text, or several a list of texts"
MEMORIES = "a memory must be a Memory or the path of a memory file, or several a list of them"
CONTENTS = "what to answer from must be a memory, the path of a memory file, or a list of memories, paths and texts"
# What transformers' own `generate` does for `answer`: drawing by other rules, beams, and changed logits.
DRAWING_ELSEWHERE = ("typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")
BEAMS_ALONE = ("length_penalty", "early_stopping")
SEARCHING = (
    *("num_beams", *BEAMS_ALONE, *DRAWING_ELSEWHERE, "max_time", "watermarking_config", "renormalize_logits"),
    *("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "remove_invalid_values"),
    *("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"),
)
OBJECTS = ("logits_processor", "stopping_criteria", "streamer", "generation_config", "assistant_model")  # of `generate`


@dataclass
class Timings:
    """Seconds of the last call, as the command line prints them."""

    compress: float = 0.0
    prefill: float = 0.0  # reading prompts
    decode: float = 0.0  # writing tokens


@dataclass(frozen=True)
class Score:
    """Teacher-forced prediction of a text: `right` of `tokens` were the likeliest; `nll` in nats over all."""

    tokens: int
    right: int
    nll: float


class Answer(str):
    """A text that a model wrote, and how it ended.

    Attributes:
        finish_reason: "stop", it came to its end or to a stop string; "length", it was cut.
        tokens: how many it has.
    """

    finish_reason: Finish
    tokens: int

    def __new__(cls, text: str, finish_reason: Finish, tokens: int) -> "Answer":
        """See the class."""
        made = super().__new__(cls, text)
        made.finish_reason, made.tokens = finish_reason, tokens
        return made

    def __getnewargs__(self) -> tuple[str, Finish, int]:  # type: ignore[override]  # a str has one
        """What copies and pickles are made of."""
        return str(self), self.finish_reason, self.tokens


class AnswerStream(Iterator[str]):
    """The pieces of an answer as they are written; `answer` is the whole of it once they have ended."""

    def __init__(self, pieces: Generator[str], row: Row) -> None:
        self._pieces = pieces
        self._row = row

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Write no more."""
        self._pieces.close()

    @property
    def answer(self) -> Answer | None:
        """The whole answer; None while it is being written."""
        return None if self._row.finish is None else _answer(self._row)


@dataclass(frozen=True, eq=False)
class PrefixCache:
    """What a decoder keeps of contents it has read: questions about them then cost only themselves.

    Attributes:
        contents: the memories, texts and token ids.
        pieces: of the prompt, up to the last of the contents.
        states: keys and values; far more than the memories themselves.
        decoder: which has read them, and alone can go on.
    """

    contents: Sequence[Any]
    pieces: tuple[Tensor, ...]
    states: CachedStates
    decoder: object

    def __len__(self) -> int:
        """Positions it takes in the decoder."""
        return len(self.states)

    @property
    def nbytes(self) -> int:
        """Memory it takes, beside its contents."""
        return self.states.nbytes


# What a question is about: memories, texts and token ids (T,) of texts, in any order.
Content = Memory | str | Tensor | os.PathLike[str]
Contents = PrefixCache | Sequence[Content]
About = Content | Contents
MemoryOrFile = Memory | str | os.PathLike[str]
Stops = str | Sequence[str] | None


class GMSA:
    """A model that compresses texts into memories and answers from them.

    Make one with `GMSA.from_pretrained()`. One object serves one caller at a time.

    Attributes:
        model: the network.
        timings: seconds of the last call.
        fingerprint: of the compressor; every memory it makes carries it.
        on_step: called many times while texts are compressed, answered from or restored; what it raises ends the call.
    """

    def __init__(
        self,
        model: GmsaNetwork,
        decoder: Backbone,
        encoder: Backbone | None = None,
        decoder_weights: DecoderWeights = "exact",
    ) -> None:
        self.model = model.eval()
        self.config: GmsaConfig = model.config
        self.tokenizer: PreTrainedTokenizerBase = decoder.tokenizer
        self.encoder_tokenizer: PreTrainedTokenizerBase = (encoder or decoder).tokenizer
        self.encoder_config: PreTrainedConfig = (encoder or decoder).model.config  # of the whole backbone
        self.template = PromptTemplate(self.tokenizer, self.config)
        self.fingerprint = checkpoint.compressor_fingerprint(model.compressor)
        self.timings = Timings()
        self.on_step: Callable[[], None] = lambda: None
        self.fast = FastDecoder(model.decoder, decoder_weights)

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
        decoder_weights: DecoderWeights = "exact",
        trust_remote_code: bool = False,
    ) -> "GMSA":
        """Load a model.

        Args:
            name_or_path: "default" (bundled with the package), a folder, or a hub id.
            dtype: of weights and compute; None: bf16 where the processor multiplies it fast, else fp32.
            device_map: as in transformers, e.g. "cuda"; None: the GPU if there is one.
            attn_implementation: "sdpa", "eager", "flash_attention_2"; None: the backbone's default.
            decoder_weights: "exact", or "int8": writing reads half the bytes and is nearly as good (docs/speed.md).

        Raises:
            CheckpointError, BackboneError: something is missing or damaged; the message says what to do.
        """
        model, decoder, encoder = load_model(
            BUNDLED if str(name_or_path) == DEFAULT_MODEL else name_or_path,
            revision=revision,
            token=token,
            local_files_only=local_files_only,
            dtype=fast_dtype() if dtype is None else dtype,
            device_map=device_map or ("cuda" if torch.cuda.is_available() else None),
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
        )
        return cls(model, decoder, encoder, decoder_weights)

    def save_pretrained(self, folder: str | Path, *, form: str = "exact", **kwargs: Any) -> None:
        """Write what training changed; see `GmsaModel.save_pretrained`."""
        self.model.save_pretrained(folder, form=form, **kwargs)

    def export_decoder(self, folder: str | Path) -> None:
        """Write the decoder as a plain Hugging Face folder; see `gmsa.io.export.export_decoder`."""
        export.export_decoder(self.model, self.tokenizer, sorted(self.ends), self.fingerprint, Path(folder))

    def export_compressor(self, folder: str | Path) -> None:
        """Write the compressor alone; see `gmsa.io.export.export_compressor`."""
        parts = (self.model.decoder.config, self.tokenizer), (self.encoder_config, self.encoder_tokenizer)
        export.export_compressor(self.model, *parts, self.fingerprint, Path(folder))

    def drop_decoder(self) -> None:
        """Let go of the decoder, all but its token embeddings: what remains compresses and embeds prompts."""
        drop_decoder(self.model.decoder)
        self.fast = FastDecoder(self.model.decoder)  # the one before holds on to the layers

    @property
    def shares_tokenizer(self) -> bool:
        """Whether encoder and decoder have one tokenizer, so that a window's tokens are those it is restored to."""
        return self.encoder_tokenizer is self.tokenizer

    # -- compress --------------------------------------------------------------------------------------------------

    @overload
    def compress(  # type: ignore[overload-overlap]  # a str is a sequence of str, too
        self, text: str, merge_size: int = ..., *, refine: int = ..., batch_size: int = ...,
        show_progress_bar: bool = ...,
    ) -> Memory: ...  # fmt: skip
    @overload
    def compress(
        self, text: Sequence[str], merge_size: int = ..., *, refine: int = ..., batch_size: int = ...,
        show_progress_bar: bool = ...,
    ) -> list[Memory]: ...  # fmt: skip

    @torch.no_grad()
    def compress(
        self,
        text: str | Sequence[str],
        merge_size: int = MERGE_SIZE,
        *,
        refine: int = 0,
        batch_size: int = 8,
        show_progress_bar: bool = False,
    ) -> Memory | list[Memory]:
        """Turn a text, or each of a list of texts, into a memory.

        Args:
            text: one or several; a list comes back in the same order.
            merge_size: tokens per soft token, any whole number >= 1.
            refine: gradient steps that improve each memory once it is made (gmsa/refine.py): slow, and worth it for
                what is read often or must be restored word for word.
            batch_size: full windows encoded at once, or as many shorter ones as have no more tokens.
            show_progress_bar: over characters, on stderr.

        Raises:
            ConfigError: a bad merge size.
            InputError: an empty text, a bad batch size or number of steps.
            ContextTooLongError: a window has more tokens than the encoder has positions or, with `refine`, the decoder.
        """
        started = time.perf_counter()
        merge_size = check_merge_size(merge_size)
        refine = check_whole("refine", refine, least=0, error=InputError)
        batch_size = check_whole("batch_size", batch_size, error=InputError)
        texts = [text] if isinstance(text, str) else _listed("the context must be a text or a list of texts", text)
        for number, one in enumerate(texts):
            self._check_context(one, number)
        refiner = Refiner(self.model, self.template, self.encoder_tokenizer)
        # Of each text its windows in order: soft tokens, and how many tokens.
        made: list[list[tuple[Tensor, int]]] = [[] for _ in texts]
        with tqdm(
            total=sum(map(len, texts)), desc="compress", unit="char", unit_scale=True, disable=not show_progress_bar
        ) as bar:
            for batch in batch_windows(self._windows_of(texts, bar), self.config.window_size, batch_size):
                self.on_step()
                self._check_windows(batch, merge_size, bool(refine))
                arguments = make_windows([[window.tokens] for window in batch], None)
                ids, mask, rows = (tensor.to(self.model.device) for tensor in arguments)
                soft = self.model.compress(ids, mask, rows, merge_size)
                if refine:
                    soft = refiner([window.tokens for window in batch], soft, refine)
                for window, states in zip(batch, soft, strict=True):
                    made[window.row].append((states, len(window.tokens)))
        memories = []
        for number in range(len(texts)):
            if not made[number]:
                raise InputError(f"the context at place {number} has no tokens")
            parts, tokens = zip(*made[number], strict=True)
            soft_tokens = torch.cat(parts)
            made[number], parts = [], ()  # of a long text, most of the memory in use
            memories.append(Memory(soft_tokens, merge_size, sum(tokens), self.fingerprint, refine))
        self.timings = Timings(compress=time.perf_counter() - started)
        return memories[0] if isinstance(text, str) else memories

    @overload
    def compress_for(  # type: ignore[overload-overlap]  # a str is a sequence of str, too
        self, question: str, text: str, merge_size: int = ..., *, rank: Rank | None = ..., batch_size: int = ...,
    ) -> Memory: ...  # fmt: skip
    @overload
    def compress_for(
        self, question: str, text: Sequence[str], merge_size: int = ..., *, rank: Rank | None = ...,
        batch_size: int = ...,
    ) -> list[Memory]: ...  # fmt: skip

    def compress_for(
        self,
        question: str,
        text: str | Sequence[str],
        merge_size: int = MERGE_SIZE,
        *,
        rank: Rank | None = None,
        batch_size: int = 8,
    ) -> Memory | list[Memory]:
        """Memories to answer one question from: of the sentences that fit it best, in as many soft tokens.

        Merged by FOR_A_QUESTION little is lost, so that as many sentences stay as then make ceil(L / merge_size) soft
        tokens of the L tokens of all texts; fewer where `rank` finds nothing in the others. If these fit as they are,
        they are merged by 1, which loses least. Where `rank` finds nothing in any, all of them stay.

        Args:
            question: what the memories are for.
            text: one or several.
            merge_size: tokens of the texts per soft token.
            rank: how well each sentence fits the question; None: `rank`. Faster, by words alone: `gmsa.sentences.bm25`.
            batch_size: as for `compress`.

        Returns:
            The memory of what stays of a text; of several, in their order, without those of which nothing stays.

        Raises:
            ConfigError: a bad merge size. InputError: as for `compress`, or an empty question.
        """
        texts = [text] if isinstance(text, str) else text
        stays, size = self.choose_for(question, texts, merge_size, rank, batch_size)
        chosen = self.timings.compress
        memories = self.compress([one for one in stays if one], size, batch_size=batch_size)
        self.timings.compress += chosen
        return memories[0] if isinstance(text, str) else memories

    def choose_for(
        self,
        question: str,
        texts: Sequence[str],
        merge_size: int = MERGE_SIZE,
        rank: Rank | None = None,
        batch_size: int = 8,
    ) -> tuple[list[str], int]:
        """What `compress_for` compresses: what stays of each text ("" where nothing does), and by what it is merged."""
        started = time.perf_counter()
        merge_size = check_merge_size(merge_size)
        if not check_text(question, "the question").strip():
            raise InputError("the question is empty")
        texts = _listed("the context must be a text or a list of texts", texts)
        for number, one in enumerate(texts):
            self._check_context(one, number)
        stays, size = list(texts), merge_size
        rank = rank or functools.partial(self.rank, batch_size=batch_size)
        documents = ranked(texts, question, rank) if merge_size > FOR_A_QUESTION else []
        if any(score > 0 for _, scores in documents for score in scores):
            size = FOR_A_QUESTION
            budget = math.ceil(sum(map(self.count, texts)) / merge_size)
            room = budget * size
            while True:
                stays = kept(documents, room, self.encoder_tokenizer)
                over = sum(self._soft_tokens(one, size) for one in stays) - budget
                if over <= 0 or room <= size:
                    break
                room = max(size, room - size * over)  # windows, and sentences that are joined, may take a few more
            if not any(stays):  # the first token of the best sentence is no character
                stays, size = list(texts), merge_size
            elif sum(self._soft_tokens(one, 1) for one in stays) <= budget:
                size = 1  # room to spare: names and numbers keep their spelling
        self.timings = Timings(compress=time.perf_counter() - started)
        return stays, size

    def rank(self, sentences: list[str], question: str, batch_size: int = 8) -> list[float]:
        """How well each sentence of some texts fits a question: by its words, and by what the decoder attends to.

        The decoder reads an 8x memory of them, of long texts of those whose words fit best, and what it attends to
        before it would write the first word of an answer counts beside the words (`gmsa.sentences.together`). Words
        alone count (`bm25`) where that cannot be seen: there is no decoder, it has too few positions, or attention of
        a kind of its own.

        Args:
            sentences: of all texts in order, with the white space after each.
            question: what is asked about them.
            batch_size: as for `compress`.

        Returns:
            Of each, higher is better; 0: it does not fit, or far less than the best one.

        Raises:
            InputError: what is given is no list of texts, or holds what is no text.
        """
        check_text(question, "the question")
        sentences = check_texts(sentences, "the sentences")
        shared = shared_words(sentences, question)
        words, attended = without_least(shared, LEAST), self._attended(sentences, shared, question, batch_size)
        return words if attended is None else together(words, with_neighbours(sentences, attended))

    def _attended(
        self, sentences: list[str], shared: list[float], question: str, batch_size: int
    ) -> list[float] | None:
        """How much the decoder attends to each sentence in a memory of LOOK_TOKENS; None: that cannot be seen."""
        body = body_of(self.model.decoder)
        if self.config.entry_layer or not len(layers_of(body)):
            return None
        looked_at = self._looked_at(sentences, shared)
        text = "".join(looked_at.values())
        if not text.strip():
            return None
        try:
            memory = self.compress(text, LOOK_SIZE, batch_size=batch_size)
            pieces = self._frame(question).around(*self._pieces([memory]))
            self._check_length(pieces, 0)
        except ContextTooLongError:
            return None
        (embeds,), (soft,) = self._embedded([pieces])
        found = last_attention(body, embeds)
        if found is None:
            return None
        tokens = torch.cat([window.tokens_of_each for window in self.windows(memory)])
        counts = [len(encode(self.encoder_tokenizer, sentence)) for sentence in looked_at.values()]
        shares = dict(zip(looked_at, share_out(found[soft].cpu(), tokens, counts), strict=True))
        return [shares.get(place, 0.0) for place in range(len(sentences))]

    def _looked_at(self, sentences: list[str], shared: list[float]) -> dict[int, str]:
        """The sentences that are looked at, by their places, in order: all, or those whose words fit best."""
        if sum(len(encode(self.encoder_tokenizer, sentence)) for sentence in sentences) <= LOOK_TOKENS:
            return dict(enumerate(sentences))
        places = [place for place, score in enumerate(shared) if score > 0]
        best = [sentences[place] for place in places], [shared[place] for place in places]
        return {places[i]: part for i, part in sorted(take(*best, LOOK_TOKENS, self.encoder_tokenizer).items())}

    def count(self, text: str) -> int:
        """How many tokens of a text there are to compress."""
        return sum(map(len, token_pieces(self.encoder_tokenizer, check_text(text))))

    def _soft_tokens(self, text: str, merge_size: int) -> int:
        """How many a text is compressed to."""
        windows = cut_windows(token_pieces(self.encoder_tokenizer, text), self.config.window_size)
        return sum(math.ceil(len(window) / merge_size) for window in windows)

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

    def _check_windows(self, windows: Sequence[Window], merge_size: int, refined: bool) -> None:
        """Raise ContextTooLongError where one cannot be encoded or, to be refined, not be restored."""
        longest = max(len(window.tokens) for window in windows)
        limit = getattr(self.encoder_config, "max_position_embeddings", None)
        appended = math.ceil(longest / merge_size) if self.config.merging == "appended" else 0
        if limit is not None and longest + self.config.encoder_sink + appended > limit:
            raise ContextTooLongError(
                f"a window of {longest} tokens exceeds the encoder's {limit}: give the model a window_size"
            )
        if refined:
            soft = torch.empty(math.ceil(longest / merge_size), 0)
            self._check_length(self.template.restore().around(soft), self.longest_restoration(longest))

    def _check_context(self, text: str, number: int) -> None:
        name = f"the context at place {number}" if number else "the context"
        if not check_text(text, name).strip():
            raise InputError(f"{name} is empty")

    def share_weights(self) -> "GMSA":
        """Another object over the same weights, for another thread: one object serves one caller at a time.

        Make it while nothing else uses this one.
        """
        other = copy.copy(self)
        other.model = copy.deepcopy(self.model, {id(weight): weight for weight in self.model.parameters()})
        other.tokenizer, other.encoder_tokenizer = copy.deepcopy((self.tokenizer, self.encoder_tokenizer))
        other.template = PromptTemplate(other.tokenizer, self.config)
        other.timings = Timings()
        other.fast = FastDecoder(other.model.decoder, self.fast.weights)
        return other

    def compile(self) -> None:
        """Compile encoder and LSA, block by block: compressing is faster after the first batches, which are far slower.

        For corpora. On CPU it needs a C++ compiler; docs/speed.md says from how much text on it pays.
        """
        for part in (self.model.compressor.encoder, self.model.compressor.lsa.blocks):
            for block in layers_of(part) if part is not None else ():
                block.compile(dynamic=True)

    # -- read ------------------------------------------------------------------------------------------------------

    @overload
    def answer(
        self, question: str | Frame, memory: About, *, max_new_tokens: int = ..., stream: Literal[False] = ...,
        batch_size: int = ..., stop: Stops = ..., **options: Any,
    ) -> Answer: ...  # fmt: skip
    @overload
    def answer(
        self, question: str | Frame, memory: About, *, max_new_tokens: int = ..., stream: Literal[True],
        batch_size: int = ..., stop: Stops = ..., **options: Any,
    ) -> AnswerStream: ...  # fmt: skip
    @overload
    def answer(
        self, question: Sequence[str | Frame], memory: About | Sequence[Contents], *, max_new_tokens: int = ...,
        stream: Literal[False] = ..., batch_size: int = ..., stop: Stops = ..., **options: Any,
    ) -> list[Answer]: ...  # fmt: skip

    def answer(
        self,
        question: str | Frame | Sequence[str | Frame],
        memory: Any,
        *,
        max_new_tokens: int = 128,
        stream: bool = False,
        batch_size: int = 8,
        stop: Stops = None,
        **options: Any,
    ) -> Answer | list[Answer] | AnswerStream:
        """Answer a question from memories, and from texts that the decoder reads as they are, in any order.

        What several questions are asked of is read once for all of them.

        Args:
            question: one, or a list of questions on the same memories. To ask each question of its own, give a list
                of lists, one per question. A `Frame` is read as it is, for prompts of one's own.
            memory: what to answer from: a memory, a `Path` of a memory file, a `PrefixCache` from `prefill`, or a list
                of memories, paths and texts.
            max_new_tokens: longest answer.
            stream: yield the answer piece by piece (one question only).
            batch_size: questions answered at once.
            stop: texts before which an answer ends, if it comes to one.
            options: how tokens are chosen, see `decode.sampler.Sampling`: do_sample, temperature, top_p, seed, ...;
                greedy by default. Beams and the like are transformers' own (`num_beams`).

        Returns:
            A text that knows how it ended (`finish_reason`), a list of them for a list of questions, or its pieces.

        Raises:
            InputError: an empty question, lists that do not match, an unknown option (the nearest is named).
            MemoryMismatchError: a memory of another model. ContextTooLongError: too much for the decoder.
        """
        questions = [question] if isinstance(question, str | Frame) else _listed(QUESTIONS, question)
        contents = self._contents_of(memory, len(questions), framed=all(isinstance(q, Frame) for q in questions))
        if stream:
            if len(questions) != 1:
                raise InputError("stream=True takes one question")
            return self._stream(questions[0], contents[0], max_new_tokens, stop, options)
        answers = self.read(
            questions, contents, max_new_tokens=max_new_tokens, batch_size=batch_size, stop=stop, **options
        )
        return answers[0] if isinstance(question, str | Frame) else answers

    def read(
        self,
        questions: Sequence[str | Frame],
        contents: Sequence[Contents],
        *,
        max_new_tokens: int = 128,
        batch_size: int = 8,
        stop: Stops = None,
        **options: Any,
    ) -> list[Answer]:
        """Answer each question from what it is about; what `answer` stands on.

        Args:
            questions: one per element of `contents`.
            contents: of each question a list of memories, texts and token ids (T,), T >= 0, in the decoder's
                vocabulary, or a prefix. One object given for several questions is read once.
            max_new_tokens, batch_size, stop, options: as for `answer`.

        Raises:
            InputError: an empty question.
            MemoryMismatchError: a memory of another model. ContextTooLongError: too much for the decoder.
        """
        check_whole("batch_size", batch_size, error=InputError)
        sampling, searching = _chosen(options)
        stops = _stops(stop)
        questions = _listed("questions must be a list of texts", questions)
        contents = [
            one if isinstance(one, PrefixCache) else _listed("what a question is about must be a list", one)
            for one in _listed("contents must be a list with a list for each question", contents)
        ]
        if len(questions) != len(contents):
            raise InputError(f"questions ({len(questions)}) and contents ({len(contents)}) must be as many")
        rows = self._rows(questions, contents, max_new_tokens)
        if searching:
            return self._search(rows, batch_size, stops, searching)
        for row in rows:
            row.sampling, row.stops = sampling, stops
        self.run(rows, batch_size)
        return [_answer(row) for row in rows]

    def prompt_embeddings(self, question: str | Frame, memory: Content | Sequence[Content]) -> Tensor:
        """What the decoder reads for a question about memories and texts, for a decoder elsewhere.

        Returns:
            (T, d), in the model's dtype.

        Raises:
            InputError: an empty question, or nothing to answer from.
            MemoryMismatchError: a memory of another model.
            ConfigError: soft tokens enter above the input.
        """
        check_enters_at_input(self.config)
        (contents,) = self._contents_of(memory, 1, framed=isinstance(question, Frame))
        if isinstance(contents, PrefixCache):
            raise InputError("what a decoder elsewhere is to read cannot be read here before: give the memories")
        (embeds,), _ = self._embedded([self._frame(question).around(*self._pieces(contents))])
        return embeds

    def prefill(self, memory: Content | Sequence[Content]) -> PrefixCache:
        """Let the decoder read memories ahead of questions: `answer` takes the result in their place.

        It holds the decoder's keys and values (`PrefixCache.nbytes`), far more than the memories themselves, and
        belongs to this object.

        Raises:
            InputError: no memory. MemoryMismatchError: a memory of another model. ContextTooLongError: too much.
        """
        (contents,) = self._contents_of(memory, 1)
        if isinstance(contents, PrefixCache):
            raise InputError("a prefix has been read already: give it to answer as it is")
        contents = [Memory.load(one) if isinstance(one, os.PathLike) else one for one in contents]
        started = time.perf_counter()
        *pieces, _ = self.template.restore().around(*self._pieces(contents))
        self._check_length(pieces, 1)
        with self.fast.applied():
            (embeds,), (soft,) = self._embedded([pieces])
            batch = Batch(body_of(self.model.decoder), 1, len(embeds), self.model.entry)
            batch.extend([embeds], [soft])
        self.timings = Timings(prefill=time.perf_counter() - started)
        return PrefixCache(contents, tuple(pieces), batch.states(0), self.model.decoder)

    @overload
    def restore(self, memory: MemoryOrFile, *, batch_size: int = ...) -> Answer: ...  # type: ignore[overload-overlap]
    @overload
    def restore(self, memory: Sequence[MemoryOrFile], *, batch_size: int = ...) -> list[Answer]: ...

    def restore(self, memory: Any, *, batch_size: int = 8) -> Answer | list[Answer]:
        """The text of a memory, or of each of several, as the decoder can restate it (greedy).

        Windows were encoded independently, so each is restated on its own and any length works.

        Args:
            memory: one or several, or memory files by their paths.
            batch_size: windows restored at once.

        Raises:
            MemoryMismatchError: made by another model. ContextTooLongError: a window too long for the decoder.
        """
        check_whole("batch_size", batch_size, error=InputError)
        memories, one = self._memories_of(memory)
        frame = self.template.restore()

        def row_of(window: Memory) -> Row:
            return self._rows([frame], [[window]], self.longest_restoration(window.origin_tokens))[0]

        rows = [[row_of(window) for window in self.windows(each)] for each in memories]
        self.run([row for of_one in rows for row in of_one], batch_size)
        texts = []
        for of_one in rows:
            tokens = [token for row in of_one for token in row.tokens]
            whole = self.shares_tokenizer or all(row.finish == "stop" for row in of_one)
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            texts.append(Answer(text, "stop" if whole else "length", len(tokens)))
        return texts[0] if one else texts

    def longest_restoration(self, origin_tokens: int) -> int:
        """Tokens a window of so many can be restored to: a memory knows how many its text had, so none runs on.

        In another tokenizer's words a text can be longer; half as much again and a little is ample.
        """
        return origin_tokens if self.shares_tokenizer else origin_tokens * 3 // 2 + 16

    @overload
    def restore_checked(  # type: ignore[overload-overlap]  # a str is a sequence of str, too
        self, memory: MemoryOrFile, *, candidates: Sequence[int] = ..., batch_size: int = ...,
        show_progress_bar: bool = ...,
    ) -> CheckedText: ...  # fmt: skip
    @overload
    def restore_checked(
        self, memory: Sequence[MemoryOrFile], *, candidates: Sequence[int] = ..., batch_size: int = ...,
        show_progress_bar: bool = ...,
    ) -> list[CheckedText]: ...  # fmt: skip

    def restore_checked(
        self,
        memory: Any,
        *,
        candidates: Sequence[int] = CANDIDATES,
        batch_size: int = 8,
        show_progress_bar: bool = False,
    ) -> CheckedText | list[CheckedText]:
        """The text of a memory, or of each of several, group by group checked against the memory's own soft tokens.

        Slower than `restore` and far more faithful: the decoder proposes continuations, and the compressor tells which
        of them the memory was made of (gmsa/decode/checked.py).

        Args:
            memory: one or several, or memory files by their paths.
            candidates: continuations weighed for a group; where none fits, the next number of them, and so on.
            batch_size: windows restored at once.
            show_progress_bar: over windows, on stderr.

        Raises:
            InputError: this model's restorations cannot be checked, or a memory is refined; the message says why.
            MemoryMismatchError: made by another model. ContextTooLongError: a window too long for the decoder.
        """
        candidates = self._checked_candidates(candidates)
        check_whole("batch_size", batch_size, error=InputError)
        memories, one = self._memories_of(memory)
        _check_unrefined(memories)
        windows = [(number, window) for number, whole in enumerate(memories) for window in self.windows(whole)]
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
        return texts[0] if one else texts

    def stream_checked(
        self,
        memory: MemoryOrFile,
        *,
        candidates: Sequence[int] = CANDIDATES,
        on_step: Callable[[], None] | None = None,
    ) -> Iterator[CheckedPiece]:
        """`restore_checked` of one memory, soft token by soft token as they are restored.

        Args:
            memory: one, or a memory file by its path.
            candidates: as in `restore_checked`.
            on_step: called many times for a soft token; what it raises ends the restoration. None: the object's.

        Yields:
            The text each soft token adds, whole characters only, so it may be empty, and whether it is confirmed.

        Raises:
            InputError, MemoryMismatchError, ContextTooLongError: as `restore_checked`, at once.
        """
        candidates = self._checked_candidates(candidates)
        memory = self._memory_of(memory)
        _check_unrefined([memory])
        windows = self.windows(memory)
        for window in windows:
            self._restoring(window)  # what cannot be read is said now
        return self._checked_pieces(windows, candidates, on_step)

    def _checked_pieces(
        self, windows: Sequence[Memory], candidates: Sequence[int], on_step: Callable[[], None] | None
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

    def _checked_candidates(self, candidates: Sequence[int]) -> list[int]:
        self.require_checkable()
        wanted = "candidates must be whole numbers >= 1"
        listed = _listed(wanted, candidates)
        with contextlib.suppress(InputError):
            if listed:
                return [check_whole("candidates", number, error=InputError) for number in listed]
        raise InputError(f"{wanted}, got {candidates!r}")

    def _restored_groups(
        self, windows: Sequence[Memory], candidates: Sequence[int], on_step: Callable[[], None] | None = None
    ) -> Iterator[list[CheckedGroup | None]]:
        """Windows of one merge size, restored and checked group by group."""
        with self.fast.applied():
            yield from restored_groups(
                self.model,
                [self._on_device(self._restoring(window)) for window in windows],
                [window.soft_tokens.to(self.model.device) for window in windows],
                sizes=[window.tokens_of_each for window in windows],
                candidates=candidates,
                banned=sorted(self.ends | Control.of(self.tokenizer).spellings.keys()),  # no text holds them
                on_step=on_step or self.on_step,
            )

    def _restoring(self, window: Memory) -> tuple[Tensor, ...]:
        """The prompt that restores a window, checked."""
        prompt = self.template.restore().around(*self._pieces([window]))
        self._check_length(prompt, window.origin_tokens)
        return prompt

    @torch.no_grad()
    def score(self, memory: MemoryOrFile, text: str) -> "Score":
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
        memory = self._memory_of(memory)
        self._check_context(text, 0)
        tokens = [token for piece in token_pieces(self.encoder_tokenizer, text) for token in piece]
        if len(tokens) != memory.origin_tokens:
            raise InputError(f"the memory is of a text of {memory.origin_tokens} tokens, this one has {len(tokens)}")
        prompts = [self._on_device(self._restoring(window)) for window in self.windows(memory)]
        windows = split_windows(tokens, self.config.window_size)
        correct, nll = 0, 0.0
        for prompt, window in zip(prompts, windows, strict=True):
            target = torch.tensor(window, device=self.model.device)
            out = self.model.score([prompt], [target], keep_logits=False)
            correct, nll = correct + int(out["correct"]), nll + float(out["loss"]) * len(window)
        return Score(len(tokens), correct, nll)

    # -- what stands behind these ----------------------------------------------------------------------------------

    def windows(self, memory: Memory) -> list[Memory]:
        """A memory cut where the windows of its text met: each was encoded, and is restored, on its own."""
        size = self.config.window_size
        if size is None or memory.origin_tokens <= size:
            return [memory]
        parts = memory.soft_tokens.split(-(-size // memory.merge_size))
        lengths = [min(size, memory.origin_tokens - number * size) for number in range(len(parts))]
        return [
            Memory(part, memory.merge_size, tokens, memory.fingerprint, memory.refined)
            for part, tokens in zip(parts, lengths, strict=True)
        ]

    def _memories_of(self, given: Any) -> tuple[list[Memory], bool]:
        """One memory or several as a list, files read, and whether it was one. InputError: it is something else."""
        one = isinstance(given, Memory | str | os.PathLike)
        listed = [given] if one else _listed(MEMORIES, given)
        return [self._memory_of(memory) for memory in listed], one

    def _memory_of(self, given: Any) -> Memory:
        """A memory, or that of a file by its path. InputError: it is something else."""
        memory = Memory.load(given) if isinstance(given, str | os.PathLike) else given
        if not isinstance(memory, Memory):
            raise InputError(f"a memory must be a Memory or the path of a memory file, got {_named(memory)}")
        return memory

    def _contents_of(self, given: Any, questions: int, framed: bool = False) -> list[Contents]:
        """What each question is about, from what `answer` takes. A prompt of one's own may be about nothing."""
        if isinstance(given, str):
            raise InputError("to answer from a text as it is give a list: [text]; a memory file as a Path")
        if isinstance(given, PrefixCache):
            return [given] * questions
        if isinstance(given, Memory | Tensor | os.PathLike):
            return [[given]] * questions
        listed = _listed(CONTENTS, given)
        if not listed and not framed:
            raise InputError("there is no memory to answer from")
        if all(isinstance(part, Memory | str | Tensor | os.PathLike) for part in listed):
            return [listed] * questions
        contents: list[Contents] = []
        for one in listed:
            single = isinstance(one, Memory | Tensor | os.PathLike)
            contents.append([one] if single else one if isinstance(one, PrefixCache) else _listed(CONTENTS, one))
        if len(contents) != questions:
            raise InputError(f"{questions} questions but {len(contents)} lists of memories: give one per question")
        if not all(map(len, contents)):
            raise InputError("there is no memory to answer from")
        return contents

    def _pieces(self, contents: Sequence[Content]) -> list[Tensor]:
        """Contents as what the decoder reads, each checked: soft tokens of memories, token ids of texts."""
        parts: list[str | Tensor | Memory] = []
        for content in contents:
            part = Memory.load(content) if isinstance(content, os.PathLike) else content
            if isinstance(part, Memory):
                self.check(part)
            elif isinstance(part, str):
                check_text(part, "a text to answer from")
            elif isinstance(part, Tensor):
                self._check_ids(part)
            else:
                raise InputError(f"one answers from memories and texts, got {_named(part)}")
            parts.append(part)
        return [p.soft_tokens if isinstance(p, Memory) else p for p in self.template.contents(parts)]

    def _check_ids(self, ids: Tensor) -> None:
        size = self.model.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr,index]
        whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
        if ids.dim() != 1 or not whole or (len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < size):
            raise InputError(
                f"a tensor to answer from must hold token ids from 0 to {size - 1} in one dimension, "
                f"got {ids.dtype} of shape {tuple(ids.shape)}"
            )

    def _frame(self, question: str | Frame) -> Frame:
        if isinstance(question, Frame):
            return question
        return self.template(check_text(question, "a question"))

    def _rows(self, questions: Sequence[str | Frame], contents: Sequence[Contents], max_new_tokens: int) -> list[Row]:
        """Rows for the loop, once it is known that this model can read them.

        Rows about the same objects have their beginning in common; a prefix is taken where the prompt begins with it.
        """
        limit = check_whole("max_new_tokens", max_new_tokens, error=InputError)
        keys = [_key(one) for one in contents]
        uses = Counter(keys)
        pieces: dict[Any, list[Tensor]] = {}
        rows = []
        for question, one, key in zip(questions, contents, keys, strict=True):
            frame = self._frame(question)
            prefix = one if isinstance(one, PrefixCache) else None
            if prefix is not None and prefix.decoder is not self.model.decoder:
                raise MemoryMismatchError("the prefix was read by another model: call prefill of the one that answers")
            if key not in pieces:
                pieces[key] = self._pieces(prefix.contents if prefix else one)  # type: ignore[arg-type]
            row = Row(frame.around(*pieces[key]), limit)
            self._check_length(row.prompt, limit)
            if not len(row):
                raise InputError("the prompt is empty")
            if prefix is not None:
                begins = row.prompt[: len(prefix.pieces)]
                if len(begins) == len(prefix.pieces) and all(map(torch.equal, begins, prefix.pieces)):
                    row.begins, row.covers = prefix.states, sum(map(len, prefix.pieces))  # else another template
            elif uses[key] > 1 and pieces[key]:
                row.key = (key, *(tuple(ids.tolist()) for ids in (frame.before, *(frame.marks or ()))))
                row.shares = len(row) - len(frame.after)
            rows.append(row)
        return rows

    def _loop(self, batch_size: int) -> Loop:
        return Loop(
            self.model,
            self.tokenizer,
            self.ends,
            max_batch=batch_size,
            prefill_tokens=PREFILL_TOKENS,
            prefixes=PrefixStore(KEPT_PREFIXES),
            fast=self.fast,
        )

    def run(self, rows: Sequence[Row], batch_size: int) -> None:
        """Write all rows to their ends. Raises GmsaError where the decoder's numbers are not finite."""
        loop = self._loop(batch_size)
        # Rows of like length beside one another, and those that share a beginning.
        for row in sorted(rows, key=lambda row: (-len(row), str(row.key))):
            loop.submit(row)
        while loop.busy:
            self.on_step()
            loop.turn()
        self._check_ends(rows)
        self.timings = Timings(self.timings.compress, loop.reading_seconds, loop.writing_seconds)

    def _check_ends(self, rows: Sequence[Row]) -> None:
        if any(row.finish == "error" for row in rows):
            raise GmsaError(f"the decoder's numbers in {self.model.dtype} are not finite: try dtype='float32'")

    def _stream(
        self, question: str | Frame, contents: Contents, max_new_tokens: int, stop: Any, options: dict[str, Any]
    ) -> AnswerStream:
        (row,) = self._rows([question], [contents], max_new_tokens)  # errors are raised here, not at the first piece
        row.sampling, searching = _chosen(options)
        row.stops = _stops(stop)
        if searching:
            raise InputError(f"stream=True does not go with {', '.join(searching)}")

        def pieces() -> Generator[str]:
            loop = self._loop(1)
            loop.submit(row)
            seen = 0
            while loop.busy:
                self.on_step()
                loop.turn()
                if len(row.text) > seen:
                    seen, fresh = len(row.text), row.text[seen:]
                    yield fresh
            self._check_ends([row])
            self.timings = Timings(self.timings.compress, loop.reading_seconds, loop.writing_seconds)

        return AnswerStream(pieces(), row)

    def _search(
        self, rows: Sequence[Row], batch_size: int, stops: Sequence[str], options: dict[str, Any]
    ) -> list[Answer]:
        """Answers by transformers' own `generate`, for beams and the like."""
        found: list[Answer] = []
        started = time.perf_counter()
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            try:
                configuration = GenerationConfig(
                    max_new_tokens=part[0].max_new_tokens,
                    eos_token_id=sorted(self.ends),
                    pad_token_id=self.tokenizer.pad_token_id,
                    **{"do_sample": False, **options},
                )
                with self.fast.applied():
                    prompts = [self._on_device(row.prompt) for row in part]
                    written = self.model.generate(prompts, generation_config=configuration).tolist()
            except (TypeError, ValueError, LookupError, ArithmeticError) as error:
                raise InputError(f"generation options: {' '.join(str(error).split())}") from error
            for tokens in written:
                end = next((n for n, token in enumerate(tokens) if token in self.ends), None)
                text = TextPieces(self.tokenizer, stops)
                whole = "".join([*map(text.add, tokens[:end]), text.finish()])
                ended = end is not None or text.stopped
                found.append(Answer(whole, "stop" if ended else "length", len(tokens[:end])))
        self.timings = Timings(self.timings.compress, decode=time.perf_counter() - started)
        return found

    def _on_device(self, pieces: Sequence[Piece]) -> list[Tensor]:
        return [piece.to(self.model.device) for piece in pieces]

    @torch.no_grad()
    def _embedded(self, prompts: Sequence[Sequence[Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
        return self.model.embed([self._on_device(pieces) for pieces in prompts])

    def check(self, memory: MemoryOrFile) -> None:
        """Raise MemoryMismatchError unless this model's compressor made the memory, and the decoder can read it.

        A memory from elsewhere may hold numbers that are finite, but not in the decoder's dtype, or not once a norm has
        squared them: nothing could be said from it.
        """
        memory = self._memory_of(memory)
        if memory.fingerprint != self.fingerprint:
            raise MemoryMismatchError(
                f"the memory was made by another compressor ({memory.fingerprint}) than this model's "
                f"({self.fingerprint}): compress the text anew with this model"
            )
        dtype = self.model.dtype
        if not bool(memory.soft_tokens.to(dtype).float().square().sum().isfinite()):
            raise MemoryMismatchError(
                f"the memory's values are too large for this model in {dtype}: compress the text anew"
            )

    def _check_length(self, pieces: Sequence[Tensor], new: int) -> None:
        limit = getattr(self.model.decoder.config, "max_position_embeddings", None)
        soft = sum(len(piece) for piece in pieces if piece.is_floating_point())
        text = sum(map(len, pieces)) - soft
        if limit is not None and soft + text + new > limit:
            raise ContextTooLongError(
                f"{soft} soft tokens + {text} prompt tokens + {new} new tokens exceed the decoder's {limit}: "
                "use a larger merge size, fewer documents, or fewer new tokens"
            )

    @property
    def ends(self) -> set[int]:
        """Tokens that end an answer."""
        return {self.template.end_id, self.tokenizer.eos_token_id} - {None}


def _answer(row: Row) -> Answer:
    assert row.finish is not None
    return Answer(row.text, row.finish, len(row.tokens))


def _check_unrefined(memories: Sequence[Memory]) -> None:
    if any(memory.refined for memory in memories):
        raise InputError(
            "a refined memory cannot be checked, since its soft tokens are no longer those that the compressor makes: "
            "restore it without a check"
        )


def _named(value: object) -> str:
    """What is said of a value of the wrong type."""
    if isinstance(value, Mapping):
        return f"a mapping ({type(value).__name__}): give its values as a list"
    if isinstance(value, set | frozenset):
        return f"a {type(value).__name__}, which has no order: give a list"
    if isinstance(value, os.PathLike):
        return f"a path ({os.fspath(value)}): read its text first (Path.read_text)"
    return "None" if value is None else type(value).__name__


def _listed(wanted: str, given: Any) -> list[Any]:
    """A list, tuple or other run of several as a list; what only looks like one is refused: `wanted`, not that."""
    alone = (str, bytes, bytearray, memoryview, Tensor, Memory, PrefixCache, os.PathLike, IOBase)
    if isinstance(given, (*alone, Mapping, set, frozenset)) or not isinstance(given, Iterable):
        raise InputError(f"{wanted}, got {_named(given)}")
    return list(given)


def _stops(stop: str | Sequence[str] | None) -> list[str]:
    wanted = "stop must be a text or a list of texts"
    stops = [] if stop is None else [stop] if isinstance(stop, str) else _listed(wanted, stop)
    if not all(check_text(text, "stop") for text in stops):
        raise InputError("stop must be one or more texts, none of them empty")
    return stops


def _chosen(options: Mapping[str, Any]) -> tuple[Sampling, dict[str, Any]]:
    """Options as our own sampling, or as what only transformers' `generate` can do; all others are refused."""
    given = {name: value for name, value in options.items() if value is not None}
    known = [*Sampling.names(), *SEARCHING]
    for name in given:
        if name not in known and (name in OBJECTS or name in GenerationConfig().to_dict()):
            raise InputError(f"{name} is not to be had here: call GMSA.model.generate for it")
    check_options(given, known)
    sampling = Sampling.of({name: value for name, value in given.items() if name in Sampling.names()})
    searching = [name for name in given if name in SEARCHING]
    if not searching:
        return sampling, {}
    beams = check_whole("num_beams", given.get("num_beams", 1), error=InputError)
    for name in searching:
        if name in DRAWING_ELSEWHERE and not sampling.do_sample:
            raise InputError(f"{name} says how tokens are drawn: give do_sample=True with it")
        if name in BEAMS_ALONE and beams == 1:
            raise InputError(f"{name} is about beams: give num_beams with it, 2 or more")
    for name in ("seed", "presence_penalty", "frequency_penalty"):
        if name in given:
            raise InputError(f"{name} does not go with {', '.join(searching)}")
    return sampling, given


def _key(contents: Contents) -> tuple[int, ...]:
    """The same for the same objects."""
    return (id(contents),) if isinstance(contents, PrefixCache) else tuple(map(id, contents))


def fast_dtype() -> torch.dtype:
    """bf16 on a GPU or a CPU with bf16 products (AVX512-BF16, AMX); else fp32, which is then the faster one."""
    if torch.cuda.is_available():
        return torch.bfloat16
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return torch.float32
    return torch.bfloat16 if "avx512_bf16" in flags or "amx_bf16" in flags else torch.float32
