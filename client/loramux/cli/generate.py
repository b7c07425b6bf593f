"""`loramux generate`: one prompt from the command line or stdin, the answer as it is made."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from loramux.cli.arguments import DEFAULT_ADDRESS, Address
from loramux.cli.completion import complete_adapters
from loramux.terminal.failures import CommandError, ExitCode
from loramux.terminal.output import print_json, say

if TYPE_CHECKING:
    from loramux.client import Client
    from loramux.types import Finish, GenerateOptions, Generation, Message


def command(
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; without it, or as -, it is read from stdin.")
    ] = None,
    address: Address = DEFAULT_ADDRESS,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            "-A",
            metavar="NAME[=WEIGHT]",
            help="Name, alias or name@digest; unset: the base. Repeated, all act together, each by its weight.",
            autocompletion=complete_adapters,
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Send the prompt as a user's turn in the chat template.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="System message; implies --chat.")] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            "-m",
            help="Most output tokens; unset: what the context leaves.",
            rich_help_panel="Length and stopping",
        ),
    ] = None,
    min_tokens: Annotated[
        int | None, typer.Option(help="Least output tokens.", rich_help_panel="Length and stopping")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", "-t", help="0 is greedy.", rich_help_panel="Sampling")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Nucleus: the likeliest tokens of this share.", rich_help_panel="Sampling")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="The likeliest tokens, this many; 0 is off.", rich_help_panel="Sampling")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Tokens of at least this share of the likeliest.", rich_help_panel="Sampling")
    ] = None,
    repetition_penalty: Annotated[float | None, typer.Option(rich_help_panel="Sampling")] = None,
    presence_penalty: Annotated[float | None, typer.Option(rich_help_panel="Sampling")] = None,
    frequency_penalty: Annotated[float | None, typer.Option(rich_help_panel="Sampling")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same tokens.", rich_help_panel="Sampling")] = None,
    n: Annotated[int | None, typer.Option("--n", "-n", help="Number of answers.", rich_help_panel="Sampling")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Stop string; may be repeated.", rich_help_panel="Length and stopping")
    ] = None,
    ignore_eos: Annotated[
        bool | None,
        typer.Option("--ignore-eos", help="Go on past the end of text.", rich_help_panel="Length and stopping"),
    ] = None,
    logprobs: Annotated[int | None, typer.Option(help="Alternatives per token, with --json.")] = None,
    timeout: Annotated[
        float | None, typer.Option(min=0.001, help="Seconds for the whole answer, repeats and warm-up included.")
    ] = None,
    wait: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            show_default="30, or 0 for another machine's",
            help="Seconds to wait for a server that does not listen yet; 0 does not wait.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The whole answer as JSON, once it is complete.")] = False,
) -> None:
    """Generate text on the base or with an adapter, streaming it to the terminal."""
    from loramux.cli.connecting import connect, generate_start_seconds

    asked = _read_adapters(adapter or [])
    text = _read_prompt(prompt)
    given = {
        "max_tokens": max_tokens, "min_tokens": min_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k,
        "min_p": min_p, "repetition_penalty": repetition_penalty, "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty, "seed": seed, "n": n, "stop": stop, "ignore_eos": ignore_eos,
        "logprobs": logprobs, "return_token_ids": True if as_json else None,
    }  # fmt: skip
    options: GenerateOptions = {k: v for k, v in given.items() if v is not None}  # type: ignore[assignment]
    messages = _conversation(text, system) if chat or system is not None else None
    with connect(address, generate_start_seconds(address) if wait is None else wait) as client:
        plain = None if messages else text
        if not as_json and (n is None or n == 1):
            aborted = _stream(client, plain, messages, asked, timeout, options)
        else:
            answer = client.generate(plain, messages=messages, adapter=asked, timeout=timeout, **options)
            aborted = any(choice.finish.reason == "aborted" for choice in answer.choices)
            if as_json:
                print_json(answer)
            else:
                _print_choices(answer)
    if aborted:
        raise CommandError("the answer was aborted before its end", code=ExitCode.UNAVAILABLE)


def _conversation(text: str, system: str | None) -> list[Message]:
    turns: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    return [*turns, {"role": "user", "content": text}]


def _print_choices(answer: Generation) -> None:
    for choice in answer.choices:
        print(f"--- {choice.index}\n{choice.text}" if choice.text else f"--- {choice.index}")
        if not choice.text:
            _say_empty(f"answer {choice.index}", choice.finish)


def _read_adapters(given: list[str]) -> str | Mapping[str, float]:
    """`name` or `name=weight`, several -> what a client takes; "" is the base."""
    weights: dict[str, float] = {}
    for text in given:
        name, equals, weight = text.partition("=")
        if not name:  # as of an unset variable of a shell: it must not become the base
            raise typer.BadParameter("must not be empty; leave it out to ask the base", param_hint="--adapter")
        if name in weights:
            raise typer.BadParameter(f"{name} is given twice", param_hint="--adapter")
        try:
            weights[name] = float(weight) if equals else 1.0
        except ValueError:
            raise typer.BadParameter(f"{weight!r} is no number, as in {name}=0.5", param_hint="--adapter") from None
    return weights if len(weights) > 1 or "=" in "".join(given) else "".join(weights)


def _stream(
    client: Client,
    text: str | None,
    messages: list[Message] | None,
    adapter: str | Mapping[str, float],
    timeout: float | None,
    options: GenerateOptions,
) -> bool:
    """Print the one answer as it is made; whether it was aborted."""
    is_in_line = False
    finish: Finish | None = None
    try:
        for part in client.stream(text, messages=messages, adapter=adapter, timeout=timeout, **options):
            sys.stdout.write(part.text)
            sys.stdout.flush()
            is_in_line = is_in_line or bool(part.text)
            finish = part.finish or finish
    except KeyboardInterrupt:
        if is_in_line:
            sys.stdout.write("\n")  # before the word that it was interrupted
        raise
    if is_in_line:
        sys.stdout.write("\n")
    elif finish is not None:
        _say_empty("the answer", finish)
    return finish is not None and finish.reason == "aborted"


def _say_empty(answer: str, finish: Finish) -> None:
    tokens = finish.usage.completion
    say(f"{answer} is empty: {tokens} token{'' if tokens == 1 else 's'}, finish reason {finish.reason}")


def _read_prompt(prompt: str | None) -> str:
    if prompt is not None and prompt != "-":
        return prompt
    if sys.stdin.isatty() and prompt is None:
        raise CommandError(
            "there is no prompt", remedy='loramux generate "Once upon", or pipe one in', code=ExitCode.USAGE
        )
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise CommandError("stdin is not UTF-8 text", code=ExitCode.USAGE) from error
