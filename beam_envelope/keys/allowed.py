"""Allow-lists: which KMS keys may open data, where a reader cannot name each. They are for reading only.

Each looks at the name that a key file records before anything is sent to a KMS, and then asks for that key and no
other. So the key file chooses among the keys that the caller allows, and never beyond them.
"""

from __future__ import annotations

import abc
import fnmatch
import glob
import os
import re
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Final, NoReturn
from urllib.parse import parse_qsl, urlencode

from beam_envelope.errors import FormatError, KeyAccessError, WrongKeyError
from beam_envelope.keys import cache
from beam_envelope.keys.aws import AwsKms
from beam_envelope.keys.local import LocalKms
from beam_envelope.keys.provider import DataKey, KeyProvider, WrappedKey
from beam_envelope.keys.vault import Vault

ALIASES_TTL_S: Final = 60.0
"""How long a process remembers which aliases a KMS key has."""
_MAX_REMEMBERED: Final = 1000

_KEY_ARN: Final = re.compile(
    r"arn:(?P<partition>[a-z-]{1,32}):kms:(?P<region>[a-z0-9-]{1,32}):(?P<account>[0-9]{12}):"
    r"key/(?P<id>[A-Za-z0-9-]{1,64})"
)
_ACCOUNT: Final = re.compile("[0-9]{12}")
_REGION: Final = re.compile("[a-z0-9-]{1,32}")
_ALIAS_GLOB: Final = re.compile(r"alias/[A-Za-z0-9/_*?-]{1,249}")
_MULTI_REGION: Final = "mrk-"
_FORM: Final = (
    "aws-kms://*?account=ACCOUNT[&account=...][&region=...][&alias=data-*][&multi_region=true][&partition=...]"
)


class Allowed(KeyProvider):
    """Which KMS keys may open data. It has no key to write with."""

    @abc.abstractmethod
    def key_of(self, wrapped: WrappedKey) -> KeyProvider | None:
        """Return the key that a wrapped key names, if it is on the list as far as can be told without a call."""

    def allows(self, wrapped: WrappedKey) -> bool:
        """Whether the key that a wrapped key names is on the list; a KMS may have to be asked for its names.

        Raises:
            KeyAccessError, KmsUnavailableError: from the KMS.
        """
        return self.key_of(wrapped) is not None

    def may_open(self, wrapped: WrappedKey) -> bool:
        """Whether the key that a wrapped key names is on the list, as far as can be told without a call."""
        return self.key_of(wrapped) is not None

    def unwrap(self, wrapped: WrappedKey, context: Mapping[str, str]) -> DataKey:
        """Check the name, then have that key decrypt, pinned.

        Raises:
            WrongKeyError: it is not on the list; nothing was asked to decrypt.
            TamperedError, KeyAccessError, KmsUnavailableError: as of the key.
        """
        return self._allowed(wrapped).unwrap(wrapped, context)

    def rewrap(self, wrapped: WrappedKey, context: Mapping[str, str], to: KeyProvider) -> WrappedKey:
        """Check the name, then have that key rewrap. Raises as `unwrap`."""
        return self._allowed(wrapped).rewrap(wrapped, context, to)

    def generate_data_key(self, context: Mapping[str, str]) -> DataKey:
        """Raise ValueError."""
        self._refuse_to_write()

    def wrap(self, data_key: DataKey, context: Mapping[str, str]) -> WrappedKey:
        """Raise ValueError."""
        self._refuse_to_write()

    def _allowed(self, wrapped: WrappedKey) -> KeyProvider:
        key = self.key_of(wrapped)
        if key is None or not self.allows(wrapped):
            msg = (
                f"the data key was wrapped by {wrapped.kms_key}, which is not among the keys allowed here: {self}. "
                "If it may open this, allow it or name it with --key"
            )
            raise WrongKeyError(msg)
        return key

    def _refuse_to_write(self) -> NoReturn:
        msg = f"{self} says which keys may open data, and is no key to write with. Name the key to write with"
        raise ValueError(msg)


