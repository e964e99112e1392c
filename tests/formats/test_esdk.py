"""AWS Encryption SDK messages: what is written, what is read, and what is refused before anything is returned."""

import base64
import copy
import gc
import json
import os
import pickle
import signal
import threading
import tracemalloc

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from beam_envelope.errors import (
    ContextMismatchError,
    EnvelopeError,
    FormatError,
    KeyAccessError,
    TamperedError,
    TruncatedError,
    WrongKeyError,
)
from beam_envelope.formats import esdk
from beam_envelope.formats.esdk import MessageDecryptor, MessageEncryptor, decrypt_message, encrypt_message
from beam_envelope.keys import cache
from beam_envelope.keys.aws import AwsKms
from beam_envelope.keys.cache import clear_caches, generate_data_key
from beam_envelope.keys.context import ANY_CONTEXT
from beam_envelope.keys.local import LocalKms, generate_local_key
from beam_envelope.keys.provider import DataKey, WrappedKey
from tests.formats.esdk_messages import COMMITTING, SUITES, message_under, wrapped_key
from tests.vectors import make_esdk

CONTEXT = {"dataset": "orders", "tenant": "a"}
PLAINTEXT = b"a record that nobody else may read"
DEFAULT = "require-encrypt-require-decrypt"
ALLOW = "require-encrypt-allow-decrypt"
FORBID = "forbid-encrypt-allow-decrypt"
OLD = [suite for suite in SUITES if suite not in COMMITTING]
SIGNED = [suite for suite in SUITES if SUITES[suite][2]]
VECTORS = json.loads(make_esdk.TARGET.read_bytes())


@pytest.fixture
def key(request):
    """The key of most tests: a local one, which is fast, or one of FakeKms where the test has that too."""
    if "fake_kms" not in request.fixturenames:
        return request.getfixturevalue("local_key")
    request.getfixturevalue("fake_kms").create_key("etl")
    return AwsKms("alias/etl")


@pytest.fixture
def data_key(key):
    with key.generate_data_key(CONTEXT) as made:
        yield made


@pytest.fixture
def message(data_key):
    return encrypt_message(PLAINTEXT, data_key, CONTEXT)


def craft(key, suite, **parts):
    """Return the parts of a message of any suite."""
    context = parts.pop("context", CONTEXT)
    return message_under(key, suite, context, plaintext=PLAINTEXT, **parts)


# What is written


def test_a_message_is_laid_out_as_the_standard_has_it(fake_kms, data_key, message):
    (form,) = data_key.wrapped_keys
    names = b"\0\2" + b"\0\7dataset\0\6orders" + b"\0\6tenant\0\1a"
    section = len(names).to_bytes(2, "big") + names + b"\0\1"
    for part in (b"aws-kms", form.kms_key.encode(), form.wrapped):
        section += len(part).to_bytes(2, "big") + part
    section += b"\2" + (4096).to_bytes(4, "big")
    assert message[:3] == b"\x02\x04\x78"
    assert message[35 : 35 + len(section)] == section
    body = message[35 + len(section) + 32 + 16 :]
    assert body[:24] == b"\xff" * 4 + b"\0\0\0\1" + bytes(11) + b"\1" + len(PLAINTEXT).to_bytes(4, "big")
    assert len(body) == 24 + len(PLAINTEXT) + 16


def test_without_context_the_length_of_the_context_is_0(key):
    with key.generate_data_key({}) as data_key:
        message = encrypt_message(PLAINTEXT, data_key, None)
    assert message[35:39] == b"\0\0\0\1"
    assert decrypt_message(message, [key], None) == PLAINTEXT


@pytest.mark.parametrize("vector", VECTORS["messages"], ids=lambda vector: vector["name"])
def test_the_stored_messages_are_written_again_byte_for_byte_and_read(vector, monkeypatch, tmp_path):
    expected = base64.b64decode(vector["message"])
    monkeypatch.setattr(esdk.os, "urandom", lambda size: bytes.fromhex(vector["message_id"])[:size])
    data_key = DataKey(bytes.fromhex(vector["data_key"]), [WrappedKey(*form) for form in make_esdk.forms(vector)])
    plaintext = make_esdk.plaintext(vector["plaintext_bytes"])
    encryptor = MessageEncryptor(data_key, vector["context"], frame_bytes=vector["frame_bytes"])
    assert encryptor.encrypt(plaintext) == expected
    keyring = tmp_path / "keyring.json"
    keyring.touch(mode=0o600)
    keyring.write_text(json.dumps(VECTORS["keyring"]))
    assert decrypt_message(expected, [LocalKms(str(keyring))], vector["context"]) == plaintext


