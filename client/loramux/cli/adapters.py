"""`loramux adapters`: push, list, show, pull, alias, pin, merge, verify, diff, sum and remove adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loramux.cli.adapter_fields import fields_of, of_another_name
from loramux.cli.adapter_files import diff, names_directory, verify_directory
from loramux.cli.arguments import DEFAULT_ADDRESS, Address, AsJson
from loramux.cli.completion import complete_adapters
from loramux.cli.lifetimes import describe_end
from loramux.cli.merging import merge_files
from loramux.terminal.failures import CommandError, ExitCode
from loramux.terminal.output import byte_progress, print_json, print_table, say, size

if TYPE_CHECKING:
    from loramux.types import Adapter, ProgressCallback, Pulled, TransferProgress

app = typer.Typer(no_args_is_help=True, help="Adapters of a running server.")
app.command("diff")(diff)
app.command("merge-files")(merge_files)

Name = Annotated[str, typer.Argument(help="Name of the adapter.", autocompletion=complete_adapters)]
Reference = Annotated[str, typer.Argument(help="Name, alias or name@digest.", autocompletion=complete_adapters)]


@app.command("push")
def push(
    directory: Annotated[Path, typer.Argument(help="PEFT directory, as save_pretrained writes it.")],
    name: Annotated[str | None, typer.Argument(help="Name to publish it under; default: the directory's.")] = None,
    address: Address = DEFAULT_ADDRESS,
    label: Annotated[list[str] | None, typer.Option("--label", "-l", help="KEY=VALUE; may be repeated.")] = None,
    allow_base_mismatch: Annotated[
        bool, typer.Option("--allow-base-mismatch", help="Accept an adapter that declares another base.")
    ] = False,
    ttl: Annotated[
        float | None, typer.Option("--ttl", help="Seconds after which the server removes it; default: it stays.")
    ] = None,
    max_uses: Annotated[
        int | None, typer.Option("--max-uses", help="Requests with the last of which the server removes it.")
    ] = None,
    if_version: Annotated[
        str | None,
        typer.Option(
            "--if-version",
            metavar="DIGEST",
            help="Only if the name points at the version that starts so now; '' only if the name is new.",
        ),
    ] = None,
    no_tokenizer: Annotated[
        bool, typer.Option("--no-tokenizer", help="Leave its tokenizer and chat template here: the base's are used.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Upload an adapter. A push that was cut goes on where it stopped when it is repeated."""
    from loramux.cli.connecting import connect

    target = name or directory.resolve().name
    with connect(address) as client, _transfer(f"push {target}", as_json) as report:
        pushed = client.push(
            directory,
            target,
            labels=_labels(label or []),
            allow_base_mismatch=allow_base_mismatch,
            ttl=ttl,
            max_uses=max_uses,
            if_version=if_version,
            tokenizer=not no_tokenizer,
            progress=report,
        )
    if as_json:
        print_json(pushed)
        return
    adapter = pushed.adapter
    version = f"{adapter.name}@{adapter.digest[:12]}"
    if pushed.created:
        what = f"{adapter.kind}, rank {adapter.max_rank}" if adapter.max_rank else adapter.kind
        print(f"{version} published ({size(pushed.sent_bytes)} sent, {what})")
    else:
        print(f"{version} is published: the server had its content already")
    if pushed.resumed_bytes:
        print(f"resumed: {size(pushed.resumed_bytes)} were there from an earlier attempt")
    if pushed.left_out:
        print(f"kept here: {', '.join(pushed.left_out)} (only the adapter's files travel)")
    if ends := describe_end(adapter):
        print(f"ends by itself: {ends}")
    if pushed.remark:
        say(f"warning: {pushed.remark}")


@app.command("ls")
def ls(address: Address = DEFAULT_ADDRESS, as_json: AsJson = False) -> None:
    """List every adapter with the engine's view of where it is.

    TIER, LEASES and MERGED are of the version (DIGEST), which other names may share; DESIRED is of the name alone.
    """
    from loramux.cli.connecting import connect

    with connect(address) as client:
        found = list(client.adapters())
        if as_json:
            print_json(found)
            return
        base = client.model().fingerprint
    rows = [
        (a.name, a.digest[:12], a.kind, a.max_rank or "", size(a.size_bytes), a.residency.tier, a.residency.leases,
         a.residency.merged, _desired(a), describe_end(a), ",".join(a.aliases), _remarks(a, base))
        for a in found
    ]  # fmt: skip
    columns = (
        "NAME", "DIGEST", "KIND", "RANK", "SIZE", "TIER", "LEASES", "MERGED", "DESIRED", "ENDS", "ALIASES", "REMARKS",
    )  # fmt: skip
    print_table(columns, rows, empty="no adapters yet; add one with `loramux adapters push DIRECTORY`")


