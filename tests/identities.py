"""Stand-ins, over HTTP, for what gives credentials: Google's metadata server, and an STS that refuses and counts."""

import base64
import json
import threading
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, parse_qsl, urlsplit

EMAIL = "worker@project.iam.gserviceaccount.com"
NUMBER = "100000000000000000001"


class _Server:
    """Serves in a thread, in a with block; `host` is HOST:PORT."""

    def __enter__(self):
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
                status, headers, answer = owner.answer(self.path, self.headers, body)
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(answer))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(answer.encode())

            do_POST = do_GET  # noqa: N815  # the name that http.server asks for

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.host = f"127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


class Metadata(_Server):
    """Google's metadata server. Each token is another; `statuses` are what it answers first, instead."""

    def __init__(self):
        self.requests, self.tokens, self.statuses = [], [], []
        self.headers, self.body = {"Metadata-Flavor": "Google"}, None

    def answer(self, path, headers, _body):
        parts = urlsplit(path)
        query = {name: value for name, (value,) in parse_qs(parts.query).items()}
        self.requests.append((parts.path, query, headers.get("Metadata-Flavor")))
        if self.statuses:
            return self.statuses.pop(0), self.headers, "BODY-CANARY"
        claims = {"aud": query["audience"], "azp": NUMBER, "sub": NUMBER, "email": EMAIL}
        coded = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
        token = f"HEADER{len(self.tokens)}.{coded}.SIGNATURE-CANARY"
        self.tokens.append(token)
        return 200, self.headers, token if self.body is None else self.body


class Sts(_Server):
    """AWS STS. `refusals` are (status, code, message), answered first; `secrets` is all it gave that must not show."""

    def __init__(self):
        self.requests, self.refusals, self.secrets, self.signers = [], [], [], []
        self.clock = lambda: datetime.now(timezone.utc)

    @property
    def environment(self):
        return {"AWS_ENDPOINT_URL_STS": f"http://{self.host}"}

    def answer(self, _path, headers, body):
        request = dict(parse_qsl(body))
        self.requests.append(request)
        self.signers.append(headers.get("Authorization"))
        if self.refusals:
            status, code, message = self.refusals.pop(0)
            error = f"<Error><Type>Sender</Type><Code>{code}</Code><Message>{message}</Message></Error>"
            return status, {}, f"<ErrorResponse>{error}<RequestId>1</RequestId></ErrorResponse>"
        n = len(self.requests)
        secret, token = f"SECRET-CANARY-{n}", f"TOKEN-CANARY-{n}"
        self.secrets += [secret, token]
        ends = (self.clock() + timedelta(hours=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
        action = request["Action"]
        given = (
            f"<AccessKeyId>ASIATEMPORARY{n:07}</AccessKeyId><SecretAccessKey>{secret}</SecretAccessKey>"
            f"<SessionToken>{token}</SessionToken><Expiration>{ends}</Expiration>"
        )
        role = f"arn:aws:sts::111122223333:assumed-role/etl/{request['RoleSessionName']}"
        user = f"<AssumedRoleUser><Arn>{role}</Arn><AssumedRoleId>A:b</AssumedRoleId></AssumedRoleUser>"
        result = f"<{action}Result><Credentials>{given}</Credentials>{user}</{action}Result>"
        return 200, {}, f"<{action}Response>{result}</{action}Response>"
