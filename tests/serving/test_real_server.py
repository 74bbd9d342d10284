"""`serve` with vLLM itself: whole models whose weights change in place, and how a server ends."""

import json
import os
import signal
import subprocess
import threading
import urllib.error
import urllib.request

import psutil
import pytest
import torch
from command import COMMAND
from safetensors.torch import load_file, save_file
from tiny_models import PROMPTS

from rewarded_lines import merge, serve
from rewarded_lines.errors import UserError

pytest.importorskip("vllm", reason="vLLM is not installed in this environment", exc_type=ImportError)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
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


def texts(server, **more):
    body = {"temperature": 0, "max_tokens": 12, **more}
    answers = [ask(server, "/v1/completions", {"prompt": prompt, **body}) for prompt in PROMPTS]
    assert [status for status, _, _ in answers] == [200] * len(PROMPTS), answers
    return [answer["choices"][0]["text"] for _, _, answer in answers], {model for _, model, _ in answers}


def expected(folder):
    """Return what transformers writes with the model in a folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    found = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            made = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
        found.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    return found


def test_weights_change_in_place_and_each_answer_says_which(tiny):
    merge("sft", ["first", "second"], 0.3, beta=1.0, out="lines")
    merge("sft", ["first", "second"], 0.8, beta=0.0, out="soup")
    broken = load_file("second/model.safetensors")
    with serve(lam="0.3", row="lines", **SETTINGS) as server:
        key = server.admin_key
        assert texts(server.url) == (expected("lines"), {"lines@0.3"}) and server.default == "lines@0.3"
        assert ask(server.url, "/v1/completions", {"model": "sft", "prompt": "a"})[0] == 404
        assert ask(server.url, "/preference", {"model": "soup@0.8"}, "other")[0] == 401
        # A long answer runs while the weights change; it ends on the old ones.
        alone = ask(
            server.url, "/v1/completions", {"prompt": "a film", "max_tokens": 50, "temperature": 0, "ignore_eos": True}
        )
        found = []
        long = {"prompt": "a film", "max_tokens": 50, "temperature": 0, "ignore_eos": True}
        thread = threading.Thread(target=lambda: found.append(ask(server.url, "/v1/completions", long)))
        thread.start()
        status, _, answer = ask(
            server.url, "/preference", {"preference": {"first": 0.8, "second": 0.2}, "row": "soup"}, key
        )
        thread.join()
        assert (status, answer["model"]) == (200, "soup@0.8")
        (during,) = found
        assert during[1] in ("lines@0.3", "soup@0.8")
        if during[1] == "lines@0.3":
            assert during[2]["choices"][0]["text"] == alone[2]["choices"][0]["text"]
        assert texts(server.url) == (expected("soup"), {"soup@0.8"})
        # And back: no cached prefix of other weights is used.
        assert ask(server.url, "/preference", {"model": "lines@0.3"}, key)[0] == 200
        assert texts(server.url, model="default") == (expected("lines"), {"lines@0.3"})
        assert ask(server.url, "/preferences")[2]["current"] == {"first": 0.3, "second": 0.7}
        processes = psutil.Process(server.process.pid).children(recursive=True)
    assert not [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    # A merge that is not finite is found while it is loaded: the old one answers again.
    broken["model.layers.2.mlp.down_proj.weight"][3, 4] = float("nan")
    save_file(broken, "second/model.safetensors", {"format": "pt"})
    merge("sft", ["first"], 1.0, beta=0.0, out="alone")
    with pytest.raises(UserError, match="did not start"):
        serve(lam="0.5", row="soup", **SETTINGS)
    with serve(lam="1", row="soup", **SETTINGS) as server:
        before = texts(server.url)
        assert before == (expected("alone"), {"soup@1"})
        status, _, answer = ask(server.url, "/preference", {"model": "soup@0.5"}, server.admin_key)
        assert status == 409 and "soup@1 goes on answering" in answer["error"]["message"]
        assert texts(server.url) == before
        assert ask(server.url, "/preference", {"model": "lines@1"}, server.admin_key)[0] == 200
        assert texts(server.url)[1] == {"lines@1"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_of_a_server_that_ends(tiny, number):
    process = subprocess.Popen([*COMMAND, *WORDS], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        told = json.loads(process.stdout.readline())
        processes = psutil.Process(process.pid).children(recursive=True)
        assert processes and ask(told["url"], "/v1/completions", {"prompt": "a", "max_tokens": 2})[0] == 200
        process.send_signal(number)
        process.wait(60)
        _, left = psutil.wait_procs(processes, 20)
        assert [one.name() for one in left] == []
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_a_server_ends_with_the_python_that_started_it(tiny):
    code = f"from rewarded_lines import serve; s = serve(**{SETTINGS!r}); print(s.process.pid, flush=True); input()"
    process = subprocess.Popen(
        [COMMAND[0], "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    server = psutil.Process(int(process.stdout.readline()))
    processes = [server, *server.children(recursive=True)]
    process.kill()
    process.wait()
    _, left = psutil.wait_procs(processes, 30)
    assert [one.name() for one in left] == []
