"""Rotate a dataset to another KMS key: its key files are rewritten, its shards are not read.

    python -m pipelines.rotate sealed/ --from 'local-kms://keyring.json' --to 'local-kms://keyring.json?name=new'
    python -m pipelines.rotate 's3://sealed/2026/**' --from aws-kms://alias/old --to aws-kms://alias/new \
        --log s3://audit/rotation.jsonl --runner=FlinkRunner --flink_master=HOST:8081

Any option of Beam may follow. With no runner named, the job uses all cores of this machine. Key files that cannot be
rotated are told in the log, all others are rotated, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from apache_beam.io.filesystems import FileSystems
from apache_beam.runners.runner import PipelineResult

from beam_envelope import arguments, jobs, preflight


def run(argv: Sequence[str] | None = None) -> PipelineResult:
    """Start the job and return its result, without waiting for it on runners that do not."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    arguments.add_rotate_arguments(parser)
    settings, options = jobs.parse(parser, argv)
    FileSystems.set_options(options)
    jobs.check_no_log(settings.log)

    preflight.check_rotate(settings, options, preflight.key_files_at(settings.patterns), tell=print)
    pipeline = jobs.make_pipeline(options)
    jobs.add_rotation(pipeline, settings, settings.log)
    with jobs.fail_when_a_worker_dies("by running it again"):
        return pipeline.run()


def main() -> int:
    """Run the job to its end; return the exit status."""
    result = run()
    result.wait_until_finish()
    return 1 if jobs.counters(result).get("key_files_failed") else 0


if __name__ == "__main__":
    sys.exit(main())
