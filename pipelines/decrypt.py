"""Decrypt a dataset: each shard becomes a file, and encrypted Parquet becomes plain Parquet.

    python -m pipelines.decrypt 'sealed/*' --output opened/ --key local-kms://keyring.json --context dataset=flights
    python -m pipelines.decrypt 's3://sealed/2026/*' --output s3://opened/2026/ --key aws-kms://alias/etl \
        --runner=FlinkRunner --flink_master=HOST:8081

Any option of Beam may follow. With no runner named, the job uses all cores of this machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import apache_beam as beam
from apache_beam.io.filesystems import FileSystems
from apache_beam.runners.runner import PipelineResult

from beam_envelope import arguments, jobs, preflight


def run(argv: Sequence[str] | None = None) -> PipelineResult:
    """Start the job and return its result, without waiting for it on runners that do not."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    arguments.add_decrypt_arguments(parser)
    settings, options = jobs.parse(parser, argv)

    FileSystems.set_options(options)
    transform = jobs.decrypt_transform(settings)
    preflight.check_read(settings, options, preflight.key_files_at(settings.patterns), tell=print)
    pipeline = jobs.make_pipeline(options)
    _ = pipeline | "Files" >> beam.Create(settings.patterns) | "DecryptFiles" >> transform
    with jobs.fail_when_a_worker_dies():
        return pipeline.run()


if __name__ == "__main__":
    run().wait_until_finish()
