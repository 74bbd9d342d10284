"""`merge --from-mergekit`: the command for each YAML, and every refusal. test_mergekit_peer.py runs mergekit itself."""

from __future__ import annotations

import shlex

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file
from tiny_models import make_model, perturb, save_model

from rewarded_lines.errors import UserError
from rewarded_lines.merger.mergekit import read_mergekit

TWO = "[{model: first, parameters: {weight: 0.3}}, {model: second, parameters: {weight: 0.7}}]"
BASE = "--base sft --policy first --policy second"


def said(*lines: str) -> str:
    return "\n".join(lines) + "\n"


def models(*settings: str) -> str:
    names = ("first", "second", "third")
    entries = (f"{{model: {name}, parameters: {{{given}}}}}" for name, given in zip(names, settings, strict=False))
    return f"models: [{', '.join(entries)}]"


CROSSED = [("sft", "[0, 0.5]"), ("first", "[0.75, 0.25]"), ("second", "0.25")]
SAME = {
    "linear over the SFT model": (
        said(
            "merge_method: linear",
            "models: [{model: sft, parameters: {weight: 3}}, {model: first, parameters: {weight: 7}}]",
            "base_model: sft",
        ),
        "--base sft --policy first --lam 0.7 --beta 0 --method wise-ft",
    ),
    "linear, no base: the first model is one": (
        said("merge_method: linear", f"models: {TWO}"),
        "--base first --policy second --lam 0.7 --beta 0 --method wise-ft",
    ),
    "linear, LoRA on one model": (
        said("merge_method: linear", "parameters: {weight: 1}", "models: [{model: sft+first}, {model: sft+second}]"),
        f"{BASE} --lam 0.5 --beta 0 --as full",
    ),
    "task arithmetic": (
        said("merge_method: task_arithmetic", "base_model: sft", models("weight: 1", "weight: -0.5")),
        f"{BASE} --lam 1,-0.5 --beta 0 --method task-arithmetic",
    ),
    "LiNeS in the weights": (
        said(
            "merge_method: task_arithmetic", "base_model: sft", models("weight: [0.28, 0.64]", "weight: [0.42, 0.96]")
        ),
        f"{BASE} --lam 0.4 --alpha 0.7 --beta 0.9",
    ),
    "LiNeS in lambda": (
        said("merge_method: task_arithmetic", "base_model: sft", f"models: {TWO}", "parameters: {lambda: [1, 1.5, 2]}"),
        f"{BASE} --lam 0.3",
    ),
    "normalized, with a filter that makes no difference": (
        said(
            "merge_method: task_arithmetic",
            "base_model: sft",
            models("weight: [{filter: mlp, value: 3}, {value: 3}]", "weight: 7"),
            "parameters: {normalize: true, int8_mask: true}",
        ),
        f"{BASE} --lam 0.3 --beta 0",
    ),
    "ties, mean": (
        said("merge_method: ties", "base_model: sft", models("weight: 1, density: 0.5", "weight: 3, density: 0.5")),
        f"{BASE} --lam 0.25 --beta 0 --method ties --density 0.5 --scope tensor --join mean",
    ),
    "ties, sum, as in mergekit's bio-merge example": (
        said(
            "merge_method: ties",
            "base_model: sft",
            models("weight: 1, density: 0.5", "weight: 3, density: 0.5"),
            "parameters: {normalize: false, int8_mask: true}",
            "dtype: float16",
        ),
        f"{BASE} --lam 0.25 --alpha 4 --beta 0 --method ties --density 0.5 --scope tensor --join sum --dtype float16",
    ),
    "dare_linear": (
        said(
            "merge_method: dare_linear",
            "base_model: sft",
            models("weight: 1", "weight: 3"),
            "parameters: {density: 0.5}",
        ),
        f"{BASE} --lam 0.25 --alpha 4 --beta 0 --method dare --density 0.5 --seed 7",
    ),
    "dare_linear without enlarging": (
        said(
            "merge_method: dare_linear",
            "base_model: sft",
            models("weight: 1", "weight: 3"),
            "parameters: {density: 0.5, rescale: false}",
        ),
        f"{BASE} --lam 0.25 --alpha 2 --beta 0 --method dare --density 0.5 --seed 7",
    ),
    "dare_linear that drops nothing": (
        said("merge_method: dare_linear", "base_model: sft", f"models: {TWO}"),
        f"{BASE} --lam 0.3 --beta 0",
    ),
    "dare_ties": (
        said("merge_method: dare_ties", "base_model: sft", f"models: {TWO}", "parameters: {density: 0.5}"),
        f"{BASE} --lam 0.3 --beta 0 --method dare-ties --density 0.5 --join sum --seed 7",
    ),
    "float64 for the arithmetic alone": (
        said("merge_method: nuslerp", "base_model: sft", f"models: {TWO}", "dtype: float64", "out_dtype: bfloat16"),
        f"{BASE} --lam 0.3 --beta 0 --method slerp --dtype bfloat16",
    ),
    "breadcrumbs": (
        said(
            "merge_method: breadcrumbs",
            "base_model: sft",
            models("weight: 1, density: 0.5", "weight: 3, density: 0.5"),
            "parameters: {gamma: 0.2, lambda: [0.5, 1]}",
        ),
        f"{BASE} --lam 0.25 --alpha 2 --beta 2 --method breadcrumbs --density 0.5 --outliers 0.2 --join all",
    ),
    "breadcrumbs_ties": (
        said("merge_method: breadcrumbs_ties", "base_model: sft", f"models: {TWO}", "parameters: {density: 0.5}"),
        f"{BASE} --lam 0.3 --beta 0 --method breadcrumbs --density 0.5 --outliers 0.01 --join sum",
    ),
    "ram": (
        said("merge_method: ram", "base_model: sft", models("", "")),
        f"{BASE} --lam 0.5 --beta 0 --method ram --changed 1e-05",
    ),
    "ramplus_tl": (
        said("merge_method: ramplus_tl", "base_model: sft", models("", ""), "parameters: {r: 0.3, epsilon: 0.001}"),
        f"{BASE} --lam 0.5 --beta 0 --method ram-plus --changed 0.001 --boost 0.3 --cap 0.2 --scope tensor",
    ),
    "nuslerp": (
        said("merge_method: nuslerp", "base_model: sft", f"models: {TWO}"),
        f"{BASE} --lam 0.3 --beta 0 --method slerp",
    ),
    "a slice of whole models": (
        said(
            "merge_method: task_arithmetic",
            "base_model: sft",
            "slices:",
            "- sources:",
            "  - {model: sft, layer_range: [0, 4]}",
            "  - {model: first, layer_range: [0, 4], parameters: {weight: 0.3}}",
            "  - {model: second, layer_range: [0, 4]}",
            "  parameters: {weight: 0.7}",
            "tokenizer_source: base",
            "out_dtype: bfloat16",
            "dtype: float32",
        ),
        f"{BASE} --lam 0.3 --beta 0 --dtype bfloat16 --tokenizer base",
    ),
    "a card that mergekit wrote": (
        said(
            "base_model: sft",
            "merge_method: task_arithmetic",
            "modules:",
            "  default:",
            "    parameters: {weight: 0.7}",
            "    slices:",
            "    - sources:",
            "      - {model: first, layer_range: [0, 4], parameters: {weight: 0.3}}",
            "      - {model: second, layer_range: [0, 4]}",
            "      - {model: sft, layer_range: [0, 4]}",
            "parameters: {int8_mask: 1.0, normalize: 0.0, weight: 2}",
            "tokenizer_source: union",
            "chat_template: auto",
        ),
        f"{BASE} --lam 0.3 --beta 0",
    ),
    "gradients against each other": (
        said(
            "merge_method: task_arithmetic",
            "base_model: sft",
            models("weight: [0, 0.5, 1]", "weight: [0.75, 0.25]"),
            "parameters: {lambda: 2}",
        ),
        f"{BASE} --lam 1,1 --alpha first=0 --alpha second=1.5 --beta first=2 --beta second=-1 --method task-arithmetic",
    ),
    "linear, from one model to the other": (
        said(
            "merge_method: linear", "models:", *(f"- {{model: {n}, parameters: {{weight: {w}}}}}" for n, w in CROSSED)
        ),
        "--base sft --policy first --policy second --lam 1,1 --alpha first=0.75 --alpha second=0.25"
        " --beta first=-0.5 --beta second=0 --method task-arithmetic",
    ),
    "a policy's tokenizer": (
        said("merge_method: task_arithmetic", "base_model: sft", f"models: {TWO}", "tokenizer: {source: first}"),
        f"{BASE} --lam 0.3 --beta 0 --tokenizer first",
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_a_file_comes_to_a_command(name, tmp_path):
    text, command = SAME[name]
    (tmp_path / "config.yaml").write_text(text)
    seed = 7 if "dare" in text and "density" in text else None
    found = read_mergekit(tmp_path / "config.yaml", seed=seed)
    assert found.command() == f"rewarded-lines merge {command} --out merged"


@pytest.mark.parametrize(
    "name",
    [
        "LiNeS in the weights",
        "gradients against each other",
        "ties, sum, as in mergekit's bio-merge example",
        "nuslerp",
    ],
)
def test_the_merge_is_the_one_that_its_command_makes(name, tiny, cli):
    text, _ = SAME[name]
    (tiny / "config.yaml").write_text(text)
    answer = cli("merge", "--from-mergekit", "config.yaml", "--out", "asked")
    assert answer.code == 0, answer.err
    printed = answer.out.splitlines()[0]
    assert printed.startswith("rewarded-lines merge --base sft ") and printed.endswith(" --out asked")
    assert cli(*shlex.split(printed)[1:-1], "typed").code == 0
    made, typed = (load_file(tiny / folder / "model.safetensors") for folder in ("asked", "typed"))
    assert made.keys() == typed.keys()
    assert all(np.array_equal(made[key].view(np.uint8), typed[key].view(np.uint8)) for key in made)
    assert cli("merge", "--from", "asked", "--out", "again").code == 0


def test_a_file_without_a_base_may_be_given_one(tiny, cli):
    (tiny / "config.yaml").write_text(SAME["linear, no base: the first model is one"][0])
    answer = cli("merge", "--from-mergekit", "config.yaml", "--base", "sft", "--dry-run", "--json")
    assert answer.code == 0, answer.err
    assert "--base sft --policy first --policy second --lam 0.3 --beta 0" in answer.err
    assert yaml.safe_load(answer.out)[0]["weights"] == {"first": 0.3, "second": 0.7}
    assert not (tiny / "merged").exists()


def refused(text: str, folder, **options) -> str:
    path = folder / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_mergekit(path, **options)
    return str(caught.value)


TASK = said("merge_method: task_arithmetic", "base_model: sft")
SOURCE = "{model: first, layer_range: [0, 4]}"
REFUSED = {
    "a key that is none": (TASK + f"models: {TWO}\nout_dtyp: float16\n", "did you mean `out_dtype`?"),
    "a parameter that is none": (TASK + models("wieght: 1", "weight: 1"), "did you mean `weight`?"),
    "no weight": (TASK + "models: [{model: first}]\n", "no `weight`"),
    "a parameter where mergekit overlooks it": (TASK + models("weight: 1, lambda: 2"), "mergekit ignores `lambda`"),
    "a gradient with corners": (TASK + models("weight: [0, 0.3, 1]"), "take the first and last value only"),
    "ties with gradients against each other": (
        said("merge_method: ties", "base_model: sft", models("weight: [0, 1]", "weight: [1, 0]")),
        "same ratio at every depth",
    ),
    "two gradients": (TASK + models("weight: [1, 2]") + "\nparameters: {lambda: [1, 2]}\n", "both change with depth"),
    "weights by name": (TASK + models("weight: [{filter: mlp, value: 1}, {value: 0}]"), "the same value"),
    "a name alone": (TASK + models("weight: {filter: mlp, value: 1}"), "depends on the tensor's name"),
    "no sum to divide by": (
        TASK + models("weight: 1", "weight: -1") + "\nparameters: {normalize: true}\n",
        "no λ with a LiNeS schedule",
    ),
    "a switch that is none": (TASK + f"models: {TWO}\nparameters: {{normalize: perhaps}}\n", "no switch"),
    "two lists of models": (TASK + f"models: {TWO}\nslices: [{{sources: [{SOURCE}]}}]\n", "two lists of them"),
    "modules": (TASK + "modules: {text: {}}\n", "'default'"),
    "a parameter at the top's place": (
        TASK + f"models: {TWO}\nparameters: {{dtype: float16}}\n",
        "the top level, beside",
    ),
    "a base with an adapter": (said("merge_method: ties", "base_model: a+b", f"models: {TWO}"), "--policy b --lam 1"),
    "a model twice": (TASK + "models: [{model: first}, {model: first}]\n", "named twice"),
    "a revision": (TASK + "models: [{model: me/mine@v2}]\n", "MODEL@REVISION"),
    "an adapter on another model": (
        TASK + "models: [{model: other+lora, parameters: {weight: 1}}]\n",
        "an adapter on another model",
    ),
    "a slice of a model": (
        TASK + "slices: [{sources: [{model: first, layer_range: [2, 4]}]}]\n",
        "the slice is not of whole models",
    ),
    "two slices": (TASK + "slices: [{sources: []}, {sources: []}]\n", "not one slice"),
    "tokens added": (TASK + f"models: {TWO}\ntokenizer: {{source: base, tokens: {{}}}}\n", "not chosen one by one"),
    "a chat template": (
        TASK + f"models: {TWO}\nchat_template: chatml\n",
        "takes the chat template of base or policies",
    ),
    "float64": (TASK + f"models: {TWO}\ndtype: float64\n", "not a type to write"),
    "no base": (said("merge_method: ties", f"models: {TWO}"), "no `base_model`"),
    "only the base": (TASK + "models: [{model: sft}]\n", "no model beside the base"),
    "slerp": (said("merge_method: slerp", f"models: {TWO}"), "nuslerp"),
    "a method that is mergekit's alone": (said("merge_method: model_stock", f"models: {TWO}"), "no exact counterpart"),
    "a method misspelt": (said("merge_method: task_aritmetic", f"models: {TWO}"), "did you mean `task_arithmetic`?"),
    "linear with a base outside": (
        said("merge_method: linear", "base_model: sft", f"models: {TWO}"),
        "pass --base sft",
    ),
    "linear of one": (said("merge_method: linear", models("weight: 1")), "nothing to merge"),
    "linear without a sum of 1": (
        said("merge_method: linear", models("weight: 1", "weight: 1"), "parameters: {normalize: false}"),
        "that sum to 1",
    ),
    "ties with other densities": (
        said("merge_method: ties", "base_model: sft", models("weight: 1, density: 0.5", "weight: 1, density: 0.2")),
        "the same `density`",
    ),
    "ties with a gradient of densities": (
        said("merge_method: ties", "base_model: sft", models("weight: 1, density: [1, 0.5]")),
        "the same `density`",
    ),
    "ties below 0": (
        said("merge_method: ties", "base_model: sft", models("weight: 1", "weight: -1")),
        "above 0, in the same ratio",
    ),
    "ties that rescales": (
        said("merge_method: ties", "base_model: sft", models("weight: 1, density: 0.5"), "parameters: {rescale: true}"),
        "`rescale` has no counterpart",
    ),
    "ram with weights": (
        said("merge_method: ram", "base_model: sft", f"models: {TWO}"),
        "ram has no parameter `weight`",
    ),
    "ram of one, of which mergekit drops small values": (
        said("merge_method: ram", "base_model: sft", models("")),
        "here it is kept whole",
    ),
    "sce, which weighs small residuals alike": (
        said("merge_method: sce", "base_model: sft", models("", "")),
        "no exact counterpart",
    ),
    "nuslerp by rows": (
        said("merge_method: nuslerp", "base_model: sft", f"models: {TWO}", "parameters: {nuslerp_flatten: false}"),
        "nuslerp_flatten: true",
    ),
    "nuslerp of three": (
        said("merge_method: nuslerp", "base_model: sft", models(*["weight: 1"] * 3)),
        "takes two models",
    ),
    "no method": (f"models: {TWO}\n", "no `merge_method`"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_counterpart_is_refused(name, tmp_path):
    text, expected = REFUSED[name]
    assert expected in refused(text, tmp_path)


def test_all_faults_of_a_file_are_told_together(tmp_path):
    text = said("merge_method: task_arithmetic", "base_modle: sft", f"models: {TWO}", "chat_template: chatml")
    found = refused(text, tmp_path)
    assert "base_modle" in found and "takes the chat template" in found


def test_options_that_the_file_decides_are_refused_beside_it(tiny, cli):
    (tiny / "config.yaml").write_text(SAME["task arithmetic"][0])
    answer = cli("merge", "--from-mergekit", "config.yaml", "--lam", "0.5")
    assert answer.code == 1 and "--lam: --from-mergekit" in answer.err
    for option, value in (("--base", "sft"), ("--seed", "1")):
        answer = cli("merge", "--from-mergekit", "config.yaml", option, value)
        assert answer.code == 1 and answer.err.startswith(option)
    assert not (tiny / "merged").exists()


def test_a_range_of_layers_that_is_not_the_whole_model_is_refused_before_anything_is_written(tiny, cli):
    text = SAME["a slice of whole models"][0].replace("[0, 4]", "[0, 3]")
    (tiny / "config.yaml").write_text(text)
    answer = cli("merge", "--from-mergekit", "config.yaml")
    assert answer.code == 1
    assert "layer_range: [0, 4]" in answer.err
    assert not (tiny / "merged").exists()


def test_a_gradient_over_a_single_block_is_refused(tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    save_model(make_model(0, blocks=1), tmp_path / "sft")
    for seed, name in enumerate(("first", "second"), start=1):
        save_model(perturb(make_model(0, blocks=1), seed), tmp_path / name)
    (tmp_path / "config.yaml").write_text(SAME["LiNeS in the weights"][0])
    answer = cli("merge", "--from-mergekit", "config.yaml")
    assert answer.code == 1
    assert "single block" in answer.err
    assert not (tmp_path / "merged").exists()


def test_a_file_that_is_not_there_is_not_looked_for_as_a_project(tmp_path):
    with pytest.raises(UserError, match="no such file") as caught:
        read_mergekit(tmp_path / "none.yaml")
    assert "--config" not in str(caught.value)