@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 199, 200, 201, 1000])
def test_every_length_around_the_frames_comes_back(key, data_key, size):
    plaintext = os.urandom(size)
    message = MessageEncryptor(data_key, CONTEXT, frame_bytes=100).encrypt(plaintext)
    assert decrypt_message(message, [key], CONTEXT) == plaintext
    n_frames = max(1, -(-size // 100))
    start = 35 + len(MessageEncryptor(data_key, CONTEXT)._section) + 48
    assert len(message) == start + size + n_frames * 32 + 8  # the last frame is never empty without need


def test_one_data_key_serves_many_messages_with_an_id_and_key_each(key, data_key):
    encryptor = MessageEncryptor(data_key, CONTEXT)
    messages = [encryptor.encrypt(PLAINTEXT) for _ in range(100)]
    assert len({message[3:35] for message in messages}) == 100
    assert len({message[-len(PLAINTEXT) - 16 :] for message in messages}) == 100


def test_an_encryptor_keeps_a_copy_until_it_is_closed(key, data_key):
    encryptor = MessageEncryptor(data_key, CONTEXT)
    data_key.close()
    assert decrypt_message(encryptor.encrypt(PLAINTEXT), [key], CONTEXT) == PLAINTEXT
    buffer = encryptor._data_key.material
    encryptor.close()
    encryptor.close()
    assert buffer == bytes(32)
    with pytest.raises(ValueError, match="this data key was erased"):
        encryptor.encrypt(PLAINTEXT)


def test_encrypting_one_message_leaves_no_copy_of_the_key(data_key, monkeypatch):
    copies = []
    duplicate = DataKey.duplicate
    monkeypatch.setattr(DataKey, "duplicate", lambda self: copies.append(duplicate(self)) or copies[-1])
    encrypt_message(PLAINTEXT, data_key, CONTEXT)
    assert [one.closed for one in copies] == [True]
    assert not data_key.closed


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"context": {"aws-crypto-public-key": "x"}}, "starts with 'aws-crypto-', which AWS reserves"),
        ({"context": {"aws:x": "y"}}, "starts with 'aws:', which AWS reserves"),
        ({"context": {"a": "x" * 9000}}, "KMS allows 8192"),
        ({"frame_bytes": 0}, "frame_bytes is between 1 and 2147483631, not 0"),
        ({"frame_bytes": 2**32}, "frame_bytes is between 1 and 2147483631"),
        ({"required_context_keys": ["region"]}, "required_context_keys names region, which context= does not have"),
    ],
)
def test_what_cannot_be_written_is_refused_at_once(data_key, change, said):
    with pytest.raises(ValueError, match=said):
        MessageEncryptor(data_key, **{"context": CONTEXT, **change})


@pytest.mark.parametrize(
    ("forms", "said"),
    [
        ([], "between 1 and 10 wrapped keys, not 0"),
        ([WrappedKey("aws-kms", "k", b"x")] * 11, "between 1 and 10 wrapped keys, not 11"),
        ([WrappedKey("aws-kms", "k" * 2049, b"x")], "its name or wrapped key is too long"),
        ([WrappedKey("aws-kms", "k", bytes(6145))], "its name or wrapped key is too long"),
    ],
)
def test_a_data_key_that_a_reader_would_refuse_is_refused(forms, said):
    with pytest.raises(ValueError, match=said):
        MessageEncryptor(DataKey(bytes(32), forms), CONTEXT)


@pytest.mark.parametrize("size", [16, 24])
def test_messages_are_written_under_data_keys_of_32_bytes_only(size):
    short = DataKey(bytes(size), [WrappedKey("aws-kms", "k", b"x")])
    with pytest.raises(ValueError, match=f"under data keys of 32 bytes, not {size}"):
        MessageEncryptor(short, CONTEXT)


