"""Asking KMSs in what state the keys are that key files name. Key files may be hostile: they only say which key.

Where to ask, and as whom, comes from the caller's keys and the environment alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Final

from beam_envelope.errors import FormatError
from beam_envelope.keys.aws import AwsKms
from beam_envelope.keys.local import LocalKms, local_key_state
from beam_envelope.keys.provider import KeyProvider, WrappedKey
from beam_envelope.keys.state import ENABLED, NOT_FOUND, UNKNOWN, KeyState
from beam_envelope.keys.vault import Vault

FOOTER_KEY: Final = "parquet-footer:"
"""What is before a name that Parquet's key tools keep in a file's footer: alias, id, or what a writer chose."""

_ASKING: Final = 8
_ARN: Final = re.compile(r"arn:[\w-]+:kms:(?P<region>[\w-]+):\d+:key/[\w-]+", re.ASCII)
_AWS_NAME: Final = re.compile(r"alias/[\w/-]+|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|mrk-[0-9a-f]+", re.ASCII)
_VAULT_NAME: Final = re.compile(r"hcvault://(?P<mount>[^?#]+)/keys/(?P<name>[^?#/]+)")
_LOCAL: Final = f"{LocalKms.provider}:"


def shown_name(wrapped: WrappedKey) -> str:
    """Return a KMS key as it is shown to people: the ARN, `hcvault://MOUNT/keys/NAME`, `local-kms:NAME/ID`."""
    named = wrapped.provider == AwsKms.provider or wrapped.kms_key.startswith(f"{wrapped.provider}://")
    return wrapped.kms_key if named else f"{wrapped.provider}:{wrapped.kms_key}"


def ask_states(names: Iterable[str], keys: Sequence[KeyProvider] = ()) -> dict[str, KeyState]:
    """Ask for the state of each key, one request each, without using it.

    Args:
        names: KMS keys, as `shown_name` has them.
        keys: keys whose settings lead to them: the keyring of local keys; the server of Vault; profile and endpoint of
            AWS. Without them, the usual settings.

    Returns:
        The state of each. What a KMS or the network refuses is in there; nothing of it is raised.
    """
    several = list(dict.fromkeys(names))
    with ThreadPoolExecutor(_ASKING) as pool:
        return dict(zip(several, pool.map(lambda name: _ask(name, keys), several), strict=True))


def _ask(name: str, keys: Sequence[KeyProvider]) -> KeyState:
    if name.startswith(_LOCAL):
        return _ask_keyrings(name.removeprefix(_LOCAL), keys)
    try:
        key = _provider(name, keys)
    except FormatError as error:
        return KeyState(UNKNOWN, str(error))
    return KeyState(UNKNOWN, "this name is of no KMS that is known here") if key is None else key.state()


def _provider(name: str, keys: Sequence[KeyProvider]) -> KeyProvider | None:
    """Return the key of that name, reached as the caller's keys are. Never `open_key`: a URI could name a server."""
    aws = [key for key in keys if isinstance(key, AwsKms)]
    arn, vault = _ARN.fullmatch(name), _VAULT_NAME.fullmatch(name)
    if arn is not None:
        near = [key for key in aws if key.region in {None, arn["region"]}]
        return replace(near[0], key_id=name, region=None) if near else AwsKms(name)
    if vault is not None:
        known = [key for key in keys if isinstance(key, Vault)] or [Vault(vault["name"])]
        near_vault = [key for key in known if key.full_name() == name] or known
        return replace(near_vault[0], name=vault["name"], mount=vault["mount"])
    bare = name.removeprefix(FOOTER_KEY)
    if bare != name and _AWS_NAME.fullmatch(bare):
        return replace(aws[0], key_id=bare) if aws else AwsKms(bare)
    return None


def _ask_keyrings(name: str, keys: Sequence[KeyProvider]) -> KeyState:
    states = [local_key_state(path, name) for path in sorted({key.path for key in keys if isinstance(key, LocalKms)})]
    if not states:
        return KeyState(UNKNOWN, "key files do not say in which keyring it is; give --key local-kms://KEYRING_FILE")
    for wanted in (ENABLED, UNKNOWN, NOT_FOUND):  # a keyring that cannot be read may hold it
        for state in states:
            if state.state == wanted:
                return state
    raise AssertionError(states)  # there are no other states of keyrings
