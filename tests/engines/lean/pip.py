# ruff: noqa: INP001  # a folder of a path, not a package
"""Answers `python -m pip freeze` and `show`, which Beam asks of each launcher once and of each worker three times.

pip itself takes 8 s of each worker for that, most of it to find who needs a package.
"""

import sys
from importlib import metadata

if sys.argv[1:2] == ["freeze"]:
    sys.stdout.writelines(f"{found.metadata['Name']}=={found.version}\n" for found in metadata.distributions())
elif sys.argv[1:2] == ["show"]:
    metadata.version(sys.argv[2])  # raises for what is not there
else:
    sys.exit(f"this stands in for pip, and cannot {' '.join(sys.argv[1:])}")
