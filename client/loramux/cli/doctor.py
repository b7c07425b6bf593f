"""`loramux doctor`: is this machine fit to serve, and what would make it better."""

from __future__ import annotations

import os
from typing import Any

import typer

from loramux.cli.arguments import AsJson
from loramux.cli.server_options import ConfigFile, with_server_options
from loramux.terminal.failures import ExitCode
from loramux.terminal.output import print_json, print_table


@with_server_options
def command(flags: dict[str, Any], config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Check versions, device, processor, threads, base model, disk and ports; exit 1 when something must change."""
    from rich.text import Text

    from loramux.cli.checks import examine
    from loramux.machine import describe
    from loramux_server.config import resolve_config

    resolved = resolve_config(file=config, environ=os.environ, flags=flags)
    findings = examine(resolved.config)
    failed = any(finding.state == "fail" for finding in findings)
    if as_json:
        print_json({"ok": not failed, "findings": findings, "machine": describe()})
    else:
        colors = {"ok": "green", "note": "cyan", "warn": "yellow", "fail": "bold red"}
        rows = [
            (Text(f.state, style=colors[f.state]), f.check, Text(f.detail + (f"\n-> {f.remedy}" if f.remedy else "")))
            for f in findings
        ]
        print_table(("", "CHECK", "FOUND"), rows, empty="")
    if failed:
        raise typer.Exit(ExitCode.NO)