# What is read


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_is_read_framed_and_unframed(key, suite):
    for frame_bytes in (0, 1, 10, len(PLAINTEXT), 4096):
        message = bytes(craft(key, suite, frame_bytes=frame_bytes))
        assert decrypt_message(message, [key], CONTEXT, commitment_policy=ALLOW) == PLAINTEXT


@pytest.mark.parametrize("suite", SUITES)
def test_a_message_without_plaintext_is_read(key, suite):
    for frame_bytes in (0, 10):
        parts = craft(key, suite, frame_bytes=frame_bytes)
        parts.plaintext = b""
        assert decrypt_message(bytes(parts), [key], CONTEXT, commitment_policy=ALLOW) == b""


def test_what_holds_bytes_is_read_and_text_is_not_bytes(key, message):
    for kind in (bytearray, memoryview):
        assert decrypt_message(kind(message), [key], CONTEXT) == PLAINTEXT
    with pytest.raises(TypeError):
        decrypt_message("AgR4", [key], CONTEXT)


def test_any_of_several_keys_opens_a_message(key, fake_kms, local_key):
    second = AwsKms(fake_kms.create_key())
    with generate_data_key([key, second, local_key], CONTEXT) as data_key:
        message = encrypt_message(PLAINTEXT, data_key, CONTEXT)
    for keys in ([key], [second], [local_key], [local_key, key]):
        clear_caches()
        fake_kms.calls.clear()
        assert decrypt_message(message, keys, CONTEXT) == PLAINTEXT
    fake_kms.disable_key("alias/etl")
    clear_caches()
    assert decrypt_message(message, [key, second], CONTEXT) == PLAINTEXT


def test_wrapped_keys_of_other_software_are_left_alone(key):
    parts = craft(key, "0478")
    parts.edks.insert(0, (b"raw\xff\xfe", b"name\0\0\0\x80\0\0\0\x0c" + b"\xff" * 12, bytes(48)))
    assert decrypt_message(bytes(parts), [key], CONTEXT) == PLAINTEXT


# The key


def test_the_callers_keys_decide_which_kms_key_is_asked(key, fake_kms, message):
    other = fake_kms.create_key("other")
    before = fake_kms.calls
    with pytest.raises(
        WrongKeyError, match=f"^record 7 is encrypted under arn:.*; the keys allowed here are .*{other}"
    ):
        decrypt_message(message, [AwsKms(other)], CONTEXT, what="record 7")
    assert fake_kms.calls == before
    with pytest.raises(WrongKeyError, match=r"^the message cannot be opened: KMS key alias/other did not wrap"):
        decrypt_message(message, [AwsKms("alias/other")], CONTEXT)


def test_a_message_with_the_wrapped_key_of_another_is_refused_before_decryption(key, data_key, message, monkeypatch):
    with key.generate_data_key(CONTEXT) as another:
        theirs = another.wrapped_keys[0].wrapped
    forged = message.replace(data_key.wrapped_keys[0].wrapped, theirs)
    assert forged != message
    monkeypatch.setattr(esdk, "AESGCM", None)  # it must not come to that
    with pytest.raises(WrongKeyError, match=r"^the data key of the message is not the one that its commitment names"):
        decrypt_message(forged, [key], CONTEXT)


def test_every_byte_of_the_message_id_and_the_commitment_is_compared_before_decryption(key, message, monkeypatch):
    decryptor = MessageDecryptor([key], CONTEXT)
    assert decryptor.decrypt(message) == PLAINTEXT
    ((_, section),) = decryptor._layouts
    monkeypatch.setattr(esdk, "AESGCM", None)
    for at in [*range(3, 35), *range(section.stop, section.stop + 32)]:
        changed = bytearray(message)
        changed[at] ^= 0x80
        with pytest.raises(WrongKeyError, match="its commitment names"):
            decryptor.decrypt(bytes(changed))


def test_swapped_wrapped_keys_are_refused(key, fake_kms):
    second = AwsKms(fake_kms.create_key("second"))
    with generate_data_key([key, second], CONTEXT) as data_key:
        message = encrypt_message(PLAINTEXT, data_key, CONTEXT)
    ours, theirs = (form.wrapped for form in data_key.wrapped_keys)
    swapped = message.replace(ours, b"?" * 167).replace(theirs, ours).replace(b"?" * 167, theirs)
    with pytest.raises(EnvelopeError, match="cannot be opened: "):
        decrypt_message(swapped, [key, second], CONTEXT)


