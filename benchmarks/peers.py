"""The contenders that turn one file into another: this package, and its peers. All end with fsync, as ours does.

Each reads and writes in the way that its own documentation shows, in blocks of 1 MiB where the caller chooses them.
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeAlias

from cryptography.cobblestone import Cobblestone256Decryptor, Cobblestone256Encryptor

from beam_envelope import KeyProvider, create_shard, open_shard
from beam_envelope.formats.shard_layout import CHUNK_BYTES, HEADER_BYTES, SEALED_CHUNK_BYTES
from beam_envelope.formats.shard_writer import ShardWriter
from benchmarks.settings import MIB

OURS: Final = "beam_envelope"
NATIVE: Final = "cryptography.cobblestone"
AGE: Final = "pyrage (age)"
ESDK: Final = "aws-encryption-sdk"
CP: Final = "cp (no encryption)"

NOWHERE: Final = Path(os.devnull)
"""A target that drops what it gets: what is left is the work on the bytes, without the disk's."""

CONTEXT: Final = {"purpose": "benchmark"}
BLOCK_BYTES: Final = MIB
SEALED_BLOCK_BYTES: Final = BLOCK_BYTES // CHUNK_BYTES * SEALED_CHUNK_BYTES

_ESDK_READ_BYTES: Final = 64 * 1024

Convert: TypeAlias = Callable[[Path, Path], None]


@dataclass(frozen=True)
class Peer:
    """A way to encrypt a file and to decrypt it again."""

    name: str
    encrypt: Convert
    decrypt: Convert


def ours(key: KeyProvider) -> Peer:
    """Return this package's `create_shard` and `open_shard`."""

    def encrypt(source: Path, target: Path) -> None:
        buffer = memoryview(bytearray(BLOCK_BYTES))
        with _open(source) as reader, _create_shard(target, key) as writer:
            while count := reader.readinto(buffer):  # type: ignore[attr-defined]  # BinaryIO leaves it out
                writer.write(buffer[:count])

    def decrypt(source: Path, target: Path) -> None:
        buffer = memoryview(bytearray(BLOCK_BYTES))
        with open_shard(source, key=key, context=CONTEXT) as reader, _create(target) as writer:
            while count := reader.readinto(buffer):
                write_all(writer, buffer[:count])
            _sync(writer)

    return Peer(OURS, encrypt, decrypt)


def native() -> Peer:
    """Return the cipher alone, in reused buffers: what a shard costs at least."""
    key = Cobblestone256Encryptor.generate_key()
    return Peer(NATIVE, partial(native_encrypt, key), partial(native_decrypt, key))


def native_encrypt(key: bytes, source: Path, target: Path) -> None:
    encryptor = Cobblestone256Encryptor(key, b"benchmark")
    plain = memoryview(bytearray(BLOCK_BYTES))
    sealed = memoryview(bytearray(SEALED_BLOCK_BYTES + HEADER_BYTES))
    with _open(source) as reader, _create(target) as writer:
        while count := reader.readinto(plain):  # type: ignore[attr-defined]
            write_all(writer, sealed[: encryptor.update_into(plain[:count], sealed)])
        write_all(writer, encryptor.finalize())
        _sync(writer)


def native_decrypt(key: bytes, source: Path, target: Path) -> None:
    decryptor = Cobblestone256Decryptor(key, b"benchmark")
    sealed = memoryview(bytearray(SEALED_BLOCK_BYTES))
    plain = memoryview(bytearray(BLOCK_BYTES + CHUNK_BYTES))
    with _open(source) as reader, _create(target) as writer:
        decryptor.update(reader.read(HEADER_BYTES))
        while count := reader.readinto(sealed):  # type: ignore[attr-defined]
            write_all(writer, plain[: decryptor.update_into(sealed[:count], plain)])
        write_all(writer, decryptor.finalize())
        _sync(writer)


def age() -> Peer:
    """Return age with one X25519 recipient, whose file functions are all Rust."""
    import pyrage  # noqa: PLC0415  # of the extra `bench`

    identity = pyrage.x25519.Identity.generate()

    def encrypt(source: Path, target: Path) -> None:
        pyrage.encrypt_file(str(source), str(target), [identity.to_public()])
        _sync_path(target)

    def decrypt(source: Path, target: Path) -> None:
        pyrage.decrypt_file(str(source), str(target), [identity])
        _sync_path(target)

    return Peer(AGE, encrypt, decrypt)


