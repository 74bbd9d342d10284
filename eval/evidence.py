"""Make everything that eval/results claims: train, merge, measure, report, keep the records. In resumable stages.

    python eval/evidence.py --quick            # tiny models, small numbers: a quarter of an hour on two cores
    python eval/evidence.py                    # SmolLM2-135M, three seeds, 300 prompts: hours
    python eval/evidence.py --list             # the stages, which are finished, how long they take
    python eval/evidence.py --only 'methods*' --seeds 0

Started again, it goes on where it stopped. A stage whose commands, configs or earlier stages have changed is made anew.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Sequence
from contextlib import chdir
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cached_property, partial
from pathlib import Path
from typing import Any

# Beside this file.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from evidence_stages.records import copied, copy_records, write_made
from evidence_stages.stage_files import REPO, Places, Stage, read_stages, seeds_of

from rewarded_lines.cli.display import progress_bar
from rewarded_lines.errors import Problem, UserError, fail
from rewarded_lines.folders import (
    atomic_file,
    folder_lock,
    json_object_in,
    refuse_foreign,
    remove,
    unfinished,
    write_json,
)
from rewarded_lines.pipelines.recipe_jobs import FinishedParts, Part, RecipeJobs, Watch
from rewarded_lines.pipelines.rounds import PolicyProgress
from rewarded_lines.processes import die_with_parent, termination_as_exit
from rewarded_lines.yaml_files import yaml_text

STAGES = Path(__file__).resolve().parent / "evidence_stages"
FULL, QUICK = ("movie_reviews", "packages", "skills", "pages"), ("quick",)
FULL_SEEDS, QUICK_SEEDS = (0, 1, 2), (0, 1)
STATE_FILE = "evidence.json"
_BEGAN = "began"


class StageFailed(UserError):
    """A stage failed; what is finished is kept."""


@dataclass(frozen=True)
class Evidence:
    """The stages to be made, and the state of those that are."""

    stages: Sequence[Stage]
    places: Places
    # Minutes that were expected of what this run has made, and that it took.
    pace: list[float] = field(default_factory=lambda: [0.0, 0.0])

    @cached_property
    def finished(self) -> FinishedParts:
        """The stages that are finished, kept in the folder of the work."""
        return FinishedParts(self.places.out / STATE_FILE)

    def done(self, stage: Stage) -> bool:
        """True if a stage's output and its records are there, and made from what it would be made from now."""
        records = all(copied(self.places.results / name) for name in stage.records)
        return records and self.finished.seconds(self.part(stage)) is not None

    def part(self, stage: Stage, jobs: RecipeJobs | None = None) -> Part:
        """Return a stage as a part of the job; one that began from the same inputs goes on."""
        work = None if jobs is None else partial(_work, stage, jobs)
        # What changed inputs must not go on from is removed by `make`.
        return Part(stage.name, stage.output, stage.made_from, run=work, resumes=True)

    def make(self, stage: Stage) -> None:
        """Make a stage and copy its records."""
        state = json_object_in(self.finished.file)
        entry = state.get(stage.name, {})
        resumed = entry.get(_BEGAN) == stage.made_from
        if not resumed:
            for path in stage.starts_anew:
                remove(path)
                # Where a recipe that was killed left its checkpoints.
                remove(unfinished(path))
        write_json(self.finished.file, {**state, stage.name: {**entry, "made_from": "", _BEGAN: stage.made_from}})
        for path, content in stage.write.items():
            with atomic_file(path) as written:
                written.write_text(yaml_text(content), encoding="utf-8")
        recipes = RecipeJobs(self.places.out / "logs", small=stage.small, share_cores=True)
        with recipes as jobs, progress_bar(stage.name) as bar:
            self.finished.make([self.part(stage, jobs)], jobs, lambda _: bar)
        if not stage.output.exists():
            raise fail("the commands ended without their output", where=stage.name, got=f"no {stage.output}")
        for name, source in stage.records.items():
            copy_records(source, self.places.results / name)
        minutes = (self.finished.took(self.part(stage)) or 0.0) / 60
        told: dict[str, Any] = {"minutes": round(minutes, 2), "commands": list(map(shlex.join, stage.commands))}
        # Then the minutes are those since the last start.
        told |= {"started_again": True} if resumed else {}
        write_made(self.places.results, {stage.name: told}, list(stage.records))
        self.pace[:] = [self.pace[0] + stage.minutes, self.pace[1] + minutes]

    def left(self) -> float:
        """Return about how many minutes the rest takes, at the pace so far."""
        expected, took = self.pace
        pace = took / expected if expected >= 1 else 1.0
        return pace * sum(stage.minutes for stage in self.stages if not self.done(stage))


def _work(stage: Stage, jobs: RecipeJobs, watch: Watch) -> None:
    """Run a stage's commands."""
    named = {f"{stage.name} {number}": words for number, words in enumerate(stage.words, 1)}
    for group in [named] if stage.together else [{name: words} for name, words in named.items()]:
        jobs.run(group, partial(PolicyProgress, watch(stage.name), len(group)))


