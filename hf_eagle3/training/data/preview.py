"""Training rows for a person to check: text with the supervised tokens set off, and the numbers of a data set."""

import itertools
from collections.abc import Iterator, Mapping

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ...modeling.text_eagle3 import escape_controls, one_line
from .token_rows import TokenDataset
from .vocabulary import FEW_TOKENS, GOOD_COVERAGE, count_by_source, count_supervised_tokens, measure_coverage

SUPERVISED, PLAIN, RESET = "\033[1;30;42m", "\033[2m", "\033[0m"
BRACKETS = ("⟦", "⟧")  # in no tokenizer's own marks, and rare in text


def format_row(row: Mapping[str, np.ndarray], tokenizer: PreTrainedTokenizerBase, *, color: bool) -> str:
    """The row's text; supervised spans in colour, or in brackets."""
    ids, mask = row["input_ids"], row["loss_mask"]
    edges = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(ids)]
    parts = []
    for start, end in itertools.pairwise(edges):
        text = tokenizer.decode(ids[start:end].tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        text = escape_controls(text)  # a row's text must not move the cursor; our own colours are put around it
        if color:
            # Line by line, so that the colour does not run to the terminal's edge, nor into a pager's next line.
            code = SUPERVISED if mask[start] else PLAIN
            text = "\n".join(f"{code}{line}{RESET}" if line else "" for line in text.split("\n"))
        elif mask[start]:
            text = BRACKETS[0] + text + BRACKETS[1]
        parts.append(text)
    return "".join(parts)


def describe_row(row: Mapping[str, np.ndarray]) -> str:
    """The row's numbers, on one line."""
    return (
        f"{len(row['input_ids'])} tokens, {row['loss_mask'].sum()} supervised in {num_spans(row['loss_mask'])} spans"
    )


def num_spans(mask: np.ndarray) -> int:
    """How many runs of true `mask` [T] has."""
    return int(mask[0]) + int((np.diff(mask.astype(np.int8)) == 1).sum())


def describe_dataset(dataset: TokenDataset, vocab_size: int) -> str:
    """The numbers of `dataset`, a line each: rows, tokens, and the coverage of draft vocabularies."""
    counts = dataset.counts
    rows = [dataset[i] for i in range(len(dataset))]
    tokens = sum(len(row["input_ids"]) for row in rows)
    supervised = sum(int(row["loss_mask"].sum()) for row in rows)
    lines = [
        f"rows        {len(rows)} kept of {counts.num_made}, made of {counts.num_read} in the file",
        f"tokens      {tokens}",
        f"supervised  {supervised}, {supervised / tokens:.1%} of the tokens, in {sum(num_spans(row['loss_mask']) for row in rows)} spans",
        f"cut         {counts.num_cut} rows, {counts.num_cut_tokens} tokens",
        f"left out    {counts.num_left_out} rows, in which there is nothing to draft",
    ]
    if counts.num_unterminated:
        lines.append(f"no end      {counts.num_unterminated} of {counts.num_turns} turns; see the warning")
    total = count_supervised_tokens(dataset, vocab_size)
    lines += ["", "What the most frequent tokens are of the supervised ones:", *_coverage_table(dataset, total)]
    if supervised < FEW_TOKENS:
        lines.append(f"{supervised} tokens are few to choose a draft vocabulary by: other text has others.")
    return "\n".join(lines)


def _coverage_table(dataset: TokenDataset, total: Tensor) -> Iterator[str]:
    overall = measure_coverage(total)
    by_source = {
        source: measure_coverage(counts, ranking=total)
        for source, counts in count_by_source(dataset, len(total)).items()
    }
    head = ["tokens", "covers", *map(one_line, by_source)]
    body = []
    for size in overall.shares:
        shares = [overall.shares[size], *(coverage.shares[size] for coverage in by_source.values())]
        body.append([f"{size}", *(f"{share:.2%}" + (" !" if share < GOOD_COVERAGE else "") for share in shares)])
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    for row in (head, *body):
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
    yield f"{overall.num_distinct} distinct tokens occur." + (
        f" ! is below {GOOD_COVERAGE:.0%}." if any("!" in cell for row in body for cell in row) else ""
    )
