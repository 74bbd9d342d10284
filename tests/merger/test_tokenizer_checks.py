"""Two tokenizers mean the same or not, whatever the form of their files."""

import json

import pytest
from tiny_models import TEXT, make_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from rewarded_lines.errors import UserError
from rewarded_lines.merger.tokenizer_checks import compare_tokenizers


@pytest.fixture(scope="module")
def bpe():
    """The tiny byte-level tokenizer, as the content of its file."""
    return make_tokenizer().backend_tokenizer.to_str()


@pytest.fixture(scope="module")
def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(
        TEXT * 4, trainers.UnigramTrainer(vocab_size=60, unk_token="<unk>", special_tokens=["<unk>"])
    )
    return tokenizer.to_str()


@pytest.fixture
def compared(tmp_path):
    """Compare a tokenizer.json with one that a function has changed."""

    def compare(text, change):
        for name in ("base", "policy"):
            (tmp_path / name).mkdir()
            content = json.loads(text)
            if name == "policy":
                change(content)
            (tmp_path / name / "tokenizer.json").write_text(json.dumps(content))
        return compare_tokenizers(tmp_path / "base", tmp_path / "policy")

    return compare


def older_merges(content):
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]


def older_settings(content):
    for key in ("ignore_merges", "byte_fallback", "fuse_unk", "dropout", "unk_token"):
        content["model"].pop(key, None)


def trimmed_offsets(content):
    content["pre_tokenizer"]["trim_offsets"] = not content["pre_tokenizer"]["trim_offsets"]


def decoder_and_padding(content):
    content["decoder"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    content["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {"strategy": {"Fixed": 16}, "direction": "Left", "pad_to_multiple_of": None}
    content["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}


@pytest.mark.parametrize("change", [older_merges, older_settings, trimmed_offsets, decoder_and_padding])
def test_forms_of_other_versions(compared, bpe, change):
    found = compared(bpe, change)
    assert not (found.vocabulary or found.behaviour or found.form or found.unsure or found.extra or found.missing)


def plain(content):
    for token in content["added_tokens"]:
        token["special"] = False


def one_in_a_sequence(content):
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [content["pre_tokenizer"]]}
    content["normalizer"] = {"type": "Sequence", "normalizers": []}


def split_by_hand(content):
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    own = {**content["pre_tokenizer"], "use_regex": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, own]}


@pytest.mark.parametrize(
    ("change", "form"),
    [
        (plain, ["added_tokens"]),
        (one_in_a_sequence, ["normalizer", "pre_tokenizer"]),
        (split_by_hand, ["pre_tokenizer"]),
        (
            lambda content: content["model"].update(unk_token="<pad>", fuse_unk=True),
            ["model.fuse_unk", "model.unk_token"],
        ),
    ],
)
def test_one_meaning_in_another_form(compared, bpe, change, form):
    found = compared(bpe, change)
    assert not (found.vocabulary or found.behaviour or found.unsure) and sorted(found.form) == form


def swap_two(content):
    ids = content["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]


def another_special(content):
    content["added_tokens"][0]["content"] = "<other>"


def lose_one(content):
    del content["model"]["vocab"]["Ġthe"]
    content["model"]["merges"] = [pair for pair in content["model"]["merges"] if "".join(pair) != "Ġthe"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (swap_two, "'a' is token "),
        (another_special, "'<other>' is no token, here token 0"),
        (lose_one, "'Ġthe' is token "),
    ],
)
def test_other_ids_are_named(compared, bpe, change, said):
    assert said in "; ".join(compared(bpe, change).vocabulary)


def swap_merges(content):
    merges = content["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


def single_digits(content):
    digits = {"type": "Digits", "individual_digits": True}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, content["pre_tokenizer"]]}


def eat_spaces(content):
    content["added_tokens"][1]["lstrip"] = True


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (swap_merges, "merge 0 is "),
        (lambda content: content.update(normalizer={"type": "Lowercase"}), "in "),
        (lambda content: content.update(normalizer={"type": "NFC"}), "in "),
        (lambda content: content["pre_tokenizer"].update(add_prefix_space=True), "in "),
        (eat_spaces, "<s>"),
        (lambda content: content["model"].update(ignore_merges=True, merges=[]), "merge 0 is "),
    ],
)
def test_text_that_is_split_otherwise_is_shown(compared, bpe, change, said):
    found = compared(bpe, change)
    assert not found.vocabulary and said in found.behaviour[0]


def test_digits_one_by_one(compared, bpe):
    def join_digits(content):
        content["model"]["vocab"]["12"] = 300
        content["model"]["merges"].append(["1", "2"])

    content = json.loads(bpe)
    join_digits(content)
    found = compared(json.dumps(content), single_digits)
    assert "'12' (300), here '1'" in found.behaviour[0]


def test_tokens_that_merges_do_not_reach(compared, bpe):
    content = json.loads(bpe)
    content["model"]["vocab"]["Ġquickly"] = 300
    found = compared(json.dumps(content), lambda content: content["model"].update(ignore_merges=True))
    assert "quickly" in found.behaviour[0]


