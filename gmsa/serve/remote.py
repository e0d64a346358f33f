"""A decoder behind vLLM: prompts travel as prompt embeddings, token ids and text come back.

    RemoteDecoder     a server at one URL, started with `--enable-prompt-embeds`; by its chat route where that takes
                      memories (vLLM 0.32 does), so that the server's own prefix cache and template are used
    LocalDecoder      a `vllm.LLM` in this process

Both need a `GMSA` for what comes before the decoder; that of a compressor's folder will do. The decoder is the one that
`gmsa export decoder` writes from the same model. Several servers belong behind a router (docs/scale.md).

vLLM reads prompt embeddings with `torch.load(weights_only=True)`: the server trusts its clients as far as that goes.
Nothing that a server sends is ever unpickled here.
"""

import base64
import contextlib
import copy
import importlib
import io
import json
import os
import re
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor

from gmsa.api import GMSA, Content, PrefixCache
from gmsa.decode.prompt import SYSTEM, PromptTemplate, Turn
from gmsa.errors import ContextTooLongError, GmsaError, MemoryMismatchError, RemoteDecoderError
from gmsa.io.export import decoder_fingerprint
from gmsa.io.memory import Memory
from gmsa.model.entry import check_enters_at_input

try:
    import httpx
    from anyio.from_thread import start_blocking_portal
except ImportError as error:
    raise RemoteDecoderError("a decoder elsewhere needs httpx: pip install 'gmsa[remote]'") from error

T = TypeVar("T")
Finish = Literal["stop", "length"]
NAMED = re.compile(r"gmsa-([0-9a-f]{16})")  # a served model named after the compressor it belongs to
STREAM = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
PLACEHOLDER = "<prompt_embeds>"  # stands for them in vLLM, which refuses it in texts
LOOK_TIMEOUT = 60.0  # a busy server is slow to say what it has
# Shorter than servers keep idle connections, so that none is used that has just been closed.
LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2.0)


class PassingError(RemoteDecoderError):
    """The server cannot be reached or is in trouble; it may not be later."""


class RefusedError(RemoteDecoderError):
    """A request that is wrong itself; `reason` is what the server says of it."""

    reason = ""


@dataclass(frozen=True)
class RemotePiece:
    """What a server sends of an answer: new text, its token ids, tokens so far (0: not told), at the end why it ended.

    The token that ends an answer is counted and listed, but is no text.
    """

    text: str
    tokens: int = 0
    token_ids: tuple[int, ...] = ()
    finish: Finish | None = None


def encode_embeddings(embeds: Tensor) -> str:
    """(T, d) as vLLM's API takes it: base64 of what torch.save writes."""
    buffer = io.BytesIO()
    torch.save(embeds.detach().cpu().clone(), buffer)  # of a view, torch.save would write all it is a view of
    return base64.b64encode(buffer.getvalue()).decode("ascii")


