"""AWS's own Encryption SDKs, for Python and for JavaScript, read what is written here, and are read here.

The one for JavaScript comes from npm, once, into the user's cache folder; without Node or npm its tests are skipped.
"""

import base64
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import boto3
import pytest
from cryptography.exceptions import InvalidTag

from beam_envelope.errors import ContextMismatchError, FormatError, TamperedError
from beam_envelope.formats.esdk import MessageDecryptor, MessageEncryptor, decrypt_message, encrypt_message
from beam_envelope.keys.aws import AwsKms
from beam_envelope.keys.cache import clear_caches, generate_data_key
from beam_envelope.keys.context import ANY_CONTEXT
from tests.formats.esdk_messages import COMMITTING, SUITES, message_under
from tests.vectors import make_esdk

CONTEXT = {"dataset": "orders", "ключ": "значение \U0001f600"}
FORBID = "forbid-encrypt-allow-decrypt"
DEFAULT = "require-encrypt-require-decrypt"
SIZES = (0, 1, 4095, 4096, 4097, 20_000)
PACKAGE = "@aws-crypto/client-node"
PACKAGE_VERSION = "5.0.2"
SCRIPT = Path(__file__).with_name("esdk.mjs")
VECTORS = json.loads(make_esdk.TARGET.read_bytes())


@pytest.fixture
def arn(fake_kms):
    return fake_kms.create_key("etl")


@pytest.fixture
def key(arn):
    return AwsKms(arn)


class Sdk:
    """AWS's Encryption SDK for Python, with the keyrings of its Material Providers Library."""

    def __init__(self):
        self.sdk = pytest.importorskip("aws_encryption_sdk", reason="needs the extra `bench`")
        mpl = pytest.importorskip("aws_cryptographic_material_providers.mpl", reason="needs Python 3.11 or newer")
        import aws_cryptographic_material_providers.mpl.models as models  # noqa: PLR0402
        from aws_cryptographic_material_providers.mpl.config import MaterialProvidersConfig

        self.models = models
        self.mpl = mpl.AwsCryptographicMaterialProviders(config=MaterialProvidersConfig())

    def client(self, policy=DEFAULT):
        """A client under a commitment policy."""
        policy = getattr(self.sdk.CommitmentPolicy, policy.upper().replace("-", "_"))
        return self.sdk.EncryptionSDKClient(commitment_policy=policy, max_encrypted_data_keys=10)

    def keyring(self, *arns):
        """A keyring of one or more KMS keys."""
        kms = boto3.client("kms")
        single = [
            self.mpl.create_aws_kms_keyring(self.models.CreateAwsKmsKeyringInput(kms_key_id=arn, kms_client=kms))
            for arn in arns
        ]
        if len(single) == 1:
            return single[0]
        given = self.models.CreateMultiKeyringInput(generator=single[0], child_keyrings=single[1:])
        return self.mpl.create_multi_keyring(given)

    def required(self, arn, *names):
        """What makes messages bind some pairs of the context without holding them."""
        given = self.models.CreateDefaultCryptographicMaterialsManagerInput(keyring=self.keyring(arn))
        manager = self.mpl.create_default_cryptographic_materials_manager(given)
        return self.mpl.create_required_encryption_context_cmm(
            self.models.CreateRequiredEncryptionContextCMMInput(
                underlying_cmm=manager, required_encryption_context_keys=list(names)
            )
        )

    def algorithm(self, suite):
        """A suite by its number."""
        return self.sdk.Algorithm.get_by_id(int(suite, 16))


@pytest.fixture
def sdk():
    return Sdk()


# Python


def test_aws_reads_what_is_written_here(sdk, arn, key):
    client = sdk.client()
    with key.generate_data_key(CONTEXT) as data_key:
        encryptors = [MessageEncryptor(data_key, CONTEXT, frame_bytes=size) for size in (4096, 1000)]
    for encryptor in encryptors:
        for size in SIZES:
            plaintext = os.urandom(size)
            found, header = client.decrypt(source=encryptor.encrypt(plaintext), keyring=sdk.keyring(arn))
            assert found == plaintext
            assert header.encryption_context == CONTEXT
            assert header.algorithm.algorithm_id == 0x0478


def test_aws_reads_a_message_without_context_and_one_under_several_keys(sdk, arn, key, fake_kms, local_key):
    second = fake_kms.create_key()
    with generate_data_key([local_key, key, AwsKms(second)], {}) as data_key:
        message = encrypt_message(b"data", data_key, None)
    for keyring in (sdk.keyring(arn), sdk.keyring(second), sdk.keyring(second, arn)):
        assert sdk.client().decrypt(source=message, keyring=keyring)[0] == b"data"