@dataclass(frozen=True)
class AllowedKeys(Allowed):
    """The AWS KMS keys of some accounts, as `key=` of whatever reads: the account in the key's ARN is compared.

    Args:
        accounts: the AWS accounts, of 12 digits. At least one.
        regions: the regions. Default: any.
        aliases: globs of aliases, `data-*` or `alias/data-*`. Only a KMS key that has such an alias *now*, in its
            account and region, opens anything. KMS is asked for that (ListAliases) before it is asked to decrypt, once
            for each KMS key in `ALIASES_TTL_S`.
        multi_region: a multi-Region key (`mrk-...`) of a region that `regions` does not name is asked for under the
            same id in the first of `regions`, as the MRK discovery keyring of the AWS Encryption SDK does
            (awslabs/aws-encryption-sdk-specification, framework/aws-kms/aws-kms-mrk-discovery-keyring.md).
        partition: of the ARNs.
        profile, endpoint_url: as `AwsKms`.
        via: what else of `AwsKms` holds for all keys, such as a role; from the pipeline's options.

    Permissions: `kms:Decrypt` on the keys; with `aliases`, `kms:ListAliases`, which takes no key as its resource. KMS
    lists the aliases of the caller's own account only.

    Raises:
        ValueError, TypeError: an argument is not of the right form.
    """

    accounts: tuple[str, ...]
    regions: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    multi_region: bool = False
    partition: str = "aws"
    profile: str | None = None
    endpoint_url: str | None = None
    via: AwsKms | None = None

    provider: ClassVar[str] = AwsKms.provider

    def __post_init__(self) -> None:
        """Check the lists."""
        for name in ("accounts", "regions", "aliases"):
            object.__setattr__(self, name, _several(name, getattr(self, name)))
        prefixed = (f"alias/{alias.removeprefix('alias/')}" for alias in self.aliases)
        object.__setattr__(self, "aliases", tuple(prefixed))
        if not self.accounts or not all(map(_ACCOUNT.fullmatch, self.accounts)):
            raise ValueError(f"accounts are AWS account ids of 12 digits, at least one, not {list(self.accounts)}")
        if not all(map(_REGION.fullmatch, self.regions)):
            raise ValueError(f"regions are names of AWS regions such as eu-west-1, not {list(self.regions)}")
        if not all(map(_ALIAS_GLOB.fullmatch, self.aliases)):
            raise ValueError(f"aliases are globs such as data-*, not {list(self.aliases)}")
        if self.multi_region and not self.regions:
            raise ValueError("multi_region needs regions: a multi-Region key is asked for in the first of them")

    @classmethod
    def from_uri(cls, uri: str) -> AllowedKeys:
        """Parse `aws-kms://*?account=111122223333&region=eu-west-1&alias=data-*&multi_region=true`; names repeat."""
        name, _, query = uri.removeprefix(f"{cls.provider}://").partition("?")
        pairs = parse_qsl(query, keep_blank_values=True)
        lists = {"account": "accounts", "region": "regions", "alias": "aliases"}
        several = {given: tuple(value for label, value in pairs if label == each) for each, given in lists.items()}
        rest = [(label, value) for label, value in pairs if label not in lists]
        settings = dict(rest)
        multi = settings.pop("multi_region", "false")
        known = settings.keys() <= {"partition", "profile", "endpoint_url"} and all(settings.values())
        if name != "*" or not known or multi not in {"true", "false"} or len(dict(rest)) < len(rest):
            raise FormatError(f"{uri!r} is not of the form {_FORM}")
        try:
            return cls(**several, multi_region=multi == "true", **settings)  # type: ignore[arg-type]  # by name
        except ValueError as error:
            raise FormatError(f"{uri!r}: {error}. The form is {_FORM}") from None

    def key_of(self, wrapped: WrappedKey) -> AwsKms | None:
        """Return the key, by the ARN that is to be asked for; the aliases are still to be compared."""
        arn = _KEY_ARN.fullmatch(wrapped.kms_key)
        if wrapped.provider != self.provider or arn is None or arn["partition"] != self.partition:
            return None
        if arn["account"] not in self.accounts:
            return None
        region = arn["region"]
        if self.regions and region not in self.regions:
            if not self.multi_region or not arn["id"].startswith(_MULTI_REGION):
                return None
            region = self.regions[0]
        name = f"arn:{arn['partition']}:kms:{region}:{arn['account']}:key/{arn['id']}"
        return replace(self.via or self._any_key(), key_id=name, region=region)

    def with_options(self) -> AllowedKeys:
        """Return the list with the pipeline's options for all its keys, such as a role."""
        key = self._any_key().with_options()
        return self if key == self._any_key() else replace(self, via=key)

    def _any_key(self) -> AwsKms:
        return AwsKms("any", profile=self.profile, endpoint_url=self.endpoint_url)

    def allows(self, wrapped: WrappedKey) -> bool:
        """Whether the key is on the list, and has one of the aliases, if there are any. Raises as `Allowed.allows`."""
        key = self.key_of(wrapped)
        if key is None or not self.aliases:
            return key is not None
        names = cache.shared(_Aliases, _Aliases).of(key)
        return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in self.aliases)

    def unwrap(self, wrapped: WrappedKey, context: Mapping[str, str]) -> DataKey:
        """Check the ARN, then call Decrypt with it as KeyId; that of the answer is compared. Raises as `Allowed`."""
        key = self._allowed(wrapped)
        # A replica answers with its own ARN, which has to be the one that was asked for.
        data_key = key.unwrap(replace(wrapped, kms_key=str(key.full_name())), context)
        data_key.wrapped_keys = (wrapped,)
        return data_key

    def rewrap(self, wrapped: WrappedKey, context: Mapping[str, str], to: KeyProvider) -> WrappedKey:
        """Check the ARN, then call ReEncrypt with it as SourceKeyId. Raises as `Allowed`."""
        key = self._allowed(wrapped)
        return key.rewrap(replace(wrapped, kms_key=str(key.full_name())), context, to)

    def __str__(self) -> str:
        """Return the URI."""
        pairs = [("account", account) for account in self.accounts]
        pairs += [("region", region) for region in self.regions]
        pairs += [("alias", alias.removeprefix("alias/")) for alias in self.aliases]
        pairs += [("multi_region", "true")] if self.multi_region else []
        pairs += [("partition", self.partition)] if self.partition != "aws" else []
        pairs += [(name, getattr(self, name)) for name in ("profile", "endpoint_url") if getattr(self, name)]
        return f"{self.provider}://*?{urlencode(pairs, safe=':/*?')}"