def test_a_message_of_another_key_of_the_same_keyring_is_refused(local_key, tmp_path):
    other = LocalKms(local_key.path, "other")
    generate_local_key(other)
    with other.generate_data_key(CONTEXT) as data_key:
        message = encrypt_message(PLAINTEXT, data_key, CONTEXT)
    with pytest.raises(WrongKeyError, match="is encrypted under other/"):
        decrypt_message(message, [local_key], CONTEXT)
    assert decrypt_message(message, [other], CONTEXT) == PLAINTEXT


def test_kms_errors_are_told_as_such(key, fake_kms, message):
    fake_kms.deny("Decrypt")
    with pytest.raises(KeyAccessError, match=r"kms:Decrypt"):
        decrypt_message(message, [key], CONTEXT)


def test_a_data_key_of_another_length_than_the_suites_is_refused(key):
    for suite, size in (("0478", 16), ("0014", 32), ("0178", 24)):
        parts = craft(key, suite)
        _, edk = wrapped_key(key, size, CONTEXT)
        parts.edks = [edk]
        with pytest.raises(TamperedError, match=f"suite 0x{suite}, which its data key of {size} bytes does not fit"):
            decrypt_message(bytes(parts), [key], CONTEXT, commitment_policy=ALLOW)


# The context


def test_another_context_is_refused_before_any_call(key, fake_kms, message):
    before = fake_kms.calls
    for context in (None, {"dataset": "orders"}, {**CONTEXT, "tenant": "b"}, {**CONTEXT, "more": "x"}):
        with pytest.raises(ContextMismatchError, match=r"^record 7 was written with another encryption context: "):
            decrypt_message(message, [key], context, what="record 7")
    assert fake_kms.calls == before
    assert decrypt_message(message, [key], ANY_CONTEXT) == PLAINTEXT


@pytest.mark.parametrize("suite", SIGNED)
def test_the_public_key_of_a_signed_message_is_no_part_of_the_callers_context(key, suite):
    message = bytes(craft(key, suite))
    for context in (CONTEXT, ANY_CONTEXT):
        assert decrypt_message(message, [key], context, commitment_policy=ALLOW) == PLAINTEXT
    with pytest.raises(ContextMismatchError):
        decrypt_message(message, [key], {}, commitment_policy=ALLOW)


@pytest.mark.parametrize("suite", ["0178", "0478", "0578"])
def test_required_pairs_are_bound_but_not_in_the_message(key, suite):
    message = bytes(craft(key, suite, context={"dataset": "orders"}, required={"tenant": "a"}))
    assert b"tenant" not in message
    required = {"required_context_keys": ["tenant"]}
    assert MessageDecryptor([key], CONTEXT, ALLOW, **required).decrypt(message) == PLAINTEXT
    with pytest.raises(TamperedError, match="cannot be opened"):  # KMS refuses
        MessageDecryptor([key], {**CONTEXT, "tenant": "b"}, ALLOW, **required).decrypt(message)
    with pytest.raises(ContextMismatchError, match="'tenant' is not there"):
        MessageDecryptor([key], CONTEXT, ALLOW).decrypt(message)


def test_required_pairs_are_authenticated_by_the_header_too(key):
    parts = craft(key, "0478", context={"dataset": "orders"}, required={"tenant": "a"})
    parts.required = {}
    with pytest.raises(TamperedError, match="or is of another key or encryption context"):
        MessageDecryptor([key], CONTEXT, required_context_keys=["tenant"]).decrypt(bytes(parts))


def test_an_encryptor_leaves_required_pairs_out(key, data_key):
    message = MessageEncryptor(data_key, CONTEXT, required_context_keys=["tenant"]).encrypt(PLAINTEXT)
    assert b"tenant" not in message
    assert MessageDecryptor([key], CONTEXT, required_context_keys=["tenant"]).decrypt(message) == PLAINTEXT
    with pytest.raises(ContextMismatchError):
        decrypt_message(message, [key], CONTEXT)


