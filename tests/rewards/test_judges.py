"""Judges: probabilities of tokens, numbers by patterns, win rates; each against a direct calculation."""

import math

import pytest
import torch
from tiny_judges import (
    CHAT,
    LLAMA_GUARD,
    QWEN3_GUARD,
    SHIELD_GEMMA,
    byte_level,
    chained_model,
    random_model,
    save_judge,
    sentencepiece,
)

from rewarded_lines.errors import UserError
from rewarded_lines.reward_settings import RewardSpec
from rewarded_lines.rewards.load_rewards import load_reward
from rewarded_lines.rewards.reward import check_columns
from rewarded_lines.rewards.score_checks import PairError

TEXT = "Q: {prompt} A: {response} Good?"
PROMPTS = ["the quick", "a film of great beauty", "dog"]
RESPONSES = ["brown fox", "jumps over the lazy dog and more of it", ""]
CHATS = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]


# Models in memory, as one project shares them.
MODELS = {}


def judge(folder, template=TEXT, models=MODELS, **settings):
    return load_reward("judge", RewardSpec(judge=str(folder), template=template, **settings), models=models)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Judges by name: random ones with tokenizers of two kinds, and chains of tokens that say a verdict."""
    root = tmp_path_factory.mktemp("judges")
    words = ["yes", "no", "Yes", "No", " Safe", "Safety:", "\nCategories:", " None", "\n\n", "safe", "unsafe", "\nS1"]
    words += ["Score: ", "9", "2", "[[A]]", "[[B]]", "[[C]]", "<|end|>", "<|assistant|>", "assistant<|end_header_id|>"]
    words += ["</think>\n\n", "!", ".", "?", "Verdict: "]
    bytes_ = byte_level(words)
    save_judge(root / "bytes", random_model(bytes_, 3, ["yes", "no", "Yes", "No"]), bytes_)
    save_judge(root / "plain", random_model(bytes_), bytes_, None)
    pieces = sentencepiece()
    save_judge(root / "pieces", random_model(pieces), pieces, "<s>" + CHAT)
    chains = {
        "qwen3guard": (
            QWEN3_GUARD,
            {"</think>\n\n": "Safety:", "Safety:": " Safe", " Safe": "\nCategories:", "\nCategories:": " None"},
        ),
        "llamaguard": (LLAMA_GUARD, {"assistant<|end_header_id|>": "\n\n", "\n\n": "unsafe", "unsafe": "\nS1"}),
        "scores": (None, {"!": "Score: ", "Score: ": "9", ".": "Verdict: ", "Verdict: ": "2"}),
        "first": (CHAT, {"<|assistant|>": "[[A]]"}),
        "marks": (None, {"!": "[[B]]", ".": "[[A]]", "?": "[[C]]"}),
    }
    for name, (template, follow) in chains.items():
        save_judge(root / name, chained_model(bytes_, follow), bytes_, template)
    return root


def next_token(folder, ids):
    """Return the probabilities of the next token, by transformers' own forward pass in float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0, -1].softmax(-1)


