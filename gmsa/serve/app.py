"""The routes: OpenAI's for models, chats and completions; GMSA's for memories; health, metrics and the page."""

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from importlib import resources
from itertools import groupby
from typing import Any, Literal, TypeVar

from fastapi import FastAPI, Path, Query, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.types import Receive, Scope, Send

from gmsa import __version__
from gmsa.decode.checked import CheckedPiece
from gmsa.serve.errors import ApiError, ClientGoneError, body_of, handle_errors, translate
from gmsa.serve.guard import Guard
from gmsa.serve.schemas import (
    AnswerMessage,
    ChatChoice,
    ChatRequest,
    ChatResponse,
    CompletionChoice,
    CompletionRequest,
    CompletionResponse,
    DeletedMemory,
    ErrorResponse,
    Generation,
    Health,
    MadeMemory,
    MemoryId,
    MemoryList,
    MemoryObject,
    MemoryRequest,
    ModelList,
    ModelObject,
    PromptDetails,
    RestoredMemory,
    RestoreRequest,
    Usage,
)
from gmsa.serve.service import Job, ReadyPrompt, Service
from gmsa.store import MemoryStore, StoredMemory

T = TypeVar("T")
WEB = resources.files("gmsa.serve") / "web"
PAGE = {
    "/": ("index.html", "text/html"),
    "/docs": ("docs.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/docs.js": ("docs.js", "text/javascript"),
    "/sample.txt": ("sample.txt", "text/plain"),
    "/favicon.svg": ("favicon.svg", "image/svg+xml"),
}
ERRORS = {
    400: "in good shape, but cannot be served",
    401: "no API key, or a wrong one",
    404: "no such model or memory",
    413: "the request or its text is too large",
    422: "not in the shape described here",
    429: "too many requests are waiting",
    503: "stopping, or the answer was given up",
}
EVENT = {"type": "object", "properties": {"data": {"type": "string", "description": "JSON, at last [DONE]"}}}
EVENTS = {"text/event-stream": {"schema": {**EVENT, "required": ["data"]}}}


def documented(*statuses: int, stream: bool = False) -> dict[int | str, dict[str, Any]]:
    """The errors a route may answer, for its description; and that it can stream."""
    found: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorResponse, "description": ERRORS[status]} for status in (401, 413, *statuses)
    }
    return {**found, 200: {"content": EVENTS}} if stream else found


def create_app(service: Service, hosts: frozenset[str] = frozenset()) -> FastAPI:
    """The app over a service, which it starts and stops.

    Args:
        service: the model and its memories.
        hosts: names by which the server is known besides localhost and addresses; only looked at without an API key.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.stop)

    app = FastAPI(
        title="GMSA",
        version=__version__,
        summary="OpenAI-compatible answers from compressed contexts",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        generate_unique_id_function=lambda route: route.name,
    )
    handle_errors(app)
    _add_answer_routes(app, service)
    _add_memory_routes(app, service)
    _add_restoration(app, service)
    _add_system_routes(app, service)
    app.add_middleware(Guard, settings=service.settings, metrics=service.metrics, hosts=hosts)
    if service.settings.api_key is not None:
        _describe_key(app)
    return app


# -- models, health, metrics, page -------------------------------------------------------------------------------------


def _add_system_routes(app: FastAPI, service: Service) -> None:
    settings = service.settings

    @app.get("/health", responses={503: {"model": Health}}, tags=["system"])
    async def health() -> Response:
        """Whether the server answers questions; needs no key."""
        scheduler = service.scheduler
        status: Literal["ok", "draining", "failed", "no_decoder"]
        if service.draining:
            status = "draining"
        elif not scheduler.alive:
            status = "failed"
        else:
            status = "ok" if scheduler.ready else "no_decoder"
        return JSONResponse(Health(status=status).model_dump(), 200 if status == "ok" else 503)

    as_text = {"content": {"text/plain": {"schema": {"type": "string"}}}}

    @app.get("/metrics", response_class=Response, responses={**documented(), 200: as_text}, tags=["system"])
    async def metrics() -> Response:
        """Counters in Prometheus's text format."""
        return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    def described(name: str) -> ModelObject:
        return ModelObject(
            id=name,
            created=service.created,
            fingerprint=service.gmsa.fingerprint,
            merge_size=settings.merge_size,
            auto_compress=settings.auto_compress,
            max_prompt_tokens=service.max_prompt_tokens,
            max_context_tokens=settings.max_context_tokens,
        )

    @app.get("/v1/models", responses=documented(), tags=["models"])
    async def list_models() -> ModelList:
        """The model, under each of its names."""
        return ModelList(data=[described(name) for name in settings.model_names])

    @app.get("/v1/models/{model:path}", responses=documented(404, 422), tags=["models"])
    async def get_model(model: str) -> ModelObject:
        """One model."""
        return described(_known_model(service, model))

    for path, (name, media_type) in PAGE.items():
        _add_file(app, path, name, media_type)


