"""The short and the long form of the demo: the same job, of another length."""

import pytest
import yaml

from rewarded_lines.demo.demo_settings import ADAPTER_RATES, LONG_SUITE, LONGER, DemoSettings, default_out
from rewarded_lines.demo.parts import parts_of
from rewarded_lines.demo.pipeline import run_demo
from rewarded_lines.demo.stages import ALGORITHMS, PLAN, STAGES
from rewarded_lines.errors import UserError
from rewarded_lines.projects import load_project


def test_run_folders_by_algorithm_seed_and_form():
    keys = (
        *(("ppo", 0), ("ppo", 2), ("dpo", 0), ("dpo", 1), ("ppo", 0, True), ("dpo", 1, True)),
        *(("ppo", 0, False, True), ("grpo", 1, True, True)),
    )
    assert [str(default_out(*key)) for key in keys] == [
        "runs/demo",
        "runs/demo-seed2",
        "runs/demo-dpo",
        "runs/demo-dpo-seed1",
        "runs/demo-full",
        "runs/demo-full-dpo-seed1",
        "runs/demo-lora",
        "runs/demo-full-lora-grpo-seed1",
    ]


def test_the_suites_differ_in_size_alone(tmp_path):
    short, long = (load_project(DemoSettings(tmp_path, full=full).suite).config for full in (False, True))
    assert (long.prompts.limit, long.control["control"].limit, long.sweep.points) == (300, 200, 11)
    assert (short.prompts.limit, short.control["control"].limit, short.sweep.points) < (300, 200, 11)
    sizes = {
        "prompts": short.prompts.model_copy(update={"limit": 300}),
        "control": {"control": short.control["control"].model_copy(update={"limit": 200})},
        "sweep": short.sweep.model_copy(update={"points": 11}),
    }
    assert short.model_copy(update=sizes) == long
    assert DemoSettings(tmp_path, full=True, suite=tmp_path / "own.yaml").suite == tmp_path / "own.yaml" != LONG_SUITE


def test_the_long_form_overrides_keys_of_the_demos_configs(tmp_path):
    short, long = (DemoSettings(tmp_path, full=full) for full in (False, True))
    for recipe, longer in LONGER.items():
        config = yaml.safe_load((short.configs / f"{recipe}.yaml").read_text())
        assert longer.keys() <= config.keys() and all(str(config[key]) != value for key, value in longer.items())
        stage = recipe if recipe in STAGES else "policies"
        (one, *_), (other, *_) = (parts_of(stage, form, "") for form in (short, long))
        words = [word for key, value in longer.items() for word in (f"--{key}", value)]
        assert one.made_from != other.made_from and sorted({*other.command} - {*one.command}) == sorted({*words})
    assert all(one.long >= one.short > 0 and one.about for one in PLAN.values())
    assert sum(map(short.expected, STAGES)) <= 300


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_adapters_are_trained_of_the_same_sft_and_reward_models(tmp_path, algo):
    whole, lora = (DemoSettings(tmp_path, algo, lora=lora) for lora in (False, True))
    for stage in ("sft", "reward"):
        assert parts_of(stage, whole, "") == parts_of(stage, lora, "")
    for one, other in zip(*(parts_of("policies", form, "") for form in (whole, lora)), strict=True):
        assert one.made_from != other.made_from and one.output == other.output
        rate = float(yaml.safe_load((whole.configs / f"{algo}.yaml").read_text())["learning_rate"])
        assert "--use_peft true" in " ".join(other.command) and float(ADAPTER_RATES[algo]) > rate


@pytest.mark.parametrize(("option", "says"), [("full", "how long training is"), ("lora", "what is trained")])
def test_own_configs_have_no_other_form(tmp_path, option, says):
    (tmp_path / "configs").mkdir()
    with pytest.raises(UserError, match=f"--{option}: own configs say themselves {says}"):
        run_demo(DemoSettings(tmp_path / "run", **{option: True}, engine="hf", configs=tmp_path / "configs"), None)
    assert not (tmp_path / "run").exists()
