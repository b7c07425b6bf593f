"""`loramux config`: what the server would run with, where each value comes from, and whether it can start."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from loramux.cli.arguments import AsJson
from loramux.cli.server_options import ConfigFile, ServerOptionsGroup, default_text, option_text, with_server_options
from loramux.terminal.failures import CommandError
from loramux.terminal.output import print_json, print_table, say

app = typer.Typer(
    cls=ServerOptionsGroup,
    no_args_is_help=True,
    help="The server's configuration: file, environment and flags together.",
)


@app.command("show")
@with_server_options
def show(flags: dict[str, Any], config: ConfigFile = None, as_json: AsJson = False) -> None:
    """List every option with its value and where that comes from (flag over environment over file over default)."""
    from loramux_server.config import options, resolve_config

    resolved = resolve_config(file=config, environ=os.environ, flags=flags)
    rows = [
        {"option": name, "value": getattr(resolved.config, name), "origin": resolved.origins[name], "help": option.text}
        for name, option in options().items()
    ]
    if as_json:
        print_json(rows)
    else:
        table = [(r["option"], option_text(r["value"]) or "-", r["origin"]) for r in rows]
        print_table(("OPTION", "VALUE", "FROM"), table, empty="")


@app.command("check")
@with_server_options
def check(flags: dict[str, Any], config: ConfigFile = None) -> None:
    """Resolve the configuration and make every check that needs no model: paths, model, device, addresses.

    An address in use is only a warning: it may be this server's own, running already.
    """
    from loramux_server.config import resolve_config
    from loramux_server.preflight import check_setup

    resolved = resolve_config(file=config, environ=os.environ, flags=flags)
    check_setup(resolved.config, os.environ)
    for name in ("listen", "metrics_listen"):
        _warn_in_use(name, getattr(resolved.config, name))
    print("ok: a server can start with this configuration")


def _warn_in_use(name: str, address: str) -> None:
    """Warn of an address that another process uses; raise StartError for one that no server can use here."""
    from loramux_server.errors import StartError
    from loramux_server.preflight import check_address

    if address == "none":
        return
    try:
        check_address(name, address)
    except StartError as error:
        if not (isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EADDRINUSE):
            raise
        say(f"warning: {error}; fine when that is this server, running already")


@app.command("init")
def init(
    file: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("loramux.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a YAML file with every option, its meaning and its default, all commented out."""
    from loramux_server.config import options

    if file.exists() and not force:
        raise CommandError(f"{file} exists already", remedy="choose another name, or --force to replace it")
    lines = ["# Options of `loramux serve`; LORAMUX_* variables and flags override them.", ""]
    for name, option in options().items():
        choices = f" ({', '.join(option.choices)})" if option.choices else ""
        lines += [f"# {option.text}{choices}", f"# {name}: {default_text(option.default)}", ""]
    try:
        file.write_text("\n".join(lines), encoding="utf-8")
    except OSError as error:
        raise CommandError(f"cannot write {file}: {error.strerror}", remedy="choose a writable directory") from error
    print(f"wrote {file}; run `loramux serve --config {file}`")
