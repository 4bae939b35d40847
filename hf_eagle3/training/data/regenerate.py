"""Training data from the target itself: it answers prompts, and the very tokens it wrote are kept.

Nothing is rendered or tokenised again: a row is the prompt's ids and the sampled ids. Of a dialogue, each answer is
followed by the next question; where the template shows earlier answers as they were written, they stay token for token.
"""

import copy
import hashlib
import itertools
import json
import random
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm
from transformers import ContinuousBatchingConfig, PreTrainedModel
from transformers.utils import logging

from ...data_parallel import Team
from ...host.batching import Opened, open_desk, why_not_open
from ...host.refusals import refuse_compiled
from ...host.undrafted import decode_plainly
from ...modeling.text_eagle3 import parse_json, show
from .answer_shards import count_answered, find_shares, gather_shares, name_share, next_share
from .answer_turns import Key, TurnFile, Turns, find_turns, read_turns
from .answer_turns import Turn as Answered
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
        if len(set(self.temperatures)) < len(self.temperatures):
            raise ValueError(
                f"--temperature has a number twice, got {list(self.temperatures)}: --num-return-sequences answers each "
                "prompt several times."
            )
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

    key: Key
    prompt: Prompt
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

    def add(self, prompt_ids: list[int], answered: Answered, renderer: ChatRenderer) -> None:
        """Add an answer, and the next question if there is one."""
        new_ids, is_ended = answered
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
    refuse_compiled(target)
    team = team or Team(target.device, is_alone=True)
    begun = _go_on(path, prompts, renderer, sampling, target_name, append) if team.rank == 0 else None
    left, turns, first_number = team.gather(begun)[0]  # after this, no process reads a file of another
    number = first_number + team.rank
    is_shared = team.size > 1 or bool(find_shares(path))  # processes do not wait for one another
    own = left[team.rank :: team.size]
    title = "answers" if team.size == 1 else f"answers of process 1 of {team.size}"
    num_done = len(prompts) - len(left)
    is_begun = num_done > 0 or bool(turns) or is_shared
    # Draws of their own for each process, and for each run that goes on: those before it have used their draws.
    mixed = random.Random(f"{sampling.seed} {num_done} {sum(map(len, turns.values()))} {number}").getrandbits(63)
    with (
        tqdm(total=len(own), desc=title, unit=" prompts", disable=team.rank > 0) as progress,
        seeded(target, mixed if is_begun else sampling.seed),
    ):
        helped = decode_plainly(target) if drafter is None else {"assistant_model": drafter}
        opened = open_rounds(target, sampling, helped)
        turn_file = TurnFile(path, number, prompts)
        answerer = _Answerer(target, renderer, prompts, sampling, helped, opened, turns, turn_file)
        place = name_share(path, number) if is_shared else path
        answerer.write_all(own, place, window * sampling.batch_size, progress, append)
    team.wait()
    if team.rank == 0:
        _finish(path, prompts, append, is_shared=is_shared)


def _finish(path: Path, prompts: Sequence[Prompt], append: Append, *, is_shared: bool) -> None:
    """Make one file of what processes wrote, and drop turns that are in it."""
    if is_shared:
        gather_shares(path, prompts, count_answered(path, prompts)[1], append)
    for _, written in find_turns(path):
        written.unlink()


def _go_on(
    path: Path,
    prompts: Sequence[Prompt],
    renderer: ChatRenderer,
    sampling: Sampling,
    target_name: str,
    append: Append,
) -> tuple[list[int], Turns, int]:
    """Put earlier answers in order.

    Returns:
        The numbers of `prompts` that are left, the answers to them that wait for others, and the first number for files
        of this run's processes.
    """
    _keep_record(path, renderer, sampling, target_name)
    num_lines, num_done = count_answered(path, prompts)
    if keep_lines(path, num_lines):
        logger.warning(f"{path} ends in the middle of a prompt's rows; going on before them.")
    left = gather_shares(path, prompts, num_done, append)
    used = [number for number, _ in find_turns(path)]
    return left, read_turns(path, prompts, frozenset(left)), max([next_share(path), *(number + 1 for number in used)])