def test_scores_of_a_unigram_model(compared, unigram):
    def rounded(content):
        content["model"]["vocab"] = [[piece, float(f"{score:.9g}")] for piece, score in content["model"]["vocab"]]

    assert not compared(unigram, rounded).behaviour


def test_other_scores_of_a_unigram_model(compared, unigram):
    def other(content):
        content["model"]["vocab"][5][1] -= 0.5

    assert "scores" in compared(unigram, other).behaviour[0]


def test_added_tokens_stand_apart(compared, bpe):
    more = {"id": 300, "content": "<think>", "single_word": False, "lstrip": False, "rstrip": False}
    more |= {"normalized": False, "special": True}
    found = compared(bpe, lambda content: content["added_tokens"].append(more))
    assert dict(found.extra) == {"<think>": 300} and not (found.behaviour or found.vocabulary or found.missing)


def test_tokens_around_a_text(compared, bpe):
    def begin(content):
        pieces = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        content["post_processor"] = {"type": "TemplateProcessing", "single": pieces, "pair": pieces}
        content["post_processor"]["special_tokens"] = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}

    found = compared(bpe, begin)
    assert found.around == "<s> … " and not (found.behaviour or found.form)


def test_what_the_library_cannot_read_is_refused(compared, bpe):
    found = compared(bpe, lambda content: content.update(normalizer={"type": "OfTomorrow"}))
    assert "cannot read it" in found.behaviour[0]


@pytest.mark.parametrize("text", ["{}", '{"model": {"vocab": {"a": "b"}}}', '{"model": {"vocab": 7}}', '{"model": []}'])
def test_no_tokenizer(tmp_path, bpe, text):
    for name, content in (("base", bpe), ("policy", text)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="it is no tokenizer"):
        compare_tokenizers(tmp_path / "base", tmp_path / "policy")


def varint(number):
    return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)


def sentencepiece(pieces):
    """Return a SentencePiece model with these texts and kinds, and a normalizer that is passed over."""

    def field(number, content):
        return varint(number << 3 | 2) + varint(len(content)) + content

    def piece(text, kind):
        return field(1, text.encode()) + b"\x15\x00\x00\x80\xbf" + b"\x18" + varint(kind)

    return b"".join(field(1, piece(*one)) for one in pieces) + field(3, field(1, b"nmt_nfkc"))


def save_slow(folder, kind, content):
    folder.mkdir()
    ids, merges = content["model"]["vocab"], content["model"].get("merges", [])
    if kind == "sentencepiece":
        names = sorted(ids, key=ids.get)
        special = [token["content"] for token in content["added_tokens"]]
        (folder / "tokenizer.model").write_bytes(sentencepiece([(name, 3 if name in special else 1) for name in names]))
    elif kind == "bpe":
        (folder / "vocab.json").write_text(json.dumps(ids))
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
        (folder / "merges.txt").write_text("\n".join(lines))
    else:
        (folder / "vocab.txt").write_text("\n".join(sorted(ids, key=ids.get)) + "\n")


@pytest.mark.parametrize("kind", ["sentencepiece", "bpe", "wordpiece"])
def test_a_slow_tokenizer_beside_a_fast_one(tmp_path, bpe, kind):
    """Ids are compared, and what could not be compared is told."""
    content = json.loads(bpe)
    save_slow(tmp_path / "base", kind, content)
    (tmp_path / "policy").mkdir()
    file = tmp_path / "policy/tokenizer.json"
    file.write_text(bpe)
    for pair in (("base", "policy"), ("policy", "base")):
        found = compare_tokenizers(*(tmp_path / name for name in pair))
        assert not (found.vocabulary or found.behaviour or found.extra or found.missing)
        assert "how they split text was not compared" in found.unsure[0]
    swap_two(content)
    file.write_text(json.dumps(content))
    assert "'a' is token" in compare_tokenizers(tmp_path / "base", tmp_path / "policy").vocabulary[0]


@pytest.mark.parametrize("kind", ["sentencepiece", "bpe", "wordpiece"])
def test_two_slow_tokenizers(tmp_path, bpe, kind):
    content = json.loads(bpe)
    for name in ("base", "same"):
        save_slow(tmp_path / name, kind, content)
    lose_one(content)
    save_slow(tmp_path / "other", kind, content)
    assert not compare_tokenizers(tmp_path / "base", tmp_path / "same").vocabulary
    assert "Ġthe" in str(compare_tokenizers(tmp_path / "base", tmp_path / "other").vocabulary)


def test_merges_of_a_slow_tokenizer(tmp_path, bpe):
    content = json.loads(bpe)
    swap_merges(content)
    save_slow(tmp_path / "base", "bpe", content)
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy/tokenizer.json").write_text(bpe)
    assert "merge 0 is" in compare_tokenizers(tmp_path / "base", tmp_path / "policy").behaviour[0]


def test_a_damaged_sentencepiece_model(tmp_path, bpe):
    for name, content in (("base", b"\x0a\xff"), ("policy", sentencepiece([("a", 1)]))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match="it is no tokenizer"):
        compare_tokenizers(tmp_path / "base", tmp_path / "policy")
