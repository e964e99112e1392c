"""The `beam-envelope` command: its parser, its messages, and the commands that need no Beam. The others: commands.py.

Exit status: 0 if everything was done, 1 if not, 2 if the command line is wrong.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Final

from rich.markup import escape

from beam_envelope import __version__, arguments, console
from beam_envelope.errors import EnvelopeError, FormatError
from beam_envelope.keys.local import LocalKms, generate_local_key
from beam_envelope.keys.uri import open_key

_EPILOG: Final = """\
Start here:
  beam-envelope keygen  --key local-kms://keyring.json
  beam-envelope encrypt 'data/*.csv' --output sealed/ --key local-kms://keyring.json --context dataset=flights
  beam-envelope inspect sealed/
  beam-envelope decrypt 'sealed/*' --output opened/ --key local-kms://keyring.json --context dataset=flights

With AWS, the key is aws-kms://alias/NAME or aws-kms://KEY_ARN, and paths may be s3://BUCKET/PREFIX.
"""

_JOB_EPILOG: Final = """\
Quote patterns, so that the shell leaves them alone. Any option of Beam may follow, as --NAME=VALUE
(--runner=FlinkRunner --flink_master=...). With no runner named, the job uses all cores of this machine;
below 64 MiB one, since starting workers would take longer than the work.
"""


_ROTATE_EPILOG: Final = """\
Examples:
  beam-envelope rotate sealed/ --from aws-kms://alias/old --to aws-kms://alias/new --dry-run
  beam-envelope rotate sealed/ --from aws-kms://alias/old --to aws-kms://alias/new --log rotation.jsonl
  beam-envelope rotate sealed/ --from aws-kms://alias/etl --add aws-kms://alias/partner     # both open it
  beam-envelope rotate sealed/ --from aws-kms://alias/partner --remove aws-kms://alias/etl  # partner stays
  beam-envelope rotate 's3://sealed/2026/**' --from hcvault://transit/keys/etl --to hcvault://transit/keys/etl

Key files are rewritten, and nothing else is read; the last example wraps anew under the key's newest version. A
rotation that was stopped is run again: what is done is left alone. Exit status 1: a key file could not be rotated,
for the reason that is printed; all others were. Quote patterns, so that the shell leaves them alone. Any option of
Beam may follow, as --NAME=VALUE. With no runner named, the job uses all cores of this machine for many key files.
"""

_VERIFY_EPILOG: Final = """\
Examples:
  beam-envelope verify sealed/ --key aws-kms://alias/etl --context dataset=flights
  beam-envelope verify 's3://sealed/2026/**' --key aws-kms://alias/etl --any-context --log s3://audit/2026-07-01.jsonl
  beam-envelope verify sealed/ s3://sealed/keys/ --key aws-kms://alias/etl --any-context --quick --json

Every chunk of shards, every page of Parquet files and every key file is authenticated; nothing is written. Files
with no key file, and key files whose file is missing, are problems too; unfinished files (_TMP_...) are not.
Exit status: 0 if all is well, 1 if there is any problem or nothing was found, 2 if the command line is wrong.
Where a manifest (_MANIFEST.json) lists the files, one that is missing, not listed, or another than the one listed is
a problem. Without a manifest, a shard that is gone together with its key file, or an older pair of both in their
place, is not noticed. Any option of Beam may follow, as --NAME=VALUE. With no runner named, the job uses all cores.
"""

_MANIFEST_EPILOG: Final = """\
Examples:
  beam-envelope manifest sealed/ --key aws-kms://alias/etl --context dataset=flights            # what differs?
  beam-envelope manifest sealed/ --key aws-kms://alias/etl --context dataset=flights --forget   # after a clean-up
  beam-envelope manifest sealed/ --key aws-kms://alias/etl --context dataset=flights --add      # adopt other shards

Each job lists its shards in _MANIFEST.json, and readers refuse a dataset that differs from it. Where that is what you
want, say so here: what --add lists must open under the key. A shard that was put in another's place is never listed.
Exit status: 0 if list and folder agree in the end, 1 if not.
"""

_INSPECT_EPILOG: Final = """\
Examples:
  beam-envelope inspect sealed/
  beam-envelope inspect sealed/ --audit
  beam-envelope inspect sealed/ --ask-kms --key local-kms://keyring.json --html audit.html
  beam-envelope inspect s3://sealed/ --ask-kms --older-than 365 --fail-on-findings --json > audit.json

