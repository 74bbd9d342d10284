"""`make bench-growth` and `make bench-quick`: lines, intervals and verdicts by hand, and short runs of both."""

from __future__ import annotations

import json
import sys
import zipfile

import pytest
from benchmark_scripts import load


@pytest.fixture
def growth(monkeypatch):
    return load("growth", monkeypatch)


@pytest.fixture
def quick(monkeypatch, tmp_path):
    module = load("quick", monkeypatch)
    (tmp_path / "tree" / "rewarded_lines").mkdir(parents=True)
    (tmp_path / "tree" / "rewarded_lines" / "__init__.py").touch()
    monkeypatch.setattr(module, "ROOT", tmp_path / "tree")
    return module


def runs(module, *seconds, peak=10):
    return [module.Run(one, peak, 0, one / 2) for one in seconds]


def test_values_beside_the_line_through_the_two_smallest_sizes(growth):
    # 2 at 11 and 11 at 101: a tenth for each, so 101 at 1001.
    assert growth.beside_line({11: 2.0, 101: 11.0, 1001: 202.0}) == pytest.approx({11: 1, 101: 1, 1001: 2})
    # Less at a larger size is noise: the line is flat.
    assert growth.beside_line({1: 4.0, 2: 3.9, 8: 6.0}) == pytest.approx({1: 1, 2: 3.9 / 4, 8: 1.5})


def test_a_bend_is_bold(growth):
    sizes = dict(zip((1, 2, 10), runs(growth, 1, 2, 14, peak=50_000_000), strict=True))
    rows = growth.rows_of(growth.Series("merge", "λ", sizes))
    assert rows[0] == ["1", "1.0 s", "", "0.5 s", "", "50 MB", ""]
    assert rows[2] == ["10", "14.0 s", "**1.40**", "7.0 s", "**1.40**", "50 MB", "1.00"]


def test_sizes_are_run_and_kept(growth, tmp_path, monkeypatch, capsys):
    def part(bench):
        made = growth.Competitor("sleep", [([sys.executable, "-c", "pass"], tmp_path / "out")], [])
        yield bench.measure("nothing", "λ", (11, 101, 1001), lambda size: made)

    monkeypatch.setattr(growth, "PARTS", {"sweeps": part})
    growth.main(["--folder", str(tmp_path), "--most", "500", "--repeats", "1", "--json", str(tmp_path / "found.json")])
    assert "nothing\n\n| λ   | time" in capsys.readouterr().out
    (series,) = json.loads((tmp_path / "found.json").read_text())
    assert list(series["runs"]) == ["11", "101"] and all(one["peak"] > 1e6 for one in series["runs"].values())


def test_a_command_is_killed_once_it_has_made_enough(growth, tmp_path):
    code = "import sys, time, pathlib\nfor i in range(900):\n    pathlib.Path(sys.argv[1], f'{i}.parquet').touch()\n"
    command = [sys.executable, "-c", code + "    time.sleep(.02)", tmp_path]
    found = growth.run_and_kill(command, tmp_path, 3)
    assert found.peak > 1e6 and 3 <= len(list(tmp_path.iterdir())) < 900
    with pytest.raises(SystemExit, match="ended before it was killed"):
        growth.run_and_kill([sys.executable, "-c", "pass"], tmp_path / "none", 3)


def test_empty_checkpoints_take_no_room(growth, tmp_path):
    full, empty = (growth.write_checkpoint(tmp_path / str(at), growth.SMALL, 1, empty=bool(at)) for at in range(2))
    (one,), (other,) = (list(folder.glob("*.safetensors")) for folder in (full, empty))
    assert one.stat().st_size == other.stat().st_size and other.stat().st_blocks * 512 < 100_000
    end = int.from_bytes(one.read_bytes()[:8], "little") + 8
    assert one.read_bytes()[:end] == other.read_bytes()[:end] and not any(other.read_bytes()[end:])


@pytest.mark.parametrize(
    ("ratios", "found"),
    [([1.2, 0.9, 1.0], (0.9, 1.2)), ([5, 4, 3, 2, 1], (1, 5)), ([9, 8, 7, 6, 5, 4, 3, 2, 1], (2, 8))],
)
def test_the_interval_holds_the_median_nine_times_in_ten(quick, ratios, found):
    # Of nine, a tail of one has a chance of 10/512 on each side, one of two 46/512: too much.
    assert quick.interval(ratios) == found


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(1.11, 1.3, "SLOWER"), (0.9, 1.2, "not clear"), (0.95, 1.1, "ok"), (0.5, 0.6, "faster"), (0.5, 1.0, "ok")],
)
def test_only_a_whole_interval_above_the_limit_is_slower(quick, low, high, said):
    assert quick.verdict(low, high, 1.1) == said


def test_runs_are_compared_in_pairs(quick, tmp_path):
    work = quick.Work("merge", [], tmp_path, 3)
    # The machine became slower, for both.
    new, old = runs(quick, 1, 2, 4, peak=12), runs(quick, 1, 2, 5)
    assert quick.row(work, new, old) == ["merge", "1.00", "0.80 to 1.00", "3", "1.20", "≤ 1.10", "ok"]


@pytest.mark.parametrize(("pause", "code", "said"), [(0.3, 1, "SLOWER"), (0.0, 0, "")])
def test_a_slower_tree_is_red(quick, tmp_path, monkeypatch, capsys, pause, code, said):
    monkeypatch.setattr("os.sync", lambda: None)
    wheel = tmp_path / "old.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("rewarded_lines/__init__.py", "")
    (quick.ROOT / "rewarded_lines" / "__init__.py").write_text(f"import time; time.sleep({pause})")
    # The limit is far from what a busy machine does.
    work = quick.Work("import", ["-c", "import rewarded_lines"], tmp_path / "out", 3, 1.1 if pause else 50)
    monkeypatch.setattr(quick, "works", lambda folder: [work])
    with pytest.raises(SystemExit) as ended:
        quick.main(["--against", str(wheel), "--folder", str(tmp_path)])
    out = capsys.readouterr().out
    assert ended.value.code == code and "this tree against old.whl" in out and said in out


def test_what_is_compared_with(quick, tmp_path, monkeypatch):
    said = {"tag": b"v2\nv1\n", "rev-parse": b"abc123\n"}
    monkeypatch.setattr(quick, "git", lambda word, *rest: said[word])
    assert quick.earlier() == "v2"
    said["tag"] = b""
    assert quick.earlier() == "HEAD~20"
    monkeypatch.undo()
    monkeypatch.setattr(quick, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="name another with --against"):
        quick.unpack("no-such-revision", tmp_path)
