"""Measure `rewarded-lines merge` against mergekit, `cp` and itself; print one table of ratios from one run.

    make bench
    python tests/benchmarks/merge_speed.py --only merge --parameters 2e8 --repeats 3 --folder /fast/disk

What is measured and how stands in README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from inputs import LLAMA_2_7B, Llama, read_headers, shape_of, write_adapter, write_adapter_base, write_checkpoint
from measure import CommandFailed, Competitor, Run, alternate, clear, folder_bytes, markdown, middle, run_once, warm

from rewarded_lines.merger.methods import METHODS

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's path holds only its own folder
from mergekit_env import MergekitUnavailable, default_folder, find_mergekit, offline  # noqa: E402

OURS = Path(sys.executable).parent / "rewarded-lines"
LAMBDAS = [f"{step / 10:.1f}" for step in range(11)]
LAM = 0.3
# The methods that mergekit has, too: its name, the parameters of each model and those of the merge.
THEIRS: dict[str, tuple[str, dict[str, float], dict[str, float]]] = {
    "soup": ("task_arithmetic", {}, {}),
    "sum": ("task_arithmetic", {"weight": 1}, {}),
    "ties": ("ties", {"density": 0.2}, {}),
    "dare": ("dare_linear", {"density": 0.1}, {}),
    "dare-ties": ("dare_ties", {"density": 0.1}, {}),
    "sce": ("sce", {}, {"select_topk": 0.1}),
    "della": ("della", {"density": 0.7, "epsilon": 0.07}, {}),
    "breadcrumbs": ("breadcrumbs", {"density": 0.14, "gamma": 0.01}, {}),
    "ram": ("ram", {}, {}),
    "ram-plus": ("ramplus_tl", {}, {}),
}
# `greedy` needs a score, `wise-ft` has one policy; by arithmetic these and `uniform` are soups.
NOT_MEASURED = ("soup", "greedy", "wise-ft", "uniform")
MEMORY_LIMIT = 500e6
Command = Sequence[str | Path]


@dataclass(frozen=True)
class Row:
    """One line of the table; `ratio` is what the limit speaks of, None where there was nothing to compare with."""

    what: str
    ours: str
    peer: str
    ratio: float | None
    limit: float

    @property
    def ok(self) -> bool | None:
        return None if self.ratio is None else self.ratio <= self.limit


@dataclass
class Bench:
    """What every part needs, and all runs so far."""

    folder: Path
    parameters: float
    repeats: int
    mergekit: Path | None
    runs: dict[str, list[Run]]

    def measure(self, part: str, competitors: Sequence[Competitor]) -> dict[str, Run]:
        """Run the competitors in turn and return each one's medians."""
        say(f"{part}: {', '.join(c.name for c in competitors)}, {self.repeats} times in turn ...")
        runs = alternate(competitors, self.repeats, offline())
        self.runs |= {f"{part}: {name}": found for name, found in runs.items()}
        return {name: middle(found) for name, found in runs.items()}

    def checkpoints(self, parameters: float) -> list[Path]:
        """Return base and two policies, made at the first call."""
        llama = shape_of(parameters)
        folder = self.folder / f"{llama.parameters() / 1e9:.2f}B"
        names = [folder / name for name in ("base", "a", "b")]
        if not folder.exists():
            say(f"making three checkpoints of {llama.parameters() / 1e9:.2f}B parameters in {folder} ...")
            for policy, path in enumerate(names):
                write_checkpoint(path, llama, policy)
        return names


# ---- the commands ---------------------------------------------------------------------------------------------


def merge_command(inputs: Sequence[Path], lams: Sequence[object], out: Path, method: str = "soup") -> Command:
    base, a, b = inputs
    policies = ["--policy", f"a={a}", "--policy", f"b={b}"]
    chosen = [text for lam in lams for text in ("--lam", str(lam))]
    return [OURS, "merge", "--base", base, *policies, "--method", method, *chosen, "--out", out]


