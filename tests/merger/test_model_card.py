"""The model card of a merged folder: metadata read by the Hub's own library, and text safe from hostile names."""

import json
import re
import shlex
import time

import pytest
from command import ENVIRONMENT, prepared_run
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from method_params import methods
from plain_checkpoints import save_family
from stand_in_hub import stand_in_hub
from tiny_adapters import save_adapter

from rewarded_lines import merge
from rewarded_lines.merger.input_cards import read_front_matter
from rewarded_lines.merger.methods import METHODS
from rewarded_lines.merger.model_card import escaped, literal


def write_card(folder, front, text="# A model\n"):
    (folder / "README.md").write_text(f"---\n{front}\n---\n{text}")


def make(folder, out="out", **options):
    """Merge the family in `folder` and return its card and the card's text."""
    names = options.pop("names", ("first", "second"))
    policies = options.pop("policies", None) or {name: folder / name for name in names}
    merge(folder / "sft", policies, options.pop("lam", 0.3), out=folder / out, **options)
    card = ModelCard.load(folder / out / "README.md")
    return card.data, card.content


@pytest.fixture
def family(tmp_path):
    return save_family(tmp_path / "models")


def test_what_is_not_known_is_left_out(family):
    data, text = make(family)
    assert data.to_dict() == {
        "base_model_relation": "merge",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["merge", "rewarded-soups", "lines", "rlhf", "rewarded-lines"],
    }
    assert "| policy second | `second` | 0.7 | not given |" in text
    assert "2 blocks | 1, 2 |" in text and "No card of an input gives a licence" in text
    assert str(family) not in text


@pytest.mark.parametrize(
    ("config", "loader", "task"),
    [
        ({"architectures": ["Qwen2AudioForConditionalGeneration"]}, "Qwen2AudioForConditionalGeneration", None),
        (
            {"architectures": ["Mistral3ForConditionalGeneration"], "vision_config": {}},
            "AutoModelForImageTextToText",
            "image-text-to-text",
        ),
        ({"architectures": ["MineModel"], "auto_map": {}}, "AutoModel", None),
    ],
)
def test_the_class_that_loads_it(family, config, loader, task):
    """Most classes named ForConditionalGeneration read text or audio, and have no automatic class in common."""
    for name in ("sft", "first", "second"):
        path = family / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    data, text = make(family)
    assert f"from transformers import {loader}\n" in text and data.pipeline_tag == task


def test_one_licence_for_all(family):
    for name in ("sft", "first", "second"):
        write_card(family / name, "license: apache-2.0\nlanguage: [en, no]\ndatasets: org/prompts")
    data, text = make(family)
    assert data.license == "apache-2.0" and data.language == ["en", "no"] and data.datasets == ["org/prompts"]
    assert "They agree." in text and text.count("apache-2.0") == 4


def test_licences_that_differ(family):
    write_card(family / "sft", "license: other\nlicense_name: llama2\nlicense_link: https://example.org/llama2")
    write_card(family / "first", "license: mit")
    data, text = make(family)
    assert data.license == "other" and data.get("license_name") is None
    assert "[other (llama2)](https://example.org/llama2)" in text and "| 0.3 | mit |" in text
    assert "They differ" not in text and "Where none is given" in text
    write_card(family / "second", "license: mit")
    assert "They differ" in make(family, "again")[1]


def test_a_licence_that_one_input_does_not_give(family):
    write_card(family / "sft", "license: mit")
    data, text = make(family)
    assert data.license is None and "Where none is given, ask the authors" in text


def test_a_folder_has_the_ids_of_what_it_was_made_from(family):
    write_card(family / "sft", "base_model: [org/pretrained, models/first]")
    config = json.loads((family / "first/config.json").read_text())
    (family / "first/config.json").write_text(json.dumps(config | {"_name_or_path": "org/other"}))
    (family / "second/config.json").write_text(json.dumps(config | {"_name_or_path": str(family / "sft")}))
    # `models/first` is a path beside the family's folder, though it looks like an id.
    assert make(family)[0].base_model == ["org/pretrained", "org/other"]


