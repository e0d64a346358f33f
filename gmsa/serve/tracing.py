"""Spans of OpenTelemetry (`gmsa[otel]`): request, compress, store, prefill, decode. Off without it; never any text.

Where spans go is for OpenTelemetry's own variables to say: OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_SERVICE_NAME, ...
"""

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

try:
    from opentelemetry import propagate, trace
except ImportError:
    trace = None  # type: ignore[assignment]

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


def set_up() -> str | None:
    """Send spans where the environment says, if it does.

    Returns:
        A line if it does, and they cannot be sent.
    """
    wanted = next((name for name in ENDPOINTS if os.environ.get(name)), None)
    if wanted is None:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        return f"{wanted} is set, but no spans are sent: pip install 'gmsa[otel]'"
    named = {} if os.environ.get("OTEL_SERVICE_NAME") else {SERVICE_NAME: "gmsa"}
    provider = TracerProvider(resource=Resource.create(named))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    return None


@contextlib.contextmanager
def request(method: str, headers: Mapping[str, bytes]) -> Iterator[dict[str, Any]]:
    """A span around a request, within the caller's trace if its headers name one; yields its attributes to fill in."""
    attributes: dict[str, Any] = {"http.request.method": method}
    if trace is None:
        yield attributes
        return
    given = {name: value.decode("latin-1") for name, value in headers.items()}
    tracer, parent = trace.get_tracer("gmsa"), propagate.extract(given)
    with tracer.start_as_current_span("request", parent, trace.SpanKind.SERVER) as made:
        try:
            yield attributes
        finally:
            made.set_attributes(attributes)


@contextlib.contextmanager
def span(name: str, **attributes: Any) -> Iterator[None]:
    """A span around some work; attributes are numbers and names of what is done."""
    if trace is None:
        yield
        return
    named = {f"gmsa.{key}": value for key, value in attributes.items()}
    with trace.get_tracer("gmsa").start_as_current_span(name, attributes=named):
        yield


def past(name: str, start: int, **attributes: Any) -> int:
    """A span of something that has just ended, begun at `start` (`now`); when it ended."""
    end = now()
    if trace is not None:
        named = {f"gmsa.{key}": value for key, value in attributes.items()}
        trace.get_tracer("gmsa").start_span(name, start_time=start, attributes=named).end(end)
    return end


def now() -> int:
    """The time as spans have it: nanoseconds since 1970."""
    return time.time_ns()