def mergekit_command(tool: Path, inputs: Sequence[Path], lam: float, out: Path, method: str = "soup") -> Command:
    """Return the merge of the same method; the soup's is equal: LiNeS with α = β = 1, a gradient from λα to λ(α+β).

    Tensors outside the blocks get the gradient's first value there and α here, which is the same.
    """
    base, *policies = map(str, inputs)
    kind, each, whole = THEIRS[method]
    weighed = kind not in ("ram", "ramplus_tl")
    config = {
        "merge_method": kind,
        "base_model": base,
        "models": [
            {"model": policy, "parameters": ({"weight": [share, 2 * share]} if weighed else {}) | each}
            for policy, share in zip(policies, (lam, 1 - lam), strict=True)
        ],
        "parameters": whole,
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    path = out.with_name(f"mergekit-{method}.yaml")
    path.write_text(json.dumps(config))
    return [tool, path, out]


# ---- the parts ------------------------------------------------------------------------------------------------


def one_merge(bench: Bench) -> list[Row]:
    """One λ: against mergekit's equal merge, and against copying one checkpoint."""
    inputs = bench.checkpoints(bench.parameters)
    outs = {name: bench.folder / f"out-{name}" for name in ("ours", "cp", "mergekit")}
    command = merge_command(inputs, [LAM], outs["ours"])
    ours = Competitor("ours", [([*command, "--rehash"], outs["ours"])], inputs)
    # Usually the inputs were hashed by an earlier command.
    known = Competitor("known", [(command, outs["ours"])], inputs)
    competitors = [ours, known, Competitor("cp", [(["cp", "-r", inputs[0], outs["cp"]], outs["cp"])], inputs)]
    if bench.mergekit:
        command = mergekit_command(bench.mergekit, inputs, LAM, outs["mergekit"])
        competitors.append(Competitor("mergekit", [(command, outs["mergekit"])], inputs))
    rows = compare_outputs(competitors) if bench.mergekit else []
    found = bench.measure("merge", competitors)
    size = shape_of(bench.parameters).parameters() / 1e9
    theirs = found.get("mergekit")
    return [
        seconds_row(f"merge {size:.2f}B, peer mergekit", found["ours"], theirs, 0.2),
        seconds_row(f"merge {size:.2f}B, peer cp -r of one checkpoint", found["ours"], found["cp"], 3),
        seconds_row(f"merge {size:.2f}B of known hashes, peer mergekit", found["known"], theirs, 0.12),
        seconds_row(f"merge {size:.2f}B of known hashes, peer cp -r of one", found["known"], found["cp"], 2.5),
        memory_row(f"merge {size:.2f}B, peer mergekit", found["ours"], theirs),
        *rows,
    ]


def methods(bench: Bench) -> list[Row]:
    """Every method of the table: against the soup, and against mergekit where it has the method."""
    inputs, out, theirs = bench.checkpoints(bench.parameters), bench.folder / "out", bench.folder / "out-mergekit"
    chosen = [name for name in METHODS if name not in NOT_MEASURED]
    competitors = [
        Competitor(name, [(merge_command(inputs, [LAM], out, name), out)], inputs) for name in ("soup", *chosen)
    ]
    if tool := bench.mergekit:
        competitors += [
            Competitor(f"mergekit {name}", [(mergekit_command(tool, inputs, LAM, theirs, name), theirs)], inputs)
            for name in chosen
            if name in THEIRS
        ]
    found = bench.measure("methods", competitors)
    rows = [seconds_row(f"{name}, peer our soup", found[name], found["soup"], 2.5) for name in chosen]
    peers = [name for name in chosen if f"mergekit {name}" in found]
    return rows + [seconds_row(f"{name}, peer mergekit", found[name], found[f"mergekit {name}"], 1) for name in peers]


def compare_outputs(competitors: Sequence[Competitor]) -> list[Row]:
    """Show that both did the same work: an untimed run of each, and the values in which the outputs differ."""
    outs = {}
    for competitor in competitors:
        warm(competitor.inputs)
        ((command, outs[competitor.name]),) = competitor.commands
        clear(outs[competitor.name])
        run_once(command, offline())
    ours, theirs = read_headers(outs["ours"]), read_headers(outs["mergekit"])
    if ours.keys() != theirs.keys():
        raise SystemExit(f"mergekit wrote other tensors: {sorted(ours.keys() ^ theirs.keys())[:5]}")
    block = 1 << 22
    differ = sum(
        int((ours[name][start : start + block] != theirs[name][start : start + block]).sum())
        for name in ours
        for start in range(0, ours[name].size, block)
    )
    values = sum(tensor.size for tensor in ours.values())
    for out in outs.values():
        clear(out)
    return [Row("values that are not mergekit's, of all", f"{differ:,}", f"{values:,}", differ / values, 0.01)]


def memory(bench: Bench) -> list[Row]:
    """One λ at this size and at twice the size: the same memory, twice the time."""
    small, large = bench.checkpoints(bench.parameters), bench.checkpoints(2 * bench.parameters)
    out = bench.folder / "out"
    competitors = [
        Competitor(name, [(merge_command(inputs, [LAM], out), out)], inputs)
        for name, inputs in (("once", small), ("twice", large))
    ]
    found = bench.measure("memory", competitors)
    clear(large[0].parent)
    once, twice = found["once"], found["twice"]
    size = folder_bytes(small[0]) / 1e9
    peak = twice.peak / once.peak
    what = f"twice as large as {size:.2f} GB, peer itself at {size:.2f} GB"
    return [
        Row(f"{what}: peak", megabytes(twice), megabytes(once), peak, 1.1),
        seconds_row(what, twice, once, 2.2),
    ]


def lambdas(bench: Bench) -> list[Row]:
    """Eleven λ in one command, against eleven commands."""
    inputs = bench.checkpoints(bench.parameters)
    out = bench.folder / "out"
    competitors = [
        Competitor("together", [(merge_command(inputs, LAMBDAS, out), out)], inputs),
        Competitor("apart", [(merge_command(inputs, [lam], out), out) for lam in LAMBDAS], inputs),
    ]
    found = bench.measure("lambdas", competitors)
    together, apart = found["together"], found["apart"]
    size = sum(map(folder_bytes, inputs))
    # Less than the inputs means that they were mapped, and the kernel does not count what is read so.
    ratio = together.read / size if together.read >= size else None
    shown = f"{together.read / 1e9:.2f} GB"
    read = Row("11 λ in one command, bytes read, peer the inputs' size", shown, f"{size / 1e9:.2f} GB", ratio, 1.1)
    what = "11 λ in one command"
    return [seconds_row(f"{what}, peer 11 commands", together, apart, 0.3), read, memory_row(what, together, apart)]


def adapters(bench: Bench) -> list[Row]:
    """Eleven λ of two rank-16 adapters for a 7B-shaped model, against copying what it writes.

    Start-up is the time of the same command on adapters of next to no bytes.
    """
    out, copied = bench.folder / "out", bench.folder / "out-cp"
    inputs = write_adapters(bench.folder / "adapters", LLAMA_2_7B)
    tiny = write_adapters(bench.folder / "tiny-adapters", Llama(64, 128, 2, 2, 2))
    kept = bench.folder / "kept"
    clear(kept)
    run_once(merge_command(inputs, LAMBDAS, kept), offline())
    size = folder_bytes(kept)
    competitors = [
        Competitor("ours", [(merge_command(inputs, LAMBDAS, out), out)], inputs),
        Competitor("cp", [(["cp", "-r", kept, copied], copied)], [kept]),
        Competitor("start-up", [(merge_command(tiny, LAMBDAS, out), out)], tiny),
    ]
    found = bench.measure("adapters", competitors)
    for folder in (kept, inputs[0].parent, tiny[0].parent):
        clear(folder)
    ours, start, cp = found["ours"], found["start-up"], found["cp"]
    what = "11 λ of two adapters (rank 16, 7B)"
    ratio = (ours.seconds - start.seconds) / cp.seconds
    text = f"{ours.seconds:.2f} s, {start.seconds:.2f} of it start-up"
    return [
        Row(f"{what}, peer cp of {size / 1e9:.2f} GB", text, f"{cp.seconds:.2f} s", ratio, 2.5),
        memory_row(what, ours, None),
    ]


def write_adapters(folder: Path, llama: Llama) -> list[Path]:
    """Write base and two adapters; the base is a config without weights, all that merging adapters may need."""
    clear(folder)
    base = write_adapter_base(folder / "base", llama)
    return [base, *(write_adapter(folder / name, base, llama, policy) for policy, name in enumerate("ab", start=1))]


PARTS: dict[str, Callable[[Bench], list[Row]]] = {
    "merge": one_merge,
    "methods": methods,
    "memory": memory,
    "lambdas": lambdas,
    "adapters": adapters,
}


# ---- the table ------------------------------------------------------------------------------------------------


def seconds_row(what: str, ours: Run, peer: Run | None, limit: float) -> Row:
    ratio = ours.seconds / peer.seconds if peer else None
    return Row(what, f"{ours.seconds:.2f} s", f"{peer.seconds:.2f} s" if peer else "not measured", ratio, limit)


def memory_row(what: str, ours: Run, peer: Run | None) -> Row:
    """Return a row whose limit is absolute: ours in proportion to 500 MB, the peer's peak only shown."""
    shown = megabytes(peer) if peer else "not measured"
    return Row(f"{what}: peak, of {MEMORY_LIMIT / 1e6:.0f} MB", megabytes(ours), shown, ours.peak / MEMORY_LIMIT, 1)


def megabytes(run: Run) -> str:
    return f"{run.peak / 1e6:.0f} MB"


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table with even columns."""
    cells = []
    for row in rows:
        ratio = "not measured" if row.ratio is None else f"{row.ratio:.3g}"
        verdict = {None: "–", True: "yes", False: "NO"}[row.ok]
        cells.append([row.what, row.ours, row.peer, ratio, f"≤ {row.limit:g}", verdict])
    return markdown(["what", "ours", "peer", "ratio", "limit", "ok"], cells)


# ---- the command ----------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """Tell where the run is, apart from the table."""
    sys.stderr.write(text + "\n")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=1.1e9, help="of the checkpoints (default 1.1e9)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each, of which the median counts (default 5)")
    parser.add_argument("--folder", type=Path, help="where inputs and outputs go (default: a temporary folder)")
    parser.add_argument("--only", choices=PARTS, action="append", help="a part; repeat for several (default: all)")
    parser.add_argument("--json", type=Path, help="also write the table and every single run to this file")
    parser.add_argument("--mergekit-env", type=Path, default=default_folder(), help="(default %(default)s)")
    parser.add_argument("--no-mergekit", action="store_true", help="leave the comparison with mergekit out")
    return parser.parse_args(argv)


def check_space(folder: Path, parameters: float, parts: Sequence[str]) -> None:
    """Refuse to begin what the disk cannot hold: inputs, and what stands beside them at the worst moment."""
    checkpoints = {"merge": 3 + 3, "methods": 3 + 2, "memory": 3 + 3 * 2 + 2, "lambdas": 3 + 11, "adapters": 3}
    needed = 2.2 * parameters * max(checkpoints[part] for part in parts) + (4.5e9 if "adapters" in parts else 0)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SystemExit(f"{folder}: {needed / 1e9:.0f} GB needed, {free / 1e9:.0f} GB free; choose another --folder")


def mergekit_tool(wanted: argparse.Namespace, parts: Sequence[str]) -> Path | None:
    if wanted.no_mergekit or not {"merge", "methods"} & set(parts):
        return None
    try:
        say(f"mergekit's environment: {wanted.mergekit_env} (made in some minutes where it is missing)")
        return find_mergekit(wanted.mergekit_env)
    except MergekitUnavailable as error:
        say(f"mergekit is not measured: {error}")
        return None


def run_parts(bench: Bench, parts: Sequence[str]) -> tuple[list[Row], bool]:
    """Return the rows of every part that ran to its end, and whether all did."""
    rows: list[Row] = []
    whole = True
    for part in parts:
        try:
            rows += PARTS[part](bench)
        except CommandFailed as error:
            say(f"{part}: {error}")
            whole = False
    return rows, whole


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the parts asked for and print the table."""
    wanted = parse(argv)
    parts = wanted.only or list(PARTS)
    if wanted.folder:
        wanted.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="merge-speed-", dir=wanted.folder)).resolve()
    try:
        check_space(folder, wanted.parameters, parts)
        bench = Bench(folder, wanted.parameters, wanted.repeats, mergekit_tool(wanted, parts), {})
        rows, whole = run_parts(bench, parts)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sys.stdout.write(table(rows) + "\n")
    if wanted.json:
        runs = {name: [asdict(run) for run in found] for name, found in bench.runs.items()}
        wanted.json.write_text(json.dumps({"rows": [asdict(row) | {"ok": row.ok} for row in rows], "runs": runs}))
    sys.exit(0 if whole else 1)


if __name__ == "__main__":
    main()