@dataclass(frozen=True)
class _Answerer:
    """Answers prompts with a target, a batch at a time."""

    target: PreTrainedModel
    renderer: ChatRenderer
    prompts: Sequence[Prompt]
    sampling: Sampling
    helped: Mapping[str, Any]  # options of `generate` that make it faster
    opened: Opened | None  # rounds that prompts join; None where they cannot, and batches are answered
    turns: Turns  # answers of earlier runs
    turn_file: TurnFile  # of this one

    def write_all(self, numbers: Sequence[int], path: Path, size: int, progress: tqdm, append: Append) -> None:
        """Append the answers to those of the prompts that `numbers` names to `path`, in that order.

        Args:
            numbers: Of prompts.
            path: Gets their rows.
            size: Prompts that are sorted by length together.
            progress: Moves as prompts are answered, which is before they are written.
            append: Adds rows to a file.
        """
        num_tokens, start = 0, time.perf_counter()
        for first in range(0, len(numbers), size):
            groups = [self.begin(number) for number in numbers[first : first + size]]
            num_done = num_written = 0
            answer = self.answer if self.opened is None else partial(self.answer_in_rounds, self.opened)
            for num_new in itertools.chain([0], answer(groups)):  # before the first batch, what earlier runs did
                is_done = [all(dialogue.is_done for dialogue in group) for group in groups]
                num_tokens += num_new
                progress.set_postfix_str(f"{num_tokens / (time.perf_counter() - start):.0f} tokens/s", refresh=False)
                if num_new or sum(is_done):
                    progress.update(sum(is_done) - num_done)
                num_done = sum(is_done)
                if num_ready := sum(1 for _ in itertools.takewhile(bool, is_done[num_written:])):
                    ready = groups[num_written : num_written + num_ready]
                    append(path, [row for group in ready for row in _make_rows(group)])
                    num_written += num_ready
            self.turn_file.clear()

    def begin(self, number: int) -> list[Dialogue]:
        """The dialogues of one prompt, as far as earlier runs came with them."""
        prompt, dialogues = self.prompts[number], []
        for temperature in self.sampling.temperatures:
            for sample in range(self.sampling.num_return_sequences if temperature else 1):
                dialogue = Dialogue(Key(number, temperature, sample), prompt, list(prompt.messages))
                for turn in self.turns.get(dialogue.key, ()):
                    dialogue.add(dialogue.next_prompt(self.renderer), turn, self.renderer)
                dialogues.append(dialogue)
        return dialogues

    def answer_in_rounds(self, opened: Opened, groups: Sequence[Sequence[Dialogue]]) -> Iterator[int]:
        """Answer all of `groups`, each prompt as soon as a place is free; yields numbers of new tokens as answers end.

        An answer depends on the seed and on which it is, not on those beside it.

        Raises:
            ValueError: A prompt cannot be answered.
        """
        desk, asking, _ = opened
        ends, waiting = eos_token_ids(self.target), deque(d for group in groups for d in group if not d.is_done)
        asked: dict[str, tuple[Dialogue, list[int]]] = {}
        with desk.in_flight:
            while waiting or asked:
                told = []
                with torch.no_grad():
                    while waiting and len(asked) < 2 * self.sampling.batch_size:
                        dialogue = waiting.popleft()
                        ids = dialogue.next_prompt(self.renderer)
                        (request,) = asking.ask(
                            ids, None, **self._describe(dialogue, ids, asking.maker.positions, ends)
                        )
                        asked[request.id] = dialogue, ids
                        told += desk.add(request)
                    told += desk.step()
                turns = []
                for output in told:
                    asking.forget(output.request_id)
                    if output.error is not None:
                        raise ValueError(f"A prompt of {len(output.prompt_ids)} tokens: {output.error}")
                    dialogue, ids = asked.pop(output.request_id)
                    new_ids = output.generated_tokens
                    turns.append((dialogue.key, Answered(new_ids, bool(new_ids) and new_ids[-1] in ends)))
                    dialogue.add(ids, turns[-1][1], self.renderer)
                    if not dialogue.is_done:
                        waiting.appendleft(dialogue)
                if turns:
                    self.turn_file.add(turns)
                    yield sum(len(turn.new_ids) for _, turn in turns)

    def _describe(
        self, dialogue: Dialogue, ids: list[int], positions: int | None, ends: Sequence[int]
    ) -> dict[str, Any]:
        """How the next prompt of a dialogue is asked."""
        key, sampling = dialogue.key, self.sampling
        drawn = hashlib.sha256(f"{sampling.seed} {tuple(key)} {len(dialogue.turns)}".encode()).digest()
        room = sampling.max_new_tokens if positions is None else max(positions - len(ids), 1)
        return {
            "max_new_tokens": min(sampling.max_new_tokens, room),
            "eos_token_id": list(ends),
            "settings": {**sampling.options(key.temperature), "seed": int.from_bytes(drawn[:7], "big")},
            "is_streaming": False,
            "records_times": False,
        }

    def answer(self, groups: Sequence[Sequence[Dialogue]]) -> Iterator[int]:
        """Answer all of `groups`, prompts of similar length together; yields the number of new tokens of each batch."""
        while waiting := [dialogue for group in groups for dialogue in group if not dialogue.is_done]:
            unanswered = [(dialogue, dialogue.next_prompt(self.renderer)) for dialogue in waiting]
            unanswered.sort(key=lambda item: (item[0].key.temperature, len(item[1])))
            for temperature, of_one in itertools.groupby(unanswered, key=lambda item: item[0].key.temperature):
                same = list(of_one)
                for i in range(0, len(same), self.sampling.batch_size):
                    yield self.answer_batch(same[i : i + self.sampling.batch_size], temperature)

    def answer_batch(self, batch: Sequence[tuple[Dialogue, list[int]]], temperature: float) -> int:
        """Answer one prompt of each dialogue, and keep that; returns the number of new tokens."""
        answers = generate_rows(self.target, [ids for _, ids in batch], self.sampling, temperature, self.helped)
        for (dialogue, ids), turn in zip(batch, answers, strict=True):
            dialogue.add(ids, turn, self.renderer)
        self.turn_file.add((dialogue.key, turn) for (dialogue, _), turn in zip(batch, answers, strict=True))
        return sum(len(turn.new_ids) for turn in answers)


