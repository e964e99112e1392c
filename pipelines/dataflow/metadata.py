"""Write the metadata files of the Flex Templates: `python -m pipelines.dataflow.metadata`.

The form is that of Dataflow's `TemplateMetadata` and `ParameterMetadata`
(https://cloud.google.com/dataflow/docs/guides/templates/configuring-flex-templates).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from pipelines.dataflow.parameters import TEMPLATES, Parameter, describe, parameters_of

FOLDER: Final = Path(__file__).parent / "metadata"


def metadata_of(template: str) -> dict[str, Any]:
    """Return the metadata of a template."""
    return {
        "name": f"beam_envelope: {template}",
        "description": describe(template),
        "streaming": False,
        "parameters": [_document(parameter) for parameter in parameters_of(template)],
    }


def text_of(template: str) -> str:
    """Return the metadata file of a template."""
    return json.dumps(metadata_of(template), indent=2) + "\n"


def _document(parameter: Parameter) -> dict[str, Any]:
    words = parameter.name.removeprefix("envelope_").replace("_", " ")
    document: dict[str, Any] = {
        "name": parameter.name,
        "label": words[:1].upper() + words[1:],
        "helpText": parameter.text,
        "isOptional": parameter.optional,
        "regexes": [parameter.regex],
        "paramType": parameter.kind,
    }
    if parameter.choices:
        document["enumOptions"] = [{"value": choice, "label": choice} for choice in parameter.choices]
    if parameter.default:
        document["defaultValue"] = parameter.default
    if parameter.group:
        document["groupName"] = parameter.group[:1].upper() + parameter.group[1:]
    return document


def main() -> None:
    """Write the files."""
    FOLDER.mkdir(exist_ok=True)
    for template in TEMPLATES:
        (FOLDER / f"{template}.json").write_text(text_of(template), encoding="utf-8")


if __name__ == "__main__":
    main()
