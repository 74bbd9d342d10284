"""Measure how time and memory grow with the work, and compare them with a straight line; print tables.

    python tests/benchmarks/growth.py                                    # half an hour, 12 GB of disk
    python tests/benchmarks/growth.py --only parameters --folder /fast/disk --disk 60

Each row is a whole process. The line goes through the two smallest sizes of a table. A row bends where it is above 1.3
times the line. What is measured and how stands in README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from inputs import Llama, shape_of, write_checkpoint
from measure import Competitor, Run, alternate, clear, markdown, middle, run_once
from random_models import TINY, sentences, write_policies

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's path holds only its own folder
from invented_runs import synthetic_run  # noqa: E402
from mergekit_env import offline  # noqa: E402

OURS = Path(sys.executable).parent / "rewarded-lines"
BEND = 1.3
RESUMED = 1.05
MANY_LAMBDAS, PROMPTS, TOKENS = 1001, 100, 8
# A base and 16 policies of this shape fit the disk, and so do 1,001 merges of the small one.
SMALL = Llama(128, 256, 8, 4, 4, 2000)
POLICY_PARAMETERS = 5e7
# The models of sweeps. With fewer parameters 11 λ would not load the compiled loops (120 MB), and 1,001 would.
SWEPT = replace(TINY, vocabulary=4000)
Command = Sequence[str | Path]


@dataclass(frozen=True)
class Series:
    """One table: what was run, the unit of its sizes, and the medians at each size."""

    what: str
    unit: str
    runs: dict[float, Run]


def beside_line(values: dict[float, float]) -> dict[float, float]:
    """Return each value over the straight line through those of the two smallest sizes.

    v(s) = v₁ + k (s − s₁) with k = (v₂ − v₁)/(s₂ − s₁), or 0 where a larger size takes less: that is noise.
    """
    (first, low), (second, high), *_ = sorted(values.items())
    slope = max(0.0, (high - low) / (second - first))
    return {size: value / (low + slope * (size - first)) for size, value in values.items()}


def rows_of(series: Series) -> list[list[str]]:
    """Return the rows of a table; bends are bold."""
    sizes = sorted(series.runs)
    columns = {
        "seconds": lambda run: f"{run.seconds:.1f} s",
        "processor": lambda run: f"{run.processor:.1f} s",
        "peak": lambda run: f"{run.peak / 1e6:,.0f} MB",
    }
    rows = [[f"{size:,.10g}"] for size in sizes]
    for name, shown in columns.items():
        beside = beside_line({size: float(getattr(series.runs[size], name)) for size in sizes})
        for at, (size, row) in enumerate(zip(sizes, rows, strict=True)):
            ratio = f"**{beside[size]:.2f}**" if beside[size] > BEND else f"{beside[size]:.2f}"
            # The line goes through the first two.
            row += [shown(series.runs[size]), ratio if at > 1 else ""]
    return rows


def table(series: Series) -> str:
    """Return a series as Markdown, its title above it."""
    heading = [series.unit, "time", "÷ line", "processor time", "÷ line", "peak memory", "÷ line"]
    return f"{series.what}\n\n{markdown(heading, rows_of(series))}\n"


@dataclass
class Bench:
    """What every part needs."""

    folder: Path
    repeats: int
    most: float
    room: float
    series: list[Series] = field(default_factory=list)

    def measure(self, what: str, unit: str, sizes: Sequence[float], made: Callable[[float], Competitor]) -> str:
        """Run a command at every size that is asked for, the two smallest `repeats` times; return the table."""
        runs: dict[float, Run] = {}
        for size in [size for size in sizes if size <= self.most or size in sizes[:2]]:
            say(f"{what}: {size:,.10g} {unit} ...")
            one = made(size)
            found = alternate([one], self.repeats if len(runs) < 2 else 1, offline())
            runs[size] = middle(found[one.name])
        self.series.append(Series(what, unit, runs))
        return table(self.series[-1])

    def models(self, policies: int) -> list[str]:
        """Return the names of a tiny base and its policies, made at the first call."""
        names = ["base", *(f"policy-{number}" for number in range(1, policies + 1))]
        if not all((self.folder / name).is_dir() for name in names):
            write_policies(self.folder, SWEPT, "float32", "cpu", names)
        return names

    def project(self, policies: int = 2, rewards: int = 1, prompts: int = PROMPTS) -> Path:
        """Write a project of soups over tiny models and return its file."""
        name = f"{policies}-{rewards}-{prompts}"
        base, *names = self.models(policies)
        rows = [json.dumps({"prompt": text}) + "\n" for text in sentences(prompts, 12)]
        (self.folder / f"{name}.jsonl").write_text("".join(rows))
        # Each counts another letter, so that there is a front.
        count = "    return [float(text.count('{}')) for text in responses]\n"
        code = [f"def r{at}(prompts, responses):\n{count.format(chr(97 + at))}" for at in range(rewards)]
        (self.folder / f"{name}.py").write_text("\n".join(code))
        content: dict[str, Any] = {
            "base": base,
            "policies": {one: one for one in names},
            "rewards": {f"r{at}": {"function": f"{name}.py:r{at}"} for at in range(rewards)},
            "prompts": {"file": f"{name}.jsonl"},
            "generation": {"dtype": "float32", "max_tokens": TOKENS, "temperature": 1.0},
            "sweep": {"methods": ["soup"], "points": 11, "resamples": 100},
        }
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path


# ---- merge ----------------------------------------------------------------------------------------------------


def merge_command(inputs: Sequence[Path], lams: Sequence[str], out: Path, method: str = "soup") -> Command:
    base, *policies = inputs
    named = [text for path in policies for text in ("--policy", f"{path.name}={path}")]
    chosen = [text for lam in lams for text in ("--lam", lam)]
    return [OURS, "merge", "--base", base, *named, "--method", method, *chosen, "--out", out, "--rehash"]


def parameters(bench: Bench) -> Iterator[str]:
    """Merge two policies of more and more parameters; the inputs are holes, the output is written."""
    out = bench.folder / "out"
    sizes = [size for size in (0.1, 0.3, 1, 3, 5.5, 7) if 2.1e9 * size < bench.room]

    def made(size: float) -> Competitor:
        llama = shape_of(1e9 * size)
        inputs = [bench.folder / f"{size}B" / name for name in ("base", "a", "b")]
        if not inputs[0].exists():
            for policy, path in enumerate(inputs):
                write_checkpoint(path, llama, policy, empty=True)
        return Competitor("merge", [(merge_command(inputs, ["0.3"], out), out)], [])

    yield bench.measure("`merge`, two policies, one λ", "billion parameters", sizes, made)


def lambdas(bench: Bench) -> Iterator[str]:
    """Merge more and more λ of a small model in one command."""
    inputs = [write_checkpoint(bench.folder / "small" / name, SMALL, at) for at, name in enumerate(("base", "a", "b"))]
    out = bench.folder / "out"

    def made(count: float) -> Competitor:
        lams = [f"{step / (count - 1):.4f}" for step in range(int(count))]
        return Competitor("merge", [(merge_command(inputs, lams, out), out)], inputs)

    what = f"`merge`, two policies of {SMALL.parameters() / 1e6:.1f} million parameters, a folder for each λ"
    yield bench.measure(what, "λ", (11, 101, MANY_LAMBDAS), made)


def policies(bench: Bench) -> Iterator[str]:
    """Merge more and more policies."""
    llama, out, most = shape_of(POLICY_PARAMETERS), bench.folder / "out", int(max(4, min(16, bench.most)))
    paths = [bench.folder / "many" / f"m{number}" for number in range(most + 1)]
    for number, path in enumerate(paths):
        write_checkpoint(path, llama, number)

    def made_by(method: str) -> Callable[[float], Competitor]:
        def made(count: float) -> Competitor:
            some, share = paths[: int(count) + 1], ",".join([str(1 / count)] * int(count))
            return Competitor("merge", [(merge_command(some, [share], out, method), out)], some)

        return made

    for method in ("soup", "ties"):
        what = f"`merge --method {method}`, {llama.parameters() / 1e6:.0f} million parameters"
        yield bench.measure(what, "policies", (2, 4, 8, 16), made_by(method))
    clear(bench.folder / "many")


# ---- sweep ----------------------------------------------------------------------------------------------------


def sweep_command(project: Path, out: Path, points: float) -> Command:
    return [OURS, "sweep", "--config", project, "--out", out, "--points", str(int(points)), "--engine", "hf", "--quiet"]


def sweeps(bench: Bench) -> Iterator[str]:
    """Sweep more and more λ, prompts, rewards and policies, by transformers on a tiny model."""
    out = bench.folder / "sweep"

    def made(**how: int) -> Competitor:
        points = how.pop("points", 11)
        return Competitor("sweep", [(sweep_command(bench.project(**how), out, points), out)], [])

    what, usual = "`sweep --engine hf` of a tiny model", f"{PROMPTS} prompts"
    sizes = 11, 101, MANY_LAMBDAS
    yield bench.measure(f"{what}, {usual}", "λ", sizes, lambda size: made(points=int(size)))
    sizes = 100, 1000, 10_000
    yield bench.measure(f"{what}, 11 λ", "prompts", sizes, lambda size: made(prompts=int(size)))
    sizes = 1, 2, 4, 8
    yield bench.measure(f"{what}, 11 λ, {usual}", "rewards", sizes, lambda size: made(rewards=int(size)))
    sizes = 4, 8, 16
    fixed = {"points": 20}
    yield bench.measure(f"{what}, 20 λ, {usual}", "policies", sizes, lambda size: made(policies=int(size), **fixed))


def resumed(bench: Bench) -> Iterator[str]:
    """Sweep 11 λ, and 1,001 λ that are killed half-way and continued: the same memory."""
    project, out = bench.project(), bench.folder / "resumed"
    few = run_once(sweep_command(project, out, 11), offline())
    clear(out)
    many = int(min(MANY_LAMBDAS, bench.most))
    command = sweep_command(project, out, many)
    say(f"resumed: {many:,} λ, killed half-way ...")
    killed = run_and_kill(command, out / "points", many // 2)
    again = run_once(command, offline())
    clear(out)
    found = {"11": few, f"{many:,}, until it was killed": killed, f"{many:,}, continued": again}
    cells = [
        [name, f"{run.seconds:.1f} s", f"{run.peak / 1e6:,.0f} MB", f"{run.peak / few.peak:.3f}"]
        for name, run in found.items()
    ]
    title = f"`sweep --engine hf`, {PROMPTS} prompts; wanted: at most {RESUMED} times the memory of 11 λ"
    yield f"{title}\n\n{markdown(['λ', 'time', 'peak memory', '÷ 11 λ'], cells)}\n"


def run_and_kill(command: Command, points: Path, count: int) -> Run:
    """Run a command until a folder has so many files, then kill it; return its time and peak until then."""
    began = time.perf_counter()
    process = subprocess.Popen(command, env=offline(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peak, made = 0, 0
    while made < count:
        time.sleep(0.2)
        made = len(list(points.glob("[!.]*.parquet")))
        if process.poll() is not None:
            raise SystemExit(f"ended before it was killed: {process.communicate()[1][-2000:]}")
        peak = max(peak, peak_of(process.pid))
    process.send_signal(signal.SIGKILL)
    process.wait()
    return Run(time.perf_counter() - began, peak, 0)


def peak_of(pid: int) -> int:
    """Return the most memory that a running process has held, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


