"""`.ci/run` adds the slow tests of the files that have changed."""

import importlib.util
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("slow_tests", ROOT / ".ci" / "slow_tests.py")
slow = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(slow)
TESTS = ["tests/demo/test_pipeline.py", "tests/engines/test_server_engine.py", "tests/recipes/test_ready_configs.py"]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ([], []),
        (["README.md", "rewarded_lines/errors.py"], []),
        (["rewarded_lines/engines/server_engine.py"], TESTS[1:2]),
        (["tests/engines/test_tokenizers.py"], TESTS[1:2]),
        (["recipes/configs/summary/sft.yaml"], [TESTS[0], TESTS[2]]),
        (["rewarded_lines/demo/parts.py", "rewarded_lines/engines/base.py"], TESTS[:2]),
        (["rewarded_lines/engines.py", "docs/engines/page.md"], []),
        (["constraints.txt"], TESTS),
    ],
)
def test_the_subject_decides(changed, expected):
    assert slow.chosen(TESTS, changed) == expected


def test_slow_tests_are_found_and_what_they_are_about_is_there():
    found = slow.slow_tests(ROOT)
    assert set(TESTS) <= set(found) and len(found) >= 10
    assert all(
        (ROOT / path).exists() for test in TESTS for path in slow.subject(test) if path != "rewarded_lines/recipes/"
    )


def git(folder, *words):
    names = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *names, *words], cwd=folder, check=True, capture_output=True)


def commit(folder, name, content):
    (folder / name).write_text(content)
    git(folder, "add", name)
    git(folder, "commit", "-m", "one")


def test_changes_are_since_the_commit_before(tmp_path):
    git(tmp_path, "init")
    assert slow.changed_files(tmp_path) == []
    commit(tmp_path, "first", "1")
    # As in a clone without history.
    assert slow.changed_files(tmp_path) == []
    commit(tmp_path, "second", "1")
    assert slow.changed_files(tmp_path) == ["second"]
    (tmp_path / "first").write_text("2")
    assert slow.changed_files(tmp_path) == ["first", "second"]


def test_a_merge_has_changed_what_it_brings(tmp_path):
    git(tmp_path, "init", "-b", "main")
    commit(tmp_path, "first", "1")
    git(tmp_path, "checkout", "-b", "branch")
    commit(tmp_path, "mine", "1")
    commit(tmp_path, "mine-too", "1")
    git(tmp_path, "checkout", "main")
    commit(tmp_path, "theirs", "1")
    git(tmp_path, "merge", "--no-ff", "branch")
    assert slow.changed_files(tmp_path) == ["mine", "mine-too"]


def test_without_git_nothing_has_changed(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slow.changed_files(tmp_path) == []
