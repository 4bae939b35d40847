"""Models and prompts that `hf-eagle3 bench` names."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.distributed import DistributedConfig

from ..console.opening import opening, refuse_drafter, refuse_target
from ..data_parallel import Team, launch
from ..host.refusals import refuse_other_models
from ..host.shapes import DEFAULT_DEPTH, find_depth, list_candidates
from ..kernels.qkv import join_projections
from ..modeling.text_eagle3 import parse_json, show
from ..speculation.coverage import Coverage, read_coverage
from ..speculation.shape import chain
from .dflash import load_dflash
from .measure import Plan
from .names import CHOSEN, DFLASH, KINDS, SWEPT
from .prompts import Prompts, Question, batch_questions, batch_random_prompts, read_questions
from .shapes import make_random_drafter, make_target
from .ways import Way, make_ways


def refuse_models(args: argparse.Namespace) -> None:
    """Raise if prompts or models are not what their options say, before any is loaded.

    Raises:
        ValueError: Names the option, what was expected, and what came.
    """
    is_known = args.num_draft_tokens is not None or args.drafter is None
    depth = (args.num_draft_tokens or DEFAULT_DEPTH) if is_known else None
    refuse_acceptance_length(args.simulate_acceptance_length, depth)
    if args.prompts is not None:
        read_questions(args.prompts, limit=args.limit, at_least=args.dp_size or 1)
    if args.target is not None:
        refuse_target("--target", args.target)
    if args.drafter is not None:
        refuse_drafter("--drafter", args.drafter)
    if args.tp_size is not None and args.tp_size > 1:
        refuse_uneven_shares(args.target, args.tp_size)


def refuse_acceptance_length(length: float | None, depth: int | None) -> None:
    """Raise if no draft of `depth` tokens can have this acceptance length; a depth of None is not known yet."""
    most = math.inf if depth is None else depth + 1
    if length is None or (1 <= length <= most and length < math.inf):
        return
    wanted = "at least 1, the target's own token" if depth is None else f"between 1 and {most}, the draft depth plus 1"
    hint = "" if depth is None or not length > most else " Or draft deeper: --num-draft-tokens."
    raise ValueError(f"--simulate-acceptance-length must be {wanted}; got {length}.{hint}")


def choose_depth(drafter: PreTrainedModel, given: int | None) -> int:
    """K: the option, or else the drafter's own depth."""
    depth = find_depth(given, drafter)
    if depth < 1:
        raise ValueError(
            "The drafter's generation config has num_assistant_tokens=0, no drafts: give --num-draft-tokens."
        )
    return depth


def refuse_uneven_shares(target: str, tp_size: int) -> None:
    """Raise if processes would share a head of the target's attention."""
    config = AutoConfig.from_pretrained(target).get_text_config(decoder=True)
    for name in ("num_attention_heads", "num_key_value_heads"):
        count = getattr(config, name, None)
        if isinstance(count, int) and count % tp_size:
            raise ValueError(
                f"--tp-size {tp_size} does not divide the target's {name}, {count}: give one that does, so that each "
                "process has whole heads."
            )


def load_drafter(args: argparse.Namespace, dtype: torch.dtype) -> PreTrainedModel | None:
    """The drafter, looked at before its target is loaded; None for one of random weights.

    Raises:
        ValueError: It is none, or does not draft as deep as is to be simulated.
    """
    if args.drafter is None:
        return None
    with opening("--drafter", args.drafter):
        drafter = AutoModel.from_pretrained(args.drafter, dtype=dtype)
    refuse_other_models(drafter, args.drafter)
    refuse_acceptance_length(args.simulate_acceptance_length, choose_depth(drafter, args.num_draft_tokens))
    return drafter


