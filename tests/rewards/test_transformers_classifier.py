"""The other pairs of a batch do not change a score by a single bit."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rewarded_lines.errors import UserError
from rewarded_lines.reward_settings import RewardSpec
from rewarded_lines.rewards.load_rewards import load_reward
from rewarded_lines.rewards.text_batches import make_batches

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LENGTHS = st.lists(st.integers(1, 300), max_size=200)


@given(LENGTHS, st.integers(1, 100), st.sampled_from([None, 60, 128, 300]))
def test_every_text_is_in_one_batch_of_its_own_shape(lengths, batch_size, longest):
    shapes = {}
    members = []
    for batch in make_batches(lengths, batch_size, longest):
        members += batch.members
        assert 0 < len(batch.members) <= batch.rows
        for index in batch.members:
            assert lengths[index] <= batch.width
            assert shapes.setdefault(lengths[index], (batch.rows, batch.width)) == (batch.rows, batch.width)
            if longest is not None and lengths[index] <= longest:
                assert batch.width <= longest
        full = all(lengths[index] == batch.width for index in batch.members)
        assert not full or len(batch.members) < batch.rows, "nothing in the batch would be masked"
    assert sorted(members) == list(range(len(lengths)))
    for length, shape in shapes.items():
        (alone,) = make_batches([length], batch_size, longest)
        assert (alone.rows, alone.width) == shape


@pytest.mark.parametrize(
    ("length", "batch_size", "rows", "width"),
    [(1, 64, 64, 8), (7, 64, 64, 8), (8, 64, 64, 16), (30, 64, 32, 32), (63, 64, 16, 64), (127, 64, 8, 128)]
    + [(500, 64, 2, 512), (500, 1000, 16, 512), (5, 1, 2, 8), (5, 3, 2, 8), (5, 100, 64, 8)],
)
def test_longer_texts_get_fewer_rows(length, batch_size, rows, width):
    (batch,) = make_batches([length], batch_size)
    assert (batch.rows, batch.width) == (rows, width)


WORDS = ["the", "quick", "brown", "fox", "film", "of", "great", "beauty", "qq", "?!", "Ω"]


def texts(count, rng):
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(count)]


# A text that fills all positions of BERT and BART here, and one with a token less.
FULL = ["q" * 60, "q" * 59]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["llama", "bert"])
@pytest.mark.parametrize("batch_size", [4, pytest.param(64, marks=pytest.mark.slow)])
@pytest.mark.parametrize("device", DEVICES)
def test_a_score_is_the_same_to_the_bit_in_any_company(classifiers, architecture, dtype, batch_size, device):
    spec = RewardSpec(
        model=str(classifiers[architecture]), dtype=dtype, batch_size=batch_size, format="1-0", template="{response}"
    )
    reward = load_reward("r", spec, device=device)
    rng = random.Random(0)
    pool = [*texts(40, rng), *FULL, ""]
    alone = {text: reward.score([""], [text])[0] for text in pool}
    assert len(set(alone.values())) > 0.8 * len(set(pool))
    try:
        for threads in (1, 1, 2):
            torch.set_num_threads(threads)
            some = rng.choices(pool, k=rng.randint(2, 90))
            assert reward.score([""] * len(some), some) == [alone[text] for text in some]
        for text in FULL:
            assert reward.score([""] * 9, [text] * 9) == [alone[text]] * 9
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("architecture", ["llama", "bert", "bart"])
def test_scores_are_the_models_own_logits(classifiers, architecture, device):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = classifiers[architecture]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    # BART reads the last end token.
    pool = [text + "</s>" for text in [*texts(30, random.Random(2)), "q" * 58]]
    with torch.no_grad():
        expected = [model(**tokenizer(text, return_tensors="pt")).logits[0, 1].item() for text in pool]
    spec = RewardSpec(model=str(folder), format="1", template="{prompt}{response}</s>", batch_size=16)
    scores = load_reward("r", spec, device=device).score([""] * len(pool), [text[:-4] for text in pool])
    assert scores == pytest.approx(expected, abs=1e-5 if device == "cpu" else 1e-4)


def test_an_encoder_decoder_needs_an_end_token(classifiers):
    reward = load_reward("r", RewardSpec(model=str(classifiers["bart"]), format="0"), device="cpu")
    with pytest.raises(UserError, match="(?s)a text has no end token.*write the end token into the template"):
        reward.score(["a"], ["film"])