@pytest.mark.parametrize("context", [ANY_CONTEXT, None, {"dataset": "orders"}])
def test_a_reader_has_to_have_the_required_pairs(key, context):
    with pytest.raises(ValueError, match="required_context_keys names tenant, which context= does not have"):
        MessageDecryptor([key], context, required_context_keys=["tenant"])


# The commitment policy


@pytest.mark.parametrize("suite", OLD)
def test_suites_without_commitment_are_read_only_if_the_policy_allows(key, fake_kms, suite):
    message = bytes(craft(key, suite))
    before = fake_kms.calls
    said = f"^record 7 is of suite 0x{suite}, which does not commit to its key, and the commitment policy does not"
    with pytest.raises(FormatError, match=said):
        decrypt_message(message, [key], CONTEXT, what="record 7")
    assert fake_kms.calls == before
    for policy in (ALLOW, FORBID):
        assert decrypt_message(message, [key], CONTEXT, commitment_policy=policy) == PLAINTEXT


@pytest.mark.parametrize("suite", COMMITTING)
def test_suites_with_commitment_are_read_under_every_policy(key, suite):
    for policy in (DEFAULT, ALLOW, FORBID):
        assert decrypt_message(bytes(craft(key, suite)), [key], CONTEXT, commitment_policy=policy) == PLAINTEXT


def test_a_cached_data_key_does_not_open_what_the_policy_forbids(key, fake_kms):
    old, new = craft(key, "0178"), craft(key, "0478")
    new.data_key, new.edks = old.data_key, old.edks  # one data key for both
    assert decrypt_message(bytes(old), [key], CONTEXT, commitment_policy=ALLOW) == PLAINTEXT
    strict = MessageDecryptor([key], CONTEXT)
    assert strict.decrypt(bytes(new)) == PLAINTEXT
    assert fake_kms.calls["Decrypt"] == 1  # it is cached
    for _ in range(2):
        with pytest.raises(FormatError, match="commitment policy"):
            strict.decrypt(bytes(old))
    loose = MessageDecryptor([key], CONTEXT, ALLOW)
    assert [loose.decrypt(bytes(one)) for one in (new, old, new, old)] == [PLAINTEXT] * 4
    loose._allowed = strict._allowed  # what it has opened before is no reason to go on
    with pytest.raises(FormatError, match="commitment policy"):
        loose.decrypt(bytes(old))
    assert loose.decrypt(bytes(new)) == PLAINTEXT


def test_the_suite_of_a_message_is_not_taken_from_one_before_it(key):
    plain, derived = craft(key, "0078"), craft(key, "0178")
    plain.data_key, plain.edks = derived.data_key, derived.edks
    decryptor = MessageDecryptor([key], CONTEXT, ALLOW)
    for one in (plain, derived, plain, derived):  # their headers differ in suite and message id only
        assert decryptor.decrypt(bytes(one)) == PLAINTEXT
    assert len(decryptor._opened) == 2


def test_an_unknown_policy_is_refused(key):
    with pytest.raises(ValueError, match=f"commitment_policy is one of {FORBID}, {ALLOW}, {DEFAULT}, not 'none'"):
        MessageDecryptor([key], CONTEXT, "none")


@pytest.mark.parametrize("start", [b"\x02" + bytes.fromhex(suite) for suite in SUITES if suite != "0478"])
@pytest.mark.parametrize("policy", [DEFAULT, ALLOW])
def test_a_suite_cannot_be_replaced(key, message, start, policy):
    for forged in (start + message[3:], b"\x01\x80" + start[1:] + message[3:]):
        with pytest.raises((FormatError, TamperedError, WrongKeyError, TruncatedError)):
            decrypt_message(forged, [key], ANY_CONTEXT, commitment_policy=policy)


def test_a_signed_message_cannot_be_turned_into_an_unsigned_one(key):
    message = bytes(craft(key, "0578"))
    with pytest.raises(FormatError, match="its context has a public key, contrary to its suite"):
        decrypt_message(b"\x02\x04" + message[2:], [key], CONTEXT)
    with pytest.raises(FormatError, match="its context lacks a public key, contrary to its suite"):
        decrypt_message(b"\x02\x05" + bytes(craft(key, "0478"))[2:], [key], CONTEXT)


