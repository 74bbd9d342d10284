"""Ready functions by name: their values are those of the libraries, and faults of options are told at once."""

import builtins
import json
import socket

import jsonschema
import pytest
import textstat
from math_verify import parse, verify
from py3langid.langid import MODEL_FILE, LanguageIdentifier

from rewarded_lines.errors import UserError
from rewarded_lines.reward_settings import RewardSpec
from rewarded_lines.rewards.load_rewards import load_reward

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 2}}, "required": ["n"]}
TEXTS = [
    "The quick brown fox jumps over the lazy dog. It is not amused.",
    "Der schnelle braune Fuchs springt über den faulen Hund und ist müde.",
    "Incomprehensible administrative terminology complicates understanding considerably.",
    '{"n": 2}',
    "",
]


def score(name, texts, rows=None, root=None, **options):
    reward = load_reward("mine", RewardSpec(function=name, options=options), *([root] if root else []))
    assert len(reward.fingerprint) == 64
    return reward.score(["p"] * len(texts), texts, rows)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a ready function touched the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


ANSWERS = [
    ("42", "so it is $42$", 1),
    (42, "The answer is 42.", 1),
    (r"\frac{14}{3}", r"\boxed{14/3}", 1),
    (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(3, \pi/2)}", 1),
    (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{3}", 0),
    ("(3, 4)", "$4$", 0),
    ("2x+3", "$3$", 0),
    (r"2\sqrt{3}", "$2$", 0),
    ("She has 10*8 = 80, less 8.\n#### 72", "that makes 72", 1),
    (r"We find \boxed{7}.", "$7$", 1),
    ("1,234", "it costs $1234", 1),
    ("0.5", r"$\frac{1}{2}$", 1),
    ("5", "", 0),
    (None, "5", None),
]


def test_math_answers():
    answers, responses, right = zip(*ANSWERS, strict=True)
    scores = score("math_answer", responses, [{"answer": answer} for answer in answers])
    assert [None if one != one else one for one in scores] == list(right)
    # What the library reads whole by itself.
    whole = [at for at, answer in enumerate(answers) if answer in ("42", r"We find \boxed{7}.", "5", "0.5", "1,234")]
    assert [scores[at] for at in whole] == [verify(parse(answers[at]), parse(responses[at])) for at in whole]


@pytest.mark.parametrize("where", ["file", "inline", "column", "text"])
def test_json_schema(tmp_path, where):
    texts = ['{"n": 2}', '{"n": 1}', '{"n": NaN}', "no JSON", '```json\n{"n": 3}\n```', "[" * 100_000]
    (tmp_path / "s.json").write_text(json.dumps(SCHEMA))
    column = {"column": SCHEMA, "text": json.dumps(SCHEMA)}.get(where)
    options = {} if column else {"schema": "s.json" if where == "file" else SCHEMA}
    rows = [{"schema": column}] * len(texts) if column else None
    direct = [jsonschema.Draft202012Validator(SCHEMA).is_valid(json.loads(text)) for text in texts[:2]]
    assert score("json_schema", texts, rows, tmp_path, **options) == [*map(float, direct), 0, 0, 0, 0]
    assert score("json_schema", texts[4:5], rows and rows[:1], tmp_path, fenced=True, **options) == [1]


def test_a_schema_that_points_elsewhere_is_told():
    with pytest.raises(UserError, match="the schema refers to what it does not hold"):
        score("json_schema", ["{}"], schema={"$ref": "https://example.org/s.json"})


VALUES = [
    ("regex", {"pattern": r"\bfox\b"}, [1, 0, 0, 0, 0]),
    ("regex", {"pattern": r"\{.*\}", "match": "full"}, [0, 0, 0, 1, 0]),
    ("regex", {"pattern": "[.]", "match": "count"}, [2, 1, 1, 0, 0]),
    ("length", {}, [13, 12, 6, 2, 0]),
    ("length", {"unit": "characters", "target": 8}, [-54, -60, -75, 0, -8]),
    ("length", {"maximum": 12, "margin": 4}, [-1, -1, 0, 0, 0]),
    ("length", {"maximum": 14, "margin": 4}, [-0.75, -0.5, 0, 0, 0]),
    ("repetition", {"size": 1}, [0, 0, 0, 0, 0]),
    ("readability", {"formula": "lix"}, [textstat.lix(text) for text in TEXTS]),
    ("readability", {}, [textstat.automated_readability_index(text) for text in TEXTS]),
    ("readability", {"formula": "rix", "target": 2}, [-abs(textstat.rix(text) - 2) for text in TEXTS]),
]


def test_values_of_texts():
    for name, options, expected in VALUES:
        assert score(name, TEXTS, **options) == pytest.approx(expected, abs=1e-12), (name, options)


def test_repetition_and_language():
    assert score("repetition", ["a b a b a b", "a b c"], size=2) == pytest.approx([-0.6, 0])
    # Chinese has no spaces: every response was one word, and without a run.
    assert score("repetition", ["今天今天今天"], size=2) == pytest.approx([-0.6])
    assert score("length", ["今天天气很好。"]) == [6]
    model = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    direct = [dict(model.rank(text))["de"] for text in TEXTS[:3]]
    assert score("language", TEXTS, language="de") == [*direct, pytest.approx(dict(model.rank(TEXTS[3]))["de"]), 0]
    rows = [{"language": code} for code in ("en", "de", None)]
    assert score("language", TEXTS[:3], rows)[:2] == [dict(model.rank(TEXTS[0]))["en"], direct[1]] and direct[1] > 0.9


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("regexp", {}, "no ready function `regexp` did you mean `regex`? json_schema module:name"),
        ("regex", {"patern": "a"}, "no such option of `regex` did you mean `pattern`?"),
        ("regex", {"pattern": "("}, "cannot use these options missing )"),
        ("regex", {"pattern": "a", "match": "ful"}, "did you mean `full`?"),
        ("json_schema", {"schema": {"type": "objekt"}}, "cannot use these options objekt"),
        ("json_schema", {"schema": "none.json"}, "not a JSON schema none.json"),
        ("length", {"target": 3, "maximum": 4}, "either `target` or `maximum`"),
        ("length", {"target": "ten"}, "cannot use these options"),
        ("language", {"language": "german"}, "is not one of"),
        ("readability", {"formula": "flesch_reading_ease"}, "automated_readability_index"),
        ("repetition", {"size": 0}, "at least 1"),
    ],
)
def test_faults_of_options_are_told_before_anything_is_scored(tmp_path, name, options, words):
    with pytest.raises(UserError) as raised:
        load_reward("mine", RewardSpec(function=name, options=options), tmp_path)
    for word in words.split(" ") if "`" not in words else [words.split(" did")[0]]:
        assert word in str(raised.value)


def test_a_missing_package_is_told_with_the_command(monkeypatch):
    whole = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "textstat":
            raise ModuleNotFoundError("No module named 'textstat'")
        return whole(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"needs the package textstat") as raised:
        load_reward("mine", RewardSpec(function="readability"))
    assert 'pip install "rewarded-lines[rewards]"' in str(raised.value)


def test_a_needed_parameter_is_a_column_unless_an_option_gives_it():
    assert load_reward("mine", RewardSpec(function="math_answer")).columns == ("answer",)
    assert load_reward("mine", RewardSpec(function="regex")).columns == ("pattern",)
    assert load_reward("mine", RewardSpec(function="regex", options={"pattern": "a"})).columns == ()
    one, other = (load_reward("mine", RewardSpec(function=name)).fingerprint for name in ("length", "repetition"))
    assert one != other
