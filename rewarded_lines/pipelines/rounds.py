"""The verb `rounds`: train one policy per reward, merge them, and begin again from the merge."""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from rewarded_lines.engines.load_engine import check_engine
from rewarded_lines.errors import Problem, UserError, changed, differences, fail
from rewarded_lines.extras import check_verb
from rewarded_lines.folders import folder_lock, json_object_in, refuse_foreign, write_bytes, write_json
from rewarded_lines.merger.lines_schedule import Schedule
from rewarded_lines.merger.merge import merge
from rewarded_lines.merger.merge_options import MergeOptions
from rewarded_lines.merger.methods import METHODS
from rewarded_lines.merger.preferences import Weights
from rewarded_lines.merger.schedule_forms import FORMS, read_schedule
from rewarded_lines.options import takes_fields
from rewarded_lines.pipelines.recipe_jobs import FinishedParts, Part, RecipeJobs, Watch
from rewarded_lines.pipelines.round_options import DECIDED, RoundOptions
from rewarded_lines.pipelines.round_plan import RoundPlan, program
from rewarded_lines.progress import SILENT, Progress
from rewarded_lines.projects import load_project

STATE_FILE, PARTS_FILE, TABLE_FILE = "rounds.json", "finished.json", "rounds.csv"
_FILES = (".py", ".yaml", ".yml")
# Decided by the round.
_REFUSED = ("--project_file", "--output_dir")


@dataclass(frozen=True)
class Round:
    """One round: its models, the commands that make them, and what is known of it.

    Attributes:
        start: the model that its policies start from.
        merged: the model that it ends with.
        finished: whether all is there.
        seconds: how long it took, or an earlier round; None if that is not known.
        scores: value and interval of each reward, and of the KL to SFT in nats, of its model.
    """

    number: int
    start: str
    policies: Mapping[str, str]
    merged: str
    commands: Sequence[str]
    finished: bool
    seconds: float | None
    scores: Mapping[str, Any] = field(default_factory=dict)


@takes_fields(RoundOptions, "each")
@takes_fields(MergeOptions, "how", DECIDED)
def rounds(
    train: str | Sequence[str],
    config: str | Path = "rewarded-lines.yaml",
    *,
    lam: Weights | None = None,
    out: str | Path = "rounds",
    each: RoundOptions,
    how: MergeOptions,
    progress: Progress = SILENT,
) -> list[Round]:
    """Train, merge, and train on from the merge, N times: WARP (arXiv 2406.16768), MapReduce LoRA (arXiv 2511.20629).

    Round k trains each policy i from θ_(k−1), where θ_0 is the SFT model, and merges them there:

        θ_k = θ_(k−1) + η·s(ℓ)·m(τ_1 … τ_N; λ),   τ_i = θ_(k,i) − θ_(k−1)

    The KL penalty of training is to θ_(k−1), or to a moving average of the policy. Adapters are folded: θ_k is a whole
    model, and the next round's adapters are new.

    A killed call goes on where it stopped, also in the middle of a policy if its recipe saves checkpoints.

    Args:
        train: the command that trains a policy, such as "accelerate launch ppo.py --config ppo.yaml". Each round adds
            --reward, --project_file, --output_dir and --seed. There is a policy for each reward that is no audit.
            NAME=COMMAND is for one policy; without a common command, only those that are named are trained. The name
            is that of a reward, or the command itself says --reward.
        config: the project file, with `base` and `rewards`.
        lam: the weights λ, by default all equal.
        out: the folder of the rounds.
        each: the fields of `RoundOptions`, each by its name.
        how: those of `MergeOptions` that a round does not decide, likewise.
        progress: receives the training steps.

    Raises:
        UserError: a wrong setting, before anything is trained; a folder of other settings; a failed recipe.
    """
    plan = _plan(train, Path(config), lam, Path(out), each, how)
    _check_settings(plan)
    finished = FinishedParts(plan.out / PARTS_FILE)
    if not how.dry_run:
        plan.out.mkdir(parents=True, exist_ok=True)
        with folder_lock(plan.out), RecipeJobs(plan.out / "logs") as jobs:
            # Another process may have begun meanwhile.
            _check_settings(plan)
            _write_state(plan, finished)
            plan.write_validation()
            policies = sum(len(_untrained(plan, number, finished)) for number in plan.numbers)
            for number in plan.numbers:
                _make(plan, number, finished, jobs, partial(PolicyProgress, progress, policies))
                _write_state(plan, finished)
    return [_told(plan, number, finished) for number in plan.numbers]


