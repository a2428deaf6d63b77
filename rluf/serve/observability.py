"""Log lines and traces of the service's processes.

RLUF_LOG_FORMAT=json gives one JSON object per line. With OTEL_EXPORTER_OTLP_ENDPOINT (and the other variables of
OpenTelemetry, such as OTEL_SERVICE_NAME and OTEL_TRACES_SAMPLER) requests are exported as spans over OTLP with
HTTP/protobuf; a request's `traceparent` header continues its trace. Neither has message text.
"""

from __future__ import annotations

import json
import logging
import os
from datetime import UTC, datetime

from opentelemetry import trace

from rluf.errors import SettingsError

logger = logging.getLogger("rluf.serve")
tracer = trace.get_tracer("rluf.serve")
"""Creates spans; without `start_tracing` they cost nothing and go nowhere."""

LOG_FORMAT_VARIABLE = "RLUF_LOG_FORMAT"
ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
PROTOCOL_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
PROTOCOL = "http/protobuf"


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time (UTC), level, logger, message, error, and the record's `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        """Format one record."""
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname, "logger": record.name, "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }  # fmt: skip
        if record.exc_info:
            entry["error"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


def setup_service_logging() -> None:
    """Send this process's service log to its stderr, which Ray stores as the replica's log.

    Raises SettingsError for an unknown RLUF_LOG_FORMAT.
    """
    log_format = os.environ.get(LOG_FORMAT_VARIABLE, "text")
    if log_format not in ("text", "json"):
        raise SettingsError(f"{LOG_FORMAT_VARIABLE}={log_format}: expected text or json")
    if not logger.handlers:
        handler = logging.StreamHandler()
        text_formatter = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
        handler.setFormatter(JsonFormatter() if log_format == "json" else text_formatter)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)


def start_tracing() -> bool:
    """Export this process's spans if the environment names an endpoint; returns whether it does.

    Raises SettingsError for another protocol than PROTOCOL, or when the exporter is not installed.
    """
    is_off = os.environ.get("OTEL_TRACES_EXPORTER") == "none"
    if is_off or not any(os.environ.get(name) for name in ENDPOINT_VARIABLES):
        return False
    protocol_name = next((name for name in PROTOCOL_VARIABLES if os.environ.get(name)), "")
    if protocol_name and os.environ[protocol_name] != PROTOCOL:
        raise SettingsError(
            f"{protocol_name}={os.environ[protocol_name]}: spans are exported with {PROTOCOL} only; set it to that, "
            "and the endpoint to the collector's HTTP port (usually 4318)"
        )
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise SettingsError(
            f"{ENDPOINT_VARIABLES[0]} is set, but {error.name} is not installed: pip install "
            "opentelemetry-exporter-otlp-proto-http, or unset it"
        ) from error
    # Resource.create reads OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES, which come before this name.
    name = os.environ.get("OTEL_SERVICE_NAME", "rluf")
    provider = TracerProvider(resource=Resource.create({"service.name": name}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    return True
