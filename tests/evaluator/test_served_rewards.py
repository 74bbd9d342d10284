"""A sweep whose reward is a server: what the server goes through changes no record, and no secret gets into one."""

import math

import pytest
import yaml
from stand_in_rewards import RewardServer, score_of

from rewarded_lines import sweep
from rewarded_lines.engines import http_answers
from rewarded_lines.errors import UserError
from rewarded_lines.reports.summary import summarise

BUSY = 503, "overloaded"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(http_answers, "_FIRST_WAIT", 0.02)
    monkeypatch.setenv("JUDGE_KEY", "sesame-8127")
    started = RewardServer()
    yield started
    started.stop()


def declare(server, **options):
    with open("rewarded-lines.yaml") as file:
        project = yaml.safe_load(file)
    declared = {"url": server.url, "batch_size": 1, "key_env": "JUDGE_KEY", "retries": 12, **options}
    project["rewards"] = {"judge": declared, "words": project["rewards"]["words"]}
    project["sweep"] = {"methods": ["soup"]}
    with open("rewarded-lines.yaml", "w") as file:
        yaml.safe_dump(project, file)


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_records_are_those_of_a_healthy_server(server, tiny):
    """Every tenth request gets a 503; once, the server dies and comes back after a second at the same port."""
    declare(server)
    healthy = sweep(engine="hf", out="healthy", points=2)
    asked, once = len(server.asked), dict(server.ledger)
    assert set(once.values()) == {1} and asked > 20
    server.asked.clear()
    server.ledger.clear()

    def fault(number, content):
        if number == 20:
            server.die_for(1.0)
        return BUSY if number % 10 == 0 else None

    server.fault = fault
    troubled = sweep(engine="hf", out="troubled", points=2)
    assert len(server.asked) > asked and server.ledger.keys() == once.keys()
    assert files(tiny / "troubled/points") == files(tiny / "healthy/points")
    assert summarise(troubled).as_dict() == summarise(healthy).as_dict()
    for point in troubled.points:
        pairs = zip(point.prompts, point.responses, strict=True)
        assert point.scores["judge"].tolist() == [score_of(*pair) for pair in pairs]
    written = b"".join(path.read_bytes() for path in tiny.rglob("*") if path.is_file())
    assert b"JUDGE_KEY" in written and b"sesame" not in written


def test_a_sweep_stops_at_rows_without_a_score_and_goes_on_from_there(server, tiny):
    declare(server, retries=0)
    server.fault = lambda number, content: BUSY if len(server.asked) == 7 else None
    with pytest.raises(UserError, match="(?s)no score for 1 of .*status 503: overloaded .*missing: leave_out"):
        sweep(engine="hf", points=2)
    known = len(server.ledger)
    run = sweep(engine="hf", points=2)
    assert set(server.ledger.values()) == {1} and len(server.ledger) > known
    assert all(math.isfinite(score) for point in run.points for score in point.scores["judge"])
