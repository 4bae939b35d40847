"""A chain behind every position of a text, drafted by its own tokens, and what each draft step attends to.

Shapes: T positions of a text, K depths, H drafter width, S keys: at depth k, T features of the target's and T of each
draft step before.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel

from ..drafters.unroll import live_slots, shift, ttt_mask
from ..modeling import DrafterModel
from .readings import Text

RECORDING = "eagle3_recording"  # an attention that says what it attends to
SETS = (
    "sink",
    "prompt",
    "generated",
    "own",
)  # the first token, the rest of the prompt, what the target said, the chain
CHUNK = 256  # queries whose weights are in memory at once
SEED = 0


# ---- recording ----


@dataclass
class Watch:
    """What the recording attention adds up over the layers of one draft step."""

    prompt_length: int
    mass: Tensor | None = None  # [T, 4], summed over layers
    entropy: Tensor | None = None  # [T], likewise
    num_layers: int = 0

    def add(self, weights: Tensor, start: int, T: int) -> None:
        """Take in the weights [heads, n, S] of the queries from `start` on, of T in all."""
        if self.mass is None or self.entropy is None:
            self.mass, self.entropy = weights.new_zeros(T, len(SETS)), weights.new_zeros(T)
        P, mean = self.prompt_length, weights.mean(0)  # [n, S]
        parts = [mean[:, :1], mean[:, 1:P], mean[:, P:T], mean[:, T:]]
        rows = slice(start, start + weights.shape[1])
        self.mass[rows] += torch.stack([part.sum(-1) for part in parts], dim=-1)
        self.entropy[rows] += torch.special.entr(weights).sum(-1).mean(0)


_watching: ContextVar[Watch | None] = ContextVar("watching", default=None)


def recording_attention(
    module: nn.Module,  # noqa: ARG001  as the host's functions
    query: Tensor,  # [1, heads, T, D]
    key: Tensor,  # [1, kv_heads, S, D]
    value: Tensor,
    attention_mask: Tensor,  # [1, 1, T, S] bool
    *,
    scaling: float,
    **kwargs: Any,  # noqa: ARG001  Any: what else the host hands to every attention function
) -> tuple[Tensor, None]:  # [1, T, heads, D]
    """Softmax attention in float32 at least, which tells the `Watch` under way what it attends to."""
    watch, T = _watching.get(), query.shape[2]
    groups = query.shape[1] // key.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    keys, values = (x[0].repeat_interleave(groups, dim=0).to(wide) for x in (key, value))  # [heads, S, D]
    outs = []
    for start in range(0, T, CHUNK):
        mask = attention_mask[0, :, start : start + CHUNK]  # [1, n, S]
        scores = query[0, :, start : start + CHUNK].to(wide) @ keys.mT * scaling
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)  # [heads, n, S]
        if watch is not None:
            watch.add(weights, start, T)
        outs.append(weights @ values)
    if watch is not None:
        watch.num_layers += 1
    return torch.cat(outs, dim=1).transpose(0, 1)[None].to(query.dtype), None


AttentionInterface.register(RECORDING, recording_attention)
# The mask is made already; the host hands its functions more than that.
AttentionMaskInterface.register(RECORDING, lambda *args, attention_mask=None, **kwargs: attention_mask)  # noqa: ARG005


@contextmanager
def recording(drafter: PreTrainedModel) -> Iterator[None]:
    """Let `drafter` attend so that a `Watch` is told."""
    before = drafter.config._attn_implementation
    drafter.config._attn_implementation = RECORDING
    try:
        yield
    finally:
        drafter.config._attn_implementation = before


# ---- chains ----


class Step(NamedTuple):
    """One draft step behind every position of a text."""

    tokens: Tensor  # [T] int64, what is drafted, target ids
    fed: Tensor  # [T, H], the state that was fed in
    watch: Watch


@torch.no_grad()
def draft_everywhere(
    drafter: DrafterModel,
    text: Text,
    depth: int,
    *,
    window: int | None,
    noise: float = 0.0,
) -> Iterator[Step]:
    """Draft greedily behind every position of a text, each chain by its own tokens.

    Args:
        drafter: Bound; it drafts step by step.
        text: Of the target, with the states that the drafter reads.
        depth: K.
        window: Of positions that each query sees; None for all.
        noise: The standard deviation of what is added to the state fed back, as a share of the state's RMS.
    """
    device = drafter.norm.weight.device
    generator = torch.Generator(device).manual_seed(SEED)
    ids = text.ids.to(device)
    aux = torch.cat([text.states[i] for i in drafter.bound_aux_layer_ids or [0]], dim=-1).to(device)
    T, P = ids.shape[1], int((~text.is_generated).sum())
    cache, places = DynamicCache(), torch.arange(T, device=device)[None]
    fed, tokens = {"aux_hidden_states": aux}, shift(ids, 1)
    state = drafter.fuse(aux)  # [1, T, H]
    with recording(drafter):
        for t in range(depth):
            watch = Watch(P)
            token = _watching.set(watch)
            try:
                out = drafter(
                    input_ids=tokens,
                    attention_mask=ttt_mask(T, t, window, device),
                    position_ids=places + t,
                    past_key_values=cache,
                    **fed,
                )
            finally:
                _watching.reset(token)
            tokens = drafter.to_target_ids(out.logits.argmax(-1))  # [1, T]
            yield Step(tokens[0], state[0].float(), watch)
            state = out.feedback
            if noise:
                rms = state.float().square().mean(-1, keepdim=True).sqrt()
                state = (state + noise * rms * torch.randn(state.shape, generator=generator, device=device)).to(state)
            fed = {"hidden_states": state}


def find_live(text: Text, depth: int) -> Tensor:
    """[T] bool: positions whose next `depth` + 1 tokens the target generated."""
    return live_slots(text.is_generated.cpu(), depth)[-1, 0]
