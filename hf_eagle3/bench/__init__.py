"""Measuring a drafter: stock `generate`, our loop without drafting, and our loop with it, in one process.

The protocol: fixed prompts; a warm-up of each kind; with real weights, a check that texts equal those of greedy
`generate`, or nothing is timed; then all kinds in turn in each repeat; medians and spread. The speed on random prompts is
that of decoding alone: the difference of two lengths, so that the prompt's forward cancels. The speed on real prompts is
new tokens over wall time.
"""
