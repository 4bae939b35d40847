"""`hf-eagle3 regenerate`: lets a target answer prompts, and keeps its tokens as training data."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..console.interrupts import saying_on_interrupt
from ..console.paths import refuse_file, refuse_missing
from ..console.terminal import note
from .arguments import Parser, add_device, add_drafter, add_target, json_object
from .rows import add_rows, find_rows, refuse_rows
from .starting import start

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..data_parallel import Team
    from ..training.data.prompts import Prompt


def add_options(parser: Parser) -> None:
    """The options of `hf-eagle3 regenerate`."""
    parser.description = (
        "An interrupted run goes on where it stopped when the same command is run again, with any --dp-size."
    )
    add = parser.add
    add_target(parser, "the model that answers", required=True)
    add_rows(parser, "--prompt-file", "rows with messages, prompt or turns, also .gz")
    add("--output-file", type=Path, required=True, metavar="JSONL", help="also .gz; gone on with when it exists")
    add("--temperature", type=float, nargs="+", default=[0.7], metavar="T", help="0 is greedy; each prompt at each")
    add("--top-p", type=float, metavar="P", help="nucleus sampling (the target's own)")
    add("--top-k", type=int, metavar="K", help="sampling from the K likeliest (the target's own)")
    add("--num-return-sequences", type=int, default=1, metavar="N", help="sampled answers to each prompt")
    add("--max-new-tokens", type=int, default=512, metavar="N", help="longest answer, in tokens")
    add("--batch-size", type=int, default=16, metavar="B", help="prompts answered side by side")
    add_drafter(parser, "a drafter you have, to be sooner done with the same answers")
    add(
        "--chat-template-kwargs",
        type=json_object,
        default={},
        metavar="JSON",
        help="such as '{\"enable_thinking\": false}'",
    )
    add("--self-prompts", type=int, default=0, metavar="N", help="let the target make up N prompts more (Magpie)")
    add("--self-share", type=float, metavar="S", help="at most this share of all prompts is made up, in 0..1")
    add("--self-temperature", type=float, default=1.0, metavar="T", help="of the prompts it makes up")
    add("--exclude-file", type=Path, nargs="+", default=[], metavar="JSONL", help="prompts to leave out: eval prompts")
    add("--dedupe", action="store_true", help="leave out prompts that say the same")
    add_device(parser)
    add("--seed", type=int, default=0, metavar="N", help="of the sampling")
    add(
        "--dp-size",
        type=int,
        metavar="N",
        help="processes, each with a target of its own and its share of the prompts; not needed under accelerate launch "
        "and torchrun (1, or what they started)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Answer what is not answered yet; exit status 0."""
    if not has_prompts(args) and not args.self_prompts:
        raise ValueError("Nothing to answer: give --prompt-file, --dataset-name, or --self-prompts N.")
    if has_prompts(args):
        refuse_rows(args, "--prompt-file")
    for path in args.exclude_file:
        refuse_file("--exclude-file", path)
    if args.output_file.is_dir() or not args.output_file.parent.is_dir():
        raise ValueError(f"--output-file {args.output_file}: a folder, or in a folder that is not there. Give a file.")
    refuse_missing("--target", args.target)
    if args.drafter is not None:
        refuse_missing("--drafter", args.drafter)
    start()
    import torch

    from ..console.devices import choose_device
    from ..console.opening import refuse_drafter, refuse_target
    from ..data_parallel import Team, launch, list_arguments, must_launch

    refuse_target("--target", args.target)
    if args.drafter is not None:
        refuse_drafter("--drafter", args.drafter)
    device = choose_device(args.device)
    if must_launch(args.dp_size):
        with saying_on_interrupt(lambda: say_kept(args.output_file)):
            return launch(args.dp_size, ["regenerate", *list_arguments(args)])
    with (
        Team(torch.device(device)) as team,
        saying_on_interrupt(lambda: None if team.rank else say_kept(args.output_file)),
    ):
        answer_all(args, team)
    return 0


