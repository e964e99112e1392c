"""RotateKeys: new wrapped forms for the data keys of key files, without reading what they encrypt."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from typing import Any, Final, NamedTuple, TypeVar

import apache_beam as beam
from apache_beam import typehints

from beam_envelope.errors import EnvelopeError, KeyAccessError, KeyFileMissingError, KmsUnavailableError
from beam_envelope.formats.keyfile import MANIFEST_NAME, KeyFile, WrappedDataKey
from beam_envelope.formats.manifest import Manifest
from beam_envelope.formats.rotation import Rotation, Rotator, Step
from beam_envelope.io.keyfiles import KeyFileReplacedError, read_key_file, replace_key_file, settle
from beam_envelope.io.manifest import find_to_rotate, read_manifest
from beam_envelope.io.store import LocalStore, split_path, store_of
from beam_envelope.keys.local import LocalKms
from beam_envelope.keys.provider import KeyProvider, kms_calls
from beam_envelope.keys.uri import Key, open_keys
from beam_envelope.transforms.metrics import Progress
from beam_envelope.transforms.plan import FailedFile
from beam_envelope.transforms.row_types import register_rows
from beam_envelope.transforms.runner_limits import check_on_dask

T = TypeVar("T")

_BATCH: Final = 100
_LANES: Final = 16
_THREADS: Final = 16  # requests to stores and KMSs are mostly waiting
_IN_FLIGHT: Final = 256
_MAX_MADE: Final = 10_000
_TRIES: Final = 3  # for a key file that others replace meanwhile


class RotatedFile(NamedTuple):
    """What RotateKeys says of each key file; nothing in it is secret.

    Attributes:
        key_file: its path.
        before: the KMS keys that opened it.
        after: the KMS keys that open it now, or, of a dry run, would open it.
        changed: whether it was changed, or would be.
    """

    key_file: str
    before: Sequence[str]
    after: Sequence[str]
    changed: bool


register_rows(RotatedFile)


@typehints.with_input_types(str)
@typehints.with_output_types(RotatedFile)
class RotateKeys(beam.PTransform["beam.PCollection[str]", "beam.PCollection[RotatedFile]"]):
    """Has the KMS re-encrypt the data keys of key files: of shards, of Parquet files, and of key stores.

    Input: folders, patterns or paths of key files and manifests, or of shards beside which key files are. Manifests go
    along with all of their shards, and stay as they are where only some of those are named. Output: a `RotatedFile`
    for each. It reads and writes key files and manifests only, each in one step, so it may be killed and run again at
    any time; what is done already is left alone. A data key that many files share is one request to the KMS.

    Args:
        source: the KMS key to rotate from, or several: those that open what is there. New forms are made of theirs. Or
            `AllowedKeys`, for a dataset under the keys of many tenants.
        to: the KMS key to rotate to. The same as `source`: anew under its newest version.
        add: KMS keys that are to open the data as well.
        remove: KMS keys that are to open it no longer; then a key of `source` is one that stays.
        dry_run: change nothing, and tell what would be.
        max_requests_per_s: the most requests to the KMS in a second, of the whole job. One worker makes them then.

    Raises:
        ValueError, FormatError: an argument is not of the right form. While it runs, see `Rotator`, `find_to_rotate`
        and `replace_key_file`.

    Example:
        >>> with beam.Pipeline() as p:
        ...     p | beam.Create(["s3://sealed/"]) | RotateKeys("aws-kms://alias/old", to="aws-kms://alias/new")
    """

    def __init__(
        self,
        source: Key | Sequence[Key],
        *,
        to: Key | None = None,
        add: Key | Sequence[Key] = (),
        remove: Key | Sequence[Key] = (),
        dry_run: bool = False,
        max_requests_per_s: float | None = None,
    ) -> None:
        """Check the arguments; nothing is called yet."""
        super().__init__()
        if max_requests_per_s is not None and not max_requests_per_s > 0:
            msg = f"max_requests_per_s is above 0, not {max_requests_per_s}"
            raise ValueError(msg)
        self.rotation = Rotation(
            _several(source, lists=True),
            None if to is None else open_keys(to, lists=False)[0],
            _several(add),
            _several(remove),
        )
        self._dry_run, self._rate = dry_run, max_requests_per_s
        self._handler: Any = None

    def with_error_handler(self, handler: Any) -> RotateKeys:  # Beam's ErrorHandler, or None
        """Send what concerns single files to a Beam error handler, as `FailedFile`s; errors of the KMS still fail."""
        self._handler = handler
        return self

    def expand(self, patterns: beam.PCollection[str]) -> beam.PCollection[RotatedFile]:
        """Return the results."""
        check_on_dask(patterns, "RotateKeys", self._handler)
        catch = self._handler is not None
        lanes = _LANES if self._rate is None else 1
        batches = patterns | "Find" >> beam.ParDo(_FindDoFn()) | "Spread" >> beam.Reshuffle()
        read = batches | "Read" >> beam.ParDo(_ReadDoFn(lanes, catch=catch)).with_outputs("failed", main="done")
        # Key files of one data key come together, and share one request.
        grouped = read.done | "Group" >> beam.GroupByKey()
        rotate = _RotateDoFn(self.rotation, self._rate, dry_run=self._dry_run, catch=catch)
        done = grouped | "Rotate" >> beam.ParDo(rotate).with_outputs("failed", main="done")
        if catch:
            self._handler.add_error_pcollection((read.failed, done.failed) | "Failed" >> beam.Flatten())
        done.done.element_type = RotatedFile
        return done.done

    def display_data(self) -> dict[str, Any]:
        """Describe the settings."""
        rotation = self.rotation
        return {
            "from": ", ".join(map(str, rotation.source)),
            "to": str(rotation.to or ""),
            "add": ", ".join(map(str, rotation.add)),
            "remove": ", ".join(map(str, rotation.remove)),
            "dry_run": self._dry_run,
        }


@typehints.with_output_types(list[str])
class _FindDoFn(beam.DoFn):
    def process(self, pattern: str) -> Iterator[list[str]]:
        paths, _ = find_to_rotate(pattern)
        for start in range(0, len(paths), _BATCH):
            yield paths[start : start + _BATCH]


@typehints.with_output_types(tuple[int, tuple[str, bytes]])
class _ReadDoFn(beam.DoFn):
    """Reads key files, and gives those of one data key to one lane."""

    def __init__(self, lanes: int, *, catch: bool) -> None:
        self._lanes, self._catch = lanes, catch

    def process(self, paths: list[str]) -> Iterator[Any]:
        with Progress() as progress, _pool(paths[0]) as pool:
            for path, read in [(path, pool.submit(_read, path)) for path in paths]:
                try:
                    raw = read.result()
                except Exception as error:  # noqa: BLE001  # some are raised again
                    yield _fail(path, error, progress, catch=self._catch)
                else:
                    yield _lane(raw, self._lanes), (path, raw)


class _RotateDoFn(beam.DoFn):
    """Rotates the key files of a lane: one request to the KMS for each data key, and each file as soon as it can be."""

    def __init__(self, rotation: Rotation, rate: float | None, *, dry_run: bool, catch: bool) -> None:
        self._rotation, self._rate = rotation, rate
        self._dry_run, self._catch = dry_run, catch

    def start_bundle(self) -> None:
        self._rotator = Rotator(self._rotation)

    def process(self, element: tuple[int, Iterable[tuple[str, bytes]]]) -> Iterator[Any]:
        found = iter(element[1])
        first = next(found)
        with Progress() as progress, _pool(first[0], *self._rotation.keys) as pool:
            lane = _Lane(self._rotator, pool, self._rate, dry_run=self._dry_run)
            waiting: list[_Work] = []
            seen: set[str] = set()
            changed: list[str] = []
            for path, raw in chain([first], found):
                if path in seen:  # two patterns found it
                    continue
                seen.add(path)
                waiting.append(lane.submit(path, raw))
                if len(waiting) >= _IN_FLIGHT:
                    yield from self._results(waiting, lane, progress, changed)
                    waiting = []
            yield from self._results(waiting, lane, progress, changed)
            if not self._dry_run:
                settle(changed)

    def _results(self, waiting: list[_Work], lane: _Lane, progress: Progress, changed: list[str]) -> Iterator[Any]:
        for path, future in waiting:
            try:
                result = lane.result(path, future)
            except Exception as error:  # noqa: BLE001  # some are raised again
                yield _fail(path, error, progress, catch=self._catch)
            else:
                progress.add("key_files")
                if result.changed:
                    progress.add("key_files_changed")
                    changed.append(path)
                yield result


_Work = tuple[str, "Future[RotatedFile]"]


class _Lane:
    """The data keys of a lane, each rotated once; used by one thread, and works in those of a pool."""

    def __init__(
        self, rotator: Rotator, pool: _Inline | ThreadPoolExecutor, rate: float | None, *, dry_run: bool
    ) -> None:
        self._rotator, self._pool, self._dry_run = rotator, pool, dry_run
        self._pace = _Pace(rate, inline=isinstance(pool, _Inline))
        self._made: dict[tuple[Any, ...], Future[WrappedDataKey]] = {}

    def submit(self, path: str, raw: bytes) -> _Work:
        """Start to rotate a key file whose content is `raw`."""
        future: Future[RotatedFile] = Future()
        try:
            kind = Manifest if split_path(path)[1] == MANIFEST_NAME else KeyFile
            key_file: KeyFile | Manifest = kind.from_bytes(raw, path)
            steps = self._rotator.plan(key_file, path)
        except EnvelopeError as error:
            future.set_exception(error)
            return path, future
        changed = any(step.changes for step in steps)
        if self._dry_run or not changed:
            future.set_result(_rotated(path, key_file, steps, changed=changed))
            return path, future
        pairs = zip(steps, key_file.contexts, strict=True)
        made = [self._make(step, context) if step.changes else None for step, context in pairs]
        return path, self._pool.submit(_replace, path, raw, key_file, steps, made)

    def result(self, path: str, future: Future[RotatedFile]) -> RotatedFile:
        """Wait for a file. If others replaced it meanwhile, as does the same job tried again, start from theirs."""
        for _ in range(_TRIES - 1):
            try:
                return future.result()
            except KeyFileReplacedError:
                _, future = self.submit(path, _read(path))
            finally:
                self._pace.report()
        return future.result()

    def _make(self, step: Step, context: Mapping[str, str]) -> Future[WrappedDataKey]:
        entry = (step, *sorted(context.items()))
        if entry not in self._made:
            if len(self._made) >= _MAX_MADE:
                self._made.pop(next(iter(self._made)))
            # A pool takes up work in order: nothing that waits for this keeps it waiting.
            self._made[entry] = self._pool.submit(self._pace.make, self._rotator, step, dict(context))
        return self._made[entry]


class _Pace:
    """Lets so many requests to the KMS go in a second, and counts them for the thread that reports them."""

    def __init__(self, rate: float | None, *, inline: bool) -> None:
        self._inline = inline
        self._interval_s = 0.0 if rate is None else 1 / rate
        self._next = 0.0
        self._lock, self._turn = threading.Lock(), threading.Lock()
        self._calls: Counter[str] = Counter()

    def make(self, rotator: Rotator, step: Step, context: Mapping[str, str]) -> WrappedDataKey:
        """Do a step, in a thread of the pool."""
        before = kms_calls.counts.copy()
        try:
            return rotator.make(step, context, self._wait)
        finally:
            if not self._inline:
                with self._lock:
                    self._calls.update(kms_calls.counts - before)

    def report(self) -> None:
        """Count what was asked as if this thread had asked it."""
        with self._lock:
            kms_calls.counts.update(self._calls)
            self._calls.clear()

    def _wait(self) -> None:
        if self._interval_s:
            with self._turn:
                time.sleep(max(0.0, self._next - time.monotonic()))
                self._next = time.monotonic() + self._interval_s


def _several(keys: Key | Sequence[Key], *, lists: bool = False) -> tuple[Any, ...]:
    return () if isinstance(keys, (list, tuple)) and not keys else open_keys(keys, lists=lists)


class _Inline:
    """A pool without threads: for a local disk and a local keyring, they cost more than they give."""

    def submit(self, work: Callable[..., T], *arguments: Any) -> Future[T]:
        future: Future[T] = Future()
        try:
            future.set_result(work(*arguments))
        except Exception as error:  # noqa: BLE001  # as a pool does
            future.set_exception(error)
        return future


@contextmanager
def _pool(path: str, *keys: KeyProvider) -> Iterator[_Inline | ThreadPoolExecutor]:
    if all(isinstance(key, LocalKms) for key in keys) and isinstance(store_of(path), LocalStore):
        yield _Inline()
        return
    with ThreadPoolExecutor(_THREADS) as pool:
        yield pool


def _read(path: str) -> bytes:
    try:
        return read_manifest(path) if split_path(path)[1] == MANIFEST_NAME else read_key_file(path)
    except FileNotFoundError:
        raise KeyFileMissingError(
            f"there is no key file {path}: what it belongs to is not encrypted, or lost its key file, or is a folder "
            "and needs a slash at its end"
        ) from None


def _replace(
    path: str,
    old: bytes,
    key_file: KeyFile | Manifest,
    steps: Sequence[Step],
    made: Sequence[Future[WrappedDataKey] | None],
) -> RotatedFile:
    data_keys = [step.data_key if future is None else future.result() for step, future in zip(steps, made, strict=True)]
    try:
        replace_key_file(path, old, key_file.with_wrapped_keys(data_keys).to_bytes())
    except FileNotFoundError:
        raise KeyFileMissingError(f"{path} went away while this job was about to rotate it") from None
    return _rotated(path, key_file, steps, changed=True)


def _rotated(path: str, key_file: KeyFile | Manifest, steps: Sequence[Step], *, changed: bool) -> RotatedFile:
    before = [(form.provider, form.kms_key) for data_key in key_file.data_keys for form in data_key.wrapped_keys]
    after = [name for step in steps for name in step.kms_keys]
    return RotatedFile(path, _listed(before), _listed(after), changed)


def _listed(names: Iterable[tuple[str, str]]) -> list[str]:
    """Return KMS keys as `inspect` shows them."""
    return list(
        dict.fromkeys(kms_key if provider == "aws-kms" else f"{provider}:{kms_key}" for provider, kms_key in names)
    )


def _lane(raw: bytes, lanes: int) -> int:
    """Return the same number for key files that share their first data key; what is none fails where it is parsed."""
    with contextlib.suppress(ValueError, TypeError, LookupError, RecursionError):
        document = json.loads(raw)
        raw = json.dumps([document["data_keys"][0], document["context"]]).encode()
    return hashlib.sha256(raw).digest()[0] % lanes


def _fail(path: str, error: Exception, progress: Progress, *, catch: bool) -> Any:
    """Return a dead letter, or raise: errors of the KMS and of the store are no file's own."""
    ours = isinstance(error, EnvelopeError) and not isinstance(error, (KeyAccessError, KmsUnavailableError))
    if not ours and not isinstance(error, PermissionError):
        raise error
    if not catch:
        raise error if path in str(error) else type(error)(f"{path}: {error}")
    progress.add("key_files_failed")
    return beam.pvalue.TaggedOutput("failed", FailedFile(path, type(error).__name__, str(error)))
