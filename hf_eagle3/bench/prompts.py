"""Prompts in batches, each process its own."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..console.opening import rendering
from ..console.paths import refuse_file
from ..data_parallel import Team
from ..modeling.text_eagle3 import parse_json, refuse_surrogates, show


class Prompts(NamedTuple):
    """A batch's worth of prompts."""

    inputs: dict[str, Tensor]  # input_ids, attention_mask [B, T]
    categories: list[str]  # [B]
    numbers: list[int]  # [B], counted from 1 over all prompts


def first_rows(prompts: Prompts, num_rows: int) -> Prompts:
    """The first rows of a batch."""
    inputs = {name: tensor[:num_rows] for name, tensor in prompts.inputs.items()}
    return Prompts(inputs, prompts.categories[:num_rows], prompts.numbers[:num_rows])


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


class Question(NamedTuple):
    """One line of a file of prompts."""

    text: str
    category: str
    num_turns: int  # in the file; `text` is the first of them


def read_questions(path: Path, *, limit: int | None, at_least: int = 1) -> list[Question]:
    """The first `limit` lines of a JSON Lines file, with `turns` (the first counts) or `prompt`, and `category`.

    Raises:
        ValueError: The file is no text, has fewer prompts than `at_least`, the processes, or a line has no prompt.
    """
    if path.suffix == ".gz":
        raise ValueError(
            f"{path} is compressed, and prompts are read as plain JSON Lines: unpack it first (gunzip -k)."
        )
    refuse_file("--prompts", path)
    try:
        with path.open(encoding="utf-8") as file:
            numbered = [(number, line) for number, line in enumerate(file, 1) if line.strip()][:limit]
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error}): give a file with a JSON object in each line."
        ) from error
    questions = [read_question(line, f"{path.name}, line {number}") for number, line in numbered]
    if len(questions) < at_least:
        raise ValueError(f"{path.name} has {len(questions)} prompts for {at_least} processes: give each at least one.")
    return questions


def read_question(line: str, where: str) -> Question:
    """One line; `where` is its place, for errors."""
    try:
        row = parse_json(line)
        refuse_surrogates(row)
    except ValueError as error:
        raise ValueError(f"{where}: expected a JSON object, got {show(line.strip()[:60])} ({error}).") from error
    if not isinstance(row, dict) or not (row.get("turns") or row.get("prompt")):
        raise ValueError(f"{where}: expected `turns` or `prompt`, got {show(line.strip()[:60])}.")
    turns, name = (row["turns"], "turns") if row.get("turns") else ([row["prompt"]], "prompt")
    if not isinstance(turns, list) or not all(isinstance(turn, str) and turn for turn in turns):
        wanted = "a list of texts" if name == "turns" else "a text"
        raise ValueError(
            f"{where}: expected `{name}` to be {wanted}, none of them empty, got {show(str(row[name])[:60])}."
        )
    category = "all" if row.get("category") is None else row["category"]
    if not isinstance(category, str):
        raise ValueError(f"{where}: expected `category` to be a text, got {show(str(category)[:60])}.")
    return Question(turns[0], category, len(turns))


def describe_turns(questions: Sequence[Question]) -> str:
    """What is left out of prompts with several turns; nothing if there are none."""
    num_cut = sum(question.num_turns > 1 for question in questions)
    return f"{num_cut} of {len(questions)} prompts have several turns: the first alone is asked." if num_cut else ""


def batch_questions(
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    device: torch.device,
    team: Team,
) -> list[Prompts]:
    """Batches of this process's share of `questions`."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:  # pads are masked, so any token does
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    share = team.split(list(enumerate(questions, 1)))
    batches = []
    for start in range(0, len(share), batch_size):
        numbers, part = zip(*share[start : start + batch_size], strict=True)
        chats = [[{"role": "user", "content": question.text}] for question in part]
        with rendering(tokenizer):
            inputs = tokenizer.apply_chat_template(
                chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
            )
        tensors = {name: inputs[name].to(device) for name in ("input_ids", "attention_mask")}
        batches.append(Prompts(tensors, [question.category for question in part], list(numbers)))
    return batches


def read_prompts(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    device: torch.device,
    team: Team,
    *,
    limit: int | None,
) -> list[Prompts]:
    """Batches of this process's share of a file; see `read_questions`."""
    questions = read_questions(path, limit=limit, at_least=team.size)
    return batch_questions(questions, tokenizer, batch_size, device, team)