def esdk() -> Peer:
    """Return the AWS Encryption SDK, streaming: suite 0x0478, its default frame of 4 KiB, a raw AES key, no KMS.

    Of the ways to take the bytes from its stream, reads of 64 KiB were the fastest.
    """
    from aws_encryption_sdk import CommitmentPolicy, EncryptionSDKClient  # noqa: PLC0415  # of the extra `bench`
    from aws_encryption_sdk.identifiers import Algorithm  # noqa: PLC0415

    client = EncryptionSDKClient(commitment_policy=CommitmentPolicy.REQUIRE_ENCRYPT_REQUIRE_DECRYPT)
    wrapping = _esdk_wrapping_key()

    def convert(source: Path, target: Path, **options: Any) -> None:
        with source.open("rb") as reader, _create(target) as writer:
            with client.stream(source=reader, **wrapping, **options) as stream:
                while piece := stream.read(_ESDK_READ_BYTES):
                    write_all(writer, piece)
            _sync(writer)

    encrypt = partial(
        convert, mode="e", encryption_context=CONTEXT, algorithm=Algorithm.AES_256_GCM_HKDF_SHA512_COMMIT_KEY
    )
    return Peer(ESDK, encrypt, partial(convert, mode="d"))


def esdk_records() -> tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]:
    """Return encrypt and decrypt of the AWS Encryption SDK with its caching materials manager: suite 0x0478, a raw key.

    Its caching manager takes master key providers only, not the newer keyrings.
    """
    import aws_encryption_sdk as sdk  # noqa: PLC0415  # of the extra `bench`
    from aws_encryption_sdk.identifiers import Algorithm  # noqa: PLC0415

    client = sdk.EncryptionSDKClient(commitment_policy=sdk.CommitmentPolicy.REQUIRE_ENCRYPT_REQUIRE_DECRYPT)
    manager = sdk.CachingCryptoMaterialsManager(
        master_key_provider=_esdk_key_provider(os.urandom(32)),
        cache=sdk.LocalCryptoMaterialsCache(capacity=10),
        max_age=3600.0,
    )

    def encrypt(record: bytes) -> bytes:
        sealed: bytes = client.encrypt(
            source=record,
            materials_manager=manager,
            encryption_context=CONTEXT,
            algorithm=Algorithm.AES_256_GCM_HKDF_SHA512_COMMIT_KEY,
        )[0]
        return sealed

    def decrypt(message: bytes) -> bytes:
        opened: bytes = client.decrypt(source=message, materials_manager=manager)[0]
        return opened

    return encrypt, decrypt


def cp() -> Peer:
    """Return the system's `cp`, both ways: what moving the bytes costs."""
    return Peer(CP, copy, copy)


def copy(source: Path, target: Path) -> None:
    subprocess.run(["cp", "--", str(source), str(target)], check=True)
    _sync_path(target)


def write_all(stream: BinaryIO, data: memoryview | bytes) -> None:
    """Write all of `data` to an unbuffered file, which may take a part."""
    view = memoryview(data)
    while view:
        view = view[stream.write(view) :]


def _esdk_wrapping_key() -> dict[str, Any]:
    """Return the arguments for a raw AES key: a keyring, or on Python 3.10, which has none, the older provider."""
    material = os.urandom(32)
    try:
        from aws_cryptographic_material_providers import mpl  # noqa: PLC0415
        from aws_cryptographic_material_providers.mpl import config, models  # noqa: PLC0415
    except ImportError:
        return {"key_provider": _esdk_key_provider(material)}
    providers = mpl.AwsCryptographicMaterialProviders(config=config.MaterialProvidersConfig())
    settings = models.CreateRawAesKeyringInput(
        key_namespace="benchmark",
        key_name="key",
        wrapping_key=material,
        wrapping_alg=models.AesWrappingAlg.ALG_AES256_GCM_IV12_TAG16,
    )
    return {"keyring": providers.create_raw_aes_keyring(settings)}


def _esdk_key_provider(material: bytes) -> Any:  # a RawMasterKey, whose module has no types
    from aws_encryption_sdk.identifiers import EncryptionKeyType, WrappingAlgorithm  # noqa: PLC0415
    from aws_encryption_sdk.internal.crypto.wrapping_keys import WrappingKey  # noqa: PLC0415
    from aws_encryption_sdk.key_providers.raw import RawMasterKey  # noqa: PLC0415

    wrapping_key = WrappingKey(
        wrapping_algorithm=WrappingAlgorithm.AES_256_GCM_IV12_TAG16_NO_PADDING,
        wrapping_key=material,
        wrapping_key_type=EncryptionKeyType.SYMMETRIC,
    )
    return RawMasterKey(provider_id="benchmark", key_id="key", wrapping_key=wrapping_key)


def _open(path: Path) -> BinaryIO:
    return path.open("rb", buffering=0)


def _create(path: Path) -> BinaryIO:
    return path.open("wb", buffering=0)


@contextlib.contextmanager
def _create_shard(target: Path, key: KeyProvider) -> Iterator[ShardWriter]:
    if target != NOWHERE:
        with create_shard(target, key=key, context=CONTEXT) as writer:
            yield writer
        return
    with _create(target) as stream, create_shard(stream, key=key, context=CONTEXT, key_file=io.BytesIO()) as writer:
        yield writer


def _sync(stream: BinaryIO) -> None:
    """Have the bytes on the disk, if there is one."""
    if stream.name != os.devnull:
        os.fsync(stream.fileno())


def _sync_path(path: Path) -> None:
    with _open(path) as stream:
        _sync(stream)
