"""Tiny chat models of five published forms, made here: their special tokens, chat templates and ends of a turn.

The templates are our own short ones: they keep the tokens, the order and the quirks of the published ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch

FORMS = ("llama3", "qwen3", "gemma3", "phi", "mistral")
HIDDEN = 64
POSITIONS = 512
WORDS = """
yes no maybe paris rome good bad best short long answer question word words poem story river night morning light
water stone green blue film scene joy fear start end what why how who when where is are was the and but not with
from about into please write tell give name two three one plus equals weather sunny rain tool think
""".split()

LLAMA3 = r"""
{{- bos_token }}
{%- set seen = namespace(tools=false) %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + ('ipython' if message.role == 'tool' else message.role) + '<|end_header_id|>\n\n' }}
    {%- if tools and message.role == 'user' and not seen.tools %}
        {%- set seen.tools = true %}{{ 'A call is JSON of the name and parameters of one of these:\n\n' }}
        {%- for tool in tools %}{{ tool | tojson(indent=4) + '\n\n' }}{% endfor %}
    {%- endif %}
    {%- if message.tool_calls %}
        {%- if message.tool_calls | length != 1 %}{{ raise_exception('One tool call at a time.') }}{% endif %}
        {%- set call = message.tool_calls[0].function %}{{ {'name': call.name, 'parameters': call.arguments} | tojson }}
    {%- else %}
        {{- message.content | trim }}
    {%- endif %}{{ '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}
""".strip()

QWEN3 = r"""
{%- set first = messages[0] %}
{%- set turns = messages[1:] if first.role == 'system' else messages %}
{%- if tools or first.role == 'system' %}
    {{- '<|im_start|>system\n' }}
    {%- if first.role == 'system' %}{{ first.content + ('\n\n' if tools else '') }}{% endif %}
    {%- if tools %}
        {{- '# Tools\n\nYou may call these:\n<tools>\n' }}
        {%- for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}
        {{- '</tools>\n\nA call is JSON of "name" and "arguments" between <tool_call> and </tool_call>.' }}
    {%- endif %}{{ '<|im_end|>\n' }}
{%- endif %}
{%- set last = namespace(user=-1) %}
{%- for turn in turns %}{% if turn.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}
{%- for turn in turns %}
    {%- set content = turn.content or '' %}
    {%- if turn.role == 'assistant' %}
        {%- set thoughts = turn.reasoning_content or '' %}
        {%- if not thoughts and '</think>' in content %}
            {%- set thoughts = content.split('</think>')[0].split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > last.user and (thoughts or loop.last) %}
            {{- '<think>\n' + (thoughts.strip('\n') + '\n' if thoughts else '\n') + '</think>\n\n' }}
        {%- endif %}
        {{- content }}
        {%- for call in turn.tool_calls or [] %}
            {{- '\n' if content or not loop.first }}
            {%- set given = call.function.arguments %}
            {{- '<tool_call>\n{"name": ' + call.function.name | tojson + ', "arguments": ' }}
            {{- (given if given is string else given | tojson) + '}\n</tool_call>' }}
        {%- endfor %}{{ '<|im_end|>\n' }}
    {%- elif turn.role == 'tool' %}
        {%- if loop.first or loop.previtem.role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
        {{- '\n<tool_response>\n' + content + '\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}
    {%- else %}
        {{- '<|im_start|>' + turn.role + '\n' + content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}
""".strip()

GEMMA3 = r"""
{{- bos_token }}
{%- set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}
{%- for turn in (messages[1:] if system else messages) %}
    {%- set due = 'user' if loop.index0 % 2 == 0 else 'assistant' %}
    {%- if turn.role != due %}{{ raise_exception('Roles must alternate: user, assistant, user, ...') }}{% endif %}
    {{- '<start_of_turn>' + ('model' if turn.role == 'assistant' else turn.role) + '\n' }}
    {{- (system if loop.first else '') + turn.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}
""".strip()

PHI = r"""
{%- for turn in messages %}{{ '<|' + turn.role + '|>\n' + turn.content + '<|end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}
""".strip()

MISTRAL = r"""
{{- bos_token }}
{%- set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}
{%- for turn in (messages[1:] if system else messages) %}
    {%- set due = 'user' if loop.index0 % 2 == 0 else 'assistant' %}
    {%- if turn.role != due %}{{ raise_exception('Roles must alternate: user, assistant, user, ...') }}{% endif %}
    {%- if turn.role == 'user' %}
        {{- '[INST] ' + (system if loop.revindex <= 2 else '') + turn.content + ' [/INST]' }}
    {%- else %}
        {{- ' ' + turn.content + eos_token }}
    {%- endif %}
{%- endfor %}
""".strip()


@dataclass(frozen=True)
class Form:
    """What a published family of chat models writes into its tokenizer and its two configs."""

    family: str
    template: str
    special: str
    ends: str
    turn_end: str
    eos: str
    bos: str | None = None
    pad: str | None = None
    plain: str = ""  # Added tokens that are not special.
    swallow: str = ""  # Special tokens that swallow the white space after them.
    first: bool = False  # Special tokens have the lowest ids, not the highest.
    config_eos: str = ""  # Where it isn't the generation config's.
    config_bos: str = ""  # Where it isn't the tokenizer's.
    config_pad: bool = True  # The model's config has the tokenizer's padding token.
    rows: int = 1  # The embedding has a multiple of so many rows.
    config: dict = field(default_factory=dict)
    sampling: dict = field(default_factory=dict)


TABLE = {
    "llama3": Form(
        "Llama", LLAMA3, "<|begin_of_text|> <|end_of_text|> <|reserved_special_token_0|> <|finetune_right_pad_id|> "
        "<|start_header_id|> <|end_header_id|> <|eom_id|> <|eot_id|>", bos="<|begin_of_text|>", eos="<|eot_id|>",
        ends="<|end_of_text|> <|eom_id|> <|eot_id|>", turn_end="<|eot_id|>", rows=64,
        sampling={"do_sample": True, "temperature": 0.6, "top_p": 0.9},
    ),
    "qwen3": Form(
        "Qwen3", QWEN3, "<|endoftext|> <|im_start|> <|im_end|>", plain="<tool_call> </tool_call> <think> </think>",
        eos="<|im_end|>", pad="<|endoftext|>", ends="<|im_end|> <|endoftext|>", turn_end="<|im_end|>", rows=64,
        config_eos="<|im_end|>", config_bos="<|endoftext|>", config_pad=False,
        sampling={"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95},
    ),
    "gemma3": Form(
        "Gemma3", GEMMA3, "<pad> <eos> <bos> <start_of_turn> <end_of_turn>", bos="<bos>", eos="<eos>", pad="<pad>",
        ends="<eos> <end_of_turn>", turn_end="<end_of_turn>", first=True,
        config={"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi": Form(
        "Phi3", PHI, "<s> </s> <|endoftext|> <|assistant|> <|system|> <|end|> <|user|>", bos="<s>",
        eos="<|endoftext|>", pad="<|endoftext|>", ends="<|end|> <|endoftext|>", turn_end="<|end|>",
        swallow="</s> <|assistant|> <|system|> <|end|> <|user|>", config_eos="<|endoftext|>",
        config={"original_max_position_embeddings": POSITIONS},
    ),
    "mistral": Form(
        "Mistral", MISTRAL, "<unk> <s> </s> [INST] [/INST]", bos="<s>", eos="</s>", ends="</s>", turn_end="</s>",
        first=True, config={"sliding_window": None},
    ),
}  # fmt: skip


def ends(form: str) -> list[str]:
    """Return the end tokens of the form's generation config."""
    return TABLE[form].ends.split()


def turn_end(form: str) -> str:
    """Return the token that ends an assistant's turn in the form's template."""
    return TABLE[form].turn_end


def make_tokenizer(form: str):
    """Return a byte-level BPE tokenizer of about 500 tokens with the form's special tokens and chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = TABLE[form]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, rstrip=token in made.swallow.split(), special=True) for token in made.special.split()]
    options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special if made.first else [], **options)
    tokenizer.train_from_iterator([f"{word} {word}" for word in WORDS], trainer)
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in made.plain.split()])
    if made.bos:
        bos = (made.bos, tokenizer.token_to_id(made.bos))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{made.bos} $A", pair=f"{made.bos} $A {made.bos}:1 $B:1", special_tokens=[bos]
        )
    named = {"bos_token": made.bos, "eos_token": made.eos, "pad_token": made.pad}
    named["unk_token"] = "<unk>" if "<unk>" in made.special else None
    named = {name: token for name, token in named.items() if token}
    options = {"chat_template": made.template, "model_max_length": POSITIONS, "clean_up_tokenization_spaces": False}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options, **named)


def make_config(form: str, tokenizer, **more):
    """Return the config of a model of two blocks, with the ids that the published one has."""
    import transformers

    made = TABLE[form]
    eos = tokenizer.convert_tokens_to_ids((made.config_eos or made.ends).split())
    name = made.family + ("Text" if form == "gemma3" else "") + "Config"
    options = dict(
        vocab_size=-(-len(tokenizer) // made.rows) * made.rows, hidden_size=HIDDEN, intermediate_size=2 * HIDDEN,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=POSITIONS,
        tie_word_embeddings=False, initializer_range=0.2,
        bos_token_id=tokenizer.convert_tokens_to_ids(made.config_bos or made.bos),
        eos_token_id=eos if len(eos) > 1 else eos[0],
        pad_token_id=tokenizer.pad_token_id if made.config_pad else None,
    )  # fmt: skip
    # Phi 3 knows no head_dim.
    options |= {} if form == "phi" else {"head_dim": 32}
    return getattr(transformers, name)(**options | made.config | more)


def make_model(form: str, seed: int = 0):
    """Return a random tiny model of the form's class, whose every next token is the end of its turn now and then."""
    import transformers

    made = TABLE[form]
    tokenizer = make_tokenizer(form)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{made.family}ForCausalLM")(make_config(form, tokenizer)).eval()
    with torch.no_grad():
        steer(model, tokenizer, made.turn_end, made.sampling.get("temperature", 1.0))
    eos = tokenizer.convert_tokens_to_ids(made.ends.split())
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=eos if len(eos) > 1 else eos[0],
        pad_token_id=tokenizer.pad_token_id,
        **made.sampling,
    )
    return model


def steer(model, tokenizer, end, temperature=1.0, chance=0.2, spread=2.5, constant=16.0):
    """Set what the model answers with: plain ASCII tokens, and after each with about this chance the end of its turn.

    No block reads or writes the first two entries of a state. The first is a constant, by which the head bans all other
    tokens. The second is the constant after a plain token and zero after any other, so that few answers are empty.
    The chance holds at the temperature of the generation config.
    """
    own = sorted(set(range(len(tokenizer))) - set(tokenizer.get_added_vocab().values()))
    texts = zip(own, tokenizer.batch_decode([[token] for token in own]), strict=True)
    plain = torch.tensor([token for token, text in texts if text.isascii() and text.isprintable()])
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight[:2] = module.weight[:, :2] = 0
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings().weight
    embedding.weight.normal_()
    embedding.weight[:, 0], embedding.weight[:, 1] = constant, 0
    embedding.weight[plain, 1] = constant
    # Gemma multiplies its embeddings.
    embedding.weight.div_(float(getattr(embedding, "embed_scale", 1.0)))
    states = model.model(plain[torch.randint(len(plain), (8, 32))]).last_hidden_state
    head.normal_(std=spread / (states[..., 2:].std().item() * math.sqrt(HIDDEN)))
    head[:, 0], head[:, 1] = -50, 0
    head[plain, 0] = 0
    odds = (states @ head[plain].T).logsumexp(-1).mean() + math.log(chance / (1 - chance))
    row = head[tokenizer.convert_tokens_to_ids(end)]
    row[:] = 0
    row[1] = odds / states[..., 1].mean()
    head.mul_(temperature)


def make_chat(form: str, folder: Path, seed: int = 0) -> Path:
    """Save a tiny chat model and its tokenizer as a checkpoint folder."""
    make_model(form, seed).save_pretrained(folder)
    make_tokenizer(form).save_pretrained(folder)
    return folder


def make_classifier(form: str, folder: Path, seed: int = 1) -> Path:
    """Save a sequence classifier with one logit, of the same family and with the same tokenizer."""
    import transformers

    tokenizer = make_tokenizer(form)
    name = TABLE[form].family + ("Text" if form == "gemma3" else "") + "ForSequenceClassification"
    torch.manual_seed(seed)
    getattr(transformers, name)(make_config(form, tokenizer, num_labels=1)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
