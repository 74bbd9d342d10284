"""A project file overrides the keys of the file that it extends; a fault names its own file."""

import shutil
from pathlib import Path

import pytest
import yaml

from rewarded_lines.errors import UserError
from rewarded_lines.projects import load_project, named_places, save_project, with_places
from rewarded_lines.training.register_model import register

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "eval" / "results" / "packages"
SUITE = """\
rewards:
  brief: {function: "rewards.py:brief", unit: words, role: audit}
  kind: {function: "rewards.py:kind"}
prompts: {file: data/test.jsonl, limit: 64}
sweep:
  points: 11
  methods:
    soup: {beta: 0.0}
    lines:
"""


@pytest.fixture
def write(tmp_path):
    """Write the files of a folder, with a `suite.yaml`."""

    def write(**files):
        for name, text in {"suite": SUITE, **files}.items():
            (tmp_path / f"{name}.yaml").write_text(text)
        return tmp_path

    return write


def refused(path):
    with pytest.raises(UserError) as caught:
        load_project(path)
    return str(caught.value)


def test_without_a_word_of_its_own_it_is_the_other_file(write):
    folder = write(own="extends: suite.yaml\n")
    assert load_project(folder / "own.yaml").config == load_project(folder / "suite.yaml").config


def test_mappings_are_merged_and_anything_else_is_replaced(write):
    own = "base: sft\nrewards: {brief: {role: objective}}\nsweep: {methods: [edit], resamples: 200}\n"
    folder = write(own=own + "extends: suite.yaml\n")
    expected = yaml.safe_load(SUITE) | {"base": "sft"}
    expected["rewards"]["brief"]["role"] = "objective"
    expected["sweep"] |= {"methods": ["edit"], "resamples": 200}
    (folder / "whole.yaml").write_text(yaml.safe_dump(expected))
    assert load_project(folder / "own.yaml").config == load_project(folder / "whole.yaml").config


@pytest.mark.parametrize("methods", ["[ties]", "{ties: }"])
def test_methods_are_what_this_file_lists(write, methods):
    folder = write(own=f"extends: suite.yaml\nsweep: {{methods: {methods}}}\n")
    sweep = load_project(folder / "own.yaml").config.sweep
    assert list(sweep.methods) == ["ties"] and sweep.points == 11


def test_methods_stay_where_this_file_names_none(write):
    folder = write(own="extends: suite.yaml\nsweep: {points: 3}\n")
    assert list(load_project(folder / "own.yaml").config.sweep.methods) == ["soup", "lines"]
    write(own="extends: suite.yaml\nsweep: {methods: null, points: 3}\n", suite=SUITE.replace("soup:", "edit:"))
    assert list(load_project(folder / "own.yaml").config.sweep.methods) == ["soup", "lines"]


def test_a_file_may_extend_one_that_extends_another(write):
    folder = write(middle="extends: suite.yaml\nbase: one\ntitle: Middle\n", own="extends: middle.yaml\nbase: two\n")
    config = load_project(folder / "own.yaml").config
    assert (config.base, config.title, list(config.rewards)) == ("two", "Middle", ["brief", "kind"])


def test_paths_are_those_of_the_file_that_extends(tmp_path, write):
    suite = write().joinpath("suite.yaml")
    (tmp_path / "run" / "data").mkdir(parents=True)
    path = tmp_path / "run" / "own.yaml"
    path.write_text(f"extends: ../{suite.name}\n")
    assert load_project(path).resolve("data/test.jsonl") == str(tmp_path / "run" / "data" / "test.jsonl")


def test_a_recipe_adds_to_the_file_itself(write):
    folder = write(own="extends: suite.yaml # the rest\n")
    register(str(folder / "own.yaml"), {("policies", "kind"): folder / "kind"})
    assert (folder / "own.yaml").read_text() == "extends: suite.yaml # the rest\npolicies:\n  kind: kind\n"
    assert (folder / "suite.yaml").read_text() == SUITE
    assert load_project(folder / "own.yaml").config.policies == {"kind": "kind"}


