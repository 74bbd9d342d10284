"""The words that a shell offers for a half-typed value, through the protocol of its completion script."""

import os
import shlex
import shutil
import subprocess

import pytest
from command import COMMAND, ENVIRONMENT, prepared_run

from rewarded_lines.cli import main
from rewarded_lines.merger.methods import METHODS


@pytest.fixture
def complete(monkeypatch, capsys):
    """Complete the last word of `rewarded-lines TEXT` as bash does."""

    def ask(text):
        words = f"rewarded-lines {text}"
        monkeypatch.setenv("_REWARDED_LINES_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
        monkeypatch.setattr("sys.argv", ["rewarded-lines"])
        with pytest.raises(SystemExit):
            main()
        return capsys.readouterr().out.split()

    return ask


@pytest.fixture
def runs(make_run, tmp_path, monkeypatch):
    """A folder with a run at runs/one, and other folders."""
    run = make_run()
    (tmp_path / "runs/deep").mkdir(parents=True)
    shutil.move(run, tmp_path / "runs/one")
    shutil.copytree(tmp_path / "runs/one", tmp_path / "runs/deep/two")
    (tmp_path / "rubbish/empty").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_commands_and_options(complete):
    assert complete("s") == ["sweep", "score", "search", "serve"]
    assert "--tensor-parallel" in complete("sweep --t") and complete("sweep --eng") == ["--engine", "--engine-arg"]


def test_values(complete):
    assert complete("merge --method ") == list(METHODS)
    assert complete("merge --method da") == ["dare", "dare-ties"]
    assert complete("merge --join a") == ["all"]
    assert complete("sweep --engine ") == ["vllm", "hf"]
    assert complete("demo --algo r") == ["rloo"]
    assert complete("merge --as ") == ["auto", "full", "adapter"]


def test_run_folders(complete, runs):
    assert complete("report ") == ["runs/deep/two", "runs/one"]
    assert complete("choose runs/o") == ["runs/one"]
    assert complete("report runs/one ru") == ["runs/deep/two", "runs/one"]
    assert complete("report ./runs/d") == ["./runs/deep/two"]
    assert complete("report elsewhere/") == []


def test_what_a_run_holds(complete, runs):
    assert complete("choose runs/one --method ") == ["soup", "lines"]
    rewards = complete("choose runs/one --maximize ")
    assert len(rewards) == 2 and complete("choose runs/one --at-least ") == [f"{name}=" for name in rewards]
    assert complete("choose nowhere --method ") == []


@pytest.mark.parametrize("content", ["", "[]", '{"points": 3, "rewards": []}', "\x00"])
def test_a_damaged_run_offers_nothing(complete, runs, content):
    (runs / "runs/one/run.json").write_text(content)
    assert complete("choose runs/one --method ") == complete("choose runs/one --maximize ") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_a_script_and_an_answer(tmp_path, shell):
    home = ENVIRONMENT | {"HOME": str(tmp_path), "SHELL": f"/bin/{shell}"}

    def run(*args, **more):
        return prepared_run(args, tmp_path, home | more)

    script = run("--show-completion", shell, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert script.returncode == 0 and "_REWARDED_LINES_COMPLETE=complete_" + shell in script.stdout
    asked = {"_TYPER_COMPLETE_ARGS": "rewarded-lines sweep --engine v", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    asked |= {"COMP_WORDS": "rewarded-lines sweep --engine v", "COMP_CWORD": "3"}
    assert "vllm" in run(_REWARDED_LINES_COMPLETE=f"complete_{shell}", **asked).stdout
    done = run("--install-completion", shell, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert done.returncode == 0 and [path for path in tmp_path.rglob("*") if "rewarded-lines" in path.name]


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_itself_completes(tmp_path, runs):
    """The completions at Tab, by the script, the command and a shell together."""
    command = tmp_path / "bin/rewarded-lines"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {shlex.join(COMMAND)} "$@"\n')
    command.chmod(0o755)
    script = tmp_path / "completion.sh"
    environment = ENVIRONMENT | {"PATH": f"{command.parent}:{os.environ['PATH']}"}
    shown = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    script.write_text(
        subprocess.run(
            [*COMMAND, "--show-completion", "bash"], env=environment | shown, capture_output=True, text=True, check=True
        ).stdout
    )
    ask = f"""
source {script}
COMP_WORDS=(rewarded-lines report runs/o) COMP_CWORD=2
_rewarded_lines_completion rewarded-lines runs/o report
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", ask], env=environment, capture_output=True, text=True, cwd=runs)
    assert done.stdout.split() == ["runs/one"], done
