"""From a preference over rewards to weights of policies that were trained for mixtures: λ = B⁻¹μ."""

import json
from itertools import permutations

import numpy as np
import pytest

from rewarded_lines import merge
from rewarded_lines.errors import UserError
from rewarded_lines.merger.preferences import check_trained, read_mixtures

TWO = {"first": {"words": 0.7, "letters": 0.3}, "second": {"words": 0.4, "letters": 0.6}}
THREE = {
    "a": {"helpful": 0.8, "safe": 0.1, "short": 0.1},
    "b": {"helpful": 0.1, "safe": 0.8, "short": 0.1},
    "c": {"safe": 0.25, "short": 0.75},
}
MIXTURES = "mixtures:\n  first: {words: 0.7, letters: 0.3}\n  second: {words: 0.4, letters: 0.6}\n"


def declared(folder):
    path = folder / "rewarded-lines.yaml"
    path.write_text(path.read_text() + MIXTURES)


@pytest.mark.parametrize("shares", [TWO, THREE, {"one": {"a": 1}, "two": {"b": 1.0}}])
def test_values_are_those_of_numpy_and_the_order_of_policies_does_not_matter(shares):
    rewards = list(dict.fromkeys(reward for one in shares.values() for reward in one))
    matrix = np.array([[one.get(reward, 0.0) for one in shares.values()] for reward in rewards])
    for preference in [*np.eye(len(shares)), np.arange(1, 1 + len(shares)) / sum(range(1 + len(shares)))]:
        expected = dict(zip(shares, np.linalg.inv(matrix) @ preference, strict=True))
        by_reward = dict(zip(rewards, preference.tolist(), strict=True))
        for order in permutations(shares):
            mixtures = read_mixtures(shares, order)
            weights = mixtures.weights([by_reward[name] for name in mixtures.rewards])
            assert weights == pytest.approx([expected[name] for name in order], abs=1e-11)
            assert sum(weights) == pytest.approx(1, abs=1e-11)
            assert mixtures.preference(weights) == pytest.approx(by_reward, abs=1e-11)
    # A policy alone has the preference that it was trained for.
    first, *_ = shares
    assert read_mixtures(shares, shares).preference(np.eye(len(shares))[0]) == dict.fromkeys(rewards, 0) | shares[first]


def test_faults_of_a_declaration_are_refused():
    for shares, message in [
        ({"first": {"a": 1.0}}, "no mixture for the policy `second`"),
        ({**TWO, "secnd": {"a": 1.0}}, "no policy `secnd`.*did you mean `second`"),
        ({**TWO, "second": {"words": 1, "letters": 1}}, "second: the shares do not sum to 1.*words 1, letters 1"),
    ]:
        with pytest.raises(UserError, match="(?s)" + message):
            read_mixtures(shares, ["first", "second"])
    with pytest.raises(UserError, match="(?s)project: mixtures: no reward `letters`.*words, letter"):
        read_mixtures(TWO, ["first", "second"], "project: mixtures", ["words", "letter"])


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"x": 0.5, "y": 0.5}, {"x": 0.5, "y": 0.5}, "2 policies, 2 rewards: .0.5, 0.5; 0.5, 0.5.*--lam"),
        ({"x": 1.0}, {"x": 1.0}, "2 policies, 1 rewards.*--lam"),
        ({"x": 0.5, "y": 0.5}, {"y": 0.5, "z": 0.5}, "2 policies, 3 rewards"),
    ],
)
def test_without_an_inverse_no_preference_has_a_lambda_but_lambda_still_merges(tiny, first, second, message):
    how = {"mixtures": {"first": first, "second": second}, "dry_run": True}
    with pytest.raises(UserError, match="(?s)" + message):
        merge("sft", ["first", "second"], preference=dict.fromkeys(first, 1 / len(first)), **how)
    (result,) = merge("sft", ["first", "second"], 0.5, **how)
    assert result.spec.weights == (0.5, 0.5) and sum(result.preference.values()) == 1


def test_the_command_line_merges_by_preference_and_tells_it_beside_the_weights(cli, tiny):
    declared(tiny)
    answer = cli("merge", "--preference", "words=0.9,letters=0.1", "--preference", "0.5", "--out", "out", "--beta", "0")
    assert answer.code == 0, answer.err
    assert "μ words" in answer.out and "leaves the simplex for 1 of 2 preferences" in " ".join(answer.out.split())
    expected = np.linalg.solve([[0.7, 0.4], [0.3, 0.6]], [0.9, 0.1])
    (outside,) = (path for path in (tiny / "out").iterdir() if "0.33" not in path.name)
    record = json.loads((outside / "merge.json").read_text())
    assert list(record["weights"].values()) == pytest.approx(expected) and min(expected) < 0
    assert record["preference"] == {"words": 0.9, "letters": 0.1} and record["mixtures"] == TWO
    card = (outside / "README.md").read_text()
    assert "| preference μ, λ = B⁻¹μ | words 0.9, letters 0.1 |" in card and "--extrapolate" in card
    # λ alone has a preference, too, and a repeated merge keeps it.
    assert cli("merge", "--lam", "first=1", "--out", "alone").code == 0
    assert "B⁻¹" not in cli("merge", "--lam", "1,1", "--method", "task-arithmetic", "--dry-run").out
    assert json.loads((tiny / "alone/merge.json").read_text())["preference"] == TWO["first"]
    assert cli("merge", "--from", outside / "merge.json", "--out", "again").code == 0
    again = json.loads((tiny / "again/merge.json").read_text())
    assert (again["preference"], again["weights"]) == (record["preference"], record["weights"])
    assert (tiny / "again/model.safetensors").read_bytes() == (outside / "model.safetensors").read_bytes()


def test_a_wrong_preference_is_refused(cli, tiny):
    undeclared = cli("merge", "--preference", "0.5")
    assert undeclared.code == 1 and "no mixtures map a preference" in undeclared.err
    declared(tiny)
    for words, message in [
        (["--preference", "1.5"], "a weight lies outside 0 to 1"),
        (["--preference", "words=0.5"], "the weights do not sum to 1"),
        (["--preference", "helpful=1"], "not a weight"),
        (["--preference", "0.5", "--lam", "0.5"], "λ and a preference are both given"),
        (["--preference", "0.5", "--method", "uniform"], "sets the weights itself"),
    ]:
        answer = cli("merge", *words)
        assert answer.code == 1 and message in answer.err and "Traceback" not in answer.err
    # What a recipe recorded in the policy's folder.
    record = tiny / "first/training.json"
    record.write_text(json.dumps({"recipe": "ppo", "weights": {"words": 1.4, "letters": 0.6}}))
    check_trained(TWO, {"first": tiny / "first"})
    record.write_text(json.dumps({"recipe": "ppo", "weights": {"words": 0.3, "letters": 0.7}}))
    answer = cli("merge", "--preference", "0.5")
    assert answer.code == 1 and "not what the policy was trained for" in answer.err and "words 0.3" in answer.err
    assert not (tiny / "merged").exists()
