"""Let the target answer prompts, and keep the very tokens it wrote: the training data of its drafter.

    python examples/regenerate.py \
        --target HuggingFaceTB/SmolLM2-135M-Instruct \
        --prompt_file prompts.jsonl --output_file answers.jsonl.gz --temperature 0.7 --max_new_tokens 512

It is `hf-eagle3 regenerate`, in a script to start from. A prompt is a line of JSON with `messages`, `prompt`, or `turns`
(each is asked after the answer to the one before). A row of the output has `input_ids` and `loss_mask`, 1 on what the
target generated. `--num_return_sequences 2` answers each prompt twice, `--temperature 0 0.7` greedily and sampled. Eval rows
should be greedy, from other prompts: `--exclude_file eval_prompts.jsonl` keeps them apart. `--dp-size 8`
starts a process for each GPU. A run that was interrupted goes on where it stopped.
"""

from pathlib import Path

from hf_eagle3.cli import regenerate
from hf_eagle3.cli.arguments import Parser


def main(arguments: list[str] | None = None) -> Path:
    """Answer what is not answered yet; returns the output file."""
    parser = Parser()
    regenerate.add_options(parser)
    args = parser.parse_args(arguments)
    if status := regenerate.run(args):
        raise SystemExit(status)
    return args.output_file


if __name__ == "__main__":
    main()
