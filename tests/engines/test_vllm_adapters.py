"""Merged adapters in vLLM's slots: each model of a batch answers as if alone and folded into its base."""

import gc
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from command import hear_interrupts
from tiny_adapters import save_adapter
from tiny_models import PROMPTS

from rewarded_lines.config import GenerationSpec
from rewarded_lines.engine_settings import EngineSettings
from rewarded_lines.engines import adapter_folders, vllm_memory, vllm_models
from rewarded_lines.engines.adapter_folders import AdapterFolders
from rewarded_lines.engines.base import Workload
from rewarded_lines.engines.load_engine import load_generator
from rewarded_lines.engines.server_engine import RemoteGenerator
from rewarded_lines.engines.vllm_adapters import VllmAdapterGenerator, slot_rank
from rewarded_lines.engines.vllm_models import MergingWorker
from rewarded_lines.errors import UserError
from rewarded_lines.merger.open_inputs import plan_adapters, plan_merge
from rewarded_lines.merger.spec import MergeSpec

GREEDY = GenerationSpec(temperature=0, max_tokens=12)
SAMPLED = GenerationSpec(temperature=1.0, top_p=0.9, max_tokens=12, seed=3, n=2)
LINE = [MergeSpec((k / 5, 1 - k / 5), 1.0, 0.5) for k in range(6)]
# The ends of plain soups repeat a policy, with patterns of its own that vLLM does not read.
ENDS = [MergeSpec((1.0, 0.0), 1.0, 0.0), MergeSpec((0.0, 1.0), 1.0, 0.0)]
MODELS = [None, *LINE, *ENDS, MergeSpec((0.0, 0.0))]


@pytest.fixture
def policies(tiny):
    save_adapter(tiny / "sft", tiny / "one", 1, r=4, lora_alpha=16)
    patterns = {"rank_pattern": {"up_proj": 3}, "alpha_pattern": {"up_proj": 30}}
    targets = ["q_proj", "up_proj"]
    save_adapter(tiny / "sft", tiny / "two", 2, r=6, lora_alpha=9, use_rslora=True, target_modules=targets, **patterns)
    return {"one": "one", "two": "two"}


@pytest.fixture
def vllm(policies, monkeypatch):
    pytest.importorskip("vllm", reason="vLLM is not installed in this environment")
    monkeypatch.setattr(vllm_memory, "_MOST_ADAPTERS", 3)
    children = set(psutil.Process().children(recursive=True))
    generator = load_generator("vllm", "sft", SAMPLED, PROMPTS, plan=plan_adapters("sft", policies))
    # In memory, and without files.
    assert generator._folders is None and generator.told == ()
    yield generator
    folder = generator._folders and generator._folders.folder
    generator.close()
    assert not (folder and folder.exists()) and set(psutil.Process().children(recursive=True)) == children


def tokens_of(answers):
    return [[response.tokens for response in responses] for responses in answers]


def test_a_batch_of_models_is_each_model_by_itself_and_folded(vllm, policies, monkeypatch, caplog):
    """One test, since the engine is slow to build; the fixture checks that closing it leaves nothing behind."""
    assert vllm.at_once == 3
    calls, generate = [], vllm._llm.generate
    monkeypatch.setattr(
        vllm._llm,
        "generate",
        lambda rows, *args, **options: calls.append(len(rows)) or generate(rows, *args, **options),
    )
    hf = load_generator("hf", "sft", SAMPLED, PROMPTS, plan=plan_merge("sft", policies))
    together = tokens_of(vllm.generate(PROMPTS, GREEDY, MODELS))
    # Eight adapters at three a time; models without one take no slot.
    assert calls == [4 * len(PROMPTS), 3 * len(PROMPTS), 3 * len(PROMPTS)]
    assert together == tokens_of(hf.generate(PROMPTS, GREEDY, MODELS))
    assert len({str(one) for one in together}) == len(MODELS) - 1 and together[0] == together[-1]
    several = [*MODELS[:3], ENDS[0], MODELS[-1]]
    alone = [tokens_of(vllm.generate(PROMPTS, SAMPLED, [model]))[0] for model in several]
    assert tokens_of(vllm.generate(PROMPTS, SAMPLED, several)) == alone and alone[0] == alone[-1]
    assert tokens_of(vllm.generate(PROMPTS[:2], SAMPLED, several[:2])) == [one[:4] for one in alone[:2]]
    check_mixed_batches(vllm, together)
    check_scores(vllm, hf)
    check_nothing_stays(vllm, monkeypatch)
    check_other_ways(vllm, together, monkeypatch, caplog)
    hf.close()


def check_mixed_batches(generator, expected):
    """Check that base requests get no adapter when all slots are in use, in any order."""
    for order in ([1, 2, 3, 0], [0, 4, 5, 6], [7, 0, 8, 1, 0]):
        found = tokens_of(generator.generate(PROMPTS, GREEDY, [MODELS[index] for index in order]))
        assert found == [expected[index] for index in order]
    assert tokens_of(generator.generate(PROMPTS, GREEDY)) == expected[:1]


