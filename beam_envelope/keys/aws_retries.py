"""How long requests to AWS wait for a service that is away or throttles, beyond botocore's own two quick retries.

botocore's standard mode sends a request 3 times. Its newer versions wait 50 and 100 ms at most between them, unless the
service throttles, and all threads of a client share some 35 retries: a job of hours would end with the first second in
which S3 or KMS cannot be reached.
"""

from __future__ import annotations

import logging
import random
from typing import Any, Final

from botocore import exceptions as boto_errors

_LOG: Final = logging.getLogger(__name__)

ATTEMPTS: Final = 8
"""How often a request is sent at most, unless AWS's own settings say it (`AWS_MAX_ATTEMPTS`, or `max_attempts` of the
configuration file) or the client's do."""

_OF_BOTOCORE: Final = 3
_NO_ANSWER: Final = (boto_errors.ConnectionError, boto_errors.HTTPClientError)
_TOO_MANY_REQUESTS: Final = 429
_SERVER_ERRORS: Final = {500, 502, 503, 504}


def be_patient(client: Any) -> Any:  # boto3's client
    """Have a client send requests again that got no answer, or none but "later"; return it.

    The waits are 1, 2, 4, 8 and 16 s, less up to half of each: 16 to 31 s in all. Each request counts for itself.
    """
    if "total_max_attempts" not in (client.meta.config.retries or {}):
        client.meta.events.register("needs-retry", _wait)  # after botocore's own handler, whose wait goes first
    return client


def is_throttling(code: str) -> bool:
    """Whether an error code of AWS says that there were too many requests."""
    return "Throttl" in code or code in {"LimitExceededException", "SlowDown", "TooManyRequestsException"}


def _wait(
    attempts: int,
    response: tuple[Any, dict[str, Any]] | None,
    caught_exception: Exception | None,
    operation: Any,
    **_: Any,
) -> float | None:
    """Return for how many seconds to wait before the next attempt; None if there is to be none."""
    said = _why(response, caught_exception)
    if said is None or attempts >= ATTEMPTS:
        return None
    seconds = 2.0 ** max(0, attempts - _OF_BOTOCORE) * random.uniform(0.5, 1)  # noqa: S311  # no secret
    if attempts >= _OF_BOTOCORE:
        service = operation.service_model.service_id
        _LOG.warning("%s %s: %s; trying again in %.0f s", service, operation.name, said, seconds)
    return seconds


def _why(response: tuple[Any, dict[str, Any]] | None, error: Exception | None) -> str | None:
    """Return what another attempt may help against; None if none can. Not the error's text: it may have an address."""
    if response is None:
        return type(error).__name__ if isinstance(error, _NO_ANSWER) else None
    http, parsed = response
    code = str(parsed.get("Error", {}).get("Code", ""))
    later = http.status_code in _SERVER_ERRORS or http.status_code == _TOO_MANY_REQUESTS or is_throttling(code)
    return f"{http.status_code} {code}" if later else None
