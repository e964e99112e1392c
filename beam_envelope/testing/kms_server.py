"""How `FakeKms` is reached: AWS's protocols over HTTP. What it answers: kms.py."""

from __future__ import annotations

import json
import re
import socket
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from beam_envelope.testing.kms import FakeKms

USER: Final = "beam"
"""The IAM user that requests come from, unless `environment` was given another."""


class Refusal(Exception):  # noqa: N818  # what AWS answers, not an error of ours
    """An answer of AWS that is no success."""

    def __init__(self, code: str, message: str | None = None, status: int = 400) -> None:
        super().__init__(f"{code}: {message}")
        self.code, self.message, self.status = code, message, status


class KmsServer(ThreadingHTTPServer):
    """The HTTP server; it remembers its connections, which clients keep open, to cut them at the end."""

    daemon_threads = True

    def __init__(self, kms: FakeKms, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.kms = kms
        self._connections: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Note the connection."""
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Forget it."""
        self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing about a client that went away."""

    def stop(self) -> None:
        """Stop to serve, and cut the connections."""
        self.shutdown()
        self.server_close()
        for connection in self._connections.copy():
            super().shutdown_request(connection)


class _Handler(BaseHTTPRequestHandler):
    """JSON 1.1 as AWS has it: smithy.io, "AWS JSON 1.1 protocol"."""

    server: KmsServer
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet per answer
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        operation = self.headers.get("X-Amz-Target", "").removeprefix("TrentService.")
        scope = re.search(r"Credential=([^/]+)/\d{8}/([^/]+)/(kms|sts)/", self.headers.get("Authorization", ""))
        _, dot, user = (scope[1] if scope else "").partition(".")
        user = user if dot else USER
        if scope and scope[3] == "sts":
            self._send(200, "text/xml", self.server.kms._who(user).encode())  # noqa: SLF001  # its other half
            return
        try:
            try:
                request = json.loads(body)
            except ValueError:
                raise Refusal("SerializationException", "the request is not JSON") from None
            status = 200
            answer = self.server.kms._answer(operation, request, scope and scope[2], user)  # noqa: SLF001  # as above
        except Refusal as refusal:
            status, answer = refusal.status, {"__type": refusal.code}
            if refusal.message is not None:
                answer["message"] = refusal.message
        self._send(status, "application/x-amz-json-1.1", json.dumps(answer).encode())

    def _send(self, status: int, kind: str, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("x-amzn-RequestId", str(uuid.uuid4()))
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the name is http.server's
        """Say nothing."""
