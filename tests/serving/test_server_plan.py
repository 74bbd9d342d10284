"""What `serve` decides before vLLM starts, through the command line; vLLM itself is not started."""

import json
import os
import socket
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
from invented_runs import synthetic_run
from tiny_adapters import save_adapter

from rewarded_lines import choose
from rewarded_lines.checkpoints.hashing import model_hash, policy_hash
from rewarded_lines.errors import UserError
from rewarded_lines.evaluator.points import PointSpec
from rewarded_lines.evaluator.records import load_run
from rewarded_lines.merger.spec import MergeSpec
from rewarded_lines.serving import server_checks, start_server
from rewarded_lines.serving.menu_rows import Row
from rewarded_lines.serving.menus import menu_of_adapters
from rewarded_lines.serving.preference_names import Menu
from rewarded_lines.serving.run_points import default_point, measured_points
from rewarded_lines.serving.serve_options import ServeOptions
from rewarded_lines.serving.served_settings import settings_given

pytest.importorskip("vllm", reason="vLLM is not installed in this environment", exc_type=ImportError)
POLICIES = {"cheerful": "first", "detailed": "second"}


@pytest.fixture
def project(tiny):
    """A project with whole policies, and the run of its sweep."""
    text = (tiny / "rewarded-lines.yaml").read_text()
    for name, folder in POLICIES.items():
        text = text.replace(f"{folder}: {folder}", f"{name}: {folder}")
    (tiny / "rewarded-lines.yaml").write_text(text)
    run = synthetic_run(tiny / "sweep", prompts=8, points=3, resamples=100)
    header = json.loads((run / "run.json").read_text())
    header |= {"project": "../rewarded-lines.yaml", "base": {"path": "../sft", "hash": model_hash(tiny / "sft")}}
    folders = {name: tiny / folder for name, folder in POLICIES.items()}
    header["policies"] = {name: {"path": str(one), "hash": policy_hash(one)} for name, one in folders.items()}
    (run / "run.json").write_text(json.dumps(header))
    return tiny


@pytest.fixture
def start(cli, monkeypatch):
    """Return the answer of `serve`, its command with the options by name, and the settings of the server."""

    def run(*words):
        found = {}
        monkeypatch.setattr("os.execve", lambda path, command, given: found.update(command=command[4:], given=given))
        answer = cli("serve", "--port", 0, *words)
        if not found:
            return answer, [], None
        for name, value in found["given"].items():
            monkeypatch.setenv(name, value)
        return answer, found["command"], settings_given()

    return run


def option(command, flag):
    return command[command.index(flag) + 1]


def test_whole_policies_are_one_merge(project, start):
    choose("sweep", at_least={"positive": 0.5})
    answer, command, settings = start("sweep", "--api-key", "sesame")
    assert answer.code == 0 and option(command, "--model") == str(project / "sft")
    assert option(command, "--host") == "127.0.0.1" and option(command, "--served-model-name") == "default"
    assert option(command, "--worker-extension-cls").endswith("MergingWorker") and "--enable-lora" not in command
    assert option(command, "--dtype") == "float32" and "sesame" not in command
    assert settings.whole["level"] == "disk" and settings.whole["plan"]["policies"].keys() == POLICIES.keys()
    assert settings.points["chosen"] == settings.points["default"] and settings.chat is False
    assert [one["name"] for one in settings.rewards] == ["positive", "detailed"]
    rows = {point["row"] for point in settings.measured}
    # The base is shown, too.
    assert rows == {"soup", "lines", None} and len(settings.measured) == 7
    assert [point["name"] for point in settings.measured].count("chosen") == 1
    middle = next(point for point in settings.measured if point["model"] == "lines@0.5")
    assert middle["weights"] == {"cheerful": 0.5, "detailed": 0.5} and middle["means"].keys() == {
        "positive",
        "detailed",
    }
    assert any(point["on_front"] for point in settings.measured) and settings.admin
    assert "admin key" in settings.ready and settings.admin not in settings.ready


@pytest.mark.parametrize(
    ("words", "place"),
    [
        (("--lam", "0.25", "--row", "soup"), ("soup", [0.25, 0.75])),
        (("--lam", "detailed=1"), ("lines", [0.0, 1.0])),
        ((), ("lines", [0.5, 0.5])),
        (("sweep", "--at-least", "detailed=0", "--maximize", "positive"), ("lines", [1.0, 0.0])),
    ],
)
def test_the_default(project, start, words, place):
    answer, _, settings = start(*words)
    point = settings.points["default"]
    assert (point["method"], point["weights"]) == place, answer.err
    assert f"default: {place[0]}@{place[1][0]:g}" in settings.ready


def in_use(project):
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    return taken


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--config", "none.yaml"), "no such file"),
        (("--at-least", "detailed=1"), "a minimum needs a run"),
        (("sweep", "--at-least", "detailed=1e9"), "no evaluated policy meets every minimum"),
        (("--lam", "1.5"), "a weight lies outside 0 to 1"),
        (("--row", "soup"), "a row without λ"),
        (("--step", "0.3"), "not a step"),
        (("--max-body", "much"), "--max-body: not a size"),
        (("--engine-arg", "max_num_seq=4"), "did you mean `max_num_seqs`?"),
        (("--engine-arg", "host=0.0.0.0"), "write --host"),
        (("--engine-arg", "enable_lora=true"), "the policies' adapters decide it"),
        (("--host", "192.0.2.1"), "cannot listen there"),
    ],
)
def test_what_cannot_work_is_refused_before_vllm_starts(project, start, words, said):
    answer, command, _ = start(*words)
    assert answer.code == 1 and command == [] and said in answer.err and "Traceback" not in answer.err


