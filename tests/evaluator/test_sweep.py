"""The sweep with the reference engine: records, pairing, resuming, refusing."""

import csv
import io
import json
import shutil

import numpy as np
import pytest
from progress_told import Told
from tiny_adapters import save_adapter
from tiny_models import perturb, save_model

from rewarded_lines import merge, sweep
from rewarded_lines.cli.display import tell_rows
from rewarded_lines.config import GenerationSpec
from rewarded_lines.engines.load_engine import load_generator
from rewarded_lines.errors import UserError
from rewarded_lines.evaluator.choose import command_for
from rewarded_lines.evaluator.evaluate import LocalEvaluator
from rewarded_lines.evaluator.records import load_run, read_point
from rewarded_lines.folders import folder_lock
from rewarded_lines.merger.lines_schedule import Line
from rewarded_lines.reports.figures.depth_figure import schedules
from rewarded_lines.reports.summary import summarise
from rewarded_lines.reports.tables import markdown, points_csv
from rewarded_lines.reports.texts import method_labels


def test_every_point_keeps_every_response_and_unrounded_score(tiny):
    run = sweep(engine="hf")
    assert [str(point.spec) for point in run.points] == [
        "sft",
        *(f"{name} λ={lam}" for name in ("soup", "lines") for lam in ("0,1", "0.5,0.5", "1,0")),
    ]
    for point in run.points:
        assert point.prompts == run.sft.prompts and (point.seeds == run.sft.seeds).all()
        assert point.scores["words"].tolist() == [len(text.split()) for text in point.responses]
        letters = [sum(map(str.isalpha, text)) / (1 + len(text)) for text in point.responses]
        assert point.scores["letters"].tolist() == letters
        assert (point.tokens <= 12).all() and np.isfinite(point.kl).all()
    assert (run.sft.kl == 0).all()
    assert run.header["complete"] is True and run.header["options"]["engine"] == "hf"
    assert run.header["version"] == 1
    assert len(list((tiny / "sweep/points").iterdir())) == 7


def test_points_answer_as_a_merged_checkpoint_would(tiny):
    run = sweep(engine="hf")
    spec = GenerationSpec(max_tokens=12)
    for name, beta, lam in (("soup", 0.0, 1.0), ("soup", 0.0, 0.0), ("lines", 1.0, 0.5)):
        merge("sft", ["first", "second"], lam, beta=beta, out="out", overwrite=True)
        generator = load_generator("hf", "out", spec, run.sft.prompts)
        (answers,) = generator.generate(run.sft.prompts, spec)
        texts = [response.text for response in answers]
        (point,) = [p for p in run.points if p.spec.method == name and p.spec.lam == lam]
        assert point.responses == texts


def test_rows_load_without_us(swept):
    import pyarrow.parquet as pq

    tables = [pq.read_table(path) for path in (swept / "sweep/points").iterdir()]
    assert sorted(tuple(table.column("weights")[0].as_py()) for table in tables) == [
        (),
        (0.0, 1.0),
        (0.0, 1.0),
        (1.0, 0.0),
        (1.0, 0.0),
    ]
    assert all(table.num_rows == 15 for table in tables)


def test_a_second_sweep_makes_nothing_again_and_more_points_only_the_new_ones(swept):
    before = {path.name: path.stat().st_mtime_ns for path in (swept / "sweep/points").iterdir()}
    told = Told()
    sweep(engine="hf", points=3, progress=told)
    after = {path.name: path.stat().st_mtime_ns for path in (swept / "sweep/points").iterdir()}
    assert all(after[name] == time for name, time in before.items()) and len(after) == 7
    assert told.finished[0] == (5, "points already there") and len(told.finished) == 3 and set(told.totals) == {7}
    # What only prepares is not part of the count.
    prepared = ("loading rewards", "opening checkpoints", "building the engine")
    assert [told.steps[name] for name in prepared] == [False, False, False]
    assert told.steps["generating soup λ=0.5,0.5"] and told.steps["KL of lines λ=0.5,0.5"]
    assert any(name.startswith("scoring letters: 0 of ") for name in told.steps)
    assert sweep(engine="hf", points=3).header["evaluated_last"] == 0


def refused(**options):
    with pytest.raises(UserError, match="belongs to another configuration") as caught:
        sweep(engine="hf", points=2, **options)
    return str(caught.value)