def _add_file(app: FastAPI, path: str, name: str, media_type: str) -> None:
    async def file() -> Response:
        with resources.as_file(WEB / name) as found:
            return FileResponse(found, media_type=media_type, headers={"Cache-Control": "no-cache"})

    app.add_api_route(path, file, include_in_schema=False, name=name)


def _known_model(service: Service, name: str | None) -> str:
    names = service.settings.model_names
    if name is not None and name not in names:
        raise ApiError(404, f"no such model; this server has: {', '.join(names)}", "model_not_found", "model")
    return name or names[0]


def _describe_key(app: FastAPI) -> None:
    """Say in the API's description that a key is needed."""
    describe = app.openapi

    def with_key() -> dict[str, Any]:
        schema = describe()
        schema.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"key": []}]
        schema["paths"]["/health"]["get"]["security"] = []
        return schema

    app.openapi = with_key  # type: ignore[method-assign]


# -- answers -----------------------------------------------------------------------------------------------------------


def _add_answer_routes(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/chat/completions",
        response_model=ChatResponse,
        responses=documented(400, 404, 422, 429, 503, stream=True),
        tags=["answers"],
    )
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer the last message of a chat; memories and long texts stand in it as soft tokens."""
        form = _ChatForm(_known_model(service, body.model))

        async def prompts() -> list[ReadyPrompt]:
            return [await service.chat_prompt(body)]

        return await _answer(service, request, body, form, prompts)

    @app.post(
        "/v1/completions",
        response_model=CompletionResponse,
        responses=documented(400, 404, 422, 429, 503, stream=True),
        tags=["answers"],
    )
    async def complete(body: CompletionRequest, request: Request) -> Response:
        """Go on with a text, without a chat template; memories may be read before it."""
        form = _CompletionForm(_known_model(service, body.model))
        return await _answer(service, request, body, form, lambda: service.completion_prompts(body))


class _ChatForm:
    """How chats are put into words: OpenAI's chat.completion and its chunks."""

    chunk = "chat.completion.chunk"

    def __init__(self, model: str) -> None:
        self.model = model
        self.id = f"chatcmpl-{secrets.token_hex(12)}"
        self.created = int(time.time())

    def whole(self, texts: list[str], finishes: list[Any], usage: Usage) -> ChatResponse:
        choices = [
            ChatChoice(index=i, message=AnswerMessage(content=text), finish_reason=finish)
            for i, (text, finish) in enumerate(zip(texts, finishes, strict=True))
        ]
        return ChatResponse(id=self.id, created=self.created, model=self.model, choices=choices, usage=usage)

    def opening(self, number: int) -> list[dict[str, Any]]:
        return [self._choice(number, {"role": "assistant", "content": ""}, None)]

    def part(self, number: int, text: str, finish: str | None) -> list[dict[str, Any]]:
        said = [self._choice(number, {"content": text}, None)] if text else []
        return said + ([self._choice(number, {}, finish)] if finish else [])

    @staticmethod
    def _choice(number: int, delta: dict[str, str], finish: str | None) -> dict[str, Any]:
        return {"index": number, "delta": delta, "finish_reason": finish, "logprobs": None}


