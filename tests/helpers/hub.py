"""Stand-ins for repositories: tiny models, drafters and data in folders that are named as what people type.

In a folder made by `make_hub`, `from_pretrained("Qwen/Qwen3-8B")` and `load_dataset("trl-lib/Capybara")` read what lies
there, so commands and code run as they are written in pages and issues.
"""

import shutil
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.chat import assistant, make_tokenizer, user, write_rows
from helpers.paths import ROOT
from helpers.training import TINY
from hf_eagle3.training import new_drafter

TARGETS = ("Qwen/Qwen3-8B", "Qwen/Qwen3-0.6B", "HuggingFaceTB/SmolLM2-135M-Instruct", "openai/gpt-oss-120b", "TARGET")
FINETUNED = "me/finetune"
# As their publishers write them, by the engine that reads such a layout.
DRAFTERS = {
    "AngelSlim/Qwen3-8B_eagle3": "sglang",
    "yuhuili/EAGLE3-LLaMA3.1-Instruct-8B": "sglang",
    "Dogacel/specdrift-gpt-oss-120b-eagle3": "sglang",
    "public/drafter": "vllm",
    "DRAFTER": "hf",
}
NUM_PROMPTS = 60  # of whose answers a page holds 20 out
CHATS = [[user("hi"), assistant("yes\nno")], [user("be kind"), assistant("no, yes and no")]] * 4


def make_hub(place: Path) -> Path:
    """Fill `place`; the drafters are random, and fit every target."""
    torch.manual_seed(0)
    target = make_target()
    for name in TARGETS:
        save(target, place / name)
    torch.manual_seed(1)
    drafter = new_drafter(target, torch.arange(200), fc_norm=False, norm_output=False)
    for name, layout in DRAFTERS.items():
        drafter.export(place / name, to=layout, target=place / "TARGET")
    with torch.no_grad():
        target.lm_head.weight.add_(0.01 * torch.randn_like(target.lm_head.weight))
    save(target, place / FINETUNED)
    (place / "trl-lib/Capybara").mkdir(parents=True)
    write_rows(place / "trl-lib/Capybara/train.jsonl", [{"messages": chat} for chat in CHATS])
    write_files(place)
    (place / "examples").symlink_to(ROOT / "examples")
    return place


def make_target() -> LlamaForCausalLM:
    """A target of bytes that writes anything, and ends its turn now and then."""
    tokenizer = make_tokenizer()
    end = tokenizer.eos_token_id
    config = {**TINY, "vocab_size": len(tokenizer), "eos_token_id": end, "bos_token_id": None}
    config |= {"pad_token_id": tokenizer.pad_token_id, "max_position_embeddings": 1024}
    target = LlamaForCausalLM(LlamaConfig(**config, initializer_range=0.3)).eval()
    with torch.no_grad():
        target.lm_head.weight[end] *= 3
    return target


def save(target: LlamaForCausalLM, folder: Path) -> None:
    """A target's folder, with its tokenizer."""
    target.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def write_files(place: Path) -> None:
    """The files that pages of the documentation name and do not make."""
    rows = [{"messages": chat} for chat in CHATS]
    write_rows(place / "rows.jsonl", rows)
    write_rows(place / "prompts.jsonl", [{"prompt": "kind"[: 1 + i % 4]} for i in range(NUM_PROMPTS)])
    write_rows(place / "eval_prompts.jsonl", [{"prompt": "be kind?"}, {"turns": ["yes", "no"]}])
    write_rows(
        place / "questions.jsonl",
        [{"category": "chat", "turns": ["hi", "and?"]}, {"category": "list", "turns": ["be"]}],
    )


def copy_hub(hub: Path, place: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(hub, place, symlinks=True))
