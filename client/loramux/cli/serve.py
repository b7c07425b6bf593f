"""`loramux serve`: check what can be checked, then run the server until a signal stops it."""

from __future__ import annotations

import os
from typing import Any

from loramux.cli.server_options import ConfigFile, with_server_options


@with_server_options
def command(flags: dict[str, Any], config: ConfigFile = None) -> None:
    """Serve one base model and its adapters over gRPC; alone it serves the embedded model.

    Each flag is also the YAML key and, as LORAMUX_*, the environment variable of its name: flag over environment
    over file over default. SIGTERM, SIGINT and SIGHUP drain; a second SIGTERM or SIGINT stops at once.
    """
    from loramux_server.config import resolve_config
    from loramux_server.preflight import check_start

    resolved = resolve_config(file=config, environ=os.environ, flags=flags)
    check_start(resolved.config, os.environ)  # a start that cannot succeed fails before torch is imported

    from loramux_server.app import serve

    serve(resolved.config)
