"""A run's numbers against values by hand and against what made the scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rewarded_lines.errors import UserError
from rewarded_lines.evaluator.paired_scores import RESAMPLES
from rewarded_lines.evaluator.points import PointSpec
from rewarded_lines.evaluator.records import Point, Run, load_run
from rewarded_lines.merger.spec import MergeSpec
from rewarded_lines.pareto.bootstrap import Estimate
from rewarded_lines.reports.summary import Summary, summarise

MakeRun = Callable[..., Path]


def point(spec: PointSpec, scores: dict[str, list[float]]) -> Point:
    count = len(next(iter(scores.values())))
    return Point(
        spec=spec,
        prompts=[f"prompt {index}" for index in range(count)],
        responses=["one two three"] * count,
        prompt_index=np.arange(count),
        seeds=np.arange(count),
        tokens=np.full(count, 4),
        ended=np.array([True] * (count - 1) + [False]),
        kl=np.full(count, 0.5 if spec.weights else 0.0),
        scores={name: np.array(values) for name, values in scores.items()},
    )


@pytest.fixture
def small_run(tmp_path: Path) -> Run:
    """Two prompts that differ in level only, so that every resample has the same differences."""
    levels = np.array([0.0, 1.0])

    def scores(a: float, b: float) -> dict[str, list[float]]:
        return {"a": list(levels + a), "b": list(levels + b)}

    points = [
        point(PointSpec("sft"), scores(0, 0)),
        point(PointSpec("soup", MergeSpec((0.0, 1.0), 1.0, 0.0)), scores(-1, 3)),
        point(PointSpec("soup", MergeSpec((0.5, 0.5), 1.0, 0.0)), scores(1, 2)),
        point(PointSpec("soup", MergeSpec((1.0, 0.0), 1.0, 0.0)), scores(2, 1)),
        point(PointSpec("lines", MergeSpec((0.5, 0.5), 1.0, 1.0)), scores(2, 2)),
    ]
    header = {
        "title": "small",
        "rewards": {"a": {"unit": "x"}, "b": {}},
        "policies": {"first": "p", "second": "q"},
        "points": list("vwxyz"),
        "sweep": {"resamples": 100},
    }
    return Run(tmp_path, header, points)


def volumes(summary: Summary) -> dict[tuple[str, str], float]:
    return {(row.method, row.reference): row.hypervolume.value for row in summary.hypervolumes}


def test_hypervolumes_by_hand(small_run: Run) -> None:
    summary = summarise(small_run)
    # Over SFT, soup's (1, 2) and (2, 1) make 3 and (−1, 3) adds nothing; over the worst of each axis,
    # (−1, 0), they make 5 and (−1, 3) again nothing.
    expected = {("soup", "sft"): 3, ("soup", "worst"): 5, ("lines", "sft"): 4, ("lines", "worst"): 6}
    assert volumes(summary) == pytest.approx(expected)
    assert summary.references == {
        "sft": pytest.approx({"a": 0.5, "b": 0.5}),
        "worst": pytest.approx({"a": -0.5, "b": 0.5}),
    }


def test_the_reference_is_resampled_with_the_points(small_run: Run) -> None:
    # The prompts move all means together, SFT's too: with a fixed reference these intervals would be wide.
    for row in summarise(small_run).hypervolumes:
        assert (row.hypervolume.low, row.hypervolume.high) == pytest.approx([row.hypervolume.value] * 2)


def test_differences_between_methods(small_run: Run) -> None:
    by_reference = {row.reference: row for row in summarise(small_run).differences}
    assert list(by_reference) == ["sft", "worst"]
    row = by_reference["sft"]
    assert (row.method, row.other, row.share_positive) == ("lines", "soup", 1.0)
    assert row.difference.value == pytest.approx(1.0)
    assert row.relative == pytest.approx(1 / 3)


def test_policies_are_compared_with_sft_in_pairs(small_run: Run) -> None:
    gains = {row.policy: row.rewards for row in summarise(small_run).policy_gains}
    assert list(gains) == ["first", "second"]
    for policy, expected in {"first": (2, 1), "second": (-1, 3)}.items():
        for estimate, value in zip(gains[policy].values(), expected, strict=True):
            assert (estimate.value, estimate.low, estimate.high) == pytest.approx([value] * 3)


def test_points_have_means_with_intervals(small_run: Run) -> None:
    sft, *merged = summarise(small_run).points
    assert (sft.method, sft.lam, sft.kl.value) == ("sft", None, 0.0)
    assert sft.rewards["a"].value == pytest.approx(0.5)
    assert (sft.rewards["a"].low, sft.rewards["a"].high) == pytest.approx((0.0, 1.0))
    assert [point.lam for point in merged] == [0.0, 0.5, 1.0, 0.5]
    assert (merged[0].words.value, merged[0].ended, merged[0].kl.value) == pytest.approx((3.0, 0.5, 0.5))


def test_no_relative_difference_to_nothing(small_run: Run) -> None:
    points = [*small_run.points[:2], small_run.points[4]]
    rows = summarise(replace(small_run, points=points)).differences
    assert [row.relative for row in rows] == [None, None]


def test_synthetic_fronts_come_out_in_order(make_run: MakeRun) -> None:
    summary = summarise(load_run(make_run(resamples=200)))
    found = volumes(summary)
    assert found["lines", "sft"] > found["soup", "sft"] > 0
    assert all(found[method, "worst"] > found[method, "sft"] for method in ("soup", "lines"))
    for row in summary.hypervolumes:
        assert row.hypervolume.low < row.hypervolume.value < row.hypervolume.high
    assert all(row.difference.low > 0 and row.share_positive > 0.95 for row in summary.differences)
    gains = {row.policy: row.rewards for row in summary.policy_gains}
    assert gains["cheerful"]["positive"].low > 0
    assert gains["detailed"]["detailed"].low > 0


@pytest.mark.parametrize("rewards", [1, 3])
def test_any_number_of_rewards(make_run: MakeRun, rewards: int) -> None:
    summary = summarise(load_run(make_run(rewards=rewards, points=3, resamples=100)))
    assert all(row.hypervolume.value > 0 for row in summary.hypervolumes)


def test_the_numbers_can_be_json_and_come_out_the_same(make_run: MakeRun) -> None:
    run = load_run(make_run(points=3, resamples=100))
    text = json.dumps(summarise(run).as_dict(), allow_nan=False)
    assert text == json.dumps(summarise(run).as_dict(), allow_nan=False)
    assert json.loads(text)["seed"] == 0
    assert json.loads(text)["resamples"] == 100


def test_resamples_have_a_default(make_run: MakeRun) -> None:
    assert summarise(load_run(make_run(points=2, prompts=8))).resamples == RESAMPLES


def test_an_unfinished_run_says_so(make_run: MakeRun) -> None:
    summary = summarise(load_run(make_run(points=3, resamples=100, drop=2)))
    assert summary.missing_points == 2
    assert len(summary.points) == 5


def test_without_a_plain_soup_no_point_is_a_policy(make_run: MakeRun) -> None:
    run = load_run(make_run(points=3, resamples=100, methods={"lines": (1.0, 1.0)}))
    summary = summarise(run)
    assert summary.policy_gains == []
    assert summary.differences == []


def test_every_fault_of_the_records_is_told(small_run: Run) -> None:
    sft, first, second, third, lines = small_run.points
    broken = [
        sft,
        replace(first, prompts=["other", "prompts"]),
        replace(second, scores={"a": second.scores["a"]}),
        replace(third, scores=third.scores | {"b": np.array([np.inf, 1.0])}),
        replace(lines, kl=np.array([np.inf, np.inf]), control=np.array([[np.nan, 3], [2.0, 1]])),
    ]
    with pytest.raises(UserError) as caught:
        summarise(replace(small_run, points=broken))
    assert [problem.what for problem in caught.value.problems] == [
        "has other prompts than the SFT model",
        "has no score for b",
        "b is not finite for 1 of 2 responses",
        "KL is not finite for 2 of 2 responses",
        "the likelihood of 1 of 2 control texts is not finite",
    ]
    assert all(problem.remedy for problem in caught.value.problems)


def with_audit(run: Run) -> Run:
    """Let every point have an audit besides, of other levels than the rewards."""
    points = [
        replace(point, scores={**point.scores, "watch": np.full(2, 10.0 * place)})
        for place, point in enumerate(run.points)
    ]
    rewards = {**run.header["rewards"], "watch": {"unit": "points", "role": "audit"}}
    return replace(run, header={**run.header, "rewards": rewards}, points=points)


def test_audits_are_measured_and_make_no_hypervolume(small_run: Run) -> None:
    plain, summary = summarise(small_run), summarise(with_audit(small_run))
    assert summary.audits == ["watch"] and list(summary.objectives) == ["a", "b"]
    assert volumes(summary) == volumes(plain) and summary.references == plain.references
    assert [point.rewards["watch"].value for point in summary.points] == [0, 10, 20, 30, 40]
    assert [point.contribution for point in summary.points] == [point.contribution for point in plain.points]
    assert list(summary.policy_gains[0].rewards) == ["a", "b", "watch"]


def test_declared_references_stay_where_they_are(small_run: Run) -> None:
    declared = {"floor": {"b": 1.0, "a": 0.0}}
    run = replace(small_run, header={**small_run.header, "sweep": {"resamples": 100, "references": declared}})
    summary = summarise(run)
    assert list(summary.references) == ["sft", "worst", "floor"] and summary.references["floor"] == {"a": 0.0, "b": 1.0}
    # Means are half a level higher: over (0, 1), soup's (1.5, 2.5) and (2.5, 1.5) make 1.5 · 1.5 + 1 · 0.5.
    assert volumes(summary)["soup", "floor"] == pytest.approx(2.75)
    assert volumes(summary)["lines", "floor"] == pytest.approx(2.5 * 1.5)
    assert volumes(summary)["soup", "sft"] == pytest.approx(3)
    # The prompts do not move it, so with other prompts the volume is another.
    (row,) = [row for row in summary.hypervolumes if (row.method, row.reference) == ("lines", "floor")]
    assert row.hypervolume.low == pytest.approx(2 * 1) and row.hypervolume.high == pytest.approx(3 * 2)
    assert [row.reference for row in summary.differences] == ["sft", "worst", "floor"]


def test_contributions_by_hand(small_run: Run) -> None:
    sft, *soup, lines = summarise(small_run).points
    # Over SFT, (1, 2) and (2, 1) share a square of 1 and bring 1 each; (−1, 3) is no better than SFT on a.
    assert [point.contribution for point in soup] == pytest.approx([0, 1, 1])
    assert sft.contribution == 0 and lines.contribution == pytest.approx(4)


def test_distinct2_by_hand(small_run: Run) -> None:
    def measured(*texts: str) -> float:
        sft, *others = small_run.points
        return summarise(replace(small_run, points=[replace(sft, responses=list(texts)), *others])).sft.distinct2

    # Pairs: the dog, dog ran | the dog, dog sat: 3 of 4 differ.
    assert measured("the dog ran", "the dog  sat") == pytest.approx(3 / 4)
    # No pair reaches from one response into the next, and one word has none.
    assert measured("a b", "b a") == 1.0
    assert measured("a", "") == 0.0
    assert measured("a a a a", "a") == pytest.approx(1 / 3)
    # Of Chinese, every character is a word, and punctuation is none: 今天, 天今, 今天 | 天好.
    assert measured("今天今天。", "天 好！") == pytest.approx(3 / 4)


def test_words_of_any_script_are_counted(small_run: Run) -> None:
    responses = ["今天天气很好，我们去公园吧。", "GPT-4 は 良い model です"]
    assert replace(small_run.sft, responses=responses).words.tolist() == [12, 7]
    texts = ["a  b\tc\n", "", "don't stop — now!", "안녕 세상"]
    assert replace(small_run.sft, responses=texts).words.tolist() == [len(text.split()) for text in texts]


def controlled(run: Run, sums: list[list[list[float]]]) -> Run:
    points = [replace(point, control=np.array(one)) for point, one in zip(run.points, sums, strict=True)]
    return replace(run, points=points)


def test_control_perplexity_by_hand(small_run: Run) -> None:
    # e^(nats/token): texts of 1 and of 3 tokens, of 2 and 6 nats at SFT, so that all resamples are alike there.
    sums = [[[2.0, 1], [6.0, 3]], [[1.0, 1], [9.0, 3]], *[[[2.0, 1], [6.0, 3]]] * 3]
    sft, first, *_ = summarise(controlled(small_run, sums)).points
    before, after = sft.perplexities["control"], first.perplexities["control"]
    assert (before.value, before.low, before.high) == pytest.approx([np.exp(2)] * 3)
    # Tokens weigh alike, not texts: 10 nats over 4 tokens; one text alone makes e or e³.
    assert after.value == pytest.approx(np.exp(2.5))
    assert (after.low, after.high) == pytest.approx((np.exp(1), np.exp(3)))
    # Paired by text: SFT has 2 nats a token in either.
    over = first.forgetting["control"]
    assert (over.value, over.low, over.high) == pytest.approx((np.exp(0.5), np.exp(-1), np.exp(1)))
    assert sft.forgetting["control"] == Estimate(1.0, 1.0, 1.0)


def test_older_runs_have_one_set_without_a_name(small_run: Run) -> None:
    run = controlled(small_run, [[[2.0, 1], [6.0, 3]]] * 5)
    run.header["control"] = {"texts": 2, "hash": "0"}
    assert summarise(run).controls == ["control"]


def test_runs_with_other_control_texts_are_not_averaged(small_run: Run, tmp_path: Path) -> None:
    run = controlled(small_run, [[[2.0, 1], [6.0, 3]]] * 5)
    run.header["control"] = {"texts": {"reviews": 2}, "hash": "0"}
    other = replace(
        run, folder=tmp_path / "other", header={**run.header, "control": {"texts": {"chat": 2}, "hash": "1"}}
    )
    with pytest.raises(UserError, match="different control texts"):
        summarise([run, other])


def test_sets_of_control_texts_are_told_apart(small_run: Run) -> None:
    # Two texts of one set, one of the other; the set without a predicted token has no perplexity.
    sums = [[[2.0, 1], [6.0, 3], [9.0, 3], [0.0, 0]]] * 5
    run = controlled(small_run, sums)
    run.header["control"] = {"texts": {"reviews": 2, "chat": 1, "empty": 1}, "hash": "0"}
    summary = summarise(run)
    assert summary.controls == ["reviews", "chat"]
    assert {name: one.value for name, one in summary.sft.perplexities.items()} == pytest.approx(
        {"reviews": np.exp(2), "chat": np.exp(3)}
    )


def test_texts_without_a_predicted_token_count_for_nothing(small_run: Run) -> None:
    sums = [[[2.0, 1], [0.0, 0], [6.0, 3]]] * 5
    summary = summarise(controlled(small_run, sums))
    json.dumps(summary.as_dict(), allow_nan=False)
    for point in summary.points:
        found = point.perplexities["control"]
        assert (found.low, found.high) == pytest.approx([np.exp(2)] * 2)


def test_without_control_texts_there_is_no_perplexity(small_run: Run) -> None:
    assert all(point.perplexities == {} for point in summarise(small_run).points)
    nothing = controlled(small_run, [[[0.0, 0]]] * 5)
    assert all(point.perplexities == {} for point in summarise(nothing).points)


def test_several_responses_to_a_prompt_are_averaged_before_the_bootstrap(small_run: Run) -> None:
    def several(point: Point) -> Point:
        """Answer each prompt twice, 5 above and 5 below: noise of the sampling, which prompts do not share."""
        index = point.prompt_index.repeat(2)
        swing = np.tile([5.0, -5.0], 2)
        return replace(
            point,
            prompts=[point.prompts[i] for i in index],
            responses=["one two three"] * 4,
            prompt_index=index,
            seeds=np.arange(4),
            tokens=np.full(4, 4),
            ended=np.array([True, True, False, False]),
            kl=point.kl[index],
            scores={name: values[index] + swing for name, values in point.scores.items()},
        )

    plain = summarise(small_run)
    summary = summarise(replace(small_run, points=[several(point) for point in small_run.points]))
    assert summary.prompts == 2
    for one, other in zip(summary.points, plain.points, strict=True):
        assert one.rewards == other.rewards and (one.kl, one.words, one.ended) == (other.kl, other.words, other.ended)
    assert summary.hypervolumes == plain.hypervolumes


def test_checkpoints_are_points_of_their_own(small_run: Run) -> None:
    sft, first, *_ = small_run.points
    points = [
        *small_run.points,
        replace(first, spec=PointSpec("policies", MergeSpec((0.0, 1.0), 1.0, 0.0), "second")),
        replace(first, spec=PointSpec("baselines", checkpoint="morl")),
        replace(sft, spec=PointSpec("baselines", checkpoint="dpo")),
    ]
    summary = summarise(replace(small_run, points=points))
    assert [(point.method, point.checkpoint) for point in summary.points[-3:]] == [
        ("policies", "second"),
        ("baselines", "morl"),
        ("baselines", "dpo"),
    ]
    assert volumes(summary)["baselines", "sft"] == 0.0
    # Of two points that are the policy itself one is compared with SFT.
    assert [row.policy for row in summary.policy_gains] == ["first", "second"]
