"""What is said of an adapter without a server is what a server would say and pay."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from loramux_adapters.adapter_files import CERTIFICATE_FILE
from loramux_adapters.apply.inject import inject
from loramux_adapters.apply.slots import SlotTensors
from loramux_adapters.base.load import LoadedBase
from loramux_adapters.certificate.document import Arithmetic, Certificate, Probe
from loramux_adapters.certificate.probes import drawn_tokens
from loramux_adapters.checking import check, outline
from loramux_adapters.embedded.tiny import tiny_path
from loramux_adapters.errors import AdapterError, CertificateRefused
from loramux_adapters.formats import registry as formats
from loramux_adapters.formats.limits import ReadLimits
from support.adapters import edit_config, files_of
from support.checkpoints import make_adapter_for
from support.hostile import lying_headers, renamed
from support.tiny import load_tiny
from support.tiny_adapters import tiny_files, write_files


@pytest.fixture
def base() -> LoadedBase:
    return load_tiny()


OPTIONS = (
    {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    {"r": 12, "target_modules": "all-linear"},
    {"r": 8, "target_modules": ["q_proj", "embed_tokens"], "rank_pattern": {"layers.0.self_attn.q_proj": 24}},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_accepted_adapter_is_told_as_the_server_reads_it(
    base: LoadedBase, tmp_path: Path, options: dict[str, object]
) -> None:
    files = files_of(make_adapter_for(tiny_path(), tmp_path / "a", seed=1, **options))
    read = formats.read(files, base.spec, ReadLimits())
    checked = check(files, base, ReadLimits(), allow_base_mismatch=False)
    spec = read.spec
    assert (checked.kind, checked.digest, checked.targets) == (spec.kind, spec.digest, spec.targets)
    assert (checked.ranks, checked.nbytes) == (tuple(sorted(set(spec.ranks.values()))), spec.nbytes)
    assert (checked.base, checked.base_fingerprint) == (base.spec.model_id, base.spec.fingerprint)
    assert (checked.declared_base, checked.base_mismatch, checked.modules) == (None, False, len(read.modules))
    adapted = inject(load_tiny(), capacity=64)
    ranks, beside = SlotTensors(adapted).cost(read)
    rows = {name: -(-rank // 8) * 8 for name, rank in ranks.items() if name in adapted.linears}
    sizes = {name: sum(_shape(adapted, name)) for name in rows}
    assert checked.cost.rank_rows == max(rows.values())
    assert checked.cost.nbytes == sum(rows[name] * sizes[name] * 4 for name in rows) + beside
    assert checked.cost.dtype == str(torch.float32).removeprefix("torch.")


def _shape(adapted: object, name: str) -> tuple[int, int]:
    module = adapted.spec.modules[name]  # type: ignore[attr-defined]
    return module.in_features, module.out_features


def test_a_refusal_is_the_servers_word_for_word(base: LoadedBase, tmp_path: Path) -> None:
    directory = make_adapter_for(tiny_path(), tmp_path / "a", seed=1, r=4, target_modules=["q_proj"])
    edit_config(directory, r=5)
    with pytest.raises(AdapterError) as server:
        formats.read(files_of(directory), base.spec, ReadLimits())
    with pytest.raises(AdapterError) as offline:
        check(files_of(directory), base, ReadLimits(), allow_base_mismatch=False)
    assert str(offline.value) == str(server.value)


def test_an_outline_needs_no_base_and_looks_at_no_module(tmp_path: Path) -> None:
    directory = write_files(tmp_path / "a", tiny_files(1))
    told = outline(files_of(directory), ReadLimits())
    assert (told.kind, told.tensors, told.declared_base) == ("lora", 8, None)
    size = (directory / "adapter_model.safetensors").stat().st_size
    assert size // 2 < told.nbytes < size
    edit_config(directory, target_modules=["nothing"])
    assert outline(files_of(directory), ReadLimits()) == told
    (directory / "loramux.json").write_text(json.dumps({"loramux_base_fingerprint": "a" * 64}))
    assert outline(files_of(directory), ReadLimits()).declared_base == "a" * 64


def test_an_outline_refuses_what_no_base_can_mend(tmp_path: Path) -> None:
    for number, hostile in enumerate([*renamed(tmp_path / "trace"), *lying_headers()]):
        directory = write_files(tmp_path / str(number), hostile.files)
        with pytest.raises(AdapterError) as caught:
            outline(files_of(directory), ReadLimits())
        assert hostile.subject in caught.value.subject
    assert not (tmp_path / "trace").exists()


def test_a_certificate_is_judged_as_far_as_one_can_without_a_replay(base: LoadedBase, tmp_path: Path) -> None:
    """Of this adapter, it is told; of another one it is refused as a push is, without a base if it was changed."""
    files = write_files(tmp_path / "a", tiny_files(1, rank=4))
    paths = files_of(files)
    digest = formats.read(paths, base.spec, ReadLimits()).spec.digest
    tokens = drawn_tokens(digest, base.spec.vocab_size, base.spec.context_length)
    probes = tuple(
        Probe(each, (1.0,) * (len(each) - 1), ((1,),) * (len(each) - 1), ((-1.0,),) * (len(each) - 1))
        for each in tokens
    )
    computed = Arithmetic("cpu", "float32", "float32")
    genuine = Certificate(digest, base.spec.fingerprint, "", computed, {}, probes)
    (files / CERTIFICATE_FILE).write_bytes(genuine.to_json())
    paths[CERTIFICATE_FILE] = files / CERTIFICATE_FILE
    assert outline(paths, ReadLimits()).certificate
    (files / CERTIFICATE_FILE).write_bytes(dataclasses.replace(genuine, adapter="0" * 64).to_json())
    with pytest.raises(CertificateRefused, match="is of adapter 000000000000"):
        check(paths, base, ReadLimits(), allow_base_mismatch=False)
    (files / CERTIFICATE_FILE).write_bytes(genuine.to_json().replace(b"-1.0", b"-2.0", 1))
    with pytest.raises(CertificateRefused, match="its seal does not fit"):
        outline(paths, ReadLimits())
    (files / CERTIFICATE_FILE).write_bytes(genuine.to_json())
    assert check(paths, base, ReadLimits(), allow_base_mismatch=False).certificate
