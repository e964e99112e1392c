"""VerifyShards: authenticates shards, Parquet files and key files, in parallel, and writes no plaintext."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import apache_beam as beam
from apache_beam import typehints

from beam_envelope.io.manifest_reader import ManifestMode, ManifestReader, checked_mode
from beam_envelope.keys.context import AnyContext
from beam_envelope.keys.uri import Key
from beam_envelope.settings import chosen_keys, expected_context
from beam_envelope.transforms.job_log import WriteLog, now
from beam_envelope.transforms.metrics import Progress
from beam_envelope.transforms.runner_limits import check_on_dask
from beam_envelope.transforms.verify_find import Found, find_listed, printable_name
from beam_envelope.transforms.verify_plan import (
    FILE,
    RANGE_BYTES,
    Part,
    VerifiedFile,
    Verifier,
    merge,
)

_NOT_SEEN: Final = -1
_NO_NAME: Final = -2  # that Beam could carry


@typehints.with_input_types(str)
@typehints.with_output_types(VerifiedFile)
class VerifyShards(beam.PTransform["beam.PCollection[str]", "beam.PCollection[VerifiedFile]"]):
    """Checks that files are as they were written: every chunk of shards, page of Parquet files, and key file.

    Input: patterns, paths or folders, of shards, of Parquet files and of key stores. Output: a `VerifiedFile` for each
    file, also for those that should not be there or have lost their other half. A large shard is read by several
    workers. What is wrong with a file is in its row; errors of the KMS fail the job. Each worker process asks the KMS
    once for each data key.

    Args:
        key: the KMS keys that may open the files, as URIs or providers.
        context: the encryption context that they were written with, or `ANY_CONTEXT`.
        quick: check key files, key commitments and lengths, and the footers of Parquet; read no more of the contents.
        range_bytes: about how much of one file a worker reads at a time.
        manifest: "use": where a manifest is at or above the files, it has to list them, and what it lists has to be
            there; "require": there has to be one; "ignore" it.

    Raises:
        ValueError, TypeError, FormatError: an argument is not of the right form.
        FileNotFoundError: while it runs: a pattern finds nothing.
        KeyAccessError, KmsUnavailableError, OSError: while it runs, from the KMS, and from listing a store.

    Example:
        >>> with beam.Pipeline() as p:
        ...     verified = p | beam.Create(["s3://sealed/"]) | VerifyShards(key="aws-kms://alias/etl")
        ...     verified | beam.Filter(lambda file: not file.ok) | beam.Map(print)
    """

    def __init__(
        self,
        *,
        key: Key | Sequence[Key] | None = None,
        context: Mapping[str, str] | AnyContext | None = None,
        quick: bool = False,
        range_bytes: int = RANGE_BYTES,
        manifest: ManifestMode = "use",
    ) -> None:
        """Check the arguments; nothing is called yet."""
        super().__init__()
        if range_bytes <= 0:
            raise ValueError(f"range_bytes is above 0, not {range_bytes}")
        expected = expected_context(context)
        keys = chosen_keys(key)
        listed = ManifestReader(checked_mode(manifest), keys, expected)
        self.verifier = Verifier(keys, expected, listed, quick, range_bytes)

    def expand(self, patterns: beam.PCollection[str]) -> beam.PCollection[VerifiedFile]:
        """Return the results."""
        check_on_dask(patterns, "VerifyShards")
        # A file and its key file come together here, whichever pattern found them.
        found = patterns | "Find" >> beam.ParDo(_FindDoFn(self.verifier)) | "Pair" >> beam.GroupByKey()
        parts = found | "Split" >> beam.ParDo(_SplitDoFn(self.verifier)) | "Spread" >> beam.Reshuffle()
        checked = parts | "Check" >> beam.ParDo(_CheckDoFn(self.verifier)) | "Collect" >> beam.GroupByKey()
        return checked | "Merge" >> beam.ParDo(_MergeDoFn())

    def __ror__(self, left: Any, label: str | None = None) -> Any:  # as PTransform has it
        """Let `"sealed/" | VerifyShards(...)` mean a PCollection of that one pattern."""
        return super().__ror__([left] if isinstance(left, str) else left, label)

    def display_data(self) -> dict[str, Any]:
        """Describe the settings; the context's values are not shown."""
        context = self.verifier.context
        names = "any" if isinstance(context, AnyContext) else ", ".join(context)
        return {"key": ", ".join(map(str, self.verifier.keys)), "context": names, "quick": self.verifier.quick}


