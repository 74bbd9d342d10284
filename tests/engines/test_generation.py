"""Engines: Hugging Face as the reference, vLLM equal to it, weights swapped in place, seeds of prompts."""

import gc
import math
from dataclasses import fields
from pathlib import Path

import psutil
import pytest
import torch
from tiny_models import PROMPTS
from transformers import AutoModelForCausalLM, AutoTokenizer

from rewarded_lines import merge
from rewarded_lines.config import GenerationSpec
from rewarded_lines.engine_settings import EngineSettings
from rewarded_lines.engines.base import prompt_seed
from rewarded_lines.engines.load_engine import load_generator
from rewarded_lines.engines.responses import ResponseReader
from rewarded_lines.engines.transformers_sampling import SeededSampling
from rewarded_lines.engines.vllm_arguments import argument_names
from rewarded_lines.errors import Problem, UserError
from rewarded_lines.merger.model_plan import ModelPlan
from rewarded_lines.merger.open_inputs import plan_merge
from rewarded_lines.merger.spec import MergeSpec

GREEDY = GenerationSpec(temperature=0, max_tokens=12)
SAMPLED = GenerationSpec(temperature=1.0, top_p=0.9, max_tokens=12, seed=3)


def answers(generator, spec, prompts=PROMPTS, model=None):
    return [response.tokens for response in generator.generate(prompts, spec, [model])[0]]


def fresh(engine, folder, spec):
    generator = load_generator(engine, str(folder), spec, PROMPTS)
    try:
        return answers(generator, spec)
    finally:
        generator.close()


def pairs_of(generator, responses, prompts=PROMPTS):
    return [(ids, response.tokens) for ids, response in zip(generator.encode(prompts), responses, strict=True)]


@pytest.fixture
def plan(tiny):
    return plan_merge("sft", {"first": "first", "second": "second"})


@pytest.fixture
def hf(plan):
    generator = load_generator("hf", "sft", SAMPLED, PROMPTS, plan=plan)
    yield generator
    generator.close()


def test_greedy_is_the_models_own_argmax(tiny, hf):
    model = AutoModelForCausalLM.from_pretrained("sft").eval()
    tokenizer = AutoTokenizer.from_pretrained("sft")
    for prompt, response in zip(PROMPTS, hf.generate(PROMPTS, GREEDY)[0], strict=True):
        ids = tokenizer(prompt)["input_ids"]
        total = 0.0
        for token in response.tokens:
            with torch.no_grad():
                scores = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            assert int(scores.argmax()) == token
            total += float(scores[token])
            ids.append(token)
        assert response.logprob == pytest.approx(total, abs=1e-3)
        assert response.ended == (2 in response.tokens)


def test_a_prompts_answer_does_not_depend_on_the_others(hf):
    first = answers(hf, SAMPLED)
    assert answers(hf, SAMPLED) == first
    assert answers(hf, SAMPLED, PROMPTS[:2]) == first[:2]
    assert answers(hf, SAMPLED.model_copy(update={"seed": 4})) != first


def test_seeds_of_two_runs_never_meet():
    seeds = {
        prompt_seed(GenerationSpec(seed=seed), index, sample)
        for seed in (0, 1, 999_999)
        for index in range(300)
        for sample in range(3)
    }
    assert len(seeds) == 2700 and max(seeds) < 1 << 63


def test_samples_differ_in_the_bits_that_a_generator_on_a_cpu_reads():
    spec = GenerationSpec(seed=7)
    low = {prompt_seed(spec, index, k) % (1 << 32) for index in range(0, 1_000_000, 997) for k in range(64)}
    assert len(low) == 1004 * 64
    noise = {float(torch.rand(1, generator=torch.Generator().manual_seed(prompt_seed(spec, 0, k)))) for k in range(64)}
    assert len(noise) == 64


def test_seeded_sampling_draws_from_the_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    spec = GenerationSpec(temperature=0.7)
    draws = [int(SeededSampling([seed], spec, [[0]])(None, logits).argmax()) for seed in range(4000)]
    shares = torch.bincount(torch.tensor(draws), minlength=4) / 4000
    assert torch.allclose(shares, (logits[0] / 0.7).softmax(-1), atol=0.03)
    tail = GenerationSpec(temperature=1.0, top_p=0.5)
    assert {int(SeededSampling([seed], tail, [[0]])(None, logits).argmax()) for seed in range(200)} == {0}


def test_swap_in_place_equals_merge_and_load(tiny, hf):
    spec = MergeSpec((0.3, 0.7), 1.0, 1.0)
    merge("sft", ["first", "second"], 0.3, out="out")
    merged, base = hf.generate(PROMPTS, SAMPLED, [spec, None])
    assert [response.tokens for response in merged] == fresh("hf", tiny / "out", SAMPLED)
    assert [response.tokens for response in base] == fresh("hf", tiny / "sft", SAMPLED) != merged