# Signatures


@pytest.mark.parametrize("suite", SIGNED)
def test_a_signature_of_another_key_is_refused(key, suite):
    parts = craft(key, suite)
    parts.signing_key = ec.generate_private_key(parts.signing_key.curve)
    with pytest.raises(TamperedError, match=r"^the signature of the message does not fit"):
        decrypt_message(bytes(parts), [key], CONTEXT, commitment_policy=ALLOW)


@pytest.mark.parametrize("size", [0, 1, 2, 50])
def test_a_message_without_its_whole_signature_is_cut_short(key, size):
    parts = craft(key, "0578")
    message = bytes(parts)
    start = message.rindex(b"\xff\xff\xff\xff\0\0\0\1") + 24 + len(PLAINTEXT) + 16
    assert decrypt_message(message, [key], CONTEXT) == PLAINTEXT
    with pytest.raises(TruncatedError):
        decrypt_message(message[: start + size], [key], CONTEXT)


POINT = "Aig8HXNlzkeI8p+OvyNO3/6tb+mX++pf+i1YzJ36exxQiwVSb1W567IEDwW0j7bQ4Q=="  # of P-384, times 7


@pytest.mark.parametrize("point", ["AAAA", "!", "é", "", "Ag" + "A" * 64, POINT[:-1], POINT + "\n"])
def test_a_public_key_that_is_none_is_refused(key, point):
    parts = craft(key, "0578", context={})
    parts.context = {"aws-crypto-public-key": point}
    parts.data_key, edk = wrapped_key(key, 32, parts.context)
    parts.edks = [edk]
    with pytest.raises(FormatError, match="names a public key that is none of its suite, 0x0578"):
        decrypt_message(bytes(parts), [key], None)


# Changes, cuts and additions


@pytest.mark.parametrize("suite", ["0478", "0578", "0178", "0078", "0214"])
@pytest.mark.parametrize("frame_bytes", [0, 20])
def test_every_flipped_bit_is_an_error_with_cold_and_warm_caches(key, suite, frame_bytes):
    message = bytes(craft(key, suite, frame_bytes=frame_bytes))
    warm = MessageDecryptor([key], CONTEXT, ALLOW)
    assert warm.decrypt(message) == PLAINTEXT
    for at in range(len(message)):
        changed = bytearray(message)
        changed[at] ^= 1 << at % 8
        with pytest.raises(EnvelopeError) as caught:
            warm.decrypt(bytes(changed))
        assert PLAINTEXT.decode() not in str(caught.value)
    assert warm.decrypt(message) == PLAINTEXT
    assert len(warm._opened) == 1  # what was not authentic is not remembered


@pytest.mark.parametrize("suite", ["0478", "0578", "0178", "0078"])
@pytest.mark.parametrize("frame_bytes", [0, 20])
def test_every_cut_is_told_as_one(key, suite, frame_bytes):
    message = bytes(craft(key, suite, frame_bytes=frame_bytes))
    warm = MessageDecryptor([key], CONTEXT, ALLOW)
    assert warm.decrypt(message) == PLAINTEXT
    for size in range(len(message)):
        with pytest.raises(TruncatedError):
            warm.decrypt(message[:size])


def test_a_message_that_is_cut_within_its_header_is_told_without_a_call(key, fake_kms, data_key, message):
    before = fake_kms.calls
    header = len(message) - 24 - len(PLAINTEXT) - 16
    for size in range(header):
        with pytest.raises(TruncatedError):
            decrypt_message(message[:size], [key], CONTEXT)
    assert fake_kms.calls == before


@pytest.mark.parametrize("suite", ["0478", "0578"])
@pytest.mark.parametrize("frame_bytes", [0, 20])
def test_bytes_after_the_end_are_refused(key, suite, frame_bytes):
    message = bytes(craft(key, suite, frame_bytes=frame_bytes))
    for more in (b"\0", message):
        with pytest.raises(FormatError, match=f"has {len(more)} bytes after its end"):
            decrypt_message(message + more, [key], CONTEXT)


