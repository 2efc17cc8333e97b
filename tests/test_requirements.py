"""The range of each package is one that is tried: its lower end by `make check-oldest`."""

from __future__ import annotations

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from configs.config_files import PROJECT_DIRECTORY


def read_requirements(name: str) -> dict[str, Requirement]:
    lines = (PROJECT_DIRECTORY / name).read_text("utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith(("#", "-r"))]
    return {canonicalize_name(one.name): one for one in found}


def version_of(requirement: Requirement) -> Version:
    (bound,) = requirement.specifier
    return Version(bound.version)


def test_the_oldest_versions_are_the_lower_ends_of_the_ranges() -> None:
    ranges, oldest = (
        read_requirements("requirements.txt"),
        read_requirements("constraints-oldest.txt"),
    )
    assert {name: version_of(oldest[name]) for name in ranges} == {
        name: version_of(one) for name, one in ranges.items()
    }


def test_the_exact_versions_are_within_the_ranges() -> None:
    exact = read_requirements("constraints.txt")
    for ranges in (
        read_requirements("requirements.txt"),
        read_requirements("requirements-dev.txt"),
    ):
        for name, one in ranges.items():
            assert version_of(exact[name]) in one.specifier, name