class RemoteDecoder:
    """Answers from memories with a decoder on another machine. May be used from several threads.

    Args:
        gmsa: the model whose compressor makes the memories; a compressor alone will do.
        url: of the server, with or without /v1.
        model: its name there; None: gmsa-FINGERPRINT, or else the only one the server has.
        api_key: sent as a bearer token.
        timeout: seconds without any sign of life before an answer is given up.

    Raises (all methods):
        RemoteDecoderError: the server cannot be reached, or refuses; says what to do.
        MemoryMismatchError: the memory, or a served model named gmsa-FINGERPRINT, belongs to another compressor.
        ContextTooLongError: more than the server was started for.
    """

    def __init__(
        self, gmsa: GMSA, url: str, model: str | None = None, api_key: str | None = None, *, timeout: float = 600.0
    ) -> None:
        check_enters_at_input(gmsa.config)
        self.gmsa = gmsa
        # A tokenizer of its own: others use the model's meanwhile, and each call sets how special tokens are read. Of
        # these calls there is one at a time, or a user's text could be read as a template's mark.
        self._words = threading.RLock()
        self.template = PromptTemplate(copy.deepcopy(gmsa.tokenizer), gmsa.config)
        self.url = base_url(url)
        self._wanted = model
        self.served: tuple[str, int | None] | None = None  # once it has been asked
        self.chats: bool | None = None  # likewise: whether chat messages may hold memories, and read as they do here
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
        self._client = httpx.AsyncClient(headers=headers, timeout=httpx.Timeout(timeout, connect=5.0), limits=LIMITS)
        self._thread = contextlib.ExitStack()
        # An event loop of its own in a thread: requests of many threads, any of which can be given up at once.
        self.portal = self._thread.enter_context(start_blocking_portal())

    def close(self) -> None:
        """Close the connections; what is under way is given up."""
        with contextlib.suppress(RuntimeError):  # closed before
            self.portal.call(self._client.aclose)
            self.portal.call(self.portal.stop, True)
        self._thread.close()

    def __enter__(self) -> "RemoteDecoder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait_for(self, work: Callable[..., Awaitable[T]], *arguments: Any) -> T:
        """Do something in the thread; it is given up where the wait for it is."""
        future = self.portal.start_task_soon(work, *arguments)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    # -- the server ------------------------------------------------------------------------------------------------

    @property
    def model(self) -> str:
        """The model's name on the server; asks the server once."""
        return self._model()[0]

    @property
    def max_length(self) -> int | None:
        """How many positions the server reads and writes per request, if it says so; asks the server once."""
        return self._model()[1]

    def _model(self) -> tuple[str, int | None]:
        return self.served or self.wait_for(self.look)

    async def look(self, trial: bool = False) -> tuple[str, int | None]:
        """The model's name and length, if the server has it; in a trial it must also write a token.

        Raises:
            PassingError: it cannot be reached now. GmsaError: it is of no use.
        """
        with talking(self.url):
            listed = await self._ask("GET", "models", timeout=LOOK_TIMEOUT)
            self.served = choose_model(listed, self._wanted, self.gmsa.fingerprint, self.url)
            if trial:
                content = self.request(self.gmsa.model.get_input_embeddings().weight[:4], 1, {})
                answer = await self._ask("POST", "completions", content=content, timeout=LOOK_TIMEOUT)
                if not piece_of(answer).token_ids:
                    raise RemoteDecoderError(f"the decoder at {self.url} tells no token ids: use a newer vLLM")
            if trial or self.chats is None:
                self.chats = await self._takes_chats()
        return self.served

    async def _takes_chats(self) -> bool:
        """Whether a chat with a memory is read position for position as the model's own template has it."""
        if self.gmsa.config.prompt != "chat":
            return False
        table = self.gmsa.model.get_input_embeddings().weight[:4]
        turn = Turn("user", [table, "a"])
        body = {"messages": self.chat_messages([turn]), "max_tokens": 1, "temperature": 0}
        content = self.chat_request(body)
        response = await self._client.post(f"{self.url}/v1/chat/completions", content=content, timeout=LOOK_TIMEOUT)
        if response.status_code in (429, 503):
            check_response(response, self.url)
        if not response.is_success:
            return False
        with self._words:
            expected = sum(map(len, self.template.chat([turn])))
        return bool(response.json()["usage"]["prompt_tokens"] == expected)

    async def _ask(self, method: str, path: str, **options: Any) -> Any:
        response = await self._client.request(method, f"{self.url}/v1/{path}", **options)
        check_response(response, self.url)
        return response.json()

    # -- answers ---------------------------------------------------------------------------------------------------

    @overload
    def answer(
        self, question: str, memories: Content | Sequence[Content], *, stream: Literal[True], **options: Any
    ) -> Iterator[str]: ...
    @overload
    def answer(
        self, question: str, memories: Content | Sequence[Content], *, stream: Literal[False] = ..., **options: Any
    ) -> str: ...

    def answer(
        self,
        question: str,
        memories: Content | Sequence[Content],
        *,
        max_new_tokens: int = 128,
        stream: bool = False,
        **sampling: Any,
    ) -> str | Iterator[str]:
        """Answer a question from memories and texts, as `GMSA.answer` does.

        Args:
            question: one.
            memories: what to answer from.
            max_new_tokens: longest answer.
            stream: yield the answer piece by piece; dropping the iterator ends the request.
            sampling: fields of the server's completions API (temperature, top_p, seed, stop, ...); greedy by default.
        """
        if not stream:
            return self.ask(question, memories, max_new_tokens=max_new_tokens, **sampling).text
        pieces = self._streamed(*self._question(question, memories, max_new_tokens, sampling | STREAM))

        def texts() -> Iterator[str]:
            with contextlib.closing(pieces):
                yield from (piece.text for piece in pieces if piece.text)

        return texts()

    def ask(
        self, question: str, memories: Content | Sequence[Content], *, max_new_tokens: int = 128, **sampling: Any
    ) -> RemotePiece:
        """The whole answer to a question, with its token ids; arguments as for `answer`."""
        return self._whole(*self._question(question, memories, max_new_tokens, sampling))

    def _question(
        self, question: str, memories: Content | Sequence[Content], max_new_tokens: int, sampling: dict[str, Any]
    ) -> tuple[bytes, str]:
        """The request that asks a question, and the route it goes to."""
        contents: Any = [memories] if isinstance(memories, Memory | Tensor | os.PathLike) else memories
        if not isinstance(contents, str | PrefixCache):  # which are refused
            contents = [Memory.load(one) if isinstance(one, os.PathLike) else one for one in contents]
        with self._words:
            embeds = self.gmsa.prompt_embeddings(question, contents)
        self._check_room(len(embeds), max_new_tokens)  # the server has been asked now what it takes
        if not self.chats:
            return self.request(embeds, max_new_tokens, sampling), "completions"
        messages = self.chat_messages([Turn("user", [*contents, question])])
        fields = {"messages": messages, "max_tokens": max_new_tokens, "return_token_ids": True}
        return self.chat_request({**fields, **sampling}), "chat/completions"

    def complete(self, embeds: Tensor, *, max_new_tokens: int, **sampling: Any) -> RemotePiece:
        """The whole answer to a prompt (T, d), with its token ids where the server tells them (vLLM does)."""
        return self._whole(self.request(embeds, max_new_tokens, sampling), "completions")

    def _whole(self, content: bytes, route: str) -> RemotePiece:
        async def ask() -> RemotePiece:
            with talking(self.url):
                return piece_of(await self._ask("POST", route, content=content))

        return self.wait_for(ask)

    def stream(self, embeds: Tensor, *, max_new_tokens: int, **sampling: Any) -> Generator[RemotePiece]:
        """The answer to a prompt (T, d) as it is written; the last piece says why it ended.

        The request is sent with the first `next`; closing the iterator ends it.
        """
        return self._streamed(self.request(embeds, max_new_tokens, sampling | STREAM), "completions")

    def _streamed(self, content: bytes, route: str) -> Generator[RemotePiece]:
        def pieces() -> Generator[RemotePiece]:
            coming = self.pieces(content, route)
            try:
                while True:
                    yield self.wait_for(coming.__anext__)
            except StopAsyncIteration:
                return
            finally:
                with contextlib.suppress(RuntimeError):  # closed before
                    self.wait_for(coming.aclose)

        return pieces()

    async def pieces(self, content: bytes, route: str = "completions") -> AsyncGenerator[RemotePiece]:
        """The pieces of a streaming answer to a request; closing the generator ends it."""
        with talking(self.url):
            async with contextlib.aclosing(self.events(content, route)) as events:
                async for event in events:
                    if event.get("choices"):
                        yield piece_of(event)

    async def events(self, content: bytes, route: str) -> AsyncGenerator[dict[str, Any]]:
        """What the server sends of a streaming answer, as it sends it; closing the generator ends it."""
        ended = False
        with talking(self.url):
            async with self._client.stream("POST", f"{self.url}/v1/{route}", content=content) as response:
                if response.is_error:
                    await response.aread()
                check_response(response, self.url)
                rest = b""
                async for part in response.aiter_bytes():
                    # At line feeds alone: text in an event may hold other marks that end lines for Python.
                    *lines, rest = (rest + part).split(b"\n")
                    for event in filter(None, map(read_line, lines)):
                        ended = ended or any(choice.get("finish_reason") for choice in event.get("choices") or ())
                        yield event
        if not ended:
            raise RemoteDecoderError(f"the decoder at {self.url} broke off in the middle of an answer: ask again")

    async def chat_events(self, content: bytes, stream: bool) -> AsyncGenerator[dict[str, Any]]:
        """What the chat route sends, whole or as it is written."""
        if not stream:
            with talking(self.url):
                yield await self._ask("POST", "chat/completions", content=content)
            return
        async with contextlib.aclosing(self.events(content, "chat/completions")) as events:
            async for event in events:
                yield event

    def chat_messages(self, turns: Sequence[Turn]) -> list[dict[str, Any]]:
        """Turns as vLLM's chat route takes them, the model's own system prompt before them."""
        with self._words:
            said = [{"role": t.role, "content": chat_content(self.gmsa, self.template, t.parts)} for t in turns]
        return [*self.system_messages(turns[0].role), *said]

    def system_messages(self, first_role: str) -> list[dict[str, Any]]:
        """The model's own system prompt, if a chat that begins with this role gets it."""
        prompt = self.gmsa.config.system_prompt
        return [] if prompt is None or first_role in SYSTEM else [{"role": "system", "content": prompt}]

    def chat_request(self, fields: dict[str, Any]) -> bytes:
        """A request to the chat route; greedy but for what the fields say."""
        assert self.served is not None
        fixed = {"model": self.served[0], "temperature": 0, "stop_token_ids": sorted(self.gmsa.ends)}
        return json.dumps({**fixed, **fields}).encode()

    def _check_room(self, prompt: int, max_new_tokens: int) -> None:
        limit = self.max_length
        if limit is not None and prompt + max_new_tokens > limit:
            raise ContextTooLongError(
                f"{prompt} prompt positions + {max_new_tokens} new tokens exceed the {limit} that the decoder at "
                f"{self.url} was started for: use a larger merge size, fewer documents, or fewer new tokens"
            )

    def request(self, embeds: Tensor, max_new_tokens: int, sampling: dict[str, Any]) -> bytes:
        """A request for the answer to a prompt (T, d); greedy but for what `sampling` says."""
        self._check_room(len(embeds), max_new_tokens)
        name = self.model
        body = {"model": name, "prompt_embeds": encode_embeddings(embeds), "max_tokens": max_new_tokens}
        fixed = {"temperature": 0, "stop_token_ids": sorted(self.gmsa.ends), "return_token_ids": True}
        return json.dumps({**body, **fixed, **sampling}).encode()