def test_port_memory_and_weights_are_checked(project, start, cli, monkeypatch):
    with in_use(project) as taken:
        answer = cli("serve", "--port", taken.getsockname()[1])
        assert answer.code == 1 and "cannot listen there" in answer.err and "--port 0" in answer.err
    with monkeypatch.context() as patch:
        patch.setattr(server_checks, "available_memory", lambda device: 1 << 30)
        answer, command, _ = start()
        assert command == [] and "not enough memory for the server" in answer.err and "got: 1.0 GiB" in answer.err
    (project / "second/model.safetensors").write_bytes((project / "first/model.safetensors").read_bytes())
    answer, command, _ = start("sweep")
    assert command == [] and "measured with other weights: policy detailed" in answer.err
    assert start()[1]


def test_adapters_are_merged_by_request(project, start):
    for seed, name in enumerate(("one", "two")):
        save_adapter(project / "sft", project / name, seed)
    text = (project / "rewarded-lines.yaml").read_text().replace("cheerful: first", "cheerful: one")
    (project / "rewarded-lines.yaml").write_text(text.replace("detailed: second", "detailed: two"))
    answer, command, settings = start()
    assert answer.code == 0 and settings.whole == {} and settings.admin == ""
    assert option(command, "--max-lora-rank") == "8" and option(command, "--served-model-name") == "sft"
    assert int(option(command, "--max-loras")) >= 1 and "--worker-extension-cls" not in command
    assert "is an adapter already" in start("--rank", 4)[0].err


def test_whole_policies_become_adapters_once(project, start):
    answer, command, settings = start("sweep", "--rank", 4)
    assert answer.code == 0 and "cheerful, rank 4:" in answer.err and "% of the merged residual" in answer.err
    assert option(command, "--max-lora-rank") == "8" and settings.whole == {}
    assert "scores are those of the whole policies" in answer.err and len(settings.measured) == 7
    (made,) = project.glob("served/cheerful-rank4-*/adapter_model.safetensors")
    (other,) = project.glob("served/detailed-rank4-*/adapter_model.safetensors")
    before = made.stat().st_mtime_ns
    assert Path(settings.project).parent == project / "served"
    # Made again where a policy has changed, and only there.
    (project / "second/model.safetensors").write_bytes((project / "first/model.safetensors").read_bytes())
    answer, _, _ = start("--rank", 4)
    assert "holds" in answer.err and made.stat().st_mtime_ns == before
    assert other.read_bytes() == made.read_bytes()
    # Another project beside it, with the same names for other policies, has adapters of its own.
    text = (project / "rewarded-lines.yaml").read_text()
    (project / "other.yaml").write_text(text.replace("cheerful: first", "cheerful: sft"))
    start("--rank", 4, "--config", "other.yaml")
    assert made.stat().st_mtime_ns == before and len(list(project.glob("served/cheerful-rank4-*"))) == 2


def test_settings_of_the_shell_and_the_users_keys_stay_out(project, start, monkeypatch):
    for name in ("PROJECT", "STEP", "TOWER"):
        monkeypatch.setenv(f"REWARDED_LINES_{name}", "elsewhere")
    _, _, settings = start("--admin-key", "mine")
    assert settings.admin and "mine" not in settings.ready
    assert [os.environ[f"REWARDED_LINES_{name}"] for name in ("PROJECT", "STEP", "TOWER")] == ["", "", ""]


def test_choices_that_a_server_cannot_name_are_told(project, start):
    choose("sweep", at_least={"positive": 0.5}, name="detailed")
    answer, _, settings = start("sweep")
    assert "`detailed` is not served: a policy" in answer.err and settings.points.keys() == {"default"}
    points = {"ties": [SimpleNamespace(spec=PointSpec("ties", MergeSpec((0.5, 0.5), 1.0, 0.0, "ties")))]}
    run = SimpleNamespace(folder=project, methods=lambda: points)
    menu = menu_of_adapters("sft", POLICIES)
    with pytest.raises(UserError, match="no point of the run can be served"):
        default_point(run, ServeOptions(at_least={"detailed": 1}), menu, {})
    # A row that has another schedule now does not show the scores of the old one.
    run = load_run("sweep")
    assert "lines@0.5" in {point["model"] for point in measured_points(run, menu, {})}
    row = Row(lambda weights: MergeSpec(weights, 0.7, 0.2), own=True)
    menu = Menu("sft", POLICIES, {**menu.rows, "lines": row})
    assert {point["row"] for point in measured_points(run, menu, {})} == {"soup", None}


class Healthy(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


def test_the_verb_asks_without_a_proxy_and_an_interrupt_ends_the_server(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    server, events = start_server.Server.__new__(start_server.Server), []
    server.process = SimpleNamespace(poll=lambda: None, terminate=lambda: events.append("end"), wait=lambda: 0)
    with HTTPServer(("127.0.0.1", 0), Healthy) as answers:
        Thread(target=answers.serve_forever, daemon=True).start()
        server.url = f"http://127.0.0.1:{answers.server_port}"
        server.wait_until_ready(5)
        answers.shutdown()

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(start_server.Server, "wait_until_ready", interrupted)
    monkeypatch.setattr(start_server, "plan_server", lambda *_: None)
    monkeypatch.setattr(start_server, "Server", lambda plan: server)
    with pytest.raises(KeyboardInterrupt):
        start_server.serve()
    assert events == ["end"]