def _plan(
    train: str | Sequence[str], config: Path, lam: Weights | None, out: Path, each: RoundOptions, how: MergeOptions
) -> RoundPlan:
    """Check everything that can be checked before training."""
    project = load_project(config)
    project.require("base", "rewards")
    base = project.resolve(str(project.config.base))
    commands = _commands([train] if isinstance(train, str) else train, project.config.objectives)
    _check_commands(commands)
    refuse_foreign(out, STATE_FILE)
    if each.score is not None:
        check_verb("score", "--score")
        check_engine(each.engine)
        if not Path(each.score).is_file():
            raise fail("no such file", where="--score", got=str(each.score), expected="a file with prompts")
    carried = {name: value for name, value in project.carried.items() if value not in project.config.policies}
    how = replace(how, as_="full", **carried)  # type: ignore[arg-type]
    if how.method == "greedy":
        raise fail("it chooses by scores, which a round does not have", where="--method", got=how.method)
    if how.alpha == "auto" and each.eta != 1:
        raise fail("η does not draw back a chosen α", where="--alpha", got="auto", remedy="name a number")
    if each.eta != 1:
        # (1 − η)·θ + η·(θ + s·m) = θ + (η·s)·m.
        given = {form: getattr(how, form) for form in FORMS}
        read = read_schedule(list(commands), **given, root=Path())
        how = replace(how, **Schedule(read["lines"], read["modules"]).times(each.eta).as_dict(list(commands)))
    if lam is None and METHODS[how.method].weights != "none":
        lam = (1 / len(commands),) * len(commands)
    # A merge of the base with itself, which writes nothing, checks λ, method, schedule and layers.
    tried = replace(how, dry_run=True, out=out / "tried", alpha=1.0 if how.alpha == "auto" else how.alpha)
    (result,) = merge(base, dict.fromkeys(commands, base), lam, how=tried)
    return RoundPlan(project, base, commands, result.spec, out, each, how)


def _commands(train: Sequence[str], objectives: Sequence[str]) -> dict[str, list[str]]:
    """Return the words of each policy's command."""
    named, common = dict[str, list[str]](), list[list[str]]()
    for text in train:
        name = re.match(r"([\w.+-]+)=", text)
        words = shlex.split(text[name.end() :] if name else text)
        if not words or (name and name[1] in named) or (common and not name):
            got = f"{text!r} twice" if words else repr(text)
            raise fail("not one command for each policy", where="--train", expected="COMMAND, or NAME=COMMAND", got=got)
        if name:
            named[name[1]] = words
        else:
            common.append(words)
    return {**{name: words for words in common for name in objectives}, **named}


def _check_commands(commands: Mapping[str, Sequence[str]]) -> None:
    problems = [] if commands else [Problem("no policy to train", "--train", remedy="declare rewards in the project")]
    for words, name in {tuple(words): name for name, words in commands.items()}.items():
        where, options = f"--train {shlex.join(words)}", [word.partition("=")[0] for word in words]
        if not Path(program(words[0])).is_file():
            # NAME=VALUE COMMAND, as for a shell.
            remedy = f"set {name} before `rewarded-lines rounds`, whose commands inherit it" if name.isupper() else ""
            problems.append(Problem("no such program", where, got=words[0], remedy=remedy))
        missing = [word for word in words if word.endswith(_FILES) and not Path(word.rpartition("=")[2]).is_file()]
        problems += [Problem("no such file", where, got=word) for word in missing]
        decided = [word for word in options if word in _REFUSED]
        problems += [Problem("each round sets this itself", where, got=word, remedy="leave it out") for word in decided]
    if problems:
        raise UserError(problems)


