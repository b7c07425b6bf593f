"""The project was called Lorica: the names of that time that are still read, or refused with the present one.

Adapters are read as they were written, for ever. A variable of an old name would otherwise be ignored in silence.
Imports nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

DECLARATION_FILE = "lorica.json"
FINGERPRINT_KEY = "lorica_base_fingerprint"
SERVICE_PREFIX = "/lorica.v1."
DIRECTORY = "lorica"
_PREFIX = "LORICA_"


def renamed_variables(environ: Mapping[str, str], present: Mapping[str, str]) -> dict[str, str]:
    """Old name -> present one, of the variables that `environ` holds.

    `present` maps what a variable is or was called, behind the present prefix, to what it is called. Others of the old
    prefix are left alone: Kubernetes sets some beside a service that is called lorica.
    """
    former = {_PREFIX + name.partition("_")[2]: new for name, new in present.items()}
    former |= {name: new for name, new in present.items() if name != new}
    return {old: new for old, new in former.items() if old in environ}
