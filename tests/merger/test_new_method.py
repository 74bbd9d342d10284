"""A method is one row of the table: command line, projects, cards, commands and legends read it from there."""

import json
import multiprocessing
import sys

import yaml
from command import speak_to

SCRIPT = """\
import json, re, shlex, sys
from pathlib import Path

from rewarded_lines.merger.methods import METHODS, Method, Option

def shrink(residuals, weights, *, share):
    return share * sum(residual * weight for residual, weight in zip(residuals, weights))

METHODS["shrink"] = Method(
    shrink,
    "Shrinking: a part of the sum",
    "Shrunk",
    ("m = {share} Σ λᵢ τᵢ",),
    (("On Shrinking", "1234.56789"),),
    {"share": Option(0.5, "how much of the sum is kept", low=0, high=1)},
)
from rewarded_lines.cli import main
from rewarded_lines.evaluator.records import load_run
from rewarded_lines.reports.texts import method_labels
from rewarded_lines.reports.summary import summarise

def run(*words):
    sys.argv = ["rewarded-lines", *words]
    try:
        main()
    except SystemExit as end:
        return end.code or 0
    return 0

told = {"help": run("merge", "--help"), "merge": run("merge", "--lam", "0.3", "--method", "shrink", "--share", "0.25",
        "--beta", "0", "--out", "merged")}
card = Path("merged/README.md").read_text()
command = shlex.split(re.search(r"```bash\\n(.*?)\\n```", card)[1])[1:]
told |= {"card": card, "record": json.loads(Path("merged/merge.json").read_text())["options"]}
told |= {"again": run(*command[:-2], "--out", "again"), "sweep": run("sweep", "--engine", "hf", "--out", "run")}
told["labels"] = method_labels(summarise(load_run("run")))
project = Path("rewarded-lines.yaml")
project.write_text(project.read_text().replace("share: 0.75", "shade: 0.75"))
told["typo"] = run("sweep", "--engine", "hf", "--out", "typo")
Path("told.json").write_text(json.dumps(told))
"""


def run_script(out, errors):
    """Run the script as a new process would, which has the libraries but nothing of the project."""
    speak_to(out, errors)
    for name in [name for name in sys.modules if name.partition(".")[0] == "rewarded_lines"]:
        del sys.modules[name]
    exec(SCRIPT, {})


def test_a_new_method_is_a_row(tiny):
    project = tiny / "rewarded-lines.yaml"
    content = yaml.safe_load(project.read_text())
    mine = {"merge": "shrink", "beta": 0, "options": {"share": 0.75}}
    project.write_text(yaml.safe_dump({**content, "sweep": {"points": 2, "methods": {"soup": None, "mine": mine}}}))
    paths = tiny / "out.txt", tiny / "errors.txt"
    child = multiprocessing.get_context("fork").Process(target=run_script, args=paths)
    child.start()
    child.join()
    out, errors = (path.read_text() for path in paths)
    assert child.exitcode == 0, errors
    told = json.loads((tiny / "told.json").read_text())
    assert (told["help"], told["merge"], told["again"], told["sweep"], told["typo"]) == (0, 0, 0, 0, 1)
    # The command line shows a flag with its help, and the method's summary.
    assert "--share" in out and "shrink (0.5): how much" in out and "Shrinking: a part" in out
    assert told["record"] == {"share": 0.25}
    assert "m = 0.25 Σ λᵢ τᵢ" in told["card"] and "On Shrinking" in told["card"] and "1234.56789" in told["card"]
    assert "--method shrink --share 0.25" in told["card"]
    assert (tiny / "again/model.safetensors").read_bytes() == (tiny / "merged/model.safetensors").read_bytes()
    assert told["labels"]["mine"] == "Shrunk (β = 0)"
    assert "not an option of shrink" in errors and "--share" in errors