def test_runs_without_the_caps_of_attention_are_begun_anew(swept, monkeypatch):
    """Earlier versions left them out of a model such as Gemma 2."""
    monkeypatch.setattr("rewarded_lines.evaluator.sweep_setup.attention_of", lambda _: {"attn_implementation": "eager"})
    assert "engine.attn_implementation" in refused()


def test_a_changed_configuration_is_refused_and_shown_or_begun_anew(swept):
    before = {path.name: path.read_bytes() for path in (swept / "sweep/points").iterdir()}
    project = swept / "rewarded-lines.yaml"
    project.write_text(project.read_text().replace("max_tokens: 12", "max_tokens: 9"))
    assert "generation.max_tokens: 12 → 9" in refused() and "--overwrite" in refused()
    assert {path.name: path.read_bytes() for path in (swept / "sweep/points").iterdir()} == before
    run = sweep(engine="hf", points=2, overwrite=True)
    assert run.header["evaluated_last"] == 5 and (run.sft.tokens <= 9).all()
    assert not before.keys() & {path.name for path in (swept / "sweep/points").iterdir()}
    # Of the same configuration, it is gone on with.
    assert sweep(engine="hf", points=2, overwrite=True).header["evaluated_last"] == 0


def test_whatever_records_depend_on_is_part_of_the_configuration(swept):
    source = (swept / "rewards.py").read_text()
    (swept / "rewards.py").write_text(source.replace("len(response.split())", "2 * len(response.split())"))
    assert "rewards.words.fingerprint" in refused()
    (swept / "rewards.py").write_text(source)
    config = swept / "sft/generation_config.json"
    text = config.read_text()
    config.write_text(text.replace('"eos_token_id": 2', '"eos_token_id": 3'))
    assert "base: " in refused()
    config.write_text(text)
    assert "blocks: " in refused(layers=r"model\.layers\.([0-9]+)\.mlp\.")
    (swept / "test.jsonl").write_text('{"prompt": "a film"}\n')
    assert "prompts: " in refused()


def test_what_records_do_not_depend_on_may_change(swept):
    project = swept / "rewarded-lines.yaml"
    text = project.read_text().replace("    unit: words", "    unit: words\n    batch_size: 3\n    workers: 1")
    project.write_text(
        text.replace("title: tiny", "title: other").replace("  points: 3", "  points: 3\n  resamples: 200")
    )
    # As trainers leave them in their output.
    for folder in ("sft/checkpoint-80", "sft/runs/today", "policies/words/checkpoint-80"):
        shutil.copytree(swept / "sft", swept / folder, ignore=shutil.ignore_patterns("checkpoint-80", "runs"))
    assert sweep(engine="hf", points=2).header["evaluated_last"] == 0


def test_too_few_points_are_refused(tiny):
    for points in (0, 1):
        with pytest.raises(UserError, match="2 or more"):
            sweep(engine="hf", points=points)


def test_a_sweep_that_dies_keeps_its_finished_points(tiny, monkeypatch):
    scored = LocalEvaluator._scored

    def dying(evaluator, *given):
        for key, point in scored(evaluator, *given):
            if point.spec.lam == 1.0:
                raise KeyboardInterrupt
            yield key, point

    monkeypatch.setattr(LocalEvaluator, "_scored", dying)
    with pytest.raises(KeyboardInterrupt):
        sweep(engine="hf", points=2)
    assert json.loads((tiny / "sweep/run.json").read_text())["complete"] is False
    assert len(load_run(tiny / "sweep").points) == 2
    assert list((tiny / "sweep/drafts").iterdir())
    monkeypatch.setattr(LocalEvaluator, "_scored", scored)
    monkeypatch.setattr(LocalEvaluator, "_drafts", no_generation)
    run = sweep(engine="hf", points=2)
    assert run.header["evaluated_last"] == 3 and not list((tiny / "sweep/drafts").iterdir())


def no_generation(*_):
    """Fail if a response is generated: all drafts exist already."""
    raise AssertionError("a response was generated")