def chat_content(
    gmsa: GMSA, template: PromptTemplate, parts: Sequence[str | Memory | Tensor]
) -> str | list[dict[str, Any]]:
    """The parts of a turn as content of a chat message; memories that follow one another are one.

    The template is this thread's own: its tokenizer must not be used elsewhere meanwhile.
    vLLM would read what spells a special token in a user's text as one: such a text goes as embeddings of its tokens.
    """
    if len(parts) == 1 and isinstance(parts[0], str) and not spells_special(template, parts[0]):
        return parts[0]
    content: list[dict[str, Any]] = []
    soft: list[Tensor] = []

    def flush() -> None:
        if soft:
            (embeds,), _ = gmsa.model.embed([soft])
            content.append({"type": "prompt_embeds", "data": encode_embeddings(embeds)})
            soft.clear()

    for part in parts:
        if not isinstance(part, str):
            soft.append(part.soft_tokens if isinstance(part, Memory) else part)
            continue
        flush()
        if spells_special(template, part):
            soft.append(torch.tensor(template.encode(part)))
            flush()
        else:
            content.append({"type": "text", "text": part})
    flush()
    return content


def spells_special(template: PromptTemplate, text: str) -> bool:
    """Whether vLLM would read a special token, or a memory's place, in a text."""
    if PLACEHOLDER in text:
        return True
    marked = template.tokenizer(text, add_special_tokens=False)["input_ids"]
    return list(marked) != template.encode(text)


