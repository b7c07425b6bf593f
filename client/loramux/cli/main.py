"""The `loramux` command: which commands there are, and how a failure leaves the process.

Importing this loads neither torch nor gRPC; commands import what they need when they run.
"""

from __future__ import annotations

import os
from importlib import metadata
from typing import Annotated, Any

import typer

from loramux.cli import adapters, bench, config, demo, doctor, evaluate, generate, health, serve, status, train
from loramux.cli.renamed import refuse_renamed
from loramux.cli.server_options import ServerOptionsGroup
from loramux.terminal.failures import CommandError, ExitCode, explain
from loramux.terminal.output import tell_failure
from loramux_adapters.former_name import renamed_variables
from loramux_adapters.threads import limit_spinning

_ADDRESS = "LORAMUX_ADDRESS"


class _Group(ServerOptionsGroup):
    """Shows expected failures in words and turns them into exit codes; a bug keeps its traceback."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        refuse_renamed(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (Exception, KeyboardInterrupt) as error:
            failure = explain(error)
            if failure is None:
                raise
            tell_failure(failure)
            raise typer.Exit(failure.code) from None


app = typer.Typer(
    cls=_Group,
    name="loramux",
    help="One frozen 4-bit base model, many adapters, one batch.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 the answer is no, 2 usage or configuration, 3 refused, 4 not found, "
    "5 unavailable, 6 fault of the server, 130 interrupted.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"loramux {metadata.version('loramux')}")
        raise typer.Exit(ExitCode.OK)


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """One frozen 4-bit base model, many adapters, one batch."""
    limit_spinning()  # before any command loads torch
    for former, present in renamed_variables(os.environ, {_ADDRESS: _ADDRESS}).items():
        raise CommandError(f"env {former} was renamed to {present}", remedy=f"set {present}", code=ExitCode.USAGE)


app.command("serve")(serve.command)
app.command("status")(status.command)
app.command("generate")(generate.command)
app.add_typer(adapters.app, name="adapters")
app.command("train")(train.command)
app.command("eval")(evaluate.command)
app.command("demo")(demo.command)
app.command("bench")(bench.command)
app.command("doctor")(doctor.command)
app.command("health")(health.command)
app.add_typer(config.app, name="config")

if __name__ == "__main__":
    app()
