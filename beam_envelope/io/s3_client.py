"""One S3 client for each process: of Beam's S3 options (`--s3_endpoint_url` and the others), or of our role.

The role is that of the keys, if `--envelope_aws_role_for_s3` is set.
"""

from __future__ import annotations

import os
import threading
from typing import Any, Final

from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions, S3Options
from botocore.config import Config

from beam_envelope.io import options as _  # noqa: F401  # so that `s3_identity` finds the pipeline's options
from beam_envelope.keys.aws_credentials import Identity, clear_sessions, new_client, s3_identity
from beam_envelope.keys.wire_log import silence

_CONNECTIONS: Final = 50  # kept open for the threads of a process; each may read one object and write another
_NOBODY: Final = object()
_lock = threading.Lock()
_clients: dict[tuple[tuple[tuple[str, Any], ...], Identity], Any] = {}
_latest: tuple[object, Any] = (_NOBODY, None)


def s3_client() -> Any:  # boto3 clients have no static type
    """Return this process's S3 client for the pipeline's S3 options. It may be shared between threads."""
    global _latest  # noqa: PLW0603  # the client of the options seen last: reading options takes longer than a request
    options = FileSystems._pipeline_options  # noqa: SLF001  # where Beam's own filesystems find them
    with _lock:
        if _latest[0] is not options:
            settings = _settings(options)
            identity = Identity() if dict(settings).get("s3_access_key_id") else s3_identity()
            if (settings, identity) not in _clients:
                _clients[settings, identity] = _new_client(dict(settings), identity)
            _latest = (options, _clients[settings, identity])
        return _latest[1]


def clear_s3_clients() -> None:
    """Forget all clients, so that changed AWS settings are read anew."""
    global _lock, _latest  # noqa: PLW0603  # a lock held by another thread at fork stays locked in the child
    _lock = threading.Lock()
    _latest = (_NOBODY, None)
    _clients.clear()
    clear_sessions()


os.register_at_fork(after_in_child=clear_s3_clients)


def _settings(options: PipelineOptions | dict[str, Any] | None) -> tuple[tuple[str, Any], ...]:
    """Return Beam's S3 options, whichever form they have, as something that can be a key."""
    if not isinstance(options, dict):
        options = (options or PipelineOptions([])).view_as(S3Options).get_all_options()
    return tuple((name, options[name]) for name in sorted(options) if name.startswith("s3_"))


def _new_client(options: dict[str, Any], identity: Identity) -> Any:
    client = new_client(
        "s3",
        identity,
        options.get("s3_region_name"),
        endpoint_url=options.get("s3_endpoint_url"),
        api_version=options.get("s3_api_version"),
        verify=options.get("s3_verify"),
        use_ssl=not options.get("s3_disable_ssl"),
        aws_access_key_id=options.get("s3_access_key_id"),
        aws_secret_access_key=options.get("s3_secret_access_key"),
        aws_session_token=options.get("s3_session_token"),
        config=Config(
            connect_timeout=10,
            max_pool_connections=_CONNECTIONS,
            retries={"mode": "standard"},  # the legacy mode raises before our own retries have their turn
            user_agent_extra="beam-envelope",
        ),
    )
    silence(client)
    return client
