"""What a KMS is to us: data keys, wrapped keys, and the interface that every key provider implements."""

from __future__ import annotations

import abc
import enum
import secrets
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import ClassVar, Final, NoReturn

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from beam_envelope.keys.state import UNKNOWN, KeyState

DATA_KEY_BYTES: Final = 32
"""The length of every data key that is made here."""
DATA_KEY_SIZES: Final = (16, 24, DATA_KEY_BYTES)
"""The lengths of data keys that may be met: AWS Encryption SDK messages can have AES-128 and AES-192 keys."""
KEY_ID_BYTES: Final = 16
NOTHING: Final = "nothing"
"""The permission of what needs none."""
_KEY_ID_INFO: Final = b"beam-envelope/key-id@v1\x00"


@dataclass(frozen=True)
class WrappedKey:
    """A data key encrypted by a KMS key: safe to store anywhere.

    Attributes:
        provider: which kind of KMS wrapped it (`aws-kms`, `local-kms`, ...).
        kms_key: the KMS key's full name, as the KMS gave it (for AWS, the key's ARN).
        wrapped: the bytes that the KMS returned.
    """

    provider: str
    kms_key: str
    wrapped: bytes


class DataKey:
    """Key material, erasable, and the wrapped forms that KMSs can open again.

    Use it as a context manager: leaving the block erases the bytes. It cannot be pickled or copied by accident, and
    its `repr` shows only its id. What Python cannot erase is told in docs/security.md.
    """

    __slots__ = ("_key_id", "_material", "wrapped_keys")

    def __init__(self, material: bytes | bytearray, wrapped_keys: Sequence[WrappedKey] = ()) -> None:
        """Take a copy of `material`.

        Raises:
            ValueError: `material` is not 32 bytes, nor 16 or 24, as older messages of other software have it.
        """
        if len(material) not in DATA_KEY_SIZES:
            msg = f"a data key has 16, 24 or {DATA_KEY_BYTES} bytes; the KMS returned {len(material)}"
            raise ValueError(msg)
        self._material = bytearray(material)
        self._key_id: bytes | None = None
        self.wrapped_keys = tuple(wrapped_keys)

    @property
    def material(self) -> bytearray:
        """The key bytes themselves, not a copy: pass them to a cipher and keep no reference.

        Raises:
            ValueError: the key was erased.
        """
        if not self._material:
            msg = "this data key was erased"
            raise ValueError(msg)
        return self._material

    @property
    def key_id(self) -> bytes:
        """16 bytes that name this data key without revealing it: HKDF-Expand-SHA512 (RFC 5869 2.3), own label."""
        if self._key_id is None:
            kdf = HKDFExpand(hashes.SHA512(), KEY_ID_BYTES, _KEY_ID_INFO)
            self._key_id = kdf.derive(self.material)
        return self._key_id

    @property
    def closed(self) -> bool:
        """Whether the bytes were erased."""
        return not self._material

    def duplicate(self) -> DataKey:
        """Return an independent copy, for a second owner that erases it on its own."""
        twin = DataKey(self.material, self.wrapped_keys)
        twin._key_id = self._key_id  # the same class
        return twin

    def close(self) -> None:
        """Overwrite the key bytes with zeros and drop them. May be called again."""
        self._material[:] = bytes(len(self._material))
        self._material = bytearray()

    def __enter__(self) -> DataKey:
        """Return the key itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Erase the key."""
        self.close()

    def __del__(self) -> None:
        """Erase a key that nobody closed."""
        if hasattr(self, "_material"):
            self.close()

    def __repr__(self) -> str:
        """Show the id and the KMS keys, never the bytes."""
        if self.closed:
            return "<DataKey erased>"
        names = ", ".join(wrapped.kms_key for wrapped in self.wrapped_keys)
        return f"<DataKey {self.key_id.hex()} under [{names}]>"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse to pickle or copy: key material must not travel."""
        msg = "a DataKey cannot be pickled or copied; send its wrapped keys and unwrap them where they are needed"
        raise TypeError(msg)


class KmsCalls(threading.local):
    """Counts of the KMS requests that this thread made, by operation, for metrics and tests."""

    def __init__(self) -> None:
        """Start each thread at zero."""
        self.counts: Counter[str] = Counter()


kms_calls: Final = KmsCalls()


class Need(enum.Enum):
    """What a job may need to do with a KMS key; each value is the name under which KMS calls are counted."""

    GENERATE = "GenerateDataKey"
    """Make data keys: the first key of a writer."""
    WRAP = "Encrypt"
    """Wrap what another key made: every other key of a writer; a rotation's new key in another KMS."""
    UNWRAP = "Decrypt"
    """Open data keys: a reader."""
    REWRAP = "ReEncrypt"
    """Have the KMS wrap a data key by another key: a rotation."""
    NAME = "DescribeKey"
    """Learn the full name of a key that was named by an alias or a bare id: a rotation."""


