"""Keys named by URI: `open_key("aws-kms://alias/etl")`, after Tink's convention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

from beam_envelope.errors import FormatError
from beam_envelope.keys.aws import AwsKms
from beam_envelope.keys.local import LocalKms
from beam_envelope.keys.provider import KeyProvider
from beam_envelope.keys.vault import Vault

Key: TypeAlias = "str | KeyProvider"
"""What every `key=` takes: a URI or a provider."""

_PROVIDERS: Final[dict[str, Callable[[str], KeyProvider]]] = {
    AwsKms.provider: AwsKms.from_uri,
    LocalKms.provider: LocalKms.from_uri,
    Vault.provider: Vault.from_uri,
}


def open_key(key: Key) -> KeyProvider:
    """Return the provider that a URI names, or a provider that is given, with the pipeline's options that concern it.

    No call is made to a KMS.

    Raises:
        FormatError: the URI's scheme or form is unknown.

    Example:
        >>> open_key("aws-kms://alias/etl?region=eu-west-1")
        AwsKms(key_id='alias/etl', region='eu-west-1', profile=None, endpoint_url=None, role_arn=None, ...)
    """
    if isinstance(key, KeyProvider):
        return key.with_options()
    if not isinstance(key, str):
        msg = f"a key is a URI or a key provider such as AwsKms('alias/etl'), not a {type(key).__name__}"
        raise TypeError(msg)
    scheme, separator, _ = key.partition("://")
    if not separator or scheme not in _PROVIDERS:
        known = ", ".join(f"{name}://" for name in _PROVIDERS)
        msg = f"the key {key!r} does not start with a scheme that is known: {known} (for example aws-kms://alias/etl)"
        raise FormatError(msg)
    return _PROVIDERS[scheme](key).with_options()


def open_keys(keys: Key | Sequence[Key]) -> tuple[KeyProvider, ...]:
    """Return the providers of one key or several, in order, each once.

    Raises:
        FormatError: as `open_key`.
        ValueError: there is none.
    """
    several = (keys,) if isinstance(keys, (str, KeyProvider)) else keys
    providers = tuple(dict.fromkeys(open_key(key) for key in several))
    if not providers:
        msg = "no key was given; pass key='aws-kms://alias/...' or --key"
        raise ValueError(msg)
    return providers