@typehints.with_input_types(str)
@typehints.with_output_types(tuple[str, tuple[int, str, str]])
class _FindDoFn(beam.DoFn):
    def __init__(self, verifier: Verifier) -> None:
        self._verifier = verifier

    def process(self, pattern: str) -> Iterator[tuple[str, tuple[int, str, str]]]:
        with Progress():
            found = find_listed(pattern, self._verifier.manifest)
        for path, file in found.items():
            if printable_name(path) == path:
                yield path, (_NOT_SEEN if file.size is None else file.size, file.shard_id, file.problem)
            else:
                yield printable_name(path), (_NO_NAME, "", "")


@typehints.with_input_types(tuple[str, Iterable[tuple[int, str, str]]])
@typehints.with_output_types(Part)
class _SplitDoFn(beam.DoFn):
    def __init__(self, verifier: Verifier) -> None:
        self._verifier = verifier

    def process(self, element: tuple[str, Iterable[tuple[int, str, str]]]) -> Iterator[Part]:
        path, seen = element[0], list(element[1])
        sizes, shard_ids, problems = (set(column) for column in zip(*seen, strict=True))
        if _NO_NAME in sizes:
            problem = f"the name of {path} is not valid UTF-8, so no job has written it. Rename it or take it away"
            yield Part(path, FILE, problem, "", 0, 0, 0, 0, 1, b"")
            return
        size = max(sizes)
        with Progress():
            found = Found(None if size == _NOT_SEEN else size, max(shard_ids), max(problems))
            parts = self._verifier.parts(path, found)
        yield from parts


@typehints.with_input_types(Part)
@typehints.with_output_types(tuple[str, tuple[int, int, VerifiedFile]])
class _CheckDoFn(beam.DoFn):
    def __init__(self, verifier: Verifier) -> None:
        self._verifier = verifier

    def process(self, part: Part) -> Iterator[tuple[str, tuple[int, int, VerifiedFile]]]:
        with Progress() as progress:
            result = self._verifier.check(part, lambda n_bytes: progress.add("bytes_authenticated", n_bytes))
        yield part.path, (part.number, part.total, result)


@typehints.with_input_types(tuple[str, Iterable[tuple[int, int, VerifiedFile]]])
@typehints.with_output_types(VerifiedFile)
class _MergeDoFn(beam.DoFn):
    def process(self, element: tuple[str, Iterable[tuple[int, int, VerifiedFile]]]) -> Iterator[VerifiedFile]:
        with Progress() as progress:
            result = merge(element[1])
            progress.add("files")
            if not result.ok:
                progress.add("files_with_problems")
        yield result


class WriteVerificationLog(beam.PTransform["beam.PCollection[VerifiedFile]", "beam.PCollection[str]"]):
    """Writes what `VerifyShards` says to a file, one JSON object a line, at the end of the job.

    Args:
        path: the file, on any filesystem of Beam; one that is there is replaced.
    """

    def __init__(self, path: str) -> None:
        """Write nothing yet."""
        super().__init__()
        self._path = path

    def expand(self, files: beam.PCollection[VerifiedFile]) -> beam.PCollection[str]:
        """Return a PCollection of the path."""
        return files | "Lines" >> beam.Map(_line).with_output_types(str) | "Log" >> WriteLog(self._path)


def _line(file: VerifiedFile) -> str:
    return json.dumps({"time": now(), **file._asdict()})
