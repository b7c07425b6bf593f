"""The project was called Lorica: the names of that time that are still read, or refused with the present one.

Adapters are read as they were written, for ever. A variable of an old name would otherwise be ignored in silence.
Imports nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

DECLARATION_FILE = "lorica.json"
FINGERPRINT_KEY = "lorica_base_fingerprint"
SERVICE_PREFIX = "/lorica.v1."
DIRECTORY = "lorica"
_PREFIX = "LORICA_"


def renamed_variables(environ: Mapping[str, str], known: Iterable[str]) -> dict[str, str]:
    """Old name -> present one, of the variables in `environ` that would be `known` ones by their present names.

    Others of the old prefix are left alone: Kubernetes sets some beside a service that is called lorica.
    """
    present = {_PREFIX + name.partition("_")[2]: name for name in known}
    return {old: new for old, new in present.items() if old in environ}
