"""What DaskRunner would lose without a word is refused before anything runs. docs/dask.md says what works there.

Beam's runners/dask computes only the last step of a pipeline and what leads to it, takes the results of a bundle before
its `finish_bundle`, and knows neither several outputs nor batches. Nothing here imports Dask.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, Final

import apache_beam as beam
from apache_beam.pipeline import AppliedPTransform, PipelineVisitor
from apache_beam.transforms.error_handling import ErrorHandler

from beam_envelope.errors import EnvelopeError

_DASK: Final = "apache_beam.runners.dask.dask_runner"
_SHOWN: Final = 3
_ANOTHER: Final = "Take another runner"


def on_dask(pipeline: beam.Pipeline) -> bool:
    """Return whether a pipeline is for DaskRunner."""
    return any(kind.__module__ == _DASK for kind in type(pipeline.runner).__mro__)


def refuse_on_dask(elements: Any, what: str, why: str, instead: str) -> None:
    """Stop whoever builds a pipeline for DaskRunner with something that does not work there.

    Args:
        elements: the input, a PCollection or PBegin.
        what: the transform, or how it is used.
        why: what would become of it: "DaskRunner ...".
        instead: what to do, as a sentence.

    Raises:
        EnvelopeError: the pipeline is for DaskRunner.
    """
    if on_dask(elements.pipeline):
        raise EnvelopeError(f"{what} does not work on Dask: {why}. {instead}. docs/dask.md tells what works there")


def check_on_dask(elements: beam.PCollection[Any], what: str, handler: Any = None) -> None:
    """Let a transform that works on DaskRunner be part of a pipeline whose other steps work there, too.

    The other steps are looked at when the pipeline is complete, as it is run, and before the runner has it.

    Args:
        elements: the input.
        what: the name of the transform.
        handler: its error handler, if it has one.

    Raises:
        EnvelopeError: the pipeline is for DaskRunner, and there is an error handler. From `Pipeline.run`: another step
            of the pipeline would be lost.
    """
    if handler is not None:
        refuse_on_dask(
            elements,
            f"{what} with an error handler",
            "DaskRunner has no second output, so what fails would pass for a result",
            "Leave with_error_handler out, so that what fails stops the job, or take another runner",
        )
    if on_dask(elements.pipeline):
        _WholePipeline(elements.pipeline).add_error_pcollection(elements)


class _WholePipeline(ErrorHandler):
    """Looks at a complete pipeline: Beam asks its error handlers, before it runs, whether all is well."""

    def __init__(self, pipeline: beam.Pipeline) -> None:
        """Take the pipeline; it may still grow."""
        super().__init__(None)
        self.pipeline = pipeline

    def verify_closed(self) -> None:
        """Raises EnvelopeError: a step would be lost."""
        steps = _Steps()
        self.pipeline.visit(steps)
        for step in steps.all:
            for why, instead in _problems(step):
                refuse_on_dask(self, f"the step {step.full_label!r}", why, instead)
        computed = _leading_to(steps.primitive[-1])
        lost = [step.full_label for step in steps.primitive if step not in computed]
        if lost:
            more = f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
            refuse_on_dask(
                self,
                "a pipeline with several ends",
                "DaskRunner computes only the last step and what leads to it, so these steps would not run: "
                f"{', '.join(lost[:_SHOWN])}{more}",
                "Make a pipeline of its own of each end",
            )


class _Steps(PipelineVisitor):
    """The steps of a pipeline, in the order in which DaskRunner meets them."""

    def __init__(self) -> None:
        self.all: list[AppliedPTransform] = []
        self.primitive: list[AppliedPTransform] = []

    def enter_composite_transform(self, transform_node: AppliedPTransform) -> None:
        self.all.append(transform_node)

    def visit_transform(self, transform_node: AppliedPTransform) -> None:
        self.all.append(transform_node)
        self.primitive.append(transform_node)


def _inputs(step: AppliedPTransform) -> Iterator[Any]:
    yield from step.inputs
    yield from (side.pvalue for side in step.side_inputs)


def _leading_to(last: AppliedPTransform) -> set[AppliedPTransform]:
    found, waiting = {last}, [last]
    while waiting:
        before = {value.producer for value in _inputs(waiting.pop())} - {None} - found
        found |= before
        waiting.extend(before)
    return found


def _problems(step: AppliedPTransform) -> Iterator[tuple[str, str]]:
    """Yield why DaskRunner does not do what a step says, and what to do instead."""
    if isinstance(step.transform, beam.io.Read):
        yield "DaskRunner cannot read sources", "Begin with beam.Create([...paths...]) | ReadAllFromText() or its like"
    if any(value.producer is not None and value.tag is not None for value in _inputs(step)):
        yield "it reads a second output, and on DaskRunner that is all that the first one is", _ANOTHER
    if isinstance(step.transform, beam.ParDo):
        fn = step.transform.fn
        if inspect.isgeneratorfunction(fn.finish_bundle):
            yield (
                "it gives results at the end of a bundle, and DaskRunner drops those, so its files would be empty",
                "Write from the `process` of a DoFn, or take another runner",
            )
        if fn._process_batch_defined and not fn._process_defined:  # noqa: SLF001  # Beam has no public question
            yield "it takes batches, and DaskRunner gives single elements", _ANOTHER
