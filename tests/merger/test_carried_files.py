"""Whose tokenizer, chat template and generation settings a merge carries, and how the user chooses."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from tiny_adapters import save_adapter
from tiny_models import make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rewarded_lines.engines.base import Workload
from rewarded_lines.engines.load_engine import load_generator
from rewarded_lines.engines.tokenizers import load_tokens
from rewarded_lines.errors import UserError
from rewarded_lines.evaluator.choose import command_for
from rewarded_lines.evaluator.sweep import sweep
from rewarded_lines.merger.merge import merge, replay
from rewarded_lines.merger.open_inputs import plan_as
from rewarded_lines.projects import load_project

TEMPLATE = "{% for turn in messages %}<s>{{ turn.content }}</s>{% endfor %}"
OTHER = "{% for turn in messages %}{{ turn.content }}{% endfor %}"


def edit(path, **values):
    """Change keys of a JSON file."""
    path = Path(path)
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**content, **values}))


def save_template(folder, template):
    """Save a tokenizer with a chat template as transformers does."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


@pytest.fixture
def chats(tiny):
    """The tiny project; both policies have a chat template that the base does not have."""
    for name in ("first", "second"):
        save_template(tiny / name, TEMPLATE)
    return tiny


def notes(results):
    return "\n".join(results[0].notes)


def remedies(error, option):
    """Return what the remedy of an error offers for an option."""
    return re.findall(rf"{option} (\S+?)(?:,| or|$)", error.problems[0].remedy)


def test_the_bases_files_as_long_as_nobody_says_otherwise(tiny):
    shutil.copy("sft/tokenizer.json", "tokenizer.json")
    edit("sft/tokenizer.json", truncation=None)
    results = merge("sft", ["first", "second"], 0.5, out="out")
    assert Path("out/tokenizer.json").read_bytes() == Path("sft/tokenizer.json").read_bytes()
    assert "tokenizer" not in notes(results)
    record = json.loads(Path("out/merge.json").read_text())
    assert (record["tokenizer"], record["config_from"]) == ("base", "base")
    assert "--tokenizer" not in Path("out/README.md").read_text()


def test_a_chat_template_that_all_policies_share(chats):
    results = merge("sft", ["first", "second"], 0.5, out="out")
    assert AutoTokenizer.from_pretrained("out").chat_template == TEMPLATE
    assert "chat template" in notes(results) and "--tokenizer base keeps the base's" in notes(results)
    results = merge("sft", ["first", "second"], 0.5, out="plain", tokenizer="base")
    assert not list(Path("plain").glob("chat_template*")) and "chat template" not in notes(results)
    assert "--tokenizer base" in Path("plain/README.md").read_text()


def test_a_chat_template_in_the_settings_is_the_same_as_one_in_a_file(chats):
    Path("first/chat_template.jinja").unlink()
    edit("first/tokenizer_config.json", chat_template=[{"name": "default", "template": TEMPLATE + "\n"}])
    merge("sft", ["first", "second"], 0.5, out="out")
    merge("sft", ["second", "first"], 0.5, out="other")
    assert AutoTokenizer.from_pretrained("other").chat_template == TEMPLATE


def test_what_a_policy_leaves_open_is_the_bases(chats):
    content = json.loads(Path("second/tokenizer_config.json").read_text())
    del content["bos_token"]
    Path("second/tokenizer_config.json").write_text(json.dumps(content))
    Path("second/generation_config.json").unlink()
    merge("sft", ["first", "second"], 0.5, out="out")
    assert AutoTokenizer.from_pretrained("out").chat_template == TEMPLATE


