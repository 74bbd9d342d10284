"""A model is added to the project file: only its entry changes, and parallel writers lose nothing."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from rewarded_lines.errors import UserError
from rewarded_lines.projects import load_project
from rewarded_lines.training.register_model import register

TEXT = """\
# My project.
title: 'Two rewards'   # quoted

rewards:
  # Short is good.
  brief: {function: "rewards.py:brief", unit: words}
  kind:
    model: runs/kind # trained on Monday
    template: "{prompt}\\n{response}"

policies:
    brief: brief # indented by four
prompts:
  file: a-name-that-is-longer-than-any-line-would-be/if-lines-were-broken-at-eighty-characters.jsonl
base:   sft
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "rewarded-lines.yaml"
    path.write_text(TEXT)
    return path


def words(text):
    """Return the words of each line, without its indentation."""
    return [line.split() for line in text.splitlines()]


def test_comments_order_and_quotes_survive(path):
    said = register(
        str(path), {("policies", "kind"): path.parent / "kind", ("rewards", "kind", "model"): path.parent / "k2"}
    )
    assert said == [f"{path}: policies.kind: kind", f"{path}: rewards.kind.model: k2 (was runs/kind)"]
    expected = TEXT.replace("runs/kind", "k2").replace("by four\n", "by four\n    kind: kind\n")
    assert words(path.read_text()) == words(expected)
    assert load_project(path).config.policies == {"brief": "brief", "kind": "kind"}


def test_an_entry_with_the_same_value_changes_nothing(path):
    before = path.stat()
    assert register(str(path), {("base",): "sft", ("policies", "brief"): path.parent / "brief"}) == []
    assert path.read_text() == TEXT and path.stat() == before


def test_a_changed_entry_is_reported_with_its_old_value(path):
    assert register(str(path), {("base",): "organisation/model"}) == [f"{path}: base: organisation/model (was sft)"]
    assert load_project(path).config.base == "organisation/model"


def test_a_file_is_made_with_its_folder_where_there_is_none(tmp_path):
    path = tmp_path / "runs" / "demo" / "rewarded-lines.yaml"
    entries = {("base",): path.parent / "sft", ("baselines", "0.5-a+0.5-b"): tmp_path / "morl"}
    assert register(str(path), entries) == [f"{path}: base: sft", f"{path}: baselines.0.5-a+0.5-b: {tmp_path / 'morl'}"]
    config = load_project(path).config
    assert (config.base, config.baselines) == ("sft", {"0.5-a+0.5-b": str(tmp_path / "morl")})
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_a_file_in_the_working_directory_needs_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert register("p.yaml", {("policies", "a"): tmp_path / "a"}) == ["p.yaml: policies.a: a"]
    assert (tmp_path / "p.yaml").read_text() == "policies:\n  a: a\n"


@pytest.mark.parametrize(
    "name", ["a.b", "0.5-a+0.5-b", "1", "1e3", "a: b", "null", "on", "yes", "naïve #1", "- x", "*x"]
)
def test_any_name_comes_back_as_it_was(path, name):
    register(str(path), {("policies", name): path.parent / name})
    policies = load_project(path).config.policies
    assert policies == {"brief": "brief", name: name} and list(policies)[0] == "brief"


@pytest.mark.parametrize("section", ["", "policies: {}\n", "policies: {brief: b} # flow\n", "policies:\n  brief: b\n"])
def test_sections_are_made_or_filled_however_they_are_written(path, section):
    path.write_text("base: sft\n" + section + "# The end.\n")
    register(str(path), {("policies", "kind"): "k"})
    project = load_project(path).config
    assert project.policies == ({"brief": "b"} if "brief" in section else {}) | {"kind": "k"}
    assert "# The end." in path.read_text() and ("# flow" in path.read_text()) == ("# flow" in section)


def test_paths_are_relative_to_the_file_where_they_lie_below_it(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    register(
        "rewarded-lines.yaml",
        {("policies", "a"): tmp_path / "elsewhere" / ".." / "a", ("policies", "b"): tmp_path.parent / "b"},
    )
    policies = load_project(path).config.policies
    assert policies["a"] == "a" and policies["b"] == str((tmp_path.parent / "b").resolve())


MANY = """
import sys
from rewarded_lines.training.register_model import register
first = int(sys.argv[2])
for number in range(first, first + 8):
    register(sys.argv[1], {("policies", f"p{number}"): f"x{number}"})
"""


def test_policies_trained_side_by_side_are_all_registered(path):
    children = [subprocess.Popen([sys.executable, "-c", MANY, path, str(first)]) for first in (0, 8)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: register(str(path), {("policies", f"p{number}"): f"x{number}"}), range(16, 40)))
    assert [child.wait() for child in children] == [0, 0]
    expected = {"brief": "brief"} | {f"p{number}": f"x{number}" for number in range(40)}
    assert load_project(path).config.policies == expected
    assert [one.name for one in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learning_rate: 1\n", "unknown key `learning_rate`"),
        ("- a\n", "not a mapping"),
        ("a: [\n", "not readable as YAML"),
        ("policies: [a]\n", "policies: Input should be a valid dictionary"),
        ("base: a\nbase: b\n", "base"),
    ],
)
def test_a_file_that_is_no_project_is_left_alone(path, text, said):
    path.write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        register(str(path), {("base",): "sft"})
    assert caught.value.problems[0].where.startswith(str(path))
    assert path.read_text() == text and [one.name for one in path.parent.iterdir()] == [path.name]


def test_an_entry_that_does_not_fit_is_refused_by_the_files_own_name(path):
    with pytest.raises(UserError, match="declare one of `model:`") as caught:
        register(str(path), {("rewards", "brief", "model"): path.parent / "brief"})
    assert path.read_text() == TEXT and [one.name for one in path.parent.iterdir()] == [path.name]
    assert caught.value.problems[0].where == f"{path}: rewards.brief"


def test_a_place_that_cannot_be_written_is_a_fault(tmp_path):
    (tmp_path / "rewarded-lines.yaml").mkdir()
    with pytest.raises(UserError, match="rewarded-lines.yaml"):
        register(str(tmp_path / "rewarded-lines.yaml"), {("base",): "sft"})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        register(str(tmp_path / "file" / "p.yaml"), {("base",): "sft"})
