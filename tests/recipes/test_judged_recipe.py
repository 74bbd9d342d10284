"""A policy that is trained for the verdicts of a judge."""

import pytest
from small_recipes import PROJECT, record, run
from tiny_judges import byte_level, random_model, save_judge

JUDGED = 'judge: judge, template: "Good? {prompt}{response}", token: "yes"'


@pytest.mark.slow
def test_a_policy_is_trained_for_a_judges_verdicts(work):
    tokenizer = byte_level(["yes", "no"])
    save_judge(work / "judge", random_model(tokenizer, 3, ["yes", "no"]), tokenizer)
    (work / "rewarded-lines.yaml").write_text(f"{PROJECT}  judged: {{{JUDGED}}}\n")
    policy = work / "policies" / "judged"
    run("rloo", work, reward="judged", output_dir=policy)
    made = record(policy)
    assert made["reward"] == "judged" and 0 < made["metrics"]["before"] < 1
    assert made["standardized"]["judged"]["deviation"] > 0