def test_a_damaged_record_is_told_and_made_again(swept):
    path = next((swept / "sweep/points").iterdir())
    whole = path.read_bytes()
    for damage in (whole[: len(whole) // 2], b"", whole.replace(b"the quick", b"the slick", 1)):
        path.write_bytes(damage)
        with pytest.raises(UserError, match="not a whole point record"):
            load_run(swept / "sweep")
        assert sweep(engine="hf", points=2).header["evaluated_last"] == 1
        assert path.read_bytes() == whole


@pytest.mark.slow
def test_every_damaged_byte_is_found_or_does_not_matter(swept):
    path = next((swept / "sweep/points").iterdir())
    whole, point = path.read_bytes(), read_point(path)
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            found = read_point(path)
        except UserError:
            continue
        assert found.responses == point.responses and (found.kl == point.kl).all()
        assert all((found.scores[name] == scores).all() for name, scores in point.scores.items())


def test_a_reward_that_fails_names_the_response_and_keeps_what_was_scored(tiny):
    source = (tiny / "rewards.py").read_text()
    calls = "import pathlib\n\n\ndef words(prompts, responses):\n    for p, r in zip(prompts, responses):\n"
    calls += (
        "        with pathlib.Path(__file__).with_name('calls').open('a') as log:\n            log.write(repr(r))\n"
    )
    calls += "        if p == 'dog' and not pathlib.Path(__file__).with_name('mended').exists():\n"
    calls += "            raise RuntimeError('no dogs')\n    return [len(r.split()) for r in responses]\n"
    (tiny / "rewards.py").write_text(source.replace(source[: source.index("def letters")], calls + "\n\n"))
    with pytest.raises(UserError, match="(?s)reward `words`.*no dogs.*'dog' → "):
        sweep(engine="hf", points=2)
    before = (tiny / "calls").read_text()
    (tiny / "mended").touch()
    run = sweep(engine="hf", points=2)
    assert run.header["complete"]
    again = (tiny / "calls").read_text()[len(before) :]
    first = run.sft.responses[run.sft.prompts.index("the quick")]
    assert repr(first) in before and repr(first) not in again


def test_two_at_once_are_kept_apart(tiny):
    (tiny / "sweep").mkdir()
    with folder_lock(tiny / "sweep"), pytest.raises(UserError, match="another process"):
        sweep(engine="hf", points=2)
    assert sweep(engine="hf", points=2).header["complete"]


def test_a_folder_of_something_else_is_left_alone(tiny):
    with pytest.raises(UserError, match="holds something else"):
        sweep(engine="hf", out="sft")


def test_three_policies_take_the_simplex(tiny):
    text = (tiny / "rewarded-lines.yaml").read_text().replace("policies:\n", "policies:\n  again: first\n")
    (tiny / "rewarded-lines.yaml").write_text(text)
    run = sweep(engine="hf", points=2)
    assert {p.spec.weights for p in run.methods()["soup"]} == {(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)}


def methods(tiny, text, more=""):
    project = tiny / "rewarded-lines.yaml"
    head = project.read_text().split("sweep:")[0]
    project.write_text(f"{head}sweep:\n  points: 3\n  methods: {text}\n{more}")


def test_every_kind_of_method(tiny):
    methods(tiny, "[soup, lines, uniform, reversed, ties, policies]")
    with (tiny / "rewarded-lines.yaml").open("a") as file:
        file.write("baselines:\n  morl: second\n")
    run = sweep(engine="hf")
    found = run.methods()
    assert {name: len(points) for name, points in found.items()} == {
        "soup": 3,
        "lines": 3,
        "uniform": 3,
        "reversed": 3,
        "ties": 3,
        "policies": 2,
        "baselines": 1,
    }
    assert [point.spec.checkpoint for point in found["policies"]] == ["second", "first"]
    # A policy is a soup's end: one record for both.
    assert found["policies"][1].responses == found["soup"][2].responses
    assert len(list((tiny / "sweep/points").iterdir())) == 1 + 5 * 3 + 1
    assert found["baselines"][0].responses == found["soup"][0].responses
    (reversed_point, *_) = found["reversed"]
    assert (reversed_point.spec.merge.alpha, reversed_point.spec.merge.beta) == (2.0, -1.0)


def test_uniform_has_the_norm_of_lines(tiny):
    import torch
    from safetensors.torch import load_file

    methods(tiny, "[lines, uniform]")
    points = [point.spec for point in sweep(engine="hf").methods()["uniform"]]
    tensors = {name: load_file(tiny / name / "model.safetensors") for name in ("sft", "first", "second")}
    for spec in points:
        squares = {"lines": 0.0, "plain": 0.0}
        for name, base in tensors["sft"].items():
            residual = sum(
                weight * (tensors[policy][name].double() - base.double())
                for policy, weight in zip(("first", "second"), spec.weights, strict=True)
            )
            block = int(name.split(".")[2]) if ".layers." in name else 0
            squares["lines"] += float(torch.sum(residual**2)) * (1 + block / 3) ** 2
            squares["plain"] += float(torch.sum(residual**2))
        assert spec.merge.alpha == pytest.approx((squares["lines"] / squares["plain"]) ** 0.5, rel=1e-9)
        assert spec.merge.beta == 0.0


def test_a_single_policy_is_edited_beside_wise_ft(tiny):
    project = tiny / "rewarded-lines.yaml"
    project.write_text(project.read_text().replace("  second: second\n", ""))
    methods(tiny, "[edit, wise-ft]")
    run = sweep(engine="hf")
    edits, halfway = (run.methods()[name] for name in ("edit", "wise-ft"))
    schedule = [(one.spec.lam, one.spec.merge.alpha, one.spec.merge.beta) for one in edits]
    assert schedule == [(0, 0, 1), (0.5, 0.5, 0.5), (1, 1, 0)]
    assert [one.spec.lam for one in halfway] == [0, 0.5, 1]
    # The ends are the policy and the base, as far as there are ends.
    assert halfway[0].responses == run.sft.responses
    assert edits[2].responses == halfway[2].responses != run.sft.responses
    spec = GenerationSpec(max_tokens=12)
    merge("sft", ["first"], 1.0, alpha=0.5, beta=0.5, out="edited")
    generator = load_generator("hf", "edited", spec, run.sft.prompts)
    assert edits[1].responses == [response.text for response in generator.generate(run.sft.prompts, spec)[0]]
    command = command_for(run, edits[1].spec)
    assert "/first --alpha 0.5 --beta 0.5 --as full" in command and "--lam" not in command
    summary = summarise(run)
    assert "of `edit` α, and β = 1 − α" in markdown(summary)
    assert method_labels(summary)["edit"] == "LiNeS, edited (α = 0.00 to 1.00, β = 1 − α)"
    least, most = list(schedules(summary))[0]
    assert (least.lines, most.lines) == ((Line(0.0, 1.0),), (Line(1.0, 0.0),))
    # What is written is the merge that was evaluated.
    rows = [row for row in csv.DictReader(io.StringIO(points_csv(summary))) if row["method"] == "edit"]
    assert [(row["weight.first"], row["alpha"], row["beta"]) for row in rows][1] == ("1.0", "0.5", "0.5")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[edit]", "(?s)`edit` is for a single policy.*got: first, second"),
        ("{mine: {edit: true, alpha: 0.5}}", "takes no other key"),
        ("[soups]", "(?s)unknown method `soups`.*did you mean `soup`"),
        ("[greedy]", "greedy soup scores candidates by itself"),
        ("{mine: {match: other}}", "names no method with a schedule"),
        ("{mine: {match: lines, alpha: 2}}", "leave both out"),
        ("{mine: {merge: ties, options: {density: 2}}}", "sweep.methods.mine: density: out of range"),
        ("{lines: {merge: tie}, uniform: {match: lines}}", "sweep.methods.lines: method"),
        ("{mine: {match: lines, merge: sooup}}", "sweep.methods.mine: method"),
        ("{mine: {checkpoints: [absent]}}", "no such checkpoint"),
        ("{baselines: {alpha: 1}}", "`baselines` is the list of the baselines"),
        ("{sft: {alpha: 1}}", "`sft` is the base model, which is always evaluated"),
        ("[soup, soup]", "named twice"),
    ],
)
def test_methods_that_cannot_be(tiny, text, said):
    methods(tiny, text)
    with pytest.raises(UserError, match=said):
        sweep(engine="hf")
    assert not (tiny / "sweep").exists()


