"""Batches of prompts, an oracle that drafts for them, and what a batch must give."""

import functools

import torch
from torch import Tensor

from helpers.models import V, count_hooks, drafter_config, make_prompt, make_target, randomize
from hf_eagle3.compat import CACHE_NAME
from hf_eagle3.modeling import Eagle3DrafterModel, Eagle3DrafterOutput

GREEDY = {"do_sample": False}


class BatchOracle(Eagle3DrafterModel):
    """Drafts what follows a token at its position in the texts it was told, and at some positions something else.

    Tables of tensors, so that its rounds can be captured.
    """

    def tell(self, texts: list[list[int]], *, wrong_share: float) -> "BatchOracle":
        config, ids = self.config, self.draft_to_target_ids
        follow = torch.zeros(512, config.vocab_size, dtype=torch.long)  # [P, V]
        for text in texts:
            follow[torch.arange(len(text) - 1), torch.tensor(text[:-1])] = torch.tensor(text[1:])
        to_draft = torch.zeros(config.vocab_size, dtype=torch.long).scatter(0, ids, torch.arange(len(ids)))  # [V]
        is_wrong = torch.rand(512, generator=torch.Generator().manual_seed(7)) < wrong_share
        for name, table in (("follow", follow), ("to_draft", to_draft), ("is_wrong", is_wrong.long())):
            self.register_buffer(name, table.to(self.device), persistent=False)
        self.generation_config.decode_loop = "own"
        return self

    def forward(self, input_ids, *args, position_ids=None, logits_to_keep=0, **kwargs):
        out = super().forward(input_ids, *args, position_ids=position_ids, logits_to_keep=logits_to_keep, **kwargs)
        if kwargs.get("writes_only"):
            return out
        position_ids = position_ids.expand_as(input_ids)
        if isinstance(logits_to_keep, Tensor):
            input_ids, position_ids = input_ids.gather(1, logits_to_keep), position_ids.gather(1, logits_to_keep)
        B, n, V_d = out.logits.shape
        known, positions = input_ids[:, -n:], position_ids[:, -n:]  # [B, n]
        places = (positions + 1).clamp(max=len(self.follow) - 1)
        if self.config.is_parallel:  # a mask says nothing
            known = known.clone()
            for k in range(1, n):
                known[:, k] = self.follow[places[:, k - 1], known[:, k - 1]]
        draft_ids = self.to_draft[self.follow[places, known]]
        rows = torch.arange(B, device=known.device)[:, None]
        draft_ids = (draft_ids + self.is_wrong[(positions * 5 + rows * 3) % len(self.is_wrong)]) % V_d
        logits = torch.zeros_like(out.logits).scatter(-1, draft_ids[..., None], 5.0)
        return Eagle3DrafterOutput(logits, out.feedback, out.past_key_values)


def pad(prompts: list[Tensor], side: str = "left") -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` [B, T] of prompts [1, T_b]."""
    T = max(p.shape[1] for p in prompts)
    rows = []
    for p in prompts:
        zeros = torch.zeros(1, T - p.shape[1], dtype=torch.long)
        rows.append(torch.cat([zeros, p] if side == "left" else [p, zeros], dim=1))
    input_ids = torch.cat(rows)
    return {"input_ids": input_ids, "attention_mask": (input_ids != 0).long()}


def make_oracle(
    target, outputs: Tensor, batch: dict[str, Tensor], *, wrong_share: float = 0.4, **overrides
) -> BatchOracle:
    torch.manual_seed(2)
    T = batch["input_ids"].shape[1]
    texts = [
        [*ids[mask.bool()].tolist(), *row[T:].tolist()]
        for ids, mask, row in zip(batch["input_ids"], batch["attention_mask"], outputs, strict=True)
    ]
    drafter = randomize(BatchOracle(drafter_config(draft_vocab_size=V, **overrides))).bind(target)
    return drafter.tell(texts, wrong_share=wrong_share)


@functools.cache
def plain_of(family, lengths, max_new_tokens):
    """What a target says to padded prompts without a drafter."""
    options = {"max_new_tokens": max_new_tokens, "return_dict_in_generate": True, **GREEDY}
    return make_target(family).generate(**pad(prompts_of(*lengths)), **options)


def assert_same(target, batch, *, wrong_share=0.4, depth=3, drafter_options=None, plain=None, **options):
    """A batch with an oracle gives what it gives without. Both outputs."""
    options = {**GREEDY, "return_dict_in_generate": True, **options}
    plain = plain or target.generate(**batch, **options)
    oracle = make_oracle(target, plain.sequences, batch, wrong_share=wrong_share, **(drafter_options or {}))
    out = target.generate(**batch, assistant_model=oracle, num_assistant_tokens=depth, **options)
    assert out.sequences.tolist() == plain.sequences.tolist()
    assert out.speculation.loop == "own decode loop"
    assert count_hooks(target) == 0
    return plain, out


def prompts_of(*lengths: int) -> list[Tensor]:
    return [make_prompt(n) for n in lengths]


def assert_same_caches(target, plain, out):
    """Both calls return caches of the same contents, and the next turn comes out the same."""
    for ours, theirs in zip(out[CACHE_NAME].layers, plain[CACHE_NAME].layers, strict=True):
        assert type(ours) is type(theirs)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.keys.shape == theirs.keys.shape
        assert ours.values.shape == theirs.values.shape


def assert_same_up_to_ties(out, plain):
    """Greedy outputs in 16 bits: a row may part where its two likeliest tokens are as good as equal."""
    assert out.sequences.shape == plain.sequences.shape
    first = plain.sequences.shape[1] - len(plain.logits)
    for b, (ours, theirs) in enumerate(zip(out.sequences, plain.sequences, strict=True)):
        differs = (ours != theirs).nonzero()
        if len(differs):
            best, second = plain.logits[int(differs[0]) - first][b].float().topk(2).values
            assert best - second < 0.05 * best.abs(), f"row {b} parts at {int(differs[0])}"
