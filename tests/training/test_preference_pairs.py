"""Preference pairs: the best against the worst of each prompt, cached by everything that determines them."""

import math
import statistics

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_models import make_tokenizer

from rewarded_lines.errors import UserError
from rewarded_lines.training.preference_pairs import best_and_worst, kept_rows, pair_tokens

NAN = math.nan
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
PROMPTS = ["a", "a", "a", "b", "b", "b", "c", "c", "c"]
RESPONSES = ["a0", "a1", "a2", "b0", "b1", "b2", "c0", "c1", "c2"]
# Their standard deviation is 2.
SCORES = [0.0, 4.0, 2.0, 5.0, 5.0, 1.0, 0.0, 0.0, 1.0]


def row(prompt, chosen, rejected, good, bad):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "chosen_score": good, "rejected_score": bad}


A, B, C = row("a", "a1", "a0", 4.0, 0.0), row("b", "b0", "b2", 5.0, 1.0), row("c", "c2", "c0", 1.0, 0.0)


@pytest.mark.parametrize(("margin", "expected"), [(0.0, [A, B, C]), (0.4, [A, B, C]), (0.5, [A, B]), (1.9, [A, B])])
def test_the_best_stands_against_the_worst_where_they_differ_enough(margin, expected):
    assert best_and_worst(PROMPTS, RESPONSES, SCORES, 3, margin) == expected


def test_equal_scores_make_no_pair():
    assert best_and_worst(["a", "a", "b", "b"], ["w", "x", "y", "z"], [1.0, 1.0, 2.0, 3.0], 2, 0.0) == [
        row("b", "z", "y", 3.0, 2.0)
    ]


def test_a_response_without_a_score_is_in_no_pair():
    """Nor in the deviation, the unit of the margin."""
    scores = [0.0, 4.0, NAN, 5.0, NAN, 1.0, NAN, NAN, 9.0]
    there = [0.0, 4.0, 5.0, 1.0, 9.0]
    least = 4.0 / statistics.pstdev(there)
    assert best_and_worst(PROMPTS, RESPONSES, scores, 3, least - 0.01) == [A, B]
    with pytest.raises(UserError, match="differ enough"):
        best_and_worst(PROMPTS, RESPONSES, scores, 3, least + 0.01)
    with pytest.raises(UserError, match="no prompt has two responses with a score(.|\n)*`responses`"):
        best_and_worst(PROMPTS, RESPONSES, [1.0, NAN, NAN, *[NAN] * 6], 3, 0.0)


@pytest.mark.parametrize(("scores", "margin"), [(SCORES, 2.0), (SCORES, 99.0), ([1.0] * 9, 0.0)])
def test_no_pair_at_all_is_a_fault(scores, margin):
    with pytest.raises(UserError, match="differ enough in reward\n  remedy: lower `margin`"):
        best_and_worst(PROMPTS, RESPONSES, scores, 3, margin)


def test_answers_to_a_chat_are_turns_of_it():
    (pair,) = best_and_worst([CHAT, CHAT], ["So.", "No."], [1.0, 0.0], 2, 0.0)
    assert pair["prompt"] == CHAT and pair["chosen"] == [{"role": "assistant", "content": "So."}]
    assert pair["rejected"] == [{"role": "assistant", "content": "No."}]


MADE_FROM = {"base": "1", "scales": {"brief": (0.5, 2.0)}, "margin": 0.5}
CHATS = best_and_worst([CHAT] * 2 + ["Plain?"] * 2, ["So.", "No.", "Aye.", "Nay."], [1.0, 0.25, -1.0, 1 / 3], 2, 0.0)


class Maker:
    """Makes pairs and counts its calls."""

    def __init__(self, rows):
        self.rows = rows
        self.asked = 0

    def __call__(self):
        self.asked += 1
        return self.rows


@pytest.mark.parametrize(
    "rows",
    [[A, B], CHATS[:1], CHATS, [row('[{"a": 1}]', "", ' naïve\n"–"', 1.0, 0.0)]],
    ids=["text", "chat", "both", "odd"],
)
def test_pairs_are_made_once_and_come_back_as_they_were(tmp_path, rows):
    path, maker = tmp_path / "new" / "pairs.parquet", Maker(rows)
    assert kept_rows(path, MADE_FROM, maker) == (rows, False)
    assert kept_rows(path, {key: MADE_FROM[key] for key in reversed(MADE_FROM)}, maker) == (rows, True)
    assert maker.asked == 1 and [one.name for one in path.parent.iterdir()] == ["pairs.parquet"]


