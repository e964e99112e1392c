"""The parameters of the Flex Templates, made from the arguments of the programs: what they are, and the way back.

A template parameter has one text. Arguments that may be given several times take theirs with white space between them,
or as a JSON list where one has a space in it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from beam_envelope import arguments
from beam_envelope.arguments import KEY_HELP
from beam_envelope.io.options import EnvelopeOptions

TEMPLATES: Final[dict[str, Callable[[argparse.ArgumentParser], None]]] = {
    "encrypt": arguments.add_encrypt_arguments,
    "decrypt": arguments.add_decrypt_arguments,
    "rotate": arguments.add_rotate_arguments,
    "verify": arguments.add_verify_arguments,
}
"""The programs, by name."""

_KEY: Final = "the KMS key: aws-kms://alias/NAME, aws-kms://KEY_ARN, or hcvault://MOUNT/keys/NAME"
_KEYS: Final = {"key", "from", "to", "add", "remove"}
_FOLDERS: Final = {"input", "output", "relative_to", "keys", "log"}
_SEVERAL: Final = "Several: with spaces between them, or as a JSON list"
_OF_BEAM: Final = {
    "sdk_container_image": "the image of the workers: that of this template, which has beam_envelope in it",
    "s3_region_name": "the AWS region of s3:// paths",
    "s3_endpoint_url": "where S3 is, if it is not that of AWS",
}
_REQUIRED_OF_BEAM: Final = {"sdk_container_image"}


@dataclass(frozen=True)
class Parameter:
    """One parameter of a template.

    Attributes:
        name: its name in the template.
        option: the option that it becomes; empty for what comes before the options.
        text: what it is.
        optional: whether it may be left out.
        several: whether it holds a list.
        kind: TEXT, NUMBER, BOOLEAN or ENUM, as in Dataflow's `ParameterType`.
        regex: what its text must match.
        choices: of an ENUM.
        default: what holds if it is left out; empty if nothing does.
        group: the heading that the console shows it under; empty for none.
    """

    name: str
    option: str
    text: str
    optional: bool = True
    several: bool = False
    kind: str = "TEXT"
    regex: str = r"^[^\n\r]+$"
    choices: tuple[str, ...] = ()
    default: str = ""
    group: str = ""


def parameters_of(template: str) -> list[Parameter]:
    """Return the parameters of a template, those that are needed first."""
    parser = _parser(template)
    groups = {action: group.title or "" for group in parser._action_groups for action in group._group_actions}  # noqa: SLF001  # argparse has no public list
    found = [_parameter(action, _plain(groups[action])) for action in parser._actions]  # noqa: SLF001
    standard = {"positional arguments", "options", "optional arguments"}
    found = [_without_group(one) if one.group in standard else one for one in found]
    return sorted([*found, *_of_beam()], key=lambda one: one.optional)


def words_of(template: str, argv: Sequence[str]) -> list[str]:
    """Return the arguments of a program for the words that the template launcher gives: `--NAME=TEXT`.

    What is no parameter of the template goes on as it is, behind the others: options of Beam, from the launcher. A
    parameter without text is one that was not given. Wrong ones end the process with status 2, as argparse does.
    """
    parser = argparse.ArgumentParser(prog=template, allow_abbrev=False, add_help=False)
    parameters = parameters_of(template)
    for parameter in parameters:
        parser.add_argument(f"--{parameter.name}", default="")
    given, rest = parser.parse_known_args(argv)
    words: list[str] = []
    for parameter in sorted(parameters, key=lambda one: bool(one.option)):
        text = getattr(given, parameter.name).strip()
        if not text and not parameter.optional:
            parser.error(f"the parameter {parameter.name} is missing: {parameter.text}")
        if text:
            try:
                words += _words(parameter, text)
            except ValueError as error:
                parser.error(str(error))
    return [*words, *rest]


def _words(parameter: Parameter, text: str) -> list[str]:
    if parameter.kind == "BOOLEAN":
        if text not in {"true", "false"}:
            raise ValueError(f"the parameter {parameter.name} is true or false, not {text!r}")
        return [parameter.option] if text == "true" else []
    values = _split(text) if parameter.several else [text]
    return [f"{parameter.option}={value}" for value in values] if parameter.option else values


def _split(text: str) -> list[str]:
    try:
        values = json.loads(text)
    except ValueError:
        return text.split()
    fits = isinstance(values, list) and all(isinstance(value, str) for value in values)
    return values if fits else text.split()


def _parser(template: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    TEMPLATES[template](parser)
    return parser


def _parameter(action: argparse.Action, group: str) -> Parameter:
    name = action.option_strings[0].removeprefix("--").replace("-", "_") if action.option_strings else "input"
    several = action.nargs == "+" or isinstance(action, argparse._AppendAction)  # noqa: SLF001  # its only name
    kind, regex = "TEXT", Parameter.regex
    if name in _KEYS:
        regex = r"^\s*(\[|aws-kms://|hcvault://)[^\n\r]+$"
    elif name in _FOLDERS:
        regex = r"^\s*(\[|[a-z][a-z0-9+.-]*://)[^\n\r]+$"
    if action.nargs == 0:
        kind, regex = "BOOLEAN", "^(true|false)$"
    elif action.choices:
        kind, regex = "ENUM", f"^({'|'.join(action.choices)})$"
    elif action.type in {int, float}:
        kind, regex = "NUMBER", r"^[0-9]+$" if action.type is int else r"^[0-9]+(\.[0-9]+)?$"
    text = (action.help or "") % {}
    for of_the_command, here in ((KEY_HELP, _KEY), (_upper(KEY_HELP), _upper(_KEY))):
        text = text.replace(of_the_command, here)
    text = re.sub(r"\. Give it again [^.:]*", "", text).replace("a quoted glob", "a glob")  # there is no shell here
    text = _upper(_plain(text))
    return Parameter(
        name,
        action.option_strings[0] if action.option_strings else "",
        f"{text}. {_SEVERAL}" if several else text,
        optional=not action.required,
        several=several,
        kind=kind,
        regex=regex,
        choices=tuple(action.choices or ()),
        default="" if action.default in (None, [], 0) and kind != "BOOLEAN" else str(action.default).lower(),
        group=group,
    )


def _of_beam() -> Iterator[Parameter]:
    for name, text in _OF_BEAM.items():
        yield Parameter(name, f"--{name}", _upper(text), optional=name not in _REQUIRED_OF_BEAM)
    parser: Any = argparse.ArgumentParser(add_help=False)
    EnvelopeOptions._add_argparse_args(parser)  # noqa: SLF001  # as PipelineOptions itself does
    for action in parser._actions:  # noqa: SLF001
        if action.dest.startswith("envelope_aws_"):
            yield _without_group(_parameter(action, ""))


def _without_group(parameter: Parameter) -> Parameter:
    return Parameter(**{**vars(parameter), "group": ""})


def _plain(text: str) -> str:
    """Return a text of the command in the words of the template: `--split-lines` is `split_lines` here."""
    return re.sub(r"--([a-z][a-z0-9-]*)", lambda match: match[1].replace("-", "_"), text)


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def describe(template: str) -> str:
    """Return the first line of what a program says of itself."""
    return (importlib.import_module(f"pipelines.{template}").__doc__ or "").partition("\n")[0]
