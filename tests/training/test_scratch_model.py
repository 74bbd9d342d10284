"""The tokenizer and the Llama from scratch, the optimizer that trains it, and the metrics file."""

import copy
import json

import pytest
import torch
from datasets import Dataset
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer, TrainerControl, TrainerState, TrainingArguments
from trl import SFTConfig, SFTTrainer

from rewarded_lines.training.scratch_model import MuonAdamW, ScratchModel, WholeHeadTrainer, make_llama, train_tokenizer
from rewarded_lines.training.training_record import MetricsCallback

TEXTS = ["A film of Great beauty", "and of little else – naïve, too"]
SMALL = ScratchModel(vocab_size=320, num_hidden_layers=2, hidden_size=32, intermediate_size=48, num_attention_heads=1)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, SMALL)


def test_the_tokenizer_opens_texts_lower_cases_and_survives_a_reload(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = loaded(text)["input_ids"]
        assert ids == tokenizer(text)["input_ids"] and ids[0] == loaded.bos_token_id
        assert loaded.decode(ids, skip_special_tokens=True) == text.lower()
    assert len({loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id}) == 3


def test_a_prompts_tokens_open_its_reviews_tokens(tokenizer):
    whole = tokenizer(TEXTS[0])["input_ids"]
    prompt = tokenizer("A film of")["input_ids"]
    assert whole[: len(prompt)] == prompt


def test_training_the_tokenizer_again_gives_the_same_one(tokenizer):
    again = train_tokenizer(TEXTS, SMALL)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_letters_keep_their_case_when_told_so():
    tokenizer = train_tokenizer(TEXTS, ScratchModel(vocab_size=320, lowercase=False))
    assert tokenizer.decode(tokenizer(TEXTS[0])["input_ids"], skip_special_tokens=True) == TEXTS[0]


def step(model, optimizer, ids):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def test_the_optimizer_has_every_parameter_once_and_lowers_the_loss(tokenizer):
    torch.manual_seed(0)
    model = make_llama(tokenizer, SMALL)
    optimizer = MuonAdamW(model, learning_rate=1e-2, weight_decay=0.0)
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())
    ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
    losses = [step(model, optimizer, ids) for _ in range(20)]
    assert losses[-1] < losses[0] / 2


class Types(TorchDispatchMode):
    """Records the dtype of every new tensor."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.seen.update(part.dtype for part in pytree.tree_leaves(made) if isinstance(part, torch.Tensor))
        return made


def test_matrices_move_as_by_pytorchs_muon_but_in_their_own_type(tokenizer):
    torch.manual_seed(0)
    model = make_llama(tokenizer, SMALL)
    twin, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    named = {name: p for name, p in twin.named_parameters() if ".layers." in name and p.dim() == 2}
    matrices = list(named.values())
    # Square, wide and tall ones.
    assert len({tuple(matrix.shape) for matrix in matrices}) == 3
    theirs = torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    ours = MuonAdamW(model, learning_rate=1e-2, weight_decay=0.1)
    for _ in range(3):
        for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        with Types() as types:
            ours.step()
        theirs.step()
        # bfloat16 takes 20 times as long on a CPU that does not support it.
        assert types.seen == {torch.float32}
    for name in named:
        moved, reference = (state.state_dict()[name] - before[name] for state in (model, twin))
        assert torch.linalg.norm(moved - reference) < 0.02 * torch.linalg.norm(reference), name


def test_a_scheduler_reaches_both_parts_and_a_state_can_be_restored(tokenizer):
    torch.manual_seed(0)
    model = make_llama(tokenizer, SMALL)
    optimizer = MuonAdamW(model, learning_rate=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda count: 0.5**count)
    ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
    step(model, optimizer, ids)
    schedule.step()
    assert {group["lr"] for group in optimizer.param_groups} == {0.005}

    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    twin = make_llama(tokenizer, SMALL)
    twin.load_state_dict(weights)
    resumed = MuonAdamW(twin, learning_rate=1e-2, weight_decay=0.0)
    resumed.load_state_dict(state)
    step(model, optimizer, ids)
    step(twin, resumed, ids)
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_metrics_go_to_the_folder_and_to_whoever_watches(tmp_path, monkeypatch):
    monkeypatch.setenv("REWARDED_LINES_PROGRESS", str(tmp_path / "watched.jsonl"))
    callback = MetricsCallback(tmp_path)
    state, control = TrainerState(max_steps=4), TrainerControl()
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", logging_steps=0.5, save_steps=3)
    # As after resuming: the state is that of the checkpoint.
    state.logging_steps, state.save_steps = 7, 7
    callback.on_train_begin(arguments, state, control)
    assert (state.logging_steps, state.save_steps) == (2, 3)
    state.global_step = 2
    callback.on_log(arguments, state, control, logs={"loss": torch.tensor(0.5)})
    state.is_world_process_zero = False
    callback.on_log(arguments, state, control, logs={"loss": 9.0})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == (tmp_path / "watched.jsonl").read_text()
    first, second = map(json.loads, text.splitlines())
    assert (first["step"], first["max_steps"], second["step"], second["loss"]) == (0, 4, 2, 0.5)


@pytest.mark.parametrize(("kind", "own"), [("nll", True), ("dft", False)])
def test_the_whole_heads_loss_and_gradient_are_trls(tokenizer, tmp_path, kind, own):
    config = SFTConfig(str(tmp_path), loss_type=kind, report_to="none", use_cpu=True, bf16=False)
    rows = Dataset.from_list([tokenizer(text) for text in TEXTS])
    found, metrics = [], []
    for trainer_class in (SFTTrainer, WholeHeadTrainer):
        torch.manual_seed(0)
        trainer = trainer_class(make_llama(tokenizer, SMALL), config, train_dataset=rows, processing_class=tokenizer)
        batch = trainer.data_collator([trainer.train_dataset[index] for index in range(2)])
        batch["labels"][0, :3] = -100
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=(batch["labels"][:, 1:] != -100).sum())
        loss.backward()
        found.append([loss.detach(), *(one.grad for one in trainer.model.parameters())])
        metrics.append(bool(trainer._metrics["train"]))
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*found, strict=True))
    assert metrics == [True, not own]
