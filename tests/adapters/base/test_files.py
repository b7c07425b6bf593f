"""What is said of a checkpoint directory that cannot be a base, before anything of it is loaded."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from loramux_adapters.base import files
from loramux_adapters.base.files import INDEX, WEIGHTS, check_base_files
from loramux_adapters.embedded.tiny import tiny_path
from loramux_adapters.errors import BaseInvalid

Break = Callable[[Path], object]
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 5311\n"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_path(), tmp_path / "base"))


def shard(base: Path) -> None:
    """The same tensors in two shards, as save_pretrained writes them."""
    data = (base / WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    entries.pop("__metadata__", None)
    names = sorted(entries)
    weight_map = {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file, header, body = f"model-0000{number}-of-00002.safetensors", {}, b""
        for name in part:
            start, end = entries[name]["data_offsets"]
            header[name] = entries[name] | {"data_offsets": [len(body), len(body) + end - start]}
            body += data[8 + length + start : 8 + length + end]
            weight_map[name] = file
        raw = json.dumps(header).encode()
        (base / file).write_bytes(len(raw).to_bytes(8, "little") + raw + body)
    (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (base / WEIGHTS).unlink()


def edit(file: str, **values: object) -> Break:
    def apply(base: Path) -> None:
        (base / file).write_text(json.dumps(json.loads((base / file).read_text()) | values))

    return apply


def write(file: str, data: bytes) -> Break:
    return lambda base: (base / file).write_bytes(data)


def remove(*files: str) -> Break:
    return lambda base: [(base / file).unlink() for file in files]


def cut(file: str, kept: int) -> Break:
    return lambda base: (base / file).write_bytes((base / file).read_bytes()[:kept])


def rename(file: str, to: str) -> Break:
    return lambda base: (base / file).rename(base / to)


SECOND = "model-00002-of-00002.safetensors"
BROKEN: dict[str, tuple[list[Break], str]] = {
    "no config": ([remove("config.json")], "it holds no config.json"),
    "config cut": ([cut("config.json", 100)], r"config\.json is not JSON"),
    "config empty": ([write("config.json", b"")], r"config\.json is empty"),
    "config of another kind": ([write("config.json", b"[]")], r"config\.json is not a JSON object"),
    "config is a pointer": ([write("config.json", LFS)], r"config\.json is a Git LFS pointer"),
    "BERT": (
        [edit("config.json", model_type="bert", architectures=["BertForMaskedLM"])],
        "architectures is BertForMaskedLM, which is not a causal language model",
    ),
    "no head": ([edit("config.json", architectures=["MistralModel"])], "MistralModel, which is not a causal"),
    "T5": (
        [edit("config.json", architectures=["T5ForConditionalGeneration"], is_encoder_decoder=True)],
        "T5ForConditionalGeneration is an encoder-decoder model",
    ),
    "an adapter": (
        [remove("config.json"), write("adapter_config.json", b"{}")],
        r"it holds an adapter \(adapter_config\.json\), not a base model",
    ),
    "GGUF": (
        [remove("config.json", WEIGHTS), write("m-q4.gguf", b"GGUF")],
        r"its weights are GGUF \(m-q4\.gguf\), which is not read",
    ),
    "GGUF with a config": ([remove(WEIGHTS), write("m.gguf", b"GGUF")], r"its weights are GGUF \(m\.gguf\)"),
    "pickles": (
        [rename(WEIGHTS, "pytorch_model.bin")],
        r"its weights are PyTorch pickles \(pytorch_model\.bin\), which are never read",
    ),
    "pickle shards": (
        [remove(WEIGHTS), write("pytorch_model-00001-of-00002.bin", b"PK\x03\x04")],
        r"PyTorch pickles \(pytorch_model-00001-of-00002\.bin\)",
    ),
    "another name": ([rename(WEIGHTS, "consolidated.safetensors")], r"it holds consolidated\.safetensors, but neither"),
    "TensorFlow": ([rename(WEIGHTS, "tf_model.h5")], r"its weights are not safetensors \(tf_model\.h5\)"),
    "no weights": ([remove(WEIGHTS)], r"it holds no weights: neither model\.safetensors nor"),
    "weights are a pointer": ([write(WEIGHTS, LFS)], r"model\.safetensors is a Git LFS pointer"),
    "weights are a pickle": ([write(WEIGHTS, b"PK\x03\x04" + bytes(99))], "it looks like a zip archive"),
    "weights empty": ([write(WEIGHTS, b"")], "its 0 bytes do not begin with a header"),
    "weights cut": ([cut(WEIGHTS, 1_000_000)], r"model\.safetensors is cut: it has 1000000 bytes, its header needs \d"),
    "header cut": ([cut(WEIGHTS, 99)], r"model\.safetensors is cut: it has 99 bytes"),
    "header damaged": ([write(WEIGHTS, b"\x02\0\0\0\0\0\0\0{]")], "its safetensors header is damaged"),
    "bytes too many": (
        [lambda base: write(WEIGHTS, (base / WEIGHTS).read_bytes() + b"xy")(base)],
        "has 2 bytes after its last tensor",
    ),
    "shard missing": ([shard, remove(SECOND)], rf"{SECOND} is missing, one of the 2 shards that {INDEX} names"),
    "shard cut": ([shard, cut(SECOND, 50_000)], rf"{SECOND} is cut: it has 50000 bytes"),
    "shard is a pointer": ([shard, write(SECOND, LFS)], rf"{SECOND} is a Git LFS pointer"),
    "index is a pointer": ([shard, write(INDEX, LFS)], rf"{INDEX} is a Git LFS pointer"),
    "index of another kind": ([shard, write(INDEX, b'{"weight_map": []}')], rf"{INDEX}: weight_map does not map"),
    "shards without index": ([shard, remove(INDEX)], r"it holds model-00001-of-00002\.safetensors, but neither"),
    "index of another checkpoint": (
        [shard, edit(INDEX, weight_map={"other.weight": SECOND})],
        rf"{SECOND} does not hold tensor 'other\.weight', which {INDEX} says is in it",
    ),
    "no tokenizer": ([remove("tokenizer.json", "tokenizer_config.json")], "it holds no tokenizer"),
    "no tokenizer but its config": ([remove("tokenizer.json")], "it holds no tokenizer"),
    "half a tokenizer": ([remove("tokenizer.json"), write("vocab.json", b"{}")], "it holds no tokenizer"),
    "SentencePiece only": (
        [remove("tokenizer.json"), write("tokenizer.model", b"\n\x0e")],
        r"its tokenizer is tokenizer\.model alone, a SentencePiece model",
    ),
    "SentencePiece pointer": ([remove("tokenizer.json"), write("tokenizer.model", LFS)], r"tokenizer\.model is a Git"),
    "tiktoken only": ([remove("tokenizer.json"), write("qwen.tiktoken", b"")], r"its tokenizer is qwen\.tiktoken"),
    "tokenizer is a pointer": ([write("tokenizer.json", LFS)], r"tokenizer\.json is a Git LFS pointer"),
    "tokenizer cut": ([cut("tokenizer.json", 500)], r"tokenizer\.json is not JSON"),
    "settings are a pointer": ([write("tokenizer_config.json", LFS)], r"tokenizer_config\.json is a Git LFS pointer"),
}


@pytest.fixture(autouse=True)
def no_sentencepiece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not it is installed here."""
    monkeypatch.setattr(files, "find_spec", lambda name: None)


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_base_is_named(base: Path, case: str) -> None:
    breaks, why = BROKEN[case]
    for break_ in breaks:
        break_(base)
    with pytest.raises(BaseInvalid, match=why) as caught:
        check_base_files(base)
    assert caught.value.remedy