def _check_settings(plan: RoundPlan) -> None:
    """Refuse a folder whose rounds have other settings."""
    before, now = json_object_in(plan.out / STATE_FILE).get("settings"), json.loads(json.dumps(plan.settings))
    # As texts, since the policies have an order.
    if before is not None and json.dumps(before) != json.dumps(now):
        found = list(differences(before, now)) or ["the order of the policies"]
        remedy = "name another --out, or go back to the settings of this folder"
        raise fail("the folder has rounds of other settings", where=str(plan.out), got=changed(found), remedy=remedy)


def _untrained(plan: RoundPlan, number: int, finished: FinishedParts) -> list[Part]:
    """Return the policies of a round that are to be trained: none after their merge, so that they may be removed."""
    return finished.missing(plan.training(number)) if finished.missing([plan.merging(number)]) else []


def _make(plan: RoundPlan, number: int, finished: FinishedParts, jobs: RecipeJobs, watch: Watch) -> None:
    """Make what a round lacks."""
    plan.write_project(number)
    untrained = _untrained(plan, number, finished)
    for first in range(0, len(untrained), plan.each.at_once):
        finished.make(untrained[first : first + plan.each.at_once], jobs, watch)
    for part in (plan.merging(number), *plan.scoring(number)):
        watch(part.name)
        finished.make([part], jobs, watch)


def _told(plan: RoundPlan, number: int, finished: FinishedParts) -> Round:
    """Return what is known of a round; its time is that of the first one while it is not finished."""
    pairs = zip(plan.parts(number), plan.parts(1), strict=True)
    took, policies = [finished.took(own) or finished.took(first) for own, first in pairs], len(plan.commands)
    # The time of policies that are trained side by side counts once.
    share = [1 / min(plan.each.at_once, policies)] * policies + [1.0] * (len(took) - policies)
    return Round(
        number,
        plan.merged(number - 1),
        plan.policies(number),
        plan.merged(number),
        plan.shown(number),
        not finished.missing([plan.merging(number), *plan.scoring(number)]),
        None if None in took else sum(part * (one or 0.0) for part, one in zip(share, took, strict=True)),
        _scores(plan, finished).get(number, {}),
    )


def _scores(plan: RoundPlan, finished: FinishedParts) -> dict[int, dict[str, Any]]:
    """Return the scores and the KL of the rounds' models by number; 0 is the SFT model."""
    measured = [number for number in plan.numbers if plan.each.score and not finished.missing(plan.scoring(number))]
    found = dict[int, dict[str, Any]]()
    for number in measured:
        from rewarded_lines.evaluator.records import load_run
        from rewarded_lines.reports.summary import summarise

        sft, model = summarise(load_run(plan.folder(number) / "score")).points
        found |= {
            at: {**asdict(one)["rewards"], "kl_to_sft": asdict(one.kl)} for at, one in ((0, sft), (number, model))
        }
    return found


def _write_state(plan: RoundPlan, finished: FinishedParts) -> None:
    """Write the settings and what is measured so far, which is also in a table."""
    scores = _scores(plan, finished)
    write_json(plan.out / STATE_FILE, {"settings": plan.settings, "scores": scores})
    lines = [["round", *(f"{name}{end}" for name in scores[0] for end in ("", "_low", "_high"))]] if scores else []
    lines += [[str(number), *(str(x) for one in row.values() for x in one.values())] for number, row in scores.items()]
    if lines:
        table = io.StringIO()
        csv.writer(table, lineterminator="\n").writerows(lines)
        write_bytes(plan.out / TABLE_FILE, table.getvalue().encode())


class PolicyProgress(Progress):
    """One policy's progress as a part of all: each is taken to need as many steps as the first."""

    def __init__(self, whole: Progress, policies: int, name: str) -> None:
        """Show `name` at once."""
        self._whole, self._policies, self._name = whole, policies, name
        whole.start(name)

    def expect(self, total: int) -> None:
        """Set the total of all, from that of one."""
        self._whole.expect(total * self._policies)

    def start(self, step: str, counted: bool = False) -> None:
        """Show this step."""
        self._whole.start(f"{self._name}: {step}", counted)

    def advance(self, count: int, name: str = "") -> None:
        """Add to what is done."""
        self._whole.advance(count)
