"""A reward model with code of its own, in the form of ArmoRM: rewards of three objectives, and a gate over them.

Tests copy this file into a model's folder. The import of a doc string is one that transformers 5 dropped.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import LlamaModel, LlamaPreTrainedModel
from transformers.models.llama.modeling_llama import LLAMA_INPUTS_DOCSTRING
from transformers.utils import ModelOutput, add_start_docstrings_to_model_forward

# "A" and ":", between which the prompt ends.
PATTERN = [35, 28]


@dataclass
class CustomOutput(ModelOutput):
    """As ArmoRM returns it."""

    rewards: torch.FloatTensor | None = None
    gating_output: torch.FloatTensor | None = None
    score: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None


class LlamaForRewardModelWithGating(LlamaPreTrainedModel):
    """Rewards of the last token, and their sum weighted by a gate that reads the prompt."""

    def __init__(self, config):
        """Make the layers; rewards are transformed before the gate."""
        super().__init__(config)
        self.model = LlamaModel(config)
        self.regression_layer = nn.Linear(config.hidden_size, config.num_objectives, bias=False)
        self.reward_transform_matrix = nn.Parameter(torch.zeros(config.num_objectives, config.num_objectives))
        self.gating = nn.Linear(config.hidden_size, config.num_objectives)
        self.post_init()

    @add_start_docstrings_to_model_forward(LLAMA_INPUTS_DOCSTRING)
    def forward(self, input_ids=None, attention_mask=None):
        """Return rewards and score of each text; a text without the pattern is an error."""
        states = self.model(input_ids, attention_mask=attention_mask)[0]
        ends = torch.eq(input_ids, self.config.pad_token_id).int().argmax(-1) - 1
        rows = torch.arange(len(input_ids))
        rewards = self.regression_layer(states[rows, ends % input_ids.shape[-1]])
        places = [find_pattern(row.tolist()) for row in input_ids]
        gate = self.gating(states[rows, places]).softmax(-1)
        score = (gate * (rewards @ self.reward_transform_matrix)).sum(-1)
        return CustomOutput(rewards=rewards, gating_output=gate, score=score, logits=score)


def find_pattern(row):
    """Return the last place of the pattern."""
    for at in range(len(row) - 2, -1, -1):
        if row[at : at + 2] == PATTERN:
            return at
    raise ValueError("Token pattern not found in the list.")
