"""How Vault is reached: the settings, the connection, and the token with its lease. What is asked there: vault.py."""

from __future__ import annotations

import importlib.util
import math
import os
import random
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from beam_envelope.errors import (
    EnvelopeError,
    FormatError,
    KeyAccessError,
    KmsUnavailableError,
)

if TYPE_CHECKING:
    from beam_envelope.keys.vault import Vault

OK: Final = 200
FORBIDDEN: Final = 403
_SERVER_ERROR: Final = 500
_REDIRECTS: Final = range(300, 400)
_BUSY: Final = {412, 429}  # 412: a standby that has not yet seen our last write
_TIMEOUTS_S: Final = (5.0, 10.0)  # to connect, to read
_ATTEMPTS: Final = 8
_LONGEST_PAUSE_S: Final = 8.0
_COUNT_OF_ERRORS: Final = re.compile(r"\A\d+ errors? occurred: \* ")
_sleep = time.sleep


@dataclass(frozen=True)
class Server:
    """A server and how to reach it: what arguments and environment say together."""

    address: str
    namespace: str | None
    role: str | None
    ca_cert: str | None
    client_cert: str | None
    client_key: str | None
    verify: bool

    @classmethod
    def of(cls, key: Vault) -> Server:
        """Raises KeyAccessError: there is no address, or VAULT_ADDR is not of the right form."""
        address = key.address or os.environ.get("VAULT_ADDR")
        if not address:
            msg = (
                f"no Vault address is set for {key}. Set VAULT_ADDR, or write "
                f"{replace(key, address='https://vault.example:8200')}"
            )
            raise KeyAccessError(msg)
        skip = os.environ.get("VAULT_SKIP_VERIFY", "").lower() in {"1", "t", "true"}
        return cls(
            # A FormatError of a worker's environment could become a dead letter of each file.
            checked_address(address, "VAULT_ADDR", KeyAccessError),
            key.namespace or os.environ.get("VAULT_NAMESPACE", "").strip("/") or None,
            key.role,
            key.ca_cert or os.environ.get("VAULT_CACERT") or None,
            key.client_cert or os.environ.get("VAULT_CLIENT_CERT") or None,
            key.client_key or os.environ.get("VAULT_CLIENT_KEY") or None,
            not skip if key.verify is None else key.verify,
        )


def checked_address(address: str, what: str, error: type[EnvelopeError] = FormatError) -> str:
    """Return an address without a slash at its end. Raises `error`: it is not of the right form."""
    try:
        parts = urlsplit(address)
        good = parts.scheme in {"http", "https"} and parts.hostname and (parts.port or True)
    except ValueError:
        good = False
    if not good or parts.username is not None or parts.query or parts.fragment or not address.isprintable():
        msg = f"{what} of Vault is not of the form https://HOST[:PORT], with no credentials, query or fragment"
        raise error(msg)
    return address.rstrip("/")


@dataclass(frozen=True)
class Answer:
    """A status, and the JSON object or what Vault said of its refusal. Neither is shown: there may be a key in it."""

    status: int
    document: dict[str, Any] = field(repr=False)

    @property
    def said(self) -> str:
        """Vault's own words, and nothing of an answer that is not Vault's (a proxy's page may show the request)."""
        errors = self.document.get("errors")
        texts = errors if isinstance(errors, list) else ()
        return _COUNT_OF_ERRORS.sub("", " ".join(" ".join(map(str, texts)).split()))[:500]


@dataclass(frozen=True)
class _Lease:
    """A token and when to replace it, by `time.monotonic`."""

    token: str = field(repr=False)
    due: float = math.inf
    lasts_s: float = math.inf
    renewable: bool = False