def has_prompts(args: argparse.Namespace) -> bool:
    """Whether there are prompts that the target does not make up."""
    return args.prompt_file is not None or args.dataset_name is not None


def say_kept(output_file: Path) -> str:
    """Which files an interrupted run leaves, and how to go on."""
    return (
        f"Answers are kept as they come, in {output_file} and beside it, so at most those of one batch are lost: run the same "
        "command again to go on."
    )


def answer_all(args: argparse.Namespace, team: "Team") -> None:
    """Answer this process's share of the prompts."""
    from ..training.data.prompts import make_prompts
    from ..training.data.regenerate import Sampling, regenerate
    from ..training.data.rendering import ChatRenderer

    sampling = Sampling(  # refuses bad numbers before anything is read or loaded
        temperatures=tuple(args.temperature),
        top_p=args.top_p,
        top_k=args.top_k,
        num_return_sequences=args.num_return_sequences,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        seed=args.seed,
    )
    kept, excluded, num_made_up = select_prompts(args, is_silent=team.rank > 0)
    tokenizer, target, drafter = load_models(args, team.device)
    renderer = ChatRenderer(tokenizer, template_kwargs=args.chat_template_kwargs)
    if num_made_up:
        kept += make_prompts(
            target,
            renderer,
            num_made_up,
            args.output_file.with_name(args.output_file.name + ".prompts.jsonl"),
            known=kept + excluded,
            temperature=args.self_temperature,
            batch_size=args.batch_size,
            seed=args.seed,
            team=team,
        )
    options = {"drafter": drafter, "target_name": args.target, "team": team}
    regenerate(target, renderer, kept, args.output_file, sampling, **options)


def select_prompts(args: argparse.Namespace, *, is_silent: bool) -> "tuple[list[Prompt], list[Prompt], int]":
    """The prompts to answer, those that are excluded, and how many the target is to make up."""
    from ..training.data.files import read_rows
    from ..training.data.prompts import exclude, limit_share, read_prompts

    prompts = read_prompts(find_rows(args, "--prompt-file").read_placed()) if has_prompts(args) else []
    excluded = [prompt for path in args.exclude_file for prompt in read_prompts(read_rows(path))]
    kept = exclude(prompts, excluded, dedupe=args.dedupe)
    num_made_up = (
        args.self_prompts if args.self_share is None else limit_share(args.self_prompts, len(kept), args.self_share)
    )
    if len(kept) < len(prompts) and not is_silent:
        note(f"{len(prompts) - len(kept)} of {len(prompts)} prompts are left out: excluded, or said before.")
    if num_made_up < args.self_prompts and not is_silent:
        note(f"{num_made_up} prompts are made up, a share of {args.self_share:g}.")
    if not kept and not num_made_up:
        raise ValueError(f"Nothing to answer: of {len(prompts)} prompts none is left, and none is to be made up.")
    return kept, excluded, num_made_up


def load_models(
    args: argparse.Namespace, device: "torch.device"
) -> "tuple[PreTrainedTokenizerBase, PreTrainedModel, PreTrainedModel | None]":
    """The target with its tokenizer, and the drafter if one is given."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    from ..console.devices import choose_dtype
    from ..console.opening import opening
    from ..host.refusals import refuse_other_models

    with opening("--target", args.target):
        tokenizer = AutoTokenizer.from_pretrained(args.target)
    dtype = choose_dtype(args.dtype, device.type)
    with opening("--target", args.target):
        target = AutoModelForCausalLM.from_pretrained(args.target, dtype=dtype).to(device).eval()
    if not args.drafter:
        return tokenizer, target, None
    with opening("--drafter", args.drafter):
        drafter = AutoModel.from_pretrained(args.drafter, dtype=target.dtype).to(device).eval()
    refuse_other_models(drafter, args.drafter)
    return tokenizer, target, drafter
