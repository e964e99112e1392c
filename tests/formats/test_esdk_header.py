"""The parser of message headers: what it refuses, and that nothing but errors of ours comes out of it."""

import base64
import os

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from beam_envelope.errors import EnvelopeError, FormatError, NotEncryptedError, TruncatedError
from beam_envelope.formats.esdk import MessageDecryptor, decrypt_message
from beam_envelope.formats.esdk_header import SUITES, read_header, read_suite, serialise_context
from beam_envelope.keys.aws import AwsKms
from beam_envelope.keys.context import ANY_CONTEXT
from tests.formats import esdk_messages
from tests.formats.esdk_messages import Message, counted

CONTEXT = {"dataset": "orders", "tenant": "a"}
EDK = (b"aws-kms", b"arn:aws:kms:us-east-1:111122223333:key/1", b"x" * 167)
ALLOW = "require-encrypt-allow-decrypt"


def parsed(message, what="record 7"):
    """Parse a header."""
    return read_header(message, read_suite(message, what), what)


def message_of(suite="0478", **parts):
    """Return the bytes of a message that no KMS opens."""
    given = {"context": CONTEXT, "edks": [EDK], **parts}
    return bytes(Message(suite, bytes(esdk_messages.SUITES[suite][0]), **given))


def refusal(kind, message):
    """Return what is said, and check that it does not depend on who asks."""
    with pytest.raises(EnvelopeError) as caught:
        parsed(message)
    assert type(caught.value) is kind
    with pytest.raises(kind) as again:
        decrypt_message(message, [], ANY_CONTEXT, commitment_policy=ALLOW, what="record 7")
    assert str(again.value) == str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suite", [suite for suite, row in esdk_messages.SUITES.items() if row[2] is None])
def test_a_header_says_what_was_written(suite):
    context = {"ключ": "значение", "\uffee": "before the emoji", "\U0001f600": "grin", "empty": ""}
    header = parsed(message_of(suite, context=context, edks=[EDK, (b"other", b"\xff\0", b"")], frame_bytes=5))
    assert header.suite is SUITES[bytes.fromhex(suite)]
    assert dict(header.context) == context
    assert [form.kms_key for form in header.wrapped_keys] == [EDK[1].decode(), "\\xff\0"]
    assert [form.wrapped for form in header.wrapped_keys] == [EDK[2], b""]
    assert header.frame_bytes == 5
    assert parsed(message_of(suite, frame_bytes=0)).frame_bytes == 0


def test_all_suites_of_the_standard_are_known():
    assert {suite.hex() for suite in SUITES} == set(esdk_messages.SUITES)
    for name, (size, digest, curve, _) in esdk_messages.SUITES.items():
        suite = SUITES[bytes.fromhex(name)]
        assert (suite.key_bytes, suite.kdf and suite.kdf.name) == (size, digest)
        assert (suite.curve and suite.curve.name, suite.commits) == (curve and curve.name, name[:2] in {"04", "05"})


@given(st.dictionaries(st.text(min_size=1), st.text()))
def test_any_context_is_serialised_as_the_standard_has_it(context):
    assert serialise_context(context) == esdk_messages.pairs(context)
    assert parsed(message_of(context=context, edks=[EDK])).context == context or not context


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"edks": []}, "it holds 0 encrypted data keys; between 1 and 10 are taken"),
        ({"edks": [EDK] * 11}, "it holds 11 encrypted data keys; between 1 and 10 are taken"),
        ({"edk_count": 65535}, "it holds 65535 encrypted data keys; between 1 and 10 are taken"),
        ({"edks": [(b"aws-kms", b"k" * 5000, b"x")]}, "it names a KMS key that is longer than any"),
        ({"content_type": 3}, "its content type is unknown or does not go with its frame length"),
        ({"content_type": 3, "frame_bytes": 0}, "its content type is unknown or does not go with its frame length"),
        ({"content_type": 1}, "its content type is unknown or does not go with its frame length"),
        ({"content_type": 2, "frame_bytes": 0}, "its content type is unknown or does not go with its frame length"),
        ({"suite": "0178", "reserved": b"\0\0\0\1"}, "a reserved field of its header is not 0, or its IV is not of"),
        ({"suite": "0178", "iv_bytes": 16}, "a reserved field of its header is not 0, or its IV is not of 12 bytes"),
        ({"aad": b"\0\0"}, "its encryption context is empty, too long or has a key twice"),
        ({"aad": b"\0\1\0\1a\0\1b!"}, "its encryption context is empty, too long or has a key twice"),
        ({"aad": b"\0\2" + b"\0\1a\0\1b" * 2}, "its encryption context is empty, too long or has a key twice"),
        ({"aad": b"\0\2\0\1a\0\1b"}, "its encryption context is broken"),
        ({"aad": b"\0\1\0\2a"}, "its encryption context is broken"),
        ({"aad": b"\0"}, "its encryption context is broken"),
        ({"aad": b"\0\1\0\1\xff\0\1b"}, "its encryption context is broken"),
        ({"context": {"aws-crypto-public-key": "x"}}, "its context has a public key, contrary to its suite"),
    ],
)
def test_what_the_standard_does_not_have_is_refused(parts, said):
    found = refusal(FormatError, message_of(**parts))
    assert found.startswith(f"record 7 is not a readable AWS Encryption SDK message: {said}")


