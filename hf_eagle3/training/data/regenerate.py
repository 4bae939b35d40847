"""Training data from the target itself: it answers prompts, and the very tokens it wrote are kept.

Nothing is rendered or tokenised again: a row is the prompt's ids and the sampled ids. Of a dialogue, each answer is
followed by the next question; where the template shows earlier answers as they were written, they stay token for token.
"""

import hashlib
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from ...data_parallel import Team
from ...host.undrafted import decode_plainly
from ...modeling.text_eagle3 import parse_json, show
from .answer_shards import count_answered, find_shares, gather_shares, name_share, next_share
from .conversations import Message
from .files import Append, DataError, append_rows, keep_lines, read_whole_lines
from .prompts import Prompt, eos_token_ids, seeded
from .rendering import ChatRenderer, Turn, find_end, merge_turns

logger = logging.get_logger(__name__)

WINDOW = 16  # batches whose prompts are sorted by length together, for less padding


@dataclass(frozen=True)
class Sampling:
    """How the target answers."""

    temperatures: tuple[float, ...] = (0.7,)  # each prompt is answered at each; 0 is greedy, and once
    top_p: float | None = None  # None: the target's own
    top_k: int | None = None
    num_return_sequences: int = 1  # answers to each prompt, at each temperature above 0
    max_new_tokens: int = 512
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperatures or min(self.temperatures) < 0:
            raise ValueError(f"--temperature must be 0 (greedy) or above, got {list(self.temperatures)}.")
        if max(self.temperatures) == 0 and self.num_return_sequences > 1:
            raise ValueError(
                f"At temperature 0 every answer is the same; got num_return_sequences {self.num_return_sequences}. "
                "Set --temperature above 0, or leave it out."
            )
        for name in ("num_return_sequences", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")

    def options(self, temperature: float) -> dict[str, Any]:
        """The options of `generate` for `temperature`."""
        if temperature == 0:
            return {"do_sample": False}
        given = {"top_p": self.top_p, "top_k": self.top_k}
        options = {name: value for name, value in given.items() if value is not None}
        return {"do_sample": True, "temperature": temperature, **options}


@dataclass(slots=True)
class Dialogue:
    """One prompt, answered once at one temperature."""

    prompt: Prompt
    temperature: float
    sample: int
    messages: list[Message]
    turns: list[Turn] = field(default_factory=list)
    finishes: list[str] = field(default_factory=list)  # stop or length, of each turn
    text: str = ""  # the turns so far, rendered
    is_done: bool = False

    def next_prompt(self, renderer: ChatRenderer) -> list[int]:
        """The token ids of the next prompt."""
        rendered = renderer.render(self.messages, tools=self.prompt.tools, add_generation_prompt=True)
        ids, so_far = renderer.encode(rendered), self.turns[-1].input_ids if self.turns else []
        if ids[: len(so_far)] != so_far and rendered.startswith(self.text):
            # The same text in other tokens: the target sampled tokens that the tokenizer would not choose.
            kept = so_far + renderer.encode(rendered[len(self.text) :])
            if renderer.tokenizer.decode(kept) == renderer.tokenizer.decode(ids):
                ids = kept
        self.text = rendered
        return ids

    def add(self, prompt_ids: list[int], new_ids: list[int], *, is_ended: bool, renderer: ChatRenderer) -> None:
        """Add an answer, and the next question if there is one."""
        self.turns.append(Turn(prompt_ids + new_ids, len(prompt_ids), len(prompt_ids) + len(new_ids)))
        self.finishes.append("stop" if is_ended else "length")
        self.text += renderer.tokenizer.decode(new_ids, skip_special_tokens=False)
        answer = read_answer(new_ids[:-1] if is_ended else new_ids, renderer)
        num_answered = len(self.turns)
        # A dialogue cannot go on from an answer that was cut, or is empty.
        self.is_done = num_answered > len(self.prompt.later) or not is_ended or not answer.strip()
        if not self.is_done:
            question = self.prompt.later[num_answered - 1]
            self.messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]


def read_answer(ids: Sequence[int], renderer: ChatRenderer) -> str:
    """The target's answer to the user in `ids`: the text after the last special token, such as a final channel."""
    special = set(renderer.tokenizer.all_special_ids)
    start = max((i + 1 for i, token in enumerate(ids) if token in special), default=0)
    return renderer.tokenizer.decode(list(ids[start:]), skip_special_tokens=False)