@pytest.mark.parametrize("template", [None, OTHER])
def test_policies_with_different_templates_are_a_choice(chats, template):
    save_template("second", template)
    if template is None:
        Path("second/chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(UserError, match="the policies differ in tokenizer and chat template: chat template") as caught:
        merge("sft", ["first", "second"], 0.5, out="out")
    expected = {"base": None, "first": TEMPLATE, "second": template}
    assert remedies(caught.value, "--tokenizer") == list(expected)
    for choice, wanted in expected.items():
        merge("sft", ["first", "second"], 0.5, out=f"from-{choice}", tokenizer=choice)
        assert AutoTokenizer.from_pretrained(f"from-{choice}").chat_template == wanted


def test_a_policy_without_a_tokenizer_shares_nothing(chats):
    for path in [*Path("second").glob("*token*"), *Path("second").glob("chat*")]:
        path.unlink()
    with pytest.raises(UserError, match="second: none"):
        merge("sft", ["first", "second"], 0.5, out="out")
    merge("sft", ["first", "second"], 0.5, out="out", tokenizer="first")
    assert AutoTokenizer.from_pretrained("out").chat_template == TEMPLATE


def test_a_folder_beside_base_and_policies(chats, cli):
    save_template("mine", OTHER)
    args = ["merge", "--base", "sft", "--policy", "first", "--policy", "second", "--lam", "0.5"]
    assert cli(*args, "--tokenizer", "mine", "--out", "out").code == 0
    assert AutoTokenizer.from_pretrained("out").chat_template == OTHER
    record = json.loads(Path("out/merge.json").read_text())
    assert "tokenizer.json" in record["tokenizer_files"]["files"]
    assert "--tokenizer mine" in Path("out/README.md").read_text()
    shutil.move("mine", "moved")
    assert "--tokenizer" in cli("merge", "--from", "out", "--out", "again").err
    assert cli("merge", "--from", "out", "--tokenizer", "moved", "--out", "again").code == 0
    assert Path("again/chat_template.jinja").read_text() == OTHER
    Path("moved/chat_template.jinja").write_text(TEMPLATE)
    answer = cli("merge", "--from", "out", "--tokenizer", "moved", "--out", "third")
    assert answer.code == 1 and "the tokenizer has changed since: chat_template.jinja" in answer.err
    assert "no such policy or folder" in cli(*args, "--tokenizer", "nowhere", "--out", "third").err


def test_a_merge_again_takes_the_same_files(chats):
    merge("sft", ["first", "second"], 0.25, out="out")
    replay("out", out="again")
    assert Path("again/README.md").read_text() == Path("out/README.md").read_text()
    for name in (
        "tokenizer.json",
        "chat_template.jinja",
        "tokenizer_config.json",
        "config.json",
        "generation_config.json",
    ):
        assert Path("again", name).read_bytes() == Path("out", name).read_bytes()
    Path("first/chat_template.jinja").write_text(OTHER)
    with pytest.raises(UserError, match="policy `first` has changed since: chat_template.jinja"):
        replay("out", out="third")
    with pytest.raises(UserError, match="the record takes its tokenizer from base or policies"):
        replay("out", out="third", tokenizer="second")


def test_a_record_from_before_the_choice(chats):
    """It took the base's files."""
    merge("sft", ["first", "second"], 0.25, out="out", tokenizer="base", config_from="base")
    content = json.loads(Path("out/merge.json").read_text())
    for key in ("tokenizer", "config_from"):
        del content[key]
    Path("out/merge.json").write_text(json.dumps(content))
    replay("out", out="again")
    assert AutoTokenizer.from_pretrained("again").chat_template is None


def test_the_card_makes_the_same_merge(chats, cli):
    merge("sft", ["first", "second"], 0.25, out="out", tokenizer="second", config_from="first")
    command = re.search(r"^rewarded-lines merge .*--out merged$", Path("out/README.md").read_text(), re.M)[0]
    assert cli(*shlex.split(command)[1:]).code == 0
    for path in Path("out").glob("*token*"):
        assert path.read_bytes() == (Path("merged") / path.name).read_bytes()


def end_with(folder, token, **more):
    """Save another end token in all places, as trainers do."""
    number = make_tokenizer().convert_tokens_to_ids(token)
    for file in ("config.json", "generation_config.json"):
        edit(f"{folder}/{file}", eos_token_id=number, **(more if "generation" in file else {}))
    edit(f"{folder}/tokenizer_config.json", eos_token=token)
    return number


def test_an_end_token_and_sampling_that_all_policies_share(tiny):
    for name in ("first", "second"):
        number = end_with(name, "<s>", temperature=0.6, do_sample=True)
    results = merge("sft", ["first", "second"], 0.5, out="out")
    assert AutoTokenizer.from_pretrained("out").eos_token == "<s>"
    assert GenerationConfig.from_pretrained("out").temperature == 0.6
    assert AutoModelForCausalLM.from_pretrained("out").config.eos_token_id == number
    assert "temperature 0.6" in notes(results) and "--config-from base" in notes(results)
    merge("sft", ["first", "second"], 0.5, out="plain", config_from="base", tokenizer="base")
    for file in ("generation_config.json", "tokenizer_config.json"):
        assert Path("plain", file).read_bytes() == Path("sft", file).read_bytes()
    assert json.loads(Path("plain/config.json").read_text())["eos_token_id"] == 2


def test_what_the_policies_lack_is_told(tiny):
    edit("sft/generation_config.json", temperature=0.6, do_sample=True)
    for name in ("first", "second"):
        end_with(name, "<s>")
    results = merge("sft", ["first", "second"], 0.5, out="out")
    assert "without the base's temperature, do_sample; --config-from base keeps the base's" in notes(results)
    merge("sft", ["first", "second"], 0.5, out="plain", config_from="base")
    assert GenerationConfig.from_pretrained("plain").temperature == 0.6


def test_policies_with_different_end_tokens_are_a_choice(tiny):
    number = end_with("second", "<s>")
    with pytest.raises(UserError) as caught:
        merge("sft", ["first", "second"], 0.5, out="out")
    assert [problem.remedy.split()[-1] for problem in caught.value.problems] == ["second", "second"]
    assert "eos_token '</s>'; second: eos_token '<s>'" in str(caught.value)
    for choice, wanted in (("base", 2), ("first", 2), ("second", number)):
        merge("sft", ["first", "second"], 0.5, out=f"from-{choice}", tokenizer=choice, config_from=choice)
        assert GenerationConfig.from_pretrained(f"from-{choice}").eos_token_id == wanted
        assert json.loads(Path(f"from-{choice}/config.json").read_text())["eos_token_id"] == wanted
    with pytest.raises(UserError, match="no such policy"):
        merge("sft", ["first", "second"], 0.5, out="out", config_from="mine")


def test_padding_alone_is_no_choice(tiny):
    for name, number in (("first", 2), ("second", 1)):
        for file in ("config.json", "generation_config.json"):
            edit(f"{name}/{file}", pad_token_id=number)
    merge("sft", ["first", "second"], 0.5, out="out")
    assert json.loads(Path("out/config.json").read_text())["pad_token_id"] == 0


def test_an_end_token_of_the_text_model_stays_there(tiny):
    content = json.loads(Path("sft/config.json").read_text())
    plan = plan_as("full", "sft", {"first": "first", "second": "second"}, "soup")
    carried = plan.carried.__class__({"base": Path("sft")}, token_ids={"eos_token_id": 5})
    nested = {"text_config": {"eos_token_id": 2, "vocab_size": 300}}
    assert carried.config(nested) == {"text_config": {"eos_token_id": 5, "vocab_size": 300}}
    assert carried.config(content)["eos_token_id"] == 5


def test_a_base_without_a_tokenizer(chats):
    for path in Path("sft").glob("*token*"):
        path.unlink()
    merge("sft", ["first", "second"], 0.5, out="out")
    assert AutoTokenizer.from_pretrained("out").chat_template == TEMPLATE


def test_only_one_input_has_a_tokenizer(chats):
    for path in [path for name in ("sft", "second") for path in Path(name).glob("*token*")]:
        path.unlink()
    assert "tokenizer and chat template of `first`, the base has none" in notes(
        merge("sft", ["first", "second"], 0.5, out="out")
    )
    assert AutoTokenizer.from_pretrained("out").chat_template == TEMPLATE


def add_token(folder, token, number):
    content = json.loads(Path(folder, "tokenizer.json").read_text())
    more = {"id": number, "content": token, "single_word": False, "lstrip": False, "rstrip": False}
    content["added_tokens"].append({**more, "normalized": False, "special": True})
    Path(folder, "tokenizer.json").write_text(json.dumps(content))


def widen(*folders):
    """Give models spare rows in their embeddings, as many models of the Hub have."""
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.resize_token_embeddings(320, mean_resizing=False)
        model.save_pretrained(folder)


def test_tokens_that_all_policies_added_to_spare_rows(tiny):
    widen("sft", "first", "second")
    for name in ("first", "second"):
        add_token(name, "<think>", 300)
    results = merge("sft", ["first", "second"], 0.5, out="out")
    assert AutoTokenizer.from_pretrained("out")("<think>")["input_ids"] == [300]
    assert "added tokens" in notes(results)


def test_added_tokens_that_policies_do_not_share(tiny):
    widen("sft", "first", "second")
    add_token("first", "<think>", 300)
    with pytest.raises(UserError, match="the policies differ in tokenizer and chat template: added tokens"):
        merge("sft", ["first", "second"], 0.5, out="out")
    merge("sft", ["first", "second"], 0.5, out="out", tokenizer="first")
    assert AutoTokenizer.from_pretrained("out")("<think>")["input_ids"] == [300]
    add_token("second", "<tool>", 300)
    with pytest.raises(UserError, match="token 300 is '<think>' in first, '<tool>' in second"):
        merge("sft", ["first", "second"], 0.5, out="other", tokenizer="first")


def test_added_tokens_without_a_row(tiny):
    for name in ("first", "second"):
        add_token(name, "<think>", 300)
    with pytest.raises(UserError, match="no row for: '<think>' \\(300\\)"):
        merge("sft", ["first", "second"], 0.5, out="out")
    merge("sft", ["first", "second"], 0.5, out="out", tokenizer="base")


def test_a_token_of_the_base_that_policies_lost(tiny):
    widen("sft", "first", "second")
    add_token("sft", "<think>", 300)
    with pytest.raises(UserError, match="'<think>' \\(300\\) is missing") as caught:
        merge("sft", ["first", "second"], 0.5, out="out")
    assert remedies(caught.value, "--tokenizer") == ["base", "first", "second"]
    merge("sft", ["first", "second"], 0.5, out="out", tokenizer="base")


def test_text_that_is_split_otherwise_is_a_choice(tiny):
    edit("second/tokenizer.json", normalizer={"type": "Lowercase"})
    with pytest.raises(UserError, match="the tokenizer differs from the base's: in ") as caught:
        merge("sft", ["first", "second"], 0.5, out="out")
    for choice in remedies(caught.value, "--tokenizer"):
        merge("sft", ["first", "second"], 0.5, out=f"from-{choice}", tokenizer=choice)
        wanted = Path("sft" if choice == "base" else choice, "tokenizer.json").read_bytes()
        assert Path(f"from-{choice}/tokenizer.json").read_bytes() == wanted


def test_other_ids_are_refused_whatever_the_choice(tiny):
    content = json.loads(Path("second/tokenizer.json").read_text())
    ids = content["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    Path("second/tokenizer.json").write_text(json.dumps(content))
    for choice in ("auto", "base", "first"):
        with pytest.raises(
            UserError, match="policy `second` .*: the tokenizer differs from the base's in its tokens: 'a' is"
        ):
            merge("sft", ["first", "second"], 0.5, out="out", tokenizer=choice)
    with pytest.raises(UserError, match="--tokenizer .*: the tokenizer differs from the base's in its tokens"):
        merge("sft", ["first"], 1.0, out="out", tokenizer="second")


def test_one_meaning_in_another_form_is_noted(tiny):
    for name in ("first", "second"):
        content = json.loads(Path(name, "tokenizer.json").read_text())
        content["added_tokens"][0]["special"] = False
        Path(name, "tokenizer.json").write_text(json.dumps(content))
    results = merge("sft", ["first", "second"], 0.5, out="out")
    assert "tokenizer of `first`, `second`: written differently from the base's" in notes(results)
    assert "added_tokens" in notes(results)
    assert Path("out/tokenizer.json").read_bytes() == Path("sft/tokenizer.json").read_bytes()


@pytest.fixture
def adapted(tiny):
    for seed, name in enumerate(("one", "two")):
        save_adapter(tiny / "sft", tiny / name, seed)
        save_template(tiny / name, TEMPLATE)
    return tiny


@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_adapters_bring_their_chat_template(adapted, kind):
    merge("sft", ["one", "two"], 0.5, out="out", as_=kind)
    assert AutoTokenizer.from_pretrained("out").chat_template == TEMPLATE
    merge("sft", ["one", "two"], 0.5, out="plain", as_=kind, tokenizer="base")
    assert AutoTokenizer.from_pretrained("plain").chat_template is None
    save_template("two", OTHER)
    with pytest.raises(UserError, match="chat template") as caught:
        merge("sft", ["one", "two"], 0.5, out="again", as_=kind)
    for choice in remedies(caught.value, "--tokenizer"):
        merge("sft", ["one", "two"], 0.5, out=f"from-{choice}", as_=kind, tokenizer=choice)


def test_an_adapters_record_from_before_the_choice(adapted):
    merge("sft", ["one", "two"], 0.5, out="out")
    content = json.loads(Path("out/merge.json").read_text())
    del content["tokenizer"], content["config_from"]
    for policy in content["policies"].values():
        policy["files"] = {name: value for name, value in policy["files"].items() if name.startswith("adapter")}
    Path("out/merge.json").write_text(json.dumps(content))
    replay("out", out="again")
    assert Path("again/chat_template.jinja").read_text() == TEMPLATE


ASKED = [[{"role": "user", "content": "the quick"}]]


def test_a_sweep_asks_as_the_merge_will_be_asked(chats):
    for name in ("first", "second"):
        end_with(name, "<s>")
    plan = plan_as("full", "sft", {"first": "first", "second": "second"}, "soup")
    generation = load_project("rewarded-lines.yaml").generation
    merge("sft", ["first", "second"], 0.5, out="out")
    merged = AutoTokenizer.from_pretrained("out")
    engine = load_generator("hf", "sft", generation, ASKED, plan=plan)
    assert engine.encode(ASKED)[0] == merged("<s>the quick</s>")["input_ids"]
    _, ends, _ = load_tokens(Workload("sft", generation, ASKED, plan))
    assert ends == engine._ends == {merged.convert_tokens_to_ids("<s>")}
    engine.close()


@pytest.mark.parametrize("choice", ["auto", "base", "mine"])
def test_the_project_says_whose_tokenizer(chats, cli, choice):
    save_template("mine", OTHER)
    project = Path("rewarded-lines.yaml")
    project.write_text(project.read_text() + f"tokenizer: {choice}\n")
    Path("test.jsonl").write_text('{"prompt": "the quick"}\n')
    assert cli("merge", "--lam", "0.5", "--out", "out").code == 0
    wanted = {"auto": TEMPLATE, "base": None, "mine": OTHER}[choice]
    assert AutoTokenizer.from_pretrained("out").chat_template == wanted
    run = sweep(points=2, engine="hf")
    assert ("texts" in run.header["identity"]) == (choice != "base")
    command = shlex.split(command_for(run, run.points[-1].spec))
    asked = command[command.index("--tokenizer") + 1] if "--tokenizer" in command else "auto"
    assert Path(asked).name == choice


CLASSES = {
    "configuration_own.py": "from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n"
    '    model_type = "own_llama"\n',
    "modeling_own.py": "from transformers import LlamaForCausalLM\n\nfrom .configuration_own import OwnConfig\n\n\n"
    "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n",
}
MAP = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}


def test_the_code_of_a_class_of_its_own_goes_along(tiny, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tiny / "modules"))
    for name in ("sft", "first", "second"):
        for file, code in CLASSES.items():
            Path(name, file).write_text(code)
        edit(f"{name}/config.json", auto_map=MAP, model_type="own_llama", architectures=["OwnModel"])
    merge("sft", ["first", "second"], 0.5, out="out")
    model = AutoModelForCausalLM.from_pretrained("out", trust_remote_code=True)
    assert type(model).__name__ == "OwnModel"
    replay("out", out="again")
    assert Path("again/modeling_own.py").read_text() == CLASSES["modeling_own.py"]
    # Code on the Hub is found there, and scripts beside a model are no part of it.
    edit("sft/config.json", auto_map={kind: f"org/model--{place}" for kind, place in MAP.items()})
    merge("sft", ["first", "second"], 0.5, out="hub")
    assert not list(Path("hub").glob("*.py"))