class Connection:
    """One server, as one identity. Safe between threads."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._adapter = _adapter(server)
        self._lock = threading.Lock()
        self._lease: _Lease | None = None

    def post(self, path: str, body: Mapping[str, Any] | None) -> Answer:
        """Send a request with a token; with a new one, if that one is refused and there is another. No body: a GET.

        Raises:
            KeyAccessError: there are no credentials, or they are refused.
            KmsUnavailableError: no answer after all retries.
        """
        return self._ask(path, body)

    def get(self, path: str) -> Answer:
        """Read, as `post`."""
        return self._ask(path, None)

    def _ask(self, path: str, body: Mapping[str, Any] | None) -> Answer:
        token = self._token()
        answer = self._send(path, body, token)
        if answer.status == FORBIDDEN and (another := self._token(refused=token)) != token:
            answer = self._send(path, body, another)
        return answer

    def _token(self, refused: str | None = None) -> str:
        with self._lock:
            lease = self._lease
            if lease is None or lease.token == refused:
                lease = self._fresh_lease()
            elif time.monotonic() >= lease.due:
                lease = self._renewed(lease) or self._fresh_lease()
            self._lease = lease
            return lease.token

    def _fresh_lease(self) -> _Lease:
        role = self._server.role
        if not role and (token := os.environ.get("VAULT_TOKEN", "").strip()):
            return _Lease(_checked_token(token, "VAULT_TOKEN"))
        role = role or os.environ.get("VAULT_ROLE_ID", "").strip()
        if role:
            return self._logged_in(role)
        token = _read_secret(os.path.expanduser("~/.vault-token"))
        if not token:
            msg = (
                f"no Vault credentials for {self._server.address}. Set VAULT_TOKEN, or VAULT_ROLE_ID with "
                "VAULT_SECRET_ID or VAULT_SECRET_ID_FILE, or log in (vault login)"
            )
            raise KeyAccessError(msg)
        return _Lease(_checked_token(token, "~/.vault-token"))

    def _logged_in(self, role: str) -> _Lease:
        secret = os.environ.get("VAULT_SECRET_ID", "").strip()
        if not secret and (path := os.environ.get("VAULT_SECRET_ID_FILE")):
            secret = _read_secret(path)
            if not secret:
                msg = f"the file that VAULT_SECRET_ID_FILE names cannot be read or is empty: {path}. Check it"
                raise KeyAccessError(msg)
        body = {"role_id": role, **({"secret_id": secret} if secret else {})}
        answer = self._send("auth/approle/login", body, None)
        lease = _lease_of(answer)
        if lease is None:
            msg = (
                f"Vault at {self._server.address} refused the AppRole login. Check VAULT_ROLE_ID (or role=...), "
                "VAULT_SECRET_ID or VAULT_SECRET_ID_FILE, and that the secret id has not ended. "
                f"Vault says {answer.status}: {answer.said or 'no more'}"
            )
            raise KeyAccessError(msg)
        return lease

    def _renewed(self, lease: _Lease) -> _Lease | None:
        """Prolong a token, which spares a secret id of few uses; None near the longest time that it may live."""
        if not lease.renewable:
            return None
        renewed = _lease_of(self._send("auth/token/renew-self", {}, lease.token))
        if renewed is None or renewed.lasts_s < lease.lasts_s / 2:
            return None
        return replace(renewed, lasts_s=lease.lasts_s)

    def _send(self, path: str, body: Mapping[str, Any] | None, token: str | None) -> Answer:
        """Post (or get, with no body) until there is an answer that says something; a token follows no redirect."""
        said = ""
        for attempt in range(_ATTEMPTS):
            answer, said, wait_s = self._try(path, body, token)
            if answer is not None:
                return answer
            if attempt < _ATTEMPTS - 1:
                pause = min(_LONGEST_PAUSE_S, 0.25 * 2**attempt) * random.uniform(0.5, 1)  # noqa: S311  # jitter
                _sleep(max(pause, min(wait_s, _LONGEST_PAUSE_S)))
        msg = f"Vault at {self._server.address} did not serve {path} after all retries. Run the job again. {said}"
        raise KmsUnavailableError(msg)

    def _try(self, path: str, body: Mapping[str, Any] | None, token: str | None) -> tuple[Answer | None, str, float]:
        """Return an answer, or why there is none and how many seconds the server wants us to wait.

        No exception of `requests` leaves here, not even as a context: it holds the request, with token and data key.
        """
        import requests  # noqa: PLC0415  # as heavy as hvac, which brings it

        failed: str | None = None
        try:
            response = self._adapter.request(
                "get" if body is None else "post",
                f"/v1/{path}",
                **({} if body is None else {"json": body}),
                headers={"X-Vault-Token": token} if token else {},
                raise_exception=False,
            )
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
            reason = getattr(error.args[0], "reason", None) if error.args else None
            failed = f"It could not be reached: {reason or type(error).__name__}"
            if "CERTIFICATE_VERIFY_FAILED" in failed:
                failed += ". Give the CA's certificate with ca_cert or VAULT_CACERT"
            trusted = "CERTIFICATE" not in failed
        except (requests.RequestException, OSError, ValueError) as error:
            failed, trusted = f"The request could not be made ({type(error).__name__})", False
        if failed is not None:
            if trusted:
                return None, failed, 0.0
            msg = f"Vault at {self._server.address} did not serve {path}. {failed}"
            raise KmsUnavailableError(msg)
        answer = Answer(response.status_code, _json_object(response))
        if answer.status in _REDIRECTS:
            msg = (
                f"Vault at {self._server.address} sends {path} on to another address. A token follows no redirect: set "
                "VAULT_ADDR (or address=...) to where the server is"
            )
            raise KmsUnavailableError(msg)
        if answer.status >= _SERVER_ERROR or answer.status in _BUSY:
            wait = str(response.headers.get("Retry-After", ""))
            return None, f"Vault says {answer.status}: {answer.said or 'no more'}", float(wait) if wait.isdigit() else 0
        return answer, "", 0.0


def _adapter(server: Server) -> Any:  # hvac's adapter
    """Return hvac's client for raw answers. Raises KeyAccessError: hvac or a file is not there."""
    if importlib.util.find_spec("hvac") is None:
        msg = "keys of Vault need hvac, which is not installed. Run: pip install 'beam-envelope[vault]'"
        raise KeyAccessError(msg)
    import hvac  # noqa: PLC0415
    import requests.adapters  # noqa: PLC0415

    for path in filter(None, (server.ca_cert, server.client_cert, server.client_key)):
        if not os.access(path, os.R_OK):
            msg = f"the certificate or key file {path} for Vault cannot be read. Check ca_cert, client_cert, client_key"
            raise KeyAccessError(msg)
    session = requests.Session()
    session.mount("https://", requests.adapters.HTTPAdapter(pool_maxsize=32))
    session.mount("http://", requests.adapters.HTTPAdapter(pool_maxsize=32))
    # hvac lets the session's settings win over its own arguments.
    session.verify = server.verify and (server.ca_cert or True)
    if server.client_cert:
        session.cert = (server.client_cert, server.client_key) if server.client_key else server.client_cert
    client = hvac.Client(
        url=server.address,
        token="",  # or hvac looks for one itself, and keeps it
        cert=session.cert,
        verify=session.verify,
        timeout=_TIMEOUTS_S,
        allow_redirects=False,
        session=session,
        namespace=server.namespace,
        adapter=hvac.adapters.RawAdapter,
    )
    return client.adapter