@pytest.mark.parametrize("other", [{"base": "2"}, {"margin": 0.25}, {"scales": {"brief": (0.5, 2.1)}}, {"more": 1}])
def test_pairs_of_something_else_are_made_again(tmp_path, other):
    path = tmp_path / "pairs.parquet"
    kept_rows(path, MADE_FROM, Maker([A]))
    assert kept_rows(path, MADE_FROM | other, Maker([B])) == ([B], False)
    assert kept_rows(path, MADE_FROM | other, Maker([C])) == ([B], True)


def test_anyone_can_read_the_pairs(tmp_path):
    kept_rows(tmp_path / "pairs.parquet", MADE_FROM, Maker([A, B]))
    assert pq.read_table(tmp_path / "pairs.parquet").to_pylist() == [A | {"chat": False}, B | {"chat": False}]


def not_parquet(path):
    path.write_text("my pairs")


def cut(path):
    kept_rows(path, MADE_FROM, Maker([A]))
    path.write_bytes(path.read_bytes()[:-20])


def of_others(path):
    pq.write_table(pa.table({"prompt": ["a"]}), path)


def a_folder(path):
    path.mkdir()


@pytest.mark.parametrize("make", [not_parquet, cut, of_others, a_folder])
def test_a_file_of_others_is_left_alone(tmp_path, make):
    path = tmp_path / "pairs.parquet"
    make(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(UserError) as caught:
        kept_rows(path, MADE_FROM, Maker([A]))
    (problem,) = caught.value.problems
    assert (problem.where, problem.what) == (str(path), "not a file that this recipe made")
    assert "`pairs_file`" in problem.remedy and (path.read_bytes() if path.is_file() else None) == before


def test_what_cannot_be_made_leaves_nothing(tmp_path):
    def fails():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        kept_rows(tmp_path / "pairs.parquet", MADE_FROM, fails)
    assert list(tmp_path.iterdir()) == []


def test_answers_end_as_they_were_sampled():
    """With the token that was drawn, with none if the length was used up, and otherwise with the tokenizer's own."""
    tokenizer, end, other = make_tokenizer(), 2, 7
    ends = [{"chosen_end": other, "rejected_end": -1}, {}]
    rows = [
        row("the", " quick fox", " dog", 1.0, 0.0) | {"chosen_end": None, "rejected_end": None} | one for one in ends
    ]
    found = pair_tokens(tokenizer, rows, frozenset([end, other])).to_list()
    chosen, rejected = (tokenizer(text)["input_ids"] for text in (" quick fox", " dog"))
    # For `train_sampling_strategy: group_by_length`.
    assert [one["length"] for one in found] == [len(one["prompt_ids"]) + len(one["chosen_ids"]) for one in found]
    assert [one["prompt_ids"] for one in found] == [tokenizer("the")["input_ids"]] * 2
    assert [one["chosen_ids"] for one in found] == [[*chosen, other], [*chosen, end]]
    assert [one["rejected_ids"] for one in found] == [rejected, [*rejected, end]]


@pytest.mark.parametrize("template", ["{{ content | trim }}", "{{ '<think>\\n\\n</think>\\n\\n' + content }}"])
def test_sampled_answers_to_chats_keep_their_tokens_whatever_the_template_makes_of_them(template):
    """Llama 3 trims an answer, Qwen 3 puts empty thoughts before it, DeepSeek-R1 renders another prompt before one."""
    tokenizer, end = make_tokenizer(), 2
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ':' }}{% set content = m.content %}" + template + "{{ '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:<think>{% endif %}"
    )
    sampled = [(*tokenizer(text)["input_ids"], end) for text in (" quick fox", " dog")]
    rows = best_and_worst([CHAT] * 2, [" quick fox", " dog"], [1.0, 0.0], 2, 0.0, [end] * 2, sampled)
    (found,) = pair_tokens(tokenizer, rows, frozenset([end])).to_list()
    assert (tuple(found["chosen_ids"]), tuple(found["rejected_ids"])) == tuple(sampled)
    assert tokenizer.decode(found["prompt_ids"]).endswith("assistant:<think>")