def test_weights_are_swapped_only_where_the_model_changes(hf, monkeypatch):
    asked, tensors = [], ModelPlan.tensors
    monkeypatch.setattr(
        ModelPlan, "tensors", lambda plan, spec, *more: asked.append(spec) or tensors(plan, spec, *more)
    )
    spec = MergeSpec((0.5, 0.5))
    (responses,) = hf.generate(PROMPTS, SAMPLED)
    assert asked == [] and hf.swap_seconds == 0
    hf.generate(PROMPTS, SAMPLED, [spec, spec])
    hf.logprobs(pairs_of(hf, responses), MergeSpec((0.5, 0.5)))
    assert asked == [spec]
    seconds = hf.swap_seconds
    hf.logprobs(pairs_of(hf, responses))
    assert asked == [spec, MergeSpec((0.0, 0.0), 0.0, 0.0)] and hf.swap_seconds > seconds > 0


def test_a_swap_that_fails_is_not_taken_for_done(hf, monkeypatch):
    spec, tensors = MergeSpec((0.5, 0.5)), ModelPlan.tensors
    expected = answers(hf, SAMPLED, model=spec)
    answers(hf, SAMPLED)
    monkeypatch.setattr(ModelPlan, "tensors", lambda plan, spec, *more: iter([*tensors(plan, spec, *more)][:5]))
    for model in (spec, None):
        with pytest.raises(UserError, match="parameters without weights"):
            answers(hf, SAMPLED, model=model)
    monkeypatch.undo()
    assert answers(hf, SAMPLED, model=spec) == expected


def test_every_sample_has_its_own_seed(hf):
    """The samples of a prompt are adjacent, and the first equals a single sample."""
    spec = SAMPLED.model_copy(update={"n": 3, "temperature": 2.0, "top_p": 1.0})
    several = answers(hf, spec)
    assert len(several) == 3 * len(PROMPTS)
    assert several[::3] == answers(hf, spec.model_copy(update={"n": 1}))
    assert len(set(several)) > 2 * len(PROMPTS) and answers(hf, spec, PROMPTS[:2]) == several[:6]


def stops_of(generator):
    """Return texts from two greedy responses, and each response up to the first of them."""
    texts = [response.text for response in generator.generate(PROMPTS, GREEDY)[0]]
    stop = (texts[0][2:4], texts[1][3:5])
    places = [min((text.find(end) for end in stop if end in text), default=None) for text in texts]
    return stop, [text[:place] for text, place in zip(texts, places, strict=True)], places


def check_stops(generator):
    plain = generator.generate(PROMPTS, GREEDY)[0]
    stop, expected, places = stops_of(generator)
    assert None in places and len([place for place in places if place is not None]) > 1
    stopped = generator.generate(PROMPTS, GREEDY.model_copy(update={"stop": stop}))[0]
    assert [response.text for response in stopped] == expected
    for whole, cut, place in zip(plain, stopped, places, strict=True):
        if place is None:
            assert (cut.tokens, cut.text, cut.ended) == (whole.tokens, whole.text, whole.ended)
            continue
        assert cut.ended and cut.tokens == whole.tokens[: len(cut.tokens)] and len(cut.tokens) < len(whole.tokens)
        # One token earlier the stop text is incomplete.
        ids = generator.encode(PROMPTS[:1])[0]
        tokenizer = AutoTokenizer.from_pretrained("sft")
        reader = ResponseReader(tokenizer, frozenset(), tuple(stop))
        assert reader.text(ids, cut.tokens)[1] and not reader.text(ids, cut.tokens[:-1])[1]
    own = [response.logprob for response in stopped]
    assert generator.logprobs(pairs_of(generator, stopped)) == pytest.approx(own, abs=1e-3)


def test_a_response_ends_before_a_stop_text_and_its_neighbours_do_not(hf):
    check_stops(hf)


def test_logprobs_take_any_pairs(hf):
    model, tokenizer = AutoModelForCausalLM.from_pretrained("sft").eval(), AutoTokenizer.from_pretrained("sft")
    ids = tokenizer("the lazy dog jumps over")["input_ids"]
    with torch.no_grad():
        table = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    whole = float(sum(table[place - 1, ids[place]] for place in range(1, len(ids))))
    found = hf.logprobs([(ids[:1], ids[1:]), (ids[:3], []), (ids[:2], ids[2:])])
    assert found[0] == pytest.approx(whole, abs=1e-3) and found[1] == 0
    assert found[2] == pytest.approx(whole - float(table[0, ids[1]]), abs=1e-3)
    assert hf.logprobs([]) == []