def check_scores(generator, reference):
    (responses,) = generator.generate(PROMPTS, SAMPLED, [LINE[2]])
    heads = [ids for ids in generator.encode(PROMPTS) for _ in range(2)]
    pairs = [(head, response.tokens) for head, response in zip(heads, responses, strict=True)]
    own = [response.logprob for response in responses]
    assert generator.logprobs(pairs, LINE[2]) == pytest.approx(own, abs=1e-3)
    for model in (None, LINE[0], ENDS[1]):
        assert generator.logprobs(pairs, model) == pytest.approx(reference.logprobs(pairs, model), abs=1e-3) != own


def check_nothing_stays(generator, monkeypatch):
    """Check that adapters are removed from engine and disk, also after an error."""
    folder = [] if generator._folders is None else [generator._folders.folder]
    assert generator._llm.llm_engine.list_loras() == set() and not [file for one in folder for file in one.iterdir()]
    with monkeypatch.context() as broken:
        broken.setattr(generator, "_generate", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            generator.generate(PROMPTS, GREEDY, LINE[:2])
    assert generator._llm.llm_engine.list_loras() == set() and not [file for one in folder for file in one.iterdir()]
    assert generator.swap_seconds > 0


def check_other_ways(generator, expected, monkeypatch, caplog):
    """Check memory that runs out in the midst of a batch, and files from then on."""
    give, calls = vllm_models.give_to_vllm, []

    def full(*args):
        calls.append(args)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        give(*args)

    with monkeypatch.context() as patch:
        patch.setattr(vllm_models, "give_to_vllm", full)
        assert tokens_of(generator.generate(PROMPTS, GREEDY, MODELS[:4])) == expected[:4]
    assert len(calls) == 2 and "adapters go through files from now on (CUDA out of memory)" in caplog.text
    folder = generator._folders.folder
    assert folder.stat().st_mode & 0o777 == 0o700
    for left in folder.iterdir():
        # Written in that batch, and removed with all others in the end.
        shutil.rmtree(left)
    assert tokens_of(generator.generate(PROMPTS, GREEDY, MODELS)) == expected
    check_nothing_stays(generator, monkeypatch)


@pytest.mark.slow
def test_many_adapters_take_no_more_memory(vllm):
    sizes, short = [], GREEDY.model_copy(update={"max_tokens": 1})
    for index in range(45):
        vllm.generate(PROMPTS[:1], short, [MergeSpec((index / 45, 1 - index / 45))])
        if index in (5, 44):
            gc.collect()
            sizes.append(psutil.Process().memory_info().rss)
    assert sizes[1] - sizes[0] < 24 << 20


class StandIn(VllmAdapterGenerator):
    """Sends messages as JSON to a worker whose vLLM lacks a name; keeps what vLLM is asked to load."""

    def _start(self, work, beside, **options):
        self.worker, self.beside, self.loaded = MergingWorker(), beside, []
        self.worker.model_runner = None
        self._llm = SimpleNamespace(llm_engine=self, scheduler_config=SimpleNamespace(max_num_seqs=256))
        self.vllm_config = self._llm

    def call(self, method, *args):
        if method in ("group_adapters", "unserved_modules"):
            return [[]]
        return [json.loads(json.dumps(getattr(self.worker, method)(*json.loads(json.dumps(args)))))]

    def add_lora(self, request):
        self.loaded.append(request.lora_path)

    def remove_lora(self, number):
        pass


def test_a_vllm_with_other_names_gets_files(policies, caplog):
    pytest.importorskip("vllm", reason="vLLM is not installed in this environment")
    work = Workload("sft", GREEDY, PROMPTS, plan_adapters("sft", policies), settings=EngineSettings(resident="gpu"))
    generator = StandIn(work)
    assert generator.beside == 0 and "no room for the adapters on a GPU" in generator.told[0]
    with generator._loaded(MODELS[:3]) as names:
        assert names[0] is None and [name.lora_path for name in names[1:]] == generator.loaded
        assert all(Path(path, "adapter_model.safetensors").is_file() for path in generator.loaded)
    assert "adapters go through files from now on ('NoneType' object has no attribute 'lora_manager')" in caplog.text
    generator._folders.close()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_workers_in_processes_of_their_own_merge_adapters_for_themselves(policies, monkeypatch):
    """Two devices share the layers; each worker opens the plan again."""
    pytest.importorskip("vllm", reason="vLLM is not installed in this environment")
    plan, settings = plan_adapters("sft", policies), EngineSettings.model_validate({"tensor_parallel_size": 2})
    spread = load_generator("vllm", "sft", GREEDY, PROMPTS, plan=plan, settings=settings)
    try:
        found = tokens_of(spread.generate(PROMPTS, GREEDY, MODELS))
        assert spread._folders is None
    finally:
        spread.close()
    hf = load_generator("hf", "sft", GREEDY, PROMPTS, plan=plan_merge("sft", policies))
    assert found == tokens_of(hf.generate(PROMPTS, GREEDY, MODELS))
    hf.close()


HOLD = """
import sys, time
from rewarded_lines.engines.adapter_folders import AdapterFolders
from rewarded_lines.merger.open_inputs import plan_adapters
from rewarded_lines.merger.spec import MergeSpec

folders = AdapterFolders(plan_adapters("sft", {"a": "one", "b": "two"}))
folders.write([MergeSpec((0.5, 0.5))])
print(folders.folder, flush=True)
time.sleep(60)
"""
SCRIPT = """
import sys
from rewarded_lines.config import GenerationSpec
from rewarded_lines.engine_settings import EngineSettings
from rewarded_lines.engines.load_engine import load_generator
from rewarded_lines.merger.open_inputs import plan_adapters
from rewarded_lines.merger.spec import MergeSpec

if __name__ == "__main__":
    spec = GenerationSpec(temperature=0, max_tokens=12)
    plan, settings = plan_adapters("sft", {"a": "one", "b": "two"}), EngineSettings(resident="disk")
    generator = load_generator("vllm", "sft", spec, ["the quick"], plan=plan, settings=settings)
    while True:
        generator.generate(["the quick"] * 50, spec, [MergeSpec((0.5, 0.5)), None])
        # After compilation: compilers sometimes swallow an interrupt.
        print(generator._folders.folder, flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("script", [HOLD, pytest.param(SCRIPT, marks=pytest.mark.slow)], ids=["held", "in vLLM"])
def test_a_run_that_is_cut_short_leaves_no_adapters(policies, tiny, script, number):
    """An interrupt leaves nothing behind; after a kill the next run cleans up."""
    if script == SCRIPT:
        pytest.importorskip("vllm", reason="vLLM is not installed in this environment")
    (tiny / "script.py").write_text(script)
    process = subprocess.Popen(
        [sys.executable, "script.py"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        preexec_fn=hear_interrupts,
    )
    folder = Path(process.stdout.readline().strip())
    assert folder.is_dir()
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    assert process.wait(60) != 0
    process.stdout.close()
    assert psutil.wait_procs(children, 10)[1] == []
    if number == signal.SIGKILL:
        AdapterFolders(plan_adapters("sft", policies)).close()
    assert not folder.exists()


def test_adapters_that_vllm_does_not_serve_are_refused(tiny):
    faults = {
        "saved whole": {"modules_to_save": ["norm"]},
        "adapters of embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
        "adapters of the head": {"target_modules": ["q_proj", "lm_head"]},
        "more than vLLM serves": {"r": 400},
    }
    for what, settings in faults.items():
        for seed, name in enumerate(("one", "two")):
            save_adapter(tiny / "sft", tiny / name, seed, **settings)
        plan = plan_adapters("sft", {"one": "one", "two": "two"})
        with pytest.raises(UserError, match=what) as caught:
            VllmAdapterGenerator(Workload("sft", GREEDY, PROMPTS, plan))
        assert "--engine hf" in str(caught.value)


def test_slots_hold_the_sum_of_the_ranks(policies, tiny):
    assert slot_rank(plan_adapters("sft", policies)) == 16
    assert slot_rank(plan_adapters("sft", {"two": "two"})) == 8
    save_adapter(tiny / "sft", tiny / "wide", 3, r=250)
    assert slot_rank(plan_adapters("sft", {**policies, "wide": "wide"})) == 320


def test_chunks_hold_as_many_adapters_as_there_are_slots(policies):
    generator, zero = object.__new__(RemoteGenerator), MergeSpec((0.0, 0.0))
    generator._plan, generator.at_once = plan_adapters("sft", policies), 2
    assert list(generator._chunks([None, LINE[0], zero, LINE[1], LINE[2]], 1)) == [
        [None, LINE[0], zero, LINE[1]],
        [LINE[2]],
    ]
    assert list(generator._chunks([None] * 3, 1)) == [[None] * 3] and list(generator._chunks([], 1)) == []


def test_adapters_go_to_the_disk_where_memory_is_short(policies, tiny, monkeypatch):
    monkeypatch.setattr(adapter_folders, "_MEMORY", tiny / "no such memory")
    monkeypatch.setattr("tempfile.tempdir", str(tiny))
    folders = AdapterFolders(plan_adapters("sft", policies))
    assert folders.folder.parent == tiny
    (first,) = folders.write(LINE[:1])
    (second,) = folders.write(LINE[1:2])
    assert first != second and {path.name for path in first.iterdir()} >= {"adapter_config.json"}
    folders.close()
    assert not folders.folder.exists()


@pytest.mark.parametrize(("requests", "adapters"), [(4, 64), (16, 16), (200, 1), (5000, 1)])
def test_adapters_are_mixed_only_until_the_engines_batch_is_full(monkeypatch, requests, adapters):
    monkeypatch.setattr("rewarded_lines.engines.vllm_adapters.vllm_device", lambda: "cpu")
    scheduler = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=256))
    generator = object.__new__(VllmAdapterGenerator)
    generator._llm = SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=scheduler))
    assert generator._worth_mixing(requests) == adapters
