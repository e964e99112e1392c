"""Vault: a key of the transit engine of HashiCorp Vault or OpenBao, through hvac (the extra `vault`).

The encryption context goes along as associated data. How the two servers differ there is said at `Vault`.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final
from urllib.parse import parse_qsl, urlencode

from beam_envelope.errors import (
    EnvelopeError,
    FormatError,
    KeyAccessError,
    KmsUnavailableError,
    TamperedError,
    WrongKeyError,
)
from beam_envelope.keys.context import encode_context
from beam_envelope.keys.provider import DATA_KEY_BYTES, NOTHING, DataKey, KeyProvider, Need, WrappedKey, kms_calls
from beam_envelope.keys.state import DISABLED, ENABLED, NOT_FOUND, NOT_PERMITTED, UNKNOWN, KeyState
from beam_envelope.keys.vault_server import FORBIDDEN, OK, Answer, Server, checked_address, connection

_SEGMENT: Final = r"(?!\.+/|\.+\Z)[A-Za-z0-9_.~+-]+"
_PATH: Final = re.compile(rf"{_SEGMENT}(/{_SEGMENT})*", re.ASCII)
_NAME: Final = re.compile(r"\w(([\w.-]+)?\w)?", re.ASCII)  # what transit itself takes
_CIPHERTEXT: Final = re.compile(rb"vault:v[1-9][0-9]{0,8}:[A-Za-z0-9+/]{40,1000}={0,2}")
_NOT_FOUND: Final = 404
_SETTINGS: Final = ("address", "namespace", "role", "ca_cert", "client_cert", "client_key", "verify")
_FORM: Final = f"hcvault://MOUNT/keys/NAME[?{'&'.join(f'{name}=...' for name in _SETTINGS)}]"
_ENDPOINT: Final = {
    "GenerateDataKey": "datakey/plaintext",
    "Encrypt": "encrypt",
    "Decrypt": "decrypt",
}


@dataclass(frozen=True)
class Vault(KeyProvider):
    """A key of a transit engine, of a type that takes associated data: `aes256-gcm96` (the default) or another AEAD.

    It holds no credentials. Each process finds them in its own environment: `VAULT_TOKEN`; or an AppRole
    (`VAULT_ROLE_ID`, and `VAULT_SECRET_ID` or the file `VAULT_SECRET_ID_FILE`), with which it logs in once, and again
    before its token ends; or the file `~/.vault-token`. A token that is refused is replaced once, if there is another.

    OpenBao 2.5 and later binds the context to a data key where it makes it. HashiCorp Vault (1.13 or later) takes
    associated data only for encrypt and decrypt: there, a writer has the data key made by `datakey` and wrapped by
    `encrypt`, two calls. Neither server's own `rewrap` takes associated data, so we rewrap by `decrypt` and `encrypt`.

    Args:
        name: the key's name.
        mount: where the transit engine is mounted; it may hold slashes.
        address: the server, `https://...`. Default: `VAULT_ADDR`.
        namespace: Default: `VAULT_NAMESPACE`.
        role: the role id of an AppRole, which is no secret. It comes before `VAULT_TOKEN`. Default: `VAULT_ROLE_ID`.
        ca_cert: a file of CA certificates to trust. Default: `VAULT_CACERT`, or those of the system's Python.
        client_cert: a file with a client certificate for TLS. Default: `VAULT_CLIENT_CERT`.
        client_key: the file with its key, if that is another one. Default: `VAULT_CLIENT_KEY`.
        verify: whether to check the server's certificate. Default: yes, unless `VAULT_SKIP_VERIFY` is set.

    Policy (for `Vault("etl")`): `update` on `transit/datakey/plaintext/etl` to write (on HashiCorp Vault also on
    `transit/encrypt/etl`), on `transit/decrypt/etl` to read, on `transit/encrypt/etl` for every key after the first
    when writing under several, on `decrypt` and `encrypt` to rotate; `read` on `transit/keys/etl` for `state`.
    docs/vault.md has them to copy.

    Raises:
        FormatError: an argument is not of the right form.
    """

    name: str
    mount: str = "transit"
    address: str | None = None
    namespace: str | None = None
    role: str | None = None
    ca_cert: str | None = None
    client_cert: str | None = None
    client_key: str | None = None
    verify: bool | None = None

    provider: ClassVar[str] = "hcvault"

    def __post_init__(self) -> None:
        """Check what becomes part of a request, and fix the paths, for a worker with another working directory."""
        namespace = self.namespace.strip("/") if self.namespace else None
        good = _NAME.fullmatch(self.name) and _PATH.fullmatch(self.mount)
        if not good or not (namespace is None or _PATH.fullmatch(namespace)):
            msg = (
                f"the mount {self.mount!r}, the key name {self.name!r} or the namespace {namespace!r} has characters "
                f"that none has. The form is {_FORM}"
            )
            raise FormatError(msg)
        object.__setattr__(self, "namespace", namespace)
        if self.address is not None:
            object.__setattr__(self, "address", checked_address(self.address, "the address"))
        for name in ("ca_cert", "client_cert", "client_key"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, os.path.abspath(os.fspath(getattr(self, name))))

    @classmethod
    def from_uri(cls, uri: str) -> Vault:
        """Parse `hcvault://transit/keys/etl?address=https://vault.example:8200&namespace=team&role=...`.

        The mount, the word `keys` and the name, then any arguments of the class by their names.
        """
        path, _, query = uri.removeprefix(f"{cls.provider}://").partition("?")
        mount, _, name = path.rpartition("/keys/")
        settings: dict[str, Any] = dict(parse_qsl(query))
        verify = settings.get("verify", "true")
        if not mount or not settings.keys() <= set(_SETTINGS) or verify not in {"true", "false"}:
            # No values: someone may have written a token there.
            named = f" with {', '.join(map(repr, settings))}" if settings else ""
            msg = (
                f"'{cls.provider}://{path}'{named} is not of the form {_FORM}, where verify is true or false. Tokens "
                "and secret ids have no place in it; they belong into the environment (VAULT_TOKEN)"
            )
            raise FormatError(msg)
        if "verify" in settings:
            settings["verify"] = verify == "true"
        return replace(cls(name, mount), **settings)

    def generate_data_key(self, context: Mapping[str, str]) -> DataKey:
        """Call `datakey/plaintext`; where that does not bind the context, also `encrypt`.

        Raises:
            KeyAccessError: not allowed, no such key, or a key or server that does not take associated data.
            KmsUnavailableError: sealed, or no answer after all retries.
        """
        data, bound = self._call("GenerateDataKey", context, bits=8 * DATA_KEY_BYTES)
        material = self._decoded("GenerateDataKey", data.get("plaintext"))
        if len(material) != DATA_KEY_BYTES:
            raise self._no_vault("GenerateDataKey")
        if bound:
            return DataKey(material, [self._wrapped("GenerateDataKey", data)])
        with DataKey(material) as fresh:
            return DataKey(fresh.material, [self.wrap(fresh, context)])

    def wrap(self, data_key: DataKey, context: Mapping[str, str]) -> WrappedKey:
        """Call `encrypt` with the data key. Raises as `generate_data_key`."""
        plaintext = base64.b64encode(data_key.material).decode()
        # With `create`, `encrypt` makes a key that is not there. A key of this type it does not make, so a misspelt
        # name stays an error; for a key that is there, the type says nothing.
        data, _ = self._call("Encrypt", context, plaintext=plaintext, type="ecdsa-p256")
        return self._wrapped("Encrypt", data)

    def unwrap(self, wrapped: WrappedKey, context: Mapping[str, str]) -> DataKey:
        """Call `decrypt` under this key.

        Raises:
            WrongKeyError, TamperedError, KeyAccessError, KmsUnavailableError.
        """
        return self._unwrap(wrapped, context, "--key")

    def rewrap(self, wrapped: WrappedKey, context: Mapping[str, str], to: KeyProvider) -> WrappedKey:
        """Call `decrypt`, and wrap the data key under `to`; it is in this process's memory meanwhile.

        To the same key, that wraps it under the newest version. Transit has a `rewrap` that would do it inside, but
        that takes no associated data, so it cannot open what is bound to a context.

        Raises:
            WrongKeyError, TamperedError, KeyAccessError, KmsUnavailableError.
        """
        with self._unwrap(wrapped, context, "--from") as data_key:
            return to.wrap(data_key, context)

    def may_open(self, wrapped: WrappedKey) -> bool:
        """Whether the wrapped key names this mount and key; it does not name the server, which may have moved."""
        return (wrapped.provider, wrapped.kms_key) == (self.provider, self._kms_key)

    def check(
        self,
        context: Mapping[str, str],
        need: Need = Need.GENERATE,
        *,
        sample: WrappedKey | None = None,
        to: KeyProvider | None = None,
    ) -> str | None:
        """Try the key. Without a sample, Vault is asked whether the policy allows it (`sys/capabilities-self`)."""
        if sample is not None or need not in {Need.UNWRAP, Need.REWRAP}:
            return super().check(context, need, sample=sample, to=to)
        path = self._path("Decrypt")
        answer = connection(Server.of(self)).post("sys/capabilities-self", {"paths": [path]})
        found = (answer.document.get("data") or {}).get(path) if answer.status == OK else None
        if not isinstance(found, list):
            return "no wrapped key is there to try it on, and Vault does not tell what the token may do"
        if not {"update", "root"} & set(found):
            raise self._refused("Decrypt", path, Answer(FORBIDDEN, {"errors": ["its policies lack that"]}))
        return None

    def permission(self, need: Need) -> str:
        """Return the capability and its path."""
        if need is Need.REWRAP:
            return f"update on {self._path('Decrypt')}"
        return NOTHING if need is Need.NAME else f"update on {self._path(need.value)}"

    def principal(self) -> str | None:
        """Return the token's display name and policies, as `auth/token/lookup-self` tells them; or None."""
        try:
            answer = connection(Server.of(self)).post("auth/token/lookup-self", None)
        except EnvelopeError:
            return None
        data = answer.document.get("data")
        if answer.status != OK or not isinstance(data, dict):
            return None
        policies = data.get("policies")
        return f"{data.get('display_name')} ({', '.join(map(str, policies if isinstance(policies, list) else ()))})"

    def full_name(self) -> str:
        """Return `hcvault://MOUNT/keys/NAME`, without the server; no call is made."""
        return self._kms_key

    def state(self) -> KeyState:
        """Read the key's description, for which the token needs `read` on it. Raises nothing of Vault's."""
        kms_calls.counts["ReadKey"] += 1
        path = f"{self.mount}/keys/{self.name}"
        try:
            answer = connection(Server.of(self)).get(path)
        except EnvelopeError as error:
            return KeyState(UNKNOWN, str(error))
        said = f"Vault says {answer.status}: {answer.said or 'no more'}"
        if answer.status == FORBIDDEN:
            needed = f'the token needs a policy with path "{path}" {{ capabilities = ["read"] }}'
            return KeyState(NOT_PERMITTED, f"not allowed to read {path}: {needed}. {said}")
        if answer.status == _NOT_FOUND:
            return KeyState(NOT_FOUND, said)
        data = answer.document.get("data")
        if answer.status != OK or not isinstance(data, dict):
            return KeyState(UNKNOWN, said)
        return KeyState(DISABLED if data.get("soft_deleted") else ENABLED)

    def __str__(self) -> str:
        """Return the URI."""
        settings = {name: getattr(self, name) for name in _SETTINGS if getattr(self, name) is not None}
        if self.verify is not None:
            settings["verify"] = str(self.verify).lower()
        return self._kms_key + (f"?{urlencode(settings, safe=':/')}" if settings else "")

    @property
    def _kms_key(self) -> str:
        return f"{self.provider}://{self.mount}/keys/{self.name}"

    def _path(self, operation: str) -> str:
        return f"{self.mount}/{_ENDPOINT[operation]}/{self.name}"

    def _unwrap(self, wrapped: WrappedKey, context: Mapping[str, str], option: str) -> DataKey:
        data, _ = self._call("Decrypt", context, ciphertext=self._ciphertext(wrapped, option))
        material = self._decoded("Decrypt", data.get("plaintext"))
        if len(material) != DATA_KEY_BYTES:
            msg = (
                f"what {wrapped.kms_key} decrypted has {len(material)} bytes, so it is no data key: "
                "the key file was changed. Restore it from a copy"
            )
            raise TamperedError(msg)
        return DataKey(material, [wrapped])

    def _ciphertext(self, wrapped: WrappedKey, option: str) -> str:
        if not self.may_open(wrapped):
            msg = (
                f"the data key was wrapped by {wrapped.kms_key}, which is not {self._kms_key}. "
                f"Give that key with {option}"
            )
            raise WrongKeyError(msg)
        if not _CIPHERTEXT.fullmatch(wrapped.wrapped):
            msg = (
                f"the wrapped data key of {wrapped.kms_key} is nothing that Vault wrapped (vault:v1:...): the key file "
                "was changed. Restore it from a copy"
            )
            raise TamperedError(msg)
        return wrapped.wrapped.decode()

    def _wrapped(self, operation: str, data: Mapping[str, Any]) -> WrappedKey:
        ciphertext = str(data.get("ciphertext")).encode()
        if not _CIPHERTEXT.fullmatch(ciphertext):
            raise self._no_vault(operation)
        return WrappedKey(self.provider, self._kms_key, ciphertext)

    def _decoded(self, operation: str, text: object) -> bytes:
        try:
            return base64.b64decode(str(text), validate=True)
        except (binascii.Error, ValueError):
            pass  # the error would keep the text
        raise self._no_vault(operation)

    def _call(self, operation: str, context: Mapping[str, str], **body: Any) -> tuple[dict[str, Any], bool]:
        """Return the answer's data, and whether the server took the associated data into account.

        Only `datakey` may leave it out, since its wrapped form can be thrown away.
        """
        kms_calls.counts[operation] += 1
        path = self._path(operation)
        body["associated_data"] = base64.b64encode(encode_context(context)).decode()
        answer = connection(Server.of(self)).post(path, body)
        if answer.status != OK:
            raise self._refused(operation, path, answer)
        data, warnings = answer.document.get("data"), answer.document.get("warnings") or ()
        if not isinstance(data, dict):
            raise self._no_vault(operation)
        bound = not any("unrecognized parameters" in str(said) and "associated_data" in str(said) for said in warnings)
        if not bound and operation != "GenerateDataKey":
            msg = (
                f"the server of {self} does not take associated data at {path}, so it cannot bind the encryption "
                "context. Use OpenBao 2.5 or later, or HashiCorp Vault 1.13 or later"
            )
            raise KeyAccessError(msg)
        return data, bound

    def _no_vault(self, operation: str) -> EnvelopeError:
        return KmsUnavailableError(
            f"what is at {Server.of(self).address} does not answer as Vault does to {self._path(operation)}. Check "
            "the address, and whether a proxy is in the way"
        )

    def _refused(  # noqa: PLR0911  # one for each answer
        self, operation: str, path: str, answer: Answer
    ) -> EnvelopeError:
        said = f"Vault says {answer.status}: {answer.said or 'no more'}"
        if answer.status == FORBIDDEN:
            absent = ", or there is no such key" if operation == "Encrypt" else ""
            return KeyAccessError(
                f'not allowed to use {path}: the token needs a policy with path "{path}" {{ capabilities = ["update"] '
                f"}}, or has ended (VAULT_TOKEN, VAULT_NAMESPACE){absent}. {said}"
            )
        if operation == "Decrypt" and re.search("authentication failed|invalid ciphertext", answer.said):
            return TamperedError(
                f"Vault key {self._kms_key} does not open the wrapped data key: the key file or its encryption context "
                "was changed after it was written, or this is a key of the same name on another server or in another "
                f"namespace. Restore the key file from a copy. {said}"
            )
        if "soft-deleted" in answer.said:
            return KeyAccessError(
                f"Vault key {self._kms_key} is disabled: nothing it wrapped opens until it is restored (bao write -f "
                f"{self.mount}/keys/{self.name}/soft-delete-restore). {said}"
            )
        if "too old" in answer.said:
            return KeyAccessError(
                f"the data key was wrapped by an old version of Vault key {self._kms_key}, which its "
                f"min_decryption_version shuts out. Lower that (vault write {self.mount}/keys/{self.name}/config "
                f"min_decryption_version=...) until the key file is rewrapped. {said}"
            )
        if "non-AEAD" in answer.said or "associated" in answer.said or "derivation" in answer.said:
            return KeyAccessError(
                f"Vault key {self._kms_key} takes no associated data, or is a derived key. Make one of type "
                f"aes256-gcm96 (vault write -f {self.mount}/keys/NAME). {said}"
            )
        if re.search("not found|no handler|not supported for this operation|unsupported path", answer.said):
            where = f"{Server.of(self).address}{self._in_namespace()}"
            return KeyAccessError(f"there is no Vault key {self._kms_key} at {where}. Check mount and name. {said}")
        return KeyAccessError(f"Vault refused {path}. {said}")

    def _in_namespace(self) -> str:
        namespace = Server.of(self).namespace
        return f" in namespace {namespace}" if namespace else ""