def regenerate(
    target: PreTrainedModel,
    renderer: ChatRenderer,
    prompts: Sequence[Prompt],
    path: Path,
    sampling: Sampling,
    *,
    drafter: PreTrainedModel | None = None,
    target_name: str = "",
    team: Team | None = None,
    window: int = WINDOW,
    append: Append = append_rows,
) -> None:
    """Answer `prompts` into the JSONL file `path`, in their order; answers that it has are kept.

    Args:
        target: The model that answers.
        renderer: Its chat template.
        prompts: The prompts to answer.
        path: Gets rows with `input_ids`, `loss_mask` and where they come from; `PATH.meta.json` gets the settings.
        sampling: How to answer.
        drafter: Drafts for `target`: the same distribution, sooner. Without one, our loop decodes plainly where it can.
        target_name: For the record.
        team: Processes that answer each a share of the prompts, with a target each. All must call.
        window: Batches whose prompts are sorted by length together, for less padding.
        append: Adds rows to a file.

    Raises:
        ValueError: `path` holds answers to other prompts, or made otherwise.
        OSError: `path` cannot be written to.
    """
    if not prompts:
        raise ValueError("Nothing to answer: no prompt is left.")
    team = team or Team(target.device, is_alone=True)
    begun = _go_on(path, prompts, renderer, sampling, target_name, append) if team.rank == 0 else None
    left, first_share = team.gather(begun)[0]  # after this, no process reads a file of another
    num_done, title, seed = len(prompts) - len(left), "answers", sampling.seed + len(prompts) - len(left)
    is_shared = team.size > 1 or bool(find_shares(path))
    place = path
    if is_shared:  # processes do not wait for one another, so answers come out of order
        place = name_share(path, first_share + team.rank)
        title = f"answers of process 1 of {team.size}"
        seed = random.Random(f"{sampling.seed} {num_done} {first_share + team.rank}").getrandbits(63)
    own = left[team.rank :: team.size]
    with (
        tqdm(total=len(own), desc=title, unit=" prompts", disable=team.rank > 0) as progress,
        seeded(target, seed),
    ):
        helped = decode_plainly(target) if drafter is None else {"assistant_model": drafter}
        size = window * sampling.batch_size
        _answer(target, renderer, prompts, own, place, sampling, helped, progress, size, append)
    team.wait()
    if is_shared and team.rank == 0:
        gather_shares(path, prompts, count_answered(path, prompts)[1], append)


def _go_on(
    path: Path,
    prompts: Sequence[Prompt],
    renderer: ChatRenderer,
    sampling: Sampling,
    target_name: str,
    append: Append,
) -> tuple[list[int], int]:
    """Put earlier answers in order. Returns the numbers of `prompts` that are left, and that of the first new share."""
    _keep_record(path, renderer, sampling, target_name)
    num_lines, num_done = count_answered(path, prompts)
    if keep_lines(path, num_lines):
        logger.warning(f"{path} ends in the middle of a prompt's rows; going on before them.")
    left = gather_shares(path, prompts, num_done, append)
    return left, next_share(path)


def _answer(
    target: PreTrainedModel,
    renderer: ChatRenderer,
    prompts: Sequence[Prompt],
    numbers: Sequence[int],
    path: Path,
    sampling: Sampling,
    helped: Mapping[str, Any],  # options of `generate` that make it faster
    progress: tqdm,
    size: int,  # prompts that are sorted by length together
    append: Append,
) -> None:
    """Append the answers to those of `prompts` that `numbers` names to `path`, in that order."""
    num_tokens, start = 0, time.perf_counter()

    def on_batch(num_new: int, num_done: int) -> None:
        nonlocal num_tokens
        num_tokens += num_new
        progress.set_postfix_str(f"{num_tokens / (time.perf_counter() - start):.0f} tokens/s", refresh=False)
        progress.update(num_done)

    for first in range(0, len(numbers), size):
        window = list(numbers[first : first + size])
        for groups in _answer_in_order(target, renderer, [prompts[i] for i in window], sampling, helped, on_batch):
            answered, window = window[: len(groups)], window[len(groups) :]
            rows = [row for i, group in zip(answered, groups, strict=True) for row in _make_rows(i, group)]
            append(path, rows)


