"""What the plugin does in a server and its workers, without vLLM: names, adapters, refusals."""

import asyncio
import json
import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from plugin_server import save_policies
from safetensors.torch import load_file
from tiny_adapters import save_adapter

from rewarded_lines import merge
from rewarded_lines.engines import resident_adapters
from rewarded_lines.errors import UserError
from rewarded_lines.merger import open_inputs
from rewarded_lines.merger.open_inputs import plan_adapters
from rewarded_lines.serving import served_policies, vllm_hooks
from rewarded_lines.serving.menus import menu_of_adapters
from rewarded_lines.serving.merged_adapters import is_merged, merged_adapter
from rewarded_lines.serving.preference_names import PreferenceError
from rewarded_lines.serving.served_policies import PreferenceRequests, ServedPolicies, serve_policies

POLICIES = {"one": "one", "two": "two"}


@dataclass
class Request:
    lora_name: str
    lora_int_id: int
    lora_path: str


@pytest.fixture
def policies(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm.lora.request", SimpleNamespace(LoRARequest=Request))
    monkeypatch.setattr(served_policies, "_opened", [])
    save_policies(tiny)
    return tiny


def served(rank=16, dtype=torch.float32, policies=POLICIES):
    return ServedPolicies(menu_of_adapters("sft", policies), rank, dtype)


def test_a_model_has_one_number_in_every_process_and_nothing_grows(policies):
    first, second = served(), served()
    request = first.request("lines@0.3")
    assert request == second.request("lines@one=0.3,two=0.7") and request.lora_name == "lines@0.3"
    names = [f"soup@{k / 100}" for k in range(101)]
    numbers = {first.request(name).lora_int_id for name in names}
    # vLLM's own adapters have small numbers; its arrays have 64 bits.
    assert len(numbers) == 101 and min(numbers) >= 1 << 62 and max(numbers) < 1 << 63
    assert len(first._plan._outputs) <= 64
    with ThreadPoolExecutor(16) as pool:
        again = list(pool.map(second.request, names[::-1] * 3))
    assert again == [first.request(name) for name in names[::-1]] * 3
    assert first.request("task-arithmetic@0,0") is None and asyncio.run(first.ready("lines@0.50")) == "lines@0.5"
    requests = PreferenceRequests({"own": 1}, first)
    assert "own" in requests and "lines@0.3" in requests and "lines@3" not in requests and 3 not in requests
    assert requests["lines@0.3"] == request and list(requests) == ["own"]


def test_what_no_slot_holds_is_refused(policies):
    with pytest.raises(PreferenceError) as caught:
        served(rank=8).request("lines@0.5")
    assert "--max-lora-rank 16" in str(caught.value) and caught.value.status == 400
    assert served(rank=8).request("one").lora_name == "soup@1"
    small = served(dtype=torch.float16)
    small._largest = dict.fromkeys(small._largest, 3e4)
    with pytest.raises(PreferenceError, match="too large"):
        small.request("lines@0.5;beta=9")
    save_adapter(policies / "sft", policies / "one", 1, target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(UserError, match="serves no adapters of embeddings"):
        served()


@pytest.mark.parametrize("names", [("one", "two"), ("two", "one")])
def test_a_worker_makes_the_adapter_that_merge_writes(policies, monkeypatch, names):
    found, opened = [], []
    monkeypatch.setattr(
        resident_adapters, "as_vllm_adapter", lambda loader, number, tensors: found.append(dict(tensors))
    )
    monkeypatch.setattr(open_inputs, "plan_adapters", lambda **source: opened.append(1) or plan_adapters(**source))
    loader, server = SimpleNamespace(), served(policies={name: name for name in names})
    for name in ("lines@0.3", "soup@0.75;beta=0.5"):
        request = server.request(name)
        assert is_merged(request) and not is_merged(Request("own", 1, "/a/path"))
        merged_adapter(loader, request)
    assert len(opened) == 1
    monkeypatch.undo()
    for tensors, lam, beta in zip(found, (0.3, 0.75), (1.0, 0.5), strict=True):
        merge(policies / "sft", {name: policies / name for name in names}, lam, beta=beta, out=policies / f"m{lam}")
        written = load_file(policies / f"m{lam}" / "adapter_model.safetensors")
        assert written.keys() == tensors.keys() and all(torch.equal(written[key], tensors[key]) for key in written)


class Engine:
    """Stands for vLLM's engine; remembers what it loads."""

    def __init__(self, rank=16, fault=None):
        config = SimpleNamespace(max_lora_rank=rank, lora_dtype=torch.float32, default_mm_loras={"audio": "heard"})
        self.vllm_config, self.fault, self.loaded = SimpleNamespace(lora_config=config), fault, []

    async def add_lora(self, request):
        if self.fault:
            raise RuntimeError(self.fault)
        self.loaded.append(request.lora_name)

    async def remove_lora(self, number):
        assert number


def models_of(engine, *names, base="sft"):
    modules = [SimpleNamespace(name=name, path=name) for name in names]
    config = SimpleNamespace(model=base)
    return SimpleNamespace(engine_client=engine, static_lora_modules=modules, lora_requests={}, model_config=config)


def test_a_server_with_adapters_tries_all_of_them_and_then_serves(policies):
    models = models_of(Engine(), "one", "two", "audio")
    asyncio.run(serve_policies(models))
    assert models.engine_client.loaded == ["soup@0.5", "soup@1", "soup@0"]
    assert models.served.menu.canonical("lines@0.3") in models.lora_requests
    counts = SimpleNamespace(
        waiting_lora_adapters={"lines@0.3": 2}, running_lora_adapters={"own": 1, "soup@1": 3, "soup@0": 1}
    )
    vllm_hooks._count_together(lambda *_: None, None, counts)
    assert (counts.waiting_lora_adapters, counts.running_lora_adapters) == (
        {"preferences": 2},
        {"own": 1, "preferences": 4},
    )


@pytest.mark.parametrize(
    ("engine", "said"),
    [(Engine(rank=1), "--max-lora-rank 16"), (Engine(fault="no such layer"), "no such layer"), (None, "another base")],
)
def test_only_a_project_must_be_served(policies, monkeypatch, caplog, engine, said):
    # vLLM, once imported, keeps its own loggers from pytest.
    monkeypatch.setattr(served_policies, "_log", logging.getLogger("served"))
    monkeypatch.setenv("REWARDED_LINES_PROJECT", "adapters.yaml")
    models = models_of(engine or Engine(), "one", "two", base="sft" if engine else "elsewhere")
    with pytest.raises(UserError, match=said):
        asyncio.run(serve_policies(models))
    if engine:
        monkeypatch.delenv("REWARDED_LINES_PROJECT")
        asyncio.run(serve_policies(models))
        assert not hasattr(models, "served") and said in caplog.text


def test_a_wrong_name_is_answered_in_place_of_vllm(policies):
    models = models_of(Engine(), "one", "two")
    asyncio.run(serve_policies(models))
    serving = SimpleNamespace(
        models=models,
        _is_model_supported=lambda name: name == "sft",
        create_error_response=lambda text, kind, status, param: (text, kind, int(status), param),
    )

    async def own(serving, request):
        return "vllm"

    def check(name):
        return asyncio.run(vllm_hooks._check_model(own, serving, SimpleNamespace(model=name)))

    assert check("sft") == check("lines@0.5") == "vllm"
    assert check("lines@2")[1:] == ("BadRequestError", 400, "model") and "outside 0 to 1" in check("lines@2")[0]
    assert check("gpt-4")[2] == 404 and "lines@one=0.5,two=0.5" in check("gpt-4")[0]


SCRIPT = """
import json, os, sys
from rewarded_lines.serving.vllm_plugin import register
found = []
for sys.argv in json.loads(sys.argv[1]):
    os.environ.pop("REWARDED_LINES_ADAPTERS", None)
    before = {"torch", "numpy", "vllm", "pydantic"} - set(sys.modules)
    try:
        register()
        found.append(sorted(before & set(sys.modules)))
    except ModuleNotFoundError as error:
        found.append(str(error))
print(json.dumps(found))
"""


def test_the_plugin_does_nothing_for_other_servers(tmp_path):
    # Stands for vLLM, and has nothing in it.
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("")
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r})" + SCRIPT
    others, ours = [["vllm", "serve"], ["--enable-lora"]], [["--lora-modules=a=b"], ["--lora_modules"]]
    command = [sys.executable, "-c", script, json.dumps(others + ours)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [[]] * 2 + ["No module named 'vllm.lora'"] * 2


def test_methods_are_wrapped_once_and_other_adapters_go_to_vllm():
    def twice(own, loader, request):
        return own(loader, request) * 2

    kind = type("Loader", (), {"load": lambda self, request: request})
    for _ in range(2):
        vllm_hooks._wrap(kind, "load", twice)
    assert kind().load("a") == "aa"
    assert vllm_hooks._load_adapter(lambda loader, request: "vllm", None, Request("own", 1, "/a/path")) == "vllm"