@app.command("show")
def show(name: Reference, address: Address = DEFAULT_ADDRESS, as_json: AsJson = False) -> None:
    """Show everything about one adapter."""
    from loramux.cli.connecting import connect

    with connect(address) as client:
        adapter = client.adapter(name)
    if as_json:
        print_json(adapter)
        return
    print_table(("FIELD", "VALUE"), fields_of(adapter), empty="")


@app.command("rollback")
def rollback(
    name: Name,
    address: Address = DEFAULT_ADDRESS,
    to: Annotated[
        str, typer.Option("--to", help="Start of the digest (8 digits) of the version; default: the one before.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Point a name at the version that it had before; once more undoes it. Running requests end on their version.

    A name keeps its last three versions; `adapters show` lists them.
    """
    from loramux.cli.connecting import connect

    with connect(address) as client:
        before = client.adapter(name)
        after = client.rollback(name, to)
    if as_json:
        print_json(after)
    else:
        print(f"{after.name}: {before.digest[:12]} -> {after.digest[:12]}")


@app.command("rm")
def rm(
    names: Annotated[list[str], typer.Argument(help="Names to remove.", autocompletion=complete_adapters)],
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Remove adapters by name; requests that run on one end on their version."""
    from loramux.cli.connecting import connect

    with connect(address) as client:
        for name in names:
            client.delete(name)
            print(f"removed {name}")


@app.command("pull")
def pull(
    name: Reference,
    directory: Annotated[Path | None, typer.Argument(help="Where to; default: a directory of its name.")] = None,
    address: Address = DEFAULT_ADDRESS,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Download an adapter's files, byte for byte as they were uploaded."""
    from loramux.cli.connecting import connect

    target = directory or Path(name.partition("@")[0])
    if not force:
        _refuse_existing(target)
    with connect(address) as client, _transfer(f"pull {name}", as_json) as report:
        pulled = client.pull(name, target, overwrite=force, progress=report)
    if as_json:
        print_json(pulled)
    else:
        version = _version(name, pulled)
        print(f"{version} -> {target} ({size(sum(f.size for f in pulled.files))}, sha256 checked)")


@app.command("verify")
def verify(
    name: Annotated[
        str,
        typer.Argument(
            help="Name, alias or name@digest on the server, or a directory, written with a slash: ./shout.",
            autocompletion=complete_adapters,
        ),
    ],
    against: Annotated[Path | None, typer.Option(help="Local directory that must hold the same bytes.")] = None,
    base: Annotated[
        str | None, typer.Option(help="Of a directory: the base to check it against, as `serve --model` takes it.")
    ] = None,
    allow_base_mismatch: Annotated[
        bool, typer.Option("--allow-base-mismatch", help="Of a directory: as `push` has it.")
    ] = False,
    no_tokenizer: Annotated[
        bool, typer.Option("--no-tokenizer", help="Of a directory, also of --against: as `push` has it.")
    ] = False,
    address: Address = DEFAULT_ADDRESS,
    as_json: AsJson = False,
) -> None:
    """Read an adapter back and check every sha256; with --against, compare it with a local directory too.

    Of a directory: say without a server what one would say of a push, and what it costs; exit 3 if it is refused.
    """
    if names_directory(name):
        if against is not None:
            raise CommandError("--against goes with a name", remedy="see loramux adapters diff", code=ExitCode.USAGE)
        directory = Path(name).expanduser()
        verify_directory(
            directory, base, allow_base_mismatch=allow_base_mismatch, tokenizer=not no_tokenizer, as_json=as_json
        )
        return
    if base is not None or allow_base_mismatch:
        raise CommandError(
            f"{name} is the name of an adapter on the server, and --base and --allow-base-mismatch go with a directory",
            remedy=f"write ./{name} for a directory",
            code=ExitCode.USAGE,
        )
    from loramux.cli.connecting import connect
    from loramux.upload import collect

    with connect(address) as client, _transfer(f"verify {name}", as_json) as report:
        stored = client.verify(name, progress=report)
    different: list[str] = []
    if against is not None:
        collected = collect(against, name, {}, allow_base_mismatch=False, tokenizer=not no_tokenizer)
        local = {f.file: f for f in collected.files}
        served = {f.file: f for f in stored.files}
        different = sorted(file for file in local.keys() | served.keys() if local.get(file) != served.get(file))
    if as_json:
        print_json({"name": name, "digest": stored.digest, "files": stored.files, "different": different})
    elif different:
        say(f"{_version(name, stored)} differs from {against} in {', '.join(different)}")
    else:
        print(f"{_version(name, stored)} verified: {', '.join(f.file for f in stored.files)}")
    if different:
        raise typer.Exit(ExitCode.NO)


@app.command("pin")
def pin(name: Name, address: Address = DEFAULT_ADDRESS) -> None:
    """Load an adapter now and keep it on the device: it is evicted only when nothing else makes room."""
    _set_pinned(name, True, address)


@app.command("unpin")
def unpin(name: Name, address: Address = DEFAULT_ADDRESS) -> None:
    """Let an adapter be evicted as any other."""
    _set_pinned(name, False, address)


@app.command("alias")
def alias(
    name: Name,
    aliases: Annotated[list[str], typer.Argument(help="Other names for it.")],
    remove: Annotated[bool, typer.Option("--remove", help="Take the aliases away instead.")] = False,
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Give an adapter other names, or take them away."""
    from loramux.cli.connecting import connect

    with connect(address) as client:
        if remove:
            adapter = client.update(name, remove_aliases=aliases)
        else:
            adapter = client.update(name, add_aliases=aliases)
    print(f"{adapter.name}: {', '.join(adapter.aliases) or 'no aliases'}")


@app.command("merge")
def merge(
    name: Name,
    off: Annotated[bool, typer.Option("--off", help="Drop the merged weights.")] = False,
    wait: Annotated[float, typer.Option(min=0.0, help="Seconds to wait for it; 0 only asks.")] = 60.0,
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Merge this adapter into weights of its own, for steps that are all its own.

    This stays with the name, over restarts and new versions, until it is taken back with --off.
    """
    from loramux.cli.connecting import connect
    from loramux.cli.waiting import wait_merged

    with connect(address) as client:
        adapter = client.update(name, merge=not off)
        if wait > 0 and not off:
            adapter = wait_merged(client, adapter, seconds=wait)
    residency = adapter.residency
    if residency.merged == "refused" and not off:
        raise CommandError(
            f"{name} is not merged: {residency.merged_reason or 'refused'}",
            remedy=f"it stays desired, for a new version or room: loramux adapters merge {name} --off takes it back",
        )
    print(f"{name}: merged weights {residency.merged}{of_another_name(adapter)}")


def _set_pinned(name: str, pinned: bool, address: str) -> None:
    from loramux.cli.connecting import connect

    with connect(address) as client:
        adapter = client.update(name, pinned=pinned)
    print(f"{adapter.name}: {'pinned' if adapter.pinned else 'not pinned'}")


def _refuse_existing(directory: Path) -> None:
    """In the words of the command line, before anybody is called; the client says it in those of Python."""
    from loramux.download import find_existing

    with suppress(OSError):  # the client reports what cannot be looked at
        if existing := find_existing(directory):
            raise CommandError(
                f"{directory} already holds {', '.join(existing)}",
                remedy="choose another directory, or --force to replace them",
            )


def _version(reference: str, pulled: Pulled) -> str:
    return f"{reference.partition('@')[0]}@{pulled.digest[:12]}"


def _labels(pairs: list[str]) -> dict[str, str]:
    labels = dict(pair.partition("=")[::2] for pair in pairs)
    bad = [pair for pair in pairs if "=" not in pair or pair.startswith("=")]
    if bad:
        raise CommandError(f"not a label: {bad[0]!r}", remedy="write --label KEY=VALUE", code=ExitCode.USAGE)
    return labels


def _desired(adapter: Adapter) -> str:
    """The desired state of the name, in the words of the commands that set it."""
    return ", ".join(word for word, is_set in (("pin", adapter.pinned), ("merge", adapter.merge)) if is_set)


def _remarks(adapter: Adapter, base: str) -> str:
    """What an operator should see at a glance; `base` is the fingerprint of the one served."""
    remarks = ["corrupt"] if adapter.health == "corrupt" else []
    if adapter.accepted_bases and base not in adapter.accepted_bases:
        remarks.append("other base")
    if adapter.base_mismatch:
        remarks.append("base mismatch")
    elif adapter.base_fingerprint is None:
        remarks.append("base: undeclared")
    return ", ".join(remarks)


@contextmanager
def _transfer(description: str, quiet: bool) -> Iterator[ProgressCallback | None]:
    if quiet:
        yield None
        return
    with byte_progress() as bar:
        task = bar.add_task(description, total=None)

        def report(progress: TransferProgress) -> None:
            bar.update(task, completed=progress.done, total=progress.total)

        yield report
