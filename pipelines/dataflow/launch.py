"""What the Flex Template launcher starts: it starts the job of the image's program, and does not wait for it.

The image says which program with BEAM_ENVELOPE_PIPELINE: encrypt, decrypt, rotate or verify.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from apache_beam.runners.runner import PipelineResult

from pipelines.dataflow.parameters import TEMPLATES, words_of


def launch(argv: Sequence[str] | None = None) -> PipelineResult:
    """Start the job and return its result. Raises as the program's `run`."""
    template = os.environ.get("BEAM_ENVELOPE_PIPELINE", "")
    if template not in TEMPLATES:
        msg = f"BEAM_ENVELOPE_PIPELINE is one of {', '.join(TEMPLATES)}, not {template!r}: build the image with it"
        raise ValueError(msg)
    words = words_of(template, sys.argv[1:] if argv is None else argv)
    result: PipelineResult = importlib.import_module(f"pipelines.{template}").run(words)
    return result


if __name__ == "__main__":
    launch()
