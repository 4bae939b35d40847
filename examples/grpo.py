# /// script
# dependencies = ["hf-eagle3[train]", "trl>=1.16"]
# ///
"""Reinforcement learning by TRL's GRPO with a drafter in its roll-outs, which learns from them as the policy moves.

    python examples/grpo.py \
        --target HuggingFaceTB/SmolLM2-135M-Instruct --drafter DRAFTER --prompt_file prompts.jsonl \
        --output_dir my-policy --refresh_every 20 --num_generations 8 --max_completion_length 256 --bf16

Roll-outs are most of the time of such training, and `hf_eagle3.attach` is all they need to be drafted: TRL's Transformers
path calls `generate` of the policy, whose law a drafter does not change. Log-probabilities come from forwards of TRL's own,
which know nothing of drafts. Every `refresh_every` steps the drafter is trained on the newest roll-outs, with the policy as
it is by then. A line of the prompt file has `prompt`, as text or messages. Put a reward of yours in the place of `reward`.
"""

import copy
import sys
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from hf_eagle3 import attach
from hf_eagle3.training import Eagle3Trainer, Eagle3TrainingArguments

KEPT = 512  # newest roll-outs, which the drafter learns from


@dataclass
class Options:
    """What this example adds to the options of `GRPOConfig`."""

    target: str = field(metadata={"help": "the policy to begin with"})
    drafter: str = field(metadata={"help": "its drafter"})
    prompt_file: str = field(metadata={"help": "JSONL with `prompt`"})
    refresh_every: int = field(default=20, metadata={"help": "steps between trainings of the drafter"})
    drafter_learning_rate: float = field(default=1e-4, metadata={"help": "of those"})


def reward(completions: list, **_: object) -> list[float]:
    """What is wanted of an answer: here, that it does not repeat itself."""
    texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    return [len(set(words)) / max(len(words), 1) for words in (text.split() for text in texts)]


class DraftingTrainer(GRPOTrainer):
    """GRPO whose roll-outs are kept, and made as they would be served: without dropout, so that rounds can be captured."""

    rollouts: deque

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        policy = self.accelerator.unwrap_model(self.model)
        with as_it_was(policy):
            policy.eval()
            answers, *rest = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        for prompt, answer in zip(prompt_ids, answers, strict=True):
            row = {"input_ids": [*prompt, *answer], "loss_mask": [0] * len(prompt) + [1] * len(answer)}
            self.rollouts.append(row)
        return answers, *rest


@contextmanager
def as_it_was(policy):
    """Leave the policy in the mode, and with the gradients, that it is found with."""
    was_training, trained = policy.training, [p for p in policy.parameters() if p.requires_grad]
    try:
        yield
    finally:
        policy.train(was_training)
        for parameter in trained:
            parameter.requires_grad_(True)


class Refresh(TrainerCallback):
    """Trains the drafter on the newest roll-outs, every so many steps, and lets the policy draft with it from then on.

    Args:
        trainer: The policy's.
        drafter: In float32, as it is trained.
        options: How often, and how.
    """

    def __init__(self, trainer: DraftingTrainer, drafter: torch.nn.Module, options: Options):
        self.trainer, self.drafter, self.options = trainer, drafter, options

    def attach(self) -> None:
        """Let the policy draft with the drafter as it is now."""
        policy = self.trainer.accelerator.unwrap_model(self.trainer.model)
        served = copy.deepcopy(self.drafter).to(device=policy.device, dtype=policy.dtype).eval()
        attach(policy, served.requires_grad_(False))

    def on_step_end(self, args, state, control, **_):  # noqa: ARG002  the host's
        """Train the drafter, where it is time to."""
        if state.global_step % self.options.refresh_every or not self.trainer.rollouts:
            return
        policy = self.trainer.accelerator.unwrap_model(self.trainer.model)
        with as_it_was(policy):
            Eagle3Trainer(
                self.drafter,
                policy,
                Eagle3TrainingArguments(
                    output_dir=str(Path(args.output_dir) / "drafter"),
                    learning_rate=self.options.drafter_learning_rate,
                    lr_scheduler_type="constant",
                    num_train_epochs=1,
                    bf16=args.bf16,
                    use_cpu=args.use_cpu,
                    disable_tqdm=True,
                    save_strategy="no",
                    report_to="none",
                ),
                list(self.trainer.rollouts),
            ).train()
        self.attach()


def main(arguments: list[str] | None = None) -> DraftingTrainer:
    """Train; the policy and its drafter are saved."""
    options, args = HfArgumentParser((Options, GRPOConfig)).parse_args_into_dataclasses(arguments)
    tokenizer = AutoTokenizer.from_pretrained(options.target)
    trainer = DraftingTrainer(
        AutoModelForCausalLM.from_pretrained(options.target, dtype=torch.float32),
        reward,
        args=args,
        train_dataset=load_dataset("json", data_files=options.prompt_file, split="train"),
        processing_class=tokenizer,
    )
    trainer.rollouts = deque(maxlen=KEPT)
    refresh = Refresh(trainer, AutoModel.from_pretrained(options.drafter, dtype=torch.float32), options)
    refresh.attach()
    trainer.add_callback(refresh)
    trainer.train()
    trainer.save_model()
    refresh.drafter.save_pretrained(Path(args.output_dir) / "drafter")
    return trainer


if __name__ == "__main__":
    sys.exit(None if main() else 1)
