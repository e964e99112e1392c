"""Keys named by URI: `open_key("aws-kms://alias/etl")`, after Tink's convention."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeAlias

from beam_envelope.errors import FormatError
from beam_envelope.keys.allowed import Allowed, AllowedKeys, AllowedLocalKeys, AllowedVaultKeys
from beam_envelope.keys.aws import AwsKms
from beam_envelope.keys.local import LocalKms
from beam_envelope.keys.provider import KeyProvider
from beam_envelope.keys.template import KeyTemplate, fill, gaps
from beam_envelope.keys.vault import Vault

Key: TypeAlias = "str | KeyProvider"
"""What every `key=` takes: a URI or a provider."""

_PROVIDERS: Final[dict[str, Callable[[str], KeyProvider]]] = {
    AwsKms.provider: AwsKms.from_uri,
    LocalKms.provider: LocalKms.from_uri,
    Vault.provider: Vault.from_uri,
}
_ALIAS: Final = re.compile(r"alias/(?!aws/)[A-Za-z0-9/_-]{1,250}")  # AWS KMS API Reference, CreateAlias
_LISTS: Final[dict[str, Callable[[str], Allowed]]] = {
    AwsKms.provider: AllowedKeys.from_uri,
    LocalKms.provider: AllowedLocalKeys.from_uri,
    Vault.provider: AllowedVaultKeys.from_uri,
}


def open_key(key: Key) -> KeyProvider:
    """Return the provider that a URI names, or a provider that is given, with the pipeline's options that concern it.

    No call is made to a KMS.

    A URI with gaps (`aws-kms://alias/data-{tenant}`) gives a `KeyTemplate`, and one with `*` an allow-list:
    `aws-kms://*?account=111122223333`, `hcvault://transit/keys/data-*`, `local-kms://keys/*.json`.

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
    if "{" in key or "}" in key:
        template = KeyTemplate(key)
        open_key(template.example)  # is it a key's URI?
        return template
    name = key.partition("?")[0]
    if "*" in name:
        if scheme == AwsKms.provider and not name.endswith("://*"):
            msg = f"{key!r}: which keys may open data is aws-kms://*?account=ACCOUNT&alias=data-*; a key has no * in it"
            raise FormatError(msg)
        return _LISTS[scheme](key).with_options()
    return _PROVIDERS[scheme](key).with_options()


def open_keys(keys: Key | Sequence[Key], *, templates: bool = False, lists: bool = True) -> tuple[KeyProvider, ...]:
    """Return the providers of one key or several, in order, each once.

    Args:
        keys: the keys.
        templates: whether templates may be among them: the caller fills them.
        lists: whether allow-lists may be among them: the caller reads.

    Raises:
        FormatError: as `open_key`.
        ValueError: there is none, or one is of a kind that does not go here.
    """
    several = (keys,) if isinstance(keys, (str, KeyProvider)) else keys
    providers = tuple(dict.fromkeys(open_key(key) for key in several))
    if not providers:
        msg = "no key was given; pass key='aws-kms://alias/...' or --key"
        raise ValueError(msg)
    for provider in providers:
        if isinstance(provider, KeyTemplate) and not templates:
            msg = (
                f"the key {provider} is a template, and nothing fills it here. Name one key, or take a transform that "
                "fills templates (docs/key-choice.md)"
            )
            raise ValueError(msg)
        if isinstance(provider, Allowed) and not lists:
            msg = f"{provider} says which keys may open data, and is no key to write with. Name the key to write with"
            raise ValueError(msg)
    return providers


def fill_key(key: KeyProvider, values: Mapping[str, str]) -> KeyProvider:
    """Return the key that a template becomes with these values, which `checked_value` returned; any other as it is.

    Raises:
        FormatError: no key can have such a name; the message does not hold the values.
    """
    if not isinstance(key, KeyTemplate):
        return key
    try:
        filled = open_key(fill(key.uri, values))
    except FormatError:
        filled = None
    if filled is None or (isinstance(filled, AwsKms) and not _ALIAS.fullmatch(filled.key_id.rpartition(":")[2])):
        what = ", ".join(repr(name) for name in gaps(key.uri))
        raise FormatError(
            f"with this value of {what}, {key} is no name that a key can have: it has a character that is not allowed "
            "there, such as a dot, is too long, or is reserved (alias/aws/)"
        )
    return filled


def key_gaps(keys: Sequence[KeyProvider]) -> tuple[str, ...]:
    """Return the names of the gaps of all templates among these keys, each once."""
    return tuple(dict.fromkeys(name for key in keys if isinstance(key, KeyTemplate) for name in gaps(key.uri)))
