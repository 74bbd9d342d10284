"""Real servers of vLLM with the plugin: every answer is that of the merge that its request names."""

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from plugin_server import plugin_server, save_policies
from tiny_models import PROMPTS, snapshot

from rewarded_lines.config import GenerationSpec
from rewarded_lines.engines.load_engine import load_generator
from rewarded_lines.merger.open_inputs import plan_merge
from rewarded_lines.merger.spec import MergeSpec

pytest.importorskip("vllm", reason="vLLM is not installed in this environment")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
GREEDY = GenerationSpec(temperature=0, max_tokens=12)
# The last one fills blocks of vLLM's prefix cache.
ASKED = [*PROMPTS, " ".join([*PROMPTS, *PROMPTS[:3]])]
OPTIONS = ("--max-lora-rank", "16", "--block-size", "32")
MODELS = {
    "sft": None,
    "task-arithmetic@0,0": None,
    "soup@0.5": MergeSpec((0.5, 0.5), 1.0, 0.0),
    "lines@two=0.7,one=0.3": MergeSpec((0.3, 0.7)),
    "lines@0.25;alpha=1;beta=0.5": MergeSpec((0.25, 0.75), 1.0, 0.5),
    # Ends repeat a policy, with patterns of its own that vLLM does not read.
    "one": MergeSpec((1.0, 0.0), 1.0, 0.0),
    "two": MergeSpec((0.0, 1.0), 1.0, 0.0),
    "lines@1": MergeSpec((1.0, 0.0)),
}
LINE = {f"lines@{k / 100}": MergeSpec((k / 100, round(1 - k / 100, 12))) for k in range(101)}


@pytest.fixture
def reference(tiny):
    """Return by model and prompt the tokens of the offline merges, with transformers."""
    hf = load_generator("hf", "sft", GREEDY, ASKED, plan=plan_merge("sft", save_policies(tiny)))
    models = {**MODELS, **LINE}
    answers = hf.generate(ASKED, GREEDY, list(models.values()))
    hf.close()
    pairs = [(name, prompt) for name in models for prompt in ASKED]
    return dict(zip(pairs, (tuple(one.tokens) for row in answers for one in row), strict=True))


def together(server, asked, threads=64):
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda pair: server.tokens(*pair), asked))


def test_a_burst_over_a_project_gets_every_merge_and_memory_stays(tiny, reference):
    project = {"REWARDED_LINES_PROJECT": "adapters.yaml"}
    with plugin_server(tiny, *OPTIONS, "--max-loras", "8", **project) as server:
        mixed = [(name, prompt) for prompt in ASKED for name in MODELS]
        assert together(server, mixed) == [reference[pair] for pair in mixed]
        line = list(LINE)
        burst = [(line[k * 37 % 101], ASKED[k % 6]) if k % 9 else ("sft", ASKED[k % 6]) for k in range(500)]
        assert together(server, burst, 500) == [reference[pair] for pair in burst]
        assert len({reference[pair] for pair in burst}) > 100
        _check_memory(server)
        assert server.ask("lines@1.5", "dog")["status"] == 400
        # Runtime loading of adapters by path stays closed.
        assert server.ask("one", "dog", lora_path="/etc")["model"] == "soup@1"


def _check_memory(server):
    """Check memory before and after 2,000 preferences and 500 wrong names."""
    names = [f"soup@{k % 101 / 100};alpha={k / 1000}" for k in range(2200)]

    def ask(name):
        return server.ask(name, "the quick", max_tokens=1)

    with ThreadPoolExecutor(16) as pool:
        assert all("choices" in answer for answer in pool.map(ask, names[:200]))
        before = server.memory()
        assert all("choices" in answer for answer in pool.map(ask, names[200:]))
        assert all(answer["status"] == 404 for answer in pool.map(ask, [f"wrong{k}@1" for k in range(500)]))
    assert server.memory() - before < 32 << 20


def test_killed_while_it_loads_the_next_server_starts_clean_and_two_share_a_folder(tiny, reference):
    files = snapshot(tiny / "one") | snapshot(tiny / "two") | snapshot(tiny / "sft")
    left = set(Path("/dev/shm").iterdir())
    plain = (*OPTIONS, "--max-loras", "2", "--lora-modules", "one=one", "two=two")
    with plugin_server(tiny, *plain) as first:
        asking = [threading.Thread(target=_ask_in_vain, args=(first, name)) for name in list(LINE)[:40]]
        for thread in asking:
            thread.start()
        os.killpg(first.process.pid, signal.SIGKILL)
        for thread in asking:
            thread.join()
    with plugin_server(tiny, *plain) as second, plugin_server(tiny, *plain) as third:
        pairs = [(name, prompt) for name in [*list(MODELS)[:5], "lines@1"] for prompt in ASKED[:3]]
        for server in (second, third):
            assert together(server, pairs) == [reference[pair] for pair in pairs]
    assert snapshot(tiny / "one") | snapshot(tiny / "two") | snapshot(tiny / "sft") == files
    assert not [path for path in set(Path("/dev/shm").iterdir()) - left if "rewarded" in path.name]


def _ask_in_vain(server, name):
    try:
        server.ask(name, "dog")
    except OSError:
        pass
