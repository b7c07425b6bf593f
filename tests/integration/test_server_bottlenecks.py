"""AdapterHub's adapters from a directory to an answer of the real process and back."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from loramux import Client
from loramux.errors import InvalidArgument
from loramux_adapters.adapter_files import CONFIG_FILE
from loramux_adapters.embedded.tiny import tiny_path
from support.bottlenecks import DOUBLE_SEQ_BN, PAR_BN, make_bottleneck
from support.live import ask, until


def test_it_is_pushed_served_beside_others_and_pulled(client: Client, tmp_path: Path) -> None:
    for seed, (name, options) in enumerate({"houlsby": DOUBLE_SEQ_BN, "parallel": PAR_BN}.items()):
        model = AutoModelForCausalLM.from_pretrained(str(tiny_path()))
        directory = make_bottleneck(model, tmp_path / name, options, seed=seed)
        client.push(directory, name)
        client.pull(name, tmp_path / "back", overwrite=True)
        for path in directory.iterdir():
            assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()
        assert client.adapter(name).kind == "bottleneck"
    names = ["", "houlsby", "parallel"]
    alone = {name: ask(client, name) for name in names}
    assert len({answer.tokens for answer in alone.values()}) == len(names)
    with ThreadPoolExecutor(6) as pool:
        for name, answer in zip(names * 2, pool.map(lambda name: ask(client, name), names * 2), strict=True):
            answer.check_equals(alone[name])
    client.update("houlsby", merge=True)
    until(lambda: client.adapter("houlsby").residency.merged == "refused", "its merge is refused", 30)
    assert "a bottleneck is nonlinear" in client.adapter("houlsby").residency.merged_reason
    for name in names[1:]:
        client.delete(name)


def test_what_is_not_read_is_refused_with_the_key(client: Client, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(tiny_path()))
    directory = make_bottleneck(model, tmp_path / "gated", DOUBLE_SEQ_BN, seed=1)
    config = directory / CONFIG_FILE
    config.write_text(config.read_text().replace('"use_gating": false', '"use_gating": true'))
    with pytest.raises(InvalidArgument, match="use_gating: gates are not supported"):
        client.push(directory, "gated")