def test_a_method_that_cannot_be_is_told_of_the_file_that_names_it(tiny):
    methods(tiny, "[soups]")
    (tiny / "own.yaml").write_text("extends: rewarded-lines.yaml\ntitle: mine\n")
    with pytest.raises(UserError, match="unknown method") as caught:
        sweep("own.yaml", engine="hf")
    assert [problem.where for problem in caught.value.problems] == ["rewarded-lines.yaml: sweep.methods.soups"]


@pytest.mark.parametrize(
    ("text", "where", "said"),
    [
        ("{fil: a.jsonl}", "control", "did you mean `file`"),
        ("{file: a.jsonl, colums: {text: x}}", "control", "did you mean `columns`"),
        ("{reviews: , chat: {file: a.jsonl}}", "control.reviews", "valid dictionary"),
        ("{chat: {fil: a.jsonl}}", "control.chat", "did you mean `file`"),
        ("{columns: {text: x}}", "control", "name either `file:` or `dataset:`"),
    ],
)
def test_control_texts_that_cannot_be(tiny, text, where, said):
    with (tiny / "rewarded-lines.yaml").open("a") as file:
        file.write(f"control: {text}\n")
    with pytest.raises(UserError, match=said) as caught:
        sweep(engine="hf")
    assert [problem.where.rpartition(": ")[2] for problem in caught.value.problems] == [where]


