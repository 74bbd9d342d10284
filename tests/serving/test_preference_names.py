"""Names of preferences: what they ask for, one spelling for each model, what is refused."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from tiny_adapters import save_adapter

from rewarded_lines.errors import Problem, UserError
from rewarded_lines.merger.preferences import read_mixtures
from rewarded_lines.merger.spec import MergeSpec
from rewarded_lines.projects import load_project
from rewarded_lines.serving import preference_names
from rewarded_lines.serving.menu_rows import Row
from rewarded_lines.serving.menus import linear_rows, menu_of_adapters, menu_of_project
from rewarded_lines.serving.preference_names import Menu, PreferenceError

TWO = {"helpful": "h", "brief": "b"}
POINTS = {"chosen": MergeSpec((0.35, 0.65)), "between": MergeSpec((1 / 3, 2 / 3), 1.0, 0.0)}
POINTS["tuned"] = MergeSpec((0.5, 0.5), 0.7312, 0.5)
MENU = Menu("sft", TWO, linear_rows(2), POINTS)


NAMES = [
    ("lines@0.35", "lines@0.35", MergeSpec((0.35, 0.65))),
    ("soup@0.35,0.65", "soup@0.35", MergeSpec((0.35, 0.65), 1.0, 0.0)),
    ("lines@helpful=.7,brief=.3;alpha=1;beta=.5", "soup@0.7;beta=0.5", MergeSpec((0.7, 0.3), 1.0, 0.5)),
    ("soup@brief=1", "soup@0", MergeSpec((0.0, 1.0), 1.0, 0.0)),
    # One model, one name.
    ("lines@0.7; beta = 0", "soup@0.7", MergeSpec((0.7, 0.3), 1.0, 0.0)),
    ("soup@0.7;beta=1", "lines@0.7", MergeSpec((0.7, 0.3))),
    ("task-arithmetic@0.7,0.3", "soup@0.7", MergeSpec((0.7, 0.3), 1.0, 0.0, "task-arithmetic")),
    ("task-arithmetic@1,1;alpha=-0", "task-arithmetic@1,1;alpha=0", MergeSpec((1.0, 1.0), 0, 0, "task-arithmetic")),
    # Rounded to the step; the rest goes to the largest.
    ("lines@0.3333", "lines@0.33", MergeSpec((0.33, 0.67))),
    ("lines@0.0049", "lines@0", MergeSpec((0.0, 1.0))),
    # A policy alone, and points; one that is not on the step keeps its name.
    ("brief", "soup@0", MergeSpec((0.0, 1.0), 1.0, 0.0)),
    ("chosen", "lines@0.35", MergeSpec((0.35, 0.65))),
    ("between", "between", MergeSpec((1 / 3, 2 / 3), 1.0, 0.0)),
    ("tuned", "tuned", MergeSpec((0.5, 0.5), 0.7312, 0.5)),
]
WRONG = [
    ("gpt-4", 404, "expected: soup@WEIGHTS, lines@WEIGHTS"),
    ("line@0.5", 404, "did you mean `lines`?"),
    ("chosen@0.5", 404, "no such model"),
    ("/etc/passwd", 404, "helpful, brief, chosen, between, tuned"),
    ("lines@helpfull=1", 404, "did you mean `helpful`?"),
    ("lines@1.2", 400, "outside 0 to 1"),
    ("lines@0.5,0.6", 400, "do not sum to 1"),
    ("lines@0.2,0.3,0.5", 400, "3 weights for 2 policies"),
    ("lines@nan", 400, "not a weight"),
    ("lines@", 400, "ask for lines@helpful=0.5,brief=0.5"),
    ("lines@0.5;gamma=1", 400, "each of alpha, beta at most once"),
    ("lines@0.5;alpha=1;alpha=1", 400, "at most once"),
    ("lines@0.5;beta=1e9", 400, "a number from -10 to 10"),
    ("task-arithmetic@1,1e308", 400, "too large"),
    ("lines@" + "0" * 1000, 400, "at most 512 characters"),
]


def test_a_name_is_a_merge_and_a_model_has_one_name():
    for name, canonical, spec in NAMES:
        assert MENU.spec(name) == spec and MENU.canonical(name) == canonical
        # The canonical name asks for the same model.
        again = MENU.spec(canonical)
        assert (again.factors, again.schedule) == (spec.factors, spec.schedule)
        assert MENU.canonical(canonical) == canonical


def test_what_is_not_on_the_menu_is_refused_with_what_is():
    for name, status, said in WRONG:
        with pytest.raises(PreferenceError) as caught:
            MENU.spec(name)
        assert caught.value.status == status and said in str(caught.value) and "--" not in str(caught.value), name


def test_a_preference_is_named_and_a_wrong_one_refused():
    assert MENU.name_for({"brief": 0.25, "helpful": 0.75}) == "lines@0.75"
    assert MENU.name_for({"helpful": 1}, "soup") == "soup@1"
    wrong = ([1, 0], {"x": 1}, {"helpful": "1"}, {"helpful": True}, {"helpful": float("inf")}, {"helpful": 0.5}, {})
    for preference in wrong:
        with pytest.raises(PreferenceError):
            MENU.name_for(preference)
    for row in ("ties", 3, "lines@1;"):
        with pytest.raises(PreferenceError):
            MENU.name_for({"helpful": 1}, row)
    assert json.loads(json.dumps(MENU.as_dict()))["rows"][1] == {"name": "lines", "label": "LiNeS (α = β = 1)"}


@pytest.mark.parametrize("name", ["brief", "sft"])
def test_a_point_has_no_name_of_a_policy_or_the_base(name):
    with pytest.raises(UserError, match="two models of one name"):
        Menu("models/sft", TWO, linear_rows(2)).add({name: MergeSpec((0.3, 0.7))})


def test_a_long_name_is_cut_before_it_is_compared(monkeypatch):
    seen = []
    monkeypatch.setattr(preference_names, "did_you_mean", lambda word, names: seen.append(len(word)) or "")
    with pytest.raises(PreferenceError):
        MENU.name_for({"x" * 100_000: 1})
    assert seen == [80]


def test_a_row_is_asked_by_one_request_at_a_time_and_its_refusal_is_an_answer():
    busy = threading.Semaphore(1)

    def at(weights):
        assert busy.acquire(blocking=False)
        time.sleep(0.002)
        busy.release()
        if weights[0] == 1:
            raise UserError(Problem("the norm of a policy is 0"))
        return MergeSpec(weights, 0.5)

    menu = Menu("sft", TWO, {"even": Row(at, own=True)})
    with ThreadPoolExecutor(8) as pool:
        names = list(pool.map(menu.canonical, [f"even@{k / 100}" for k in range(30)]))
    assert names[3] == "even@0.03"
    with pytest.raises(PreferenceError, match="norm of a policy"):
        menu.spec("even@1")


def test_a_step_is_a_part_of_one():
    for step in (0, -1, 0.03, 2, float("nan"), 1e-9):
        with pytest.raises(UserError, match="not a step"):
            menu_of_adapters("sft", TWO, step)


def test_mixtures_turn_preferences_into_weights():
    shares = {"one": {"a": 0.75, "b": 0.25}, "two": {"a": 0.25, "b": 0.75}}
    menu = Menu("sft", {"one": "1", "two": "2"}, linear_rows(2), mixtures=read_mixtures(shares, ["one", "two"]))
    assert menu.spec("soup@a=0.5,b=0.5").weights == (0.5, 0.5) and menu.spec("soup@1").weights == (1.5, -0.5)
    assert menu.name_for({"a": 1}, "soup") == "soup@1"
    with pytest.raises(PreferenceError, match="no reward `one`"):
        menu.spec("soup@one=1")


def test_three_policies_keep_a_sum_of_one():
    menu = menu_of_adapters("sft", dict.fromkeys("abc", "x"), 0.1)
    assert menu.canonical("lines@0.3333,0.3333,0.3334") == "lines@0.4,0.3,0.3"
    assert menu.canonical("soup@c=1") == "soup@0,0,1" and menu.name_for({"a": 0.5, "c": 0.5}) == "lines@0.5,0,0.5"


def test_a_project_serves_the_curves_of_its_sweep(tiny):
    for seed, name in enumerate(("one", "two")):
        save_adapter(tiny / "sft", tiny / name, seed)
    text = "base: sft\npolicies: {one: one, two: two}\nsweep:\n  methods:\n"
    text += (
        "    {half: {alpha: 0.5}, even: {match: half}, lines: null, listed: {schedule: [1, 1, 0.5, 2]}, ties: null}\n"
    )
    (tiny / "adapters.yaml").write_text(text)
    menu = menu_of_project(load_project(tiny / "adapters.yaml"), {"chosen": MergeSpec((0.2, 0.8), 0.5)})
    # No adapter is a TIES merge.
    assert [*menu.rows] == ["soup", "lines", "task-arithmetic", "sum", "half", "even", "listed"]
    assert menu.spec("half@0.2") == MergeSpec((0.2, 0.8), 0.5) and menu.canonical("chosen") == "half@0.2"
    assert menu.canonical("lines@0.2;alpha=0.5") == "half@0.2"
    even = menu.spec("even@0.2")
    assert even.beta == 0 and even.alpha not in (0, 1) and menu.canonical("even@0.2") == "even@0.2"
    assert menu.spec("listed@0.2").lines and menu.canonical("listed@0.2") == "listed@0.2"
    for name in ("even@0.2;alpha=1", "listed@0.2;beta=0"):
        with pytest.raises(PreferenceError, match="expected: no keys"):
            menu.spec(name)


def test_the_example_can_be_asked_for_whatever_the_policies_are_called():
    menu = Menu("sft", {"kind, brief": "a", "b=c;d": "b"}, linear_rows(2))
    assert menu.canonical(menu.example()) == menu.name_for({"kind, brief": 0.5, "b=c;d": 0.5}) == "lines@0.5"