def load_target(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The target: on `device`, or in parts on several."""
    if args.shape:
        return make_target(args.shape, device=device, dtype=dtype)
    options: dict[str, Any] = {}
    if args.tp_size is not None:
        options["distributed_config"] = DistributedConfig(tp_plan="auto")
    if args.device_map is not None:
        options["device_map"] = args.device_map
    with opening("--target", args.target):
        target = AutoModelForCausalLM.from_pretrained(args.target, dtype=dtype, **options).eval()
    return target if options else target.to(device)


class Steps(NamedTuple):
    """The steps of the command that start processes or load models; tests replace some."""

    launch: Callable[..., int] = launch
    load_target: Callable[[argparse.Namespace, torch.device, torch.dtype], PreTrainedModel] = load_target
    load_dflash: Callable[..., PreTrainedModel] = load_dflash
    make_ways: Callable[..., dict[str, Way]] = make_ways


STEPS = Steps()


class Setting(NamedTuple):
    """What is compared, on which prompts."""

    target: PreTrainedModel
    drafter: PreTrainedModel
    depth: int
    ways: dict[str, Way]
    judged: dict[str, Way] | None  # None where acceptance is simulated
    questions: list[Question] | None  # None: prompts of random tokens
    tokenizer: PreTrainedTokenizerBase | None
    plan: Plan  # of batch size 1


def load_setting(args: argparse.Namespace, team: Team, steps: Steps) -> Setting:
    """Load what the command names."""
    dtype = getattr(torch, args.dtype)
    questions, tokenizer = None, None
    if args.prompts is not None:
        questions = read_questions(args.prompts, limit=args.limit, at_least=team.size)
        with opening("--target", args.target):
            tokenizer = AutoTokenizer.from_pretrained(args.target)
    loaded = load_drafter(args, dtype)
    target = steps.load_target(args, team.device, dtype)
    drafter = (
        make_random_drafter(target, args.random_drafter) if loaded is None else loaded.to(target.device).bind(target)
    )
    if args.join_projections:
        join_projections(target, drafter)
    depth = choose_depth(drafter, args.num_draft_tokens)
    drafter.generation_config.num_assistant_tokens = depth
    target.generation_config.num_assistant_tokens = None  # the target's own would take precedence
    simulate(drafter, args)
    is_simulated = args.simulate_acceptance_length is not None or args.simulate_coverage is not None
    swept = find_swept(drafter, args.draft_shapes)
    kinds = [*(KINDS[name] for name in args.kinds), *swept]
    other = None
    if args.dflash_drafter is not None:
        other = steps.load_dflash(args.dflash_drafter, dtype=dtype, device=target.device)
        kinds.append(DFLASH)
    ways = steps.make_ways(target, drafter, temperature=args.temperature, dflash_drafter=other, swept=swept)
    judged = None if is_simulated else steps.make_ways(target, drafter, temperature=0.0, swept=swept)
    plan = Plan(
        1,
        args.max_new_tokens,
        args.repeats,
        # The shorter run after random prompts, where there is room for one.
        subtract=args.max_new_tokens // 8 if questions is None else 0,
        is_greedy=args.temperature == 0,
    )
    return Setting(target, drafter, depth, {kind: ways[kind] for kind in kinds}, judged, questions, tokenizer, plan)


def simulate(drafter: PreTrainedModel, args: argparse.Namespace) -> None:
    """Let drafts be accepted as the options say, if they do.

    Raises:
        ValueError: The file has no rates, or is of another drafter.
    """
    if args.simulate_acceptance_length is not None:
        drafter.generation_config.simulated_acceptance_length = args.simulate_acceptance_length
    if args.simulate_coverage is not None:
        drafter.generation_config.simulated_coverage = read_coverage_file(args.simulate_coverage, args.drafter)


def read_coverage_file(path: Path, drafter: str | None) -> Coverage:
    """Rates by depth and rank, as `benchmarks/bench_shapes.py --write-coverage` writes them.

    Raises:
        ValueError: It has none, or says that it is of another drafter than `drafter`.
    """
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
        rates = read_coverage(found["acceptance_by_rank"])
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise ValueError(
            f"--simulate-coverage {path}: expected JSON with acceptance_by_rank, for each depth a list of rates: {error}"
        ) from error
    of, given = found.get("drafter"), Path(drafter).name if drafter is not None else None
    if of is not None and given is not None and of != given:
        raise ValueError(f"--simulate-coverage {path}: it is of {show(of)}, and --drafter is {given}.")
    return rates


def find_swept(drafter: PreTrainedModel, names: list[str]) -> dict[str, Any]:  # Any: what `draft_shape` takes
    """Further kinds of ours by the names that --draft-shapes takes, and the shape that each drafts.

    Raises:
        ValueError: The drafter has no such tree.
    """
    trees = {f"tree-{shape.num_verified}": shape for shape in list_candidates(drafter) if not shape.is_chain}
    swept: dict[str, Any] = {}
    for name in names:
        if name == "auto":
            swept[CHOSEN] = name
            continue
        if not name.isdigit() and name not in trees:
            raise ValueError(f"--draft-shapes {name}: the drafter has rates for {', '.join(trees)} alone.")
        shape = chain(int(name)) if name.isdigit() else trees[name]
        swept[SWEPT.format(shape.name)] = shape
    return swept


def make_batches(setting: Setting, args: argparse.Namespace, size: int, team: Team) -> list[Prompts]:
    """This process's prompts, in batches."""
    device = setting.target.device
    if setting.questions is None:
        V = setting.target.config.get_text_config(decoder=True).vocab_size
        return batch_random_prompts(size, args.prompt_length, V, device, team)
    assert setting.tokenizer is not None
    return batch_questions(setting.questions, setting.tokenizer, size, device, team)