def test_several_samples_control_texts_and_an_audit(tiny, capsys):
    project = tiny / "rewarded-lines.yaml"
    text = project.read_text().replace("  max_tokens: 12", "  max_tokens: 12\n  n: 3")
    project.write_text(text.replace("function: rewards.py:letters", "function: rewards.py:letters\n    role: audit"))
    (tiny / "control.jsonl").write_text('{"text": "a film of great beauty"}\n{"text": "the lazy dog"}\n')
    with project.open("a") as file:
        file.write("control: {fables: {file: cont*.jsonl}, films: {file: control.jsonl, limit: 1}}\n")
        file.write("engine: {max_num_seqs: 4}\n")
    run = sweep(engine="hf", points=2)
    assert run.header["control"]["texts"] == {"fables": 2, "films": 1}
    notes = run.header["told"]
    assert notes[0] == "`engine:` is for vLLM; --engine hf does not take max_num_seqs"
    assert "control fables, cont*.jsonl: the file control.jsonl" in notes
    for header, told in ((run.header, notes), ({"prompts": {"told": notes}}, notes), ({"prompts": {}}, [])):
        # Earlier versions kept notes with the prompts.
        capsys.readouterr()
        tell_rows(header, quiet=False)
        assert capsys.readouterr().err.splitlines() == told
    assert run.objectives == ["words"]
    for point in run.points:
        assert point.prompt_index.tolist() == [index for index in range(15) for _ in range(3)]
        assert len(set(point.seeds.tolist())) == 45
        assert point.control.shape == (3, 2) and (point.control > 0).all()
        assert point.control[2] == pytest.approx(point.control[0])
    assert len({tuple(run.sft.responses[:3])}) == 1 and len(set(run.sft.responses[:3])) > 1


