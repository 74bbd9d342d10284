"""`serve` with vLLM itself: whole models whose weights change in place, and how a server ends."""

import json
import os
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import psutil
import pytest
import torch
from command import COMMAND
from tiny_models import PROMPTS

from rewarded_lines import merge

pytest.importorskip("vllm", reason="vLLM is not installed in this environment", exc_type=ImportError)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
SETTINGS = {"engine_args": {"max_model_len": 64}, "port": 0}
WORDS = ("serve", "--port", "0", "--json", "--engine-arg", "max_model_len=64")


def ask(server, path, body=None, key=""):
    """Return status, the model of the answer, and the answer."""
    headers = {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})}
    request = urllib.request.Request(server + path, json.dumps(body).encode() if body else None, headers)
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, answer.headers["x-rewarded-lines-model"], json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, None, json.loads(error.read())


def tokens(server, **more):
    """Return what the server writes, as tokens: it holds back half a letter at the end of a text."""
    body = {"temperature": 0, "max_tokens": 12, "return_token_ids": True, **more}
    answers = [ask(server, "/v1/completions", {"prompt": prompt, **body}) for prompt in PROMPTS]
    assert [status for status, _, _ in answers] == [200] * len(PROMPTS), answers
    return [answer["choices"][0]["token_ids"] for _, _, answer in answers], {model for _, model, _ in answers}


def expected(folder):
    """Return what transformers writes with the model in a folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    found = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            made = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
        found.append(made[0, ids.shape[1] :].tolist())
    return found


@contextmanager
def started(*words):
    """Start the command line; yield its process, which is not ready yet."""
    process = subprocess.Popen([*COMMAND, *WORDS, *words], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def left_after(processes):
    """Return the names of the processes that do not end soon."""
    _, left = psutil.wait_procs(processes, 60)
    return [one.name() for one in left]


def test_weights_change_in_place_and_each_answer_says_which(tiny):
    """One server for all of it: its start takes most of the time."""
    merge("sft", ["first", "second"], 0.3, beta=1.0, out="lines")
    merge("sft", ["first", "second"], 0.8, beta=0.0, out="soup")
    with started("--lam", "0.3", "--row", "lines", "--admin-key", "root") as process:
        told = json.loads(process.stdout.readline())
        url, first, second = told["url"], "lines@0.3", "soup@0.8"
        assert told["default"] == first and tokens(url) == (expected("lines"), {first})
        assert ask(url, "/v1/completions", {"model": "sft", "prompt": "a"})[0] == 404
        assert ask(url, "/preference", {"model": second}, "other")[0] == 401
        # A long answer runs while the weights change; it ends on those that it began with.
        long, found = {"prompt": "a film", "max_tokens": 50, "temperature": 0, "ignore_eos": True}, []
        alone = ask(url, "/v1/completions", long)
        thread = threading.Thread(target=lambda: found.append(ask(url, "/v1/completions", long)))
        thread.start()
        wish = {"preference": {"first": 0.8, "second": 0.2}, "row": "soup"}
        status, _, answer = ask(url, "/preference", wish, "root")
        thread.join()
        assert (status, answer["model"]) == (200, second)
        after = ask(url, "/v1/completions", long)
        wanted = {first: alone, second: after}[found[0][1]]
        assert found[0][2]["choices"][0]["text"] == wanted[2]["choices"][0]["text"]
        assert tokens(url) == (expected("soup"), {second})
        # And back: no cached prefix of other weights is used.
        assert ask(url, "/preference", {"model": first}, "root")[0] == 200
        assert tokens(url, model="default") == (expected("lines"), {first})
        processes = psutil.Process(process.pid).children(recursive=True)
        assert len(processes) >= 2
        process.terminate()
        assert process.wait(60) == 0 and left_after(processes) == []


def test_a_server_that_still_starts_can_be_interrupted(tiny):
    with started() as process:
        me = psutil.Process(process.pid)
        # The server, its engine, and helpers of multiprocessing.
        while len(processes := me.children(recursive=True)) < 3:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        process.wait(60)
        assert left_after(processes) == []


def test_a_server_ends_with_the_python_that_started_it(tiny):
    code = f"from rewarded_lines import serve; s = serve(**{SETTINGS!r}); print(s.url, s.default, flush=True); input()"
    process = subprocess.Popen(
        [COMMAND[0], "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    url, default = next(line for line in process.stdout if line.startswith("http")).split()
    assert default == "lines@0.5" and ask(url, "/v1/completions", {"prompt": "a", "max_tokens": 2})[1] == default
    processes = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert len(processes) >= 3 and left_after(processes) == []