def test_a_fault_is_told_of_the_file_that_has_it(write):
    folder = write(suite=SUITE + "swep: 1\n", own="extends: suite.yaml\nbase: sft\n")
    assert "suite.yaml: top level: unknown key `swep`" in refused(folder / "own.yaml")
    write(own="extends: suite.yaml\nrewards: {brief: {rol: audit}}\n")
    message = refused(folder / "own.yaml")
    assert "own.yaml: rewards.brief: unknown key `rol`" in message and "did you mean `role`" in message


@pytest.mark.parametrize(
    ("keys", "place"),
    [
        (("rewards", "kind"), "suite.yaml: rewards.kind"),
        (("sweep", "methods", "soup"), "suite.yaml: sweep.methods.soup"),
        (("rewards", "brief"), "middle.yaml: rewards.brief"),
        (("sweep", "tune"), "own.yaml: sweep.tune"),
        (("base",), "own.yaml: base"),
        (("sweep", "references", "floor"), "own.yaml: sweep.references.floor"),
    ],
)
def test_an_entry_is_where_the_nearest_file_says_it(write, keys, place):
    tune = "tune: {trials: 1, prompts: {file: a.jsonl}}"
    middle = "extends: suite.yaml\nrewards: {brief: {role: audit}}\n"
    folder = write(middle=middle, own=f"extends: middle.yaml\nbase: sft\nsweep: {{{tune}}}\n")
    assert load_project(folder / "own.yaml").where(*keys) == f"{folder}/{place}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base: one\nbase: two\n", "`base` is given twice at line 2, column 1"),
        ("policies: {first: a, first: b}\n", "`first` is given twice"),
        ("title: 2024-02-30\n", "day is out of range"),
        ("title: !!int abc\n", "invalid literal"),
        (f"title: {'[' * 3000}\n", "recursion"),
    ],
)
def test_what_yaml_cannot_say_is_told_of_the_file(tmp_path, text, said):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    message = refused(path)
    assert message.startswith(f"{path}: not readable as YAML") and said in message


def test_what_a_merge_key_brings_is_not_given_twice(tmp_path):
    path = tmp_path / "own.yaml"
    shared = "prompts: &shared {file: a.jsonl, limit: 3}\ncontrol: {more: {<<: *shared, limit: 4}}\n"
    path.write_text(shared)
    assert load_project(path).config.control["more"].limit == 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("policies: [a, b]\n", "policies: (.|\n)*expected: a mapping: lines `KEY: VALUE`"),
        ("prompts: a.jsonl\n", "prompts: (.|\n)*expected: a mapping: lines `KEY: VALUE`"),
        ('generation: {stop: "x"}\n', r"generation.stop: (.|\n)*expected: a list: \[VALUE, …\]"),
        ("generation: {stop: ['\\n']}\n", "a stop text has a backslash and a letter"),
        ('rewards: {yes: {function: "a.py:b"}}\n', "rewards: a name that is no text(.|\n)*write the name in quotes"),
        ("policies: {1: a}\n", "policies: a name that is no text"),
        ("title: 2026-11-28\n", "title: (.|\n)*write it in quotes"),
    ],
)
def test_a_value_of_another_form_is_told_in_the_words_of_yaml(tmp_path, text, said):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(UserError, match=said):
        load_project(tmp_path / "p.yaml")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("sweep: {references: {floor: {brief: .nan}}}", "sweep.references.floor.brief"),
        ("sweep: {methods: {lines: {alpha: .inf}}}", "sweep.methods.lines.alpha"),
        ("sweep: {tune: {trials: 1, prompts: {file: a.jsonl}, beta: [0, .inf]}}", "sweep.tune.beta.1"),
        ("generation: {temperature: .inf}", "generation.temperature"),
        ("sweep: {step: 1.0e-320}", "sweep"),
        ("sweep: {step: .nan}", "sweep"),
    ],
)
def test_numbers_are_finite(tmp_path, text, place):
    path = tmp_path / "own.yaml"
    path.write_text(text + "\n")
    message = refused(path)
    assert message.startswith(f"{path}: {place}: ") and ("finite number" in message or "does not divide 1" in message)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_numbers_with_a_power_of_ten_are_numbers(tmp_path, encoding):
    """PyYAML takes 1e-1 for a text; Windows PowerShell writes UTF-16."""
    text = f"# λ\n{SUITE.replace('points: 11', 'step: 1e-1')}    ties: {{options: {{density: 2e-1, seed: 1}}}}\n"
    (tmp_path / "own.yaml").write_text(text + "engine: {gpu_memory_utilization: .9e0}\n", encoding=encoding)
    config = load_project(tmp_path / "own.yaml").config
    assert (config.sweep.points, config.engine.args) == (11, {"gpu_memory_utilization": 0.9})
    assert config.sweep.methods["ties"].options == {"density": 0.2, "seed": 1}