def test_control_texts_are_scored_as_the_model_itself_scores_them(tiny):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (tiny / "control.jsonl").write_text('{"text": "a film of great beauty"}\n')
    with (tiny / "rewarded-lines.yaml").open("a") as file:
        file.write("control:\n  file: control.jsonl\n")
    run = sweep(engine="hf", points=2)
    for point, folder in ((run.sft, "sft"), (run.methods()["soup"][1], "first")):
        model = AutoModelForCausalLM.from_pretrained(tiny / folder).eval()
        ids = AutoTokenizer.from_pretrained(tiny / folder)("a film of great beauty", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            loss = float(model(input_ids=ids, labels=ids).loss)
        nats, tokens = point.control[0]
        assert nats / tokens == pytest.approx(loss, abs=1e-4) and tokens == ids.shape[1] - 1


def test_tuning_looks_at_validation_prompts_only_and_is_resumed(tiny):
    pytest.importorskip("optuna")
    (tiny / "validation.jsonl").write_text("".join(f'{{"prompt": "a film {i}"}}\n' for i in range(6)))
    tune = "  tune: {trials: 4, points: 2, prompts: {file: validation.jsonl}}\n"
    methods(tiny, "[soup]", tune)
    run = sweep(engine="hf")
    tuned = run.header["tuned"]
    assert len(tuned["trials"]) == 4 and tuned["prompts"] == {**tuned["prompts"], "count": 6, "in_test": 0}
    best = max(tuned["trials"], key=lambda trial: trial["hypervolume"])
    assert (tuned["alpha"], tuned["beta"]) == (best["alpha"], best["beta"])
    points = run.methods()["tuned"]
    assert [point.spec.weights for point in points] == [(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)]
    assert {(point.spec.merge.alpha, point.spec.merge.beta) for point in points} == {(best["alpha"], best["beta"])}
    assert all(point.prompts == run.sft.prompts for point in points)
    # The test prompts were answered by the chosen schedule alone: every other record is of validation prompts.
    records = [read_point(path) for path in (tiny / "sweep/points").iterdir()]
    on_test = [point for point in records if point.prompts == run.sft.prompts]
    assert len(on_test) == len(run.points) - sum(p.spec.merge.alpha == 1 and p.spec.merge.beta == 0 for p in points)
    again = sweep(engine="hf")
    assert again.header["evaluated_last"] == 0 and again.header["tuned"] == tuned


def test_tuning_on_the_test_prompts_is_refused(tiny):
    methods(tiny, "[soup]", "  tune: {trials: 2, prompts: {file: test.jsonl}}\n")
    with pytest.raises(UserError, match="validation prompts are test prompts"):
        sweep(engine="hf")


def test_a_reward_that_fails_while_tuning_is_told_once(tiny, cli):
    (tiny / "validation.jsonl").write_text('{"prompt": "a film 1"}\n')
    methods(tiny, "[soup]", "  tune: {trials: 2, points: 2, prompts: {file: validation.jsonl}}\n")
    # SFT's point comes first, and alone.
    fault = "    if (calls := globals().setdefault('calls', [])) and len(calls) > 1:\n        raise ValueError('no')\n"
    text = (tiny / "rewards.py").read_text().replace("responses):\n", f"responses):\n{fault}    calls.append(1)\n", 1)
    (tiny / "rewards.py").write_text(text)
    answer = cli("sweep", "--engine", "hf", "--quiet")
    assert answer.code == 1 and "Traceback" not in answer.err and "Trial" not in answer.err
    assert "the function raised ValueError: no" in answer.err


def test_policies_in_another_order_are_another_run(swept):
    path = swept / "rewarded-lines.yaml"
    path.write_text(
        path.read_text().replace("  first: first\n  second: second\n", "  second: second\n  first: first\n")
    )
    with pytest.raises(UserError, match="the order of the policies: first, second → second, first"):
        sweep(engine="hf", points=2)
    run = sweep(engine="hf", points=2, overwrite=True)
    assert run.header["evaluated_last"] == 5 and list(run.header["policies"]) == ["second", "first"]


def test_an_adapter_scaled_otherwise_is_another_policy(tiny):
    for seed, name in enumerate(("first", "second"), start=1):
        shutil.rmtree(tiny / name)
        save_adapter(tiny / "sft", tiny / name, seed)
    sweep(engine="hf", points=2)
    path = tiny / "first/adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 6', '"lora_alpha": 60'))
    with pytest.raises(UserError, match="(?s)belongs to another configuration.*policies.first"):
        sweep(engine="hf", points=2)


def test_control_texts_are_cut_to_what_gpt2_holds(tiny):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    for seed, name in enumerate(("sft", "first", "second")):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config)
        shutil.rmtree(tiny / name)
        save_model(perturb(model, seed) if seed else model, tiny / name)
    (tiny / "control.jsonl").write_text(json.dumps({"text": "a film of great beauty " * 60}) + "\n")
    with (tiny / "rewarded-lines.yaml").open("a") as file:
        file.write("control:\n  file: control.jsonl\n")
    run = sweep(engine="hf", points=2)
    assert run.sft.control.shape == (1, 2) and run.sft.control[0, 1] > 64


def test_a_home_folder_may_be_meant_wherever_a_file_is_named(tiny, cli, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny))
    (tiny / "template.jinja").write_text("{{ messages[0].content }}")
    path = tiny / "rewarded-lines.yaml"
    text = path.read_text().replace("rewards.py:", "~/rewards.py:").replace("test.jsonl", "~/test.jsonl\n  chat: true")
    path.write_text(text.replace("  max_tokens: 12", "  max_tokens: 12\n  chat_template: ~/template.jinja"))
    assert len(sweep(engine="hf", points=2).points) == 5


def test_a_chat_template_that_is_not_there_is_told_by_its_key(tiny, cli):
    path = tiny / "rewarded-lines.yaml"
    path.write_text(path.read_text().replace("  max_tokens: 12", "  max_tokens: 12\n  chat_template: no.jinja"))
    answer = cli("sweep", "--engine", "hf")
    assert answer.code == 1 and "generation.chat_template: no.jinja: the chat template cannot be read" in answer.err


@pytest.mark.parametrize("command", ["sweep", "search"])
def test_workers_are_for_ray(tiny, cli, command):
    answer = cli(command, *(["sweep"] if command == "search" else []), "--workers", 2)
    assert answer.code == 1 and "--workers: workers need Ray" in answer.err
