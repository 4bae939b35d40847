"""The prompts a target is to answer: read from files, kept apart from eval prompts, or written by the target itself."""

import hashlib
import itertools
import json
import math
import random
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from ...data_parallel import Team
from ...host.undrafted import decode_plainly
from ...modeling.text_eagle3 import parse_json, show
from .checking import check_row
from .conversations import Message, content_text, read_messages, read_tools
from .files import DataError, FileRow, append_rows, keep_lines, read_whole_lines
from .rendering import MARKER, ChatRenderer, find_end

logger = logging.get_logger(__name__)

MAX_PROMPT_TOKENS = 512  # the longest prompt that the target may make up; longer ones are dropped
TRIES = 8  # the most prompts that are drawn for each wanted one


class Prompt(NamedTuple):
    """A prompt to answer: `messages`, and after each answer the next of `later`."""

    messages: list[Message]  # ends with the user's
    later: tuple[str, ...] = ()
    source: str | None = None
    tools: list[Any] | None = None

    @property
    def user_texts(self) -> list[str]:
        """All texts of the user."""
        texts = [content_text(message.get("content")) for message in self.messages if message["role"] == "user"]
        return [text for text in texts if text] + list(self.later)

    @property
    def fingerprint(self) -> str:
        """A digest of the prompt, to compare a file of answers with when a run goes on."""
        facts = json.dumps([self.messages, self.later, self.tools], sort_keys=True)
        return hashlib.sha256(facts.encode()).hexdigest()[:16]


def read_prompts(rows: Iterable[FileRow]) -> list[Prompt]:
    """The prompts in `rows` with `messages` (or `conversations`), `prompt` or `turns`.

    Stored answers at a conversation's end are not used: the user's messages are answered anew, one after the other.

    Raises:
        DataError: A row is no prompt; the message names its place.
    """
    prompts = []
    for number, row in enumerate(rows, start=1):
        try:
            check_row(row)
            prompt = _read_prompt(row)
            prompt.user_texts  # noqa: B018  which must be text, and is compared later
            prompts.append(prompt)
        except ValueError as error:
            raise DataError(f"{row.place}, row {number}: {error}") from error
    return prompts


def _read_prompt(row: Mapping[str, Any]) -> Prompt:
    tools, source = read_tools(row.get("tools")), row.get("source")
    if row.get("turns"):
        if not all(isinstance(turn, str) for turn in row["turns"]):
            raise ValueError(f"turns must be a list of what the user says, got {row['turns']!r:.80}.")
        return Prompt([{"role": "user", "content": row["turns"][0]}], tuple(row["turns"][1:]), source, tools)
    entries = row.get("messages") or row.get("conversations") or row.get("prompt")
    if entries is None:
        raise ValueError(f"expected messages, prompt or turns, got {sorted(row)}.")
    messages = read_messages([{"role": "user", "content": entries}] if isinstance(entries, str) else entries)
    roles = [message["role"] for message in messages]
    if roles[-1] == "user":
        return Prompt(messages, (), source, tools)
    if (
        "user" not in roles
        or roles[-1] != "assistant"
        or not set(roles) <= {"system", "developer", "user", "assistant"}
    ):
        raise ValueError(
            f"the conversation must end with the user's turn, or be of user and assistant only; its roles are {roles}."
        )
    first = roles.index("user")
    later = tuple(content_text(message["content"]) for message in messages[first + 1 :] if message["role"] == "user")
    return Prompt(messages[: first + 1], later, source, tools)


