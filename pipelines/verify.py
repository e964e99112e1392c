"""Verify a dataset: every chunk of its shards, page of its Parquet files, and key file; nothing is written but the log.

    python -m pipelines.verify sealed/ --key local-kms://keyring.json --context dataset=flights
    python -m pipelines.verify 's3://sealed/2026/**' --key aws-kms://alias/etl --any-context \
        --log s3://audit/verify.jsonl --runner=FlinkRunner --flink_master=HOST:8081

Any option of Beam may follow. With no runner named, the job uses all cores of this machine. The exit status is 0 only
if all is well; what is wrong with which file is in the log, or without --log in that of the workers.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.runner import PipelineResult, PipelineState

from beam_envelope import arguments, jobs, preflight, verify_command


def run(argv: Sequence[str] | None = None) -> PipelineResult:
    """Start the job and return its result, without waiting for it on runners that do not."""
    settings, options = _parse(argv)
    FileSystems.set_options(options)
    jobs.check_no_log(settings.log)

    preflight.check_read(settings, options, preflight.key_files_at(settings.patterns), tell=print)
    pipeline = jobs.make_pipeline(options)
    jobs.add_verification(pipeline, settings, settings.log)
    with jobs.fail_when_a_worker_dies("by running it again"):
        return pipeline.run()


def main() -> int:
    """Run the job to its end; return the exit status."""
    result = run()
    state = result.wait_until_finish() or result.state
    if state != PipelineState.DONE:
        return 1
    files, problems = verify_command.outcome_of(result, _parse(None)[0].log)
    logging.getLogger(__name__).warning("%d files were verified, and %d have problems", files, problems)
    return 1 if problems else 0


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, PipelineOptions]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    arguments.add_verify_arguments(parser)
    return jobs.parse(parser, argv)


if __name__ == "__main__":
    sys.exit(main())