def test_aws_refuses_what_was_changed(sdk, arn, key):
    with key.generate_data_key(CONTEXT) as data_key:
        message = bytearray(encrypt_message(b"data", data_key, CONTEXT))
    message[-20] ^= 1
    with pytest.raises(InvalidTag):
        sdk.client().decrypt(source=bytes(message), keyring=sdk.keyring(arn))


@pytest.mark.parametrize("suite", SUITES)
def test_what_aws_writes_is_read(sdk, arn, key, fake_kms, suite):
    policy = DEFAULT if suite in COMMITTING else FORBID
    client, keyring = sdk.client(policy), sdk.keyring(arn)
    for size in SIZES:
        plaintext = os.urandom(size)
        message, header = client.encrypt(
            source=plaintext, keyring=keyring, encryption_context=CONTEXT, algorithm=sdk.algorithm(suite)
        )
        assert header.algorithm.algorithm_id == int(suite, 16)
        assert decrypt_message(message, [key], CONTEXT, commitment_policy=policy) == plaintext
        assert decrypt_message(message, [key], ANY_CONTEXT, commitment_policy=policy) == plaintext
    if suite not in COMMITTING:
        with pytest.raises(FormatError, match="commitment policy"):
            decrypt_message(message, [key], CONTEXT)


@pytest.mark.parametrize("suite", ["0078", "0178", "0478", "0578"])
def test_what_aws_writes_without_frames_is_read(sdk, arn, key, suite):
    policy = DEFAULT if suite in COMMITTING else FORBID
    message, _ = sdk.client(policy).encrypt(
        source=b"data",
        keyring=sdk.keyring(arn),
        encryption_context=CONTEXT,
        algorithm=sdk.algorithm(suite),
        frame_length=0,
    )
    assert decrypt_message(message, [key], CONTEXT, commitment_policy=policy) == b"data"


def test_what_aws_writes_by_default_under_several_keys_is_read(sdk, arn, fake_kms):
    second = fake_kms.create_key()
    message, header = sdk.client().encrypt(
        source=b"data" * 5000, keyring=sdk.keyring(arn, second), encryption_context=CONTEXT
    )
    assert header.algorithm.algorithm_id == 0x0578
    for one in (arn, second):
        clear_caches()
        assert decrypt_message(message, [AwsKms(one)], CONTEXT) == b"data" * 5000


@pytest.mark.parametrize("suite", ["0178", "0478", "0578"])
def test_the_messages_that_are_written_by_hand_in_these_tests_are_read_by_aws(sdk, arn, key, suite):
    policy = DEFAULT if suite in COMMITTING else FORBID
    for frame_bytes in (0, 3, 4096):
        message = bytes(message_under(key, suite, CONTEXT, frame_bytes=frame_bytes))
        found, _ = sdk.client(policy).decrypt(source=message, keyring=sdk.keyring(arn))
        assert found == b"plaintext"


@pytest.mark.parametrize("suite", ["0178", "0478", "0578"])
def test_required_pairs_are_left_out_and_bound_as_by_aws(sdk, arn, key, suite):
    policy = DEFAULT if suite in COMMITTING else FORBID
    context = {"dataset": "orders", "tenant": "a"}
    manager = sdk.required(arn, "tenant")
    message, _ = sdk.client(policy).encrypt(
        source=b"data", materials_manager=manager, encryption_context=context, algorithm=sdk.algorithm(suite)
    )
    assert b"tenant" not in message
    decryptor = MessageDecryptor([key], context, policy, required_context_keys=["tenant"])
    assert decryptor.decrypt(message) == b"data"
    with pytest.raises(ContextMismatchError):
        decrypt_message(message, [key], context, commitment_policy=policy)
    with pytest.raises(TamperedError):
        MessageDecryptor([key], {**context, "tenant": "b"}, policy, required_context_keys=["tenant"]).decrypt(message)


def test_aws_reads_messages_that_leave_pairs_out(sdk, arn, key):
    context = {"dataset": "orders", "tenant": "a"}
    with key.generate_data_key(context) as data_key:
        message = MessageEncryptor(data_key, context, required_context_keys=["tenant"]).encrypt(b"data")
    client = sdk.client()
    manager = sdk.required(arn, "tenant")
    found, _ = client.decrypt(source=message, materials_manager=manager, encryption_context=context)
    assert found == b"data"
    with pytest.raises(Exception, match="No Configured KMS Key was able to decrypt"):
        client.decrypt(
            source=message, keyring=sdk.keyring(arn), encryption_context={"dataset": "orders"}
        )  # as KMS refuses


