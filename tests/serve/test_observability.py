"""Log lines, traces, and the shipped dashboard and alert rules, which may name only metrics that the gateway has."""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider

from rluf.errors import SettingsError
from rluf.serve.middleware import ServeMetrics
from rluf.serve.observability import JsonFormatter, setup_service_logging, start_tracing
from rluf.types import Score

LAUNCH_FOLDER = Path(__file__).parents[2] / "cluster" / "launch"
BODY = {"messages": [{"role": "user", "content": "secret words"}], "response": "Hello, friend!"}


def list_expressions() -> list[str]:
    dashboard = json.loads((LAUNCH_FOLDER / "serve_dashboard.json").read_text())
    rules = yaml.safe_load((LAUNCH_FOLDER / "serve_alerts.yaml").read_text())["groups"][0]["rules"]
    panels = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return [*panels, *(rule["expr"] for rule in rules)]


@pytest.fixture(scope="module")
def label_names() -> dict[str, set[str]]:
    """Labels of every metric of a gateway, by name."""
    metrics = ServeMetrics()
    metrics.request_seconds.labels("/v1/score", "200").observe(0.1)
    metrics.feedback_requests.labels("stored").inc()
    metrics.record_scores("love", "v1", [Score("love", 0.5, 0.0)], {"love": 0.4})
    lines = [line for line in metrics.to_prometheus_text().decode().splitlines() if not line.startswith("#")]
    return {re.split(r"[{ ]", line)[0]: set(re.findall(r'(\w+)="', line)) for line in lines}


@pytest.mark.parametrize("expression", list_expressions())
def test_dashboard_and_alerts_name_metrics_and_labels_of_the_gateway(
    expression: str, label_names: dict[str, set[str]]
) -> None:
    metric_names = re.findall(r"\brluf_\w+", expression)
    assert metric_names and set(metric_names) <= label_names.keys()
    known_labels = set().union(*(label_names[name] for name in metric_names))
    used = re.findall(r"by \(([^)]*)\)", expression) + re.findall(r"\{(\w+)\s*=~?", expression)
    assert {name.strip() for names in used for name in names.split(",")} <= known_labels
    assert expression.count("(") == expression.count(")") and expression.count("{") == expression.count("}")


def test_every_metric_of_the_gateway_is_on_the_dashboard(label_names: dict[str, set[str]]) -> None:
    shown = " ".join(list_expressions())
    bases = {re.sub(r"_(total|count|sum|bucket|created)$", "", name) for name in label_names}
    assert {base for base in bases if base not in shown} == set()


def test_alerts_say_what_to_do() -> None:
    rules = yaml.safe_load((LAUNCH_FOLDER / "serve_alerts.yaml").read_text())["groups"][0]["rules"]
    for rule in rules:
        assert rule["annotations"].keys() == {"summary", "action"}
        assert rule["labels"]["severity"] in ("page", "ticket")


@pytest.mark.parametrize("token", ["", "text", "json", "xml"])
def test_the_log_format_is_chosen_by_the_environment(monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    logger = logging.getLogger("rluf.serve")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setenv("RLUF_LOG_FORMAT", token) if token else monkeypatch.delenv("RLUF_LOG_FORMAT", raising=False)
    if token == "xml":
        with pytest.raises(SettingsError, match="RLUF_LOG_FORMAT=xml"):
            setup_service_logging()
        return
    setup_service_logging()
    assert isinstance(logger.handlers[0].formatter, JsonFormatter) == (token == "json")


async def test_a_request_is_one_json_line_without_its_text(
    http_client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "rluf.serve"):
        await http_client.post("/v1/score", json=BODY, headers={"X-Request-Id": "r-1"})
        await http_client.get("/nothing")
    lines = [JsonFormatter().format(record) for record in caplog.records if hasattr(record, "fields")]
    first, second = map(json.loads, lines)
    assert (first["method"], first["route"], first["status"], first["request_id"]) == ("POST", "/v1/score", 200, "r-1")
    assert (second["route"], second["status"], first["level"]) == ("other", 404, "INFO")
    assert "secret" not in "".join(lines)
    error = logging.LogRecord("rluf.serve", logging.ERROR, "f", 1, "broken\n%s", ("x",), None)
    assert json.loads(JsonFormatter().format(error))["message"] == "broken\nx"


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """A collector of OTLP over HTTP; yields the spans that it gets."""
    spans: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            message = ExportTraceServiceRequest()
            message.ParseFromString(self.rfile.read(int(self.headers["Content-Length"])))
            for resource in message.resource_spans:
                spans.extend(span for scope in resource.scope_spans for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Nothing to stderr."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield spans
        server.shutdown()


async def test_requests_are_exported_as_spans_that_continue_their_trace(
    collector: list[Any], http_client: httpx.AsyncClient
) -> None:
    assert start_tracing()
    trace_id, parent_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    await http_client.post("/v1/score", json=BODY, headers={"traceparent": f"00-{trace_id}-{parent_id}-01"})
    await http_client.post("/v1/score", json={"secret": "words"}, headers={"traceparent": "nonsense"})
    provider = trace.get_tracer_provider()
    assert isinstance(provider, TracerProvider)
    provider.shutdown()
    first, second = collector
    assert (first.trace_id.hex(), first.parent_span_id.hex()) == (trace_id, parent_id)
    assert second.trace_id.hex() != trace_id and not second.parent_span_id
    attributes = {item.key: item.value.string_value or item.value.int_value for item in first.attributes}
    assert (first.name, attributes["http.response.status_code"]) == ("POST /v1/score", 200)
    assert "secret" not in str(collector)


def test_without_an_endpoint_nothing_is_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    assert not start_tracing()


@pytest.mark.parametrize("name", ["OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"])
@pytest.mark.parametrize("protocol", ["grpc", "http/json"])
def test_another_protocol_of_traces_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, protocol: str) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4317")
    monkeypatch.setenv(name, protocol)
    with pytest.raises(SettingsError, match=f"{name}={protocol}: spans are exported with http/protobuf only"):
        start_tracing()
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    assert not start_tracing()


async def test_the_api_docs_load_nothing_from_elsewhere(http_client: httpx.AsyncClient) -> None:
    page = (await http_client.get("/docs")).text
    assert "http://" not in page and "https://" not in page
    for path in re.findall(r'(?:src|href)="(/[^"]+)"', page):
        assert (await http_client.get(path)).status_code == 200
    assert "swagger-ui-bundle.js" in page


@pytest.mark.parametrize(("words", "is_cut"), [(1, False), (3, False), (400, True), (8000, True)])
async def test_a_reply_says_whether_the_text_was_cut(http_client: httpx.AsyncClient, words: int, is_cut: bool) -> None:
    response = await http_client.post("/v1/score", json=BODY | {"response": "friend " * words})
    assert {score["truncated"] for score in response.json()["scores"].values()} == {is_cut}
