"""The ready tasks' row functions, on rows as the data sets have them; their rewards, template and suites."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import jinja2
import pytest
import ready_tasks
import torch
from transformers import AutoTokenizer, BertConfig, BertModel

from rewarded_lines.config import DataSpec
from rewarded_lines.data.rows import read_rows
from rewarded_lines.projects import load_project
from rewarded_lines.references import find_function
from rewarded_lines.rewards.load_rewards import load_rewards

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "recipes" / "configs"
SUITES = ROOT / "eval" / "suites"


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def comparison(post, better=1, **info):
    """A row of openai/summarize_from_feedback, `comparisons`."""
    return {
        "info": {"id": "t3_1", "post": post, "title": "A title", "subreddit": "pets", "site": None, "article": None}
        | info,
        "summaries": [
            {"text": " First\nsummary.", "policy": "sup4", "note": None},
            {"text": " Second summary.", "policy": "ref", "note": None},
        ],
        "choice": better,
        "worker": "w",
        "batch": "batch3",
        "split": "train",
        "extra": {"confidence": 5},
    }


POST = "My dog\nbarks. " * 12


@pytest.fixture
def summary():
    return load(CONFIGS / "summary" / "rows.py")


def test_posts_and_summaries_become_lines(summary):
    post = POST.replace("\n", " ").strip()
    first, second = "First summary.", "Second summary."
    assert summary.demonstrations(comparison(POST)) == {"prompt": post, "completion": second}
    assert summary.preferences(comparison(POST)) == {"prompt": post, "chosen": second, "rejected": first}
    assert summary.preferences(comparison(POST, better=0)) == {"prompt": post, "chosen": first, "rejected": second}


@pytest.mark.parametrize("post", [None, "short", "x" * 100, "x" * 1200])
def test_articles_and_posts_of_other_lengths_are_left_out(summary, post):
    for function in (summary.demonstrations, summary.preferences, summary.posts):
        assert function(comparison(post, article="News.")) is None
    assert summary.posts(comparison("x" * 101)) and summary.posts(comparison("x" * 1199))


def test_a_post_comes_once_and_again_when_the_data_are_read_again(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(comparison(post)) + "\n" for post in (POST, POST, POST + "!", POST)))
    spec = load_project(SUITES / "summary.yaml").config.prompts
    spec = spec.model_copy(update={"dataset": None, "file": str(data), "split": "validation"})
    read = [[row["prompt"] for row in read_rows(spec, [("prompt",)], SUITES)] for _ in range(2)]
    post = POST.replace("\n", " ").strip()
    assert read[0] == read[1] == [post, POST.replace("\n", " ") + "!"]


def test_the_template_puts_the_instruction_before_the_post_and_ends_the_summary():
    template = jinja2.Template((CONFIGS / "summary" / "template.jinja").read_text())
    turns = [{"role": "system", "content": "Do."}, {"role": "user", "content": "It is so."}]
    asked = template.render(messages=turns, bos_token="<s>", eos_token="</s>", add_generation_prompt=True)
    assert asked == "<s>### Instruction: Do. ### Input: It is so. ### Response:\n"
    turns.append({"role": "assistant", "content": "So."})
    assert template.render(messages=turns, bos_token="<s>", eos_token="</s>") == asked + "So.</s>"


def test_the_safety_template_writes_what_the_reward_models_read():
    template = jinja2.Template((CONFIGS / "safety" / "template.jinja").read_text())
    turns = [{"role": "user", "content": "How?"}]
    asked = template.render(messages=turns, bos_token="<s>", eos_token="</s>", add_generation_prompt=True)
    turns.append({"role": "assistant", "content": "So."})
    answered = template.render(messages=turns, bos_token="<s>", eos_token="</s>")
    reads = load_project(SUITES / "safety.yaml").config.rewards["helpful"].template
    assert asked == "<s>" + reads.format(prompt="How?", response="") and answered == asked + "So.</s>"


def test_chats_keep_the_turns_before_the_answer():
    helpsteer, chat = load(CONFIGS / "helpsteer" / "rows.py"), load(CONFIGS / "chat" / "rows.py")
    asked, answer = {"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}
    row = {"domain": "general", "context": [asked]}
    assert helpsteer.prompts(row) == {"prompt": [asked]} and helpsteer.prompts({**row, "domain": "code"}) is None
    assert chat.prompts({"prompt": "How?", "chosen": [asked, answer], "rejected": [asked, answer]}) == {
        "prompt": [asked]
    }
    assert chat.prompts({"prompt": "How?", "chosen": [asked, {**answer, "content": ""}]}) is None


DIALOGUE = "\n\nHuman: Hello\n\nAssistant: Hi!\n\nHuman: How are you?\n\nAssistant:"


def test_dialogues_end_where_the_assistant_speaks_last():
    rows = load(CONFIGS / "assistant" / "rows.py")
    row = {"chosen": DIALOGUE + " Fine,\n\nthanks. ", "rejected": DIALOGUE + "Bad."}
    assert rows.demonstrations(row) == {"prompt": DIALOGUE, "completion": " Fine,\n\nthanks."}
    assert rows.preferences(row) == {"prompt": DIALOGUE, "chosen": " Fine,\n\nthanks.", "rejected": " Bad."}
    assert rows.dialogues(row) == {"prompt": DIALOGUE}


@pytest.mark.parametrize(
    "chosen",
    [
        "\n\nHuman: Hello",
        DIALOGUE,
        DIALOGUE + " \n",
        DIALOGUE + " Fine.\n\nHuman: Bye",
        "\n\nHuman: " + "x" * 2000 + "\n\nAssistant: No.",
    ],
    ids=["no assistant", "nothing said", "blank", "the human has the last word", "too long"],
)
def test_what_is_no_dialogue_is_left_out(chosen):
    rows = load(CONFIGS / "assistant" / "rows.py")
    row = {"chosen": chosen, "rejected": DIALOGUE + " Fine."}
    assert rows.demonstrations(row) is rows.preferences(row) is rows.dialogues(row) is None


def test_answers_to_different_dialogues_are_no_pair():
    rows = load(CONFIGS / "assistant" / "rows.py")
    assert rows.preferences({"chosen": DIALOGUE + " Fine.", "rejected": "\n\nHuman: Hi\n\nAssistant: Hi."}) is None


def test_a_synopsis_is_set_against_an_earlier_one():
    rows = load(CONFIGS / "smollm2" / "rows.py")
    data = [{"description": f"About {name}", "synopsis": name} for name in ("a", "b", "b", "c", "a")]
    expected = [None, ("b", "a"), ("b", "a"), ("c", "b"), ("a", "b")]
    for _ in range(2):
        contrast = rows.Contrast(distance=2)
        made = [contrast(row) for row in data]
        assert [pair and (pair["chosen"], pair["rejected"]) for pair in made] == expected
    assert made[1]["prompt"] == "About b"


INDEX = """\
Package: short
Description-md5: 0
Description-en: too short to be used
 Nothing.

