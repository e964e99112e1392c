"""As much of Google Cloud Storage as a Dataflow launcher needs to stage a job: tokens, looking up a bucket, uploads."""

import base64
import json
import threading
import urllib.parse
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import google_crc32c
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

TOKEN = "made-up-access-token-7f3a"


def service_account(url):
    """Return a service account's JSON, whose tokens the server at `url` gives."""
    private = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return {
        "type": "service_account",
        "project_id": "test-project",
        "private_key_id": "1",
        "private_key": private.decode(),
        "client_email": "launcher@test-project.iam.gserviceaccount.com",
        "client_id": "1",
        "token_uri": f"{url}/token",
    }


@contextmanager
def serve():
    """Yield a server's URL and the objects that it was given: a dict of `BUCKET/NAME` and bytes."""
    objects = {}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format, *args):  # noqa: A002  # as the base class has it
            pass

        def _answer(self, status, document, **headers):
            body = json.dumps(document).encode()
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **headers}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            parts = urllib.parse.urlsplit(self.path).path.split("/")  # /storage/v1/b/BUCKET[/o/NAME]
            if len(parts) == 5:
                self._answer(
                    200, {"kind": "storage#bucket", "name": parts[4], "location": "US", "softDeletePolicy": {}}
                )
            else:
                self._answer(404, {"error": {"code": 404, "message": "no such object"}})

        def do_POST(self):  # a token is asked for, or a resumable upload begins
            if self.path == "/token":
                self.rfile.read(int(self.headers["Content-Length"]))
                self._answer(200, {"access_token": TOKEN, "expires_in": 3600, "token_type": "Bearer"})
                return
            bucket = urllib.parse.urlsplit(self.path).path.split("/")[5]  # /upload/storage/v1/b/BUCKET/o
            name = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["name"]
            place = urllib.parse.quote(f"{bucket}/{name}", safe="")
            self._answer(200, {}, Location=f"http://{self.headers['Host']}/session/{place}")

        def do_PUT(self):  # its bytes; they fit in one request here
            place = urllib.parse.unquote(self.path.removeprefix("/session/"))
            data = objects[place] = self.rfile.read(int(self.headers["Content-Length"]))
            crc32c = base64.b64encode(google_crc32c.Checksum(data).digest()).decode()
            self._answer(200, {"name": place.partition("/")[2], "size": str(len(data)), "crc32c": crc32c})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", objects
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