# -- what a server says ------------------------------------------------------------------------------------------------


def base_url(url: str) -> str:
    """A server's address without /v1.

    Raises:
        RemoteDecoderError: it is none, or more than one.
    """
    if "," in url:
        raise RemoteDecoderError(f"a decoder has one address, got {url!r}: put a router before several (docs/scale.md)")
    if not url.startswith(("http://", "https://")):
        raise RemoteDecoderError(f"the decoder's address must begin with http:// or https://, got {url!r}")
    return url.rstrip("/").removesuffix("/v1")


def choose_model(listed: Any, wanted: str | None, fingerprint: str, url: str) -> tuple[str, int | None]:
    """Of what /v1/models answered, the name to ask for and how many positions it was started for, if that is said.

    Raises:
        RemoteDecoderError: there is no such model. MemoryMismatchError: it belongs to another compressor.
    """
    served = {str(model["id"]): model.get("max_model_len") for model in listed["data"]}
    own = f"gmsa-{fingerprint}"
    name = wanted or (own if own in served else next(iter(served)) if len(served) == 1 else None)
    if name is None:
        raise RemoteDecoderError(f"{url} serves several models; name one of {', '.join(sorted(served))}")
    if name not in served:
        raise RemoteDecoderError(f"{url} serves no model {name!r}; it has {', '.join(sorted(served))}")
    named = NAMED.fullmatch(name)
    if named and named[1] != fingerprint:
        whose = f"{url} serves the decoder of compressor {named[1]}, this model's is {fingerprint}"
        raise MemoryMismatchError(f"{whose}: export both from one model")
    return name, served[name]


