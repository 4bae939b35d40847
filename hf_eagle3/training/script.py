"""Training from the command line: `hf-eagle3 train` and `examples/finetune.py`."""

import inspect
import itertools
import sys
from argparse import ArgumentTypeError
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoTokenizer, BitsAndBytesConfig, HfArgumentParser, TrainingArguments

from ..console.interrupts import saying_on_interrupt
from ..console.opening import opening, refuse_drafter, refuse_target
from ..console.spelling import did_you_mean, respell
from ..console.terminal import note, say
from ..modeling.text_eagle3 import MOST_NESTED, parse_json, show
from .arguments import Eagle3TrainingArguments
from .checkpointing import find_checkpoints
from .data import files
from .data.sources import RowSource
from .states.stored import StoredStates
from .trainer import Eagle3Trainer

MOST_TEXT = 10**6  # characters of a file of options
SWITCHES: Mapping[str, bool] = {"true": True, "false": False}  # in place of a name

# Spellings of others, and the fields that they are. TRL's model is the one to train.
FIELDS = {"model_name_or_path": "drafter", "dtype": "target_dtype", "torch_dtype": "target_dtype"}

DESCRIPTION = """Train an EAGLE-3 drafter for a target, from scratch or from a drafter you have. Any option can also be
a line of a YAML file, given by --config; what is typed counts more."""


