"""`merge` on real checkpoints: values, endpoints, types, shards, provenance, atomic output."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_model, perturb, save_model, snapshot
from transformers import AutoModelForCausalLM, AutoTokenizer

from rewarded_lines import merge
from rewarded_lines.checkpoints.reader import Checkpoint
from rewarded_lines.errors import UserError
from rewarded_lines.kernels import block_stream
from rewarded_lines.kernels.blocks import Workspace
from rewarded_lines.kernels.tensor_merge import AT_ONCE
from rewarded_lines.merger.spec import folder_name
from rewarded_lines.progress import Progress


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_merge_equals_the_formula(tiny):
    merge("sft", ["first", "second"], 0.3, alpha=0.5, beta=1.0, out="out")
    base, first, second, out = (weights(tiny / name) for name in ("sft", "first", "second", "out"))
    for name, value in base.items():
        block = int(name.split(".")[2]) if ".layers." in name else None
        scale = 0.5 if block is None else 0.5 + block / 3
        mixed = 0.3 * (first[name].double() - value.double()) + 0.7 * (second[name].double() - value.double())
        # At most the next float32, if float64 sums in another order cross a rounding tie.
        exact = value.double() + scale * mixed
        assert ((out[name].double() - exact).abs() <= exact.abs() * 2.0**-24 * (1 + 2.0**-20)).all(), name


def test_merged_folder_loads_and_tells_its_origin(tiny):
    before = snapshot(tiny)
    merge("sft", {"one": "first", "two": "second"}, 0.5, out="out")
    assert {name: before[name] for name in before} == {
        name: content for name, content in snapshot(tiny).items() if not name.startswith("out")
    }
    model = AutoModelForCausalLM.from_pretrained("out")
    assert torch.isfinite(model(torch.tensor([[1, 5, 9]])).logits).all()
    assert AutoTokenizer.from_pretrained("out")("the quick")["input_ids"]
    record = json.loads((tiny / "out/merge.json").read_text())
    assert record["weights"] == {"one": 0.5, "two": 0.5}
    assert record["scales"] == {"model.layers": [1.0, pytest.approx(4 / 3), pytest.approx(5 / 3), 2.0]}
    assert len(record["policies"]["two"]["files"]["model.safetensors"]) == 64
    assert "θ" in (tiny / "out/README.md").read_text()


def test_several_lambdas_read_once_and_equal_single_merges(tiny):
    results = merge("sft", ["first", "second"], [0.25, "0.75"], out="many")
    assert [result.out.name for result in results] == ["lam=0.25", "lam=0.75"]
    merge("sft", ["first", "second"], 0.75, out="single")
    assert (tiny / "many/lam=0.75/model.safetensors").read_bytes() == (tiny / "single/model.safetensors").read_bytes()


def test_the_memory_of_a_merge_does_not_grow_with_the_lambdas(tiny, monkeypatch):
    """A thread holds a block of each output that it merges, so it merges some of them at a time."""
    together, whole = set(), Workspace.merge
    monkeypatch.setattr(Workspace, "merge", lambda self, steps: together.add(len(steps)) or whole(self, steps))
    lams = [f"{step / 100}" for step in range(AT_ONCE + 2)]
    merge("sft", ["first", "second"], lams, out="many")
    assert together == {AT_ONCE, 2}
    for lam in (lams[1], lams[AT_ONCE]):
        merge("sft", ["first", "second"], lam, out="one", overwrite=True)
        made = tiny / "many" / folder_name((float(lam), 1 - float(lam)))
        assert (made / "model.safetensors").read_bytes() == (tiny / "one" / "model.safetensors").read_bytes()


def test_values_that_are_not_finite_are_counted_once_for_all_lambdas(tiny, monkeypatch):
    tensors = load_file(tiny / "first/model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, tiny / "first/model.safetensors", {"format": "pt"})
    monkeypatch.setattr(block_stream, "AT_ONCE", 1)
    with pytest.raises(UserError, match="1 values are not finite in policy `first`"):
        merge("sft", ["first", "second"], ["0.25", "0.75"], out="many")


def test_shards_in_and_out_do_not_change_a_bit(tiny):
    for name in ("sft", "first"):
        model = AutoModelForCausalLM.from_pretrained(name)
        save_model(model, tiny / f"{name}-sharded", max_shard_size="100KB" if name == "sft" else "200KB")
    merge("sft", ["first", "second"], 0.4, out="whole")
    policies = {"first": "first-sharded", "second": "second"}
    merge("sft-sharded", policies, 0.4, out="cut", max_shard_size="150KB")
    assert len(list((tiny / "cut").glob("model-*.safetensors"))) > 3
    whole, cut = Checkpoint(tiny / "whole"), Checkpoint(tiny / "cut")
    assert set(whole.tensors) == set(cut.tensors)
    assert all(np.array_equal(whole.read(name), cut.read(name)) for name in whole.tensors)
    AutoModelForCausalLM.from_pretrained("cut")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_inputs_and_outputs(tiny, dtype):
    kind = getattr(torch, dtype)
    for seed, name in enumerate(("sft16", "first16", "second16")):
        save_model(perturb(make_model(0), seed).to(kind), tiny / name)
    merge("sft16", ["first16", "second16"], 0.5, out="out")
    base, first, second, out = (weights(tiny / n) for n in ("sft16", "first16", "second16", "out"))
    assert all(tensor.dtype == kind for tensor in out.values())
    name = "model.layers.3.mlp.up_proj.weight"
    wide = [tensor[name].float() for tensor in (base, first, second)]
    expected = wide[0] + 2 * (0.5 * (wide[1] - wide[0]) + 0.5 * (wide[2] - wide[0]))
    assert torch.equal(out[name], expected.to(kind))
    merge("sft", ["first", "second"], 0.5, out="cast", dtype=dtype)
    assert json.loads((tiny / "cast/config.json").read_text())["dtype"] == dtype
    assert AutoModelForCausalLM.from_pretrained("cast").dtype == kind


def test_a_few_wide_tensors_do_not_widen_the_model(tiny):
    """GLM-4.5 and DeepSeek-V3 keep the bias of their routers in float32, models with Mamba blocks some states."""
    for seed, name in enumerate(("sft16", "first16")):
        save_model(perturb(make_model(0), seed).bfloat16(), tiny / name)
        values = load_file(tiny / name / "model.safetensors")
        values |= {each: value.float() for each, value in values.items() if each.endswith("norm.weight")}
        save_file(values, tiny / name / "model.safetensors", {"format": "pt"})
    merge("sft16", ["first16"], 0.5, method="wise-ft", out="out")
    out = weights(tiny / "out")
    assert {name: value.dtype for name, value in out.items()} == {name: value.dtype for name, value in values.items()}
    assert AutoModelForCausalLM.from_pretrained("out").dtype == torch.bfloat16


def test_mixed_types_keep_the_widest(tiny):
    save_model(AutoModelForCausalLM.from_pretrained("sft").bfloat16(), tiny / "sft16")
    merge("sft16", ["first", "second"], 1.0, beta=0, out="out")
    policy, out = weights(tiny / "first"), weights(tiny / "out")
    assert all(torch.equal(out[name], policy[name]) for name in policy)
    # Loaded in the type of the config, no bit is lost.
    loaded = AutoModelForCausalLM.from_pretrained("out", dtype="auto").state_dict()
    assert all(torch.equal(loaded[name], policy[name]) for name in policy)


def test_dry_run_writes_nothing(tiny):
    before = snapshot(tiny)
    (result,) = merge("sft", ["first", "second"], 0.5, out="out", dry_run=True)
    assert result.out is None and result.scales["model.layers"][-1] == 2.0
    assert snapshot(tiny) == before


def test_overwrite_replaces_and_never_takes_an_input(tiny):
    merge("sft", ["first", "second"], 0.5, out="out")
    with pytest.raises(UserError, match="exists"):
        merge("sft", ["first", "second"], 0.6, out="out")
    merge("sft", ["first", "second"], 0.6, out="out", overwrite=True)
    assert json.loads((tiny / "out/merge.json").read_text())["weights"]["first"] == 0.6
    for target in ("sft", "first", "."):
        with pytest.raises(UserError, match="in, on or around an input"):
            merge("sft", ["first", "second"], 0.6, out=target, overwrite=True)


def test_overwrite_replaces_outputs_of_merges_and_nothing_else(tiny):
    merge("sft", ["first", "second"], ["0.25", "0.5"], out="soups")
    (tiny / "mine").mkdir()
    (tiny / "mine/thesis.txt").write_text("years of work")
    before = snapshot(tiny)
    for target in ("soups", "mine", "test.jsonl"):
        with pytest.raises(UserError, match="replaces only outputs of this command"):
            merge("sft", ["first", "second"], 0.5, out=target, overwrite=True)
    assert snapshot(tiny) == before
    (tiny / "empty").mkdir()
    merge("sft", ["first", "second"], 0.5, out="empty", overwrite=True)
    assert (tiny / "empty/merge.json").is_file()


def test_two_outputs_of_one_name_are_refused(tiny):
    with pytest.raises(UserError, match="two outputs would have the same name"):
        merge("sft", ["first", "second"], ["0.3,0.7", "0.3,0.7000001"], out="many")
    assert not (tiny / "many").exists()


@pytest.mark.parametrize("schedule", [{"alpha": float("nan")}, {"beta": float("inf")}])
def test_a_schedule_that_is_no_number_is_refused(tiny, schedule):
    with pytest.raises(UserError, match="not a finite number"):
        merge("sft", ["first", "second"], 0.5, out="out", **schedule)


def test_a_dry_run_scores_no_candidate(tiny):
    def score(folder):
        raise AssertionError("asked")

    (result,) = merge("sft", ["first", "second"], method="greedy", score=score, out="out", dry_run=True)
    assert "no candidate is scored" in result.notes[-1]


def test_failure_leaves_nothing_behind(tiny):
    class Explode(Progress):
        def advance(self, count, name=""):
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        merge("sft", ["first", "second"], 0.5, out="out", progress=Explode())
    assert sorted(path.name for path in tiny.iterdir() if "out" in path.name) == []


def test_killed_merge_leaves_no_output_and_the_next_one_cleans_up(tiny):
    script = (
        "import time; from rewarded_lines import merge; from rewarded_lines.progress import Progress\n"
        "class Stop(Progress):\n"
        "    def advance(self, count, name=''): print('go', flush=True); time.sleep(60)\n"
        "merge('sft', ['first', 'second'], 0.5, out='out', progress=Stop())"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    # Two threads may write at once.
    assert child.stdout.readline().startswith(b"go")
    child.kill()
    child.wait()
    assert not (tiny / "out").exists()
    assert list(tiny.glob(".out.partial-*"))
    merge("sft", ["first", "second"], 0.5, out="out")
    assert (tiny / "out/merge.json").is_file()
    assert not list(tiny.glob(".out.partial-*"))


def test_two_at_once_make_one_whole_output(tiny):
    script = "from rewarded_lines import merge; merge('sft', ['first', 'second'], 0.5, out='out')"
    children = [subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE) for _ in range(2)]
    deadline = time.monotonic() + 120
    codes = [child.wait(timeout=deadline - time.monotonic()) for child in children]
    assert 0 in codes
    assert set(weights(tiny / "out")) == set(weights(tiny / "sft"))
    assert not list(tiny.glob(".out.*"))


def test_policies_of_another_base_are_refused_by_record_and_by_value(tiny):
    save_model(make_model(7), tiny / "stranger")
    with pytest.raises(UserError, match="nothing to do with the base"):
        merge("sft", ["first", "stranger"], 0.5, out="out")
    shutil.copytree("first", "recorded")
    (tiny / "recorded/training.json").write_text(json.dumps({"base_hash": "0" * 64}))
    with pytest.raises(UserError, match="trained from another base"):
        merge("sft", ["recorded", "second"], 0.5, out="out")
    # Earlier versions recorded the id of a base of the Hub, which does not tell its weights.
    (tiny / "recorded/training.json").write_text(json.dumps({"base_hash": "organisation/name"}))
    merge("sft", ["recorded", "second"], 0.5, out="out")


def test_unequal_keys_shapes_and_tokenizer_are_told_at_once(tiny):
    save_model(make_model(0, hidden=32), tiny / "narrow")
    save_model(make_model(0, blocks=3), tiny / "short")
    with pytest.raises(UserError) as caught:
        merge("sft", ["narrow", "short"], 0.5, out="out")
    text = str(caught.value)
    assert "model.embed_tokens.weight: shape (300, 64) in base, (300, 32) in narrow" in text
    assert "tensors of the base are missing" in text and "model.layers.3." in text
    assert not (tiny / "out").exists()


def test_a_download_that_links_to_the_hubs_cache(tiny):
    """Earlier versions of the Hub's library made such folders, with `local_dir`."""
    blobs = tiny / "cache/models--org--first/blobs"
    blobs.mkdir(parents=True)
    AutoModelForCausalLM.from_pretrained("first").save_pretrained("cut", max_shard_size="100KB")
    for index, path in enumerate(sorted(Path("cut").glob("*.safetensors"))):
        path.rename(blobs / str(index))
        path.symlink_to(blobs / str(index))
    assert index > 0
    merge("sft", ["cut"], 1, out="out")
    blobs.rename(tiny / "cache/models--org--first/others")
    for path in Path("cut").glob("*.safetensors"):
        place = tiny / "cache/models--org--first/others" / path.readlink().name
        path.unlink()
        path.symlink_to(place)
    with pytest.raises(UserError, match="not in the checkpoint's folder"):
        merge("sft", ["cut"], 1, out="out", overwrite=True)