@pytest.mark.slow
def test_ids_of_the_hub(tmp_path):
    """Hub ids instead of folders: in metadata, links and the command; the card's licence is fetched."""
    save_family(tmp_path / "hub/org")
    for name in ("sft", "first", "second"):
        write_card(tmp_path / "hub/org" / name, "license: mit")
    # Makers add the same weights in a form of their own.
    for name in ("consolidated.safetensors", "original/model.safetensors"):
        path = tmp_path / "hub/org/sft" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("the same weights once more")
    with stand_in_hub(tmp_path / "hub") as hub:
        places = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
        words = "merge --base org/sft --policy a=org/first --policy b=org/second --lam 0.25 --out out"
        prepared_run(words.split(), tmp_path, ENVIRONMENT | places).check_returncode()
        assert not any("consolidated" in path or "original" in path for method, path in hub.asked if method == "GET")
        card = ModelCard.load(tmp_path / "out/README.md")
        assert card.data.base_model == ["org/sft", "org/first", "org/second"] and card.data.license == "mit"
        assert "[org/first](https://huggingface.co/org/first)" in card.content and "stand" not in card.content
        # The card's command makes the same bits.
        words = shlex.split(re.search(r"```bash\n(.*?)\n```", card.content)[1])
        assert words[0] == "rewarded-lines"
        prepared_run(words[1:], tmp_path, ENVIRONMENT | places).check_returncode()
    first, second = (tmp_path / folder / "model.safetensors" for folder in ("out", "merged"))
    assert first.read_bytes() == second.read_bytes()


def test_a_folder_of_the_hubs_cache_is_called_by_its_id(family):
    place = family / "models--org--sft/snapshots/0123"
    place.parent.mkdir(parents=True)
    (family / "sft").rename(place)
    merge(place, [family / "first"], out=family / "out")
    card = ModelCard.load(family / "out/README.md")
    assert card.data.base_model == ["org/sft"] and "--base org/sft" in card.content


@pytest.mark.parametrize("method", methods(name for name in METHODS if name != "greedy"))
def test_the_command_of_every_method_makes_the_same_bits(family, cli, monkeypatch, method):
    names = ("first",) if METHODS[method].policies == 1 else ("first", "second")
    lam = None if METHODS[method].weights == "none" else 0.3 if len(names) > 1 else 0.4
    data, text = make(family, names=names, lam=lam, method=method, alpha=0.7, beta=0.1, dtype="float16")
    expected = "rewarded-soups" if method == "soup" else method
    assert expected in data.tags and "lines" in data.tags
    monkeypatch.chdir(family)
    words = shlex.split(re.search(r"```bash\n(.*?)\n```", text)[1])
    assert cli(*words[1:]).code == 0
    assert (family / "merged/model.safetensors").read_bytes() == (family / "out/model.safetensors").read_bytes()
    row = METHODS[method]
    lines = row.written({name: option.default for name, option in row.options.items()})
    assert all(line in text for line in lines) and all(number in text for _, number in row.papers)


@pytest.mark.parametrize(
    "options",
    [{"lam": "1.5,-0.25", "extrapolate": True, "outside": "depth"}, {"layers": r"model\.layers\.(\d+)\."}],
    ids=["extrapolated", "layers"],
)
def test_other_options_are_in_the_command(family, cli, monkeypatch, options):
    _, text = make(family, **options)
    monkeypatch.chdir(family)
    assert cli(*shlex.split(re.search(r"```bash\n(.*?)\n```", text)[1])[1:]).code == 0
    assert (family / "merged/model.safetensors").read_bytes() == (family / "out/model.safetensors").read_bytes()


def test_the_formula_says_what_tensors_outside_the_blocks_get(family):
    assert "embeddings, final norm and head: α" in make(family)[1]
    beside = make(family, "beside", outside="depth")[1]
    assert "embeddings, final norm and head: that of the block beside them" in beside


def test_plain_soups_are_not_called_lines(family):
    data, text = make(family, alpha=1.0, beta=0.0)
    assert "lines" not in data.tags and text.count("# Rewarded Soup of first, second") == 1
    assert "2410.17146" not in text