# ---- runs -----------------------------------------------------------------------------------------------------


def read_runs(bench: Bench) -> Iterator[str]:
    """Report runs of more and more points, rewards, policies; choose from them."""

    def made(verb: str, *words: str, **how: Any) -> Competitor:
        run = bench.folder / "-".join(["run", *(f"{key}{value}" for key, value in how.items())])
        if not run.exists():
            synthetic_run(run, prompts=PROMPTS, methods={"lines": (1.0, 1.0)}, **how)
        return Competitor(verb, [([OURS, verb, run, *words], run / "report")], [run])

    sizes = 11, 101, MANY_LAMBDAS
    what = f"of {PROMPTS} prompts and two rewards"
    yield bench.measure(f"`report` of a run {what}", "λ", sizes, lambda size: made("report", points=int(size)))
    knee = "choose", "--knee"
    yield bench.measure(f"`choose --knee` from a run {what}", "λ", sizes, lambda size: made(*knee, points=int(size)))
    sizes = 1, 2, 4, 8
    what = f"of {PROMPTS} prompts and 37 λ"
    yield bench.measure(
        f"`report` of a run {what}", "rewards", sizes, lambda size: made("report", points=37, rewards=int(size))
    )
    # With fewer policies, invented runs have a lattice.
    sizes = 5, 6, 8
    what = f"of {PROMPTS} prompts, two rewards and 200 λ"
    yield bench.measure(
        f"`report` of a run {what}", "policies", sizes, lambda size: made("report", points=200, policies=int(size))
    )


