"""Spellings of options: those that are accepted, and the nearest to one that is not."""

import difflib
from collections.abc import Iterable, Mapping

# Option -> other spellings, accepted wherever a command has the option. Underscores stand for dashes everywhere.
SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "--target": ("--model", "--model-name-or-path", "--target-model", "--target-model-name-or-path", "--tokenizer"),
    "--drafter": ("--assistant-model", "--draft-model", "--drafter-name-or-path"),
    "--dtype": ("--torch-dtype", "--target-dtype"),
    "--num-draft-tokens": ("--num-assistant-tokens", "--num-speculative-tokens"),
}
CANONICAL = {other: option for option, others in SPELLINGS.items() for other in others}


def respell(name: str, options: Iterable[str]) -> str:
    """An option as `options` spell it, where that is another spelling of it."""
    dashed = name.replace("_", "-") if name.startswith("--") else name
    known = (name, dashed, CANONICAL.get(dashed, ""))
    return next((spelling for spelling in known if spelling in options), name)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The known words that are nearest, as the end of a sentence; nothing where none is near."""
    by_name = {option.strip("-").replace("_", "-"): option for option in known}
    near = difflib.get_close_matches(word.strip("-").replace("_", "-"), by_name, n=2)
    return f" (did you mean {' or '.join(by_name[name] for name in near)}?)" if near else ""
