"""The compiled kernels: equal to the others over rank x rows x popularity, deaf to foreign rows, and optional."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapters.kernels.test_low_rank import POPULARITIES, Case, assert_close, slots_of

from loramux_adapters.apply.batch import segments_of
from loramux_adapters.kernels import native_build
from loramux_adapters.kernels.native_build import BuildFailed, build, find_library
from loramux_adapters.kernels.native_low_rank import SOURCE, NativeKernels, NativePlan, find_native
from loramux_adapters.kernels.prepared import Segment
from loramux_adapters.parts.rank_rows import RankRows

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="this machine has no C compiler")


def kernels() -> NativeKernels:
    found = find_native()
    assert found is not None
    return found


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("rows", [1, 3, 16, 40])
@pytest.mark.parametrize("rank", [1, 8, 20, 64])
def test_every_row_gets_its_own_adapter(rank: int, rows: int, popularity: str, dtype: torch.dtype) -> None:
    case = Case.make(slots_of(popularity, rows), rank, dtype)
    assert_close(case.run(kernels()), case.expected(), dtype)


@needs_compiler
@pytest.mark.parametrize("popularity", POPULARITIES)
def test_members_whose_slots_lie_differently(popularity: str) -> None:
    for seed in range(4):
        case = Case.make(slots_of(popularity, 24, seed), 8, torch.float32, equal_layouts=False, seed=seed)
        assert_close(case.run(kernels()), case.expected(), torch.float32)


@needs_compiler
def test_short_and_long_segments_share_a_step() -> None:
    case = Case.make([-1, -1, 0, *[1] * 60, 2, *[3] * 7], 80, torch.float32)
    assert_close(case.run(kernels()), case.expected(), torch.float32)


@needs_compiler
def test_a_row_is_the_same_alone_and_among_batch_mates() -> None:
    case = Case.make([0, 1, 2, 2, 2, 3, 3, 3, 3, 3, 3, 4], 16, torch.bfloat16)
    together = case.run(kernels())
    for row in range(12):
        alone = Case([case.slots[row]], case.x[row : row + 1], case.y[row : row + 1], case.a, case.b, case.layouts,
                     case.columns)  # fmt: skip
        assert torch.equal(alone.run(kernels())[0], together[row])


@needs_compiler
def test_nan_in_foreign_or_free_rank_rows_reaches_nobody() -> None:
    case = Case.make([0, 1, 2, 3], 8, torch.float32)
    sound = case.run(kernels())
    for layout, member in zip(case.layouts, range(3), strict=True):
        own = {row for slot in (0, 1, 3) for row in range(layout.ranges[slot][0], sum(layout.ranges[slot]))}
        foreign = [row for row in range(case.a.shape[1]) if row not in own]
        case.a[member, foreign] = float("nan")
        case.b[member][foreign] = float("inf")
    poisoned = case.run(kernels())
    assert torch.equal(poisoned[[0, 1, 3]], sound[[0, 1, 3]])
    assert not poisoned[2].isfinite().any()


@needs_compiler
def test_rows_that_are_not_contiguous() -> None:
    case = Case.make([0, 1, 1, 2], 8, torch.float32)
    expected = case.expected()
    case.x = case.x.T.contiguous().T
    assert_close(case.run(kernels()), expected, torch.float32)


@needs_compiler
@pytest.mark.parametrize(("tokens", "rank", "walked"), [(1, 200, True), (100, 8, True), (100, 200, False)])
def test_long_segments_of_high_rank_are_left_to_the_library(tokens: int, rank: int, walked: bool) -> None:
    case = Case.make([0] + [1] * tokens, 8, torch.float32)
    case.layouts = [RankRows({0: (0, 8), 1: (8, rank)}, case.a.shape[1], torch.device("cpu"))] * 3
    prepared = kernels().prepare(1 + tokens, segments_of(case.slots), torch.device("cpu"))
    plan = prepared.plans(case.y, case.x, case.pools)[0]
    assert isinstance(plan, NativePlan)
    left = () if plan.rest is None else plan.rest.segments
    assert (plan.count, left) == ((2, ()) if walked else (1, (Segment(1, 1 + tokens, 8, rank),)))


def test_without_a_compiler_the_reason_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildFailed, match="no C compiler"):
        build(SOURCE)


@needs_compiler
def test_a_refused_source_leaves_nothing_behind_and_torch_serves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "broken.c"
    broken.write_text("this is not C", encoding="utf-8")
    monkeypatch.setattr(native_build.platformdirs, "user_cache_dir", lambda *_, **__: str(tmp_path / "cache"))
    with pytest.raises(BuildFailed, match=r"refused broken\.c"):
        build(broken)
    assert list((tmp_path / "cache" / "kernels").iterdir()) == []
    assert find_library(broken) is None
    assert "broken is off, plain torch serves" in caplog.text


@needs_compiler
@pytest.mark.parametrize("damage", [lambda whole: whole[:1000], lambda whole: whole[:-1] + b"!", lambda whole: b""])
def test_a_library_that_was_cut_or_has_rotted_is_not_loaded(
    damage: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A library that ends early kills the process that maps it."""
    monkeypatch.setattr(native_build.platformdirs, "user_cache_dir", lambda *_, **__: str(tmp_path / "cache"))
    whole = build(SOURCE).read_bytes()
    assert build(SOURCE).read_bytes() == whole
    build(SOURCE).write_bytes(damage(whole))
    find_library.cache_clear()
    mended = find_library(SOURCE)
    find_library.cache_clear()
    assert mended is not None
    assert mended.read_bytes() == whole
    assert list(mended.parent.iterdir()) == [mended]


def test_a_compiler_that_speaks_another_encoding_is_heard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "cc"
    compiler.write_bytes(b"#!/bin/sh\nprintf 'g\\351n\\351ral' >&2\nexit 1\n")
    compiler.chmod(0o700)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setattr(native_build.platformdirs, "user_cache_dir", lambda *_, **__: str(tmp_path / "cache"))
    with pytest.raises(BuildFailed, match="g\ufffdn\ufffdral"):
        build(SOURCE)
