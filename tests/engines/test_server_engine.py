"""A server as an engine: the faults of a stand-in, and a real vLLM server that answers as hf does."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tiny_adapters import save_adapter
from tiny_models import PROMPTS

from rewarded_lines.config import GenerationSpec
from rewarded_lines.engines import http_answers
from rewarded_lines.engines.base import prompt_seed
from rewarded_lines.engines.load_engine import load_generator
from rewarded_lines.errors import UserError
from rewarded_lines.merger.open_inputs import plan_adapters, plan_merge
from rewarded_lines.merger.spec import MergeSpec

GREEDY = GenerationSpec(temperature=0, max_tokens=12)
SAMPLED = GenerationSpec(temperature=1.0, top_p=0.9, max_tokens=12, seed=3, n=2, stop=("nothing of the kind",))
SPECS = [MergeSpec((0.3, 0.7)), MergeSpec((0.9, 0.1))]
LAYERS = ["q_proj", "v_proj"]


class StandIn(ThreadingHTTPServer):
    """Records requests and sends given answers; the only token of a response is the number of the model."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked, self.keys, self.loaded, self.unloaded = [], set(), [], []
        self.answers, self.failures, self.lock = {}, {}, threading.Lock()
        self.card = {"id": "the base", "max_model_len": 64, "parent": None}
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def answer(self, path, content):
        if path == "/v1/models":
            adapters = [{"id": name, "parent": "the base"} for name, _ in self.loaded]
            return 200, {"object": "list", "data": [*adapters, self.card]}
        if path == "/v1/load_lora_adapter":
            assert os.path.isfile(os.path.join(content["lora_path"], "adapter_model.safetensors"))
            self.loaded.append((content["lora_name"], content["lora_path"]))
            return 200, "Success"
        if path == "/v1/unload_lora_adapter":
            self.unloaded.append(content["lora_name"])
            return 200, "Success"
        number = 1 + [name for name, _ in [("the base", ""), *self.loaded]].index(content["model"])
        scores = [None, *({str(token): {"logprob": -token}} for token in content["prompt"][1:])]
        choice = {"token_ids": [number], "logprobs": {"token_logprobs": [-number]}, "finish_reason": "length"}
        return 200, {"choices": [{**choice, "prompt_logprobs": scores}]}


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self.respond(None)

    def do_POST(self):
        self.respond(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def respond(self, content):
        with self.server.lock:
            self.server.asked.append((self.path, content))
            self.server.keys.add(self.headers.get("Authorization"))
            if self.server.failures.get(self.path, 0) > 0:
                self.server.failures[self.path] -= 1
                self.close_connection = True
                return
            fixed = self.server.answers.get(self.path)
            status, said = fixed or self.server.answer(self.path, content)
        body = said.encode() if isinstance(said, str) else json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def stand_in(monkeypatch):
    for name in ("REWARDED_LINES_API_KEY", "OPENAI_API_KEY", "REWARDED_LINES_ADAPTER_FOLDER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(http_answers, "_FIRST_WAIT", 0)
    server_ = StandIn()
    thread = threading.Thread(target=server_.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server_
    server_.shutdown()
    thread.join()
    server_.server_close()


@pytest.fixture
def plan(tiny):
    for seed, name in enumerate(("one", "two"), start=1):
        save_adapter(tiny / "sft", tiny / name, seed)
    return plan_adapters("sft", {"one": "one", "two": "two"})


def connect(url, plan=None, spec=GREEDY, **options):
    return load_generator(url, "sft", spec, PROMPTS, plan=plan, **options)


def test_models_are_answered_by_their_adapters_and_those_leave_again(stand_in, plan, tiny, monkeypatch):
    monkeypatch.setenv("REWARDED_LINES_ADAPTER_FOLDER", str(tiny / "shared"))
    generator = connect(stand_in.url + "/v1/", plan)
    tried = len(stand_in.loaded)
    assert tried == 1 + len(LAYERS)
    stand_in.asked.clear()
    answers = generator.generate(PROMPTS, SAMPLED, [SPECS[0], None, SPECS[1], MergeSpec((0.0, 0.0))])
    numbers = [{response.tokens for response in responses} for responses in answers]
    assert numbers == [{(tried + 2,)}, {(1,)}, {(tried + 3,)}, {(1,)}]
    assert [len(responses) for responses in answers] == [2 * len(PROMPTS)] * 4
    asked = [content for path, content in stand_in.asked if path == "/v1/completions"]
    seeds = [prompt_seed(SAMPLED, index, k) for index in range(len(PROMPTS)) for k in range(2)]
    for model in {one["model"] for one in asked}:
        assert sorted(one["seed"] for one in asked if one["model"] == model) == sorted(seeds)
    assert {one["temperature"] for one in asked} == {1.0} and {one["repetition_penalty"] for one in asked} == {1.0}
    assert asked[0]["stop"] == list(SAMPLED.stop)
    # The base's requests go first, apart from the adapters'.
    assert [one["model"] for one in asked[: len(seeds)]] == ["the base"] * len(seeds)
    assert generator.logprobs([([5, 6], [7, 8]), ([5], [])], SPECS[0]) == [-15.0, 0.0]
    assert sorted(stand_in.unloaded) == sorted(name for name, _ in stand_in.loaded)
    assert all(path.startswith(str(tiny / "shared")) and not os.path.exists(path) for _, path in stand_in.loaded)
    assert generator.swap_seconds > 0
    generator.close()
    assert not (tiny / "shared").exists()


def test_a_key_is_sent_and_not_shown(stand_in, tiny, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "other")
    monkeypatch.setenv("REWARDED_LINES_API_KEY", "secret")
    connect(stand_in.url).close()
    assert stand_in.keys == {"Bearer secret"}
    stand_in.answers["/v1/models"] = (401, {"error": "Unauthorized"})
    with pytest.raises(UserError, match="status 401: Unauthorized") as caught:
        connect(stand_in.url)
    assert "set REWARDED_LINES_API_KEY" in str(caught.value) and "secret" not in str(caught.value)


def test_connections_that_break_and_busy_servers_get_time(stand_in, tiny):
    stand_in.failures = {"/v1/models": 2, "/v1/completions": 3}
    generator = connect(stand_in.url)
    assert len(generator.generate(PROMPTS, GREEDY)[0]) == len(PROMPTS)
    stand_in.answers["/v1/completions"] = (503, "busy")
    with pytest.raises(UserError, match="status 503: busy"):
        generator.generate(PROMPTS[:1], GREEDY)
    generator.close()


def test_nobody_there_is_a_fault(tiny, monkeypatch):
    monkeypatch.setattr(http_answers, "_FIRST_WAIT", 0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(UserError, match="the server cannot be reached"):
            connect(url)
    with pytest.raises(UserError, match="not the URL of a server"):
        connect("http://127.0.0.1:port")


@pytest.mark.parametrize("said", [(200, "<html>"), (200, {"data": []}), (200, ["x"]), (404, "no such page")])
def test_something_else_there_is_a_fault(stand_in, tiny, said):
    stand_in.answers["/v1/models"] = said
    with pytest.raises(UserError, match="does not answer as vLLM's does|the server refuses a request"):
        connect(stand_in.url)


def test_a_server_that_says_no_tokens_is_a_fault(stand_in, tiny):
    generator = connect(stand_in.url)
    for choice in ({"text": "dog", "finish_reason": "stop"}, "dog"):
        stand_in.answers["/v1/completions"] = (200, {"choices": [choice]})
        with pytest.raises(UserError, match="does not answer as vLLM's does"):
            generator.generate(PROMPTS, GREEDY)
        with pytest.raises(UserError, match="does not answer as vLLM's does"):
            generator.logprobs([([1], [2])])
    generator.close()


def test_short_sequences_are_a_fault(stand_in, tiny):
    stand_in.card["max_model_len"] = 20
    with pytest.raises(UserError, match="shorter sequences") as caught:
        connect(stand_in.url)
    assert "20 (its max_model_len)" in str(caught.value)
    stand_in.card["max_model_len"] = 64
    with pytest.raises(UserError, match="at least 91 tokens"):
        connect(stand_in.url, longest=90)


def test_whole_models_are_a_fault(stand_in, tiny):
    with pytest.raises(UserError, match="not the weights of whole models"):
        connect(stand_in.url, plan_merge("sft", {"first": "first"}))
    assert stand_in.asked == []


@pytest.mark.parametrize("said", [(404, {"detail": "Not Found"}), (500, {"error": {"message": "LoRA is not enabled"}})])
def test_a_server_that_takes_no_adapters_is_a_fault(stand_in, plan, said):
    stand_in.answers["/v1/load_lora_adapter"] = said
    with pytest.raises(UserError, match="does not take merged adapters") as caught:
        connect(stand_in.url, plan)
    command = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora --max-lora-rank 8 --lora-target-modules q_proj"
    assert command in str(caught.value) and "REWARDED_LINES_ADAPTER_FOLDER" in str(caught.value)
    assert ("Not Found" in str(caught.value)) == (said[0] == 404)


def test_a_server_that_leaves_layers_out_in_silence_is_a_fault(stand_in, plan):
    choice = {"token_ids": [5], "logprobs": {"token_logprobs": [-1.0]}, "finish_reason": "length"}
    stand_in.answers["/v1/completions"] = (200, {"choices": [choice]})
    with pytest.raises(UserError, match="leaves out the layers q_proj"):
        connect(stand_in.url, plan)
    assert stand_in.loaded and sorted(stand_in.unloaded) == sorted(name for name, _ in stand_in.loaded)


def test_adapters_are_unloaded_also_after_an_interrupt(stand_in, plan, monkeypatch):
    generator = connect(stand_in.url, plan)
    monkeypatch.setattr(generator, "_answer", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        generator.generate(PROMPTS, GREEDY, SPECS)
    assert sorted(stand_in.unloaded) == sorted(name for name, _ in stand_in.loaded)
    assert not list(generator._folders.folder.iterdir())
    generator.close()


@pytest.fixture
def real(tiny, plan):
    pytest.importorskip("vllm", reason="vLLM is not installed in this environment")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", "sft", "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--max-model-len", "64"]
    command += ["--enable-lora", "--max-lora-rank", "8", "--max-loras", "2", "--lora-target-modules", *LAYERS]
    with open(tiny / "server.log", "wb") as log:
        process = subprocess.Popen(command, env=os.environ | settings, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(process, f"http://127.0.0.1:{port}", tiny / "server.log")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(process, url, log):
    while process.poll() is None:
        try:
            if urllib.request.urlopen(f"{url}/health").status == 200:
                return
        except OSError:
            pass
        time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_real_server_equals_the_reference(real, plan):
    """More adapters than slots, stop texts, scores, and layers that are not among the server's targets."""
    hf = load_generator("hf", "sft", GREEDY, PROMPTS, plan=plan_merge("sft", plan.references))
    generator = connect(real, plan)
    models = [None, *(MergeSpec((k / 9, 1 - k / 9)) for k in range(10)), MergeSpec((0.0, 0.0))]
    stop = (hf.generate(PROMPTS[:1], GREEDY)[0][0].text[3:5],)
    for spec in (GREEDY, GREEDY.model_copy(update={"stop": stop})):
        for ours, theirs in zip(
            generator.generate(PROMPTS, spec, models), hf.generate(PROMPTS, spec, models), strict=True
        ):
            assert [(one.tokens, one.text, one.ended) for one in ours] == [(o.tokens, o.text, o.ended) for o in theirs]
            assert [one.logprob for one in ours] == pytest.approx([one.logprob for one in theirs], abs=1e-3)
    pairs = [(ids, one.tokens) for ids, one in zip(hf.encode(PROMPTS), ours, strict=True)]
    for model in (None, models[3]):
        assert generator.logprobs(pairs, model) == pytest.approx(hf.logprobs(pairs, model), abs=1e-3)
    several = generator.generate(PROMPTS, SAMPLED, models[:3])
    assert several == [generator.generate(PROMPTS, SAMPLED, [model])[0] for model in models[:3]]
    assert len({response.tokens for response in several[0]}) > len(PROMPTS)
    served = json.load(urllib.request.urlopen(f"{real}/v1/models"))["data"]
    assert [card["id"] for card in served] == ["sft"]
    generator.close()
    hf.close()
    for seed, adapter in enumerate(plan.adapters):
        save_adapter(plan.base.folder, adapter.folder, seed, target_modules=["q_proj", "up_proj"])
    with pytest.raises(UserError, match="leaves out the layers up_proj"):
        connect(real, plan_adapters("sft", plan.references))
