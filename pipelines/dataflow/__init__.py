"""The programs in pipelines/ as Dataflow Flex Templates. docs/dataflow.md is the guide."""
