"""Errors as OpenAI's clients know them: {"error": {"message", "type", "param", "code"}}."""

import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Route

from gmsa.errors import (
    ConfigError,
    ContextTooLongError,
    GmsaError,
    InputError,
    MemoryFileError,
    MemoryMismatchError,
    MemoryNotFoundError,
    MemoryTooLargeError,
    StoreError,
)
from gmsa.serve.invalid import explained

log = logging.getLogger(__name__)
TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
RETRY_SECONDS = 1  # what Retry-After says; a place is usually free after one answer
CLIENT_GONE = 499  # nobody reads it; it keeps such requests apart in the metrics

# The first that fits. Messages of the others may name folders of this machine and stay in the log.
STATUS: list[tuple[type[GmsaError], int, str]] = [
    (MemoryNotFoundError, 404, "memory_not_found"),
    (MemoryMismatchError, 400, "memory_mismatch"),
    (MemoryFileError, 404, "memory_damaged"),
    (MemoryTooLargeError, 413, "memory_too_large"),
    (ContextTooLongError, 400, "context_length_exceeded"),
    (InputError, 400, "invalid_value"),
    (ConfigError, 400, "invalid_value"),
]


class ApiError(Exception):
    """An answer that is an error; `status` is HTTP's."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param

    @property
    def body(self) -> dict[str, object]:
        """Its JSON."""
        return body_of(self.message, self.status, self.code, self.param)


class ClientGoneError(Exception):
    """The client closed its connection before it had its answer."""


def body_of(message: str, status: int, code: str | None = None, param: str | None = None) -> dict[str, object]:
    """The JSON of an error."""
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def response(status: int, message: str, code: str | None = None, param: str | None = None) -> JSONResponse:
    """An error as a response, with the headers its status asks for."""
    headers = {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if status in (429, 503):
        headers["Retry-After"] = str(RETRY_SECONDS)
    return JSONResponse(body_of(message, status, code, param), status, headers)


def translate(error: Exception) -> JSONResponse:
    """Any error as a response; what only the operator may know goes to the log."""
    if isinstance(error, ApiError):
        return response(error.status, error.message, error.code, error.param)
    if isinstance(error, ClientGoneError):
        return response(CLIENT_GONE, "the client closed the connection")
    for kind, status, code in STATUS:
        if isinstance(error, kind):
            return response(status, str(error), code)
    if isinstance(error, StoreError):
        log.error("%s", error)
        return response(503, "the memory store cannot be used; the server's log says why", "store_unavailable")
    log.error("a request failed", exc_info=error)
    return response(500, "the server failed; its log says why", "internal_error")


def handle_errors(app: FastAPI) -> None:
    """Make every error of an app one of this shape."""

    async def ours(_: Request, error: Exception) -> JSONResponse:
        return translate(error)

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        place, said = explained(error.errors(), error.body, request.headers.get("content-type"))
        return response(422, f"{place}: {said}" if place else said, "invalid_request", place)

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        detail = str(error.detail)
        if detail == "There was an error parsing the body":  # FastAPI's, which says no more
            reasons = "it is not in UTF-8, nested too deeply, or has a number of thousands of digits"
            detail = f"the request is not valid JSON: {reasons}"
        answer = response(error.status_code, detail)
        answer.headers.update(error.headers or {})
        if error.status_code == 405:  # starlette names the methods of one route; a path may have several
            routes = [route for route in app.routes if isinstance(route, Route)]
            here = [route.methods or () for route in routes if route.path_regex.match(request.url.path)]
            answer.headers["Allow"] = ", ".join(sorted({method for methods in here for method in methods}))
        return answer

    for kind in (ApiError, ClientGoneError, GmsaError, Exception):
        app.add_exception_handler(kind, ours)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