def test_frames_cannot_be_dropped_doubled_or_swapped(key, data_key):
    plaintext = bytes(range(100))
    message = MessageEncryptor(data_key, CONTEXT, frame_bytes=30).encrypt(plaintext)
    start = len(message) - (3 * (30 + 32) + 10 + 40)
    first, second, third = (message[start + i * 62 : start + (i + 1) * 62] for i in range(3))
    header, last = message[:start], message[start + 3 * 62 :]
    assert decrypt_message(header + first + second + third + last, [key], CONTEXT) == plaintext
    for frames in ([second, third], [first, third], [first, second], [first, first, second, third], [second, first]):
        with pytest.raises(TamperedError, match="a frame of the message is out of order"):
            decrypt_message(b"".join([header, *frames, last]), [key], CONTEXT)
    renumbered = second[:3] + b"\1" + second[4:]
    with pytest.raises(TamperedError, match="was changed after it was written"):
        decrypt_message(b"".join([header, renumbered, last]), [key], CONTEXT)


def test_frames_of_another_message_of_the_same_data_key_are_refused(key, data_key):
    encryptor = MessageEncryptor(data_key, CONTEXT)
    one, other = encryptor.encrypt(b"1" * 10), encryptor.encrypt(b"2" * 10)
    body = len(one) - 24 - 10 - 16
    with pytest.raises(TamperedError):
        decrypt_message(one[:body] + other[body:], [key], CONTEXT)
    with pytest.raises(WrongKeyError):
        decrypt_message(one[:3] + other[3:35] + one[35:], [key], CONTEXT)


def test_an_authentic_last_frame_with_a_wrong_number_or_length_is_refused(key):
    with pytest.raises(TamperedError, match="out of order"):
        decrypt_message(bytes(craft(key, "0478", final_number=2)), [key], CONTEXT)
    parts = craft(key, "0478", frame_bytes=20)
    parts.frames = lambda gcm: type(parts).frames(craft_long_last(parts), gcm)
    with pytest.raises(TamperedError, match="of another length"):
        decrypt_message(bytes(parts), [key], CONTEXT)


def craft_long_last(parts):
    """Return the same message with room for all in its last frame, as its header does not have it."""
    longer = copy.copy(parts)
    del longer.__dict__["frames"]
    longer.frame_bytes = 4096
    return longer


@pytest.mark.parametrize("frame_bytes", [0, 20, 4096])
def test_forged_lengths_allocate_nothing(key, frame_bytes):
    message = bytes(craft(key, "0478", frame_bytes=frame_bytes))
    decryptor = MessageDecryptor([key], CONTEXT)
    assert decryptor.decrypt(message) == PLAINTEXT
    tracemalloc.start()
    try:
        for at in range(35, len(message) - 8):
            for size in (2, 4, 8):
                forged = message[:at] + b"\x7f" * size + message[at + size :]
                if forged == message:  # random bytes: one message in 100 has two in a row that are 0x7f already
                    continue
                with pytest.raises(EnvelopeError):
                    decryptor.decrypt(forged)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20  # the forged lengths are of up to 2 GiB
    finally:
        tracemalloc.stop()


def test_a_frame_that_the_cipher_does_not_take_is_an_error_of_ours(key, message, monkeypatch):
    def overflow(*_):
        raise OverflowError

    monkeypatch.setattr(esdk, "open_frames", overflow)
    with pytest.raises(FormatError, match="has a frame of over 2 GiB"):
        decrypt_message(message, [key], CONTEXT)


# The caches


def test_a_hundred_messages_of_one_data_key_ask_the_kms_once(key, fake_kms, data_key):
    encryptor = MessageEncryptor(data_key, CONTEXT)
    messages = [encryptor.encrypt(str(number).encode()) for number in range(100)]
    decryptor = MessageDecryptor([key], CONTEXT)
    assert [decryptor.decrypt(message) for message in messages] == [str(number).encode() for number in range(100)]
    for message in messages:
        decrypt_message(message, [key], CONTEXT)
    assert fake_kms.calls == {"GenerateDataKey": 1, "Decrypt": 1}


