"""Prompts in batches, each process its own."""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..processes import Team


class Prompts(NamedTuple):
    """A batch's worth of prompts."""

    inputs: dict[str, Tensor]  # input_ids, attention_mask [B, T]
    categories: list[str]  # [B]
    numbers: list[int]  # [B], counted from 1 over all prompts


def random_prompts(num_rows: int, length: int, vocab_size: int) -> list[list[int]]:
    """Prompts of random tokens, all of one length."""
    generator = torch.Generator().manual_seed(num_rows)
    return torch.randint(1, vocab_size, (num_rows, length), generator=generator).tolist()


def batch_random_prompts(
    batch_size: int, length: int, vocab_size: int, device: torch.device, team: Team
) -> list[Prompts]:
    """One batch for each process, of random tokens."""
    numbered = list(enumerate(random_prompts(batch_size * team.size, length, vocab_size), 1))
    numbers, rows = zip(*team.split(numbered), strict=True)
    ids = torch.tensor(rows, device=device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return [Prompts(inputs, ["random"] * batch_size, list(numbers))]


def read_prompts(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    device: torch.device,
    team: Team,
    *,
    limit: int | None,
) -> list[Prompts]:
    """Batches of this process's share of a JSON Lines file, with `turns` (the first counts) or `prompt`, and `category`.

    Raises:
        ValueError: There are fewer prompts than processes, or a line has no prompt.
    """
    texts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()][:limit]
    try:
        lines = [json.loads(text) for text in texts]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name}: expected a JSON object in each line ({error}).") from error
    if len(lines) < team.size:
        raise ValueError(f"{path.name} has {len(lines)} prompts for {team.size} processes: give each at least one.")
    for number, line in enumerate(lines, 1):
        if not isinstance(line, dict) or not (line.get("turns") or line.get("prompt")):
            raise ValueError(f"{path.name}, prompt {number}: expected `turns` or `prompt`, got {str(line)[:60]!r}.")
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:  # pads are masked, so any token does
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    share = team.split(list(enumerate(lines, 1)))
    batches = []
    for start in range(0, len(share), batch_size):
        numbers, part = zip(*share[start : start + batch_size], strict=True)
        turns = [line["turns"][0] if line.get("turns") else line["prompt"] for line in part]
        chats = [[{"role": "user", "content": turn}] for turn in turns]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
        )
        tensors = {name: inputs[name].to(device) for name in ("input_ids", "attention_mask")}
        batches.append(Prompts(tensors, [line.get("category", "all") for line in part], list(numbers)))
    return batches
