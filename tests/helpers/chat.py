"""A byte-level tokenizer, short chat templates, each with one habit of a published family, and rows of chats."""

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_eagle3.training.data.files import append_rows

SPECIAL = ["<bos>", "<eos>", "<start>", "<end>", "<channel>", "<message>", "<return>", "<call>", "<|user|>", "<|ai|>"]
TAGS = ["<think>", "</think>"]  # added, not special

# Each message between a start and an end, and a newline that nobody generates.
CHATML = (
    "{% for m in messages %}<start>{{ m.role }}\n{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
)
# A beginning of sequence, a system turn with tools, trimmed contents, and nothing after the end.
TRIMMED = (
    "<bos>{% if tools %}<start>system\n{{ tools | tojson }}<end>{% endif %}"
    "{% for m in messages %}<start>{{ m.role }}\n\n{{ m.content | trim }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant\n\n{% endif %}"
)
# Thinking in the answers to the last user only; can be told to think no more.
REASONING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<start>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}"
    "{% if m.content %}{{ m.content.split('</think>')[-1].lstrip('\n') }}{% endif %}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# The prompt opens the thinking; answers are rendered without it.
OPENED = (
    "<bos>{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}"
    "{% else %}<|ai|>{{ m.content.split('</think>')[-1] }}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|ai|><think>\n{% endif %}"
)
# The prompt says that there is no thinking; answers are rendered without that.
CLOSED = OPENED.replace("<|ai|><think>\n{%", "<|ai|><think>\n\n</think>\n\n{%")
# Channels, the date, another end for the last answer than for earlier ones, thinking of earlier answers left out.
CHANNELS = (
    "{% macro opening() %}<start>system<message>Today: {{ strftime_now('%Y-%m-%d') }}<end>{% endmacro %}{{ opening() }}"
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}"
    "{% if m.role == 'assistant' %}"
    "{% if m.thinking and loop.index0 > ns.last %}<start>assistant<channel>analysis<message>{{ m.thinking }}<end>{% endif %}"
    "{% if m.tool_calls %}<start>assistant to={{ m.tool_calls[0].function.name }}<channel>commentary<message>"
    "{{ m.tool_calls[0].function.arguments | tojson }}<call>"
    "{% else %}<start>assistant<channel>final<message>{{ m.content }}{{ '<return>' if loop.last else '<end>' }}{% endif %}"
    "{% else %}<start>{{ m.role }}<message>{{ m.content }}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant{% endif %}"
)


def make_tokenizer(
    template: str | None = CHATML, eos: str = "<end>", merges: tuple[tuple[str, str], ...] = ()
) -> PreTrainedTokenizerFast:
    """Bytes are 0 to 255, then what `merges` make of them, then `SPECIAL`, then `TAGS`."""
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    backend.add_tokens([AddedToken(token, normalized=False) for token in TAGS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token=eos,
        pad_token="<eos>",
        additional_special_tokens=SPECIAL[2:],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


def user(content: str) -> dict[str, str]:
    """What the user says."""
    return {"role": "user", "content": content}


def assistant(content: str | None, **others) -> dict:
    """What the target says."""
    return {"role": "assistant", "content": content, **others}


def make_chain(tokenizer: PreTrainedTokenizerFast, *chains: str, end: str = "<end>") -> LlamaForCausalLM:
    """A target that goes on from a token as the first of `chains` with it does, and else ends its turn."""
    V = len(tokenizer)
    end_id = tokenizer.convert_tokens_to_ids(end)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=V + V % 2,
        intermediate_size=8,
        num_hidden_layers=4,
        num_attention_heads=1,
        bos_token_id=None,
        eos_token_id=end_id,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    follower = torch.full((V,), end_id)
    for chain in reversed(chains):
        ids = tokenizer(chain, add_special_tokens=False)["input_ids"]
        follower[ids[:-1]] = torch.tensor(ids[1:])
    for layer in model.model.layers:  # they add nothing, so the hidden state is the token's embedding
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    model.model.embed_tokens.weight.zero_()[torch.arange(V), torch.arange(V)] = 1
    model.lm_head.weight.zero_()[follower, torch.arange(V)] = 1
    return model


def show(tokenizer, row):
    """The row's text with its supervised spans in brackets."""
    text, inside = "", 0
    ids, mask = row
    for start in range(len(ids)):
        if mask[start] != inside:
            text += "[" if mask[start] else "]"
            inside = mask[start]
        text += tokenizer.decode([ids[start]])
    return text + ("]" if inside else "")


def write_rows(path, rows):
    append_rows(path, rows)
    return path