def test_moto_serves_both_as_well(sdk, moto_server):
    arn = boto3.client("kms").create_key()["KeyMetadata"]["Arn"]
    with AwsKms(arn).generate_data_key(CONTEXT) as data_key:
        message = encrypt_message(b"data", data_key, CONTEXT)
    assert sdk.client().decrypt(source=message, keyring=sdk.keyring(arn))[0] == b"data"
    message, _ = sdk.client().encrypt(source=b"data", keyring=sdk.keyring(arn), encryption_context=CONTEXT)
    assert decrypt_message(message, [AwsKms(arn)], CONTEXT) == b"data"


@pytest.mark.parametrize("vector", VECTORS["messages"], ids=lambda vector: vector["name"])
def test_the_stored_messages_hold_for_aws_too(sdk, vector):
    """Their data key is wrapped by a local key, so a manager that knows it stands in for a keyring."""
    from aws_encryption_sdk.materials_managers import DecryptionMaterials
    from aws_encryption_sdk.materials_managers.base import CryptoMaterialsManager
    from aws_encryption_sdk.structures import DataKey, MasterKeyInfo

    class Known(CryptoMaterialsManager):
        def get_encryption_materials(self, request):
            raise NotImplementedError

        def decrypt_materials(self, request):
            assert request.encryption_context == vector["context"]
            held = {
                (one.key_provider.provider_id, one.key_provider.key_info.decode(), one.encrypted_data_key)
                for one in request.encrypted_data_keys
            }
            assert held == set(make_esdk.forms(vector))
            data_key = DataKey(MasterKeyInfo("local-kms", b"k"), bytes.fromhex(vector["data_key"]), b"x")
            return DecryptionMaterials(data_key=data_key)

    found, _ = sdk.client().decrypt(source=base64.b64decode(vector["message"]), materials_manager=Known())
    assert found == make_esdk.plaintext(vector["plaintext_bytes"])


# JavaScript


@pytest.fixture(scope="module")
def node_sdk():
    """The folder with AWS's SDK for JavaScript, which is installed if it is not there yet."""
    if not shutil.which("node") or not shutil.which("npm"):
        pytest.skip("Node and npm are not installed")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "beam-envelope-tests"
    folder = cache / f"aws-crypto-client-node-{PACKAGE_VERSION}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as draft:
            install = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", f"{PACKAGE}@{PACKAGE_VERSION}"]
            try:
                subprocess.run([*install, "--prefix", draft], check=True, capture_output=True, timeout=120)
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired, OSError) as error:
                pytest.skip(f"{PACKAGE} {PACKAGE_VERSION} cannot be installed: {error}")
            try:
                os.rename(draft, folder)
            except OSError:  # another process was faster
                assert folder.exists()
            Path(draft).mkdir(exist_ok=True)  # for the end of the block
    return folder


def ask_node(folder, requests):
    """Have Node answer all requests."""
    done = subprocess.run(
        ["node", SCRIPT, folder], input=json.dumps(requests).encode(), capture_output=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


def test_awss_javascript_reads_what_is_written_here(node_sdk, arn, key, fake_kms):
    second = fake_kms.create_key()
    plaintexts = [os.urandom(size) for size in SIZES]
    with generate_data_key([key, AwsKms(second)], CONTEXT) as data_key:
        encryptor = MessageEncryptor(data_key, CONTEXT)
        messages = [encryptor.encrypt(plaintext) for plaintext in plaintexts]
    bad = bytearray(messages[2])
    bad[-20] ^= 1
    answers = ask_node(
        node_sdk,
        [
            {"message": base64.b64encode(message).decode(), "keys": keys, "policy": DEFAULT}
            for message, keys in [*((message, [arn]) for message in messages), (messages[1], [second]), (bad, [arn])]
        ],
    )
    assert "plaintext" not in answers.pop()
    found = [base64.b64decode(answer["plaintext"]) for answer in answers]
    assert found == [*plaintexts, plaintexts[1]]
    assert all(answer["context"] == CONTEXT for answer in answers)


def test_what_awss_javascript_writes_is_read(node_sdk, arn, fake_kms):
    second = fake_kms.create_key()
    cases = [(suite, size) for suite in SUITES for size in (0, 9, 10, 25)]
    answers = ask_node(
        node_sdk,
        [
            {
                "plaintext": base64.b64encode(bytes(range(size))).decode(),
                "keys": [arn, second],
                "context": CONTEXT,
                "frame_bytes": 10,
                "suite": suite,
                "policy": DEFAULT if suite in COMMITTING else FORBID,
            }
            for suite, size in cases
        ],
    )
    for (suite, size), answer in zip(cases, answers, strict=True):
        message = base64.b64decode(answer["message"])
        policy = DEFAULT if suite in COMMITTING else FORBID
        for one in (arn, second):
            found = decrypt_message(message, [AwsKms(one)], CONTEXT, commitment_policy=policy)
            assert found == bytes(range(size)), (suite, size)
