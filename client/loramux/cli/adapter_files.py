"""`loramux adapters verify DIRECTORY` and `diff`: adapters' files looked at here, with the server's code.

Imports what needs torch only when it runs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from loramux.cli.arguments import DEFAULT_ADDRESS, Address, AsJson
from loramux.cli.completion import complete_adapters
from loramux.terminal.failures import CommandError, ExitCode
from loramux.terminal.output import print_json, print_table, say, size

if TYPE_CHECKING:
    from loramux.upload import Bundle
    from loramux_adapters.base.load import LoadedBase
    from loramux_adapters.checking import Checked, Outline
    from loramux_adapters.comparing import Comparison
    from loramux_adapters.formats.limits import ReadLimits
    from loramux_server.text.adapter_text import OwnText

_MOST_ROWS = 20

Adapter = Annotated[
    str,
    typer.Argument(
        help="Name, alias or name@digest on the server, or a directory, written with a slash: ./shout.",
        autocompletion=complete_adapters,
    ),
]


def names_directory(target: str) -> bool:
    """Whether `target` can be no reference to an adapter of a server: those have no slash and begin with no dot."""
    return "/" in target or os.sep in target or target.startswith((".", "~"))


def verify_directory(
    directory: Path, base: str | None, *, allow_base_mismatch: bool, tokenizer: bool, as_json: bool
) -> None:
    """Say what a server would say of a push of `directory`. Exit code 3 where it would be refused."""
    from loramux.errors import LocalFilesError
    from loramux.upload import collect
    from loramux_adapters.checking import check, outline
    from loramux_adapters.errors import AdapterError
    from loramux_adapters.formats.limits import ReadLimits
    from loramux_server.errors import status_of

    limits = ReadLimits()
    loaded = _load(base) if base is not None else None
    try:
        bundle = collect(
            directory, directory.resolve().name, {}, allow_base_mismatch=allow_base_mismatch, tokenizer=tokenizer
        )
        files = {entry.file: directory / entry.file for entry in bundle.files}
        found: Checked | Outline = (
            outline(files, limits)
            if loaded is None
            else check(files, loaded, limits, allow_base_mismatch=allow_base_mismatch)
        )
        text = None if base is None else _check_texts(files, base, limits)
    except (AdapterError, LocalFilesError) as error:
        reason = status_of(error).reason if isinstance(error, AdapterError) else ""
        if as_json:
            print_json({"accepted": False, "directory": directory, "reason": reason, "refusal": str(error)})
        else:
            say(f"refused: {error}")
        raise typer.Exit(ExitCode.REFUSED) from None
    if as_json:
        told = {"accepted": True, "directory": directory, "left_out": bundle.left_out, "remark": bundle.remark}
        print_json({**told, "checked_against_base": loaded is not None, "adapter": found, "text": text})
        return
    print_table(("FIELD", "VALUE"), [*_rows(found, bundle), ("text", _describe_text(bundle, text))], empty="")
    if bundle.remark:
        say(f"warning: {bundle.remark}")
    if loaded is None:
        say("its modules were compared with no base: give one with --base to see what a server with it would say")


def _check_texts(files: Mapping[str, Path], base: str, limits: ReadLimits) -> OwnText | None:
    """What a server with this base would take of the adapter's tokenizer; None without one. Raises AdapterError."""
    from loramux_adapters.adapter_files import TEXT_FILES
    from loramux_adapters.base.source import find_base
    from loramux_server.text.adapter_text import AdapterTexts
    from loramux_server.text.tokenizer import TextTokenizer

    if not any(name in TEXT_FILES for name in files):
        return None
    texts = AdapterTexts(TextTokenizer.load(find_base(base, os.environ) or base), limits)
    try:
        return texts.check(files)
    finally:
        texts.close()


def _describe_text(bundle: Bundle, own: OwnText | None) -> str:
    from loramux_adapters.adapter_files import TEXT_FILES

    files = ", ".join(entry.file for entry in bundle.files if entry.file in TEXT_FILES)
    if not files:
        return "by the base's tokenizer and chat template"
    if own is None:
        return f"{files}: compared with no base's"
    tokens = f"{len(own.added)} added token{'' if len(own.added) == 1 else 's'}" if own.added else ""
    template = "a chat template of its own" if own.template is not None else ""
    roles = ", ".join(f"{role} {token!r}" for role, token in own.roles.items())
    return f"{files}: {', '.join(filter(None, (tokens, template, roles))) or 'the same as the base'}"


