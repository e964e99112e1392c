"""A streaming job: two sources without an end, many small bundles, and what is encrypted of them. Run as a program.

    python -m tests.engines.streams OUT TARGET --elements N --interval S --sources impulse replay --streaming ...

Each source gives N elements, one each S seconds: `impulse` is Beam's own PeriodicImpulse, `replay` a splittable DoFn of
ours that reads a file. The target is `records`, envelopes in the files of `OUT/SOURCE/sealed`, each line of which is
one bundle, or `text`, the shards `OUT/SOURCE/text*` of windows of WINDOW_S seconds.
"""

import argparse
import base64
import itertools
import json
import os
import sys
import time
import uuid
from pathlib import Path

import apache_beam as beam
from apache_beam.io.restriction_trackers import OffsetRange, OffsetRestrictionTracker
from apache_beam.io.watermark_estimators import ManualWatermarkEstimator
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.runner import PipelineState
from apache_beam.transforms.periodicsequence import PeriodicImpulse, RebaseMode
from apache_beam.transforms.window import FixedWindows, TimestampedValue
from apache_beam.utils.timestamp import Timestamp

from beam_envelope import EncryptRecords, WriteEncryptedText
from tests.engines.branches import CANARY, CONTEXT, KEY

WINDOW_S = 5


def text_of(number):
    """Return an element."""
    return f"{CANARY}-{number}"


def lines_of(path):
    """Read a file."""
    return Path(path).read_text().splitlines()


class Lines(beam.RestrictionProvider):
    """The lines of a file, by number; one restriction, as of a topic with one partition."""

    def initial_restriction(self, element):
        return OffsetRange(0, len(lines_of(element[0])))

    def create_tracker(self, restriction):
        return OffsetRestrictionTracker(restriction)

    def restriction_size(self, element, restriction):
        return restriction.size()


class Replay(beam.DoFn):
    """Gives each line of a file when it is due, and hands the rest back to the runner until the next is.

    The wait is its own: Flink gives the rest to a worker again at once, whatever time it is asked to wait, and keeps a
    state for each time. So there is one time for each line, not a hundred a second.

    Input: pairs of a path and the time at which its first line is due. Output: lines, with the times they were due.
    """

    def __init__(self, interval):
        self._interval = interval

    @beam.DoFn.unbounded_per_element()
    def process(
        self,
        element,
        tracker=beam.DoFn.RestrictionParam(Lines()),  # noqa: B008  # as Beam has it
        watermark=beam.DoFn.WatermarkEstimatorParam(ManualWatermarkEstimator.default_provider()),  # noqa: B008
    ):
        path, start = element
        lines, first = lines_of(path), tracker.current_restriction().start
        for position in itertools.count(first):
            due = start + position * self._interval
            if due > time.time():
                watermark.set_watermark(Timestamp(due))
                if position > first:
                    tracker.defer_remainder(Timestamp(due))
                    return
                time.sleep(max(0, due - time.time()))
            if not tracker.try_claim(position):
                return
            watermark.set_watermark(Timestamp(due))
            yield TimestampedValue(lines[position], due)


class Keep(beam.DoFn):
    """Appends the envelopes of each bundle, as one line of JSON, to a file of this DoFn's own."""

    def __init__(self, folder):
        self._folder = folder

    def setup(self):
        self._path = Path(self._folder, f"{os.getpid()}-{uuid.uuid4()}")

    def start_bundle(self):
        self._envelopes = []

    def process(self, envelope):
        self._envelopes.append(base64.b64encode(envelope).decode())

    def finish_bundle(self):
        if self._envelopes:
            with self._path.open("a") as file:
                file.write(json.dumps(self._envelopes) + "\n")


def impulse(begin, arguments, here):
    """Elements of Beam's source; the first is due when a worker begins."""
    numbers, interval = range(arguments.elements), arguments.interval
    stop = (len(numbers) - 0.5) * interval
    ticks = begin | PeriodicImpulse(0, stop, interval, data=numbers, rebase=RebaseMode.REBASE_ALL)
    return ticks | "Texts" >> beam.Map(text_of).with_output_types(str)


def replay(begin, arguments, here):
    """Elements of a file; the first is due when a worker begins."""
    (here / "replayed").write_text("".join(f"{text_of(number)}\n" for number in range(arguments.elements)))
    files = begin | beam.Create([str(here / "replayed")]) | "Begin" >> beam.Map(lambda path: (path, time.time()))
    return files | beam.ParDo(Replay(arguments.interval)).with_output_types(str)


def seal_records(elements, here):
    """Encrypt each element as a record, and keep the envelopes."""
    sealed = elements | EncryptRecords(key=KEY, keys=f"{here}/keys", context=CONTEXT)
    return sealed | beam.ParDo(Keep(f"{here}/sealed"))


def seal_text(elements, here):
    """Write the elements of each window as lines of a shard."""
    windows = elements | beam.WindowInto(FixedWindows(WINDOW_S))
    return windows | WriteEncryptedText(f"{here}/text", key=KEY, context=CONTEXT, num_shards=1)


SOURCES = {"impulse": impulse, "replay": replay}
TARGETS = {"records": seal_records, "text": seal_text}


class Branch(beam.PTransform):
    """A source and a target; its name makes those of its transforms unique."""

    def __init__(self, source, arguments):
        super().__init__()
        self._source, self._arguments = source, arguments

    def expand(self, begin):
        here = Path(self._arguments.out, self._source)
        (here / "sealed").mkdir(parents=True)
        elements = SOURCES[self._source](begin, self._arguments, here)
        assert not elements.is_bounded
        return TARGETS[self._arguments.target](elements, here)


def main():
    """Run the job until the sources have given all."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--elements", type=int, required=True)
    parser.add_argument("--interval", type=float, required=True)
    parser.add_argument("--sources", nargs="+", choices=SOURCES, required=True)
    arguments, options = parser.parse_known_args()
    pipeline = beam.Pipeline(options=PipelineOptions(options))
    for source in arguments.sources:
        _ = pipeline | source >> Branch(source, arguments)
    result = pipeline.run()
    state = result.wait_until_finish() or result.state
    print("the job ended as", state)
    return 0 if state == PipelineState.DONE else 1


if __name__ == "__main__":
    sys.exit(main())