def test_a_text_that_looks_like_a_number_stays_a_text(tmp_path, write):
    config = load_project(write() / "suite.yaml").config.model_copy(update={"title": "1e-6", "base": "12e5"})
    save_project(tmp_path / "own.yaml", config)
    again = load_project(tmp_path / "own.yaml").config
    assert (again.title, again.base) == ("1e-6", "12e5")


def test_a_mistyped_extends_is_known(write):
    message = refused(write(own="extend: suite.yaml\n") / "own.yaml")
    assert "unknown key `extend`" in message and "did you mean `extends`" in message


@pytest.mark.parametrize(
    "name", ["[suite.yaml]", "", '""', "3", "nowhere.yaml", ".", '"a\\0b"', "x" * 300, "loop.yaml"]
)
def test_what_is_extended_must_be_one_file_that_is_there(write, name):
    folder = write(own=f"extends: {name}\n")
    (folder / "loop.yaml").symlink_to("loop.yaml")
    message = refused(folder / "own.yaml")
    assert message.startswith(f"{folder / 'own.yaml'}: extends: ") and "expected: one project file or suite" in message


@pytest.mark.parametrize("text", ["", "- a\n", "a: [\n"])
def test_an_extended_file_that_is_no_project_is_told(write, text):
    folder = write(suite=text, own="extends: suite.yaml\n")
    assert refused(folder / "own.yaml").startswith(str(folder / "suite.yaml"))


def test_a_home_folder_may_be_meant(write, monkeypatch):
    folder = write(own="extends: ~/suite.yaml\n")
    monkeypatch.setenv("HOME", str(folder))
    assert list(load_project(folder / "own.yaml").config.rewards) == ["brief", "kind"]


def test_null_takes_out_what_is_inherited(write):
    own = (
        "extends: suite.yaml\nrewards: {brief: null}\nprompts: {file: null, dataset: org/set}\nsweep: {points: null}\n"
    )
    config = load_project(write(own=own) / "own.yaml").config
    assert list(config.rewards) == ["kind"] and config.prompts.dataset == "org/set" and config.sweep.points is None


def test_a_step_takes_the_place_of_points_and_back(write):
    folder = write(step="extends: suite.yaml\nsweep: {step: 0.25}\n", points="extends: step.yaml\nsweep: {points: 3}\n")
    assert load_project(folder / "step.yaml").config.sweep.points == 5
    assert load_project(folder / "points.yaml").config.sweep.points == 3


ONE, NAMED = "control: {file: a.jsonl}\n", "control: {chat: {file: b.jsonl, limit: 9}, news: {file: c.jsonl}}\n"