Listings and key files are read, and nothing else but the first bytes of files that have no key file. No key is needed,
so nothing is authenticated: see `beam-envelope verify`. With --json, what would be shown as JSON: a list of the files,
or the document of the audit. Exit status: 0, or 1 if the command failed, or has findings with --fail-on-findings.
"""

_AGAIN: Final = {"rotate": "Run it again to finish it.", "verify": "Nothing was changed; run it again."}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    parser, commands = _parsers()
    if not words or words[0] not in commands:
        parser.parse_args(words or ["--help"])
        return 2
    verbose = "--verbose" in words
    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR)
    if not verbose:
        # Beam logs a failed worker's traceback several times over; the message below says what it was.
        for name in ("apache_beam", "root"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        return _run(commands[words[0]], words)
    except KeyboardInterrupt:
        return _interrupted(words[0])
    except BrokenPipeError:  # `beam-envelope cat ... | head`
        # Python, at its end, would complain of the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (EnvelopeError, OSError, ValueError, TypeError, RuntimeError) as error:
        message = console.describe(error)
        if message == KeyboardInterrupt.__name__:  # Beam has wrapped one that came in the middle of a DoFn
            return _interrupted(words[0])
        if verbose:
            console.errors.print_exception()
        console.errors.print(f"[bold red]beam-envelope {words[0]}:[/] {escape(message)}")
        return 1


def _interrupted(command: str) -> int:
    again = _AGAIN.get(command, "Run it again with --if-exists=skip to finish it.")
    console.errors.print(f"Interrupted. {again}")
    return 130


def _run(parser: argparse.ArgumentParser, words: Sequence[str]) -> int:
    if words[0] == "keygen":
        return _keygen(parser.parse_args(words[1:]))
    if "-h" in words or "--help" in words:
        parser.parse_args(words[1:])
    with console.errors.status("Loading Apache Beam ..."):
        from beam_envelope import commands  # noqa: PLC0415  # it takes seconds to import

    return commands.run(words[0], parser, words[1:])


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser(
        prog="beam-envelope",
        description="Encrypt datasets with data keys from a KMS, and open them again.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"beam-envelope {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    commands: dict[str, argparse.ArgumentParser] = {}

    def add(name: str, text: str, *adders: Callable[[argparse.ArgumentParser], None], epilog: str = "") -> None:
        commands[name] = subparsers.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        for adder in adders:
            adder(commands[name])
        commands[name].add_argument("--verbose", action="store_true", help="show Beam's log and full tracebacks")

    add(
        "encrypt",
        "encrypt files into shards, each with a key file beside it",
        arguments.add_encrypt_arguments,
        arguments.add_json_argument,
        epilog=_JOB_EPILOG,
    )
    add(
        "decrypt",
        "decrypt shards into files",
        arguments.add_decrypt_arguments,
        arguments.add_json_argument,
        epilog=_JOB_EPILOG,
    )
    add(
        "rotate",
        "have the KMS wrap data keys by another key, or by more or fewer, without reading shards",
        arguments.add_rotate_arguments,
        arguments.add_json_argument,
        epilog=_ROTATE_EPILOG,
    )
    add(
        "verify",
        "check that shards, Parquet files and key files are as they were written, without writing plaintext",
        arguments.add_verify_arguments,
        arguments.add_json_argument,
        epilog=_VERIFY_EPILOG,
    )
    add(
        "manifest",
        "compare a folder with its list of shards, and make the list agree",
        arguments.add_manifest_arguments,
        arguments.add_json_argument,
        epilog=_MANIFEST_EPILOG,
    )
    add(
        "inspect",
        "list shards with their keys, contexts, sizes and ages; needs no key",
        arguments.add_inspect_arguments,
        arguments.add_json_argument,
        epilog=_INSPECT_EPILOG,
    )
    add(
        "cat",
        "write the plaintext of shards to standard output",
        arguments.add_shards_argument,
        arguments.add_reader_arguments,
    )
    add(
        "keygen",
        "make a local key, for trying out and for machines with no network",
        arguments.add_keygen_arguments,
    )
    return parser, commands


def _keygen(namespace: argparse.Namespace) -> int:
    key = open_key(namespace.key)
    if not isinstance(key, LocalKms):
        msg = (
            f"keygen makes local keys only. For {namespace.key}, ask AWS: aws kms create-key, then "
            "aws kms create-alias --alias-name alias/NAME --target-key-id ID"
        )
        raise FormatError(msg)
    name = generate_local_key(key)
    console.output.print(
        f"Made key {name} in {escape(key.path)}. Keep a copy in a safe place: without it, what it encrypts is lost.",
        soft_wrap=True,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