def test_ten_wrapped_keys_are_taken():
    assert len(parsed(message_of(edks=[EDK] * 10)).wrapped_keys) == 10


@pytest.mark.parametrize("start", ["020014", "020178", "020000", "020479", "01800478", "01800000", "01810178", "0200"])
def test_an_unknown_suite_version_or_type_is_refused(start):
    message = bytes.fromhex(start) + b"\xff" * 200
    assert "it names the algorithm suite 0x" in refusal(FormatError, message)


@pytest.mark.parametrize("start", [b"\x00", b"\x03", b"\xf8", b"\xff"])
def test_other_data_is_refused_by_its_first_byte(start):
    said = refusal(FormatError, start + b"\xff" * 200)
    assert said.endswith(
        f"begins with the byte 0x{start.hex().upper()}, and messages of versions 1 and 2 do with 0x01 or 0x02"
    )


@pytest.mark.parametrize("suite", ["0478", "0178"])
@pytest.mark.parametrize("encode", [base64.b64encode, base64.encodebytes])
def test_base64_is_recognised(suite, encode):
    said = refusal(FormatError, encode(message_of(suite)))
    assert said.endswith("this looks base64-encoded; decode it first")


@pytest.mark.parametrize("text", ["hello", '{"id": 1}', "Größe", "a,b\r\n1,2\r\n", "Agriculture", "A" * 500])
def test_text_is_no_message(text):
    assert refusal(NotEncryptedError, text.encode()) == (
        "record 7 is text, not an encrypted message. Leave it out of what is to be decrypted"
    )


@pytest.mark.parametrize("suite", ["0478", "0178"])
@pytest.mark.parametrize("errors", ["replace", "ignore", "latin-1"])
def test_a_message_that_was_decoded_as_text_is_recognised(suite, errors):
    for _ in range(20):
        message = message_of(suite, edks=[(*EDK[:2], os.urandom(167))])
        text = message.decode("latin-1") if errors == "latin-1" else message.decode(errors=errors)
        with pytest.raises(EnvelopeError) as caught:
            decrypt_message(text.encode(), [], ANY_CONTEXT, commitment_policy=ALLOW, what="record 7")
        assert str(caught.value).startswith("record 7 was decoded as text on its way, which destroys it for good")


def test_nothing_is_an_end_that_is_missing():
    assert refusal(TruncatedError, b"").startswith("record 7 is empty")
    for start in (b"\x01", b"\x01\x80", b"\x01\x80\x01", b"\x02", b"\x02\x04", b"\x02\x04\x78"):
        assert refusal(TruncatedError, start).startswith("record 7 was cut short: its end is missing")


STARTS = [suite.lead for suite in SUITES.values()]


@settings(max_examples=10_000)
@given(st.one_of(st.binary(), st.builds(bytes.__add__, st.sampled_from(STARTS), st.binary(max_size=300))))
@example(b"\x02\x04\x78" + bytes(32) + b"\0\0\0\1" + counted(b"") * 3 + b"\2\0\0\0\1" + bytes(48))
def test_of_random_bytes_only_errors_of_ours_come_out(data):
    with pytest.raises(EnvelopeError):
        decrypt_message(data, [], ANY_CONTEXT, commitment_policy=ALLOW)


@settings(max_examples=500)
@given(data=st.data())
def test_of_changed_messages_only_errors_of_ours_come_out(data):
    message = bytearray(message_of(data.draw(st.sampled_from(["0478", "0178", "0078"]))))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(message)))
        message[start : start + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    with pytest.raises(EnvelopeError):
        decrypt_message(bytes(message), [], ANY_CONTEXT, commitment_policy=ALLOW)


def test_of_changed_messages_with_a_kms_behind_only_errors_of_ours_come_out(fake_kms):
    fake_kms.create_key("etl")
    parts = esdk_messages.message_under(AwsKms("alias/etl"), "0578", CONTEXT)
    message = bytes(parts)
    decryptor = MessageDecryptor([AwsKms("alias/etl")], ANY_CONTEXT, ALLOW)
    seen = set()

    @settings(max_examples=300)
    @given(st.integers(0, len(message)), st.integers(0, 3), st.binary(max_size=3))
    def change(start, size, new):
        changed = message[:start] + new + message[start + size :]
        if changed == message:
            return
        with pytest.raises(EnvelopeError) as caught:
            decryptor.decrypt(changed)
        seen.add(type(caught.value).__name__)

    change()
    assert {"TamperedError", "FormatError"} <= seen