class _CompletionForm(_ChatForm):
    """The same for text_completion."""

    chunk = "text_completion"

    def __init__(self, model: str) -> None:
        super().__init__(model)
        self.id = f"cmpl-{secrets.token_hex(12)}"

    def whole(self, texts: list[str], finishes: list[Any], usage: Usage) -> CompletionResponse:  # type: ignore[override]
        choices = [
            CompletionChoice(index=i, text=text, finish_reason=finish)
            for i, (text, finish) in enumerate(zip(texts, finishes, strict=True))
        ]
        return CompletionResponse(id=self.id, created=self.created, model=self.model, choices=choices, usage=usage)

    def opening(self, number: int) -> list[dict[str, Any]]:
        return []

    def part(self, number: int, text: str, finish: str | None) -> list[dict[str, Any]]:
        if not text and not finish:
            return []
        return [{"index": number, "text": text, "finish_reason": finish, "logprobs": None}]


async def _answer(
    service: Service,
    request: Request,
    body: Generation,
    form: _ChatForm,
    make_prompts: Callable[[], Awaitable[list[ReadyPrompt]]],
) -> Response:
    """Answer a request, at once or as a stream; its place is given back at the end of either."""
    job = service.admit()
    streaming = False
    try:
        prompts = await _while_connected(request, make_prompts())
        service.start_answers(job, prompts, body)
        if body.stream:
            streaming = True
            return _JobStream(job, _chunks(job, body, form, prompts))
        return JSONResponse(await _while_connected(request, _whole(job, form, prompts)))
    finally:
        if not streaming:
            job.close()


async def _whole(job: Job, form: _ChatForm, prompts: list[ReadyPrompt]) -> dict[str, Any]:
    texts: list[list[str]] = [[] for _ in job.rows]
    finishes: list[Any] = [None] * len(job.rows)
    async for number, piece in job.pieces():
        texts[number].append(piece.text)
        finishes[number] = piece.finish
    return form.whole(["".join(text) for text in texts], finishes, _usage(job, prompts)).model_dump()


async def _chunks(job: Job, body: Generation, form: _ChatForm, prompts: list[ReadyPrompt]) -> AsyncIterator[str]:
    head = {"id": form.id, "object": form.chunk, "created": form.created, "model": form.model}
    if body.wants_usage:
        head["usage"] = None  # type: ignore[assignment]  # as OpenAI does: null in all but the last
    for number in range(len(job.rows)):
        for choice in form.opening(number):
            yield _event({**head, "choices": [choice]})
    try:
        async for number, piece in job.pieces():
            for choice in form.part(number, piece.text, piece.finish):
                yield _event({**head, "choices": [choice]})
    except ApiError as error:  # the status is out already
        yield _event(body_of(error.message, error.status, error.code))
        return
    if body.wants_usage:
        yield _event({**head, "choices": [], "usage": _usage(job, prompts).model_dump()})
    yield "data: [DONE]\n\n"


def _usage(job: Job, prompts: list[ReadyPrompt]) -> Usage:
    read, written = sum(map(len, prompts)), sum(len(row.tokens) for row in job.rows)
    details = PromptDetails(
        soft_tokens=sum(p.soft_tokens for p in prompts), origin_tokens=sum(p.origin_tokens for p in prompts)
    )
    return Usage(
        prompt_tokens=read, completion_tokens=written, total_tokens=read + written, prompt_tokens_details=details
    )


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"  # in ASCII: some clients take U+2028 for the end of a line


class _JobStream(StreamingResponse):
    """A stream of events that closes its job however it ends, also if it never began."""

    def __init__(self, job: Job, content: AsyncIterator[str]) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.job.close()


