"""Any reward as PPO's module: TRL computes the scores that the reward gives to the texts."""

import math

import pytest
import torch
from tiny_models import make_model, make_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast
from trl.experimental.utils import get_reward

from rewarded_lines.engines.responses import ResponseReader
from rewarded_lines.errors import UserError
from rewarded_lines.reward_settings import RewardSpec
from rewarded_lines.rewards.load_rewards import load_reward
from rewarded_lines.rewards.reward import Reward
from rewarded_lines.training.reward_module import RewardModule
from rewarded_lines.training.scratch_model import ScratchModel, train_tokenizer
from rewarded_lines.training.training_reward import WeightedReward

PROMPTS = ["a film", "the quiet end of it all, says", "it"]
RESPONSES = [" that moves.", " he, and goes on and on", ""]


class Recorder(Reward):
    """A reward that records its pairs and scores them differently."""

    rewards: dict = {}
    name = "recorder"
    unit = "characters"

    def __init__(self):
        self.seen = []

    def score(self, prompts, responses, columns=None):
        self.seen += zip(prompts, responses, strict=True)
        return [100.0 * len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]


def rows_of(prompts):
    return [{"prompt": prompt} for prompt in prompts]


def reader(tokenizer):
    return ResponseReader(tokenizer, frozenset([tokenizer.eos_token_id]))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(PROMPTS + RESPONSES, ScratchModel(vocab_size=300))


def query_responses(tokenizer, queries, ended=True, responses=RESPONSES):
    """Return the ids that PPOTrainer passes: prompts padded left, responses padded right after their EOS."""
    answers = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in responses]
    answers = [ids + [tokenizer.eos_token_id] * ended for ids in answers]
    width = max(map(len, answers))
    rows = [
        query + answer + [tokenizer.pad_token_id] * (width - len(answer))
        for query, answer in zip(queries.padded(tokenizer.pad_token_id), answers, strict=True)
    ]
    return torch.tensor(rows)


@pytest.mark.parametrize("ended", [True, False])
def test_scores_through_trl_are_the_rewards_own(tokenizer, ended):
    reward = Recorder()
    module = RewardModule(reward, reader(tokenizer), rows_of(PROMPTS))
    rows = query_responses(tokenizer, module, ended)
    logits, scores, _ = get_reward(module, rows, tokenizer.pad_token_id, module.length)
    assert reward.seen == list(zip(PROMPTS, RESPONSES, strict=True))
    assert scores.tolist() == Recorder().score(PROMPTS, RESPONSES)
    assert logits.shape == (*rows.shape, 1)


def test_batches_come_in_any_order_and_with_responses_of_any_width(tokenizer):
    module = RewardModule(Recorder(), reader(tokenizer), rows_of(PROMPTS))
    rows = query_responses(tokenizer, module)
    expected = Recorder().score(PROMPTS, RESPONSES)
    for order in ([2, 0], [1], [1, 1, 2]):
        width = max(int((rows[index] != tokenizer.pad_token_id).nonzero().max()) for index in order) + 1
        _, scores, _ = get_reward(module, rows[order, :width], tokenizer.pad_token_id, module.length)
        assert scores.tolist() == [expected[index] for index in order]


def test_padding_is_no_text(tokenizer):
    reward = Recorder()
    module = RewardModule(reward, reader(tokenizer), rows_of(PROMPTS))
    rows = query_responses(tokenizer, module)
    padding = torch.full((3, 5), tokenizer.pad_token_id)
    get_reward(module, torch.cat([rows, padding], 1), tokenizer.pad_token_id, module.length)
    assert reward.seen == list(zip(PROMPTS, RESPONSES, strict=True))


def test_prompts_are_padded_left_to_one_length(tokenizer):
    module = RewardModule(Recorder(), reader(tokenizer), rows_of(PROMPTS))
    rows = module.padded(tokenizer.pad_token_id)
    assert {len(row) for row in rows} == {module.length}
    assert [tokenizer.decode(row, skip_special_tokens=True) for row in rows] == PROMPTS
    assert rows[0][0] == tokenizer.pad_token_id and rows[0][-1] != tokenizer.pad_token_id
    assert module.ids == [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]


def test_tokens_after_an_end_are_not_rewarded_and_a_missing_end_costs_the_penalty(tokenizer):
    reward, end = Recorder(), tokenizer("q", add_special_tokens=False)["input_ids"][0]
    ends = ResponseReader(tokenizer, frozenset([end, tokenizer.eos_token_id]))
    module = RewardModule(reward, ends, rows_of(PROMPTS), penalty=7.5)
    rows = query_responses(tokenizer, module, False, [" that q it", " he", " q"])
    _, scores, _ = get_reward(module, rows, tokenizer.pad_token_id, module.length)
    assert [response.strip() for _, response in reward.seen] == ["that", "he", ""]
    wanted = Recorder().score(PROMPTS, [response for _, response in reward.seen])
    assert scores.tolist() == [wanted[0], wanted[1] - 7.5, wanted[2]]


