"""`eval/skills.py`: its texts, the likelihood of labels, what is chosen, what the record says, and going on."""

from __future__ import annotations

import bz2
import csv
import json
import lzma
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import skills
import torch
from skill_parts import choices, merges, record, texts
from skill_parts.likelihoods import label_scores, text_losses
from tiny_models import make_tokenizer

from rewarded_lines.merger.open_inputs import plan_merge
from rewarded_lines.pipelines.recipe_jobs import FinishedParts

STANZAS = [f"Package: game{at}\nSource: game\nSection: games\nTag: use::viewing, interface::x11" for at in range(3)]
STANZAS += ["Package: tool\nSection: science\nTag: use::editing,\n use::viewing"]


def test_rows_are_balanced_and_no_label_is_left_out():
    rows = [{"label": label, "text": str(at)} for at, label in enumerate("aaabab")]
    assert [row["label"] for row in texts.balanced(rows, "ab", 10)] == list("abab")
    assert texts.balanced(rows, "abc", 10) == []


def test_the_plain_texts_of_all_sources_take_turns():
    first, second = [{"text": "1"}, {"text": "2"}], [{"text": "3"}]
    assert [row["text"] for row in texts.interleaved([first, second])] == ["1", "3", "2"]


def test_a_text_with_two_labels_or_in_two_splits_is_no_example():
    row = {"text": "a", "label": "x", "split": "train"}
    assert texts._sorted([row, row]) == [row]
    assert texts._sorted([row, row | {"label": "y"}, row]) == []
    assert texts._sorted([row, row | {"split": "test"}]) == []


def test_skills_come_from_the_archives_indices(tmp_path, monkeypatch):
    """Packages of one source share a split; two tags of a kind make no example."""
    monkeypatch.setattr(texts, "corpus_path", Path)
    monkeypatch.setattr(texts, "read_reviews", lambda _: [])
    (tmp_path / "Packages.xz").write_bytes(lzma.compress("\n\n".join(STANZAS).encode()))
    names = ("game0", "game1", "game2", "tool")
    for language in texts.SKILLS["language"].labels:
        stanzas = [
            f"Package: {name}\nDescription-{language}: {name} in {language}\n first line\n .\n second" for name in names
        ]
        english = language == "en"
        path = tmp_path / f"Translation-{language}.{'xz' if english else 'bz2'}"
        path.write_bytes((lzma if english else bz2).compress("\n\n".join(stanzas).encode()))
    found = texts._examples(tmp_path)
    assert {row["text"] for row in found["section"]} == {f"{name} in en. first line second" for name in names}
    assert {row["split"] for row in found["interface"]} == {texts.split_of("game")}
    assert {(row["text"][:5], row["label"]) for row in found["purpose"]} == {
        (name, "use::viewing") for name in names[:3]
    }
    assert len(found["language"]) == len(names) * len(texts.SKILLS["language"].labels)


@pytest.fixture(scope="module")
def tiny_llama(tiny_source):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_source / "first").eval(), make_tokenizer()


def by_hand(model, tokenizer, prompt, label):
    """Return log π(label | prompt), from one unpadded pass."""
    head, whole = tokenizer(prompt)["input_ids"], tokenizer(prompt + label)["input_ids"]
    assert whole[: len(head)] == head
    with torch.no_grad():
        table = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(float(table[at - 1, whole[at]]) for at in range(len(head), len(whole)))


@pytest.mark.parametrize("labels", [["q", "z"], [" fox", " beauty and", " q"]])
def test_likelihoods_of_labels_are_those_of_an_unpadded_pass(tiny_llama, labels):
    """Labels of one token, which share a pass, and longer ones."""
    model, tokenizer = tiny_llama
    prompts = ["the quick brown", "a film of great", "dog", "jumps over the lazy dog the the"]
    lengths = {len(tokenizer(label)["input_ids"]) for label in labels}
    assert (lengths == {1}) == (len(labels) == 2)
    wanted = [[by_hand(model, tokenizer, prompt, label) for label in labels] for prompt in prompts]
    np.testing.assert_allclose(label_scores(model, tokenizer, prompts, labels), wanted, rtol=0, atol=2e-5)


