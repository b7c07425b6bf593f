"""The tokenizer and chat template that an adapter brings along: compared with the base's, built once, kept by content.

An adapter's tokenizer is the base's with added tokens, or it is refused: merges, normalizers and regular expressions of
a stranger are not run, and a text means to the frozen part of the base what it always did.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from jinja2.exceptions import TemplateError

from loramux_adapters.adapter_files import CHAT_TEMPLATE_FILE, TEXT_FILES, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from loramux_adapters.errors import AdapterIncompatible, AdapterInvalid
from loramux_adapters.formats import strict_json
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.refusals import quote
from loramux_adapters.spec import AdapterSpec
from loramux_server.text.chat_faults import ChatRefused
from loramux_server.text.template_sandbox import TemplateSandbox
from loramux_server.text.tokenizer import TextTokenizer

_KEPT_BYTES: Final = 512 << 20
_VERDICT_BYTES: Final = 32 << 20
_ENTRY_BYTES: Final = 1024  # of a token in a list, or of what takes nothing beside the base's
_BYTES_A_CHARACTER: Final = 4
_BYTES_A_TOKEN: Final = 4096  # added to a tokenizer, in its maps and matchers: an estimate from above
_SPELLINGS: Final = 8  # times as long one tokenizer.json may be as another of the same content: blanks, escapes
_ADDED_BYTES: Final = 8 << 20  # of as many added tokens as there may be, in a tokenizer.json
_ROLES: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# What tells how a text is tokenized, in ways that tokenizer.json does not: must be the base's where both name it.
_BEHAVIOR: Final = ("add_bos_token", "add_eos_token", "add_prefix_space", "do_lower_case", "split_special_tokens")
_REMEDY: Final = (
    "push without the tokenizer's files (--no-tokenizer), and send token ids where the adapter knows other tokens"
)

K = TypeVar("K")
V = TypeVar("V")
ReadText = Callable[[], Awaitable[Mapping[str, bytes]]]


@dataclass(frozen=True)
class OwnText:
    """What is other than the base's."""

    added: tuple[Mapping[str, Any], ...]  # tokens, as tokenizer.json lists them
    roles: Mapping[str, str]  # special tokens by role, such as eos_token
    template: str | None

    @property
    def nbytes(self) -> int:
        """Host memory, from above."""
        return _ENTRY_BYTES * (1 + len(self.added)) + _BYTES_A_CHARACTER * len(self.template or "")

    @property
    def is_the_bases(self) -> bool:
        """Whether nothing is."""
        return not self.added and not self.roles and self.template is None


class AdapterTokenizer(TextTokenizer):
    """The base's tokenizer with an adapter's tokens and template."""

    waits = True  # for a process that renders

    @classmethod
    def of(cls, base: TextTokenizer, own: OwnText, sandbox: TemplateSandbox) -> AdapterTokenizer:
        """Of the base's object alone where no token is added, else of a copy. Raises AdapterInvalid."""
        made = cls.__new__(cls)
        made.__dict__.update(base.__dict__)
        if own.added:
            made._extend(base.extended(own.added), own.added)
        made._use(own, sandbox)
        return made

    @property
    def nbytes(self) -> int:
        """Host memory, from above: the model is the base's, the added tokens and their matchers are not."""
        return self.own.nbytes + (_BYTES_A_TOKEN * len(self._added) if self.own.added else 0)

    def _extend(self, tokenizer: Any, added: Sequence[Mapping[str, Any]]) -> None:
        """What the base's differs in; whatever takes long to find out of a tokenizer is the base's."""
        for entry in added:
            if (found := tokenizer.convert_tokens_to_ids(entry["content"])) != entry["id"]:
                raise _misplaced(entry, found)
        new = {entry["id"]: entry["content"] for entry in added}
        self._tokenizer = tokenizer
        self._added = {**self._added, **new}
        self._vocab_size = max(self._vocab_size, 1 + max(new))
        self._longest_token = max(self._longest_token, *(len(text.encode()) for text in new.values()))
        special = {entry["id"]: entry["content"] for entry in added if entry["special"]}
        self._prompts = self._prompts.extended(tokenizer, special)
        self._special_tokens = dict(self._prompts.special_tokens)

    def _use(self, own: OwnText, sandbox: TemplateSandbox) -> None:
        self._sandbox, self.own = sandbox, own
        self._own_roles = own.roles
        if own.template is not None:
            self._set_template(own.template)
        if "eos_token" in own.roles:
            self._eos_token_ids |= {self._tokenizer.convert_tokens_to_ids(own.roles["eos_token"])}

    def _render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> str:
        if self.own.template is None:
            return super()._render(messages, tools)
        return self._sandbox.render(self.own.template, messages, tools, self.roles)


