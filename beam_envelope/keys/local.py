"""LocalKms: keys in a file of one's own, for trying out, tests and machines with no network. It is no KMS.

Whoever can read the keyring file can open everything that was wrapped under its keys, and nothing records who did.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import secrets
import stat
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, ClassVar, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from beam_envelope.errors import FormatError, KeyAccessError, TamperedError, WrongKeyError
from beam_envelope.keys.context import encode_context
from beam_envelope.keys.provider import DATA_KEY_BYTES, DataKey, KeyProvider, Need, WrappedKey, kms_calls
from beam_envelope.keys.state import ENABLED, NOT_FOUND, UNKNOWN, KeyState

_FORMAT: Final = "beam-envelope keyring"
_VERSION: Final = 1
_NONCE_BYTES: Final = 12
_MAX_KEYRING_BYTES: Final = 1 << 20
_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO


@dataclass(frozen=True)
class LocalKms(KeyProvider):
    """A named key in a keyring file of mode 0600.

    A wrapped key is `nonce 12 | AES-256-GCM ciphertext 32 | tag 16` (NIST SP 800-38D) under the named key, a random
    nonce each, with the key's full name and the encryption context as additional authenticated data.

    Args:
        path: the keyring file; `generate_local_key` (or `beam-envelope keygen`) makes one.
        name: which of its keys to use.

    Raises:
        KeyAccessError: (on use) the file is missing or readable by others, or lacks the key.
        FormatError: (on use) the file is not a keyring.
    """

    path: str
    name: str = "default"

    provider: ClassVar[str] = "local-kms"

    def __post_init__(self) -> None:
        """Fix the path, so that it means the same on a worker with another working directory."""
        object.__setattr__(self, "path", os.path.abspath(os.fspath(self.path)))

    @classmethod
    def from_uri(cls, uri: str) -> LocalKms:
        """Parse `local-kms://path/to/keyring.json` or `local-kms://keyring.json?name=pii`."""
        rest = uri.removeprefix(f"{cls.provider}://")
        path, _, query = rest.partition("?")
        label, _, name = query.partition("=")
        if not path or (query and (label != "name" or not name)):
            msg = f"{uri!r} is not of the form local-kms://PATH or local-kms://PATH?name=NAME"
            raise FormatError(msg)
        return cls(path, name or "default")

    def generate_data_key(self, context: Mapping[str, str]) -> DataKey:
        """Make a data key with the system's random generator and wrap it. Raises as the class says."""
        kms_calls.counts["GenerateDataKey"] += 1
        material = bytearray(secrets.token_bytes(DATA_KEY_BYTES))
        wrapped = self._wrap(material, context)
        key = DataKey(material, [wrapped])
        material[:] = bytes(DATA_KEY_BYTES)
        return key

    def wrap(self, data_key: DataKey, context: Mapping[str, str]) -> WrappedKey:
        """Wrap an existing data key under this key too."""
        kms_calls.counts["Encrypt"] += 1
        return self._wrap(data_key.material, context)

    def unwrap(self, wrapped: WrappedKey, context: Mapping[str, str]) -> DataKey:
        """Open a wrapped key. Raises WrongKeyError, TamperedError, and as the class says."""
        kms_calls.counts["Decrypt"] += 1
        full_name, key = self._key()
        if (wrapped.provider, wrapped.kms_key) != (self.provider, full_name):
            msg = (
                f"the data key was wrapped by {wrapped.provider} key {wrapped.kms_key}; {self} is {full_name}. "
                "Give the keyring and name that it was written with"
            )
            raise WrongKeyError(msg)
        nonce, sealed = wrapped.wrapped[:_NONCE_BYTES], wrapped.wrapped[_NONCE_BYTES:]
        try:
            material = AESGCM(key).decrypt(nonce, sealed, _aad(full_name, context))
            return DataKey(material, [wrapped])
        except (InvalidTag, ValueError):
            msg = (
                f"the key {full_name} does not open the wrapped data key: the wrapped key or its encryption context "
                "was changed after it was written. Restore the key file from a copy"
            )
            raise TamperedError(msg) from None

    def rewrap(self, wrapped: WrappedKey, context: Mapping[str, str], to: KeyProvider) -> WrappedKey:
        """Unwrap here and wrap under `to`; the data key is in this process's memory meanwhile."""
        with self.unwrap(wrapped, context) as data_key:
            return to.wrap(data_key, context)

    def may_open(self, wrapped: WrappedKey) -> bool:
        """Whether the wrapped key names this key."""
        if wrapped.provider != self.provider:
            return False
        try:
            return wrapped.kms_key == self._key()[0]
        except KeyAccessError:
            return wrapped.kms_key.rpartition("/")[0] == self.name

    def full_name(self) -> str:
        """Return `name/id`, from the keyring. Raises KeyAccessError, FormatError."""
        return self._key()[0]

    def state(self) -> KeyState:
        """Look whether the keyring has the key. Raises nothing."""
        return local_key_state(self.path, self.name)

    def check(
        self,
        context: Mapping[str, str],
        need: Need = Need.GENERATE,
        *,
        sample: WrappedKey | None = None,
        to: KeyProvider | None = None,
    ) -> str | None:
        """Try the key; whoever reads the keyring may do everything, so that needs no sample."""
        if sample is None and need in {Need.UNWRAP, Need.REWRAP}:
            need = Need.NAME
        return super().check(context, need, sample=sample, to=to)

    def permission(self, _need: Need) -> str:
        """Return what every use of the key takes."""
        return "read the keyring"

    def __str__(self) -> str:
        """Return the URI."""
        suffix = "" if self.name == "default" else f"?name={self.name}"
        return f"{self.provider}://{self.path}{suffix}"

    def _wrap(self, material: bytearray, context: Mapping[str, str]) -> WrappedKey:
        full_name, key = self._key()
        nonce = secrets.token_bytes(_NONCE_BYTES)
        sealed = AESGCM(key).encrypt(nonce, material, _aad(full_name, context))
        return WrappedKey(self.provider, full_name, nonce + sealed)

    def _key(self) -> tuple[str, bytes]:
        """Return the key's full name, `name/id`, and its bytes, read anew: a keyring is small, and may have changed."""
        for entry in _read_keyring(Path(self.path)):
            if entry["name"] == self.name:
                return _full_name(entry), base64.b64decode(entry["key"], validate=True)
        msg = (
            f"the keyring {self.path} has no key named {self.name!r}. "
            f"Make one: beam-envelope keygen --key '{self}', or name one that it has"
        )
        raise KeyAccessError(msg)