def run(evidence: Evidence) -> None:
    """Make the stages that are not finished, and print a line for each.

    Raises:
        UserError: another process makes them, or one needs what is not there.
        StageFailed: a stage failed; the same command goes on.
    """
    out = evidence.places.out
    refuse_foreign(out, STATE_FILE)
    out.mkdir(parents=True, exist_ok=True)
    with folder_lock(out):
        for number, stage in enumerate(evidence.stages, 1):
            head = f"[{number}/{len(evidence.stages)}] {stage.name}"
            if evidence.done(stage):
                print(f"{head}: finished earlier", flush=True)
                continue
            print(f"{head}: {stage.about}; about {stage.minutes:g} min of {evidence.left():.0f} left", flush=True)
            try:
                evidence.make(stage)
            except UserError as error:
                raise StageFailed(error.problems) from error
            print(f"{head}: done in {(evidence.finished.took(evidence.part(stage)) or 0) / 60:.1f} min", flush=True)
    print(f"records: {evidence.places.results}")


def show(evidence: Evidence) -> None:
    """Print every stage: whether it is finished, its minutes, what it does."""
    for stage in evidence.stages:
        done, took = evidence.done(stage), evidence.finished.took(evidence.part(stage))
        minutes = f"{took / 60:.1f} min" if done and took is not None else f"about {stage.minutes:g} min"
        print(f"{'done' if done else 'open':<5} {stage.name:<26} {minutes:>14}  {stage.about}")
    print(f"about {evidence.left():.0f} minutes are left on two quiet cores; work in {evidence.places.out}")


def chosen(stages: Sequence[Stage], patterns: Sequence[str]) -> list[Stage]:
    """Return the stages that some pattern names, with or without their seed; all without patterns."""

    def named(stage: Stage, pattern: str) -> bool:
        return any(fnmatch(name, pattern) for name in (stage.name, re.sub(r"-seed\d+$", "", stage.name)))

    if unknown := [one for one in patterns if not any(named(stage, one) for stage in stages)]:
        known = ", ".join(stage.name for stage in stages)
        raise fail("no such stage", where="--only", expected=known, got=unknown[0])
    return [stage for stage in stages if not patterns or any(named(stage, one) for one in patterns)]


def check(evidence: Evidence, every: Sequence[Stage]) -> None:
    """Refuse, before anything is run, stages that lack a script or a stage that was left out."""
    own = {stage.name for stage in evidence.stages}
    known = {stage.name: stage for stage in every}
    problems = []
    for stage in evidence.stages:
        if evidence.done(stage):
            continue
        problems += [Problem("not in the checkout", where=stage.name, got=name) for name in stage.missing]
        lacking = [name for name in stage.after if name not in own and not evidence.done(known[name])]
        problems += [Problem("it needs a stage that is not finished", where=stage.name, got=name) for name in lacking]
    if problems:
        raise UserError(problems)


def main(argv: Sequence[str]) -> None:
    """Make, or list, the stages."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--quick", action="store_true", help="tiny models and small numbers")
    parser.add_argument("--list", action="store_true", help="show the stages, and make nothing")
    only = "this stage, of all seeds, or a pattern (repeat)"
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help=only)
    told = "training seeds, such as 0,1 (repeat); 0,1,2 by default, with --quick 0,1"
    parser.add_argument("--seeds", action="append", help=told)
    parser.add_argument("--out", type=Path, help="folder of the work: runs/evidence, with --quick runs/evidence-quick")
    parser.add_argument("--results", type=Path, help="folder of the records: eval/results, with --quick OUT/results")
    parser.add_argument("--stages", action="append", type=Path, metavar="FILE", help="stage files of your own (repeat)")
    options = parser.parse_args(argv)

    files = options.stages or [STAGES / f"{name}.yaml" for name in (QUICK if options.quick else FULL)]
    out = (options.out or REPO / "runs" / ("evidence-quick" if options.quick else "evidence")).resolve()
    results = options.results or (out / "results" if options.quick or options.stages else REPO / "eval" / "results")
    default = QUICK_SEEDS if options.quick else FULL_SEEDS
    seeds = seeds_of(",".join(options.seeds)) if options.seeds else default
    with chdir(REPO):
        places = Places(_short(out), _short(results.resolve()), seeds)
        every = read_stages(files, places)
        evidence = Evidence(chosen(every, options.only), places)
        if options.list:
            show(evidence)
            return
        check(evidence, every)
        run(evidence)


def _again() -> str:
    """Return the command that was given."""
    return shlex.join(["python", *sys.argv])


def _short(path: Path) -> Path:
    """Return a path from the checkout, if it lies in there: records name no folder of this machine."""
    return path.relative_to(REPO) if path.is_relative_to(REPO) else path


if __name__ == "__main__":
    die_with_parent()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        with termination_as_exit():
            main(sys.argv[1:])
    except StageFailed as error:
        sys.exit(f"{error}\n\nto go on: {_again()}")
    except UserError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(f"\nstopped; to go on: {_again()}")
