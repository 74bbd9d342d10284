"""Shared fixtures: a tiny Llama with its tokenizer, two policies of it, a project around them, and the command line."""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

# Nothing here may reach for the network, and vLLM's own chatter is not what a failing test should show.
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", VLLM_NO_USAGE_STATS="1")
# Of models as small as these, two threads would spend their time waiting for each other; here and in child processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# As the command line does: among the millions of objects that imports leave, collections take seconds.
gc.set_threshold(100_000, 20, 20)
# Here waiting for the disk has no use: no power cut is tested. Processes of their own still wait.
os.fsync = lambda descriptor: None

pytest_plugins = ("real_browser",)

# Files that take longest. They go first: the last file of a run has a worker for itself while the others are idle.
LONGEST = [
    *("engines/test_generation.py", "kernels/test_kernel_choice.py", "recipes/test_chat_rules.py"),
    *("evaluator/test_sweep.py", "training/test_ppo_trainer.py", "reports/figures/test_front_figures.py"),
    *("cli/test_killed_merge.py", "merger/test_invariance.py", "merger/test_exactness.py"),
    *("recipes/test_recipes.py", "recipes/test_resume.py", "evaluator/test_choose.py", "demo/test_pipeline.py"),
    *("evaluator/test_killed_sweep.py", "reports/page/test_responses.py", "reports/page/test_front.py"),
    *("rewards/test_http_rewards.py", "test_docs.py", "merger/test_adapters.py", "evaluator/test_search.py"),
    *("rewards/test_function_rewards.py", "cli/test_hostile_files.py", "reports/test_report.py", "test_light_core.py"),
]


# Files that begin with importing vLLM, which takes long: one process runs them all.
VLLM = (
    *("engines/test_generation.py", "engines/test_vllm_adapters.py", "engines/test_responses.py"),
    "engines/test_vllm_core.py",
    *("evaluator/test_vllm_sweep.py", "rewards/test_vllm_classifier.py"),
)


def pytest_collection(session):
    """Prepare a process that runs tests; the one that only hands them out needs none of these libraries."""
    if session.config.getoption("numprocesses", None):
        return
    import torch
    from hypothesis import HealthCheck, settings

    from rewarded_lines.kernels import kernels

    torch.set_num_threads(1)
    # Tensors of tests are small: numpy's loops, whose bits are the same, are done before LLVM has compiled the others.
    # Those have tests in tests/kernels and in test_exactness.py.
    kernels.ENOUGH = 1 << 62
    # That a machine is slow or busy is no fault of what is tested.
    settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("any machine")
    if not torch.cuda.is_available():
        from trl import import_utils

        # TRL imports vLLM at once, which takes each process 5 s; on a CPU, no test trains with vLLM.
        import_utils.is_vllm_available = lambda *_, **__: False


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With `--dist loadfile`, let one process have all files of vLLM."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "vLLM" if file.endswith(VLLM) else file

    return Files(config, log)


def pytest_addoption(parser):
    """Let tests for a GPU be tried without one."""
    parser.addoption("--rehearse", action="store_true", help="run tests of the marker `gpu` with the CPU as device")


def pytest_configure(config):
    """Hide GPUs from a rehearsal, before anything asks for them."""
    if config.getoption("--rehearse"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(config, items):
    """Skip what has no device, and begin with the longest files."""
    import torch

    rehearsed = config.getoption("--rehearse")
    for item in items:
        if item.get_closest_marker("gpu") is None:
            continue
        fixed = "device" in getattr(getattr(item, "callspec", None), "params", {})
        if rehearsed and (fixed or "device" not in item.fixturenames):
            item.add_marker(pytest.mark.skip(reason="other tests run the same with the CPU as device"))
        elif not rehearsed and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no GPU that torch can use"))
    here = Path(__file__).parent
    order = {here / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


def pytest_collection_finish(session):
    """See `_spare_what_stays`."""
    _spare_what_stays()


def pytest_runtest_teardown(item, nextitem):
    """See `_spare_what_stays`; after a test that imported vLLM, for example."""
    if len(sys.modules) > _imported + 100:
        _spare_what_stays()


def _spare_what_stays() -> None:
    """Keep later garbage collections from what is there now: mostly what has been imported, a million objects."""
    global _imported
    _imported = len(sys.modules)
    gc.collect()
    gc.freeze()


PROJECT = """\
title: tiny
base: sft
policies:
  first: first
  second: second
rewards:
  words:
    function: rewards.py:words
    unit: words
  letters:
    function: rewards.py:letters
prompts:
  file: test.jsonl
generation:
  max_tokens: 12
sweep:
  points: 3
"""
REWARDS = """\
def words(prompts, responses):
    return [len(response.split()) for response in responses]


def letters(prompts, responses):
    return [sum(map(str.isalpha, response)) / (1 + len(response)) for response in responses]
"""


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory) -> Path:
    """The project's files, made once; tests get copies."""
    from tiny_models import PROMPTS, make_model, perturb, save_model

    folder = tmp_path_factory.mktemp("tiny")
    save_model(make_model(0), folder / "sft")
    for seed, name in enumerate(("first", "second"), start=1):
        save_model(perturb(make_model(0), seed), folder / name)
    rows = [json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS * 3]
    (folder / "test.jsonl").write_text("".join(rows))
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "rewarded-lines.yaml").write_text(PROJECT)
    return folder


@pytest.fixture
def device(request) -> str:
    """The device of a test with the marker `gpu`; with `--rehearse` the CPU."""
    return "cpu" if request.config.getoption("--rehearse") else "cuda"


@pytest.fixture
def tiny(tiny_source, tmp_path, monkeypatch) -> Path:
    """A fresh copy of the tiny project, as the working directory."""
    folder = tmp_path / "tiny"
    shutil.copytree(tiny_source, folder)
    monkeypatch.chdir(folder)
    return folder


@dataclass
class Answer:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(monkeypatch, capsys) -> Callable[..., Answer]:
    """Run `rewarded-lines ARGS` in this process, through the same door as the installed script."""
    from rewarded_lines.cli import main

    def run(*args: object) -> Answer:
        monkeypatch.setattr("sys.argv", ["rewarded-lines", *map(str, args)])
        monkeypatch.setenv("COLUMNS", "120")
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        captured = capsys.readouterr()
        return Answer(code, captured.out, captured.err)

    return run


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Return `synthetic_run` bound to a new folder."""
    from invented_runs import synthetic_run

    def make(**options: object) -> Path:
        return synthetic_run(tmp_path / "run", **options)

    return make
