"""A policy that is trained for the verdicts of a judge."""

import pyarrow.parquet as pq
import pytest
from small_recipes import PROJECT, record, run
from tiny_judges import byte_level, random_model, save_judge

from rewarded_lines.projects import load_project
from rewarded_lines.rewards.load_rewards import load_rewards

JUDGED = 'judge: judge, template: "Good? {prompt}{response}", token: "yes"'


def test_a_policy_is_trained_for_a_judges_verdicts(work):
    tokenizer = byte_level(["yes", "no"])
    save_judge(work / "judge", random_model(tokenizer, 3, ["yes", "no"]), tokenizer)
    (work / "rewarded-lines.yaml").write_text(f"{PROJECT}  judged: {{{JUDGED}}}\n")
    policy = work / "policies" / "judged"
    run("rloo", work, reward="judged", output_dir=policy)
    made = record(policy)
    assert made["reward"] == "judged" and 0 < made["metrics"]["before"] < 1
    assert made["standardized"]["judged"]["deviation"] > 0
    rows = pq.read_table(work / "policies" / "samples.parquet").to_pylist()
    reward = load_rewards(load_project(work / "rewarded-lines.yaml"), ["judged"], "cpu")["judged"]
    scores = reward.score([row["prompt"] for row in rows], [row["response"] for row in rows])
    assert scores == pytest.approx([row["judged"] for row in rows], rel=1e-6), rows[0]
