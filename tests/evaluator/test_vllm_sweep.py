"""Sweeps in vLLM equal the reference: whole models swapped in place, adapters in one batch."""

from importlib.util import find_spec

import pytest
from tiny_adapters import save_adapter

from rewarded_lines import sweep
from rewarded_lines.engines.vllm_adapters import VllmAdapterGenerator

if find_spec("vllm") is None:
    pytest.skip("vLLM is not installed in this environment", allow_module_level=True)


@pytest.fixture
def greedy(tiny):
    project = tiny / "rewarded-lines.yaml"
    text = project.read_text().replace("  max_tokens: 12", "  max_tokens: 12\n  temperature: 0")
    project.write_text(text + "control:\n  file: test.jsonl\n  columns: {text: prompt}\n")
    return tiny


def same(one, other):
    assert [point.spec for point in one.points] == [point.spec for point in other.points]
    for mine, theirs in zip(one.points, other.points, strict=True):
        assert mine.responses == theirs.responses
        assert mine.kl == pytest.approx(theirs.kl, abs=2e-3)
        assert mine.control == pytest.approx(theirs.control, abs=2e-3)
        assert all(mine.scores[name].tolist() == theirs.scores[name].tolist() for name in mine.scores)


@pytest.mark.slow
def test_whole_models(greedy):
    engine, reference = sweep(out="engine"), sweep(engine="hf", out="reference")
    same(engine, reference)
    assert engine.header["identity"]["engine"]["as"] == "whole models"
    assert set(engine.header["seconds_last"]) == {"engine", "generate", "swap", "score", "total"}


@pytest.mark.slow
def test_adapters_share_batches_and_need_no_merged_model(greedy, monkeypatch):
    for seed, name in ((1, "first"), (2, "second")):
        (greedy / name).rename(greedy / f"{name}-whole")
        save_adapter(greedy / "sft", greedy / name, seed, target_modules="all-linear")
    calls, generate = [], VllmAdapterGenerator.generate

    def counted(engine, prompts, spec, models=(None,)):
        calls.append(len(models))
        return generate(engine, prompts, spec, models)

    monkeypatch.setattr(VllmAdapterGenerator, "generate", counted)
    engine, reference = sweep(out="engine"), sweep(engine="hf", out="reference")
    same(engine, reference)
    assert engine.header["identity"]["engine"]["as"] == "adapters"
    assert calls == [len({(p.spec.weights, p.spec.merge.beta) for p in engine.points})]
    # A point that is lost is made again in the company that it was made in.
    lost = sorted((greedy / "engine/points").iterdir())[0]
    before = lost.read_bytes()
    lost.unlink()
    assert sweep(out="engine").header["evaluated_last"] == 1 and lost.read_bytes() == before
    assert calls[1:] == calls[:1]


@pytest.mark.slow
def test_methods_that_are_no_sum_fold_adapters(greedy):
    for seed, name in ((1, "first"), (2, "second")):
        (greedy / name).rename(greedy / f"{name}-whole")
        save_adapter(greedy / "sft", greedy / name, seed)
    project = greedy / "rewarded-lines.yaml"
    project.write_text(project.read_text().replace("  points: 3", "  points: 2\n  methods: [ties]"))
    engine, reference = sweep(out="engine"), sweep(engine="hf", out="reference")
    same(engine, reference)
    assert engine.header["identity"]["engine"]["as"] == "whole models"
