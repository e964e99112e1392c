"""The stored vectors, and programs that share no code with the package, agree with it in both directions."""

import base64
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography.cobblestone import Cobblestone256Decryptor
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from beam_envelope import ANY_CONTEXT, EnvelopeError, LocalKms, create_shard, open_shard
from beam_envelope.formats.keyfile import KeyFile, key_file_name
from tests.vectors import make

ROOT = Path(__file__).parents[2]
FORMAT_PAGE = ROOT / "docs" / "format.md"
VECTORS = json.loads(make.TARGET.read_bytes())
SHARDS = {vector["name"]: vector for vector in VECTORS["shards"]}
OPENED = [(name, keyring) for name, vector in SHARDS.items() for keyring in vector["opened_by"]]
REFUSALS = {vector["name"]: vector for vector in VECTORS["refusals"]}
NODE = shutil.which("node")
READERS = [
    pytest.param((sys.executable, "read_shard.py"), id="python"),
    pytest.param(
        (NODE, "read_shard.mjs"),
        id="node",
        marks=pytest.mark.skipif(NODE is None, reason="there is no `node` on the PATH"),
    ),
]


def lay_out(folder, shard, key_file, *, name="shard.bin", keyring="writer"):
    """Write a shard, its key file and a keyring; return the paths of the first and the last."""
    path, keys = folder / name, folder / "keys.json"
    path.write_bytes(shard)
    path.with_name(key_file_name(name)).write_bytes(key_file)
    keys.touch(mode=0o600)
    keys.write_text(json.dumps(VECTORS["keyrings"][keyring]))
    return path, keys


def lay_out_vector(folder, vector, keyring):
    """Lay out a vector under the name that its key file gives."""
    name = json.loads(vector["key_file"])["content"]["name"] or "shard.bin"
    shard = base64.b64decode(vector["shard"])
    return lay_out(folder, shard, vector["key_file"].encode(), name=name, keyring=keyring)


def edited(vector, edits):
    """Return the shard and the key file of a vector after the changes that docs/format.md, 6, describes."""

    def files_of(one):
        return {"shard": base64.b64decode(one["shard"]), "key_file": one["key_file"].encode()}

    files = files_of(vector)
    for edit in edits:
        data = bytearray(files[edit["file"]])
        if edit["do"] == "xor":
            data[edit["at"]] ^= int(edit["byte"], 16)
        elif edit["do"] == "cut":
            assert edit["size"] < len(data)
            data = data[: edit["size"]]
        elif edit["do"] == "append":
            data += bytes.fromhex(edit["hex"]) * edit["times"]
        elif edit["do"] == "ranges":
            data = b"".join(data[start:end] for start, end in edit["ranges"])
        elif edit["do"] == "replace":
            assert data.count(edit["old"].encode()) == 1
            data = data.replace(edit["old"].encode(), edit["new"].encode())
        elif edit["do"] == "text":
            data = edit["text"].encode()
        else:
            other = files_of(SHARDS[edit["of"]])[edit["file"]]
            if edit["do"] == "take":
                data = other
            else:
                assert edit["do"] == "copy"
                data[edit["start"] : edit["end"]] = other[edit["start"] : edit["end"]]
        assert data != files[edit["file"]], "the edit changes nothing"
        files[edit["file"]] = bytes(data)
    return files["shard"], files["key_file"]


def run(reader, *arguments):
    """Run one of the readers in docs/examples."""
    program, script = reader
    command = [program, str(ROOT / "docs" / "examples" / script), *map(os.fspath, arguments)]
    return subprocess.run(command, capture_output=True, timeout=60, check=False)


def assert_reads(reader, path, keys, plaintext, *, compressed):
    """Check that a reader gives the plaintext or, on a Node.js without zstd, says which one has it."""
    done = run(reader, path, keys)
    if compressed and b"22.15" in done.stderr:
        assert not node_has_zstd()
        assert (done.returncode, done.stdout) == (1, b"")
    else:
        assert done.stderr.decode() == ""
        assert (done.returncode, done.stdout) == (0, plaintext)


def node_has_zstd():
    program = 'process.exit("createZstdDecompress" in require("node:zlib") ? 0 : 1)'
    return subprocess.run([NODE, "-e", program], check=False).returncode == 0


# ---------------------------------------------------------------------------- the vectors and our own reader


@pytest.mark.parametrize(("name", "keyring"), OPENED)
def test_we_open_every_vector_with_each_of_its_keys(name, keyring, tmp_path):
    vector = SHARDS[name]
    path, keys = lay_out_vector(tmp_path, vector, keyring)

    with open_shard(path, key=f"local-kms://{keys}", context=vector["context"]) as shard:
        plaintext = shard.read()

    assert plaintext == make.plaintext(vector["plaintext_bytes"])
    assert hashlib.sha256(plaintext).hexdigest() == vector["plaintext_sha256"]


@pytest.mark.parametrize("vector", SHARDS.values(), ids=SHARDS)
def test_the_key_file_of_a_vector_is_written_again_byte_for_byte(vector):
    key_file = KeyFile.from_bytes(vector["key_file"].encode(), "the vector")

    assert key_file.to_bytes() == vector["key_file"].encode()
    assert key_file.binding().hex() == vector["binding"]


