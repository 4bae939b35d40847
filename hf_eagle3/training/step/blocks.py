"""The training of block drafters: blocks at anchors of the text, and their loss against the target's logits.

A block at slot i has token i+1 as its root and sees the target's states of slots up to i, as when serving; at depth t
it proposes token i+2+t, whatever else is in it. So step t of a slot means what it means in training-time test.
(arXiv:2602.06036, arXiv:2607.05147)

Shapes: N tokens of a batch, L anchors, k depths, n tokens of a block, H drafter width, V_d draft vocabulary, r rank of a
Markov head.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ...modeling import DFlashDrafterModel
from .batch import Batch, States
from .head_loss import FusedHeadLoss, LossInputs, Method, StepSums, head_weight
from .target_head import DraftVocabulary, TargetHead

MASK_ELEMENTS = 2**28  # of who sees whom, in one forward


def train_blocks(
    drafter: DFlashDrafterModel,
    batch: Batch,
    states: States,
    head: TargetHead,
    vocabulary: DraftVocabulary,
    method: Method,
) -> tuple[Tensor, StepSums]:
    """The loss of the blocks at the anchors of a batch, of as many depths as `method.scale` has.

    Returns:
        The loss [], which is the sum over depths of scale times loss, and that of the confidence head; and the sums.
    """
    k, (anchors, depth) = len(method.scale), find_anchors(batch)
    outputs = run_anchors(drafter, batch, states.aux_hidden_states, anchors)[:k]  # [k, L, H]
    ahead = torch.arange(k, device=anchors.device)[:, None]
    last = len(batch.input_ids) - 1
    before = batch.input_ids[(anchors + 1 + ahead).clamp_max(last)]  # [k, L]
    read, weight = add_markov(drafter, outputs, before)
    wide = torch.promote_types(outputs.dtype, torch.float32)
    total, parts = outputs.new_zeros((), dtype=wide), []
    hits = torch.zeros(k, len(anchors), dtype=torch.bool, device=anchors.device)
    alphas, ratios = torch.zeros(2, k, len(anchors), dtype=wide, device=anchors.device)
    for t in range(k):
        live = (depth > t).nonzero()[:, 0]
        at = anchors[live] + 1 + t
        token = vocabulary.to_draft[batch.input_ids[at + 1]][None]
        one = Method(method.loss, method.scale[t : t + 1], method.mean_alpha[t : t + 1], method.chunk_elements)
        inputs = LossInputs(head, vocabulary, one, states.last_hidden_states[at], torch.ones_like(live), token)
        loss, *sums, hit, alpha, ratio = FusedHeadLoss.apply(
            inputs, torch.is_grad_enabled(), read[t : t + 1, live], weight
        )
        total = total + loss
        parts.append(sums)
        hits[t, live], alphas[t, live], ratios[t, live] = hit[0], alpha[0].to(wide), ratio[0].to(wide)
    if drafter.config.has_confidence_head:
        total = total + confidence_loss(drafter, outputs, before, alphas, depth, method.scale)
    total = total + sum(p.flatten()[:1].sum() * 0 for p in drafter.parameters() if p.requires_grad)
    return total, sum_up(parts, hits, ratios, depth)


def find_anchors(batch: Batch) -> tuple[Tensor, Tensor]:
    """[L] int64 each: the slots at which blocks begin, and at how many depths each trains."""
    if batch.trained is None:
        return batch.rows, batch.depth
    return batch.rows[batch.trained], batch.depth[batch.trained]


def run_anchors(drafter: DFlashDrafterModel, batch: Batch, aux_hidden_states: Tensor, anchors: Tensor) -> Tensor:
    """[D, L, H] the normed outputs at each depth of the blocks at `anchors` [L]; `aux_hidden_states` [N, A*Ht]."""
    N, config = len(batch.input_ids), drafter.config
    D: int = config.max_draft_depth
    n = D if config.drafts_from_root else D + 1
    at_once = max(1, int(MASK_ELEMENTS / (n * (N + n))))
    outputs = []
    for some in anchors.split(at_once) if len(anchors) else [anchors]:
        ids = drafter.make_block(batch.input_ids[some + 1], n)  # [l, n]
        places = batch.position_ids[some][:, None] + 1 + torch.arange(n, device=some.device)  # [l, n]
        out = type(drafter).forward(  # the instance's is the whole of a training step meanwhile
            drafter,
            input_ids=ids.reshape(1, -1),
            aux_hidden_states=aux_hidden_states[None],
            attention_mask=make_block_masks(drafter, batch, some, n),
            position_ids=torch.cat([batch.position_ids, places.flatten()])[None],
            has_logits=False,
        )
        outputs.append(out.hidden_states[0].unflatten(0, (len(some), n))[:, n - D :])
    return torch.cat(outputs).transpose(0, 1)


def make_block_masks(drafter: DFlashDrafterModel, batch: Batch, anchors: Tensor, n: int) -> dict[str, Tensor]:
    """[1, 1, l*n, N + l*n] by the kind of layer: a block sees its document up to its anchor, and itself.

    Args:
        drafter: Says windows, whether blocks are causal, and how its attention takes masks.
        batch: Of N tokens.
        anchors: [l] int64.
        n: Tokens of a block.
    """
    config, device = drafter.config, anchors.device
    lengths = torch.tensor(batch.lengths, device=device)
    document = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)  # [N]
    slots, l = torch.arange(len(batch.input_ids), device=device), len(anchors)
    context = (slots <= anchors[:, None]) & (document == document[anchors][:, None])  # [l, N]
    context = context[:, None].expand(-1, n, -1)  # [l, n, N]
    within = torch.ones(n, n, dtype=torch.bool, device=device)
    own = torch.eye(l, dtype=torch.bool, device=device)[:, None, :, None]  # [l, 1, l, 1]
    masks = {}
    for kind, window in (("full_attention", None), ("sliding_attention", config.sliding_window)):
        seen, block = context, within.tril() if config.is_causal else within
        if window is not None:
            offsets = torch.arange(n, device=device)
            # The token at offset o of a block stands o + 1 behind its anchor.
            near = slots > anchors[:, None, None] + 1 + offsets[:, None] - window  # [l, n, N]
            seen, block = seen & near, block & (offsets > offsets[:, None] - window)
        blocks = (own & block[None, :, None]).reshape(l, n, l * n)
        masks[kind] = torch.cat([seen, blocks], dim=-1).reshape(1, 1, l * n, -1)
    if config.layer_types is None and config.sliding_window is not None:
        masks["full_attention"] = masks["sliding_attention"]
    if config._attn_implementation == "eager":  # adds its mask
        least = torch.finfo(drafter.dtype).min
        zeros = {kind: torch.zeros_like(mask, dtype=drafter.dtype) for kind, mask in masks.items()}
        return {kind: zeros[kind].masked_fill(~mask, least) for kind, mask in masks.items()}
    return masks


def add_markov(drafter: DFlashDrafterModel, outputs: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """What logits are made of: outputs [k, L, H + r] beside what a Markov head reads, and the weights [V_d, H + r] of both.

    Args:
        drafter: With such a head, or without: then the outputs alone.
        outputs: [k, L, H], by depth.
        before: [k, L] int64, the text's token before each that is proposed.
    """
    weight = head_weight(drafter)
    if not drafter.config.markov_rank:
        return outputs, weight
    reads, state = [], None
    for token, output in zip(before, outputs, strict=True):
        read, state = drafter.markov_head.read(token, output, state)
        reads.append(read)
    second = drafter.markov_head.markov_w2.weight
    return torch.cat([outputs, torch.stack(reads).to(outputs.dtype)], dim=-1), torch.cat(
        [weight.to(second.dtype), second], dim=1
    )


def confidence_loss(
    drafter: DFlashDrafterModel, outputs: Tensor, before: Tensor, alphas: Tensor, depth: Tensor, scale: Tensor
) -> Tensor:
    """Binary cross entropy [] of the confidence head against alpha [k, L], where depths train, weighed by `scale` [k]."""
    logits = drafter.find_confidence(before, outputs).to(alphas.dtype)  # [k, L]
    live = torch.arange(len(scale), device=depth.device)[:, None] < depth
    losses = F.binary_cross_entropy_with_logits(logits, alphas.clamp(0, 1), reduction="none")
    return (losses.where(live, 0).sum(-1) * scale).sum()


def sum_up(parts: list[list[Tensor]], hits: Tensor, ratios: Tensor, depth: Tensor) -> StepSums:
    """The sums of a batch, from those of each depth by itself."""
    loss, correct, alpha, num_live = (torch.cat([sums[i] for sums in parts]) for i in range(4))
    whole = depth >= len(hits)  # [L]
    path = ratios.cumprod(0).where(whole, 0).sum(-1)
    return StepSums(loss, correct, alpha, num_live, path.to(loss.dtype), whole.sum(), hits)
