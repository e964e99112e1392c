"""The arguments of the command and of the programs in pipelines/. Imports no Beam, so that `--help` answers at once."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Final

from beam_envelope.keys.context import ANY_CONTEXT, AnyContext, checked_context
from beam_envelope.table_arguments import CODECS, add_decrypt_table_arguments, add_encrypt_table_arguments

MANIFEST_MODES: Final = ("use", "require", "ignore")
IF_EXISTS: Final = ("error", "skip", "overwrite")

KEY_HELP: Final = (
    "the KMS key: aws-kms://alias/NAME, aws-kms://KEY_ARN, hcvault://MOUNT/keys/NAME, or "
    "local-kms://KEYRING_FILE[?name=NAME] for trying out"
)


def add_encrypt_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of an encrypting job."""
    parser.add_argument(
        "patterns", nargs="+", metavar="INPUT", help="a file, a folder or a quoted glob; ** for sub-folders"
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where the shards and their key files go")
    parser.add_argument(
        "--key",
        action="append",
        help=f"{KEY_HELP}; aws-kms://alias/data-{{tenant}} for one that each path chooses. Give it again for more "
        "keys: any one opens the shards. Default: --envelope_key, or BEAM_ENVELOPE_KEY",
    )
    add_context_argument(parser, "given again to decrypt; KMS logs and key files show it, so nothing secret")
    parser.add_argument(
        "--split-lines",
        metavar="SIZE",
        help="cut line-delimited files into shards of about this size (256MiB), each ending at a line's end",
    )
    parser.add_argument(
        "--header-lines",
        type=int,
        default=0,
        metavar="N",
        help="with --split-lines: repeat the first N lines in each shard",
    )
    parser.add_argument(
        "--compression",
        choices=CODECS,
        help="before encryption. Shards: none (default) or zstd. Parquet: default as in the input, and snappy for text",
    )
    parser.add_argument(
        "--no-manifest",
        dest="manifest",
        action="store_false",
        help="do not list the shards in the output's _MANIFEST.json, which shows a reader what is missing or added",
    )
    _add_common_arguments(parser)
    add_check_arguments(parser)
    add_encrypt_table_arguments(parser)


def add_decrypt_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a decrypting job."""
    parser.add_argument(
        "patterns", nargs="+", metavar="SHARDS", help="a shard, a folder or a quoted glob; ** for sub-folders"
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where the plain files go")
    add_reader_arguments(parser)
    _add_common_arguments(parser)
    add_check_arguments(parser)
    add_decrypt_table_arguments(parser)


def add_rotate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a rotating job."""
    parser.add_argument(
        "patterns",
        nargs="+",
        metavar="KEY_FILES",
        help="a folder, or a quoted glob of shards or of key files; ** for sub-folders. Shards are not read",
    )
    parser.add_argument(
        "--from",
        dest="source",
        required=True,
        action="append",
        metavar="KEY",
        help=f"the key that opens what is there. {KEY_HELP[0].upper()}{KEY_HELP[1:]}. Give it again for several",
    )
    parser.add_argument("--to", metavar="KEY", help="the key that takes its place; the same key: its newest version")
    parser.add_argument("--add", metavar="KEY", action="append", default=[], help="a key that opens it as well")
    parser.add_argument(
        "--remove",
        metavar="KEY",
        action="append",
        default=[],
        help="a key that opens it no longer; --from is one that stays, and is tried first",
    )
    parser.add_argument("--dry-run", action="store_true", help="change nothing, and say what would be changed")
    parser.add_argument(
        "--log", metavar="FILE", help="write what was done to each key file, as JSON lines; FILE must not exist"
    )
    parser.add_argument(
        "--max-requests-per-s", type=float, metavar="N", help="at most so many requests to the KMS in a second"
    )
    add_check_arguments(parser)


def add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a verifying job."""
    parser.add_argument(
        "patterns",
        nargs="+",
        metavar="SHARDS",
        help="a folder, or a quoted glob of shards, Parquet files or key files; ** for sub-folders. Key stores too",
    )
    add_reader_arguments(parser)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="check key files, key commitments and lengths only; damage inside of files is not noticed",
    )
    parser.add_argument(
        "--log", metavar="FILE", help="write what was found of each file, as JSON lines; FILE must not exist"
    )
    add_check_arguments(parser)


def add_check_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what is checked before the job starts."""
    parser.add_argument(
        "--check-workers",
        action="store_true",
        help="before the job, run a small one that tries the keys on the workers, and show what was found",
    )
    parser.add_argument(
        "--no-check",
        action="store_true",
        help="do not try the keys in this process; for launchers that may not use them",
    )


def add_manifest_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `manifest`."""
    parser.add_argument("folder", metavar="FOLDER", help="the dataset's folder")
    parser.add_argument("--key", required=True, action="append", help=f"{KEY_HELP}. Give it again for more keys")
    add_context_argument(parser, "the context that the shards were written with")
    parser.add_argument("--add", action="store_true", help="list what is there and not listed, if the key opens it")
    parser.add_argument("--forget", action="store_true", help="take from the list what is listed and not there")
    parser.add_argument(
        "--compact", action="store_true", help="put one section in the place of all, so that readers ask the KMS once"
    )


def add_shards_argument(parser: argparse.ArgumentParser) -> None:
    """Add the positional argument of the commands that look at shards."""
    parser.add_argument("patterns", nargs="+", metavar="SHARDS", help="a shard, a folder or a quoted glob")


def add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `inspect`."""
    parser.add_argument(
        "patterns",
        nargs="+",
        metavar="SHARDS",
        help="a folder, a shard or a quoted glob; ** for sub-folders. Key stores too",
    )
    parser.add_argument(
        "--audit",
        action="store_true",
        help="tell of KMS keys, ages, contexts and findings in place of each shard; the options below imply it",
    )
    parser.add_argument(
        "--ask-kms",
        action="store_true",
        help="ask for the state of each KMS key (AWS: kms:DescribeKey; Vault: read on the key). Nothing is decrypted",
    )
    parser.add_argument(
        "--key",
        action="append",
        default=[],
        help="with --ask-kms: a key whose keyring, Vault server, or AWS profile and endpoint are asked. Repeatable",
    )
    parser.add_argument(
        "--older-than", type=float, metavar="DAYS", help="data keys last wrapped before that are due for rotation"
    )
    parser.add_argument("--html", metavar="FILE", help="write it as one page for a browser; FILE must not exist")
    parser.add_argument(
        "--fail-on-findings", action="store_true", help="end with status 1 if there is a critical finding or a warning"
    )


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--json`."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def add_keygen_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `keygen`."""
    parser.add_argument("--key", required=True, help="local-kms://KEYRING_FILE or local-kms://KEYRING_FILE?name=NAME")


def add_reader_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what every reader needs: the allowed keys and the context."""
    parser.add_argument(
        "--key",
        action="append",
        help=f"{KEY_HELP}; or all keys of an account, aws-kms://*?account=ACCOUNT[&region=...][&alias=data-*]. Give it "
        "again to allow more keys. Default: --envelope_key, or BEAM_ENVELOPE_KEY",
    )
    add_context_argument(parser, "the context that the shards were written with")
    parser.add_argument("--any-context", action="store_true", help="accept shards of any context")
    parser.add_argument(
        "--manifest",
        choices=MANIFEST_MODES,
        default="use",
        help="where a manifest is at or above the shards, it has to list them (use, the default); there has to be one "
        "(require); or pass it over (ignore)",
    )


def add_context_argument(parser: argparse.ArgumentParser, text: str) -> None:
    """Add `--context`."""
    parser.add_argument(
        "--context", action="append", default=[], metavar="NAME=VALUE", help=f"a pair of the encryption context: {text}"
    )


def _add_common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--relative-to", metavar="FOLDER", help="keep paths relative to this folder")
    parser.add_argument(
        "--path-fields",
        metavar="PATTERN",
        help="where in an input's path is what fills a template such as --key aws-kms://alias/data-{tenant}: "
        "'{tenant}/*.csv'. Default: folders say it, tenant=acme/",
    )
    parser.add_argument(
        "--if-exists",
        choices=IF_EXISTS,
        default="error",
        help="when an output exists: stop before the job starts (default), skip what is whole, or overwrite",
    )


def context_of(arguments: argparse.Namespace) -> dict[str, str] | AnyContext:
    """Return the context that the arguments give. Raises ValueError."""
    if getattr(arguments, "any_context", False):
        if arguments.context:
            msg = "give --context or --any-context, not both"
            raise ValueError(msg)
        return ANY_CONTEXT
    return parse_context(arguments.context)


def parse_context(texts: Iterable[str]) -> dict[str, str]:
    """Return the encryption context that texts like `dataset=flights` give. Raises ValueError."""
    pairs: dict[str, str] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or name in pairs:
            msg = f"the context {text!r}: write NAME=VALUE, each name once"
            raise ValueError(msg)
        pairs[name] = value
    return checked_context(pairs)