@pytest.mark.parametrize("vector", SHARDS.values(), ids=SHARDS)
def test_the_cobblestone_decryptor_opens_every_vector(vector):
    decryptor = Cobblestone256Decryptor(bytes.fromhex(vector["data_key"]), bytes.fromhex(vector["binding"]))
    shard = base64.b64decode(vector["shard"])
    message = decryptor.update(shard) + decryptor.finalize()

    assert bytes.fromhex(vector["derived"])[44:] == shard[24:56]
    if json.loads(vector["key_file"])["content"]["compression"] == "zstd":
        zstd = pytest.importorskip("backports.zstd")
        message = zstd.decompress(message)
    assert message == make.plaintext(vector["plaintext_bytes"])


@pytest.mark.parametrize("vector", SHARDS.values(), ids=SHARDS)
def test_the_wrapped_forms_of_a_vector_hold_its_data_key(vector, tmp_path):
    key_file = KeyFile.from_bytes(vector["key_file"].encode(), "the vector")
    (data_key,) = key_file.data_keys

    opened = 0
    for keyring in vector["opened_by"]:
        _, keys = lay_out_vector(tmp_path, vector, keyring)
        kms = LocalKms(str(keys))
        for wrapped in filter(kms.may_open, data_key.wrapped_keys):
            with kms.unwrap(wrapped, key_file.context) as unwrapped:
                assert unwrapped.material.hex() == vector["data_key"]
                assert unwrapped.key_id == data_key.key_id
                opened += 1

    assert opened == len(vector["opened_by"])


@pytest.mark.parametrize("vector", REFUSALS.values(), ids=REFUSALS)
def test_we_refuse_what_was_changed_with_the_error_that_the_page_names(vector, tmp_path):
    shard, key_file = edited(SHARDS[vector["of"]], vector["edits"])
    path, keys = lay_out(tmp_path, shard, key_file, keyring=vector.get("keyring", "writer"))

    with (
        pytest.raises(EnvelopeError) as caught,
        open_shard(path, key=f"local-kms://{keys}", context=vector.get("context", ANY_CONTEXT)) as opened,
    ):
        opened.read()

    assert type(caught.value).__name__ == vector["error"]


def test_the_page_shows_the_first_vector():
    page = FORMAT_PAGE.read_text(encoding="utf-8")
    blocks = [block.partition("\n")[2] for block in page.split("```")[1::2]]
    key_file, binding, keyring = (blocks[index] for index in range(3))

    assert key_file == SHARDS["size-1"]["key_file"]
    assert bytes.fromhex("".join(line.partition("#")[0] for line in binding.splitlines())) == bytes.fromhex(
        SHARDS["size-1"]["binding"]
    )
    assert json.loads(keyring) == VECTORS["keyrings"]["writer"]


def test_a_fresh_vector_differs_from_the_stored_one_only_where_it_is_random(tmp_path):
    stored = SHARDS["size-1"]
    fresh = make.Maker(tmp_path).shard("size-1", stored["about"], 1)

    random = {"binding", "derived", "key_file", "shard"}
    assert {field for field in stored if stored[field] != fresh[field]} == random


# ----------------------------------------------------------------------------------- the independent readers


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(("name", "keyring"), OPENED)
def test_an_independent_reader_opens_every_vector(reader, name, keyring, tmp_path):
    vector = SHARDS[name]
    path, keys = lay_out_vector(tmp_path, vector, keyring)

    plaintext = make.plaintext(vector["plaintext_bytes"])
    assert_reads(reader, path, keys, plaintext, compressed=name.startswith("zstd"))


@pytest.mark.parametrize("reader", READERS)
def test_an_independent_reader_refuses_what_was_changed(reader, tmp_path):
    def outcome(vector):
        folder = tmp_path / vector["name"]
        folder.mkdir()
        shard, key_file = edited(SHARDS[vector["of"]], vector["edits"])
        path, keys = lay_out(folder, shard, key_file, keyring=vector.get("keyring", "writer"))
        done = run(reader, path, keys)
        # What it gave before it failed is authentic, chunk by chunk.
        authentic = make.plaintext(SHARDS[vector["of"]]["plaintext_bytes"]).startswith(done.stdout)
        return done.returncode, done.stderr.startswith(os.fsencode(path)), authentic

    # These readers take the context from the key file, so what a caller expects is nothing to them.
    refused = [vector for vector in REFUSALS.values() if "context" not in vector]
    with ThreadPoolExecutor() as pool:
        outcomes = dict(zip((vector["name"] for vector in refused), pool.map(outcome, refused), strict=True))

    assert outcomes == dict.fromkeys(outcomes, (1, True, True))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("size", [0, 1, 16_384, 300_000])