def _lease_of(answer: Answer) -> _Lease | None:
    auth = answer.document.get("auth")
    if answer.status != OK or not isinstance(auth, dict) or not isinstance(auth.get("client_token"), str):
        return None
    lasts_s = float(auth.get("lease_duration") or math.inf)  # 0: it does not end
    token = _checked_token(auth["client_token"], "the answer to the login")
    return _Lease(token, time.monotonic() + lasts_s * 2 / 3, lasts_s, bool(auth.get("renewable")))


def _json_object(response: Any) -> dict[str, Any]:  # requests' response
    try:
        document = response.json()
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _read_secret(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as stream:
            return stream.read(1 << 16).strip()
    except (OSError, ValueError):
        return ""


def _checked_token(token: str, what: str) -> str:
    """Refuse what cannot be a header: the library's own complaint would show it."""
    if not token.isascii() or not token.isprintable() or " " in token:
        msg = f"{what} holds something that is no Vault token. Log in again (vault login)"
        raise KeyAccessError(msg)
    return token


# One connection per configuration and process, with its token: a login costs time, and perhaps one use of a secret id.
_lock = threading.Lock()
_connections: dict[Server, Connection] = {}


def connection(server: Server) -> Connection:
    """Return this process's one connection to a server."""
    with _lock:
        if server not in _connections:
            _connections[server] = Connection(server)
        return _connections[server]


def clear_clients() -> None:
    """Forget all connections and tokens, so that changed settings are read anew."""
    global _lock  # noqa: PLW0603  # a lock held by another thread at fork stays locked in the child
    _lock = threading.Lock()
    _connections.clear()


os.register_at_fork(after_in_child=clear_clients)