@dataclass
class ScriptArguments:
    """Which models, which data."""

    target: str | None = field(
        default=None, metadata={"help": "The model whose output the drafter learns to propose."}
    )
    drafter: str | None = field(default=None, metadata={"help": "Go on from this drafter."})
    train_file: str | None = field(
        default=None,
        metadata={"help": "JSONL, also .gz: rows with `messages`, or with `input_ids` and `loss_mask`."},
    )
    eval_file: str | None = field(default=None, metadata={"help": "The same, for evaluation; greedy answers."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "A dataset with such rows, on the Hub or in a folder, in place of train_file."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    dataset_train_split: str = field(default="train", metadata={"help": "Its split to train on."})
    dataset_test_split: str | None = field(default=None, metadata={"help": "Its split to evaluate on."})
    states_dir: str | None = field(
        default=None,
        metadata={
            "help": "Train from the hidden states that `hf-eagle3 states` stored there; no target is needed then."
        },
    )
    states_eval_rows: int = field(
        default=0, metadata={"help": "Evaluate on so many of the stored documents, the last, and train on the others."}
    )


@dataclass
class ModelArguments:
    """How the models are loaded, and which part of the drafter trains."""

    target_dtype: str | None = field(
        default=None,
        metadata={"help": "The target's dtype: auto, float32, bfloat16, ...; by default as stored, float32 on a CPU."},
    )
    target_revision: str | None = field(default=None, metadata={"help": "The target's branch, tag or commit."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code from the target's repository."})
    attn_implementation: str | None = field(default=None, metadata={"help": "How the target attends."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantise the target to 4 bits by bitsandbytes."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Quantise the target to 8 bits by bitsandbytes."})
    target_tp: bool = field(
        default=False, metadata={"help": "Split the target over all processes by tensor parallelism."}
    )
    use_peft: bool = field(default=False, metadata={"help": "Train low-rank adapters of the drafter (LoRA)."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=32, metadata={"help": "They are scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapters."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "What they adapt; by default every linear layer but the head."}
    )

    def __post_init__(self) -> None:
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit are two ways to load one target: give one of them.")


def make_parser() -> Any:  # the host's parser
    """Our options, and after them the host's that keep its meaning and its default."""
    dataclasses: Any = (ScriptArguments, ModelArguments, Eagle3TrainingArguments)
    usage = "hf-eagle3 train --target TARGET --train_file JSONL --output_dir DIR [OPTIONS]"
    parser: Any = HfArgumentParser(dataclasses, description=DESCRIPTION, usage=usage)
    parser.add_argument("--config", metavar="YAML", help="A file with options, one a line.")
    resuming = next(action for action in parser._actions if action.dest == "resume_from_checkpoint")
    resuming.nargs, resuming.const = "?", "true"  # the newest, where none is named
    hosts = set(TrainingArguments.__dataclass_fields__) - set(inspect.get_annotations(Eagle3TrainingArguments))
    ours, theirs = parser._optionals, parser.add_argument_group("options of the host's TrainingArguments")
    theirs._group_actions = [action for action in ours._group_actions if action.dest in hosts - {"output_dir"}]
    ours._group_actions = [action for action in ours._group_actions if action not in theirs._group_actions]
    return parser


def parse(arguments: Sequence[str] | None = None) -> tuple[ScriptArguments, ModelArguments, Eagle3TrainingArguments]:
    """Options from the file of `--config`, then from `arguments`, which count more.

    Raises:
        ValueError: An option is not known; the message names the nearest that are.
    """
    given = respell_words(sys.argv[1:] if arguments is None else arguments)
    parser = make_parser()
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    known = actions.keys()
    path, given = take_option(given, "config")
    settings = read_settings(Path(path), actions) if path is not None else {}
    for name in sorted(known):
        if name.endswith("_kwargs"):
            refuse_other_tables(name, settings.get(name), path)
            refuse_other_tables(name, take_option(given, name)[0])
    for action in parser._actions:
        if action.dest in settings:
            action.default, action.required = settings[action.dest], False
    try:
        *parsed, rest = parser.parse_args_into_dataclasses(given, return_remaining_strings=True)
    except (ValueError, TypeError, LookupError, AttributeError, ImportError) as error:
        if path is None and isinstance(error, (ValueError, ImportError)):
            raise
        culprits = [name for name, value in settings.items() if is_refused_alone(name, value)]
        where = ": ".join(map(str, filter(None, [path or "the options", " and ".join(culprits)])))
        raise files.DataError(f"{where}: {error}") from error
    if rest:
        refuse_unknown([name.lstrip("-").split("=")[0] for name in rest if name.startswith("--")] or rest, known, "--")
    return tuple(x for x in parsed if hasattr(x, "__dataclass_fields__"))


def respell_option(name: str) -> str:
    """An option as the field that it is, where it is typed in another spelling."""
    if (field_name := name.replace("-", "_")) in FIELDS:
        return FIELDS[field_name]
    return respell(f"--{name}", ("--target", "--drafter")).removeprefix("--")


def respell_words(words: Sequence[str]) -> list[str]:
    """The same of a command line.

    Raises:
        DataError: An option is there in two spellings.
    """
    typed = [word.partition("=")[0] for word in words if word.startswith("--")]
    names = {name: f"--{respell_option(name[2:])}" for name in typed}
    refuse_two_spellings(names, "")
    parts = [word.partition("=") for word in words]
    return ["".join((names.get(name, name), equals, value)) for name, equals, value in parts]


def refuse_two_spellings(names: Mapping[str, str], where: str) -> None:
    """Raise if two options in `names`, as they are written, are one.

    Raises:
        DataError: Two are.
    """
    for one, other in itertools.combinations(names, 2):
        if names[one] == names[other]:
            raise files.DataError(f"{where}{one} and {other} are one option: leave one of them out.")


def refuse_other_tables(name: str, value: Any, path: str | None = None) -> None:  # Any: any value of the file
    """Raise unless an option that is a table is one, or one in JSON.

    Raises:
        DataError: It is not.
    """
    if value is None or isinstance(value, dict):
        return
    try:
        table = parse_json(value) if isinstance(value, str) else value
    except ValueError as error:
        table = error
    if not isinstance(table, dict):
        place = f"{path}: " if path is not None else "--"
        raise files.DataError(f"{place}{name} must be a table, such as '{{\"a\": 1}}', got {show(value)}.")


def is_refused_alone(name: str, value: Any) -> bool:  # Any: any value of a file
    """Whether an option of training makes no settings, all others being as they are by default."""
    if name not in Eagle3TrainingArguments.__dataclass_fields__:
        return False
    try:
        Eagle3TrainingArguments(**{"output_dir": "out", "use_cpu": True, name: value})
    except (ValueError, TypeError, LookupError, AttributeError, ImportError):
        return True
    return False


def take_option(arguments: list[str], name: str) -> tuple[str | None, list[str]]:
    """The value of `--name VALUE` or `--name=VALUE`, and the arguments without it."""
    for i, argument in enumerate(arguments):
        if argument.startswith(f"--{name}="):
            return argument.split("=", 1)[1], arguments[:i] + arguments[i + 1 :]
        if argument == f"--{name}":
            if i + 1 == len(arguments):
                raise ValueError(f"--{name} needs a value.")
            return arguments[i + 1], arguments[:i] + arguments[i + 2 :]
    return None, arguments


class StrictLoader(yaml.SafeLoader):
    """YAML of plain values without ambiguity: no key twice, and no aliases, whose copies can grow without end."""

    def compose_node(self, parent: Any, index: Any) -> Any:  # the library's nodes
        """The next node."""
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.constructor.ConstructorError(problem="an alias", problem_mark=self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:  # the library's node
        """A table."""
        seen: set[str] = set()
        for key, _ in node.value:
            if (name := str(key.value)) in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {show(name)} is there twice", problem_mark=key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep=deep)


def read_settings(path: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    """The options in a YAML file.

    Args:
        path: The file.
        known: Option -> the parser's action, which checks its value.

    Raises:
        DataError: It is not a table of options, or has one that is not known or of another kind; the message names it.
    """
    if not path.is_file():
        raise files.DataError(
            f"--config {path}: {'a folder, not a file' if path.is_dir() else 'there is no such file'}."
        )
    try:
        text = path.read_text(encoding="utf-8")
        depths = itertools.accumulate({"[": 1, "{": 1, "]": -1, "}": -1}.get(letter, 0) for letter in text)
        if max(depths, default=0) > MOST_NESTED or len(text) > MOST_TEXT:  # for which the library takes hours
            raise ValueError("it is too long, or nested too deeply")
        settings = yaml.load(text, Loader=StrictLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise files.DataError(
            f"{path}: not YAML of plain values ({reason}). Expected lines of `option: value`."
        ) from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise files.DataError(f"{path} must be lines of `option: value`, got {type(settings).__name__}.")
    if strange := [name for name in settings if not isinstance(name, str)]:
        raise files.DataError(f"{path}: {show(strange[0])} is no option. --help lists them all.")
    names = {name: respell_option(name) for name in settings}
    refuse_two_spellings(names, f"{path}: ")
    refuse_unknown([name for name in names.values() if name not in known], known.keys(), f"{path}: ")
    return {
        name: check_setting(f"{path}: {written}", known[name], settings[written]) for written, name in names.items()
    }


def check_setting(where: str, action: Any, value: Any) -> Any:  # Any: argparse's own class; any value of the file
    """`value`, if the option takes it: as it would be typed, where that is text.

    Raises:
        DataError: It does not.
    """
    is_list = isinstance(value, list)
    parts = value if is_list else [value]
    takes_tables = action.default is None or isinstance(action.default, dict) or action.type is dict
    fits = value is None or (isinstance(value, dict) and takes_tables)
    if not fits and not any(isinstance(part, (dict, list)) or part is None for part in parts):
        is_one = action.nargs not in ("+", "*")
        fits = not (is_list and is_one) and all(converts(action, part) for part in parts)
    if not fits:
        raise files.DataError(f"{where} cannot be {show(value)}. --help says what it takes.")
    is_text = action.type is str and not isinstance(value, (str, bool, dict, list)) and value is not None
    return str(value) if is_text else value


def converts(action: Any, value: Any) -> bool:  # Any: as above
    """Whether an option takes `value` as it would be typed."""
    try:
        typed = value if action.type is None else action.type(str(value))
    except (ValueError, TypeError, ArgumentTypeError):
        return False
    return action.choices is None or typed in action.choices


def refuse_unknown(names: Sequence[str], known: Iterable[str], prefix: str) -> None:
    """Raise DataError for `names`, if there are any, with similar options."""
    if not names:
        return
    parts = []
    for name in names:
        shown = name if name.isidentifier() else show(name)
        parts.append(f"{prefix}{shown} is no option{did_you_mean(name, known)}")
    raise files.DataError(f"{'; '.join(parts)}. --help lists them all.")


def target_options(model: ModelArguments, args: Eagle3TrainingArguments) -> dict[str, Any]:
    """The options of the target's `from_pretrained`."""
    options: dict[str, Any] = {} if model.target_dtype is None else {"dtype": model.target_dtype}
    if model.target_revision is not None:
        options["revision"] = model.target_revision
    if model.trust_remote_code:
        options["trust_remote_code"] = True
    if model.attn_implementation is not None:
        options["attn_implementation"] = model.attn_implementation
    if model.load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    if model.load_in_8bit:
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    if model.target_tp:
        options["tp_plan"] = "auto"
    return {**options, **(args.target_model_init_kwargs or {})}  # type: ignore[dict-item]  # a dict by now


def lora(model: ModelArguments) -> Any:  # of PEFT, which is optional
    """The adapters to train, if any."""
    if not model.use_peft:
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("--use_peft needs PEFT: pip install 'hf-eagle3[peft]'.") from error
    return LoraConfig(
        r=model.lora_r,
        lora_alpha=model.lora_alpha,
        lora_dropout=model.lora_dropout,
        target_modules=model.lora_target_modules,
    )


def find_rows(script: ScriptArguments) -> tuple[Any, Any]:
    """Rows to train on and, if there are some, to evaluate on, from files or from a dataset."""
    if script.train_file is None and script.dataset_name is None:
        raise ValueError("What shall the drafter learn from? Give --train_file, --dataset_name or --states_dir.")
    if script.dataset_test_split is not None and (script.dataset_name is None or script.eval_file is not None):
        raise ValueError("dataset_test_split is a split of dataset_name, to evaluate on in the place of eval_file.")
    file = None if script.train_file is None else Path(script.train_file)
    data = RowSource(file, script.dataset_name, script.dataset_config, script.dataset_train_split)
    held_out = None
    if script.eval_file is not None:
        held_out = RowSource(Path(script.eval_file), file_option="--eval-file")
    elif script.dataset_test_split is not None:
        held_out = replace(data, split=script.dataset_test_split)
    return data.read(), None if held_out is None else held_out.read()


def find_stored_rows(script: ScriptArguments, states: StoredStates) -> tuple[Any, Any]:
    """The same, of documents whose hidden states are stored."""
    if script.train_file or script.dataset_name or script.eval_file:
        raise ValueError(
            "With states_dir, the rows are those that were stored: leave out train_file, dataset_name and eval_file, and "
            "hold some of them out with states_eval_rows."
        )
    rows, held_out = states.dataset, script.states_eval_rows
    if not 0 <= held_out < len(rows):
        raise ValueError(f"states_eval_rows must lie in 0..{len(rows) - 1}: {len(rows)} documents are stored.")
    count = len(rows) - held_out
    return rows.select(range(count)), rows.select(range(count, len(rows))) if held_out else None


def say_kept(output_dir: Path) -> str:
    """Which checkpoints interrupted training leaves, and how to go on."""
    if not find_checkpoints(output_dir):
        return "No checkpoint was written yet, so training begins anew; --save_steps says how often one is."
    return f"Checkpoints stay in {output_dir}: run the same command with --resume_from_checkpoint true to go on."


def main(arguments: Sequence[str] | None = None) -> Eagle3Trainer:
    """Train, evaluate, save; returns the trainer. The forecast goes to stderr, results to stdout."""
    script, model, args = parse(arguments)
    target, drafter = script.target, script.drafter
    if target is None and script.states_dir is None:
        raise ValueError("Which model is the drafter for? Give --target, or --states_dir.")
    if drafter is not None:
        refuse_drafter("--drafter", drafter)
    if target is not None:
        refuse_target("--target", target)
    states = None if script.states_dir is None else StoredStates(script.states_dir, max_length=args.max_length)
    train_rows, eval_rows = find_rows(script) if states is None else find_stored_rows(script, states)
    tokenizer = None
    if target is not None:
        args.target_model_init_kwargs = target_options(model, args)
        with opening("--target", target):
            tokenizer = AutoTokenizer.from_pretrained(target, trust_remote_code=model.trust_remote_code)
    trainer = Eagle3Trainer(
        model=drafter,
        target_model=target,
        args=args,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        peft_config=lora(model),
        states=states,
    )
    is_first = trainer.is_world_process_zero()
    if is_first:
        note(str(trainer.forecast()))
    resume = args.resume_from_checkpoint
    with saying_on_interrupt(lambda: say_kept(Path(str(args.output_dir))) if is_first else None):
        trainer.train(resume_from_checkpoint=SWITCHES.get(str(resume).lower(), resume))
    metrics = trainer.evaluate() if eval_rows is not None else {}
    if metrics:
        trainer.save_metrics("eval", metrics)
    trainer.save_model()
    if is_first:
        if metrics:
            say(f"acceptance length at depth {trainer.eval_depth}: {metrics['eval_acceptance_length']:.2f}")
        say(f"saved to {args.output_dir}")
    return trainer
