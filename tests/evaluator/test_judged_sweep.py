"""Judges in a project: a sweep, a resumed one, and the reward that a recipe trains for."""

import json

import pytest
from numpy.testing import assert_array_equal
from tiny_judges import byte_level, chained_model, random_model, save_judge

from rewarded_lines import sweep
from rewarded_lines.errors import UserError
from rewarded_lines.evaluator.evaluate import LocalEvaluator
from rewarded_lines.evaluator.records import read_point
from rewarded_lines.evaluator.sweep_options import SweepOptions
from rewarded_lines.evaluator.sweep_setup import open_setup
from rewarded_lines.projects import load_project
from rewarded_lines.rewards.load_rewards import load_rewards
from rewarded_lines.training.training_reward import load_training_reward

PROJECT = """\
base: sft
policies: {first: first, second: second}
rewards:
  good:
    judge: judge
    template: "{prompt} {response} {rubric}"
    token: "yes"
    unmatched: abstain
  better:
    judge: judge
    template: "{prompt}\\n{a}\\n{b}"
    against: answer
    tokens: {"yes": 1, "no": 0, "Yes": tie}
  gain:
    judge: judge
    template: "{prompt}\\n{a}\\n{b}"
    against: sft
    tokens: {"yes": 1, "no": 0}
    role: audit
prompts: {file: test.jsonl}
generation: {max_tokens: 6, temperature: 1.0, n: 2}
sweep: {points: 2, methods: [soup]}
"""
ENGINE = {"engine": "hf", "device": "cpu"}


@pytest.fixture
def judged(tiny):
    """The tiny project with a judge and columns."""
    tokenizer = byte_level(["yes", "no", "Yes"])
    save_judge(tiny / "judge", random_model(tokenizer, 3, ["yes", "no", "Yes"]), tokenizer)
    rows = [
        {"prompt": one, "answer": f"{one} so", "rubric": f"R{at}"}
        for at, one in enumerate(["the quick", "dog", "a film"])
    ]
    (tiny / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tiny / "rewarded-lines.yaml").write_text(PROJECT)
    return tiny


def test_a_sweep_asks_judges_and_compares_with_the_sft_model(judged):
    run = sweep("rewarded-lines.yaml", out="run", **ENGINE)
    rewards, rows = load_rewards(load_project(), device="cpu"), [json.loads(row) for row in open("test.jsonl")]
    sft, *others = run.points
    assert list(sft.scores["gain"]) == [0.5] * 6
    assert "tells nothing apart" not in (judged / "run/run.json").read_text()
    assert any(set(point.scores["gain"]) != {0.5} for point in others)
    for point in run.points:
        own = [rows[at] for at in point.prompt_index]
        columns = [{**row, "@sft": text} for row, text in zip(own, sft.responses, strict=True)]
        for name, reward in rewards.items():
            assert_array_equal(point.scores[name], reward.score(point.prompts, point.responses, columns))
    # A run that lost the other points compares with the responses in the SFT model's record.
    (judged / "run/scores.sqlite").unlink()
    for file in judged.glob("run/points/*.parquet"):
        if read_point(file).spec.method != "sft":
            file.unlink()
    again = sweep("rewarded-lines.yaml", out="run", **ENGINE)
    for one, other in zip(run.points, again.points, strict=True):
        assert one.responses == other.responses
        assert_array_equal([one.scores[name] for name in rewards], [other.scores[name] for name in rewards])
    # A worker that makes one point alone generates them itself.
    setup = open_setup(load_project(), SweepOptions(**ENGINE))
    evaluator = LocalEvaluator(setup, judged / "worker")
    ((_, point),) = evaluator.evaluate(setup, {others[-1].spec: "point"}, ["point"])
    assert_array_equal(point.scores["gain"], others[-1].scores["gain"])
    evaluator.close()


def test_a_judge_trains_but_not_against_the_sft_model(judged):
    project = load_project()
    reward = load_training_reward(project, {"good": 0.5, "better": 0.5}, "cpu")
    rows = [{"rubric": "R", "answer": "so"}] * 2
    parts = reward.parts(["dog", "a film"], ["yes", "of beauty"], rows)
    alone = load_rewards(project, ["good", "better"], "cpu")
    assert parts == {name: one.score(["dog", "a film"], ["yes", "of beauty"], rows) for name, one in alone.items()}
    assert reward.score(["dog"], ["yes"], rows[:1]) == [0.5 * parts["good"][0] + 0.5 * parts["better"][0]]
    text = PROJECT.replace("    role: audit\n", "")
    (judged / "rewarded-lines.yaml").write_text(text)
    with pytest.raises(UserError, match=r"no responses of the SFT model[\s\S]*against: COLUMN"):
        load_training_reward(load_project(), {"gain": 1.0}, "cpu")


def test_rows_without_a_column_are_refused_before_anything_is_generated(judged):
    (judged / "test.jsonl").write_text(json.dumps({"prompt": "dog", "rubric": "R"}) + "\n")
    with pytest.raises(UserError, match="reads column `answer`, which a row does not have"):
        sweep("rewarded-lines.yaml", out="run", **ENGINE)


def test_the_command_line_names_the_row_without_a_verdict(judged, cli):
    tokenizer = byte_level(["yes", "no", "Yes", "maybe", "<|assistant|>"])
    save_judge(judged / "judge", chained_model(tokenizer, {"<|assistant|>": "maybe"}), tokenizer)
    text = PROJECT.replace("    unmatched: abstain\n", "").replace('token: "yes"', "pattern: '(yes|no)'")
    (judged / "rewarded-lines.yaml").write_text(text)
    answer = cli("sweep", "--engine", "hf", "--out", "run", "--device", "cpu")
    assert answer.code == 1 and "the judge's answer has no verdict" in answer.err and "'maybe'" in answer.err