class Kept(Generic[K, V]):
    """Values by key within a bound of bytes; the longest unused leave, but for the last."""

    def __init__(self, most: int) -> None:
        self._most, self._bytes = most, 0
        self._values: OrderedDict[K, tuple[V, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: K) -> V | None:
        """The value, which is used by this."""
        if key not in self._values:
            return None
        self._values.move_to_end(key)
        return self._values[key][0]

    def put(self, key: K, value: V, nbytes: int) -> None:
        """Adds a key, in place of what it had."""
        self._bytes += nbytes - self._values.pop(key, (value, 0))[1]
        self._values[key] = value, nbytes
        while self._bytes > self._most and len(self._values) > 1:
            self._bytes -= self._values.popitem(last=False)[1][1]


class AdapterTexts:
    """One per server. `check` runs where uploads are read, `tokenizer_of` on the event loop."""

    def __init__(self, base: TextTokenizer, limits: ReadLimits, kept_bytes: int = _KEPT_BYTES) -> None:
        self._base, self._limits = base, limits
        self._references = [reference.encode() for reference in base.references]
        self._sandbox = TemplateSandbox()
        self._lock = threading.Lock()
        self._verdicts: Kept[frozenset[tuple[str, bytes]], OwnText | AdapterIncompatible] = Kept(_VERDICT_BYTES)
        self._kept: Kept[tuple[tuple[str, str], ...], TextTokenizer] = Kept(kept_bytes)
        # One after the other: what is read for one is bounded, what many read at once is not.
        self._turn = asyncio.Lock()
        self._builder = ThreadPoolExecutor(1, "loramux-tokenizer")

    def check(self, files: Mapping[str, Path]) -> OwnText:
        """Judge an upload's files. Raises AdapterInvalid or AdapterIncompatible, naming the file, and OSError."""
        return self._judge({name: path.read_bytes() for name, path in files.items() if name in TEXT_FILES})

    async def tokenizer_of(self, spec: AdapterSpec | None, read: ReadText) -> TextTokenizer:
        """What the texts of requests for an adapter are made of: the base's own object where nothing differs.

        `read` gives its files when they are needed. Raises what `check` and `read` raise.
        """
        if spec is None or not spec.text_files:
            return self._base
        found = self._kept.get(spec.text_files)
        if found is not None:
            return found
        async with self._turn:
            found = self._kept.get(spec.text_files)
            if found is None:
                files = await read()
                found = await asyncio.get_running_loop().run_in_executor(self._builder, self._build, files)
                nbytes = found.nbytes if isinstance(found, AdapterTokenizer) else _ENTRY_BYTES
                self._kept.put(spec.text_files, found, nbytes)
            return found

    def close(self) -> None:
        """Ends threads and processes."""
        self._builder.shutdown(wait=True, cancel_futures=True)
        self._sandbox.close()

    def _build(self, files: Mapping[str, bytes]) -> TextTokenizer:
        own = self._judge(files)
        return self._base if own.is_the_bases else AdapterTokenizer.of(self._base, own, self._sandbox)

    def _judge(self, files: Mapping[str, bytes]) -> OwnText:
        key = frozenset((name, hashlib.sha256(data).digest()) for name, data in files.items())
        with self._lock:
            known = self._verdicts.get(key)
        if isinstance(known, AdapterIncompatible):
            raise _again(known)
        if known is not None:
            return known
        try:
            own = self._compare(files)
        except AdapterIncompatible as error:  # it may have taken seconds, and is asked for by each request
            with self._lock:
                self._verdicts.put(key, _again(error), _ENTRY_BYTES)
            raise
        with self._lock:
            self._verdicts.put(key, own, own.nbytes)
        return own

    def _compare(self, files: Mapping[str, bytes]) -> OwnText:
        added: list[dict[str, Any]] = []
        if TOKENIZER_FILE in files:
            added = _added_tokens(files[TOKENIZER_FILE], self._references, self._limits.max_added_tokens)
            self._check_ids(added)
        config: Mapping[str, object] = {}
        if TOKENIZER_CONFIG_FILE in files:
            config = strict_json.parse(files[TOKENIZER_CONFIG_FILE], TOKENIZER_CONFIG_FILE)
            self._check_behavior(config)
        template = self._template_of(files, config)
        known = self._base.roles
        roles = {
            role: token
            for role in _ROLES
            if (token := _content(config.get(role))) is not None and token != known.get(role)
        }
        self._check_roles(roles, added)
        self._check_named(config, added)
        if template is not None and template != self._base.template:
            self._check_template(template)
            return OwnText(tuple(added), roles, template)
        return OwnText(tuple(added), roles, None)

    def _check_template(self, template: str) -> None:
        try:
            template.encode()  # half a character is text in JSON and nowhere else
            self._sandbox.check(template)
        except (TemplateError, ChatRefused, ValueError) as error:
            raise AdapterInvalid(
                f"{CHAT_TEMPLATE_FILE}: the chat template cannot be compiled: {quote(str(error))}",
                subject=CHAT_TEMPLATE_FILE,
                remedy="correct it, or push without the tokenizer's files (--no-tokenizer)",
            ) from error

    def _check_ids(self, added: Sequence[Mapping[str, Any]]) -> None:
        following, new = self._base.vocab_size, set[str]()
        for entry in added:
            content = entry["content"]
            known = self._base.find_id(content)
            place = following if known is None else known
            if place != entry["id"] or content in new:  # a second one of the same text is no token
                raise _misplaced(entry, place)
            new.add(content)
            following += known is None

    def _check_behavior(self, config: Mapping[str, object]) -> None:
        base = {"split_special_tokens": False, **self._base.settings}
        for key in _BEHAVIOR:
            if config.get(key) is not None and base.get(key) is not None and bool(config[key]) != bool(base[key]):
                raise AdapterIncompatible(
                    f"{TOKENIZER_CONFIG_FILE}: {key} is {quote(config[key])}, the base's {quote(base[key])}",
                    subject=f"{TOKENIZER_CONFIG_FILE}: {key}",
                    remedy=_REMEDY,
                )

    def _check_named(self, config: Mapping[str, object], added: Sequence[Mapping[str, Any]]) -> None:
        """A token that the config alone knows would be ordinary text: it is of a tokenizer that was not sent."""
        new = {token["content"]: token["id"] for token in added}
        for key, number, token in _named_tokens(config):
            found = new[token] if token in new else self._base.find_id(token)
            if found is None or number not in (None, str(found)):
                what = f"no token of the base and none that {TOKENIZER_FILE} adds" if found is None else f"id {found}"
                of = "" if number is None else f" with the id {quote(number)}"
                raise AdapterInvalid(
                    f"{TOKENIZER_CONFIG_FILE}: {key} has {quote(token)}{of}, which is {what}",
                    subject=f"{TOKENIZER_CONFIG_FILE}: {key}",
                    remedy=f"send {TOKENIZER_FILE} as well, as save_pretrained wrote it, or {_REMEDY}",
                )

    def _check_roles(self, roles: Mapping[str, str], added: Sequence[Mapping[str, Any]]) -> None:
        if not roles:
            return
        new = {token["content"] for token in added}
        for role, token in roles.items():
            if token not in new and self._base.find_id(token) is None:
                raise AdapterInvalid(
                    f"{TOKENIZER_CONFIG_FILE}: {role} {quote(token)} is no token of the base and none that "
                    f"{TOKENIZER_FILE} adds",
                    subject=f"{TOKENIZER_CONFIG_FILE}: {role}",
                    remedy=f"send {TOKENIZER_FILE} as well, as save_pretrained wrote it",
                )

    def _template_of(self, files: Mapping[str, bytes], config: Mapping[str, object]) -> str | None:
        if CHAT_TEMPLATE_FILE in files:
            try:
                return files[CHAT_TEMPLATE_FILE].decode()
            except UnicodeDecodeError as error:
                raise AdapterInvalid(
                    f"{CHAT_TEMPLATE_FILE} is not UTF-8 text", subject=CHAT_TEMPLATE_FILE, remedy="save it as UTF-8"
                ) from error
        found = config.get("chat_template")
        if isinstance(found, list):  # several by name, as transformers once wrote them
            named = [entry for entry in found if isinstance(entry, dict) and entry.get("name") == "default"]
            found = named[0].get("template") if named else None
        return found if isinstance(found, str) else None


def _named_tokens(config: Mapping[str, object]) -> Iterator[tuple[str, str | None, str]]:
    """Added tokens in tokenizer_config.json: (key, id where it says one, text)."""
    decoder = config.get("added_tokens_decoder")
    for number, entry in decoder.items() if isinstance(decoder, dict) else ():
        if (token := _content(entry)) is not None:
            yield "added_tokens_decoder", str(number), token
    for key in ("additional_special_tokens", "extra_special_tokens"):
        value = config.get(key)
        entries = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        for entry in entries:
            if (token := _content(entry)) is not None:
                yield key, None, token


def _content(value: object) -> str | None:
    """Of a special token as tokenizer_config.json spells it: its text, or an object with it."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _misplaced(entry: Mapping[str, Any], found: int) -> AdapterInvalid:
    return AdapterInvalid(
        f"{TOKENIZER_FILE}: its token {quote(entry['content'])} is id {entry['id']}, and added to the base's it would "
        f"be {found}",
        subject=TOKENIZER_FILE,
        remedy=_REMEDY,
    )


def _added_tokens(own: bytes, references: Sequence[bytes], most: int) -> list[dict[str, Any]]:
    """What an adapter's tokenizer.json adds to the base's, by a process that may need time and memory for it."""
    if not references:
        raise AdapterIncompatible(
            f"{TOKENIZER_FILE}: the base's tokenizer is none of that kind, so that the two cannot be compared",
            subject=TOKENIZER_FILE,
            remedy=_REMEDY,
        )
    refused, largest = "", _SPELLINGS * max(map(len, references)) + _ADDED_BYTES
    if len(own) > largest:
        refused, references = f"it has {len(own)} bytes, and {largest} are enough for that", ()
    for data in references:
        answer = _ask_child(b"%d %d %d\n" % (len(own), len(data), most) + own + data)
        if "added" in answer:
            found: list[dict[str, Any]] = answer["added"]
            return found
        refused = refused or answer["refused"]
        if answer.get("exceeded"):
            break
    raise AdapterIncompatible(
        f"{TOKENIZER_FILE}: it is not the base's tokenizer with added tokens: {refused}",
        subject=TOKENIZER_FILE,
        remedy=_REMEDY,
    )


def _again(error: AdapterIncompatible) -> AdapterIncompatible:
    """Without its traceback, which holds the files."""
    return AdapterIncompatible(error.message, subject=error.subject, remedy=error.remedy)


def _ask_child(data: bytes) -> dict[str, Any]:
    child = subprocess.run(
        [sys.executable, "-I", str(Path(__file__).with_name("tokenizer_child.py"))],
        input=data, capture_output=True, check=False, env={}, start_new_session=True,
    )  # fmt: skip
    if child.returncode:
        return {"refused": "comparing them takes too much time or memory", "exceeded": True}
    answer: dict[str, Any] = json.loads(child.stdout)
    return answer
