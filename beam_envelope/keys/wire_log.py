"""Keeps botocore's wire log quiet: at DEBUG it holds bodies and headers, with plaintext keys and credentials."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

_LOGGERS: Final = (
    "botocore.parsers",
    "botocore.endpoint",
    "botocore.httpsession",
    "botocore.hooks",
    "botocore.auth",
    "botocore.credentials",  # of a refresh that failed it logs a traceback each time; our error says what to do
)


class _WireLogFilter(logging.Filter):
    """Drops the records of this thread while calls of ours run in it."""

    def __init__(self) -> None:
        super().__init__()
        self.state = threading.local()

    def filter(self, _record: logging.LogRecord) -> bool:
        return not getattr(self.state, "depth", 0)


_filter: Final = _WireLogFilter()
for _name in _LOGGERS:
    logging.getLogger(_name).addFilter(_filter)


@contextmanager
def wire_log_off() -> Iterator[None]:
    """Log nothing of what goes over the wire in this block, in this thread."""
    _filter.state.depth = getattr(_filter.state, "depth", 0) + 1
    try:
        yield
    finally:
        _filter.state.depth -= 1


def silence(client: Any) -> None:  # boto3's client
    """Log nothing of what a client of boto3 sends and receives, whoever calls it: its headers hold a session token."""
    depth = _filter.state

    def begin(**_: object) -> None:
        depth.depth = getattr(depth, "depth", 0) + 1

    def end(**_: object) -> None:
        depth.depth = max(getattr(depth, "depth", 0) - 1, 0)

    service = client.meta.service_model.service_id.hyphenize()
    client.meta.events.register_first(f"before-call.{service}", begin)
    client.meta.events.register_last(f"after-call.{service}", end)
    client.meta.events.register_last(f"after-call-error.{service}", end)
