"""What the demo prints at its end: the chart, commands that run in its folder, the page."""

import shlex

from rewarded_lines import report, sweep
from rewarded_lines.cli.demo_command import show_end


def test_the_commands_at_the_end_run(tiny, cli, monkeypatch, capsys):
    sweep("rewarded-lines.yaml", engine="hf", out="sweep", points=3)
    summary = report("sweep", formats=["png"])
    monkeypatch.chdir(tiny.parent)
    folder = tiny.rename(tiny.parent / "a run")
    capsys.readouterr()
    show_end(folder.relative_to(tiny.parent), summary, "hf")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Mean rewards of every point")
    at = lines.index("Try next:")
    first, *commands = [shlex.split(line, comments=True) for line in lines[at + 1 :] if line and "browser" not in line]
    assert first == ["cd", "a run"]
    monkeypatch.chdir(first[1])
    words = [command for command in commands if command]
    assert [command[1] for command in words] == ["merge", "score", "choose"]
    for command in words:
        answer = cli(*command[1:])
        assert answer.code == 0, f"{command}\n{answer.err}"
    assert "rewarded-lines merge" in answer.out and (folder / "merged/lam=0.30/merge.json").is_file()
    assert lines[-1].endswith("a run/sweep/report/report.html")
    assert len(lines) < 40
    show_end(folder, summary, "vllm")
    assert "rewarded-lines serve sweep" in capsys.readouterr().out.splitlines()
    # The folder beside the run is not the run.
    assert f"remedy: name {folder / 'sweep'}" in cli("report", folder).err.replace("\n    ", " ")
    assert cli("report", folder / "sweep").code == 0
