"""Classes of transformers, tiny and merged, against what transformers and PEFT compute; the page that lists them."""

from __future__ import annotations

import re

import pytest
import transformers
from documents import ROOT
from every_class import KINDS, Verdict, block_lists, classes, try_class
from every_class_table import PAGE, read, table, try_all
from tiny_configs import tiny_model

# One of each way to name things; the page has all.
SOME = {
    "text": ["Qwen3ForCausalLM", "LlamaForCausalLM", "Gemma3ForCausalLM", "GPT2LMHeadModel", "PhiForCausalLM"],
    "image": ["Gemma3ForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"],
}
CHOSEN = [(name, group) for group, names in SOME.items() for name in names]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "group"), CHOSEN, ids=[name for name, _ in CHOSEN])
def test_whole_models_and_adapters(name, group):
    verdicts = try_class(name, group)
    assert {verdict.policies: verdict.outcome for verdict in verdicts} == dict.fromkeys(KINDS, "right"), verdicts


@pytest.mark.nightly
@pytest.mark.timeout(7200)
def test_the_page_is_what_comes_out(tmp_path):
    path = tmp_path / "verdicts.jsonl"
    try_all(list(classes()), KINDS, path)
    verdicts = read(path)
    assert [verdict for verdict in verdicts if verdict.outcome == "wrong"] == []
    assert table(verdicts) == PAGE.read_text()


def rows(page):
    """Return the cells of the page's rows by class."""
    found = re.findall(r"^\| `(\w+)` \| (.*) \|$", page, re.MULTILINE)
    return {name: cells.split(" | ") for name, cells in found}


def test_the_page_has_every_class_and_none_is_wrong():
    page = PAGE.read_text()
    assert PAGE.parent == ROOT / "docs"
    found = rows(page)
    # Another version has a few classes more or less.
    if f"transformers {transformers.__version__}" in page:
        assert set(found) == set(classes())
    else:
        assert len(set(found) ^ set(classes())) < len(found) / 10
    assert [name for name, cells in found.items() if "wrong" in cells] == []


def test_the_sums_are_those_of_the_rows():
    verdicts = [
        Verdict("A", "text", "whole", "right"),
        Verdict("A", "text", "adapter", "refused", "no | /tmp/every-class-x/first | got 3"),
        Verdict("B", "image", "whole", "layers", "--layers x"),
    ]
    page = table(verdicts)
    assert "| text, whole models | 1 | 1 | 0 | 0 | 0 | 0 |" in page
    assert "| image, whole models | 1 | 0 | 1 | 0 | 0 | 0 |" in page
    assert rows(page) == {"A": ["right", "refused", "", "no"], "B": ["layers", "", "", "--layers x"]}


def test_depth_is_read_from_the_modules():
    assert block_lists(tiny_model("LlamaForCausalLM")) == {"model.layers": 4}
    found = block_lists(tiny_model("Gemma3ForConditionalGeneration"))
    assert found == {"model.vision_tower.encoder.layers": 6, "model.language_model.layers": 4}
    # The experts of a block are no blocks.
    assert block_lists(tiny_model("JambaForCausalLM")) == {"model.layers": 4}