def test_messages_of_several_writers_ask_the_kms_once_for_each(key, fake_kms):
    decryptor = MessageDecryptor([key], ANY_CONTEXT)
    contexts = [{"n": "1" * size} for size in range(1, 21)]  # more lengths than are remembered
    messages = []
    for context in contexts:
        with key.generate_data_key(context) as data_key:
            messages.append(encrypt_message(context["n"].encode(), data_key, context))
    for _ in range(3):
        assert [decryptor.decrypt(message) for message in messages] == [c["n"].encode() for c in contexts]
    assert fake_kms.calls["Decrypt"] == 20
    assert len(decryptor._layouts) == esdk._MAX_LAYOUTS


def test_the_context_is_checked_for_each_message_with_a_warm_cache(key, data_key, message):
    decryptor = MessageDecryptor([key], CONTEXT)
    decryptor.decrypt(message)
    with key.generate_data_key({"dataset": "orders", "tenant": "b"}) as other:
        theirs = encrypt_message(PLAINTEXT, other, {"dataset": "orders", "tenant": "b"})
    with pytest.raises(ContextMismatchError):
        decryptor.decrypt(theirs)


def test_a_revoked_right_takes_effect_when_the_cache_of_the_process_forgets(key, fake_kms, message, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(cache.time, "monotonic", lambda: now[0])
    decryptor = MessageDecryptor([key], CONTEXT)
    assert decryptor.decrypt(message) == PLAINTEXT
    fake_kms.deny("Decrypt")
    now[0] += cache.UNWRAPPED_TTL_S - 0.1
    assert decryptor.decrypt(message) == PLAINTEXT  # it asked the process's cache again
    now[0] += esdk._OPENED_TTL_S
    with pytest.raises(KeyAccessError):
        decryptor.decrypt(message)


def test_what_a_decryptor_keeps_is_bounded(key, monkeypatch):
    monkeypatch.setattr(esdk, "_MAX_OPENED", 3)
    decryptor = MessageDecryptor([key], CONTEXT)
    for _ in range(10):
        with key.generate_data_key(CONTEXT) as data_key:
            message = encrypt_message(PLAINTEXT, data_key, CONTEXT)
        for _ in range(2):
            assert decryptor.decrypt(message) == PLAINTEXT
        assert len(decryptor._opened) <= 3


def test_closing_a_decryptor_erases_its_keys_and_it_goes_on(key, fake_kms, message):
    decryptor = MessageDecryptor([key], CONTEXT)
    decryptor.decrypt(message)
    ((_, opened),) = decryptor._opened.items()
    buffer = opened.data_key.material
    assert buffer != bytes(32)
    del opened
    decryptor.close()
    gc.collect()
    assert buffer == bytes(32)
    assert decryptor.decrypt(message) == PLAINTEXT


def test_threads_share_a_decryptor_and_an_encryptor(key, fake_kms, data_key):
    encryptor, decryptor = MessageEncryptor(data_key, CONTEXT), MessageDecryptor([key], CONTEXT)
    wrong, start = [], threading.Barrier(8)

    def work(number):
        start.wait(10)
        for _ in range(50):
            if decryptor.decrypt(encryptor.encrypt(number)) != number:
                wrong.append(number)
            if number == b"0":
                decryptor.close()

    threads = [threading.Thread(target=work, args=(str(number).encode(),)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert fake_kms.calls["Decrypt"] == 1


def test_neither_travels(key, data_key):
    for one in (MessageEncryptor(data_key, CONTEXT), MessageDecryptor([key], CONTEXT)):
        for travel in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match=f"a {type(one).__name__} cannot be pickled or copied"):
                travel(one)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_has_no_keys(local_key):
    with local_key.generate_data_key(CONTEXT) as data_key:
        encryptor, decryptor = MessageEncryptor(data_key, CONTEXT), MessageDecryptor([local_key], CONTEXT)
    message = encryptor.encrypt(PLAINTEXT)
    assert decryptor.decrypt(message) == PLAINTEXT
    child = os.fork()
    if not child:
        signal.alarm(20)
        try:
            assert encryptor._data_key.closed
            assert decryptor._opened == {}
            assert decryptor.decrypt(message) == PLAINTEXT
            os._exit(0)
        except BaseException:  # noqa: BLE001  # a child of a test must not go on as a test
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert decryptor.decrypt(encryptor.encrypt(PLAINTEXT)) == PLAINTEXT