def searches(bench: Bench) -> Iterator[str]:
    """Search more and more λ of three policies; score one model with more and more prompts."""
    out = bench.folder / "searched"
    project = bench.project(policies=3, rewards=2, prompts=20)

    def made(count: float) -> Competitor:
        words = ["--config", project, "--engine", "hf", "--points", str(int(count)), "--gain", "0", "--quiet"]
        return Competitor("search", [([OURS, "search", out, *words], out)], [])

    yield bench.measure("`search --engine hf` of three policies, 20 prompts", "λ", (20, 100, 300), made)
    model = bench.folder / bench.models(2)[1]

    def scored(count: float) -> Competitor:
        config = bench.project(prompts=int(count))
        return Competitor("score", [([OURS, "score", model, "--config", config, "--engine", "hf"], out)], [])

    yield bench.measure("`score --engine hf` of a tiny model", "prompts", (100, 1000, 10_000), scored)


PARTS: dict[str, Callable[[Bench], Iterator[Series]]] = {
    "parameters": parameters,
    "lambdas": lambdas,
    "policies": policies,
    "sweeps": sweeps,
    "resumed": resumed,
    "runs": read_runs,
    "searches": searches,
}


# ---- the command ----------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """Tell where the run is, apart from the tables."""
    sys.stderr.write(text + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the parts asked for and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, action="append", help="a part; repeat for several (default: all)")
    parser.add_argument("--repeats", type=int, default=3, help="runs at the two smallest sizes (default 3)")
    parser.add_argument("--most", type=float, default=float("inf"), help="leave larger sizes out (default: none)")
    parser.add_argument("--folder", type=Path, help="where inputs and outputs go (default: a temporary folder)")
    parser.add_argument("--disk", type=float, default=12.0, help="GB that an output may take there (default 12)")
    parser.add_argument("--json", type=Path, help="also write the medians to this file")
    wanted = parser.parse_args(argv)
    if wanted.folder:
        wanted.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="growth-", dir=wanted.folder)).resolve()
    room = min(1e9 * wanted.disk, 0.9 * shutil.disk_usage(folder).free)
    bench = Bench(folder, wanted.repeats, wanted.most, room)
    try:
        for part in wanted.only or PARTS:
            for text in PARTS[part](bench):
                sys.stdout.write(text + "\n")
                sys.stdout.flush()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if wanted.json:
        content = [
            {"what": one.what, "unit": one.unit, "runs": {size: asdict(run) for size, run in one.runs.items()}}
            for one in bench.series
        ]
        wanted.json.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
