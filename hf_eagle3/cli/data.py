"""The commands that make and show training data: `data preview` and `regenerate`.

What they do is in `training`, which takes seconds to import, so it is imported when a command runs.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedConfig

from ..console.opening import opening, refuse_device, refuse_drafter, refuse_file, refuse_target
from ..console.terminal import note as write_note
from ..console.terminal import say
from ..data_parallel import Team, launch, list_arguments, must_launch
from ..host.refusals import refuse_other_models
from ..modeling.text_eagle3 import parse_json, show


def add_data_parsers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`hf-eagle3 data preview` and `hf-eagle3 regenerate`."""
    data = commands.add_parser("data", help="look at training data")
    data_commands = data.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    preview = data_commands.add_parser(
        "preview",
        help="show which tokens of training rows are supervised, and the numbers of the data",
        description="Loads the target's tokenizer only. Supervised text is coloured in a terminal, in ⟦brackets⟧ elsewhere.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_preview_arguments(preview)
    preview.set_defaults(run=run_preview_command)

    regenerate = commands.add_parser(
        "regenerate",
        help="let a target answer prompts, and keep the very tokens it wrote: training data",
        description="An interrupted run goes on where it stopped when the same command is run again, with any --dp-size.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_regenerate_arguments(regenerate)
    regenerate.set_defaults(run=run_regenerate_command)


# ---- preview ----


def add_preview_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `data preview`."""
    parser.add_argument("--target", required=True, metavar="REPO_OR_DIR", help="whose tokenizer and chat template")
    parser.add_argument(
        "--train-file", "--train_file", type=Path, required=True, metavar="JSONL", help="rows of any format, also .gz"
    )
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="rows to show; 0: numbers only")
    parser.add_argument("--max-length", "--max_length", type=int, metavar="L", help="cut longer rows, as in training")
    parser.add_argument(
        "--chat-template-kwargs",
        "--chat_template_kwargs",
        type=json_object,
        default={},
        metavar="JSON",
        help="such as '{\"enable_thinking\": false}'",
    )
    parser.add_argument(
        "--color", choices=["auto", "always", "never"], default="auto", help="auto: when stdout is a terminal"
    )


def run_preview_command(args: argparse.Namespace) -> int:
    """Show rows and numbers; exit status 0."""
    from ..training.data.files import read_rows
    from ..training.data.preview import describe_dataset, describe_row, format_row
    from ..training.data.token_rows import TokenDataset, check_token_ids

    for name in ("rows", "max_length"):
        if (given := getattr(args, name)) is not None and given < (least := name == "max_length"):
            raise ValueError(f"--{name.replace('_', '-')} must be at least {int(least)}; got {given}.")
    refuse_file("--train-file", args.train_file)
    refuse_target("--target", args.target)
    with opening("--target", args.target):
        tokenizer = AutoTokenizer.from_pretrained(args.target)
    rows = tqdm(read_rows(args.train_file), desc="Tokenizing", unit=" rows", file=sys.stderr, leave=False)
    with opening("--target", args.target):
        ends, vocab_size = find_eos_token_ids(args.target), find_vocab_size(args.target, len(tokenizer))
    dataset = TokenDataset(
        rows, tokenizer, args.max_length, eos_token_ids=ends, chat_template_kwargs=args.chat_template_kwargs
    )
    check_token_ids(dataset, vocab_size)
    color = args.color == "always" or (args.color == "auto" and sys.stdout.isatty() and not os.environ.get("NO_COLOR"))
    for i in range(min(args.rows, len(dataset))):
        say(f"--- row {i + 1} of {len(dataset)}: {describe_row(dataset[i])}")
        sys.stdout.write(format_row(dataset[i], tokenizer, color=color) + "\n\n")  # escaped but for our own colours
    say(describe_dataset(dataset, vocab_size))
    return 0


def find_eos_token_ids(target: str) -> list[int]:
    """What ends the target's turns, by its generation config; nothing where it has none."""
    try:
        ends = GenerationConfig.from_pretrained(target).eos_token_id
    except OSError:
        return []
    return list(ends) if isinstance(ends, (list, tuple)) else [] if ends is None else [ends]


def find_vocab_size(target: str, num_tokens: int) -> int:
    """The target's, by its config; where there is a tokenizer only, the number of its tokens."""
    if not PreTrainedConfig.get_config_dict(target)[0]:
        return num_tokens
    return AutoConfig.from_pretrained(target).get_text_config().vocab_size


def json_object(text: str) -> dict[str, Any]:
    """An object in JSON, for argparse."""
    try:
        value = parse_json(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {show(text)}")
    return value


# ---- regenerate ----


def add_regenerate_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `regenerate`, with dashes or underscores."""

    def add(name: str, *more: str, **options: Any) -> None:
        parser.add_argument(*dict.fromkeys([f"--{name}", f"--{name.replace('-', '_')}", *more]), **options)

    add("target", "--target_model_name_or_path", required=True, metavar="REPO_OR_DIR", help="the model that answers")
    add("prompt-file", type=Path, metavar="JSONL", help="rows with messages, prompt or turns, also .gz")
    add("output-file", type=Path, required=True, metavar="JSONL", help="also .gz; gone on with when it exists")
    add("temperature", type=float, nargs="+", default=[0.7], metavar="T", help="0 is greedy; each prompt at each")
    add("top-p", type=float, metavar="P", help="nucleus sampling (the target's own)")
    add("top-k", type=int, metavar="K", help="sampling from the K likeliest (the target's own)")
    add("num-return-sequences", type=int, default=1, metavar="N", help="sampled answers to each prompt")
    add("max-new-tokens", type=int, default=512, metavar="N", help="longest answer, in tokens")
    add("batch-size", type=int, default=16, metavar="B", help="prompts answered side by side")
    add("drafter", metavar="REPO_OR_DIR", help="a drafter you have, to be sooner done with the same answers")
    add(
        "chat-template-kwargs",
        type=json_object,
        default={},
        metavar="JSON",
        help="such as '{\"enable_thinking\": false}'",
    )
    add("self-prompts", type=int, default=0, metavar="N", help="let the target make up N prompts more (Magpie)")
    add("self-share", type=float, metavar="S", help="at most this share of all prompts is made up, in 0..1")
    add("self-temperature", type=float, default=1.0, metavar="T", help="of the prompts it makes up")
    add("exclude-file", type=Path, nargs="+", default=[], metavar="JSONL", help="prompts to leave out: eval prompts")
    add("dedupe", action="store_true", help="leave out prompts that say the same")
    add("dtype", help="the target's; by default as stored, float32 on a CPU")
    add("device", default="auto", help="cuda where there is one, else cpu")
    add("seed", type=int, default=0, metavar="N", help="of the sampling")
    add(
        "dp-size",
        type=int,
        metavar="N",
        help="processes, each with a target of its own and its share of the prompts; not needed under accelerate launch "
        "and torchrun (1, or what they started)",
    )


def run_regenerate_command(args: argparse.Namespace) -> int:
    """Answer what is not answered yet; exit status 0."""
    if args.prompt_file is None and not args.self_prompts:
        raise ValueError("Nothing to answer: give --prompt-file, or --self-prompts N.")
    for option, path in [
        ("--prompt-file", args.prompt_file),
        *(("--exclude-file", path) for path in args.exclude_file),
    ]:
        if path is not None:
            refuse_file(option, path)
    if args.output_file.is_dir() or not args.output_file.parent.is_dir():
        raise ValueError(f"--output-file {args.output_file}: a folder, or in a folder that is not there. Give a file.")
    refuse_target("--target", args.target)
    if args.drafter is not None:
        refuse_drafter("--drafter", args.drafter)
    if args.device != "auto":
        refuse_device(args.device)
    if must_launch(args.dp_size):
        return launch(args.dp_size, ["regenerate", *list_arguments(args)])
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    with Team(torch.device(device)) as team:
        answer_all(args, team)
    return 0


def answer_all(args: argparse.Namespace, team: Team) -> None:
    """What `regenerate` does, in one process of `team`."""
    from ..training.data.prompts import Prompt, exclude, limit_share, make_prompts, read_prompts
    from ..training.data.regenerate import Sampling, regenerate
    from ..training.data.rendering import ChatRenderer

    def note(text: str) -> None:  # progress, for whoever waits
        if team.rank == 0:
            write_note(text)

    sampling = Sampling(
        temperatures=tuple(args.temperature),
        top_p=args.top_p,
        top_k=args.top_k,
        num_return_sequences=args.num_return_sequences,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        seed=args.seed,
    )
    prompts: list[Prompt] = read_prompts(args.prompt_file) if args.prompt_file else []
    excluded = [prompt for path in args.exclude_file for prompt in read_prompts(path)]
    kept = exclude(prompts, excluded, dedupe=args.dedupe)
    if len(kept) < len(prompts):
        note(f"{len(prompts) - len(kept)} of {len(prompts)} prompts are left out: excluded, or said before.")
    num_made_up = (
        args.self_prompts if args.self_share is None else limit_share(args.self_prompts, len(kept), args.self_share)
    )
    if num_made_up < args.self_prompts:
        note(f"{num_made_up} prompts are made up, a share of {args.self_share:g}.")

    with opening("--target", args.target):
        tokenizer = AutoTokenizer.from_pretrained(args.target)
    dtype = args.dtype or ("float32" if team.device.type == "cpu" else "auto")  # few CPUs have fast half precision
    with opening("--target", args.target):
        target = AutoModelForCausalLM.from_pretrained(args.target, dtype=dtype).to(team.device).eval()
    drafter = None
    if args.drafter:
        with opening("--drafter", args.drafter):
            drafter = AutoModel.from_pretrained(args.drafter, dtype=target.dtype).to(team.device).eval()
        refuse_other_models(drafter, args.drafter)
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
