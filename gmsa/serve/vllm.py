"""A decoder behind vLLM: soft tokens and prompt travel as prompt embeddings, text comes back.

    RemoteDecoder   an OpenAI-compatible server started with `--enable-prompt-embeds`
    LocalDecoder    a `vllm.LLM` in this process

Both need a `GMSA` for everything before the decoder (compressing, the chat template, embedding the prompt); that of a
compressor's folder will do. The decoder is the one `gmsa export decoder` writes from the same model.

vLLM reads prompt embeddings with `torch.load(weights_only=True)`: the server trusts its clients as far as that goes.
Nothing that a server sends is ever unpickled here.
"""

import base64
import io
import json
import re
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from gmsa.errors import ContextTooLongError, GmsaError, InputError, MemoryMismatchError, RemoteDecoderError
from gmsa.io.memory import Memory

try:
    import httpx
except ImportError as error:
    raise RemoteDecoderError("a decoder elsewhere needs httpx: pip install 'gmsa[remote]'") from error

if TYPE_CHECKING:
    from gmsa.api import GMSA

NAMED = re.compile(r"gmsa-([0-9a-f]{16})")  # a served model named after the compressor it belongs to
Finish = Literal["stop", "length"]
STREAM = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}


@dataclass(frozen=True)
class RemotePiece:
    """What a server sends of an answer: new text, its token ids, tokens so far (0: not told), at the end why it ended.

    The token that ends an answer is counted and listed, but is no text.
    """

    text: str
    tokens: int = 0
    token_ids: tuple[int, ...] = ()
    finish: Finish | None = None


def prompt_embeddings(gmsa: "GMSA", question: str, memories: Memory | Sequence[Memory]) -> Tensor:
    """What the decoder reads: [chat template][soft tokens][question][chat template] as (T, d), in the model's dtype.

    Raises:
        InputError: an empty question, or no memory.
        MemoryMismatchError: a memory of another compressor.
    """
    group = [memories] if isinstance(memories, Memory) else list(memories)
    if not group:
        raise InputError("there is no memory to answer from")
    for memory in group:
        gmsa.check(memory)
    device = gmsa.model.device
    pieces = gmsa.template(question).around(*(memory.soft_tokens for memory in group))
    with torch.no_grad():
        (embeds,), _ = gmsa.model.embed([[piece.to(device) for piece in pieces]])
    return embeds


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
        self, gmsa: "GMSA", url: str, model: str | None = None, api_key: str | None = None, *, timeout: float = 600.0
    ) -> None:
        self.gmsa = gmsa
        self.url = base_url(url)
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx.Client(headers=headers, timeout=httpx.Timeout(timeout, connect=10.0))
        self._wanted = model
        self._served: tuple[str, int | None] | None = None

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def __enter__(self) -> "RemoteDecoder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the server ------------------------------------------------------------------------------------------------

    @property
    def model(self) -> str:
        """The model's name on the server; asks the server once."""
        return self._model()[0]

    @property
    def max_length(self) -> int | None:
        """How many positions the server reads and writes per request, if it says so."""
        return self._model()[1]

    def _model(self) -> tuple[str, int | None]:
        if self._served is None:
            with talking(self.url):
                response = self._client.get(f"{self.url}/v1/models")
                check_response(response, self.url)
                self._served = choose_model(response.json(), self._wanted, self.gmsa.fingerprint, self.url)
        return self._served

    # -- answers ---------------------------------------------------------------------------------------------------

    @overload
    def answer(
        self,
        question: str,
        memories: Memory | Sequence[Memory],
        *,
        max_new_tokens: int = ...,
        stream: Literal[False] = ...,
        **sampling: Any,
    ) -> str: ...
    @overload
    def answer(
        self,
        question: str,
        memories: Memory | Sequence[Memory],
        *,
        max_new_tokens: int = ...,
        stream: Literal[True],
        **sampling: Any,
    ) -> Iterator[str]: ...

    def answer(
        self,
        question: str,
        memories: Memory | Sequence[Memory],
        *,
        max_new_tokens: int = 128,
        stream: bool = False,
        **sampling: Any,
    ) -> str | Iterator[str]:
        """Answer a question from one memory or several, as `GMSA.answer` does.

        Args:
            question: one.
            memories: what to answer from.
            max_new_tokens: longest answer.
            stream: yield the answer piece by piece; dropping the iterator ends the request.
            sampling: fields of the server's completions API (temperature, top_p, seed, stop, ...); greedy by default.
        """
        embeds = prompt_embeddings(self.gmsa, question, memories)
        if stream:
            return _texts(self.stream(embeds, max_new_tokens=max_new_tokens, **sampling))
        return self.complete(embeds, max_new_tokens=max_new_tokens, **sampling).text

    def complete(self, embeds: Tensor, *, max_new_tokens: int, **sampling: Any) -> RemotePiece:
        """The whole answer to a prompt (T, d), with its token ids where the server tells them (vLLM does)."""
        body = self._body(embeds, max_new_tokens, sampling)
        with talking(self.url):
            response = self._client.post(f"{self.url}/v1/completions", json=body)
            check_response(response, self.url)
            return _piece(response.json())

    def stream(self, embeds: Tensor, *, max_new_tokens: int, **sampling: Any) -> Generator[RemotePiece]:
        """The answer to a prompt (T, d) as it is written; the last piece says why it ended.

        The request is sent with the first `next`; closing the iterator ends it.
        """
        body = self._body(embeds, max_new_tokens, sampling)
        return self._pieces(body | STREAM)

    def _pieces(self, body: dict[str, Any]) -> Generator[RemotePiece]:
        finished = False
        with talking(self.url), self._client.stream("POST", f"{self.url}/v1/completions", json=body) as response:
            if response.is_error:
                response.read()
            check_response(response, self.url)
            lines = Lines()
            for content in response.iter_bytes():
                for line in lines.add(content):
                    piece = read_line(line, self.url)
                    if piece is not None:
                        finished = finished or piece.finish is not None
                        yield piece
        if not finished:
            raise broke_off(self.url)

    def _body(self, embeds: Tensor, max_new_tokens: int, sampling: dict[str, Any]) -> dict[str, Any]:
        name, limit = self._model()
        if limit is not None and len(embeds) + max_new_tokens > limit:
            raise ContextTooLongError(
                f"{len(embeds)} prompt positions + {max_new_tokens} new tokens exceed the {limit} that the decoder at "
                f"{self.url} was started for: use a larger merge size, fewer documents, or fewer new tokens"
            )
        return completion_body(name, embeds, max_new_tokens, self.gmsa.ends, sampling)