@pytest.mark.parametrize(
    ("under", "own", "sets"),
    [
        (ONE, "control: {file: d.jsonl}\n", {"control": ("d.jsonl", None)}),
        (NAMED, ONE, {"control": ("a.jsonl", None)}),
        (ONE, NAMED, {"chat": ("b.jsonl", 9), "news": ("c.jsonl", None)}),
        (NAMED, "control: {chat: {limit: 2}, news: null}\n", {"chat": ("b.jsonl", 2)}),
        (NAMED, "control: null\n", {}),
    ],
)
def test_control_texts_are_merged_where_both_have_names(write, under, own, sets):
    folder = write(suite=SUITE + under, own="extends: suite.yaml\n" + own)
    control = load_project(folder / "own.yaml").config.control
    assert {name: (spec.file, spec.limit) for name, spec in control.items()} == sets


def test_a_recipe_leaves_alone_what_the_project_says_already(write):
    folder = write(suite=SUITE + "base: sft\npolicies: {kind: old}\n", own="extends: suite.yaml\n")
    path = folder / "own.yaml"
    assert register(str(path), {("base",): "sft"}) == []
    assert path.read_text() == "extends: suite.yaml\n"
    assert register(str(path), {("policies", "kind"): folder / "new"}) == [f"{path}: policies.kind: new (was old)"]
    assert load_project(path).config.policies == {"kind": "new"}


@pytest.mark.parametrize("name", sorted(path.name for path in RECORDS.glob("*.yaml")))
def test_the_projects_of_the_records_are_projects_where_they_are_copied(tmp_path, name):
    shutil.copytree(ROOT / "eval" / "suites", tmp_path / "eval" / "suites")
    (tmp_path / "runs" / "smollm2").mkdir(parents=True)
    for path in RECORDS.glob("*.yaml"):
        shutil.copy(path, tmp_path / "runs" / "smollm2")
    config = load_project(tmp_path / "runs" / "smollm2" / name).config
    assert set(config.policies) <= set(config.rewards)
    named = {one for spec in config.sweep.methods.values() if spec for one in spec.checkpoints}
    assert named == set(config.baselines)


def test_a_circle_is_told(write):
    folder = write(one="extends: two.yaml\n", two="extends: one.yaml\n")
    message = refused(folder / "one.yaml")
    assert "extends itself" in message and "one.yaml → " in message


def test_a_templates_variable_is_no_place():
    content = {"base": "sft", "generation": {"chat_template": "t.jinja", "chat_template_kwargs": {"file": "a"}}}
    assert list(named_places(content)) == [("base", "model", "sft"), ("generation.chat_template", "code", "t.jinja")]


def test_every_place_is_moved_and_nothing_else():
    content = {
        "title": "sft",
        "base": "sft",
        "policies": {"a.b": "ppo"},
        "rewards": {"words": {"function": "rewards.py:words", "unit": "rewards.py"}, "kind": {"model": "kind"}},
        "prompts": {"file": "data/*.jsonl", "rows": "rows.py:whole", "limit": 3},
        "generation": {"chat_template": "t.jinja", "chat_template_kwargs": {"file": "a"}},
        "sweep": {
            "methods": {"soup": None, "a": {"schedule": "s.txt"}, "b": {"schedule": {"p": "s.txt", "q": "1,1e-1"}}}
        },
    }
    assert with_places(content, lambda kind, name: f"{kind}/{name}") == {
        "title": "sft",
        "base": "model/sft",
        "policies": {"a.b": "model/ppo"},
        "rewards": {
            "words": {"function": "code/rewards.py:words", "unit": "rewards.py"},
            "kind": {"model": "model/kind"},
        },
        "prompts": {"file": "data/data/*.jsonl", "rows": "code/rows.py:whole", "limit": 3},
        "generation": {"chat_template": "code/t.jinja", "chat_template_kwargs": {"file": "a"}},
        "sweep": {
            "methods": {
                "soup": None,
                "a": {"schedule": "schedule/s.txt"},
                "b": {"schedule": {"p": "schedule/s.txt", "q": "1,1e-1"}},
            }
        },
    }