Package: dog
Description-md5: 1
Description-en: barks at strangers
 A dog barks at whoever comes to the door, by day and by night,
 and whatever the weather.
 .
 It needs no configuration, but food:
  * meat

Package: cat
Description-md5: 2
Description-en: sleeps on a warm place
 {long}

"""


def test_packages_are_read_and_split_once_for_all(tmp_path):
    packages = load(CONFIGS / "smollm2" / "packages.py")
    (tmp_path / "index").write_text(INDEX.format(long="It sleeps. " * 80))
    (row,) = packages.packages((tmp_path / "index").read_text())
    assert (row["package"], row["synopsis"]) == ("dog", "barks at strangers")
    assert row["description"].startswith("A dog barks") and row["description"].endswith("but food: * meat")
    (tmp_path / "index").write_text((INDEX + INDEX).format(long="It sleeps on whatever is warm. " * 5))
    assert sum(packages.write(tmp_path / "index", tmp_path / "data").values()) == 2
    files = {path.stem: path.read_text() for path in (tmp_path / "data").iterdir()}
    assert set(files) == {"train", "validation", "test"} and "".join(files.values()).count("\n") == 2
    parts = [packages.part(f"description {number}") for number in range(2000)]
    assert 50 < parts.count("validation") < 150 and 50 < parts.count("test") < 150


@pytest.fixture
def package_rewards(tmp_path):
    """The packages suite where a user would have copied it to, with a tiny encoder."""
    tokenizer = ready_tasks.byte_pairs(("[PAD]", "[CLS]", "[SEP]"), bos=1, eos=2, pad=0, around="[CLS] $A [SEP]")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
    for part in (BertModel(BertConfig(vocab_size=400, **sizes)), tokenizer):
        part.save_pretrained(tmp_path / "encoder")
    shutil.copytree(SUITES, tmp_path / "eval" / "suites")
    source = tmp_path / "eval" / "suites" / "package_rewards.py"
    source.write_text(re.sub(r"(?m)^ENCODER = .*$", f"ENCODER = {str(tmp_path / 'encoder')!r}", source.read_text()))
    (tmp_path / "runs" / "smollm2").mkdir(parents=True)
    project = tmp_path / "runs" / "smollm2" / "rewarded-lines.yaml"
    shutil.copy(SUITES / "packages.yaml", project)
    return load_rewards(load_project(project))


DOG = "This package provides a dog that barks loudly at strangers, and at friends."


def test_what_is_kept_and_how_short_and_plain_it_is(package_rewards):
    short, longer, copied, invented = "dog", "dog barks at strangers", DOG, "dog barks at green aliens"
    faithful, brief, readable, overlap = (
        reward.score([DOG] * 4, [short, longer, copied, invented]) for reward in package_rewards.values()
    )
    # The description's content: dog, barks, loudly, strangers, friends.
    assert overlap == pytest.approx([100 / 5, 100 * 3 / 5, 100, 100 * 2 / 5 * 2 / 4])
    assert brief == [-1.0, -4.0, -13.0, -5.0]
    # 3 letters in 1 word, 19 in 4.
    assert readable[:2] == pytest.approx([21.43 - 4.71 * 3 - 0.5, 21.43 - 4.71 * 19 / 4 - 0.5 * 4])
    assert faithful[2] == pytest.approx(100) and all(score < 99.9 for score in (*faithful[:2], faithful[3]))
    assert faithful == package_rewards["faithful"].score([DOG] * 4, [short, longer, copied, invented])


def test_faithful_is_the_cosine_of_mean_states(package_rewards, tmp_path):
    tokenizer, model = (
        AutoTokenizer.from_pretrained(tmp_path / "encoder"),
        BertModel.from_pretrained(tmp_path / "encoder"),
    )
    with torch.no_grad():
        one, two = (model(**tokenizer(text, return_tensors="pt")).last_hidden_state.mean(1) for text in (DOG, "a dog"))
    expected = 100 * float(torch.cosine_similarity(one, two))
    assert package_rewards["faithful"].score([DOG], ["a dog"]) == pytest.approx([expected], abs=1e-3)


def test_no_words_are_no_summary(package_rewards):
    assert package_rewards["overlap"].score(["A dog", "the", "dog"], ["", "dog", "of the"]) == [0.0] * 3
    assert package_rewards["faithful"].score(["A dog"] * 2, ["", " \n"]) == [0.0] * 2
    for name in ("brief", "readable"):
        assert package_rewards[name].score(["A dog"] * 2, ["", " \n"]) == [-40.0, -40.0]


def test_controls_are_chats_and_reviews(tmp_path, monkeypatch):
    ready_tasks.make_hub(tmp_path / "hub")
    controls = load(CONFIGS / "smollm2" / "controls.py")
    monkeypatch.setattr(controls, "QUESTIONS", controls.QUESTIONS[:3])
    chats = controls.chats(str(tmp_path / "hub" / "HuggingFaceTB/SmolLM2-135M-Instruct"))
    assert len(chats) == 3 and all(
        chat.startswith(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
        and chat.endswith("<|im_end|>\n")
        for chat, question in zip(chats, controls.QUESTIONS, strict=True)
    )
    controls.write(tmp_path / "chat.jsonl", chats)
    rows = read_rows(DataSpec(file=str(tmp_path / "chat.jsonl")), [("text",)])
    assert [row["text"] for row in rows] == chats
    reviews = controls.reviews()
    assert len(set(reviews)) == controls.REVIEWS and all(len(review.split()) >= 5 for review in reviews)


@pytest.mark.parametrize("name", ["assistant", "chat", "helpsteer", "packages", "safety", "summary"])
def test_a_suite_is_a_project_without_models(name):
    suite = load_project(SUITES / f"{name}.yaml").config
    assert suite.base is None and suite.policies == {} and len(suite.rewards) >= 2
    if suite.prompts.rows:
        # As far from the checkout as the folder that it is copied to.
        assert find_function(suite.prompts.rows, SUITES, where=name)
        assert (SUITES / suite.prompts.rows.partition(":")[0]).resolve().is_relative_to(CONFIGS)