def _answer_in_order(
    target: PreTrainedModel,
    renderer: ChatRenderer,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    helped: Mapping[str, Any],
    on_batch: Callable[[int, int], None],
) -> Iterator[list[list[Dialogue]]]:
    """For each prompt its dialogues, several prompts at once: as soon as they and those before them are done.

    `on_batch` is called after each batch with the numbers of new tokens and of newly finished prompts.
    """
    groups = [
        [
            Dialogue(prompt, temperature, sample, list(prompt.messages))
            for temperature in sampling.temperatures
            for sample in range(sampling.num_return_sequences if temperature else 1)
        ]
        for prompt in prompts
    ]
    num_given = num_done = 0
    while num_given < len(groups):
        waiting = [dialogue for group in groups[num_given:] for dialogue in group if not dialogue.is_done]
        unanswered = [(dialogue, dialogue.next_prompt(renderer)) for dialogue in waiting]
        unanswered.sort(key=lambda item: (item[0].temperature, len(item[1])))
        for temperature, of_one in itertools.groupby(unanswered, key=lambda item: item[0].temperature):
            same = list(of_one)
            for i in range(0, len(same), sampling.batch_size):
                batch = same[i : i + sampling.batch_size]
                answers = generate_rows(target, [ids for _, ids in batch], sampling, temperature, helped)
                for (dialogue, ids), (new_ids, is_ended) in zip(batch, answers, strict=True):
                    dialogue.add(ids, new_ids, is_ended=is_ended, renderer=renderer)
                is_done = [all(dialogue.is_done for dialogue in group) for group in groups[num_given:]]
                newly_done, num_done = num_given + sum(is_done) - num_done, num_given + sum(is_done)
                on_batch(sum(len(new_ids) for new_ids, _ in answers), newly_done)
                if num_ready := sum(1 for _ in itertools.takewhile(bool, is_done)):
                    yield groups[num_given : num_given + num_ready]
                    num_given += num_ready


def generate_rows(
    target: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    temperature: float,
    helped: Mapping[str, Any],
) -> list[tuple[list[int], bool]]:
    """The answer of `target` to each of `prompts`, its end of turn included, and whether it has one."""
    ends = eos_token_ids(target)
    width = max(map(len, prompts))
    pad = ends[0] if ends else 0
    input_ids = torch.tensor(
        [[pad] * (width - len(ids)) + list(ids) for ids in prompts], device=target.device
    )  # [B, T]
    attention_mask = torch.tensor(
        [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=target.device
    )  # [B, T]
    out = target.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        max_new_tokens=sampling.max_new_tokens,
        pad_token_id=pad,
        **sampling.options(temperature),
        **helped,
    )
    rows = []
    for ids in out[:, width:].tolist():
        end = find_end(ids, 0, ends)  # padding follows, often with the same token
        rows.append((ids[:end], end is not None))
    return rows


# ---- the file ----


def _make_rows(number: int, dialogues: Sequence[Dialogue]) -> list[dict[str, Any]]:
    """A row for each dialogue, or several where the template rewrites earlier turns."""
    rows: list[dict[str, Any]] = []
    for dialogue in dialogues:
        for row in merge_turns(dialogue.turns):
            origin = {"source": dialogue.prompt.source} if dialogue.prompt.source is not None else {}
            rows.append(
                {
                    "input_ids": row.input_ids,
                    "loss_mask": row.loss_mask,
                    **origin,
                    "prompt_id": number,
                    "prompt_fingerprint": dialogue.prompt.fingerprint,
                    "temperature": dialogue.temperature,
                    "sample": dialogue.sample,
                    "finish": dialogue.finishes[-1],
                }
            )
    return [{**row, "num_rows": len(rows)} for row in rows]


def _keep_record(path: Path, renderer: ChatRenderer, sampling: Sampling, target_name: str) -> None:
    """Write the settings of `path` beside it, or compare them with those that are there.

    Raises:
        ValueError: The file was begun otherwise.
    """
    template = renderer.tokenizer.get_chat_template()
    decisive = {
        "target": target_name,
        **{name: value for name, value in asdict(sampling).items() if name not in ("batch_size", "seed")},
        "chat_template_sha256": hashlib.sha256(template.encode()).hexdigest(),
        "chat_template_kwargs": dict(renderer.template_kwargs),
        "date": renderer.date.isoformat(),
    }
    decisive = json.loads(json.dumps(decisive))
    record = path.with_name(path.name + ".meta.json")
    is_cut = path.exists() and path.stat().st_size and next(read_whole_lines(path), None) is None
    if is_cut and not record.exists():  # else it may be a first row of ours
        raise ValueError(f"{path} was not written by regenerate, so it cannot be gone on with. Give a new file.")
    if record.exists() and (path.exists() or find_shares(path)):
        try:
            begun = parse_json(record.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{record} is damaged ({error}). Give a new output file, or delete both.") from error
        if not isinstance(begun, dict):
            raise DataError(f"{record} is damaged: expected a table, got {show(begun)}. Give a new output file.")
        if other := [name for name, value in decisive.items() if begun.get(name) != value]:
            raise ValueError(
                f"{path} was begun with {', '.join(f'{name} {begun.get(name)!r}' for name in other)}; now it is "
                f"{', '.join(f'{name} {decisive[name]!r}' for name in other)}. Give the same again, or a new file."
            )
        return
    versions = {"seed": sampling.seed, "batch_size": sampling.batch_size, "transformers": transformers.__version__}
    record.write_text(json.dumps({**decisive, **versions}, indent=1) + "\n", encoding="utf-8")
