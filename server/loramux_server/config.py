"""The server's configuration: one frozen value, resolved once, never mutated.

Defaults < YAML file < LORAMUX_* environment < flags, and each value remembers where it came
from. One name per option: `max_running`, `LORAMUX_MAX_RUNNING`, `--max-running`. Torch-free;
what must be looked at on the machine (ports, paths, devices) is `preflight`'s matter.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import platformdirs
import yaml

from loramux_adapters.formats.limits import MAX_RANK
from loramux_adapters.former_name import renamed_variables
from loramux_server.errors import ConfigInvalid
from loramux_server.options import Kind, Option, is_unix, parse

EMBEDDED_MODEL = "loramux-tiny"
"""The name of the base that ships with Loramux."""

MIB = 1 << 20
GIB = 1 << 30
RENAMED_OPTIONS = {"materialised_bytes": "merged_bytes"}
"""Options as they were called before: refused with the present name."""

ENV_PREFIX = "LORAMUX_"
FILE_VARIABLE = "LORAMUX_CONFIG"


def _option(
    default: Any,
    kind: Kind,
    text: str,
    *,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    high: float | None = None,
    optional: bool = False,
) -> Any:
    option = Option(kind, text, choices=choices, low=low, high=high, optional=optional)
    return field(default=default, metadata={"option": option})


def default_data_dir() -> Path:
    """Where the store is if nobody says otherwise."""
    return Path(platformdirs.user_data_dir("loramux", appauthor=False))


@dataclass(frozen=True)
class BaseConfig:
    """Which base, and how it is computed."""

    model: str = _option(EMBEDDED_MODEL, "text", "hub id or directory of the base; loramux-tiny ships with Loramux")
    revision: str | None = _option(None, "text", "hub revision of the base", optional=True)
    dtype: str = _option("auto", "text", "compute dtype", choices=("auto", "float32", "bfloat16", "float16"))
    device: str = _option("auto", "device", "auto, cpu, cuda or cuda:N")
    deterministic: bool = _option(False, "flag", "batch-invariant arithmetic: slower, bit-equal to solo runs")
    double_quant: bool = _option(False, "flag", "quantize the NF4 scales as well")
    threads: int | None = _option(None, "count", "CPU threads of a step; unset: all", low=1, high=1024, optional=True)


@dataclass(frozen=True)
class EngineConfig(BaseConfig):
    """How much runs at once, and what of memory it may take."""

    context_tokens: int | None = _option(
        None, "count", "context limit; unset: the base's own", low=16, high=1 << 24, optional=True
    )
    max_batch_tokens: int = _option(2048, "count", "tokens of one step", low=8, high=1 << 20)
    max_running: int = _option(64, "count", "requests in one step", low=1, high=65536)
    max_queued: int = _option(512, "count", "requests waiting before new ones are refused", low=0, high=1 << 20)
    block_tokens: int = _option(16, "count", "tokens of one KV block", low=1, high=1024)
    kv_bytes: int | None = _option(
        None, "bytes", "memory of the KV cache; unset: sized at start", low=1 << 12, optional=True
    )
    dense_base_bytes: int | None = _option(
        None, "bytes", "memory of a dense copy of the base beside its NF4 codes; unset: sized at start, 0: none", low=0,
        optional=True,
    )  # fmt: skip
    prefix_cache: bool = _option(True, "flag", "reuse KV blocks of equal prefixes")


@dataclass(frozen=True)
class AdapterConfig(EngineConfig):
    """Where adapters rest and how many may be where."""

    data_dir: Path = field(
        default_factory=default_data_dir, metadata={"option": Option("path", "directory of the adapter store")}
    )
    adapter_device_bytes: int | None = _option(
        None, "bytes", "device memory of adapter slots; unset: sized at start", low=1 << 12, optional=True
    )
    adapter_host_bytes: int = _option(1 * GIB, "bytes", "host memory of loaded adapters", low=1 << 12)
    merged_bytes: int = _option(512 * MIB, "bytes", "memory of merged weights of hot adapters", low=0)
    max_rank: int = _option(MAX_RANK, "count", "largest LoRA rank accepted", low=1, high=4096)
    max_adapter_bytes: int = _option(1 * GIB, "bytes", "largest adapter accepted", low=1 << 10)
    max_adapters: int = _option(10_000, "count", "adapters a tenant may keep", low=1)
    max_store_bytes: int = _option(64 * GIB, "bytes", "bytes a tenant may keep", low=1 << 10)
    max_uploads: int = _option(64, "count", "unfinished uploads a tenant may keep", low=1, high=1 << 16)
    upload_ttl_seconds: float = _option(86_400.0, "seconds", "an upload without a commit is dropped after", low=1)


@dataclass(frozen=True)
class NetworkConfig(AdapterConfig):
    """Where the server is reached and watched."""

    listen: str = _option("127.0.0.1:50051", "address", "address of gRPC: HOST:PORT or unix:PATH")
    metrics_listen: str = _option(
        "127.0.0.1:9464", "address", "address of Prometheus metrics, /healthz and /readyz, or none"
    )


@dataclass(frozen=True)
class RequestConfig(NetworkConfig):
    """What one request may ask."""

    max_choices: int = _option(16, "count", "largest n of a request", low=1, high=1024)
    max_logprobs: int = _option(20, "count", "most alternatives per token", low=0, high=1000)
    max_stop_strings: int = _option(16, "count", "most stop strings of a request", low=0, high=1024)
    max_message_bytes: int = _option(4 * MIB, "bytes", "largest gRPC message received", low=2 * MIB, high=1 << 30)


@dataclass(frozen=True)
class LifetimeConfig(RequestConfig):
    """How long what does not go on is waited for."""

    stall_seconds: float = _option(30.0, "seconds", "a stream nobody reads is ended after", low=0.05, high=86_400)
    readiness_seconds: float = _option(1.0, "seconds", "NOT_SERVING before a stop refuses work", low=0, high=600)
    drain_seconds: float = _option(30.0, "seconds", "running requests may go on for, at a stop", low=0, high=86_400)
    step_timeout_seconds: float = _option(300.0, "seconds", "a step that takes longer hangs: the server ends", low=1)


@dataclass(frozen=True)
class ServeConfig(LifetimeConfig):
    """All of it; here what is logged and counted."""

    metrics_adapters: int = _option(50, "count", "adapters with a series of their own", low=0, high=1000)
    log_level: str = _option("info", "text", "least severe log line", choices=("debug", "info", "warning", "error"))
    log_format: str = _option("text", "text", "form of log lines", choices=("text", "json"))


_GROUPS: Mapping[type[BaseConfig], str] = {
    BaseConfig: "Base model",
    EngineConfig: "Batching and memory",
    AdapterConfig: "Adapters",
    NetworkConfig: "Network",
    RequestConfig: "Limits of a request",
    LifetimeConfig: "Time limits",
    ServeConfig: "Logs and metrics",
}


@dataclass(frozen=True)
class ResolvedConfig:
    """The configuration and, for each option, where its value came from: `default`, `file PATH`, `env NAME`, `flag`."""

    config: ServeConfig
    origins: Mapping[str, str]


def options() -> Mapping[str, Option]:
    """Every option by name, in order of layers: what the command line, `config show` and documents list."""
    return {entry.name: entry.metadata["option"] for entry in fields(ServeConfig)}


def groups() -> Mapping[str, str]:
    """The heading under which help lists each option."""
    return {name: title for layer, title in _GROUPS.items() for name in layer.__annotations__}


def defaults() -> Mapping[str, Any]:
    """The value of every option nobody set."""
    config = ServeConfig()
    return {name: getattr(config, name) for name in options()}


def resolve_config(
    *, file: Path | None = None, environ: Mapping[str, str] | None = None, flags: Mapping[str, object] | None = None
) -> ResolvedConfig:
    """Resolve the layers. `file` None means LORAMUX_CONFIG, else no file; a flag of None is not set.

    Raises ConfigInvalid naming every wrong option with the layer, the rule and the remedy.
    """
    environ = environ or {}
    known = options()
    values: dict[str, Any] = {}
    origins = dict.fromkeys(known, "default")

    wrong: list[ConfigInvalid] = []

    def take(name: str, raw: object, origin: str, nearest: str = "") -> None:
        if name in RENAMED_OPTIONS:
            wrong.append(ConfigInvalid(f"{origin}: {name} is called {RENAMED_OPTIONS[name]} now", remedy="rename it"))
            return
        if name not in known:
            prefix = f"{nearest}: " if nearest else ""
            wrong.append(ConfigInvalid(f"{prefix}unknown option {name!r}", remedy=_did_you_mean(str(name), known)))
            return
        try:
            values[name] = parse(name, known[name], raw, origin)
            origins[name] = origin
        except ConfigInvalid as error:
            wrong.append(error)

    path = file or (Path(environ[FILE_VARIABLE]) if environ.get(FILE_VARIABLE) else None)
    if path is not None:
        for name, raw in _read_file(path).items():
            take(name, raw, f"file {path}", str(path))
    for name in known:
        variable = ENV_PREFIX + name.upper()
        if variable in environ:
            take(name, environ[variable], f"env {variable}")
    for name, raw in (flags or {}).items():
        if raw is not None:
            take(name, raw, f"flag --{name.replace('_', '-')}")
    for old, new in renamed_variables(environ, _variables(known)).items():
        wrong.append(ConfigInvalid(f"env {old} is not read any more", remedy=f"set {new}"))
    if wrong:
        raise ConfigInvalid.of_all(wrong)
    config = ServeConfig(**values)
    if wrong := list(_wrong_together(config)):
        raise ConfigInvalid.of_all(wrong)
    return ResolvedConfig(config, origins)


def _variables(known: Iterable[str]) -> dict[str, str]:
    """What each variable is or was called, behind the present prefix -> what it is called."""
    present = {name: name for name in known} | RENAMED_OPTIONS
    return {FILE_VARIABLE: FILE_VARIABLE} | {
        ENV_PREFIX + name.upper(): ENV_PREFIX + new.upper() for name, new in present.items()
    }


def _read_file(path: Path) -> dict[str, object]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigInvalid(
            f"cannot read the configuration file {path}: {error.strerror}", remedy="give a readable YAML file"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigInvalid(
            f"{path} is not YAML: {error}", remedy="see `loramux config init` for a commented one"
        ) from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigInvalid(f"{path} must hold a mapping of options", remedy="write lines like `max_running: 64`")
    return content


def _did_you_mean(name: str, known: Mapping[str, Option]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else "`loramux config show` lists every option"


def _wrong_together(config: ServeConfig) -> Iterator[ConfigInvalid]:
    """Rules over more than one option, and of one address only."""
    if config.listen == "none":
        yield ConfigInvalid("listen must be an address", remedy="set listen to HOST:PORT")
    if is_unix(config.metrics_listen):
        yield ConfigInvalid(
            f"metrics_listen = {config.metrics_listen!r}: metrics are not served on a unix socket",
            remedy="set metrics_listen to HOST:PORT or none",
        )
    if config.listen == config.metrics_listen and not config.listen.endswith(":0"):
        yield ConfigInvalid(
            f"listen and metrics_listen are both {config.listen}", remedy="give metrics_listen a port of its own"
        )
    if config.max_batch_tokens < config.max_running:
        yield ConfigInvalid(
            f"max_batch_tokens {config.max_batch_tokens} is less than max_running {config.max_running}, "
            "and each running request takes a token of each step",
            remedy="raise max_batch_tokens or lower max_running",
        )
