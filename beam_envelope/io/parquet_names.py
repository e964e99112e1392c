"""How the files of WriteEncryptedParquet are called, and how they come to their final names."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta, timezone
from typing import Any, Final

from apache_beam.io.filesystems import FileSystems
from apache_beam.transforms import window

from beam_envelope.errors import EnvelopeError
from beam_envelope.formats.keyfile import MAX_KEY_FILE_BYTES, KeyFile
from beam_envelope.io.filesystem import outer_path
from beam_envelope.io.parquet_bundle import EncryptedParquetFile
from beam_envelope.io.store import LocalStore, key_file_path, quote_glob, read_small, store_of

_LOG: Final = logging.getLogger(__name__)


def window_name(in_window: Any) -> str:
    """Return what a window is called: "" for the global one, `start/end` in UTC for one of time."""
    if isinstance(in_window, window.GlobalWindow):
        return ""
    if isinstance(in_window, window.IntervalWindow):
        return f"{_utc(in_window.start.micros)}/{_utc(in_window.end.micros)}"
    return re.sub(r"[^A-Za-z0-9.]+", "_", str(in_window)).strip("_")


def _utc(micros: int) -> str:
    moment = datetime(1970, 1, 1, tzinfo=timezone.utc) + timedelta(microseconds=micros)
    fraction = f".{moment.microsecond:06}" if moment.microsecond else ""
    return f"{moment:%Y%m%dT%H%M%S}{fraction}Z"


def named_together(
    files: Iterable[EncryptedParquetFile], prefix: str, template: str, suffix: str
) -> Iterator[tuple[EncryptedParquetFile, str]]:
    """Yield all files with their final paths: those of each window are numbered, in an order that stays."""
    by_window: dict[str, list[EncryptedParquetFile]] = {}
    for file in sorted(files):
        by_window.setdefault(file.window, []).append(file)
    for name, ours in by_window.items():
        for number, file in enumerate(ours):
            shard = _filled(_filled(template, "S", number), "N", len(ours))
            yield file, f"{prefix}{_in_name(name)}{shard}{suffix}"


def named_alone(file: EncryptedParquetFile, prefix: str, suffix: str) -> tuple[EncryptedParquetFile, str]:
    """Return a file with a final path that depends on nothing but the file: a second try makes the same."""
    return file, f"{prefix}{_in_name(file.window)}-{file.shard_id}{suffix}"


def _filled(template: str, letter: str, number: int) -> str:
    return re.sub(f"{letter}+", lambda match: f"{number:0{len(match[0])}}", template)


def _in_name(window_name: str) -> str:
    return f"-{window_name.replace('/', '-')}" if window_name else ""


def publish(file: EncryptedParquetFile, final: str) -> EncryptedParquetFile:
    """Move a file and its key file to the final path. A second try finds that the first has done it, or goes on.

    Raises:
        EnvelopeError: it is neither here nor there.
        OSError: from the store.
    """
    published = file._replace(path=final, key_file=key_file_path(final))
    if store_of(file.path).size(file.path) is not None:
        FileSystems.rename([outer_path(file.path)], [outer_path(final)])
    if not _is_there(published):
        raise EnvelopeError(
            f"{final} is not there after it was written and moved from {file.path}: another job may have written or "
            "removed files here at the same time. Let one job at a time write under a prefix, and run this one again"
        )
    FileSystems.report_sink_lineage(final)
    return published


def _is_there(file: EncryptedParquetFile) -> bool:
    if store_of(file.path).size(file.path) != file.stored_bytes:
        return False
    try:
        raw = read_small(file.key_file, MAX_KEY_FILE_BYTES + 1)
    except FileNotFoundError:
        return False
    return KeyFile.from_bytes(raw, file.key_file).shard_id.hex == file.shard_id


def clean(folder: str) -> None:
    """Remove what tries left that Beam did not take. Nobody reads it, so a failure is no reason to fail the job."""
    try:
        store = store_of(folder)
        if isinstance(store, LocalStore):
            shutil.rmtree(folder, ignore_errors=True)
        elif found := [metadata.path for metadata in store.match(f"{quote_glob(folder)}**")]:
            FileSystems.delete(found)
    except Exception as error:  # noqa: BLE001  # of any store
        _LOG.warning("the temporary folder %s could not be removed: %s", folder, error)
