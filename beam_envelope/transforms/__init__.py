"""PTransforms and DoFns: thin shells around the functions of formats and io."""

from beam_envelope.io import options as _options  # noqa: F401  # so that keys find the pipeline's options