def test_the_loss_of_a_text_is_the_mean_over_its_tokens(tiny_llama):
    model, tokenizer = tiny_llama
    found = text_losses(model, tokenizer, ["the quick brown fox", "a film"])
    for text, loss in zip(["the quick brown fox", "a film"], found, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        assert loss == pytest.approx(model(ids, labels=ids).loss.item(), abs=2e-5)


def test_choices_by_hand():
    assert choices.grid(1.5, 3) == [0.5, 1.0, 1.5]
    assert choices.normalised({"a": 0.4, "b": 0.9, "c": 0}, {"a": 0.8, "b": 0.6}) == pytest.approx(1.0)
    assert choices.best({0.1: 0.5, 0.2: 0.7, 0.3: 0.7}) == 0.2
    assert choices.least_that_keeps({0.0: 0.3, 0.5: 0.793, 1.0: 0.8}, 0.8) == 0.5
    assert choices.least_that_keeps({0.0: 0.3, 0.5: 0.79, 1.0: 0.7}, 0.8) == 1.0
    assert choices.ball([1.0, 4.0, 0.0], 0.5) == [1.0, 0.5, 1.0]


def test_the_heuristic_of_a_sum_is_one_over_the_number_and_of_a_mean_one(tiny_source):
    plan = plan_merge(str(tiny_source / "sft"), {name: str(tiny_source / name) for name in ("first", "second")})
    alphas = {name: plan.auto_alpha([one.spec(2, 1.0)])[0] for name, one in merges.FAMILIES.items()}
    assert (alphas["Task Arithmetic"], alphas["Average"]) == (pytest.approx(0.5), pytest.approx(1.0))
    # Consensus drops values of the sum, so what is left is scaled by more.
    assert alphas["Consensus"] > 0.5


def test_differences_are_paired_by_row():
    """A model with the same answers has the difference 0 in every resample; means and shares are exact."""
    one = {"x": [1, 0, 1, 1] * 5, "y": [1, 1] * 5}
    other = {"x": [1, 0, 0, 0] * 5, "y": [1, 0] * 5}
    samples = choices.Samples([{"own": one, "same": one, "other": other}] * 2)
    own = {"x": "own", "y": "own"}
    same = samples.estimate(samples.share("own", own) - samples.share("same", own))
    assert (same.value, same.low, same.high) == (0, 0, 0)
    assert samples.estimate(samples.share("other", own)).value == pytest.approx((0.25 / 0.75 + 0.5) / 2)


@pytest.fixture
def measured(tiny_source, tmp_path, monkeypatch):
    """Two skills of the tiny models, and their merges."""
    skill = texts.Skill("a film", {"0": "fox", "1": "film"}, 4)
    known = {"first": skill, "second": skill}
    for module in (texts, merges, record, skills):
        monkeypatch.setattr(module, "SKILLS", known)
    rows = [{"prompt": skill.prompt(text), "completion": " fox"} for text in ("the quick", "dog", "lazy dog")]
    for split in ("validation", "test"):
        for name in known:
            (tmp_path / f"{name}-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / f"plain-{split}.jsonl").write_text('{"text": "the quick brown fox"}\n{"text": "a film"}\n')
    models = {name: tiny_source / name for name in known}
    return merges.Merges(tiny_source / "sft", models, tmp_path, tmp_path / "scores", "float32")


def test_a_merge_is_measured_with_its_own_weights_and_only_once(measured, tiny_llama, monkeypatch):
    model, tokenizer = tiny_llama
    wanted = text_losses(model, tokenizer, ["the quick brown fox", "a film"])
    found = measured.measure("first", merges.alone(0, 2), "test", [merges.PLAIN])
    np.testing.assert_allclose(found[merges.PLAIN], wanted, rtol=0, atol=2e-5)
    base = measured.measure("base", merges.alone(0, 2, 0.0), "test", [merges.PLAIN])
    assert abs(base[merges.PLAIN][0] - wanted[0]) > 1e-3
    # What is known is not measured again; what is not, is.
    asked = []
    monkeypatch.setattr(
        merges.Merges, "_measure", lambda self, model, tokenizer, task, split: asked.append(task) or [1.0]
    )
    again = measured.measure("first", merges.alone(0, 2), "test", [merges.PLAIN, "first"])
    assert (again[merges.PLAIN], asked) == (found[merges.PLAIN], ["first"])
    # Another merge is not the known one, whatever its label.
    measured.measure("first", merges.alone(0, 2, 0.5), "test", [merges.PLAIN])
    assert asked == ["first", merges.PLAIN]


def test_the_whole_of_a_seed_and_its_record(measured, tiny_source, tmp_path, monkeypatch):
    """From validation to the page, on models that are there; the numbers are those of the rows in correct.csv."""
    job = skills.Job(tmp_path, 0, replace(skills.QUICK, trials=1), tiny_source / "sft")
    monkeypatch.setattr(skills.Job, "models", {name: tiny_source / name for name in ("first", "second")})
    monkeypatch.setattr(skills, "Merges", lambda *_: measured)

    def measure(self, model, tokenizer, task, split):
        number = model.lm_head.weight.sum().item()
        if task == merges.PLAIN:
            return [number, number + 1]
        # They depend on the weights; three in four are right.
        return [float((number * 1e4 * row) % 4 < 3) for row in range(1, 25)]

    monkeypatch.setattr(choices, "RESAMPLES", 50)
    monkeypatch.setattr(merges.Merges, "_measure", measure)
    run = skills._measured(job, "inputs")
    about = {"base": "tiny", "quick": True, "seeds": [0], "sizes": skills.asdict(job.sizes)}
    about["rows"] = {name: {"test": 3} for name in ("first", "second")}
    record.write_record(tmp_path / "records", about, [run])
    page = (tmp_path / "records/README.md").read_text()
    with (tmp_path / "records/correct.csv").open() as file:
        rows = {(row["model"], row["skill"]): row["correct"] for row in csv.DictReader(file)}
    with (tmp_path / "records/merges.csv").open() as file:
        table = {(row["model"], row["form"]): row for row in csv.DictReader(file)}

    def mean(model, skill):
        return np.mean([int(one) for one in rows[model, skill]])

    for family in merges.FAMILIES:
        for form in record.FORMS:
            share = np.mean([mean(f"{family} {form}", skill) / mean(skill, skill) for skill in ("first", "second")])
            assert float(table[family, form]["normalised"]) == pytest.approx(share, rel=1e-5)
            assert f"{100 * share:.1f} [" in page
    assert "--method ties" in run["chosen"]["TIES lines"]["command"]
    assert len(run["chosen"]["TIES lines"]["trials"]) == len(run["chosen"]["TIES uniform"]["trials"]) == 1
    assert (tmp_path / "records/skills.png").stat().st_size > 5000


def test_training_is_done_again_only_if_its_inputs_changed(tmp_path):
    job = skills.Job(tmp_path, 0, skills.QUICK, None)
    base, *parts = job.parts()
    assert [part.output for part in (base, *parts)] == [job.base, *job.models.values()]
    finished = FinishedParts(tmp_path / skills.STATE_FILE)
    for part in (base, *parts):
        part.output.mkdir(parents=True)
    known = {part.name: {"made_from": part.made_from, "seconds": 1.0} for part in (base, *parts)}
    finished.file.write_text(json.dumps(known))
    assert finished.missing(job.parts()) == []
    changed = replace(job, sizes=replace(job.sizes, steps=7)).parts()
    assert finished.missing(changed) == changed[1:]
    # The folder's name is no input.
    moved = skills.Job(Path("elsewhere"), 0, skills.QUICK, None).parts()
    assert [part.made_from for part in moved] == [part.made_from for part in (base, *parts)]


def test_quick_takes_no_base(tmp_path):
    with pytest.raises(skills.UserError, match="makes its own base"):
        skills.main(["--quick", "--base", "x", "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("given", ["x", "", "0,0", "0,x", "1.5"])
def test_wrong_seeds_are_told_before_anything_is_made(tmp_path, given):
    with pytest.raises(skills.UserError, match="not a list of seeds"):
        skills.main(["--quick", f"--seeds={given}", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
