"""The server's configuration: one frozen value, resolved once, never mutated.

Defaults < YAML file < LORAMUX_* environment < flags; the origin of each value is kept. One name per option:
`max_running`, `LORAMUX_MAX_RUNNING`, `--max-running`. Torch-free; `preflight` checks what depends on the machine
(ports, paths, devices).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import platformdirs
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from loramux_adapters.formats.limits import MAX_RANK
from loramux_adapters.former_name import renamed_variables
from loramux_adapters.text_files import TextFileInvalid, read_yaml
from loramux_server.errors import ConfigInvalid
from loramux_server.options import (
    Address,
    Bytes,
    Count,
    Device,
    FilePath,
    Flag,
    Kind,
    Seconds,
    Text,
    is_unix,
    refuse,
)

EMBEDDED_MODEL = "loramux-tiny"
"""The name of the base that ships with Loramux."""

MIB = 1 << 20
GIB = 1 << 30
RENAMED_OPTIONS = {"materialised_bytes": "merged_bytes"}
"""Options as they were called before: refused with the present name."""

ENV_PREFIX = "LORAMUX_"
FILE_VARIABLE = "LORAMUX_CONFIG"


def default_data_dir() -> Path:
    """Where the store is unless data_dir is set."""
    return Path(platformdirs.user_data_dir("loramux", appauthor=False))


class BaseConfig(BaseModel):
    """Which base, and how it is computed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _one_value(cls, raw: object, info: ValidationInfo) -> object:
        name = str(info.field_name)
        if raw is None or (isinstance(raw, str) and not raw.strip()):
            if cls.model_fields[name].default is not None:
                refuse("must not be empty", f"leave {name} out to get its default")
            return None
        if isinstance(raw, dict | list):
            refuse("must be one value", "see `loramux config show`")
        return raw

    model: Text = Field(EMBEDDED_MODEL, description="hub id or directory of the base; loramux-tiny ships with Loramux")
    revision: Text | None = Field(None, description="hub revision of the base")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="compute dtype")
    device: Device = Field("auto", description="auto, cpu, cuda or cuda:N")
    deterministic: Flag = Field(False, description="batch-invariant arithmetic: slower, bit-equal to solo runs")
    double_quant: Flag = Field(False, description="quantize the NF4 scales as well")
    threads: Count | None = Field(None, description="CPU threads of a step; unset: all", ge=1, le=1024)


class EngineConfig(BaseConfig):
    """How much runs at once, and how much memory it may take."""

    context_tokens: Count | None = Field(None, description="context limit; unset: the base's own", ge=16, le=1 << 24)
    max_batch_tokens: Count = Field(2048, description="tokens of one step", ge=8, le=1 << 20)
    max_running: Count = Field(64, description="requests in one step", ge=1, le=65536)
    max_queued: Count = Field(512, description="requests waiting before new ones are refused", ge=0, le=1 << 20)
    block_tokens: Count = Field(16, description="tokens of one KV block", ge=1, le=1024)
    kv_bytes: Bytes | None = Field(None, description="memory of the KV cache; unset: sized at start", ge=1 << 12)
    dense_base_bytes: Bytes | None = Field(
        None,
        description="memory of a dense copy of the base beside its NF4 codes; unset: sized at start, 0: none",
        ge=0,
    )
    prefix_cache: Flag = Field(True, description="reuse KV blocks of equal prefixes")