# -- what is said, for clients of any kind -----------------------------------------------------------------------------


def base_url(url: str) -> str:
    """A server's address without /v1.

    Raises:
        RemoteDecoderError: it is none.
    """
    if not url.startswith(("http://", "https://")):
        raise RemoteDecoderError(f"the decoder's address must begin with http:// or https://, got {url!r}")
    return url.rstrip("/").removesuffix("/v1")


def choose_model(listed: Any, wanted: str | None, fingerprint: str, url: str) -> tuple[str, int | None]:
    """The name to ask for, and how many positions its server was started for, if it says so.

    Args:
        listed: what /v1/models answered.
        wanted: a name; None: gmsa-FINGERPRINT where it is served, else the only one there is.
        fingerprint: of the compressor.
        url: of the server, for messages.

    Raises:
        RemoteDecoderError: there is no such model. MemoryMismatchError: it belongs to another compressor.
    """
    served = {str(m["id"]): m.get("max_model_len") for m in listed["data"]}
    own = f"gmsa-{fingerprint}"
    name = wanted or (own if own in served else next(iter(served)) if len(served) == 1 else None)
    if name is None:
        raise RemoteDecoderError(f"{url} serves several models; name one of {', '.join(sorted(served))}")
    if name not in served:
        raise RemoteDecoderError(f"{url} serves no model {name!r}; it has {', '.join(sorted(served))}")
    named = NAMED.fullmatch(name)
    if named and named[1] != fingerprint:
        raise MemoryMismatchError(
            f"{url} serves the decoder of compressor {named[1]}, this model's is {fingerprint}: export both from one "
            "model"
        )
    return name, served[name]


def completion_body(
    name: str, embeds: Tensor, max_new_tokens: int, ends: Collection[int], sampling: dict[str, Any]
) -> dict[str, Any]:
    """A request for the answer to a prompt (T, d); greedy but for what `sampling` says."""
    return {
        "model": name,
        "prompt_embeds": encode_embeddings(embeds),
        "max_tokens": max_new_tokens,
        "temperature": 0,
        "stop_token_ids": sorted(ends),
        "return_token_ids": True,
        **sampling,
    }


@contextmanager
def talking(url: str) -> Iterator[None]:
    """Turn what goes wrong on the way into a RemoteDecoderError."""
    try:
        yield
    except GmsaError:
        raise
    except httpx.TimeoutException as error:
        raise RemoteDecoderError(f"the decoder at {url} did not answer in time") from error
    except httpx.ConnectError as error:
        raise RemoteDecoderError(
            f"cannot reach the decoder at {url} ({error}): start `vllm serve DIR --enable-prompt-embeds`"
        ) from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise RemoteDecoderError(f"the connection to the decoder at {url} failed: {error}") from error
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise RemoteDecoderError(f"{url} answers unlike an OpenAI-compatible server ({error})") from error


