"""Tiny classifiers of three architectures, and a file of functions that behave and misbehave."""

import pytest
import torch
from tiny_models import make_tokenizer

SIZES = {"vocab_size": 300, "pad_token_id": 0, "num_labels": 2}


def save_classifier(model, folder):
    """Save a random model with large weights: scores that differ in more than their last bits."""
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def llama(hidden=32, **options):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    options = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2, **SIZES, **options}
    return LlamaForSequenceClassification(
        LlamaConfig(hidden_size=hidden, intermediate_size=2 * hidden, initializer_range=0.2, **options)
    )


def bert(hidden=32, **options):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    options = {"num_attention_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 60, **SIZES, **options}
    return BertForSequenceClassification(
        BertConfig(hidden_size=hidden, intermediate_size=2 * hidden, initializer_range=0.2, **options)
    )


def bart(hidden=32):
    from transformers import BartConfig, BartForSequenceClassification

    torch.manual_seed(0)
    layers = {f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    sizes = {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 60, **layers, **SIZES}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2}
    return BartForSequenceClassification(BartConfig(d_model=hidden, init_std=0.2, **sizes, **ends))


@pytest.fixture(scope="session")
def classifiers(tmp_path_factory):
    """Folders by architecture."""
    root = tmp_path_factory.mktemp("classifiers")
    makers = {"llama": llama, "bert": bert, "bart": bart}
    return {name: save_classifier(make(), root / name) for name, make in makers.items()}


@pytest.fixture(scope="session")
def wide_classifier(tmp_path_factory):
    """A Llama with heads wide enough for vLLM on a CPU."""
    return save_classifier(llama(64), tmp_path_factory.mktemp("wide") / "reward")


FUNCTIONS = """\
import math
import os
import signal
import time


def words(prompts, responses):
    return [len(response.split()) for response in responses]


def where(prompts, responses):
    return [os.getpid() for _ in responses]


def exact(prompts, responses):
    return [math.sin(len(prompt) + 1) * math.exp(len(response)) for prompt, response in zip(prompts, responses)]


def counted(prompts, responses):
    with open("calls.txt", "a") as calls:
        for prompt, response in zip(prompts, responses):
            calls.write(prompt + "|" + response + "\\n")
    return [float(len(response)) for response in responses]


def raises(prompts, responses):
    return [1 / len(response) for response in responses]


def nan(prompts, responses):
    return [math.nan if response == "bad" else 1.0 for response in responses]


def too_few(prompts, responses):
    return [1.0] * (len(responses) - 1)


def odd(prompts, responses):
    return [(lambda: 1) if response == "bad" else 1.0 for response in responses]


def dies(prompts, responses):
    if "bad" in responses:
        os._exit(3)
    return [1.0 for _ in responses]


def killed(prompts, responses):
    os.kill(os.getpid(), signal.SIGKILL)


def slow(prompts, responses):
    open(f"started-{os.getpid()}", "w").close()
    time.sleep(600)


class Twice:
    def __call__(self, prompts, responses):
        return [2.0 * len(response) for response in responses]


twice = Twice()
"""


@pytest.fixture
def functions(tmp_path, monkeypatch):
    """The folder of functions.py, as the working directory."""
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def large_classifier(tmp_path_factory):
    """A Llama so large that a batch takes tens of megabytes."""
    return save_classifier(llama(256, num_hidden_layers=4), tmp_path_factory.mktemp("large") / "reward")