class AdapterConfig(EngineConfig):
    """Where adapters are stored and loaded, and how many of them."""

    data_dir: FilePath = Field(default_factory=default_data_dir, description="directory of the adapter store")
    adapter_device_bytes: Bytes | None = Field(
        None, description="device memory of adapter slots; unset: sized at start", ge=1 << 12
    )
    adapter_extra_bytes: Bytes | None = Field(
        None, description="part of it for what is no rank row, as weights of OFT adapters; unset: a quarter", ge=0
    )
    adapter_host_bytes: Bytes = Field(1 * GIB, description="host memory of loaded adapters", ge=1 << 12)
    adapter_eviction: Literal["lru", "frequency"] = Field(
        "lru", description="which idle adapter makes room: the longest unused, or the one rarely used of late"
    )
    merged_bytes: Bytes = Field(512 * MIB, description="memory of merged weights of hot adapters", ge=0)
    max_rank: Count = Field(MAX_RANK, description="largest LoRA rank accepted", ge=1, le=4096)
    max_adapter_bytes: Bytes = Field(1 * GIB, description="largest adapter accepted", ge=1 << 10)
    max_adapters: Count = Field(10_000, description="adapters a tenant may keep", ge=1)
    max_store_bytes: Bytes = Field(64 * GIB, description="bytes a tenant may keep", ge=1 << 10)
    max_uploads: Count = Field(64, description="unfinished uploads a tenant may keep", ge=1, le=1 << 16)
    upload_ttl_seconds: Seconds = Field(86_400.0, description="an unfinished upload is removed after", ge=1)


class NetworkConfig(AdapterConfig):
    """Addresses of the server and of its metrics."""

    listen: Address = Field("127.0.0.1:50051", description="address of gRPC: HOST:PORT or unix:PATH")
    metrics_listen: Address = Field(
        "127.0.0.1:9464", description="address of Prometheus metrics, /healthz and /readyz, or none"
    )


class RequestConfig(NetworkConfig):
    """What one request may ask."""

    max_choices: Count = Field(16, description="largest n of a request", ge=1, le=1024)
    max_logprobs: Count = Field(20, description="most alternatives per token", ge=0, le=1000)
    max_stop_strings: Count = Field(16, description="most stop strings of a request", ge=0, le=1024)
    max_message_bytes: Bytes = Field(4 * MIB, description="largest gRPC message received", ge=2 * MIB, le=1 << 30)


class LifetimeConfig(RequestConfig):
    """How long the server waits: for readers, for a stop, for a step."""

    stall_seconds: Seconds = Field(30.0, description="a stream that is not read ends after", ge=0.05, le=86_400)
    readiness_seconds: Seconds = Field(
        1.0, description="at a stop: time as NOT_SERVING before new requests are refused", ge=0, le=600
    )
    drain_seconds: Seconds = Field(30.0, description="at a stop: time for running requests to finish", ge=0, le=86_400)
    step_timeout_seconds: Seconds = Field(300.0, description="a longer step counts as hung, and the server ends", ge=1)


class ServeConfig(LifetimeConfig):
    """Every option; declared here are those of logs and metrics."""

    metrics_adapters: Count = Field(50, description="adapters with metric series of their own", ge=0, le=1000)
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least severe level that is logged"
    )
    log_format: Literal["text", "json"] = Field("text", description="format of log lines")


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


@dataclass(frozen=True)
class Option:
    """What help, `config show` and documents say of an option."""

    kind: str
    text: str
    choices: tuple[str, ...]
    default: Any


def options() -> Mapping[str, Option]:
    """Every option by name, in order of layers: what the command line, `config show` and documents list."""
    return {name: _describe(entry) for name, entry in ServeConfig.model_fields.items()}


def _describe(entry: FieldInfo) -> Option:
    choices = get_args(entry.annotation) if get_origin(entry.annotation) is Literal else ()
    parts = [*entry.metadata, *(part for branch in get_args(entry.annotation) for part in get_args(branch))]
    kind = next((part.name for part in parts if isinstance(part, Kind)), "text")
    return Option(kind, entry.description or "", choices, entry.get_default(call_default_factory=True))


def groups() -> Mapping[str, str]:
    """The heading under which help lists each option."""
    return {name: title for layer, title in _GROUPS.items() for name in layer.__annotations__}


