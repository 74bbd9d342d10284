"""Tell within three minutes whether this tree is slower than an earlier one; print ratios.

    python tests/benchmarks/quick.py                              # against the newest tag, or without tags HEAD~20
    python tests/benchmarks/quick.py --against v1.2               # a revision
    python tests/benchmarks/quick.py --against old.whl            # a wheel

Both run in this environment, each from its own copy, in pairs and alternating order. A row is "SLOWER" only if the
whole interval of its ratios is above the limit. Then the exit code is 1.
"""

from __future__ import annotations

import argparse
import compileall
import io
import math
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from inputs import shape_of, write_checkpoint
from measure import Competitor, Run, alternate, markdown
from random_models import TINY, write_classifier, write_policies, write_sweep_project

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))  # a script's path holds only its own folder
from invented_runs import synthetic_run  # noqa: E402
from mergekit_env import offline  # noqa: E402

PACKAGE = "rewarded_lines"
MAIN = "import sys; from rewarded_lines.cli import main; sys.exit(main())"
PARAMETERS = 1e8
# Without a tag, so many commits back.
BACK = 20
LEVEL = 0.9
FASTER, OK, UNCLEAR, SLOWER = "faster", "ok", "not clear", "SLOWER"


@dataclass(frozen=True)
class Work:
    """What both sides do: arguments of Python, the output to remove, and the limit of the ratio of times."""

    what: str
    words: Sequence[str | Path]
    out: Path
    pairs: int
    limit: float = 1.10


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """Return the narrowest interval of order statistics that holds the median with a chance of `LEVEL`, or the widest.

    Of n independent ratios, the k-th smallest and the k-th largest enclose the median of their distribution with
    probability 1 − 2·P(B < k), B ~ Binomial(n, 1/2). With four or fewer the whole range has less than 0.9.
    """
    ordered, count = sorted(ratios), len(ratios)
    outside = 0.0
    k = 1
    for below in range(count // 2):
        outside += math.comb(count, below) / 2**count
        if 1 - 2 * outside < LEVEL:
            break
        k = below + 1
    return ordered[k - 1], ordered[count - k]


def verdict(low: float, high: float, limit: float) -> str:
    """Return what an interval of ratios says about a limit."""
    if low > limit:
        return SLOWER
    if high > limit:
        return UNCLEAR
    return FASTER if high < 1 / limit else OK


def row(work: Work, new: Sequence[Run], old: Sequence[Run]) -> list[str]:
    """Return a row: the median ratio of the pairs, its interval, the ratio of peak memory, the limit, the verdict."""
    ratios = [ours.seconds / theirs.seconds for ours, theirs in zip(new, old, strict=True)]
    low, high = interval(ratios)
    memory = median(run.peak for run in new) / median(run.peak for run in old)
    said = verdict(low, high, work.limit)
    shown = [f"{median(ratios):.2f}", f"{low:.2f} to {high:.2f}", str(len(ratios)), f"{memory:.2f}"]
    return [work.what, *shown, f"≤ {work.limit:.2f}", said]


# ---- the two sides --------------------------------------------------------------------------------------------


def git(*words: str) -> bytes:
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True)
    if done.returncode:
        sys.exit(f"git {' '.join(words)}: {done.stderr.decode().strip()}\nname another with --against")
    return done.stdout


def earlier() -> str:
    """Return what is compared with by default: the newest tag, or without tags an earlier commit."""
    tags = git("tag", "--merged", "HEAD", "--sort=-creatordate").decode().split()
    return tags[0] if tags else f"HEAD~{BACK}"


def unpack(against: str, folder: Path) -> str:
    """Write an earlier package into a folder; return its name with what it is."""
    if against.endswith(".whl"):
        with zipfile.ZipFile(against) as wheel:
            wheel.extractall(folder)
        return Path(against).name
    commit = git("rev-parse", "--short", f"{against}^{{commit}}").decode().strip()
    with tarfile.open(fileobj=io.BytesIO(git("archive", commit, PACKAGE))) as archive:
        archive.extractall(folder, filter="data")
    return f"{against} ({commit})"


