"""Comparing texts of our loop with those of stock `generate`, before anything is timed."""

from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel

from ..data_parallel import Team
from .equality import Agreement, OutputDiffersError, Text, compare
from .names import STOCK, is_ours
from .prompts import Prompts, first_rows
from .ways import Call, Way

FEW = 4  # prompts to compare where stock `generate` does not run over all of them


def judge(
    target: PreTrainedModel,
    judged: Mapping[str, Way],
    batches: Sequence[Prompts],
    firsts: Mapping[str, list[Call]],
    max_new_tokens: int,
    *,
    is_greedy: bool,
    has_room: bool,
) -> tuple[dict[str, Agreement], str]:
    """How each kind of ours agrees with stock `generate`, and where one does not: over all prompts if it ran over them,
    else over a few, and over a few of a batch's rows where it has no room for all.
    """
    ours = [kind for kind in firsts if is_ours(kind)]
    if is_greedy and STOCK in firsts:
        known = dict(firsts)
    else:
        batches = batches[: max(1, FEW // len(batches[0].numbers))] if has_room else [first_rows(batches[0], FEW)]
        known = {STOCK: [judged[STOCK](batch, max_new_tokens) for batch in batches]}
        for kind in ours:
            again = [] if is_greedy else [judged[kind](batch, max_new_tokens) for batch in batches]
            known[kind] = again or firsts[kind][: len(batches)]
    agreements, problem = {}, ""
    for kind in ours:
        try:
            agreements[kind] = compare(target, pair_texts(batches, known[STOCK], known[kind]), kind=kind)
        except OutputDiffersError as error:
            problem = problem or str(error)
    return agreements, problem


def pair_texts(batches: Sequence[Prompts], stock: Sequence[Call], ours: Sequence[Call]) -> list[Text]:
    """Each prompt with the text of stock `generate` and ours."""
    texts = []
    for batch, plain, other in zip(batches, stock, ours, strict=True):
        for i, number in enumerate(batch.numbers):
            prompt = batch.inputs["input_ids"][i][batch.inputs["attention_mask"][i].bool()]
            texts.append(Text(f"prompt {number}", prompt, plain.rows[i], other.rows[i]))
    return texts


def agree(agreements: Mapping[str, Agreement], problem: str, team: Team) -> dict[str, Agreement]:
    """What all processes found.

    Raises:
        OutputDiffersError: Texts differ, in any process.
    """
    if problems := [p for p in team.gather(problem) if p]:
        raise OutputDiffersError(problems[0])
    return {kind: sum(team.gather(agreement), Agreement()) for kind, agreement in agreements.items()}
