"""What all transforms over whole files share: they plan, group by target, and do one task after another."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator
from typing import Any, Final

import apache_beam as beam
from apache_beam import typehints
from apache_beam.io.filesystem import FileMetadata

from beam_envelope.errors import DATA_ERRORS, ManifestError
from beam_envelope.io.manifest import WrittenShard, listed_ids
from beam_envelope.io.manifest_write import WithManifest
from beam_envelope.io.options import Settings
from beam_envelope.io.store import Places
from beam_envelope.transforms.metrics import Progress
from beam_envelope.transforms.plan import DecryptPlan, EncryptPlan, FailedFile, Task, unique_task
from beam_envelope.transforms.runner_limits import check_on_dask

# What concerns one file goes to an error handler, where there is one.
_DEAD_LETTERS: Final = (*DATA_ERRORS, FileNotFoundError, PermissionError)

_STARTED_AGAIN: Final = (
    "If the engine has started this job again, as Flink does, its first try may have written it: why that failed is "
    "further up in the log, and skip goes on from there"
)


@typehints.with_input_types(str | FileMetadata)
class FilesTransform(beam.PTransform["beam.PCollection[str | FileMetadata]", "beam.PCollection[Any]"]):
    """What all transforms of whole files share: plan, group by target, do.

    Attributes:
        plan: which file becomes which.
        work: what is done to each.
        lists: whether the results go into the manifest of the output folder.
    """

    def __init__(self, plan: EncryptPlan | DecryptPlan, work: FileDoFn) -> None:
        """Take what to do with which files."""
        super().__init__()
        self.plan = plan
        self.work = work
        self.lists = False
        self._handler: Any = None

    def with_error_handler(self, handler: Any) -> FilesTransform:  # Beam's ErrorHandler, or None
        """Send what concerns single files to a Beam error handler, as `FailedFile`s; errors of the KMS still fail."""
        self._handler = handler
        return self

    def __ror__(self, left: Any, label: str | None = None) -> Any:  # as PTransform has it
        """Let `"sources/*" | EncryptFiles(...)` mean a PCollection of that one pattern."""
        return super().__ror__([left] if isinstance(left, str) else left, label)

    def expand(self, sources: beam.PCollection[str | FileMetadata]) -> beam.PCollection[Any]:
        """Return the PCollection of results."""
        check_on_dask(sources, type(self).__name__, self._handler)
        catch = self._handler is not None
        tasks, unplanned = self._apply("Plan", _PlanDoFn(self.plan, catch=catch, lists=self.lists), sources)
        # Grouping finds two sources that would overwrite each other. It deals files out by the hashes of their names,
        # by which one of two workers can get seven of eight; after it they are dealt out in turn.
        grouped = tasks | "Group" >> beam.GroupByKey() | "Spread" >> beam.Reshuffle()
        done, undone = self._apply(self.work.label, self.work.catching(catch=catch), grouped)
        if catch:
            self._handler.add_error_pcollection((unplanned, undone) | "Failed" >> beam.Flatten())
        if self.lists:
            return done | "Manifest" >> WithManifest(self.plan.output, self.work.listed)
        return done

    def _apply(self, label: str, dofn: beam.DoFn, elements: beam.PCollection[Any]) -> tuple[beam.PCollection[Any], Any]:
        """Return the results and, for an error handler only, the failures: not every runner has several outputs."""
        if self._handler is None:
            return elements | label >> beam.ParDo(dofn), None
        outputs = elements | label >> beam.ParDo(dofn).with_outputs("failed", main="done")
        return outputs.done, outputs.failed

    def display_data(self) -> dict[str, Any]:
        """Describe the settings; the context's values are not shown."""
        return {"output": self.plan.output, "if_exists": self.plan.if_exists, **self.work.settings()}


@typehints.with_output_types(tuple[str, Task])
class _PlanDoFn(beam.DoFn):
    def __init__(self, plan: EncryptPlan | DecryptPlan, *, catch: bool, lists: bool) -> None:
        self._plan, self._catch = plan, catch
        self._compares = lists and plan.if_exists == "skip"

    def process(self, source: str | FileMetadata) -> Iterator[Any]:
        failures: dict[str, ManifestError] | None = {} if self._catch else None
        try:
            with Progress():
                tasks = self._plan.tasks(source, failures)
            if self._compares:  # a job that was stopped may have replaced shards that the manifest still lists
                listed, place_of = listed_ids(self._plan.output), Places()
                tasks = (task._replace(shard_id=listed.get(place_of(task.target), "")) for task in tasks)
            for task in tasks:
                yield task.target, task
            for path, failure in (failures or {}).items():
                yield beam.pvalue.TaggedOutput("failed", _failed(path, failure))
        except _DEAD_LETTERS as error:
            if not self._catch:
                raise
            name = source.path if isinstance(source, FileMetadata) else source
            yield beam.pvalue.TaggedOutput("failed", _failed(name, error))
        except FileExistsError as error:
            raise FileExistsError(error.errno, f"{error.strerror}. {_STARTED_AGAIN}", error.filename) from None


class FileDoFn(beam.DoFn, abc.ABC):
    """Does one task after another; subclasses say how.

    Attributes:
        label: the name of its step.
    """

    label = "Work"
    _catch = False

    def catching(self, *, catch: bool) -> FileDoFn:
        """Return itself; it sends what concerns single files to an error handler then."""
        self._catch = catch
        return self

    @abc.abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return what display data may show."""

    def check(self, task: Task) -> None:
        """Try on the launcher what can be tried without writing. Raises as `do`."""

    def process(self, element: tuple[str, Iterable[Task]]) -> Iterator[Any]:
        """Do the one task of a target."""
        target, tasks = element
        task = unique_task(target, tasks)
        try:
            with Progress() as progress:
                result = self.do(task, progress)
            yield result
        except _DEAD_LETTERS as error:
            if not self._catch:
                raise
            yield beam.pvalue.TaggedOutput("failed", _failed(task.source, error))
        except OSError as error:
            if error.filename is None:  # as of a full disk: of a thousand files, which?
                error.filename, error.filename2 = task.source, task.target
            raise

    @abc.abstractmethod
    def do(self, task: Task, progress: Progress) -> Any:
        """Do one task; return what the transform says of it."""

    def listed(self, result: Any) -> tuple[WrittenShard, Settings]:
        """Return what the manifest says of a result of `do`, and under which keys and context; writers only."""
        raise TypeError(f"{type(self).__name__} writes nothing that a manifest lists: {type(result).__name__}")


def _failed(source: str, error: Exception) -> FailedFile:
    return FailedFile(source, type(error).__name__, str(error))
