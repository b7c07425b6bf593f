"""Whether a checkpoint directory can be a base, from its file names, JSON files and safetensors headers alone.

Torch-free and quick (no tensor is read), so that serve, train and doctor can ask before anything is loaded. A
directory that passes may still be refused by the model guard, which knows the architecture's code.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loramux_adapters.adapter_files import CONFIG_FILE
from loramux_adapters.errors import BaseInvalid
from loramux_adapters.formats.refusals import looks_like, quote

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_CAUSAL = ("ForCausalLM", "LMHeadModel", "WithLMHead", "ForConditionalGeneration", "BertGenerationDecoder")
_TOKENIZER = "tokenizer.json"
_SLOW_TOKENIZERS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_LFS = "git lfs install && git lfs pull in that directory, or download it again with: hf download"
_SAVE_SAFETENSORS = "load it once with transformers and save it with save_pretrained, which writes model.safetensors"
_LENGTH_BYTES = 8


def check_base_files(directory: Path) -> None:
    """Raises BaseInvalid for the first thing that would end a load of `directory`; OSError never."""
    try:
        names = frozenset(path.name for path in directory.iterdir())
        _check_config(directory, names)
        _check_weights(directory, names)
        _check_tokenizer(directory, names)
    except OSError as error:
        where = Path(error.filename).name if error.filename else str(directory)
        raise BaseInvalid(f"{where} cannot be read: {error.strerror}", remedy="check its permissions") from error


def _check_config(directory: Path, names: frozenset[str]) -> None:
    if "config.json" not in names:
        _refuse_no_config(names)
    config = _read_json(directory / "config.json")
    architectures = config.get("architectures")
    stated = [name for name in architectures if isinstance(name, str)] if isinstance(architectures, list) else []
    named = ", ".join(stated) or str(config.get("model_type", "the model"))
    if config.get("is_encoder_decoder") is True:
        raise BaseInvalid(
            f"config.json: {named} is an encoder-decoder model", remedy="give a decoder-only (causal) language model"
        )
    if stated and not any(name.endswith(_CAUSAL) for name in stated):
        raise BaseInvalid(
            f"config.json: architectures is {named}, which is not a causal language model",
            remedy="give a checkpoint whose architecture ends with ForCausalLM or LMHeadModel "
            "(encoders, classifiers and models without a language-model head cannot generate)",
        )


def _refuse_no_config(names: frozenset[str]) -> None:
    if gguf := _first(names, ".gguf"):
        raise _gguf(gguf)
    if CONFIG_FILE in names:
        raise BaseInvalid(
            "it holds an adapter (adapter_config.json), not a base model",
            remedy="give the base that adapter_config.json names in base_model_name_or_path, and push the adapter",
        )
    raise BaseInvalid("it holds no config.json", remedy="give the directory of a Hugging Face checkpoint")


def _check_weights(directory: Path, names: frozenset[str]) -> None:
    # In the order in which transformers looks for them.
    if WEIGHTS in names:
        _read_header(directory / WEIGHTS)
    elif INDEX in names:
        _check_shards(directory, names)
    else:
        _refuse_no_weights(names)


def _refuse_no_weights(names: frozenset[str]) -> None:
    if gguf := _first(names, ".gguf"):
        raise _gguf(gguf)
    if pickle := _first(names, ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt"):
        raise BaseInvalid(
            f"its weights are PyTorch pickles ({pickle}), which are never read: there is no {WEIGHTS}",
            remedy=_SAVE_SAFETENSORS,
        )
    if other := _first(names, ".safetensors"):
        raise BaseInvalid(
            f"it holds {other}, but neither {WEIGHTS} nor {INDEX}",
            remedy="download the index too, or " + _SAVE_SAFETENSORS,
        )
    if other := _first(names, ".h5", ".msgpack", ".npz", ".onnx"):
        raise BaseInvalid(f"its weights are not safetensors ({other})", remedy=_SAVE_SAFETENSORS)
    raise BaseInvalid(
        f"it holds no weights: neither {WEIGHTS} nor {INDEX}", remedy="download or copy the checkpoint completely"
    )


def _check_shards(directory: Path, names: frozenset[str]) -> None:
    weight_map = _read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(s, str) for s in weight_map.values()):
        raise BaseInvalid(f"{INDEX}: weight_map does not map tensors to files", remedy="download the file again")
    shards: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        shards.setdefault(shard, set()).add(tensor)
    if missing := sorted(shards.keys() - names):
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise BaseInvalid(
            f"{missing[0]}{more} is missing, one of the {len(shards)} shards that {INDEX} names",
            remedy="download or copy the checkpoint completely",
        )
    for shard in sorted(shards):
        if absent := sorted(shards[shard] - _read_header(directory / shard)):
            raise BaseInvalid(
                f"{shard} does not hold tensor {quote(absent[0])}, which {INDEX} says is in it",
                remedy="download both again: they are of different checkpoints",
            )


def _check_tokenizer(directory: Path, names: frozenset[str]) -> None:
    for name in ("tokenizer_config.json", "generation_config.json"):
        if name in names:
            _read_json(directory / name)
    if _TOKENIZER in names:
        _read_json(directory / _TOKENIZER)
    elif slow := next((name for name in _SLOW_TOKENIZERS if name in names), None):
        _refuse_lfs(directory / slow)
        if find_spec("sentencepiece") is None:
            raise BaseInvalid(
                f"its tokenizer is {slow} alone, a SentencePiece model, and sentencepiece is not installed: "
                f"there is no {_TOKENIZER}",
                remedy="pip install sentencepiece, or put the tokenizer.json of the model's hub page beside it",
            )
    elif not ({"vocab.json", "merges.txt"} <= names or "vocab.txt" in names):
        found = _first(names, ".tiktoken") or next(iter(names & {"tekken.json"}), "")
        has = f"its tokenizer is {found}, which transformers does not read" if found else "it holds no tokenizer"
        raise BaseInvalid(
            f"{has}: there is no {_TOKENIZER}",
            remedy="copy tokenizer.json and tokenizer_config.json of the model it was made from beside its weights "
            "(in Python: AutoTokenizer.from_pretrained(MODEL).save_pretrained(DIRECTORY))",
        )


def _read_json(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    _refuse_lfs(path, data[:64])
    try:
        value = json.loads(data)
    except ValueError as error:
        whole = f"{path.name} is not JSON ({error})" if data.strip() else f"{path.name} is empty"
        raise BaseInvalid(whole, remedy="it may be cut: download the file again") from None
    if not isinstance(value, dict):
        raise BaseInvalid(f"{path.name} is not a JSON object", remedy="download the file again")
    return value


def _read_header(path: Path) -> frozenset[str]:
    """The names of the tensors of a safetensors file. BaseInvalid when the file is not as long as they need."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(64)
        _refuse_lfs(path, prefix)
        length = int.from_bytes(prefix[:_LENGTH_BYTES], "little")
        if size < _LENGTH_BYTES or not prefix.startswith(b"{", _LENGTH_BYTES):
            kind = looks_like(prefix)
            seems = f"it looks like {kind}" if kind else f"its {size} bytes do not begin with a header"
            raise BaseInvalid(f"{path.name} is not a safetensors file: {seems}", remedy="download the file again")
        if size < _LENGTH_BYTES + length:
            raise _cut(path, size, _LENGTH_BYTES + length)
        file.seek(_LENGTH_BYTES)
        raw = file.read(length)
    try:
        entries = json.loads(raw)
        entries.pop("__metadata__", None)
        end = _LENGTH_BYTES + length + max(_ends(entries.values()), default=0)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise BaseInvalid(f"{path.name}: its safetensors header is damaged", remedy="download the file again") from None
    if size < end:
        raise _cut(path, size, end)
    if size > end:
        raise BaseInvalid(
            f"{path.name} has {size - end} bytes after its last tensor", remedy="it is damaged: download the file again"
        )
    return frozenset(entries)


def _ends(entries: Iterable[Any]) -> Iterator[int]:
    for entry in entries:
        _, end = entry["data_offsets"]
        yield int(end)


def _refuse_lfs(path: Path, prefix: bytes | None = None) -> None:
    if prefix is None:
        with path.open("rb") as file:
            prefix = file.read(64)
    kind = looks_like(prefix)
    if "LFS" in kind:
        raise BaseInvalid(f"{path.name} is {kind}", remedy=_LFS)


def _cut(path: Path, size: int, needed: int) -> BaseInvalid:
    return BaseInvalid(
        f"{path.name} is cut: it has {size} bytes, its header needs {needed}", remedy="download the file again"
    )


def _gguf(name: str) -> BaseInvalid:
    return BaseInvalid(
        f"its weights are GGUF ({name}), which is not read", remedy="give the safetensors checkpoint it was made from"
    )


def _first(names: frozenset[str], *endings: str) -> str:
    return min((name for name in names if name.endswith(endings)), default="")