class _Aliases:
    """The aliases of KMS keys, as this process has heard of them; no key is in it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[AwsKms, tuple[float, tuple[str, ...]]] = {}

    def of(self, key: AwsKms) -> tuple[str, ...]:
        with self._lock:
            expires, names = self._known.get(key, (0.0, ()))
        if time.monotonic() >= expires:
            names = key.aliases()
            with self._lock:
                if len(self._known) >= _MAX_REMEMBERED:
                    self._known = {}
                self._known[key] = (time.monotonic() + ALIASES_TTL_S, names)
        return names

    def close(self) -> None:
        self._known = {}


@dataclass(frozen=True)
class AllowedVaultKeys(Allowed):
    """The keys of one transit engine whose names match: `hcvault://transit/keys/data-*`.

    Args:
        names: a glob of names; only `*` is special.
        vault: the mount, the server and so on. Its name does not matter.
    """

    names: str
    vault: Vault

    provider: ClassVar[str] = Vault.provider

    @classmethod
    def from_uri(cls, uri: str) -> AllowedVaultKeys:
        """Parse `hcvault://MOUNT/keys/GLOB?...`, with the settings of `Vault`."""
        place, question, query = uri.partition("?")
        mount, slash, names = place.rpartition("/")
        return cls(names, Vault.from_uri(f"{mount}{slash}{names.replace('*', 'x')}{question}{query}"))

    def key_of(self, wrapped: WrappedKey) -> Vault | None:
        """Return the key, if mount and name are right."""
        prefix = f"{self.provider}://{self.vault.mount}/keys/"
        name = wrapped.kms_key.removeprefix(prefix)
        pattern = ".*".join(map(re.escape, self.names.split("*")))
        if wrapped.provider != self.provider or name == wrapped.kms_key or not re.fullmatch(pattern, name):
            return None
        try:
            return replace(self.vault, name=name)
        except FormatError:  # no key can have such a name
            return None

    def __str__(self) -> str:
        """Return the URI."""
        _, question, query = str(self.vault).partition("?")
        return f"{self.provider}://{self.vault.mount}/keys/{self.names}{question}{query}"


@dataclass(frozen=True)
class AllowedLocalKeys(Allowed):
    """The keys of the keyrings in one folder: `local-kms://keys/*.json`. Each keyring may be read anew for a data key.

    Args:
        pattern: the folder, and a glob of the keyrings' names.
    """

    pattern: str

    provider: ClassVar[str] = LocalKms.provider

    def __post_init__(self) -> None:
        """Check the pattern, and fix the path."""
        folder, name = os.path.split(os.path.abspath(self.pattern))
        if "*" in folder or "*" not in name:
            msg = f"an allow-list of keyrings is a folder and a glob of their names (keys/*.json), not {self.pattern!r}"
            raise FormatError(msg)
        object.__setattr__(self, "pattern", os.path.join(folder, name))

    @classmethod
    def from_uri(cls, uri: str) -> AllowedLocalKeys:
        """Parse `local-kms://FOLDER/GLOB`."""
        return cls(uri.removeprefix(f"{cls.provider}://"))

    def key_of(self, wrapped: WrappedKey) -> LocalKms | None:
        """Return the key, if a keyring of the folder holds it."""
        if wrapped.provider != self.provider:
            return None
        folder, names = os.path.split(self.pattern)
        for path in sorted(glob.glob(os.path.join(glob.escape(folder), names.replace("[", "[[]")))):
            key = LocalKms(path, wrapped.kms_key.rpartition("/")[0])
            try:
                if Path(path).is_file() and key.full_name() == wrapped.kms_key:
                    return key
            except (KeyAccessError, FormatError):  # another's, or no keyring
                continue
        return None

    def __str__(self) -> str:
        """Return the URI."""
        return f"{self.provider}://{self.pattern}"


def _several(name: str, given: Iterable[str]) -> tuple[str, ...]:
    if isinstance(given, str) or not all(isinstance(each, str) for each in given):
        raise TypeError(f"{name} is a list of str, not {given!r}")
    return tuple(dict.fromkeys(given))