def sides(folder: Path, against: str) -> tuple[dict[str, Path], str]:
    """Return a copy of this tree's package and one of the earlier, both compiled, and the earlier one's name."""
    places = {"new": folder / "new", "old": folder / "old"}
    shutil.copytree(ROOT / PACKAGE, places["new"] / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
    name = unpack(against, places["old"])
    for place in places.values():
        if not (place / PACKAGE / "__init__.py").is_file():
            sys.exit(f"{name}: no package {PACKAGE} in it\nname another with --against")
        compileall.compile_dir(place, quiet=2)
    return places, name


# ---- the work -------------------------------------------------------------------------------------------------


def works(folder: Path) -> Iterator[Work]:
    """Make the inputs, and yield what is measured."""
    out = folder / "out"
    yield Work("import rewarded_lines", ["-c", f"import {PACKAGE}"], out, 9, 1.25)
    yield Work("--help", ["-c", MAIN, "--help"], out, 9)
    yield Work("merge --help", ["-c", MAIN, "merge", "--help"], out, 9)
    models = [folder / name for name in ("base", "a", "b")]
    for at, path in enumerate(models):
        write_checkpoint(path, shape_of(PARAMETERS), at)
    base, *policies = models
    merge = ["-c", MAIN, "merge", "--base", base, *(f"--policy={path.name}={path}" for path in policies), "--out", out]
    yield Work("merge, one λ", [*merge, "--lam", "0.3"], out, 7)
    yield Work("merge, 11 λ", [*merge, *(f"--lam={step / 10}" for step in range(11))], out, 5)
    yield Work("merge, TIES", [*merge, "--lam", "0.3", "--method", "ties"], out, 5)
    tiny = folder / "tiny"
    write_policies(tiny, TINY, "float32", "cpu", ["base", "first", "second"])
    write_classifier(tiny / "judge", TINY, "float32", "cpu")
    project = write_sweep_project(tiny, "float32", 32, 8)
    sweep = ["-c", MAIN, "sweep", "--config", project, "--out", out, "--points", "3", "--engine", "hf", "--quiet"]
    yield Work("sweep, 3 λ, transformers", sweep, out, 3)
    run = synthetic_run(folder / "run", prompts=64)
    yield Work("report of 23 points", ["-c", MAIN, "report", run, "--resamples", "200"], run / "report", 4)


def compare(work: Work, places: dict[str, Path], environment: dict[str, str]) -> list[str]:
    """Run both sides once to warm up what they keep, then in pairs; return the row."""
    sys.stderr.write(f"{work.what} ...\n")
    # With -P, the working directory does not come before PYTHONPATH.
    competitors = [
        Competitor(name, [(["env", f"PYTHONPATH={place}", sys.executable, "-P", *work.words], work.out)], [])
        for name, place in places.items()
    ]
    alternate(competitors, 1, environment)
    runs = alternate(competitors, work.pairs, environment)
    return row(work, runs["new"], runs["old"])


def main(argv: Sequence[str] | None = None) -> None:
    """Compare both and print the table; exit with 1 if a row is slower."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", help="a revision or a wheel (default: the newest tag, or without tags HEAD~20)")
    parser.add_argument("--only", default="", help="the rows whose name has this text (default: all)")
    parser.add_argument("--folder", type=Path, help="where inputs and outputs go (default: a temporary folder)")
    wanted = parser.parse_args(argv)
    if wanted.folder:
        wanted.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="quick-", dir=wanted.folder) as scratch:
        folder = Path(scratch).resolve()
        places, name = sides(folder, wanted.against or earlier())
        rows = [compare(work, places, offline()) for work in works(folder) if wanted.only in work.what]
    if not rows:
        sys.exit(f"no row has {wanted.only!r} in its name")
    heading = ["what", "time, new ÷ old", f"interval, {LEVEL:.0%}", "pairs", "memory, new ÷ old", "limit", "verdict"]
    sys.stdout.write(f"this tree against {name}\n\n{markdown(heading, rows)}\n")
    sys.exit(1 if any(cells[-1] == SLOWER for cells in rows) else 0)


if __name__ == "__main__":
    main()