def check_response(response: httpx.Response, url: str) -> None:
    """Raise RemoteDecoderError if a response, which has been read, is an error."""
    if response.is_success:
        return
    try:
        reason = _reason(response.json())
    except ValueError:
        reason = " ".join(response.text.split())[:300]
    if response.status_code in (401, 403):
        reason = f"it refuses the API key ({reason})" if reason else "it refuses the API key"
    elif "enable-prompt-embeds" in reason:
        reason = "it was started without --enable-prompt-embeds"
    raise RemoteDecoderError(f"the decoder at {url} answers {response.status_code}: {reason}")


class Lines:
    """Cuts a stream into lines at line feeds alone: text in an event may hold other marks that end lines for Python."""

    def __init__(self) -> None:
        self._rest = b""

    def add(self, content: bytes) -> list[bytes]:
        """The lines that are whole now."""
        *lines, self._rest = (self._rest + content).split(b"\n")
        return lines


def read_line(line: bytes, url: str) -> RemotePiece | None:
    """What a line of a stream says of the answer, if anything.

    Raises:
        RemoteDecoderError: the server gave up.
    """
    if not line.startswith(b"data:") or (data := line[5:].strip()) == b"[DONE]":
        return None
    event = json.loads(data)
    if "error" in event:
        raise RemoteDecoderError(f"the decoder at {url} gave up: {_reason(event)}")
    return _piece(event) if event.get("choices") else None


def broke_off(url: str) -> RemoteDecoderError:
    """A stream ended before its answer did."""
    return RemoteDecoderError(f"the decoder at {url} broke off in the middle of an answer: ask again")


def _texts(pieces: Generator[RemotePiece]) -> Iterator[str]:
    with closing(pieces):
        for piece in pieces:
            if piece.text:
                yield piece.text


def _piece(event: dict[str, Any]) -> RemotePiece:
    choice = event["choices"][0]
    reason = choice.get("finish_reason")
    tokens = (event.get("usage") or {}).get("completion_tokens") or 0
    ids = tuple(choice.get("token_ids") or ())
    return RemotePiece(choice["text"], tokens, ids, _finish(reason) if reason else None)


def _finish(reason: str) -> Finish:
    if reason in ("abort", "error"):
        raise RemoteDecoderError(f"the decoder gave an answer up ({reason}): ask again")
    return "length" if reason == "length" else "stop"


def _reason(body: Any) -> str:
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

    def __init__(self, gmsa: "GMSA", folder: str | Path, **options: Any) -> None:
        from gmsa.io.export import decoder_fingerprint

        belongs = decoder_fingerprint(Path(folder))
        if belongs is not None and belongs != gmsa.fingerprint:
            raise MemoryMismatchError(
                f"{folder} holds the decoder of compressor {belongs}, this model's is {gmsa.fingerprint}: "
                "export both from one model"
            )
        try:
            from vllm import LLM
        except ImportError as error:
            raise RemoteDecoderError(f"vLLM is not installed here ({error}): pip install vllm") from error
        self.gmsa = gmsa
        self.llm = LLM(str(folder), enable_prompt_embeds=True, **options)

    def answer(
        self,
        questions: Sequence[str],
        memories: Sequence[Memory | Sequence[Memory]],
        *,
        max_new_tokens: int = 128,
        **sampling: Any,
    ) -> list[str]:
        """Answer each question from its own memories; greedy but for fields of `vllm.SamplingParams` given."""
        prompts = [prompt_embeddings(self.gmsa, q, m) for q, m in zip(questions, memories, strict=True)]
        return [out.text for out in self.complete(prompts, max_new_tokens=max_new_tokens, **sampling)]

    def complete(self, prompts: Sequence[Tensor], *, max_new_tokens: int, **sampling: Any) -> list[RemotePiece]:
        """The whole answer to each prompt (T_i, d), with its token ids."""
        from vllm import SamplingParams

        options = {
            "temperature": 0.0,
            "max_tokens": max_new_tokens,
            "stop_token_ids": sorted(self.gmsa.ends),
            **sampling,
        }
        requests = [{"prompt_embeds": embeds.cpu()} for embeds in prompts]
        outputs = [out.outputs[0] for out in self.llm.generate(requests, SamplingParams(**options), use_tqdm=False)]
        return [RemotePiece(o.text, len(o.token_ids), tuple(o.token_ids), _finish(o.finish_reason)) for o in outputs]