def resolve_config(
    *, file: Path | None = None, environ: Mapping[str, str] | None = None, flags: Mapping[str, object] | None = None
) -> ResolvedConfig:
    """Resolve the layers. `file` None means LORAMUX_CONFIG, else no file; a flag of None is not set.

    Raises ConfigInvalid naming every wrong option with the layer, the rule and the remedy.
    """
    environ, known = environ or {}, options()
    wrong: list[ConfigInvalid] = []
    values: dict[str, Any] = {}
    origins = dict.fromkeys(known, "default")

    def take(layer: Mapping[str, object], origin: Callable[[str], str], nearest: str = "") -> None:
        wrong.extend(_unknown(name, origin(name), nearest) for name in layer if name not in known)
        layer = {name: raw for name, raw in layer.items() if name in known}
        try:
            read = ServeConfig.model_validate(layer)
        except ValidationError as error:
            wrong.extend(_refused(found, layer, origin) for found in error.errors(include_url=False))
            return
        values.update({name: getattr(read, name) for name in layer})
        origins.update({name: origin(name) for name in layer})

    path = file or (Path(environ[FILE_VARIABLE]) if environ.get(FILE_VARIABLE) else None)
    if path is not None:
        take(_read_file(path), lambda name: f"file {path}", f"{path}: ")
    variables = {name: ENV_PREFIX + name.upper() for name in known}
    take({n: environ[v] for n, v in variables.items() if v in environ}, lambda name: f"env {variables[name]}")
    given = {name: raw for name, raw in (flags or {}).items() if raw is not None}
    take(given, lambda name: f"flag --{name.replace('_', '-')}")
    for old, new in renamed_variables(environ, _variables(known)).items():
        wrong.append(ConfigInvalid(f"env {old} was renamed to {new}", remedy=f"set {new}"))
    if wrong:
        raise ConfigInvalid.of_all(wrong)
    config = ServeConfig(**values)
    if wrong := list(_wrong_together(config)):
        raise ConfigInvalid.of_all(wrong)
    return ResolvedConfig(config, origins)


def _unknown(name: str, origin: str, nearest: str) -> ConfigInvalid:
    if name in RENAMED_OPTIONS:
        return ConfigInvalid(f"{origin}: {name} was renamed to {RENAMED_OPTIONS[name]}", remedy="rename it")
    near = difflib.get_close_matches(str(name), options(), n=1)
    remedy = f"did you mean {near[0]!r}?" if near else "`loramux config show` lists every option"
    return ConfigInvalid(f"{nearest}unknown option {name!r}", remedy=remedy)


def _refused(found: ErrorDetails, layer: Mapping[str, object], origin: Callable[[str], str]) -> ConfigInvalid:
    """The one place where pydantic's words become ours."""
    name, context = str(found["loc"][0]), found.get("ctx", {})
    match found["type"]:
        case "greater_than_equal":
            why, remedy = f"must be at least {context['ge']:g}", "raise it"
        case "less_than_equal":
            why, remedy = f"must be at most {context['le']:g}", "lower it"
        case "literal_error":
            why, remedy = "unknown value", f"use one of {', '.join(options()[name].choices)}"
        case _:
            why, remedy = found["msg"], context["remedy"]
    return ConfigInvalid(f"{name} = {layer[name]!r} ({origin(name)}): {why}", remedy=remedy)


def _variables(known: Iterable[str]) -> dict[str, str]:
    """What each variable is or was called, behind the present prefix -> what it is called."""
    present = {name: name for name in known} | RENAMED_OPTIONS
    return {FILE_VARIABLE: FILE_VARIABLE} | {
        ENV_PREFIX + name.upper(): ENV_PREFIX + new.upper() for name, new in present.items()
    }


def _read_file(path: Path) -> dict[str, object]:
    try:
        content = read_yaml(path)
    except OSError as error:
        raise ConfigInvalid(
            f"cannot read the configuration file {path}: {error.strerror}", remedy="give a readable YAML file"
        ) from error
    except TextFileInvalid as error:
        raise ConfigInvalid(
            str(error), remedy=f"{error.remedy}; `loramux config init` writes a file with every option"
        ) from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigInvalid(f"{path} must hold a mapping of options", remedy="write lines like `max_running: 64`")
    return content


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