def test_an_independent_reader_reads_what_we_write(reader, compression, size, tmp_path):
    _, keys = lay_out(tmp_path, b"", b"")
    path = tmp_path / "дата '1'.csv"
    plaintext = hashlib.shake_256(b"incompressible").digest(size)
    with create_shard(path, key=f"local-kms://{keys}", context=make.UNICODE_CONTEXT, compression=compression) as shard:
        shard.write(plaintext)

    assert_reads(reader, path, keys, plaintext, compressed=compression == "zstd")


# ------------------------------------------------------------------------------------- an independent writer


def framed(*parts):
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def write_shard(plaintext, keyring, context, *, compression, name):
    """Make a shard and its key file from docs/format.md alone, with no code of the package."""
    (key,) = keyring["keys"]
    data_key, kms_key = os.urandom(32), f"{key['name']}/{key['id']}"
    pairs = sorted((left.encode(), right.encode()) for left, right in context.items())
    encoded = len(pairs).to_bytes(4, "big") + b"".join(framed(*pair) for pair in pairs)
    nonce = os.urandom(12)
    wrapped = nonce + AESGCM(base64.b64decode(key["key"])).encrypt(nonce, data_key, framed(kms_key.encode()) + encoded)
    shard_id, created = uuid.uuid4(), "2026-01-01T00:00:00Z"
    document = {
        "format": "beam-envelope key file",
        "version": 1,
        "shard_id": str(shard_id),
        "cipher": "cobblestone-256",
        "content": {"compression": compression, "created": created, "name": name},
        "context": {left.decode(): right.decode() for left, right in pairs},
        "data_keys": [
            {
                "key_id": HKDFExpand(hashes.SHA512(), 16, b"beam-envelope/key-id@v1\0").derive(data_key).hex(),
                "wrapped_keys": [
                    {
                        "provider": "local-kms",
                        "kms_key": kms_key,
                        "wrapped_key": base64.b64encode(wrapped).decode(),
                    }
                ],
            }
        ],
    }
    parts = (shard_id.bytes, b"cobblestone-256", compression.encode(), created.encode(), name.encode())
    salt, binding = os.urandom(24), b"beam-envelope/shard@v1\0" + framed(*parts) + encoded
    info = b"c2sp.org/chunked-encryption@v1+AEAD_AES_256_GCM\0" + salt + binding
    derived = HKDFExpand(hashes.SHA512(), 76, info).derive(data_key)
    base_nonce, shard = int.from_bytes(derived[32:44], "big"), salt + derived[44:]
    for number in range(len(plaintext) // 16_384 + 1):
        nonce = (base_nonce ^ number).to_bytes(12, "big")
        chunk = plaintext[number * 16_384 : (number + 1) * 16_384]
        shard += AESGCM(derived[:32]).encrypt(nonce, chunk, None)
    return shard, json.dumps(document, indent=2, ensure_ascii=False).encode() + b"\n"


@pytest.mark.parametrize("name", ["", "plain.csv", make.UNICODE_NAME])
@pytest.mark.parametrize("context", [{}, make.CONTEXT, make.UNICODE_CONTEXT], ids=["bare", "plain", "unicode"])
@pytest.mark.parametrize("size", [0, 1, 16_383, 16_384, 16_385, 70_000])
def test_we_read_what_an_independent_writer_makes(size, context, name, tmp_path):
    plaintext = hashlib.shake_256(b"plaintext").digest(size)
    shard, key_file = write_shard(plaintext, VECTORS["keyrings"]["writer"], context, compression="none", name=name)
    path, keys = lay_out(tmp_path, shard, key_file)

    with open_shard(path, key=f"local-kms://{keys}", context=context) as opened:
        assert opened.read() == plaintext
        assert opened.seek(0, io.SEEK_END) == size
        opened.seek(size // 2)
        assert opened.read() == plaintext[size // 2 :]


def test_we_read_a_compressed_shard_of_an_independent_writer(tmp_path):
    zstd = pytest.importorskip("backports.zstd")
    plaintext = b"one line\n" * 20_000
    shard, key_file = write_shard(
        zstd.compress(plaintext), VECTORS["keyrings"]["writer"], make.CONTEXT, compression="zstd", name="a"
    )
    path, keys = lay_out(tmp_path, shard, key_file)

    with open_shard(path, key=f"local-kms://{keys}", context=make.CONTEXT) as opened:
        assert opened.read() == plaintext


def test_the_independent_writer_binds_what_the_page_says(tmp_path):
    shard, key_file = write_shard(b"x" * 100, VECTORS["keyrings"]["writer"], make.CONTEXT, compression="none", name="a")
    parsed = KeyFile.from_bytes(key_file, "the key file")
    _, keys = lay_out(tmp_path, shard, key_file)
    (wrapped,) = parsed.data_keys[0].wrapped_keys
    with LocalKms(str(keys)).unwrap(wrapped, make.CONTEXT) as data_key:
        material = bytes(data_key.material)

    right = Cobblestone256Decryptor(material, parsed.binding())
    assert right.update(shard) + right.finalize() == b"x" * 100
    wrong = Cobblestone256Decryptor(material, parsed.binding() + b"\0")
    with pytest.raises(InvalidTag):
        wrong.update(shard)
