"""Spans of a request, as OpenTelemetry's own exporter in memory receives them."""

from collections.abc import Callable

import httpx
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from server import eventually

from gmsa.serve import tracing

SECRET = "xylophone quartz"
TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture(scope="module")
def exporter() -> InMemorySpanExporter:
    made = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(made))
    trace.set_tracer_provider(provider)
    return made


@pytest.fixture(scope="module")
def url(serve_tiny: Callable[..., str]) -> str:
    return serve_tiny(max_prompt_tokens=256, auto_compress=32)


def spans_of(exporter: InMemorySpanExporter) -> list[ReadableSpan]:
    return [span for span in exporter.get_finished_spans() if span.context.trace_id == int(TRACE, 16)]


def test_a_request_is_one_trace(url: str, exporter: InMemorySpanExporter) -> None:
    text = f"{SECRET} is what the box holds, and has held for years. "
    body = {"messages": [{"role": "user", "content": f"{text}\n\n{SECRET}?"}], "max_tokens": 5, "stream": True}
    headers = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
    httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60).raise_for_status()
    eventually(lambda: any(span.name == "request" for span in spans_of(exporter)))
    spans = spans_of(exporter)
    assert sorted({span.name for span in spans}) == ["compress", "decode", "prefill", "request", "store"]
    root = next(span for span in spans if span.name == "request")
    assert format(root.parent.span_id, "x") == "b7ad6b7169203331"
    assert root.attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
    }
    assert {span.parent.span_id for span in spans if span is not root} == {root.context.span_id}
    of = {span.name: span for span in spans}
    assert of["compress"].attributes["gmsa.origin_tokens"] == len(text)
    assert of["prefill"].attributes["gmsa.prompt_tokens"] > of["compress"].attributes["gmsa.soft_tokens"]
    assert of["decode"].attributes["gmsa.new_tokens"] == 5
    assert of["compress"].end_time <= of["prefill"].start_time <= of["prefill"].end_time == of["decode"].start_time
    said = "".join(span.to_json() for span in exporter.get_finished_spans())
    assert "xylophone" not in said


def test_off_without_it(url: str, exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch) -> None:
    exporter.clear()
    monkeypatch.setattr(tracing, "trace", None)
    body = {"messages": [{"role": "user", "content": "Who?"}], "max_tokens": 2}
    assert httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).status_code == 200
    assert exporter.get_finished_spans() == ()


def test_only_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in tracing.ENDPOINTS:
        monkeypatch.delenv(name, raising=False)
    assert tracing.set_up() is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    assert tracing.set_up() == "OTEL_EXPORTER_OTLP_ENDPOINT is set, but no spans are sent: pip install 'gmsa[otel]'"
