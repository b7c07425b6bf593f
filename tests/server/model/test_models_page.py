"""docs/models.md says what the server does with each architecture: a sample of it, done again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support.architectures import causal_architectures, save_small
from support.exactness import refusal_or_error

PAGE = Path(__file__).parents[3] / "docs" / "models.md"
SAMPLE = {
    "cohere2": "served",  # windows, a layer without rotation
    "deepseek_v3": "served",  # latent attention, experts
    "gemma3n_text": "served",  # keys shared between layers
    "opt": "served",  # learned positions with a forward of their own
    "phimoe": "served",  # a window in the mask only, a router that subclasses Linear
    "qwen2_moe": "served",  # a window in the mask only
    "diffllama": "calls attention more than once",
    "gpt_oss": "s_aux, which would be ignored",
    "granitemoehybrid": "mix tokens by other means than attention",
    "lfm2": "mix tokens by other means than attention",
    "llama4_text": "serve it with a context of 24 tokens or less",
    "stablelm": "does not hand its keyword arguments on to attention",
    "bert": "no causal decoder",
}


def read_page() -> dict[str, str]:
    """Architecture -> "served" or the reason."""
    served, _, refused = PAGE.read_text().partition("## Refused")
    rows = dict.fromkeys(re.findall(r"^\| (\S+) \| [\d.e-]+ \|$", served, re.M), "served")
    return rows | dict(re.findall(r"^\| (\S+) \| (.+) \|$", refused, re.M))


def test_the_page_has_every_architecture() -> None:
    known = set(read_page()) | set(PAGE.read_text().rpartition("\n")[0].rpartition("\n")[2].split(", "))
    assert set(causal_architectures()) <= known


@pytest.mark.parametrize("architecture", SAMPLE)
def test_a_sample_of_the_page_is_true(architecture: str, tmp_path: Path) -> None:
    verdict, reason = refusal_or_error(save_small(architecture, tmp_path / "base"))
    said = read_page()[architecture]
    if SAMPLE[architecture] == "served":
        assert (verdict, said) == ("served", "served"), reason
    else:
        assert verdict == "refused"
        assert SAMPLE[architecture] in reason
        assert said == reason.replace("|", "\\|")