def open_rounds(target: PreTrainedModel, sampling: Sampling, helped: Mapping[str, Any]) -> Opened | None:
    """Rounds of our loop that prompts join; None where `target` has none, or they are not worth having."""
    if not helped or why_not_open(target) is not None:
        return None
    drafter, ends = helped.get("assistant_model"), eos_token_ids(target)
    given = copy.deepcopy(target.generation_config)
    given.update(max_length=None, max_new_tokens=sampling.max_new_tokens, pad_token_id=ends[0] if ends else 0)
    settings = {} if drafter is not None else dict(helped)
    places = ContinuousBatchingConfig(max_requests_per_batch=sampling.batch_size)
    return open_desk(target, drafter, settings, given, places, None)


def generate_rows(
    target: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    temperature: float,
    helped: Mapping[str, Any],
) -> list[Answered]:
    """The answer of `target` to each of `prompts`, its end of turn included."""
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
        rows.append(Answered(ids[:end], end is not None))
    return rows


# ---- the file ----


def _make_rows(dialogues: Sequence[Dialogue]) -> list[dict[str, Any]]:
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
                    "prompt_id": dialogue.key.prompt_id,
                    "prompt_fingerprint": dialogue.prompt.fingerprint,
                    "temperature": dialogue.key.temperature,
                    "sample": dialogue.key.sample,
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
    if record.exists() and (path.exists() or find_shares(path) or find_turns(path)):
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
