"""A tiny target of structured sequences, its tokenizer, and arguments for runs of a few steps."""

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_eagle3 import Eagle3TrainingArguments
from hf_eagle3.training import new_drafter

V, EOS, PROMPT, NEW = 48, 1, 6, 24
TINY = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
}


def progressions(count, length, seed):
    """Sequences start, start + step, ... in 4..V-1: something to learn, and something to draft."""
    rng = np.random.default_rng(seed)
    start, step = rng.integers(0, V - 4, (count, 1)), rng.integers(1, 6, (count, 1))
    return torch.from_numpy(4 + (start + step * np.arange(length)) % (V - 4))


def make_args(tmp_path, **changes):
    settings = {
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 8,
        "max_steps": 3,
        "ttt_steps": 3,
        "draft_vocab_size": 40,
        "eval_generate_prompts": 3,
        "eval_max_new_tokens": 8,
        "learning_rate": 3e-3,
        "eval_depth": 3,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return Eagle3TrainingArguments(**{**settings, **changes})


def make_drafter(target, **overrides):
    torch.manual_seed(5)
    return new_drafter(target, torch.arange(2, 42), **overrides)


def weights_of(drafter):
    return {name: value.clone() for name, value in drafter.state_dict().items()}


TEMPLATE = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nbe kind<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(template=TEMPLATE):
    words = [
        "<unk>",
        "<|im_end|>",
        "<|im_start|>",
        "\n",
        "system",
        "user",
        "assistant",
        "be",
        "kind",
        "hi",
        "yes",
        "no",
    ]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|im_end|>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = template
    return tokenizer