WHOLE: dict[str, list[Break]] = {
    "as it is": [],
    "in shards": [shard],
    "without architectures": [edit("config.json", architectures=None)],
    "GPT-2": [edit("config.json", architectures=["GPT2LMHeadModel"])],
    "multimodal": [edit("config.json", architectures=["Gemma3ForConditionalGeneration"])],
    "pickles beside": [write("pytorch_model.bin", b""), write("model.gguf", b"GGUF")],
    "vocabulary and merges": [remove("tokenizer.json"), write("vocab.json", b"{}"), write("merges.txt", b"")],
}


@pytest.mark.parametrize("case", WHOLE)
def test_a_whole_base_passes(base: Path, case: str) -> None:
    for change in WHOLE[case]:
        change(base)
    check_base_files(base)
    # It was looked at to the end, and passed for what it holds.
    for file in ("tokenizer.json", "vocab.json"):
        (base / file).unlink(missing_ok=True)
    with pytest.raises(BaseInvalid, match="it holds no tokenizer"):
        check_base_files(base)


def test_sentencepiece_alone_passes_where_it_can_be_read(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remove("tokenizer.json")(base)
    write("tokenizer.model", b"\n\x0e")(base)
    installed = {"sentencepiece"}
    monkeypatch.setattr(files, "find_spec", lambda name: ModuleSpec(name, None) if name in installed else None)
    check_base_files(base)
    installed.clear()
    with pytest.raises(BaseInvalid, match="sentencepiece is not installed"):
        check_base_files(base)


def test_what_cannot_be_read_is_no_traceback(base: Path) -> None:
    (base / "tokenizer.json").unlink()
    (base / "tokenizer.json").mkdir()
    with pytest.raises(BaseInvalid, match=r"tokenizer\.json cannot be read: Is a directory"):
        check_base_files(base)


def test_looking_imports_no_torch() -> None:
    script = "import sys, loramux_adapters.base.files as b, pathlib; b.check_base_files(pathlib.Path(sys.argv[1])); "
    script += "print([name for name in ('torch', 'numpy', 'transformers') if name in sys.modules])"
    command = [sys.executable, "-c", script, str(tiny_path())]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"