def test_adapters(tiny):
    for seed, name in enumerate(("one", "two")):
        save_adapter(tiny / "sft", tiny / name, seed=seed)
    merge(tiny / "sft", [tiny / "one", tiny / "two"], out=tiny / "out")
    card = ModelCard.load(tiny / "out/README.md")
    assert card.data.library_name == "peft" and "lora" in card.data.tags
    rank = json.loads((tiny / "out/adapter_config.json").read_text())["r"]
    assert f"A LoRA adapter of rank {rank}" in card.content and "LoRARequest" in card.content
    assert re.search(r"max_lora_rank=(\d+)", card.content)


HOSTILE = [
    "a|b",
    "`code` and ``more``",
    "<script>alert(1)</script>",
    "![x](http://evil/x.png)",
    "line\nbreak\n---\nlicense: mit\n---",
    "# heading",
    "*bold* _and_ [link](javascript:x) $math$ ~~gone~~",
    "\x1b[31mred",
    "```\nout of the fence\n```",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_shown_and_not_obeyed(family, name):
    data, text = make(family, policies={name: family / "first", "plain": family / "second"})
    assert data.license is None and data.get("base_model_relation") == "merge"
    parsed = MarkdownIt("commonmark").enable("table").parse(text.split("\n---\n", 1)[1])
    headings = [parsed[at + 1].content for at, token in enumerate(parsed) if token.type == "heading_open"]
    assert headings[1:] == ["Load it", "Make it again", "Licences", "Papers"]
    inside = [child for token in parsed for child in token.children or []]
    assert not {"html_block", "hr", "image"} & {token.type for token in [*parsed, *inside]}
    assert not any(token.type in ("html_inline", "image", "em", "s_open") for token in inside)
    addresses = {token.attrs["href"].split("/")[2] for token in inside if token.type == "link_open"}
    assert addresses == {"arxiv.org"} and "\x1b" not in text
    # In both tables, every row has as many cells as the head.
    cells = [token.type for token in parsed if token.type in ("tr_open", "td_open", "th_open")]
    rows = " ".join(cells).split("tr_open")[1:]
    assert [len(row.split()) for row in rows] == [4] * 4 + [2] * 5


def test_the_text_of_a_card_reads_as_it_was_written():
    """A parser of Markdown returns escaped text unchanged."""
    for text in HOSTILE:
        line = " ".join(text.split())
        for written in (escaped(text), literal(text)):
            html = MarkdownIt("commonmark").renderInline(written.replace("\\|", "|"))
            shown = re.sub(r"</?code>", "", html)
            for entity, char in (("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&amp;", "&")):
                shown = shown.replace(entity, char)
            assert shown == line, written


DAMAGED = [
    "license: [unclosed",
    "license: !!python/object/apply:os.system ['true']",
    "- a\n- list",
    "license: {a: b}\nlanguage: 3\nbase_model: ../../etc/passwd",
    "license: 'a | b'\nlicense_link: 'javascript:alert(1)'",
    "date: 2020-99-99",
    "a: &a [x]\nb: &b [*a, *a]\nlicense: *b",
    "license: " + "[" * 5000,
    "license: " + "- " * 100_000,
    "base_model:\n" + "\n".join("  " * depth + "-" for depth in range(120)),
]


@pytest.mark.parametrize("front", DAMAGED, ids=range(len(DAMAGED)))
def test_cards_of_inputs_that_cannot_be_read_say_nothing(family, front):
    write_card(family / "sft", front)
    data, text = make(family)
    assert data.license is None and data.base_model is None and "javascript" not in text


def test_a_card_with_much_else_is_read_at_once(family):
    results = "model-index:\n" + "- results: [{name: accuracy, value: 0.5}]\n" * 4000
    write_card(family / "sft", f"{results}license: mit\nlanguage:\n- en\n- de\ntags: [a]")
    begun = time.perf_counter()
    assert read_front_matter(family / "sft") == {"license": "mit", "language": ["en", "de"]}
    assert time.perf_counter() - begun < 0.1


def test_other_ends_of_lines_and_no_front(family):
    (family / "sft/README.md").write_bytes(b"\xef\xbb\xbf---\r\nlicense: mit\r\nlanguage: en\r\n---\r\n\xff text")
    (family / "first/README.md").write_text("# no metadata\n---\nlicense: gpl\n---\n")
    (family / "second/README.md").mkdir()
    data, text = make(family)
    assert data.language == ["en"] and "| base | `sft` |  | mit |" in text and "gpl" not in text
