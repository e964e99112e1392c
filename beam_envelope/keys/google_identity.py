"""The identity token that Google Cloud gives a machine for its service account, from the metadata server.

Source: "Verify the identity of VM instances" and "About VM metadata", Google Cloud's Compute Engine guides.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import time
import urllib.error
import urllib.request
from typing import Any, Final
from urllib.parse import urlencode

from beam_envelope.errors import EnvelopeError, KeyAccessError, KmsUnavailableError

_HOST: Final = "metadata.google.internal"
_PATH: Final = "/computeMetadata/v1/instance/service-accounts/default/identity"
_FLAVOR: Final = ("Metadata-Flavor", "Google")  # asked for, and given by the real server only
_TIMEOUT_S: Final = 5.0
_PAUSES_S: Final = (0.5, 1.0, 2.0)
_MAX_TOKEN_BYTES: Final = 1 << 16
_NOT_FOUND: Final = 404
_TOO_MANY: Final = 429
_SERVER_ERROR: Final = 500
_TOKEN: Final = re.compile(r"[\w-]+\.[\w-]+\.[\w-]+", re.ASCII)  # RFC 7519 3: three parts in base64url
_sleep = time.sleep
# It is on the machine itself: no proxy between.
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


def metadata_host() -> str:
    """Return the metadata server's host: `GCE_METADATA_HOST`, as Google's own libraries have it, or the usual one."""
    return os.environ.get("GCE_METADATA_HOST") or _HOST


def identity_token(audience: str) -> str:
    """Return a fresh identity token (a JWT, valid for an hour) of this machine's service account. It is a secret.

    Args:
        audience: for whom it is; the token's `aud`.

    Raises:
        KeyAccessError: this machine has no service account, or the host is not Google's metadata server.
        KmsUnavailableError: no answer after all tries.
    """
    host = metadata_host()
    query = urlencode({"audience": audience, "format": "full"})
    request = urllib.request.Request(f"http://{host}{_PATH}?{query}", headers=dict([_FLAVOR]))  # http
    for pause_s in (*_PAUSES_S, None):
        try:
            with _open(request, timeout=_TIMEOUT_S) as answer:
                genuine = answer.headers.get(_FLAVOR[0]) == _FLAVOR[1]
                token = str(answer.read(_MAX_TOKEN_BYTES), "ascii", "replace").strip()
        except urllib.error.HTTPError as error:
            error.close()
            if error.code < _SERVER_ERROR and error.code != _TOO_MANY:
                raise _refused(host, error.code) from None
            problem = f"it answers with status {error.code}"
        except OSError as error:  # URLError is one
            problem = str(getattr(error, "reason", error))
        else:
            if genuine and _TOKEN.fullmatch(token):
                return token
            raise KeyAccessError(
                f"what answers at {host} is not Google's metadata server: it gave no identity token. Unset "
                "GCE_METADATA_HOST, or run this on Google Cloud; elsewhere leave --envelope_aws_web_identity out"
            )
        if pause_s is not None:
            _sleep(pause_s)
    raise KmsUnavailableError(
        f"Google's metadata server ({host}) gave no identity token, so no AWS role can be assumed: {problem}. "
        "--envelope_aws_web_identity=google works on Google Cloud's machines only; elsewhere leave it out. There, run "
        "the job again"
    )


def claims(token: str) -> dict[str, Any]:
    """Return what a token says of itself, unverified, for messages; nothing if it cannot be read."""
    try:
        body = token.split(".")[1]
        found = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    except (IndexError, ValueError, binascii.Error):
        return {}
    return found if isinstance(found, dict) else {}


def _refused(host: str, status: int) -> EnvelopeError:
    if status == _NOT_FOUND:
        return KeyAccessError(
            f"this machine has no Google service account ({host} answers 404), so no AWS role can be assumed. Give the "
            "workers one (on Dataflow: --service_account_email=NAME@PROJECT.iam.gserviceaccount.com)"
        )
    return KeyAccessError(
        f"Google's metadata server ({host}) refuses an identity token with status {status}, so no AWS role can be "
        "assumed. Check the machine's service account, and GCE_METADATA_HOST if it is set"
    )
