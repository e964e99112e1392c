"""PTransforms and DoFns: thin shells around the functions of formats and io."""