def _rows(found: Checked | Outline, bundle: Bundle) -> Sequence[tuple[str, object]]:
    from loramux_adapters.checking import Checked

    declared = ("declared base", found.declared_base or "undeclared")
    tensors = ("tensors", f"{size(found.nbytes)} ({found.nbytes} bytes)")
    files = ("files", f"{', '.join(entry.file for entry in bundle.files)}; {size(bundle.total)} to send")
    has = "is replayed by the server before the upload is visible" if found.certificate else "none"
    certificate = ("certificate", has)
    if not isinstance(found, Checked):
        return [("kind", found.kind), tensors, files, declared, certificate]
    cost = found.cost
    return [
        ("kind", found.kind),
        ("digest", found.digest),
        ("ranks", ", ".join(map(str, found.ranks)) or "none"),
        ("targets", f"{', '.join(found.targets)}; {found.modules} modules"),
        ("vocabulary", f"{found.vocabulary} tokens"),
        tensors,
        files,
        ("on the device", f"{cost.rank_rows} rank rows, {size(cost.nbytes)} ({cost.nbytes} bytes) in {cost.dtype}"),
        declared,
        ("base", f"{found.base} {found.base_fingerprint}" + (" (mismatch allowed)" if found.base_mismatch else "")),
        certificate,
    ]


def _load(model: str) -> LoadedBase:
    """The base as `loramux serve --model` finds it; where it cannot be had, the same words."""
    from loramux_adapters.base.load import BaseRefused, load_base
    from loramux_adapters.base.source import explain_load, find_base
    from loramux_adapters.device import best_dtype, select_device
    from loramux_adapters.errors import BaseInvalid

    device = select_device("cpu")
    try:
        found = find_base(model, os.environ)
        try:
            return load_base(found or model, compute_dtype=best_dtype(device), device=device)
        except (OSError, ValueError) as error:
            raise explain_load(model, error, os.environ) from error
    except BaseInvalid as error:
        raise CommandError(f"base: {error}", remedy=error.remedy, code=ExitCode.USAGE) from error
    except BaseRefused as error:
        raise CommandError(f"base: {error}", code=ExitCode.USAGE) from error


def diff(
    a: Adapter,
    b: Adapter,
    address: Address = DEFAULT_ADDRESS,
    as_json: AsJson = False,
) -> None:
    """Say in what two adapters differ: arithmetic, modules, ranks, tensors by how far apart; exit 1 if they do."""
    from loramux_adapters.comparing import compare
    from loramux_adapters.formats.limits import ReadLimits

    with _files(a, address) as (files_a, digest_a), _files(b, address) as (files_b, digest_b):
        if digest_a is not None and digest_a == digest_b:
            found = None
        else:
            found = compare(files_a, files_b, ReadLimits())
    same = found is None or found.is_same
    if as_json:
        print_json({"a": a, "b": b, "same": same, "digest_a": digest_a, "digest_b": digest_b, "differences": found})
    elif found is None:
        print(f"{a} and {b} are one version: {digest_a}")
    else:
        _print_comparison(a, b, found)
    if not same:
        raise typer.Exit(ExitCode.NO)


@contextmanager
def _files(target: str, address: str) -> Iterator[tuple[Path, str | None]]:
    """A directory with the adapter's files, and its digest where a server knows it."""
    if names_directory(target):
        from loramux.upload import collect

        directory = Path(target).expanduser()
        collect(directory, "adapter", {}, allow_base_mismatch=False)  # says what a directory without an adapter is
        yield directory, None
        return
    from loramux.cli.connecting import connect

    with TemporaryDirectory(prefix="loramux-diff-") as temporary, connect(address) as client:
        pulled = client.pull(target, Path(temporary) / "adapter")
        yield Path(temporary) / "adapter", pulled.digest


def _print_comparison(a: str, b: str, found: Comparison) -> None:
    beside = [difference.key for difference in found.config if not difference.is_arithmetic]
    if found.is_same:
        print(
            f"{a} and {b} hold the same tensors and arithmetic" + (f"; beside: {', '.join(beside)}" if beside else "")
        )
        return
    for difference in found.config:
        if difference.is_arithmetic:
            print(f"{difference.key}: {difference.a!r} in {a}, {difference.b!r} in {b}")
    for where, modules in ((a, found.only_a), (b, found.only_b)):
        if modules:
            print(f"only in {where}: {_some(modules)}")
    if found.ranks:
        print(f"other ranks: {_some([f'{module} {x} and {y}' for module, (x, y) in found.ranks.items()])}")
    if found.files:
        print(f"other files: {_some(found.files)}")
    if found.dtypes:
        print(f"equal values in another dtype: {_some(found.dtypes)}")
    if found.modules:
        rows = [(d.module, d.tensor, _number(d.relative), _number(d.largest)) for d in found.modules[:_MOST_ROWS]]
        print_table(("MODULE", "TENSOR", "RELATIVE", "LARGEST"), rows, empty="")
        if len(found.modules) > _MOST_ROWS:
            print(f"and {len(found.modules) - _MOST_ROWS} more that differ less")
    if beside:
        print(f"beside the arithmetic: {', '.join(beside)}")


def _number(value: float | None) -> str:
    return "another shape" if value is None else f"{value:.3g}"


def _some(entries: Sequence[str]) -> str:
    shown = ", ".join(entries[:_MOST_ROWS])
    return shown if len(entries) <= _MOST_ROWS else f"{shown} and {len(entries) - _MOST_ROWS} more"