@contextlib.contextmanager
def talking(url: str) -> Iterator[None]:
    """Turn what goes wrong on the way into a RemoteDecoderError."""
    try:
        yield
    except GmsaError:
        raise
    except httpx.TimeoutException as error:
        raise PassingError(f"the decoder at {url} did not answer in time") from error
    except httpx.ConnectError as error:
        advice = "start `vllm serve DIR --enable-prompt-embeds`"
        raise PassingError(f"cannot reach the decoder at {url} ({error}): {advice}") from error
    except httpx.TransportError as error:
        raise PassingError(f"the connection to the decoder at {url} failed: {error}") from error
    except (httpx.InvalidURL, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise RemoteDecoderError(f"{url} answers unlike an OpenAI-compatible server ({error})") from error


def check_response(response: httpx.Response, url: str) -> None:
    """Raise RemoteDecoderError if a response, which has been read, is an error."""
    if response.is_success:
        return
    try:
        reason = reason_of(response.json())
    except ValueError:
        reason = " ".join(response.text.split())[:300]
    status = response.status_code
    if status in (401, 403):
        reason = f"it refuses the API key ({reason})" if reason else "it refuses the API key"
    elif "enable-prompt-embeds" in reason:
        reason = "it was started without --enable-prompt-embeds"
    elif "missing field `prompt`" in reason:
        reason = "it is a router that knows no prompt embeddings: put nginx in its place (docs/scale.md)"
    passing = status == 429 or status >= 500
    kind = PassingError if passing else RefusedError if status in (400, 413, 422) else RemoteDecoderError
    error = kind(f"the decoder at {url} answers {status}: {reason}")
    if isinstance(error, RefusedError):
        error.reason = reason
    raise error


def read_line(line: bytes) -> dict[str, Any] | None:
    """The event in a line of a stream, if there is one; raises RemoteDecoderError if the server gave up."""
    if not line.startswith(b"data:") or (data := line[5:].strip()) == b"[DONE]":
        return None
    event: dict[str, Any] = json.loads(data)
    if "error" in event:
        raise RemoteDecoderError(f"the decoder gave up: {reason_of(event)}")
    return event


def piece_of(event: dict[str, Any]) -> RemotePiece:
    """An answer, or a piece of one; raises RemoteDecoderError if the server gave up."""
    choice = event["choices"][0]
    tokens = (event.get("usage") or {}).get("completion_tokens") or 0
    said = choice.get("delta") or choice.get("message") or {}  # of the chat route
    text = choice["text"] if "text" in choice else said.get("content") or ""
    return RemotePiece(text, tokens, tuple(choice.get("token_ids") or ()), finish_of(choice.get("finish_reason")))


def finish_of(reason: str | None) -> Finish | None:
    """Why an answer ended, if it has; raises RemoteDecoderError if the server gave up."""
    if reason in ("abort", "error"):
        raise RemoteDecoderError(f"the decoder gave an answer up ({reason}): ask again")
    return None if reason is None else "length" if reason == "length" else "stop"


def reason_of(body: Any) -> str:
    """What an error in OpenAI's form says, or in one of the older forms."""
    error = body.get("error", body) if isinstance(body, dict) else body
    message = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(message).split())[:300]


