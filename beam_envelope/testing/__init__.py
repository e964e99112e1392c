"""For users' own tests: a strict AWS KMS in this process, and a search for leaked plaintext.

`beam_envelope.testing.filesystem` has a conformance suite for envelope filesystems; it needs pytest.
"""

from beam_envelope.testing.canary import find_plaintext
from beam_envelope.testing.kms import FakeKms

__all__ = ["FakeKms", "find_plaintext"]