def test_the_reward_reads_the_prompt_as_the_data_have_it(tokenizer):
    prompts = ["A Film", "THE  quiet\tend </s>", "It"]
    reward = Recorder()
    module = RewardModule(reward, reader(tokenizer), rows_of(prompts))
    decoded = tokenizer.batch_decode(module.ids, skip_special_tokens=True)
    assert decoded == ["a film", "the  quiet\tend ", "it"]
    get_reward(module, query_responses(tokenizer, module), tokenizer.pad_token_id, module.length)
    assert reward.seen == list(zip(prompts, RESPONSES, strict=True))


def test_chats_are_handed_to_the_reward_as_chats():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for turn in messages %}<s>{{ turn.content }}</s>{% endfor %}"
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    reward = Recorder()
    module = RewardModule(reward, reader(tokenizer), rows_of(chats))
    get_reward(module, query_responses(tokenizer, module), tokenizer.pad_token_id, module.length)
    assert reward.seen == list(zip(chats, RESPONSES, strict=True))


def test_ppo_refuses_a_response_without_a_score(tokenizer):
    reward = Recorder()
    reward.score = lambda *given: [1.0, math.nan, 2.0]
    module = RewardModule(reward, reader(tokenizer), rows_of(PROMPTS))
    with pytest.raises(UserError, match="reward `recorder`: PPO needs(.|\n)*the quiet end(.|\n)*recipes/rloo.py"):
        get_reward(module, query_responses(tokenizer, module), tokenizer.pad_token_id, module.length)


def test_the_module_has_nothing_to_train(tokenizer):
    module = RewardModule(Recorder(), reader(tokenizer), rows_of(PROMPTS))
    assert list(module.parameters()) == [] and module.base_model_prefix == "backbone"


def save_bert(folder):
    """Save a classifier of another family than the policy, with its own WordPiece tokenizer."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "film", "quiet", "##ing", ",", "."]
    vocabulary = {word: index for index, word in enumerate([*words, *letters, *(f"##{letter}" for letter in letters)])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        num_labels=2,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def test_ppo_gets_the_score_that_a_reward_model_of_another_kind_gives_to_the_text(tmp_path):
    """A BERT with WordPiece tokens scores the policy's samples, cut at their end as PPOTrainer cuts them."""
    from trl.experimental.ppo.ppo_trainer import truncate_response

    bert, words = save_bert(tmp_path / "bert")
    spec = RewardSpec(model="bert", format="1-0", template="Q: {prompt} A:{response}", batch_size=4)
    reward = WeightedReward({"bert": load_reward("bert", spec, tmp_path, "cpu")}, {"bert": 1.0})
    prompts = [f"{prompt} {number}" for prompt in PROMPTS for number in range(4)]
    policy, tokenizer = make_model(0, blocks=2), make_tokenizer()
    module = RewardModule(reward, reader(tokenizer), rows_of(prompts))
    ids = torch.tensor(module.padded(tokenizer.pad_token_id))
    torch.manual_seed(0)
    rows = policy.generate(
        input_ids=ids, attention_mask=ids != tokenizer.pad_token_id, max_new_tokens=12, do_sample=True, temperature=3.0
    )
    rows[0, module.length + 3] = tokenizer.eos_token_id
    answers = truncate_response(tokenizer.eos_token_id, tokenizer.pad_token_id, rows[:, module.length :])
    rows = torch.cat([ids, answers], 1)
    _, scores, _ = get_reward(module, rows, tokenizer.pad_token_id, module.length)

    outside = []
    for prompt, answer in zip(prompts, answers, strict=True):
        response = tokenizer.decode(answer, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        with torch.no_grad():
            logits = bert(**words(f"Q: {prompt} A:{response}", return_tensors="pt")).logits[0]
        outside.append(float(logits[1] - logits[0]))
    assert scores.tolist() == pytest.approx(outside, abs=1e-5)
    assert max(outside) - min(outside) > 0.1
    assert (answers[0] != tokenizer.pad_token_id).sum() == 4


def test_standardized_scores_reach_ppo(tokenizer):
    reward = WeightedReward({"recorder": Recorded()}, {"recorder": 2.0})
    reward.standardize({"recorder": [0.0, 2000.0]})
    module = RewardModule(reward, reader(tokenizer), rows_of(PROMPTS))
    _, scores, _ = get_reward(module, query_responses(tokenizer, module), tokenizer.pad_token_id, module.length)
    assert scores.tolist() == pytest.approx(
        [2 * (612 - 1000) / 1000, 2 * (2923 - 1000) / 1000, 2 * (200 - 1000) / 1000]
    )


class Recorded(Recorder):
    fingerprint = ""
