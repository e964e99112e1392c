"""`FakeKms`: a strict AWS KMS over HTTP, in this process.

It refuses what AWS refuses. Lenient imitations take another encryption context, the wrong key or a disabled key, and so
pass code that would fail, or worse, in production.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import threading
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from beam_envelope.testing.kms_server import USER, KmsServer, Refusal

_HEADER_BYTES: Final = 107  # so that a wrapped key of 32 bytes has 167, as those of AWS
_NONCE_BYTES: Final = 12
_MAX_PLAINTEXT_BYTES: Final = 4096
_MAX_CIPHERTEXT_BYTES: Final = 6144
_MAX_DATA_KEY_BYTES: Final = 1024
_MAX_CONTEXT_BYTES: Final = 8192

State = Literal["Enabled", "Disabled", "PendingDeletion"]


@dataclass
class _Key:
    arn: str
    secret: bytes
    state: State = "Enabled"
    deleted_s: float | None = None


@final
class FakeKms:
    """An AWS KMS that speaks AWS's protocol on 127.0.0.1, to boto3 in this process and its children.

    As strict as AWS: the encryption context must be the same pair for pair, the `KeyId` of Decrypt and the
    `SourceKeyId` of ReEncrypt must name the key that wrapped, and keys have states. It knows symmetric keys,
    and GenerateDataKey, Encrypt, Decrypt, ReEncrypt, DescribeKey and ListAliases (of one key), with `DryRun` where AWS
    has it, and of STS GetCallerIdentity. Safe to use from several threads.

    Args:
        region: requests signed for another are refused, as are ARNs of another.
        account: ARNs of another account are refused.

    Example:
        >>> with FakeKms() as kms:
        ...     kms.create_key("etl")
        ...     os.environ.update(kms.environment())
        ...     run_pipeline("aws-kms://alias/etl")
        ...     kms.disable_key("alias/etl")
    """

    def __init__(self, *, region: str = "us-east-1", account: str = "111122223333") -> None:
        self.region = region
        self.account = account
        self._lock = threading.RLock()
        self._keys: dict[str, _Key] = {}
        self._aliases: dict[str, str] = {}
        self._denied: set[tuple[str, str | None, str | None]] = set()
        self._calls: Counter[str] = Counter()
        self._failures = 0
        self._failure = Refusal("")
        self._user = USER  # who sent the request that is being answered, under the lock
        self._server: KmsServer | None = None
        self._port = 0

    def __enter__(self) -> FakeKms:
        """Start to serve; after an end, on the same port: a `with` block for each time between two outages."""
        self._server = KmsServer(self, self._port)
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_error: object) -> None:
        """Stop to serve and cut every connection: clients then find nobody."""
        if self._server is not None:
            self._server.stop()
            self._server = None

    @property
    def endpoint_url(self) -> str:
        """Where it serves: `AwsKms(..., endpoint_url=kms.endpoint_url)`.

        Raises:
            RuntimeError: outside the `with` block.
        """
        if self._server is None:
            raise RuntimeError("FakeKms serves inside its with block only")
        return f"http://127.0.0.1:{self._server.server_port}"

    def environment(self, user: str = USER) -> dict[str, str]:
        """Return the environment variables that lead boto3 here, as an IAM user, and to no settings of one's own."""
        return {
            "AWS_ENDPOINT_URL_KMS": self.endpoint_url,
            "AWS_ENDPOINT_URL_STS": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": "AKIAFAKEKMSFAKEKMS00" if user == USER else f"AKIAFAKEKMS.{user}",
            "AWS_SECRET_ACCESS_KEY": "not-a-secret",
            "AWS_REGION": self.region,
            "AWS_DEFAULT_REGION": self.region,  # the one that boto3 reads
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    @property
    def calls(self) -> Counter[str]:
        """How many requests came for each operation, those refused and tried again too. A copy."""
        with self._lock:
            return self._calls.copy()

    def create_key(self, alias: str | None = None, *, multi_region: bool = False) -> str:
        """Make a key and return its ARN; `alias` (with or without `alias/`) names it from now on."""
        key_id = f"mrk-{uuid.uuid4().hex}" if multi_region else uuid.uuid4()
        key = _Key(f"{self._arn_prefix}key/{key_id}", secrets.token_bytes(32))
        with self._lock:
            self._keys[key.arn] = key
            if alias is not None:
                self._aliases[f"{self._arn_prefix}alias/{alias.removeprefix('alias/')}"] = key.arn
        return key.arn

    def replicate_key(self, key: str, to: FakeKms) -> str:
        """Make a replica of a multi-Region key in a KMS of another region, and return its ARN."""
        primary = self._find(key)
        arn = to._arn_prefix + primary.arn.rpartition(":")[2]
        to._keys[arn] = _Key(arn, primary.secret)
        return arn

    def disable_key(self, key: str) -> None:
        """Disable a key: nothing can be done with it until `enable_key`."""
        self._find(key).state = "Disabled"

    def enable_key(self, key: str) -> None:
        """Enable a key, also one that was to be deleted."""
        found = self._find(key)
        found.state, found.deleted_s = "Enabled", None

    def schedule_key_deletion(self, key: str, days: int = 30) -> None:
        """Start the wait after which AWS deletes a key: nothing can be done with it."""
        found = self._find(key)
        found.state, found.deleted_s = "PendingDeletion", time.time() + days * 86_400

    def deny(self, operation: str, key: str | None = None, *, user: str | None = None) -> None:
        """Refuse an operation, on one key or all, to one user or all.

        Of ReEncrypt it is `ReEncryptFrom` or `ReEncryptTo`.
        """
        with self._lock:
            self._denied.add((operation, None if key is None else self._find(key).arn, user))

    def allow(self, operation: str, key: str | None = None, *, user: str | None = None) -> None:
        """Take back what `deny` with the same arguments did."""
        with self._lock:
            self._denied.discard((operation, None if key is None else self._find(key).arn, user))

    def throttle(self, n: int) -> None:
        """Refuse the next `n` requests as too many (ThrottlingException), and forget earlier plans."""
        self.fail(n, "ThrottlingException", 400)

    def fail(self, n: int, code: str = "KMSInternalException", status: int = 500) -> None:
        """Answer the next `n` requests with an error of AWS, and forget earlier plans."""
        with self._lock:
            self._failures, self._failure = n, Refusal(code, "planned by the test", status)

    @property
    def _arn_prefix(self) -> str:
        return f"arn:aws:kms:{self.region}:{self.account}:"

    def _find(self, key_id: Any) -> _Key:
        """Return the key that a key id, key ARN, alias or alias ARN names."""
        if not isinstance(key_id, str) or not key_id:
            raise _invalid(key_id, "keyId")
        arn = key_id
        if not key_id.startswith("arn:"):
            arn = self._arn_prefix + (key_id if key_id.startswith("alias/") else f"key/{key_id}")
        elif not key_id.startswith(f"arn:aws:kms:{self.region}:"):
            raise Refusal("NotFoundException", f"Invalid arn {key_id.split(':')[3]}")
        if ":alias/" in arn and arn not in self._aliases:
            raise Refusal("NotFoundException", f"Alias {arn} is not found.")
        key = self._keys.get(self._aliases.get(arn, arn))
        if key is None:
            raise Refusal("NotFoundException", f"Key '{arn}' does not exist")
        return key

    def _usable(self, key_id: Any, permission: str) -> _Key:
        """Return a key that the caller may use now."""
        key = self._allowed(key_id, permission)
        if key.state == "Disabled":
            raise Refusal("DisabledException", f"{key.arn} is disabled.")
        if key.state == "PendingDeletion":
            raise Refusal("KMSInvalidStateException", f"{key.arn} is pending deletion.")
        return key

    def _allowed(self, key_id: Any, permission: str) -> _Key:
        """Return a key on which the caller has a permission, in whatever state it is."""
        if str(key_id).startswith("arn:") and f":{self.account}:" not in key_id:
            raise self._access_denied(permission, key_id)
        key = self._find(key_id)
        self._authorize(permission, key)
        return key

    def _authorize(self, permission: str, key: _Key) -> None:
        cases = {(permission, arn, user) for arn in (None, key.arn) for user in (None, self._user)}
        if cases & self._denied:
            raise self._access_denied(permission, key.arn)

    @property
    def _user_arn(self) -> str:
        return f"arn:aws:iam::{self.account}:user/{self._user}"

    def _access_denied(self, permission: str, arn: str) -> Refusal:
        action = f"kms:{permission}"
        said = f"User: {self._user_arn} is not authorized to perform: {action} on resource: {arn}"
        because = f"because no identity-based policy allows the {action} action"
        return Refusal("AccessDeniedException", f"{said} {because}")

    def _answer(self, operation: str, request: Mapping[str, Any], signed_for: str | None, user: str) -> dict[str, Any]:
        """Answer one request. Raises Refusal."""
        with self._lock:
            self._user = user
            self._calls[operation] += 1
            if self._failures > 0:
                self._failures -= 1
                raise self._failure
            if signed_for is None:
                raise Refusal("MissingAuthenticationTokenException")
            if signed_for != self.region:
                raise Refusal("InvalidSignatureException", "Credential should be scoped to a valid region.")
            if operation not in _OPERATIONS:
                raise Refusal("UnknownOperationException")
            if "DryRunModifiers" in request and not request.get("DryRun"):
                raise Refusal("ValidationException", "DryRunModifiers need DryRun.")
            answer = _OPERATIONS[operation](self, request)
            if request.get("DryRun") and operation in _DRY_RUN:
                said = "The request would have succeeded, but the DryRun option is set."
                raise Refusal("DryRunOperationException", said, 412)
            return answer

    def _who(self, user: str) -> str:
        """Return the answer of STS to GetCallerIdentity, as its query protocol has it."""
        with self._lock:
            self._user = user
            arn = self._user_arn
        result = f"<Arn>{arn}</Arn><UserId>{user}</UserId><Account>{self.account}</Account>"
        space = "https://sts.amazonaws.com/doc/2011-06-15/"
        return (
            f'<GetCallerIdentityResponse xmlns="{space}"><GetCallerIdentityResult>{result}</GetCallerIdentityResult>'
            f"<ResponseMetadata><RequestId>{uuid.uuid4()}</RequestId></ResponseMetadata></GetCallerIdentityResponse>"
        )

    def _describe_key(self, request: Mapping[str, Any]) -> dict[str, Any]:
        key = self._allowed(request.get("KeyId"), "DescribeKey")
        name = {"AWSAccountId": self.account, "KeyId": key.arn.rpartition("/")[2], "Arn": key.arn}
        kind = {"KeyUsage": "ENCRYPT_DECRYPT", "KeySpec": "SYMMETRIC_DEFAULT", "KeyState": key.state}
        due = {} if key.deleted_s is None else {"DeletionDate": key.deleted_s}
        return {"KeyMetadata": {**name, **kind, **due, "Enabled": key.state == "Enabled"}}

    def _list_aliases(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if {("ListAliases", None, user) for user in (None, self._user)} & self._denied:
            raise self._access_denied("ListAliases", "*")
        arn = self._find(request.get("KeyId")).arn
        found = sorted(alias for alias, of in self._aliases.items() if of == arn)
        first = int(request.get("Marker", 0))  # one on a page, so that clients have to turn pages
        page = [{"AliasArn": arn, "AliasName": arn.rpartition(":")[2]} for arn in found[first : first + 1]]
        more = {"NextMarker": str(first + 1)} if first + 1 < len(found) else {}
        return {"Aliases": page, "Truncated": bool(more), **more}

    def _generate_data_key(self, request: Mapping[str, Any]) -> dict[str, Any]:
        key = self._usable(request.get("KeyId"), "GenerateDataKey")
        if ("NumberOfBytes" in request) == ("KeySpec" in request):
            raise Refusal("ValidationException", "Please specify either number of bytes or key spec.")
        size = request.get("NumberOfBytes", {"AES_256": 32, "AES_128": 16}.get(request.get("KeySpec", "")))
        if not isinstance(size, int) or not 1 <= size <= _MAX_DATA_KEY_BYTES:
            raise _invalid(size, "numberOfBytes")
        plaintext = secrets.token_bytes(size)
        wrapped = _seal(key, plaintext, _context(request, "EncryptionContext"))
        return {"KeyId": key.arn, "Plaintext": _text(plaintext), "CiphertextBlob": wrapped}

    def _encrypt(self, request: Mapping[str, Any]) -> dict[str, Any]:
        key = self._usable(request.get("KeyId"), "Encrypt")
        plaintext = _bytes(request, "Plaintext", _MAX_PLAINTEXT_BYTES)
        wrapped = _seal(key, plaintext, _context(request, "EncryptionContext"))
        return {"KeyId": key.arn, "CiphertextBlob": wrapped}

    def _decrypt(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if _ignores_ciphertext(request):
            self._usable(request.get("KeyId"), "Decrypt")
            return {}
        blob = _bytes(request, "CiphertextBlob", _MAX_CIPHERTEXT_BYTES)
        key = self._source(blob, request.get("KeyId"), "Decrypt")
        plaintext = _unseal(key, blob, _context(request, "EncryptionContext"))
        return {"KeyId": key.arn, "Plaintext": _text(plaintext)}

    def _re_encrypt(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if _ignores_ciphertext(request):
            self._usable(request.get("SourceKeyId"), "ReEncryptFrom")
            self._usable(request.get("DestinationKeyId"), "ReEncryptTo")
            return {}
        blob = _bytes(request, "CiphertextBlob", _MAX_CIPHERTEXT_BYTES)
        source = self._source(blob, request.get("SourceKeyId"), "ReEncryptFrom")
        target = self._usable(request.get("DestinationKeyId"), "ReEncryptTo")
        plaintext = _unseal(source, blob, _context(request, "SourceEncryptionContext"))
        wrapped = _seal(target, plaintext, _context(request, "DestinationEncryptionContext"))
        return {"KeyId": target.arn, "SourceKeyId": source.arn, "CiphertextBlob": wrapped}

    def _source(self, blob: bytes, key_id: Any, permission: str) -> _Key:
        """Return the key that wrapped `blob`; if the caller names a key, it must be that one."""
        wrapped_by = self._keys.get(name := blob[1:_HEADER_BYTES].rstrip(b"\x00").decode("ascii", "replace"))
        if ":key/mrk-" in name:
            wrapped_by = self._keys.get(self._arn_prefix + name.rpartition(":")[2])
        key = None if key_id is None else self._usable(key_id, permission)
        if wrapped_by is None:
            raise Refusal("InvalidCiphertextException")
        if key is None:
            return self._usable(wrapped_by.arn, permission)
        if key is not wrapped_by:
            said = "The key ID in the request does not identify a CMK that can perform this operation."
            raise Refusal("IncorrectKeyException", said)
        return key


_OPERATIONS: Final = {
    "Decrypt": FakeKms._decrypt,  # noqa: SLF001  # part of it
    "DescribeKey": FakeKms._describe_key,  # noqa: SLF001
    "Encrypt": FakeKms._encrypt,  # noqa: SLF001
    "GenerateDataKey": FakeKms._generate_data_key,  # noqa: SLF001
    "ListAliases": FakeKms._list_aliases,  # noqa: SLF001
    "ReEncrypt": FakeKms._re_encrypt,  # noqa: SLF001
}
_DRY_RUN: Final = _OPERATIONS.keys() - {"DescribeKey", "ListAliases"}


def _ignores_ciphertext(request: Mapping[str, Any]) -> bool:
    return request.get("DryRunModifiers") == ["IGNORE_CIPHERTEXT"]


def _seal(key: _Key, plaintext: bytes, context: bytes) -> str:
    header = b"\x01" + key.arn.encode().ljust(_HEADER_BYTES - 1, b"\x00")
    nonce = secrets.token_bytes(_NONCE_BYTES)
    return _text(header + nonce + AESGCM(key.secret).encrypt(nonce, plaintext, header + context))


def _unseal(key: _Key, blob: bytes, context: bytes) -> bytes:
    header, sealed = blob[:_HEADER_BYTES], blob[_HEADER_BYTES:]
    try:
        return AESGCM(key.secret).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], header + context)
    except (InvalidTag, ValueError):
        raise Refusal("InvalidCiphertextException") from None  # AWS says no more than that


def _context(request: Mapping[str, Any], member: str) -> bytes:
    """Return the encryption context in a form that no other context has."""
    context = request.get(member) or {}
    if not isinstance(context, dict) or not all(isinstance(value, str) for value in context.values()):
        raise Refusal("SerializationException", f"{member} maps strings to strings")
    encoded = json.dumps(context, ensure_ascii=False, separators=(",", ":"), sort_keys=True).encode()
    if len(encoded) > _MAX_CONTEXT_BYTES:
        raise _invalid("too large", member)
    return encoded


def _bytes(request: Mapping[str, Any], member: str, limit: int) -> bytes:
    try:
        data = base64.b64decode(request[member], validate=True)
    except (KeyError, TypeError, ValueError):
        raise Refusal("SerializationException", f"{member} is missing or not base64") from None
    if not 1 <= len(data) <= limit:
        raise _invalid(f"of {len(data)} bytes", member)
    return data


def _invalid(value: object, member: str) -> Refusal:
    said = f"1 validation error detected: Value {value} at '{member}' failed to satisfy constraint"
    return Refusal("ValidationException", said)


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