def test_files_of_other_tokenizers_go_along(tiny):
    names = ("tekken.json", "source.spm", "qwen.tiktoken", "bpe.codes", "normalizer.json", "vocab-src.json")
    for name in names:
        Path("sft", name).write_text("{}")
    merge("sft", ["first", "second"], 0.5, out="out")
    assert all(Path("out", name).read_text() == "{}" for name in names)
    # A record of an earlier version does not have them.
    record = json.loads(Path("out/merge.json").read_text())
    record["base"]["files"] = {name: each for name, each in record["base"]["files"].items() if name not in names}
    Path("out/merge.json").write_text(json.dumps(record))
    replay("out", out="again")
    Path("sft/tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="base has changed since: tokenizer_config.json"):
        replay("out", out="third")


def test_chat_templates_with_names(chats):
    named = {"default": TEMPLATE, "tool_use": OTHER}
    for name in ("first", "second"):
        save_template(name, named)
    merge("sft", ["first", "second"], 0.5, out="out")
    assert AutoTokenizer.from_pretrained("out").chat_template == named
    # Earlier versions of transformers write all of them into one file.
    for path in (Path("second/chat_template.jinja"), Path("second/additional_chat_templates/tool_use.jinja")):
        path.unlink()
    one_file = [{"name": name, "template": text} for name, text in named.items()]
    edit("second/tokenizer_config.json", chat_template=one_file)
    merge("sft", ["first", "second"], 0.5, out="again")
    save_template("second", {**named, "tool_use": TEMPLATE})
    edit("second/tokenizer_config.json", chat_template=None)
    with pytest.raises(UserError, match="the policies differ in tokenizer and chat template: chat template"):
        merge("sft", ["first", "second"], 0.5, out="third")
