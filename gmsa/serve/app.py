"""The routes: OpenAI's for models, chats and completions; GMSA's for memories; health, metrics and the page."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from importlib import resources
from typing import Any, Literal

from fastapi import FastAPI, Path, Query, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from gmsa import __version__
from gmsa.decode.checked import CheckedPiece
from gmsa.serve.answers import ChatForm, CompletionForm, JobStream, answer, proven, while_connected
from gmsa.serve.errors import ApiError, handle_errors, translate
from gmsa.serve.guard import Guard
from gmsa.serve.responses import ResponseForm, ResponseObject, ResponseRequest
from gmsa.serve.scheduler import Scheduler
from gmsa.serve.schemas import (
    ChatRequest,
    ChatResponse,
    CompletionRequest,
    CompletionResponse,
    DeletedMemory,
    ErrorResponse,
    Health,
    MadeMemory,
    MemoryId,
    MemoryList,
    MemoryObject,
    MemoryRequest,
    ModelList,
    ModelObject,
    OpenChatRequest,
    RestoredMemory,
    RestoreRequest,
    event,
)
from gmsa.serve.service import Service
from gmsa.store import MemoryStore, StoredMemory

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
OFF: Any = {
    "tracing": False,
    "metrics": False,
    "logs": False,
    "auto_configure": False,
}  # it would tell queries
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
        telemetry=OFF,
        generate_unique_id_function=lambda route: route.name,
    )
    handle_errors(app)
    _add_answer_routes(app, service)
    _add_memory_routes(app, service)
    _add_restoration(app, service)
    _add_system_routes(app, service)
    app.add_middleware(Guard, settings=service.settings, keys=service.keys, metrics=service.metrics, hosts=hosts)
    if service.keys.needed:
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
            select=settings.select,
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
    chat_request = ChatRequest if isinstance(service.scheduler, Scheduler) else OpenChatRequest

    @app.post(
        "/v1/chat/completions",
        response_model=ChatResponse,
        responses=documented(400, 404, 422, 429, 503, stream=True),
        tags=["answers"],
    )
    async def chat(body: chat_request, request: Request) -> Response:  # type: ignore[valid-type]
        """Answer the last message of a chat; memories and long texts stand in it as soft tokens."""
        asked: OpenChatRequest = body
        model = _known_model(service, asked.model)
        if not isinstance(service.scheduler, Scheduler):
            from gmsa.serve import remote_chat  # needs httpx, which not every server has

            if remote_chat.takes_chats(service):
                return await remote_chat.relay(service, request, asked, model)
            asked = remote_chat.closed(await request.json())
        return await answer(
            service, request, asked, ChatForm(model, asked.wants_usage), lambda: service.chat_prompts(asked)
        )

    @app.post(
        "/v1/completions",
        response_model=CompletionResponse,
        responses=documented(400, 404, 422, 429, 503, stream=True),
        tags=["answers"],
    )
    async def complete(body: CompletionRequest, request: Request) -> Response:
        """Go on with a text, without a chat template; memories may be read before it."""
        form = CompletionForm(_known_model(service, body.model), body.wants_usage)
        return await answer(service, request, body, form, lambda: service.completion_prompts(body))

    @app.post(
        "/v1/responses",
        response_model=ResponseObject,
        responses=documented(400, 404, 422, 429, 503, stream=True),
        tags=["answers"],
    )
    async def respond(body: ResponseRequest, request: Request) -> Response:
        """The same as a chat, in OpenAI's newer form, for text. Nothing is kept between requests."""
        form, chat = ResponseForm(_known_model(service, body.model), body), body.chat()
        return await answer(service, request, chat, form, lambda: service.chat_prompts(chat))


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
        with service.admit(answers=False) as job:
            work = service.remember(body.text, body.merge_size, body.label, body.metadata)
            entry, _, there = await while_connected(request, work)
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
        with service.admit() as job:
            memory = await while_connected(request, service.load(id))
            pieces = service.checked(job, memory) if body.check else service.restored(job, memory)
            if body.stream:
                return JobStream(job, _restored_events(pieces))

            async def whole() -> dict[str, Any]:
                said = [piece async for piece in pieces]
                return proven(said) if body.check else {"text": "".join(said)}  # type: ignore[arg-type]

            found = await while_connected(request, whole())
            spent = time.perf_counter() - job.started
            return JSONResponse(RestoredMemory(id=id, seconds=round(spent, 4), **found).model_dump(exclude_none=True))


async def _restored_events(pieces: AsyncIterator[str] | AsyncIterator[CheckedPiece]) -> AsyncIterator[str]:
    try:
        async for piece in pieces:
            yield event(piece._asdict() if isinstance(piece, CheckedPiece) else {"text": piece})
    except Exception as error:  # the status is out already
        yield f"data: {bytes(translate(error).body).decode()}\n\n"
        return
    yield "data: [DONE]\n\n"