def _read_made_up(path: Path, number: int, line: str) -> str:
    """A prompt that the target wrote before."""
    try:
        row = parse_json(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise DataError(
            f"{path}, line {number}: expected a prompt that regenerate wrote, got {show(line[:60])}. Delete it."
        )
    return row["prompt"]


# ---- the same prompt ----


def hash_text(text: str) -> str:
    """One hash for texts that differ only in case, blanks, punctuation and Unicode form."""
    normal = unicodedata.normalize("NFKC", text).casefold()
    return hashlib.sha256((re.sub(r"\W+", " ", normal).strip() or normal).encode()).hexdigest()


def exclude(prompts: Iterable[Prompt], unwanted: Iterable[Prompt], *, dedupe: bool = False) -> list[Prompt]:
    """`prompts` without those that share a text of the user with `unwanted`.

    Args:
        prompts: To choose from; order is kept.
        unwanted: Eval prompts.
        dedupe: Keep only the first of prompts with the same texts of the user.
    """
    forbidden = {hash_text(text) for prompt in unwanted for text in prompt.user_texts}
    seen: set[tuple[str, ...]] = set()
    kept = []
    for prompt in prompts:
        hashes = tuple(hash_text(text) for text in prompt.user_texts)
        if forbidden.intersection(hashes) or (dedupe and hashes in seen):
            continue
        seen.add(hashes)
        kept.append(prompt)
    return kept


# ---- prompts of the target's own ----


class UserSlot(NamedTuple):
    """The place of the user's text in the template."""

    before: str  # the target's prompt to write it
    after: str  # the text that ends it, without blanks around


def find_user_slot(renderer: ChatRenderer) -> UserSlot:
    """The text around a user's message, by rendering one.

    Raises:
        ValueError: The template does not show the message.
    """
    text = renderer.render([{"role": "user", "content": MARKER}])
    if text.count(MARKER) != 1:
        raise ValueError(
            f"The chat template writes a user's message {text.count(MARKER)} times, so the target cannot be let write "
            "one. Give --prompt-file instead of --self-prompts."
        )
    before, after = text.split(MARKER)
    return UserSlot(before, after.strip())


def limit_share(wanted: int, num_others: int, share: float) -> int:
    """How many of `wanted` prompts make up at most `share` of all, beside `num_others`."""
    if not 0 <= share <= 1:
        raise ValueError(f"--self-share must lie in 0..1, got {share:g}.")
    return wanted if share == 1 else min(wanted, math.floor(share / (1 - share) * num_others + 1e-9))


def make_prompts(
    target: PreTrainedModel,
    renderer: ChatRenderer,
    count: int,
    path: Path,
    *,
    known: Sequence[Prompt] = (),
    temperature: float = 1.0,
    batch_size: int = 16,
    seed: int = 0,
    team: Team | None = None,
) -> list[Prompt]:
    """`count` prompts that the target writes where the template puts the user's (arXiv:2406.08464, Magpie).

    Args:
        target: Writes them; an aligned model makes up what its users ask.
        renderer: The target's chat template.
        count: How many; fewer, with a warning, if the target repeats itself.
        path: They are kept there; what it holds already is used first.
        known: Not to be made up again.
        temperature: Above 0, or all would be the same.
        batch_size: Written side by side.
        seed: The seed of the sampling.
        team: Processes that write side by side, with a target each. All must call, and get the same prompts.
    """
    if temperature <= 0:
        raise ValueError(f"--self-temperature must be above 0, or every prompt is the same; got {temperature:g}.")
    team = team or Team(target.device, is_alone=True)
    slot = find_user_slot(renderer)
    texts = [_read_made_up(path, number, line) for number, line in enumerate(read_whole_lines(path), start=1)]
    if team.rank == 0:
        keep_lines(path, len(texts))
    texts = texts[:count]
    seen = {hash_text(text) for prompt in known for text in prompt.user_texts} | {hash_text(text) for text in texts}
    num_drawn, most = 0, TRIES * (count - len(texts)) + batch_size
    own_seed = seed + len(texts)
    if team.rank > 0:
        own_seed = random.Random(f"{own_seed} {team.rank}").getrandbits(63)
    with (
        tqdm(total=count, initial=len(texts), desc="made-up prompts", disable=team.rank > 0) as progress,
        seeded(target, own_seed),
    ):
        helped = decode_plainly(target)
        while len(texts) < count and num_drawn < most:
            num_rows = min(batch_size, -(-(count - len(texts)) // team.size))
            drawn = team.gather(_draw_prompts(target, renderer, slot, num_rows, temperature, helped))
            new = _take_new(itertools.chain.from_iterable(drawn), seen, count - len(texts))
            num_drawn += num_rows * team.size
            if team.rank == 0:
                append_rows(path, ({"prompt": text, "source": "self"} for text in new))
            texts += new
            progress.update(len(new))
    if len(texts) < count and team.rank == 0:
        logger.warning(
            f"Of {num_drawn} prompts that the target made up, only {len(texts)} are new and complete ({count} were asked "
            "for). Raise --self-temperature, or take these."
        )
    return [Prompt([{"role": "user", "content": text}], source="self") for text in texts]


def _take_new(drawn: Iterable[str], seen: set[str], most: int) -> list[str]:
    """At most `most` texts of `drawn` whose hashes are not in `seen`, where they are added."""
    new: list[str] = []
    for text in drawn:
        if text and hash_text(text) not in seen and len(new) < most:
            seen.add(hash_text(text))
            new.append(text)
    return new


def _draw_prompts(
    target: PreTrainedModel,
    renderer: ChatRenderer,
    slot: UserSlot,
    count: int,
    temperature: float,
    helped: Mapping[str, Any],
) -> list[str]:
    """`count` texts; empty for those that did not end."""
    tokenizer = renderer.tokenizer
    ends = {*renderer.terminators, *eos_token_ids(target)}
    if (after := renderer.encode(slot.after)) and after[0] in tokenizer.all_special_ids:
        ends.add(after[0])
    input_ids = torch.tensor([renderer.encode(slot.before)] * count, device=target.device)  # [B, T]
    out = target.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        do_sample=True,
        temperature=temperature,
        max_new_tokens=MAX_PROMPT_TOKENS,
        eos_token_id=sorted(ends),
        pad_token_id=min(ends, default=0),
        **helped,
    )
    texts = []
    for ids in out[:, input_ids.shape[1] :].tolist():
        end = find_end(ids, 0, ends)
        text = tokenizer.decode(ids[:end], skip_special_tokens=True)
        has_ended = end is not None
        if slot.after and slot.after in text:  # an end in plain text
            text, has_ended = text.split(slot.after)[0], True
        texts.append(text.strip() if has_ended else "")
    return texts


def eos_token_ids(target: PreTrainedModel) -> list[int]:
    """The tokens that end the target's turns."""
    ends = target.generation_config.eos_token_id
    return list(ends) if isinstance(ends, (list, tuple)) else [] if ends is None else [ends]


@contextmanager
def seeded(target: PreTrainedModel, seed: int) -> Iterator[None]:
    """Inside, torch draws from `seed`; after it, as if nothing had been drawn."""
    devices = [target.device] if target.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield
