"""What a drafter brings, measured: stock `generate`, our loop without drafting, and our loop with it, in one process.

The protocol: fixed prompts; a warm-up of each kind; where weights are real, texts that must be those of greedy
`generate`, or nothing is timed; then all kinds in turn in each repeat; medians and spread. Speed of prompts made up of
random tokens is that of decoding alone: the difference of two lengths, so that the prompt's forward cancels. Speed of
real prompts is new tokens over wall time.
"""

from .parser import add_bench_parser

__all__ = ["add_bench_parser"]