class LocalDecoder:
    """Answers from memories with vLLM in this process: many questions at once, without a server.

    Args:
        gmsa: the model whose compressor makes the memories; a compressor alone will do.
        folder: of the decoder, written by `gmsa export decoder`.
        options: of `vllm.LLM` (dtype, tensor_parallel_size, max_model_len, ...).

    Raises:
        RemoteDecoderError: vLLM is not installed.
        MemoryMismatchError: the folder holds the decoder of another compressor.
    """

    def __init__(self, gmsa: GMSA, folder: str | Path, **options: Any) -> None:
        check_enters_at_input(gmsa.config)
        belongs = decoder_fingerprint(Path(folder))
        if belongs is not None and belongs != gmsa.fingerprint:
            whose = f"{folder} holds the decoder of compressor {belongs}, this model's is {gmsa.fingerprint}"
            raise MemoryMismatchError(f"{whose}: export both from one model")
        try:
            self.vllm = importlib.import_module("vllm")
        except ImportError as error:
            raise RemoteDecoderError(f"vLLM is not installed here ({error}): pip install vllm") from error
        self.gmsa = gmsa
        self.llm = self.vllm.LLM(str(folder), enable_prompt_embeds=True, **options)

    def answer(
        self,
        questions: Sequence[str],
        memories: Sequence[Content | Sequence[Content]],
        *,
        max_new_tokens: int = 128,
        **sampling: Any,
    ) -> list[str]:
        """Answer each question from its own memories; greedy but for fields of `vllm.SamplingParams` given."""
        prompts = [self.gmsa.prompt_embeddings(q, m) for q, m in zip(questions, memories, strict=True)]
        return [piece.text for piece in self.complete(prompts, max_new_tokens=max_new_tokens, **sampling)]

    def complete(self, prompts: Sequence[Tensor], *, max_new_tokens: int, **sampling: Any) -> list[RemotePiece]:
        """The whole answer to each prompt (T_i, d), with its token ids."""
        fixed = {"temperature": 0.0, "max_tokens": max_new_tokens, "stop_token_ids": sorted(self.gmsa.ends)}
        requests = [{"prompt_embeds": embeds.cpu()} for embeds in prompts]
        answers = self.llm.generate(requests, self.vllm.SamplingParams(**(fixed | sampling)), use_tqdm=False)
        found = [answer.outputs[0] for answer in answers]
        return [RemotePiece(o.text, len(o.token_ids), tuple(o.token_ids), finish_of(o.finish_reason)) for o in found]