def test_vllm_equals_the_reference_and_swaps_in_place(tiny, plan, hf):
    """One test, since the engine is slow to build: greedy equality, endpoints, and the way back to the base."""
    pytest.importorskip("vllm", reason="vLLM is not installed in this environment")
    from torch._dynamo.utils import counters
    from vllm.engine.arg_utils import EngineArgs

    compiled = counters["frames"]["total"]
    # The user's settings come through, and change no answer.
    settings = EngineSettings.model_validate({"max_num_seqs": 4})
    vllm = load_generator("vllm", "sft", SAMPLED, PROMPTS, plan=plan, longest=100, settings=settings)
    try:
        assert vllm._llm.llm_engine.vllm_config.scheduler_config.max_num_seqs == 4
        assert argument_names() == tuple(one.name for one in fields(EngineArgs) if not one.name.startswith("_"))
        assert answers(vllm, GREEDY) == answers(hf, GREEDY)
        base = answers(vllm, SAMPLED)
        assert answers(vllm, SAMPLED, PROMPTS[:2]) == base[:2]
        for lam in (0.0, 0.3):
            weights = MergeSpec((lam, round(1 - lam, 9)), 1.0, 0.0)
            assert answers(vllm, GREEDY, model=weights) == answers(hf, GREEDY, model=weights)
            (responses,) = vllm.generate(PROMPTS, SAMPLED, [weights])
            own = [response.logprob for response in responses]
            pairs = pairs_of(vllm, responses)
            assert vllm.logprobs(pairs, weights) == pytest.approx(own, abs=1e-3)
            assert hf.logprobs(pairs, weights) == pytest.approx(own, abs=1e-3)
            assert vllm.logprobs(pairs) == pytest.approx(hf.logprobs(pairs), abs=1e-3)
            assert vllm.logprobs(pairs) != pytest.approx(own, abs=1e-3)
        assert answers(vllm, SAMPLED, model=MergeSpec((0.0, 0.0), 0.0, 0.0)) == base == answers(vllm, SAMPLED)
        assert vllm.at_once == 1 and vllm.swap_seconds > 0
        check_stops(vllm)
        check_shared_heads(vllm, hf)
        # More tokens than one batch holds; it ends inside a prompt.
        limit = vllm._llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
        many = [" ".join(PROMPTS[:5])] * (limit // 20)
        assert sum(map(len, vllm.encode(many))) > limit
        assert len(answers(vllm, SAMPLED.model_copy(update={"max_tokens": 2}), many)) == len(many)
        assert stops_of(vllm) == stops_of(hf)
        several = answers(vllm, SAMPLED.model_copy(update={"n": 3}))
        assert several[::3] == base and len(several) == 3 * len(base)
        check_refusal(vllm, base)
        # Nothing was compiled: that takes seconds, and a C++ compiler.
        assert torch.cuda.is_available() or counters["frames"]["total"] == compiled
    finally:
        vllm.close()


def check_shared_heads(vllm, hf):
    """Check that pairs which share heads, tails and cached blocks get the scores that each gets alone."""
    length = 45
    head = (vllm.encode([" ".join(PROMPTS)])[0] * length)[:length]
    tails = [list(range(10, 50)), [*range(10, 40), *range(60, 65)], list(range(70, 80)), [10], []]
    # These differ from the first after a block of 32: the probability of their next token was not computed.
    tails += [[*range(10, 29), 90, 91], [*range(10, 29), 92]]
    pairs = [(head[:cut], tail) for tail in tails for cut in (length, 5)]
    calls, score = [], vllm._score
    vllm._score = lambda rows, *rest, **named: calls.append(score(rows, *rest, **named)) or calls[-1]
    found = vllm.logprobs([*pairs, *pairs])
    del vllm._score
    first, again = calls
    # Equal pairs are scored once; most of the long heads and some of the tails were cached.
    unknown = [[sum(map(math.isnan, row)) for row in rows] for rows in calls]
    assert len(first) == len(pairs) and sorted(unknown[0])[-6:] == [33, 33, 33, 65, 65, 65]
    assert 1 <= len(again) <= 3 and set(unknown[1]) == {1}
    assert found[: len(pairs)] == found[len(pairs) :] == pytest.approx(hf.logprobs(pairs), abs=1e-3)


def check_refusal(generator, expected):
    """Check that a refused merge does not damage the engine, and that the error has the reason."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelPlan, "tensors", refuse)
        with pytest.raises(UserError, match="not finite"):
            answers(generator, GREEDY, model=MergeSpec((0.4, 0.6)))
    assert answers(generator, SAMPLED) == expected


def refuse(plan, spec, *more):
    raise UserError(Problem("a weight is not finite"))


@pytest.mark.slow
def test_many_models_take_no_more_memory_in_vllm_and_one_equals_a_written_merge(tiny, plan):
    pytest.importorskip("vllm", reason="vLLM is not installed in this environment")
    vllm = load_generator("vllm", "sft", SAMPLED, PROMPTS, plan=plan)
    try:
        swapped = answers(vllm, SAMPLED, model=MergeSpec((0.3, 0.7), 1.0, 0.0))
        check_memory(vllm)
    finally:
        vllm.close()
    merge("sft", ["first", "second"], "0.3", beta=0, out="written")
    assert swapped == fresh("vllm", tiny / "written", SAMPLED)


def check_memory(generator):
    """Check that memory does not grow from model to model."""
    sizes, short = [], GREEDY.model_copy(update={"max_tokens": 1})
    for index in range(45):
        generator.generate(PROMPTS[:1], short, [MergeSpec((index / 45, 1 - index / 45))])
        if index in (5, 44):
            gc.collect()
            sizes.append(psutil.Process().memory_info().rss)
    assert sizes[1] - sizes[0] < 24 << 20


@pytest.mark.slow
def test_a_merge_that_is_not_finite_is_refused_by_vllm_too(tiny, hf):
    pytest.importorskip("vllm", reason="vLLM is not installed in this environment")
    model = AutoModelForCausalLM.from_pretrained("first")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    model.save_pretrained("first")
    generator = load_generator(
        "vllm", "sft", GREEDY, PROMPTS, plan=plan_merge("sft", {"first": "first", "second": "second"})
    )
    try:
        with pytest.raises(UserError, match="layers.1.mlp.up_proj.weight"):
            generator.generate(PROMPTS, GREEDY, [MergeSpec((0.5, 0.5))])
    finally:
        generator.close()


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["two devices", "an engine process"])
@pytest.mark.timeout(400)
def test_workers_in_processes_of_their_own_merge_for_themselves(setting, plan, hf, monkeypatch):
    """Also with a method that measures whole tensors, and with the user's pattern of blocks."""
    pytest.importorskip("vllm", reason="vLLM is not installed in this environment")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", str(int(setting != "two devices")))
    before, shared = set(psutil.Process().children(recursive=True)), set(Path("/dev/shm").glob("*cpushm*"))
    plan = plan_merge("sft", plan.references, dtype="float32", layers=r"model\.layers\.(\d+)\.")
    settings = EngineSettings.model_validate({"tensor_parallel_size": 2 if setting == "two devices" else 1})
    generator = load_generator("vllm", "sft", SAMPLED, PROMPTS, plan=plan, settings=settings)
    workers = set(psutil.Process().children(recursive=True)) - before
    assert workers
    try:
        ties = MergeSpec((0.3, 0.7), 1.0, 0.0, "ties", {"density": 0.5}).complete(2)
        for model in (None, MergeSpec((0.3, 0.7)), ties, None):
            assert answers(generator, GREEDY, model=model) == answers(hf, GREEDY, model=model)
    finally:
        generator.close()
    assert set(Path("/dev/shm").glob("*cpushm*")) <= shared
    gone, alive = psutil.wait_procs(workers, 20)
    assert not [worker for worker in alive if "vllm" in " ".join(worker.cmdline()).lower()]


def test_weights_of_another_layout_are_refused(hf, monkeypatch):
    monkeypatch.setattr(ModelPlan, "tensors", lambda *_: iter([("other.weight", torch.zeros(1))]))
    with pytest.raises(UserError, match="no parameter other.weight"):
        answers(hf, GREEDY, model=MergeSpec((1.0, 0.0)))
    monkeypatch.setattr(ModelPlan, "tensors", lambda *_: iter([]))
    with pytest.raises(UserError, match="parameters without weights"):
        answers(hf, GREEDY, model=MergeSpec((1.0, 0.0)))


def test_a_models_own_penalties_do_not_count(tiny, hf):
    plain = answers(hf, GREEDY)
    config = tiny / "sft/generation_config.json"
    config.write_text(config.read_text().replace("{", '{"repetition_penalty": 5.0,', 1))
    assert fresh("hf", tiny / "sft", GREEDY) == plain


def test_prompts_that_do_not_fit_are_refused(tiny):
    with pytest.raises(UserError, match="do not fit the model"):
        load_generator("hf", "sft", GenerationSpec(max_tokens=500), PROMPTS)
    with pytest.raises(UserError, match="a text to be scored does not fit"):
        load_generator("hf", "sft", GREEDY, PROMPTS, longest=128)
    load_generator("hf", "sft", GREEDY, PROMPTS, longest=127).close()