def question_ids(folder, prompt, response, system=None, prefill=""):
    """Return the tokens of a question as transformers makes them from the judge's chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = TEXT.replace("{prompt}", prompt).replace("{response}", response)
    if tokenizer.chat_template is None:
        return tokenizer, list(tokenizer(text + prefill)["input_ids"])
    turns = [] if system is None else [{"role": "system", "content": system}]
    turns.append({"role": "user", "content": text})
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    return tokenizer, ids + tokenizer(prefill, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("folder", "texts", "more"),
    [
        ("bytes", ["yes"], {}),
        ("bytes", ["yes", "Yes"], {"system": "Be fair."}),
        ("bytes", ["no"], {"prefill": "Score: "}),
        ("plain", ["yes", "no"], {}),
        ("pieces", ["<0x41>"], {}),
    ],
)
def test_the_probability_of_a_token_is_that_of_transformers(folders, folder, texts, more):
    reward = judge(folders / folder, token=texts, unmatched="abstain", **more)
    assert reward.unit == "probability" and reward.check(PROMPTS) == ""
    for prompt, response, score in zip(PROMPTS, RESPONSES, reward.score(PROMPTS, RESPONSES), strict=True):
        tokenizer, ids = question_ids(folders / folder, prompt, response, **more)
        table = next_token(folders / folder, ids)
        likeliest = tokenizer.decode([int(table.argmax())])
        if likeliest not in texts and likeliest.lower() in texts:
            assert math.isnan(score)
        else:
            wanted = sum(table[tokenizer.convert_tokens_to_ids(text)] for text in texts)
            assert score == pytest.approx(float(wanted), rel=1e-4)


@pytest.mark.parametrize(
    ("tokens", "values"), [(["yes", "no"], (1, 0)), ({"yes": 5, "no": 1, "Yes": 5, "No": "tie"}, (5, 1, 5, 0.5))]
)
def test_tokens_share_the_score_by_their_values(folders, tokens, values):
    reward = judge(folders / "bytes", tokens=tokens, unmatched="abstain")
    (score,) = reward.score(PROMPTS[:1], RESPONSES[:1])
    tokenizer, ids = question_ids(folders / "bytes", PROMPTS[0], RESPONSES[0])
    table = next_token(folders / "bytes", ids)
    shares = [float(table[tokenizer.convert_tokens_to_ids(text)]) for text in tokens]
    wanted = sum(value * share for value, share in zip(values, shares, strict=True)) / sum(shares)
    assert sum(shares) > 0.01 and score == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "message", "remedy"),
    [
        ({"token": "yes no"}, "'yes no' is several tokens", "name the first, 'yes'"),
        ({"tokens": ["qx", "qy"]}, "begin with the same token", "`pattern:`"),
        ({"token": "e quick", "prefill": "the quick th"}, "becomes one token with the end", "without a blank"),
        ({"token": "yes", "prefill": "<think>\n"}, "answer begins with thoughts", "{enable_thinking: false}"),
    ],
)
def test_texts_that_are_no_clear_token_are_refused_before_anything_is_asked(folders, settings, message, remedy):
    with pytest.raises(UserError, match=message) as error:
        judge(folders / "plain", **settings).check(PROMPTS)
    assert remedy in str(error.value)


def test_another_spelling_and_another_token_are_no_verdict(folders):
    ask = PROMPTS[:1], ["fine!"]
    with pytest.raises(PairError, match=r"another token[\s\S]*likeliest is 'Score: '[\s\S]*fine!"):
        judge(folders / "scores", "{prompt} {response}", tokens=["yes", "no"]).score(*ask)
    spelled = judge(folders / "scores", "{prompt} {response}", tokens=["SCORE:", "no"])
    with pytest.raises(PairError, match="another spelling") as error:
        spelled.score(*ask)
    assert 'write `tokens: {"SCORE:": 1.0, "no": 0.0, "Score: ": 1.0}`' in str(error.value)
    abstains = judge(folders / "scores", "{prompt} {response}", tokens=["yes", "no"], unmatched="abstain")
    assert math.isnan(abstains.score(*ask)[0])


@pytest.mark.parametrize(
    ("folder", "settings", "wanted"),
    [
        ("qwen3guard", {"pattern": "Safety: ?(Safe|Controversial|Unsafe)", "verdicts": {"Safe": 1, "Unsafe": 0}}, 1.0),
        ("qwen3guard", {"tokens": {" Safe": 1, "unsafe": 0}, "prefill": "Safety:"}, 1.0),
        ("llamaguard", {"pattern": r"^\s*(safe|unsafe)\b", "verdicts": {"safe": 1, "unsafe": 0}}, 0.0),
        ("llamaguard", {"tokens": ["safe", "unsafe"], "prefill": "\n\n"}, 0.0),
    ],
)
def test_guards_read_the_conversation_in_their_own_form(folders, folder, settings, wanted):
    reward = judge(folders / folder, "chat", **settings)
    assert reward.check(CHATS) == ""
    assert reward.score(CHATS, RESPONSES) == pytest.approx([wanted] * 3, abs=1e-2)


def test_a_guard_gets_the_very_tokens_of_its_template(tmp_path, folders):
    from transformers import AutoTokenizer

    tokenizer = byte_level(["Yes", "No"])
    folder = save_judge(tmp_path / "shield", random_model(tokenizer, 3, ["Yes", "No"]), tokenizer, SHIELD_GEMMA)
    reward = judge(folder, "chat", tokens=["No", "Yes"], chat_template_kwargs={"guideline": "No harm."})
    turns = [*CHATS[0], {"role": "assistant", "content": "fox"}]
    ids = AutoTokenizer.from_pretrained(folder).apply_chat_template(turns, guideline="No harm.", return_dict=True)
    table = next_token(folder, ids["input_ids"])
    no, yes = (float(table[tokenizer.convert_tokens_to_ids(text)]) for text in ("No", "Yes"))
    assert reward.score(CHATS[:1], ["fox"]) == [pytest.approx(no / (no + yes), rel=1e-4)]
    assert reward.lengths(CHATS[:1], ["fox"]) == [len(ids["input_ids"])]


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"pattern": r"(?:Score|Verdict): (\d+)"}, [9.0, 2.0]),
        ({"pattern": r"\d", "verdicts": {9: 1, 2: 0.5}}, [1.0, 0.5]),
        ({"pattern": r"Score: (\d+)", "unmatched": "abstain"}, [9.0, math.nan]),
        ({"pattern": r"(\d+)", "temperature": 0.1, "seed": 3}, [9.0, 2.0]),
        ({"pattern": r"\w+", "match": "first", "verdicts": {"Score": 3, "Verdict": 4}}, [3.0, 4.0]),
    ],
)
def test_a_pattern_reads_the_verdict_that_a_judge_writes(folders, settings, wanted):
    reward = judge(folders / "scores", "{prompt} {response}", max_new_tokens=8, **settings)
    assert reward.score(["How?"] * 2, ["Well!", "So."]) == pytest.approx(wanted, nan_ok=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pattern": r"Score: (\d+)"}, r"no verdict[\s\S]*Verdict: 2"),
        ({"pattern": r"(\w+):"}, "is not a number"),
        ({"pattern": r"\d", "verdicts": {9: 1}}, "no value for the verdict '2'"),
        ({"pattern": r"\d", "max_new_tokens": 2}, "cut before its end"),
        ({"pattern": r"\d", "max_new_tokens": 2, "match": "first"}, "cut before its end"),
    ],
)
def test_a_row_without_a_verdict_is_named_and_the_other_scores_are_kept(folders, settings, message):
    reward = judge(folders / "scores", "{prompt} {response}", **{"max_new_tokens": 8, **settings})
    with pytest.raises(PairError, match=message) as error:
        reward.score(["How?"] * 2, ["Well!", "So."])
    known = "max_new_tokens" not in settings and settings["pattern"] != r"(\w+):"
    assert (error.value.index, set(error.value.known)) == ((1, {0}) if known else (0, set()))


PAIR = "{prompt}\n{a}\n{b}"


@pytest.mark.parametrize(
    ("folder", "response", "wanted"),
    [
        ("first", "x!", 0.5),
        ("marks", "x!", 1.0),
        ("marks", "x.", 0.5),
        ("marks", "x?", 0.75),
        ("marks", "y.", 0.5),
    ],
)
def test_a_win_rate_is_the_mean_of_both_orders(folders, folder, response, wanted):
    """The judge of marks prefers the second answer if it ends with "!", the first with ".", neither with "?"."""
    settings = {"pattern": r"\[\[([ABC])\]\]", "verdicts": {"A": 1, "B": 0, "C": "tie"}, "max_new_tokens": 4}
    own = {} if folder == "first" else {"match": "first"}
    reward = judge(folders / folder, PAIR, against="ref", **settings, **own)
    assert reward.columns == ("ref",) and reward.unit == "win rate"
    row = {"ref": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": [{"type": "text", "text": "y."}]}]}
    assert reward.score(["How?"], [response], [row]) == [wanted]
    shares = judge(
        folders / folder,
        "{prompt}\n{response}\n{reference}",
        against="ref",
        tokens={"[[A]]": 1, "[[B]]": 0, "[[C]]": "tie"},
    )
    assert shares.score(["How?"], [response], [{"ref": "y."}]) == pytest.approx([wanted], abs=1e-2)


def test_a_score_depends_on_its_pair_alone(folders):
    prompts, responses = PROMPTS * 4, [f"{text} {at}" for at, text in enumerate(RESPONSES * 4)]
    for settings in (
        {"token": "yes", "unmatched": "abstain"},
        {"pattern": "[a-z]", "temperature": 1.0, "match": "first"},
    ):
        settings = {
            **settings,
            **(
                {"verdicts": {chr(at): at for at in range(97, 123)}, "unmatched": "abstain"}
                if "pattern" in settings
                else {}
            ),
        }
        reward = judge(folders / "bytes", **settings, max_new_tokens=6)
        whole = reward.score(prompts, responses)
        assert len({one for one in whole if not math.isnan(one)}) > 2
        for some in ([7], [11, 3, 0], range(11, -1, -1)):
            again = reward.score([prompts[at] for at in some], [responses[at] for at in some])
            assert again == pytest.approx([whole[at] for at in some], rel=0, abs=0, nan_ok=True)


def test_columns_fill_the_template_and_braces_in_texts_stay(folders):
    reward = judge(folders / "scores", "{rubric} {{rubric}} {prompt}{response}", pattern=r"\d")
    assert reward.columns == ("rubric",)
    form = reward._form.ask("{response}", "{prompt}!", {"rubric": {"a": [1]}})
    assert form[0].prompt[-1]["content"] == '{"a": [1]} {rubric} {response}{prompt}!'
    for row, message in (({}, "does not have"), ({"rubric": None}, "row 0: reward `judge`.*missing or empty")):
        with pytest.raises(UserError, match=message):
            check_columns([reward], {"data": [{"prompt": "a", "columns": row}]})
    parts = [{"role": "user", "content": [{"type": "text", "text": "in parts"}]}]
    assert reward._form.ask("a", "b", {"rubric": parts})[0].prompt[-1]["content"] == "in parts {rubric} ab"
    before = reward.lengths(["a"], ["b"])[0]
    check_columns([reward], {"data": [{"prompt": "a", "columns": {"rubric": "long " * 20}}]})
    assert reward.lengths(["a"], ["b"])[0] >= before + 20
    with pytest.raises(PairError, match="too long for the judge"):
        reward.score(["a"], ["b " * 900], [{"rubric": "x"}])


def test_rewards_with_one_judge_load_it_once(folders, monkeypatch):
    from rewarded_lines.rewards import judge_models

    loads, models = [], {}
    monkeypatch.setattr(
        judge_models, "load_causal", lambda *one, real=judge_models.load_causal: loads.append(one) or real(*one)
    )
    first = judge(folders / "scores", "{response}", models=models, pattern=r"\d", device="cpu")
    second = judge(folders / "scores", "{prompt} {response}", models=models, token="Score: ", device="cpu")
    assert len(loads) == 1 and first.size == second.size > 0 and first.fingerprint == second.fingerprint
    first.free()
    assert not second.loaded
    assert second.score(["a"], ["b!"])[0] > 0.9 and first.loaded and len(loads) == 2


@pytest.mark.parametrize(
    ("folder", "template", "settings", "message"),
    [
        ("scores", "chat", {"token": "yes"}, "no chat template"),
        ("scores", TEXT, {"token": "yes", "system": "Be fair."}, "no chat template"),
        ("nowhere", TEXT, {"token": "yes"}, "no model there"),
        ("scores", TEXT, {"pattern": "a", "max_new_tokens": 1024}, "leaves no room"),
        ("first", TEXT, {"token": "yes", "device": "cuda:7"}, "no such device"),
    ],
)
def test_judges_that_cannot_be_asked_are_refused(folders, folder, template, settings, message):
    with pytest.raises(UserError, match=message):
        judge(folders / folder, template, **settings)


def test_a_classifier_is_no_judge(classifiers):
    with pytest.raises(UserError, match=r"not a language model[\s\S]*lm_head.weight[\s\S]*`model:`"):
        judge(classifiers["llama"], token="yes")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "one of `token"),
        ({"token": "a", "pattern": "b"}, "one of `token"),
        ({"token": True}, "YAML reads yes, no"),
        ({"tokens": {False: 0, "a": 1}}, "YAML reads yes, no"),
        ({"tokens": ["a"]}, "name two or more"),
        ({"token": "a", "verdicts": {"a": 1}}, "what `pattern:` finds"),
        ({"token": "a", "temperature": 1}, "that the judge writes"),
        ({"pattern": "("}, "not a regular expression"),
        ({"pattern": "(a)(b)"}, "one group"),
        ({"token": "a", "format": "1"}, "`format:` is for"),
        ({"token": "a", "plain": True, "system": "b"}, "`plain: true` is for"),
        ({"token": "a", "template": "chat", "system": "b"}, "leave out `system:`"),
        ({"token": "a", "template": "{{response}} {a}{b}"}, "must contain {response}"),
        ({"pattern": "a", "against": "ref"}, "{a} and {b}"),
        ({"pattern": "a", "against": "ref", "template": PAIR}, "what each verdict means"),
        ({"token": "a", "against": "ref", "template": PAIR}, "what each verdict means"),
        ({"tokens": {"a": 2, "b": 0}, "against": "ref", "template": PAIR}, "what each verdict means"),
    ],
)
def test_settings_that_make_no_judge_are_refused(settings, message):
    with pytest.raises(ValueError, match=".") as error:
        RewardSpec(judge="a", **{"template": TEXT, **settings})
    assert message in str(error.value)


def test_keys_of_a_judge_are_for_judges():
    for spec in ({"model": "a", "token": "b"}, {"function": "a:b", "against": "c"}):
        with pytest.raises(ValueError, match="is for rewards with `judge:`"):
            RewardSpec(**spec)
    with pytest.raises(ValueError, match="needs `template:`"):
        RewardSpec(judge="a", token="b")
    with pytest.raises(ValueError, match="needs {response}"):
        RewardSpec(model="a", template="{a}{b}")
    assert RewardSpec(model="a").decides().keys().isdisjoint({"judge", "token", "seed"})


@pytest.mark.slow
def test_vllm_gives_the_values_of_transformers(folders):
    both = [{"backend": backend, "max_new_tokens": 6} for backend in ("hf", "vllm")]
    for settings in (
        {"tokens": ["yes", "no"], "unmatched": "abstain"},
        {"token": ["yes", "Yes"], "prefill": "Score: "},
    ):
        hf, vllm = (judge(folders / "bytes", **settings, **one) for one in both)
        assert vllm.check(PROMPTS) == ""
        wanted = hf.score(PROMPTS, RESPONSES)
        assert vllm.score(PROMPTS, RESPONSES) == pytest.approx(wanted, rel=1e-3, nan_ok=True)
    vllm.free()
    hf, vllm = (judge(folders / "scores", "{prompt} {response}", pattern=r"(\d+)", **one) for one in both)
    assert hf.score(["How?"] * 2, ["Well!", "So."]) == vllm.score(["How?"] * 2, ["Well!", "So."]) == [9.0, 2.0]