class KeyProvider(abc.ABC):
    """One KMS key, and how to reach it.

    Implementations hold configuration only, are hashable and equal by it, pickle cleanly, and build their client once
    per process. They are safe to use from several threads.
    """

    provider: ClassVar[str]
    """The name that key files record, which is also the scheme of the URI."""

    @abc.abstractmethod
    def generate_data_key(self, context: Mapping[str, str]) -> DataKey:
        """Have the KMS make a new data key, bound to `context`.

        Raises:
            KeyAccessError: the key cannot be used by this caller, or at all.
            KmsUnavailableError: no answer after all retries.
        """

    @abc.abstractmethod
    def wrap(self, data_key: DataKey, context: Mapping[str, str]) -> WrappedKey:
        """Wrap an existing data key under this KMS key too, so that either opens it. Raises as above."""

    @abc.abstractmethod
    def unwrap(self, wrapped: WrappedKey, context: Mapping[str, str]) -> DataKey:
        """Have the KMS decrypt a wrapped key, under this KMS key and no other.

        Raises:
            WrongKeyError: another KMS key wrapped it.
            TamperedError: it was changed, or `context` is not the one it is bound to.
            KeyAccessError, KmsUnavailableError: as above.
        """

    @abc.abstractmethod
    def rewrap(self, wrapped: WrappedKey, context: Mapping[str, str], to: KeyProvider) -> WrappedKey:
        """Wrap what this key wrapped under the key `to` instead; inside the KMS where it can. Raises as `unwrap`."""

    @abc.abstractmethod
    def may_open(self, wrapped: WrappedKey) -> bool:
        """Whether this key may be the one that wrapped it, as far as can be told without a call."""

    def with_options(self) -> KeyProvider:
        """Return the key with the pipeline's options for what it does not say itself; it then takes them along."""
        return self

    def full_name(self) -> str:
        """Return the KMS key's full name, as wrapped keys record it (`WrappedKey.kms_key`).

        Raises:
            KeyAccessError, KmsUnavailableError: as above; a KMS may have to be asked.
        """
        with self.generate_data_key({}) as data_key:
            return data_key.wrapped_keys[0].kms_key

    def check(
        self,
        context: Mapping[str, str],
        need: Need = Need.GENERATE,
        *,
        sample: WrappedKey | None = None,
        to: KeyProvider | None = None,
    ) -> str | None:
        """Try the key before a job starts, for one need; nothing is kept.

        Args:
            context: the encryption context; of a sample, the one that it is bound to.
            need: what the job needs. Each role is asked for its own permission only.
            sample: a wrapped key of the dataset, which opening and rewrapping are tried on.
            to: the key that a rotation goes to.

        Returns:
            None if the key can be used so, or else why that could not be told.

        Raises:
            KeyAccessError: names the permission that is missing, and on which key.
            KmsUnavailableError: no answer after all retries.
            WrongKeyError, TamperedError: as `unwrap`, of the sample.
        """
        if need is Need.GENERATE:
            self.generate_data_key(context).close()
        elif need is Need.WRAP:
            with DataKey(secrets.token_bytes(DATA_KEY_BYTES)) as fresh:
                self.wrap(fresh, context)
        elif need is Need.NAME:
            self.full_name()
        elif sample is None:
            return "no wrapped key is there to try it on"
        elif need is Need.UNWRAP:
            self.unwrap(sample, context).close()
        else:
            self.rewrap(sample, context, self if to is None else to)
        return None

    def permission(self, need: Need) -> str:
        """Return what a caller must be allowed for a need, in the KMS's own words."""
        return need.value

    def rewraps_inside(self, _to: KeyProvider) -> bool:
        """Whether `rewrap` to that key happens inside the KMS; if not, it takes an unwrap here and a wrap there."""
        return False

    def principal(self) -> str | None:
        """Return who the KMS takes this process for, or None if it does not say. Raises nothing."""
        return None

    def state(self) -> KeyState:
        """Ask the KMS in what state the key is, without using it; what goes wrong is in the answer."""
        return KeyState(UNKNOWN, f"{self.provider} keys cannot be asked")

    @abc.abstractmethod
    def __str__(self) -> str:
        """Return the URI that `open_key` takes."""


def as_sequence(keys: object) -> Sequence[object]:
    """Return `keys` as a sequence: a single key or URI becomes a sequence of one."""
    if isinstance(keys, (list, tuple)):
        return keys
    return (keys,)