def local_key_state(path: str, name: str) -> KeyState:
    """Look whether a keyring has a key of that name, or of that full name, `name/id`. Raises nothing."""
    try:
        names = {
            text for entry in _read_keyring(Path(path)) for text in (entry["name"], f"{entry['name']}/{entry['id']}")
        }
    except (KeyAccessError, FormatError) as error:
        return KeyState(UNKNOWN, str(error))
    if name in names:
        return KeyState(ENABLED)
    return KeyState(NOT_FOUND, f"the keyring {path} has no key {name}")


def generate_local_key(key: LocalKms) -> str:
    """Add a new random key to a keyring, making the file (mode 0600) if there is none, and return its full name.

    The new file replaces the old in one step, so a reader sees one or the other; two callers wait for each other.

    Raises:
        KeyAccessError: the keyring has a key of that name already, or others can read it.
        FormatError: the file is something else.
    """
    import fcntl  # noqa: PLC0415  # POSIX only; the rest of the package imports without it

    path = Path(key.path)
    path.parent.mkdir(parents=True, exist_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        entries = _read_keyring(path) if path.exists() else []
        if any(entry["name"] == key.name for entry in entries):
            msg = (
                f"the keyring {path} already has a key named {key.name!r}; replacing it would make all that it wrapped "
                f"unreadable. Name another: beam-envelope keygen --key 'local-kms://{path}?name=NEW'"
            )
            raise KeyAccessError(msg)
        entry = {
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "id": uuid.uuid4().hex,
            "key": base64.b64encode(secrets.token_bytes(DATA_KEY_BYTES)).decode(),
            "name": key.name,
        }
        document = {"format": _FORMAT, "keys": [*entries, entry], "version": _VERSION}
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                json.dump(document, stream, indent=2)
                stream.write("\n")
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        os.fsync(directory)
    finally:
        os.close(directory)
    return f"{key.name}/{entry['id']}"


def _full_name(entry: Mapping[str, str]) -> str:
    return f"{entry['name']}/{entry['id']}"


def _aad(full_name: str, context: Mapping[str, str]) -> bytes:
    name = full_name.encode()
    return len(name).to_bytes(4, "big") + name + encode_context(context)


def _read_keyring(path: Path) -> list[dict[str, str]]:
    try:
        with path.open("rb") as stream:
            mode = os.fstat(stream.fileno()).st_mode
            if os.name == "posix" and mode & _OTHERS:
                msg = (
                    f"the keyring {path} can be read by others (mode {stat.S_IMODE(mode):04o}). Run: chmod 600 '{path}'"
                )
                raise KeyAccessError(msg)
            raw = stream.read(_MAX_KEYRING_BYTES + 1)
    except FileNotFoundError:
        msg = f"there is no keyring at {path}. Make one: beam-envelope keygen --key 'local-kms://{path}'"
        raise KeyAccessError(msg) from None
    except PermissionError:
        msg = f"the keyring {path} may not be read by this user. Run the job as its owner"
        raise KeyAccessError(msg) from None
    except OSError as error:
        msg = f"the keyring {path} cannot be read ({error.strerror}). Name another, or make one: beam-envelope keygen"
        raise KeyAccessError(msg) from None
    entries = _parse_keyring(raw)
    if entries is None:
        msg = (
            f"{path} is not a keyring of version {_VERSION}. Make one: beam-envelope keygen --key local-kms://NEW_PATH"
        )
        raise FormatError(msg)
    return entries


def _parse_keyring(raw: bytes) -> list[dict[str, str]] | None:
    """Return the entries, or None; an error would risk showing a key in its text or its context."""
    if len(raw) > _MAX_KEYRING_BYTES:
        return None
    try:
        document: Any = json.loads(raw)
        entries = document["keys"]
        good = (
            document["format"] == _FORMAT
            and document["version"] == _VERSION
            and all(
                isinstance(entry["name"], str)
                and isinstance(entry["id"], str)
                and len(base64.b64decode(entry["key"], validate=True)) == DATA_KEY_BYTES
                for entry in entries
            )
        )
    except (ValueError, TypeError, KeyError, RecursionError, binascii.Error):
        return None
    return entries if good else None
