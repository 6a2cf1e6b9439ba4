"""The ends of the ranges in pyproject.toml: what `make test-oldest` and `make test-newest` install."""

from __future__ import annotations

import ranges


def test_the_oldest_of_every_range_is_asked_for() -> None:
    lines = ranges.constraints("oldest", with_torch=False)
    assert f"torch=={ranges.locked('torch')}" in lines
    assert "transformers==5.17.*" in lines
    assert "pyarrow==21.*" in lines
    assert any(line.startswith("backports.zstd==1.1.* ;") for line in lines)
    assert not [line for line in lines if line.startswith(("pytest", "ruff"))]


def test_the_newest_is_whatever_a_range_admits() -> None:
    lines = ranges.constraints("newest", with_torch=True)
    assert "torch>=2.11,<2.14" in lines
    assert "transformers>=5.17,<6" in lines


def test_the_locked_versions_are_within_the_ranges() -> None:
    """The lowest versions are not above those that are tested every day."""
    for match in ranges.requirements():
        assert numbers(ranges.locked(match["name"])) >= numbers(match["lowest"]), match[0]


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