async def _while_connected(request: Request, work: Awaitable[T]) -> T:
    """What `work` gives, or ClientGoneError as soon as the client closes its connection; the work is then cancelled."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    doing, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((doing, watching), return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        raise ClientGoneError
    finally:
        for task in (doing, watching):
            task.cancel()
        await asyncio.gather(doing, watching, return_exceptions=True)


# -- memories ----------------------------------------------------------------------------------------------------------


ID_PATH = Path(description="of a stored memory")


def _add_memory_routes(app: FastAPI, service: Service) -> None:
    def described(entry: StoredMemory) -> dict[str, Any]:
        fields = {name: getattr(entry, name) for name in MemoryObject.model_fields if hasattr(entry, name)}
        return {**fields, "object": "memory", "readable": entry.fingerprint == service.gmsa.fingerprint}

    @app.post(
        "/v1/memories",
        response_model=MadeMemory,
        status_code=201,
        responses={**documented(400, 422, 429, 503), 200: {"model": MadeMemory, "description": "it was there already"}},
        tags=["memories"],
    )
    async def make_memory(body: MemoryRequest, request: Request) -> Response:
        """Compress a text and keep its memory; the same text and merge size give the same memory."""
        job = service.admit(answers=False)
        try:
            work = service.remember(body.text, body.merge_size, body.label, body.metadata)
            entry, _, there = await _while_connected(request, work)
        finally:
            job.close()
        spent = time.perf_counter() - job.started
        made = MadeMemory(**described(entry), existing=there, seconds=round(spent, 4))
        return JSONResponse(made.model_dump(), 200 if there else 201)

    @app.get("/v1/memories", responses=documented(422, 503), tags=["memories"])
    async def list_memories(
        label: str | None = Query(None, max_length=200, description="only those with this label"),
        limit: int = Query(50, ge=1, le=1000),
        offset: int = Query(0, ge=0, le=2**31),
    ) -> MemoryList:
        """Stored memories, the newest first."""
        found = await service.call_store(lambda store: store.list(label=label, limit=limit + 1, offset=offset))
        return MemoryList(data=[MemoryObject(**described(e)) for e in found[:limit]], has_more=len(found) > limit)

    @app.get("/v1/memories/{id}", responses=documented(404, 422, 503), tags=["memories"])
    async def get_memory(id: MemoryId = ID_PATH) -> MemoryObject:
        """What is known of a stored memory."""
        return MemoryObject(**described(await service.call_store(lambda store: store.entry(id))))

    @app.delete("/v1/memories/{id}", responses=documented(404, 422, 503), tags=["memories"])
    async def delete_memory(id: MemoryId = ID_PATH) -> DeletedMemory:
        """Forget a memory."""

        def delete(store: MemoryStore) -> None:
            if not store.delete(id):
                store.entry(id)  # says that there is none

        await service.call_store(delete)
        return DeletedMemory(id=id)


def _add_restoration(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/memories/{id}/restore",
        response_model=RestoredMemory,
        responses=documented(400, 404, 422, 429, 503, stream=True),
        tags=["memories"],
    )
    async def restore_memory(body: RestoreRequest, request: Request, id: MemoryId = ID_PATH) -> Response:
        """The text of a memory as the model can restate it; a stream has events {"text": ...}.

        With `check` an event stands for a soft token, and says whether it is "confirmed".
        """
        job = service.admit()
        streaming = False
        try:
            memory = await _while_connected(request, service.load(id))
            pieces = service.checked(job, memory) if body.check else service.restored(job, memory)
            if body.stream:
                streaming = True
                return _JobStream(job, _restored_events(pieces))

            async def whole() -> dict[str, Any]:
                said = [piece async for piece in pieces]
                return _proven(said) if body.check else {"text": "".join(said)}  # type: ignore[arg-type]

            found = await _while_connected(request, whole())
            spent = time.perf_counter() - job.started
            return JSONResponse(RestoredMemory(id=id, seconds=round(spent, 4), **found).model_dump(exclude_none=True))
        finally:
            if not streaming:
                job.close()


def _proven(pieces: Sequence[CheckedPiece]) -> dict[str, Any]:
    """A text of checked pieces, and what of it is in doubt."""
    runs = [
        (sure, "".join(piece.text for piece in run)) for sure, run in groupby(pieces, lambda piece: piece.confirmed)
    ]
    return {
        "text": "".join(text for _, text in runs),
        "soft_tokens": len(pieces),
        "confirmed": sum(piece.confirmed for piece in pieces),
        "in_doubt": [text for sure, text in runs if not sure],
    }


async def _restored_events(pieces: AsyncIterator[str] | AsyncIterator[CheckedPiece]) -> AsyncIterator[str]:
    try:
        async for piece in pieces:
            yield _event(piece._asdict() if isinstance(piece, CheckedPiece) else {"text": piece})
    except Exception as error:  # the status is out already
        yield f"data: {bytes(translate(error).body).decode()}\n\n"
        return
    yield "data: [DONE]\n\n"
