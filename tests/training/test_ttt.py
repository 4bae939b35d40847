"""TTT against a literal simulation of serving, and the supervision table."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.marks import slow_but
from helpers.unrolling import V_D, VARIANTS, K, V, batch_of, make, make_target, several_rows
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from hf_eagle3.drafters.unroll import live_slots, shift, unroll
from hf_eagle3.rows.attention import UnfitError
from hf_eagle3.training.states.online import OnlineStates, group_by_length
from hf_eagle3.training.step.acceptance import walk
from hf_eagle3.training.step.batch import SquareRule, States, live_steps
from hf_eagle3.training.step.head_loss import LossChunk, Method, chunk_loss
from hf_eagle3.training.step.losses import LOSSES, TargetStep
from hf_eagle3.training.step.target_head import TILE, DraftVocabulary, TargetHead
from hf_eagle3.training.step.ttt import ttt
from hf_eagle3.training.step.unroll_rows import unroll_rows

pytestmark = pytest.mark.any_release


@pytest.fixture(scope="module")
def target():
    return make_target()


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_each_slot_is_what_serving_computes(target, variant, attn):
    """Prefill up to the slot, then one draft step after another on its own feedback: the same outputs, all steps."""
    drafter = make(target, attn, **VARIANTS[variant])
    T = 9
    ids = torch.randint(0, V, (2, T))
    aux = torch.randn(2, T, 96, dtype=torch.float64)
    with torch.no_grad():
        steps = list(unroll(drafter, ids, aux, K))
        for i in range(T - K - 1):
            cache = DynamicCache()
            out = drafter(ids[:, 1 : i + 2], aux_hidden_states=aux[:, : i + 1], past_key_values=cache)
            for t in range(K):
                served = out.logits[:, -1]
                trained = drafter.compute_logits(steps[t][:, i])
                exact = 1e-10 if attn == "sdpa" else 1e-5  # the host has the softmax of eager attention in float32
                torch.testing.assert_close(trained, served, atol=exact, rtol=0)
                token = ids[:, i + 2 + t, None]
                out = drafter(token, hidden_states=out.feedback[:, -1:], past_key_values=cache)


def test_a_step_too_many_in_the_mask_is_noticed(target, monkeypatch):
    """Negative control: with its own diagonal of an earlier step hidden, a slot differs from serving."""
    from hf_eagle3.drafters import unroll as module

    drafter = make(target)
    ids, aux = torch.randint(0, V, (1, 9)), torch.randn(1, 9, 96, dtype=torch.float64)
    right = list(unroll(drafter, ids, aux, 3))
    honest = module.ttt_mask

    def without_first_diagonal(length, step, window, device):
        mask = honest(length, step, window, device).clone()
        if step >= 2:
            mask[..., length : 2 * length] = False
        return mask

    monkeypatch.setattr(module, "ttt_mask", without_first_diagonal)
    wrong = list(unroll(drafter, ids, aux, 3))
    torch.testing.assert_close(wrong[1], right[1])
    assert (wrong[2] - right[2]).abs().max() > 1e-4


def test_first_step_does_not_depend_on_how_many_follow(target):
    drafter = make(target)
    ids, aux = torch.randint(0, V, (1, 9)), torch.randn(1, 9, 96, dtype=torch.float64)
    torch.testing.assert_close(next(unroll(drafter, ids, aux, 1)), next(unroll(drafter, ids, aux, 3)))


def test_supervision_of_a_two_turn_conversation():
    """Prompt x0 x1, answer x2..x5 (x5 ends the turn), user x6 x7, answer x8..x10, padding x11."""
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 0]], dtype=torch.bool)
    live = live_slots(mask, 3)[:, 0]
    slots = [row.nonzero().flatten().tolist() for row in live]
    # Slot 1 drafts x3, the second token of the turn; slot 3 drafts x5, its end. Step t reaches t further.
    assert slots == [[1, 2, 3, 7, 8], [1, 2, 7], [1]]


def test_shift():
    x = torch.tensor([[1, 2, 3]])
    assert shift(x, 1).tolist() == [[2, 3, 0]]
    assert shift(x, 5).tolist() == [[0, 0, 0]]


def test_the_slots_that_train():
    """As above, counted by slot; a document ends where it ends, whatever follows."""
    mask = np.array([0, 0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1], dtype=bool)
    assert live_steps(mask, [11, 2], 3).tolist() == [0, 3, 2, 1, 0, 0, 0, 2, 1, 0, 0, 0, 0]
    batch = batch_of(*several_rows(), steps=3)
    starts = np.cumsum([0, *batch.lengths[:-1]])
    ours = {(int(slot), t) for slot, n in zip(batch.rows, batch.depth, strict=True) for t in range(int(n))}
    theirs = set()
    for start, (_, mask) in zip(starts, several_rows(), strict=True):
        live = live_slots(torch.tensor([mask], dtype=torch.bool), 3)[:, 0]
        theirs |= {(int(start + i), int(t)) for t, i in live.nonzero()}
    assert ours == theirs


def twin(drafter, batch, aux, steps):
    """[k, R, H]: what the eager twin says of the same slots, document by document."""
    outs, start = [], 0
    for length in batch.lengths:
        ids = batch.input_ids[None, start : start + length]
        outs.append(torch.cat(list(unroll(drafter, ids, aux[None, start : start + length], steps))))  # [k, T, H]
        start += length
    return torch.cat(outs, dim=1)[:, batch.rows]


def live_of(batch, steps):
    return batch.depth > torch.arange(steps)[:, None]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("every_slot", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_flat_rows_are_what_the_twin_computes(target, exact_norms, variant, every_slot):
    """Packed, trimmed, with the embedding half computed once: outputs and gradients of all that trains."""
    drafter = make(target, **VARIANTS[variant])
    several = drafter.config.num_hidden_layers > 1
    batch = batch_of(*several_rows(), every_slot=every_slot or several)
    aux = torch.randn(len(batch.input_ids), 96, dtype=torch.float64)
    live = live_of(batch, K)
    results = []
    for unrolled in (unroll_rows(drafter, batch, aux, K), twin(drafter, batch, aux, K)):
        drafter.zero_grad()
        torch.manual_seed(3)
        weights = torch.randn(K, len(batch.rows), 32, dtype=torch.float64) * live[..., None]
        (unrolled * weights).sum().backward()
        grads = {name: p.grad.clone() for name, p in drafter.named_parameters() if p.grad is not None}
        results.append((unrolled.detach()[live], grads))
    (ours, our_grads), (theirs, their_grads) = results
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)
    assert our_grads.keys() == their_grads.keys() >= {"fc.weight", "layers.0.self_attn.q_proj.weight"}
    for name, grad in our_grads.items():
        torch.testing.assert_close(grad, their_grads[name], atol=1e-9, rtol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_wrong_rows_are_noticed(target, exact_norms):
    """Negative control: queries one slot late see what serving would not have."""
    drafter, batch = make(target), batch_of(*several_rows()[1:2])
    aux = torch.randn(len(batch.input_ids), 96, dtype=torch.float64)
    right = twin(drafter, batch, aux, K)
    batch = replace(batch, rows=batch.rows + 1)
    wrong = unroll_rows(drafter, batch, aux, K)
    assert (wrong - right)[live_of(batch, K)].abs().max() > 1e-3


def test_latent_attention_is_unrolled_by_the_twin(target):
    latent = {
        "kv_lora_rank": 12,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "q_lora_rank": None,
        "num_key_value_heads": 4,
    }
    drafter = make(target, **latent)
    batch = batch_of(*several_rows(), every_slot=True)
    aux = torch.randn(len(batch.input_ids), 96, dtype=torch.float64)
    with torch.no_grad():
        ours, theirs = unroll_rows(drafter, batch, aux, K), twin(drafter, batch, aux, K)
    torch.testing.assert_close(ours[live_of(batch, K)], theirs[live_of(batch, K)], atol=1e-5, rtol=0)


def test_checkpointed_layers_have_the_same_gradients(target, exact_norms):
    drafter, batch = make(target).train(), batch_of(*several_rows())
    aux = torch.randn(len(batch.input_ids), 96, dtype=torch.float64)
    grads = []
    for checkpointed in (False, True):
        drafter.zero_grad()
        if checkpointed:
            for layer in drafter.layers:
                layer.gradient_checkpointing = True
        unroll_rows(drafter, batch, aux, K).square().sum().backward()
        grads.append([p.grad.clone() for p in drafter.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def method(loss="forward_kl", steps=K, dtype=torch.float64, **options):
    decay = 1.0 if LOSSES[loss].weighs_steps else 0.8
    return Method(
        LOSSES[loss], decay ** torch.arange(steps, dtype=dtype), torch.full((steps,), 0.3, dtype=dtype), **options
    )


def run(drafter, target, batch, loss="forward_kl", steps=K, dtype=torch.float64, states=None, tile=TILE, **options):
    source = OnlineStates(target, drafter.bound_aux_layer_ids)
    states = source.states(batch) if states is None else states
    vocabulary = DraftVocabulary(drafter.draft_to_target_ids, V, tile)
    states = States(*(x.to(dtype) for x in states))
    return ttt(drafter, batch, states, source.head, vocabulary, method(loss, steps, dtype, **options))


def by_definition(loss, q, alpha, kl, best):
    """One slot's loss at one step; `best` the draft id of the target's argmax, None outside the draft vocabulary."""
    weight = math.exp(-3 * 0.3)
    if loss == "forward_kl":
        return kl
    if loss == "cross_entropy":
        return 0 * q.sum() if best is None else -q[best].log()
    if loss == "total_variation":
        return 1 - alpha
    if loss == "ce_tv":
        return 0.1 * by_definition("cross_entropy", q, alpha, kl, best) + 1.8 * (1 - alpha)
    if loss == "lk_alpha":
        return -alpha.log()
    if loss == "lk_hybrid":
        return weight * kl + (1 - weight) * (1 - alpha)
    assert loss in ("expected_acceptance", "dpace")  # of all steps together: below
    return 0 * alpha


def by_definition_together(loss, alphas, bests):
    """One slot's loss at all its live steps; alphas, and q of the target's argmax or None, of each."""
    zeros = [0 * alpha for alpha in alphas]
    if loss == "expected_acceptance":
        expected = torch.stack([torch.stack(alphas[: j + 1]).prod() for j in range(len(alphas))]).sum()
        return [-expected.log(), *zeros[1:]]
    if loss != "dpace":
        return zeros
    smooth = [0.5 if q is None else 0.5 + 0.5 * q.item() for q in bests]
    weights = [sum(math.prod(smooth[: j + 1]) for j in range(t, len(smooth))) for t in range(len(smooth))]
    return [zero if q is None else -w * q.log() for w, q, zero in zip(weights, bests, zeros, strict=True)]


def reference(drafter, target, rows, loss, steps=K):
    """Loss and sums of (input_ids, loss_mask) rows by definition, slot by slot, on stock networks."""
    ids = drafter.draft_to_target_ids
    total, sums = (
        0,
        {"loss": torch.zeros(steps).double(), "correct": [0] * steps, "live": [0] * steps, "alpha": [0] * steps},
    )
    for tokens, mask in rows:
        tokens = torch.tensor(tokens)[None]
        out = target(tokens, output_hidden_states=True)
        aux = torch.cat([out.hidden_states[i] for i in drafter.bound_aux_layer_ids], dim=-1).detach()
        p = out.logits[0].softmax(-1).detach()  # [T, V]
        outputs = torch.cat(list(unroll(drafter, tokens, aux, steps)))  # [k, T, H]
        live = live_slots(torch.tensor([mask], dtype=torch.bool), steps)[:, 0]
        for i in range(len(mask)):
            alphas, bests = [], []
            for t in range(int(live[:, i].sum())):
                logits = drafter.compute_logits(outputs[t, i])
                at = p[i + 1 + t]
                known = int(at.argmax()) in ids.tolist()
                restricted = at[ids] / at[ids].sum()
                q = logits.softmax(-1)
                alpha = torch.minimum(q, at[ids]).sum()
                alphas.append(alpha)
                kl = (restricted * (restricted.log() - q.log())).sum() * known
                best = ids.tolist().index(int(at.argmax())) if known else None
                bests.append(None if best is None else q[best])
                value = by_definition(loss, q, alpha, kl, best)
                total = total + 0.8**t * value
                sums["loss"][t] += value.item()
                sums["correct"][t] += int(ids[logits.argmax()]) == int(at.argmax())
                sums["alpha"][t] += alpha.item()
                sums["live"][t] += 1
            for t, value in enumerate(by_definition_together(loss, alphas, bests) if alphas else ()):
                total = total + value
                sums["loss"][t] += value.item()
    return total, sums


@pytest.mark.sampled(2)
@pytest.mark.parametrize("variant", slow_but(["3.1"], ["3", "3.1"]))
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_and_gradients_are_those_of_the_definition(target, exact_norms, loss, variant):
    """Float64 to rounding; the float32 path within 1e-6 of it. In chunks of a few slots, across spans."""
    # Weights as large as trained ones; larger ones magnify the rounding of float32.
    drafter, rows = make(target, noise=0.1, **VARIANTS[variant]), several_rows()
    wanted, sums = reference(drafter, target, rows, loss)
    wanted.backward()
    grads = {name: p.grad.clone() for name, p in drafter.named_parameters() if p.grad is not None}
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-6)):
        drafter.zero_grad()
        drafter.to(dtype)
        value, ours = run(drafter, target, batch_of(*rows), loss, dtype=dtype, chunk_elements=3 * K * V_D)
        value.backward()
        assert value.item() == pytest.approx(wanted.item(), rel=tolerance)
        assert ours.loss.double().tolist() == pytest.approx(sums["loss"].tolist(), rel=10 * tolerance)
        assert ours.alpha.double().tolist() == pytest.approx(sums["alpha"], rel=10 * tolerance)
        assert ours.correct.tolist() == sums["correct"]
        assert ours.num_live.tolist() == sums["live"]
        ours_flat = torch.cat([p.grad.double().flatten() for name, p in drafter.named_parameters() if name in grads])
        wanted_flat = torch.cat([grad.flatten() for grad in grads.values()])
        assert (ours_flat - wanted_flat).norm() < tolerance * wanted_flat.norm()
    drafter.double()


def a_target_step(ruled_out):
    """Draft logits [K, C, V_d], what the target says [C+K-1, V_d] of the draft vocabulary, and its log-sum-exp and best.

    `ruled_out` [C+K-1, V_d] bool: logits of -inf.
    """
    n, generator = len(ruled_out), torch.Generator().manual_seed(7)
    logits = torch.randn(K, n - K + 1, V_D, generator=generator, dtype=torch.float64) * 2
    kept = torch.randn(n, V_D, generator=generator, dtype=torch.float64) * 2
    kept = kept.masked_fill(ruled_out, -torch.inf)
    lse = torch.logaddexp(kept.logsumexp(-1), torch.randn(n, generator=generator, dtype=torch.float64))
    best = kept.argmax(-1)
    best[ruled_out.all(-1)] = -1
    best[2] = -1  # the target's argmax lies outside
    return logits, kept, lse, best


def some_ruled_out(num_rows):
    """[num_rows, V_d] bool, about a third of each row."""
    return torch.rand(num_rows, V_D, generator=torch.Generator().manual_seed(3)) < 0.3


@pytest.mark.parametrize("loss", LOSSES)
def test_tokens_that_the_target_rules_out_are_left_out_of_the_loss(loss):
    """T-13: of a token with log p = -inf, the definition's sums have no term."""
    C = 5
    logits, kept, lse, best = a_target_step(some_ruled_out(C + K - 1))
    logits.requires_grad_()
    wanted = torch.zeros(K, C, dtype=torch.float64)
    total = 0
    for i in range(C):
        alphas, bests = [], []
        for t in range(K):
            known = kept[i + t].isfinite()
            p, q = (kept[i + t] - lse[i + t]).exp()[known], logits[t, i].softmax(-1)
            restricted, at = p / p.sum(), int(best[i + t])
            kl = (restricted * (restricted.log() - q[known].log())).sum() * (at >= 0)
            alphas.append(torch.minimum(p, q[known]).sum())
            value = by_definition(loss, q, alphas[-1], kl, at if at >= 0 else None)
            bests.append(logits[t, i].softmax(-1)[at] if at >= 0 else None)
            wanted[t, i] = value.item()
            total = total + value
        for t, value in enumerate(by_definition_together(loss, alphas, bests)):
            wanted[t, i] += value.item()
            total = total + value
    (wanted_grad,) = torch.autograd.grad(total, logits)

    shared = (kept - lse[:, None]).unfold(0, C, 1).transpose(1, 2), best.unfold(0, C, 1)
    live = torch.ones(K, C, dtype=torch.bool)
    value, grad = LOSSES[loss].function(logits.detach(), TargetStep(*shared, live, method(loss).mean_alpha))
    torch.testing.assert_close(value, wanted, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(grad, wanted_grad, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_target_that_rules_out_the_whole_draft_vocabulary_is_no_nan(loss):
    ruled_out = some_ruled_out(5 + K - 1)
    ruled_out[3] = True
    logits, kept, lse, best = a_target_step(ruled_out)
    live = torch.ones(K, 5, dtype=torch.bool)
    chunk = LossChunk(logits, kept, lse, best, best.new_zeros(K, 5))
    *sums, _, grad = chunk_loss(chunk, live, method(loss), torch.ones(K))
    assert all(x.isfinite().all() for x in (*sums, grad))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_does_not_train_may_be_anything(loss, value):
    """T-13: rows without a live step have no gradient and no part in the sums, and leave live steps alone."""
    C = 5
    logits, kept, lse, best = a_target_step(some_ruled_out(C + K - 1))
    depth = torch.tensor([K, 1, 0, 0, 0])
    live = torch.arange(K)[:, None] < depth
    chunk = LossChunk(logits, kept, lse, best, best.new_zeros(K, C))
    options = live, method(loss), torch.ones(K, dtype=torch.float64)
    wanted = chunk_loss(chunk, *options)
    assert wanted[-1][live].abs().sum() > 0
    strange = logits.clone()
    strange[~live] = torch.where(torch.arange(V_D) % 2 == 0, value, logits[~live])
    kept[K:] = value  # what only dead slots and steps read
    found = chunk_loss(chunk._replace(logits=strange), *options)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)
    assert (found[-1][~live] == 0).all()


def test_hits_and_paths_along_the_data(target):
    drafter, rows = make(target, **VARIANTS["3.1"]), several_rows()
    batch = batch_of(*rows)
    _, sums = run(drafter, target, batch)
    states = OnlineStates(target, drafter.bound_aux_layer_ids).states(batch)
    outputs = twin(drafter, batch, states.aux_hidden_states, K)
    ids = drafter.draft_to_target_ids.tolist()
    path, whole = torch.zeros(K).double(), 0
    for r, (slot, depth) in enumerate(zip(batch.rows.tolist(), batch.depth.tolist(), strict=True)):
        product = 1.0
        for t in range(depth):
            q = drafter.compute_logits(outputs[t, r]).softmax(-1)
            token = int(batch.input_ids[slot + 2 + t])
            assert bool(sums.hits[t, r]) == (ids[int(q.argmax())] == token)
            p = target.lm_head(states.last_hidden_states[slot + 1 + t]).softmax(-1)[token]
            product *= min(1.0, float(q[ids.index(token)].detach() / p)) if token in ids else 0.0
            if depth == K:
                path[t] += product
        whole += depth == K
    assert int(sums.num_whole) == whole > 0
    torch.testing.assert_close(sums.path, path, atol=1e-6, rtol=1e-6)


def test_documents_packed_are_documents_alone(target, exact_norms):
    drafter, rows = make(target), several_rows()
    together, sums = run(drafter, target, batch_of(*rows))
    alone = [run(drafter, target, batch_of(row)) for row in rows]
    torch.testing.assert_close(together, sum(loss for loss, _ in alone), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(sums.loss, sum(s.loss for _, s in alone), atol=1e-9, rtol=1e-9)
    assert torch.equal(sums.num_live, sum(s.num_live for _, s in alone))


def test_nothing_to_train_still_touches_every_weight(target):
    drafter = make(target)
    loss, sums = run(drafter, target, batch_of(([1, 2, 3], [0, 0, 1])))
    loss.backward()
    assert loss.item() == 0
    assert sums.num_live.tolist() == [0] * K
    assert all(p.grad is not None and not p.grad.any() for p in drafter.parameters())


def test_no_row_of_the_vocabulary_outlives_its_tile(target):
    """T-18: the largest tensor of heads and loss is a chunk, whatever the number of slots."""
    drafter = make(target, draft_vocab_size=31)
    batch = batch_of(*[row for seed in range(6) for row in several_rows(seed)])
    states = OnlineStates(target, drafter.bound_aux_layer_ids).states(batch)
    widest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            widest.extend(
                x.numel()
                for x in (out if isinstance(out, tuple) else (out,))
                if isinstance(x, torch.Tensor) and x.dim() > 1 and x.shape[-1] in (31, V)
            )
            return out

    with Watch():
        run(drafter, target, batch, states=states, tile=8, chunk_elements=2 * K * V_D)
    assert len(batch.rows) > 50
    assert max(widest) <= 31 * 32 < len(batch.rows) * K * 31  # a chunk, or the head transposed; not a step


def test_the_target_is_not_trained(target):
    drafter = make(target)
    loss, _ = run(drafter, target, batch_of(*several_rows()), steps=2)
    loss.backward()
    assert all(p.grad is None for p in target.parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in drafter.parameters())


# ---- the target's states and head ----

SMALL = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("family", ["full", "window"])
def test_states_of_a_batch_are_those_of_each_document_alone(family, packs):
    """Side by side under padding, or end to end; in several forwards."""
    torch.manual_seed(0)
    window = {"sliding_window": 4}
    model = (
        MistralForCausalLM(MistralConfig(**SMALL, **window))
        if family == "window"
        else LlamaForCausalLM(LlamaConfig(**SMALL))
    )
    model = model.double().eval()
    batch = batch_of(*several_rows())
    states = OnlineStates(model, (1, 3, 5), max_tokens=30, packs=packs).states(batch)
    start = 0
    for length in batch.lengths:
        here = slice(start, start + length)
        out = model.model(batch.input_ids[None, here], output_hidden_states=True)
        aux = torch.cat([out.hidden_states[i][0] for i in (1, 3, 5)], dim=-1)
        torch.testing.assert_close(states.aux_hidden_states[here], aux, atol=1e-5, rtol=0)
        torch.testing.assert_close(states.last_hidden_states[here], out.last_hidden_state[0], atol=1e-5, rtol=0)
        start += length
    assert model.config._attn_implementation == "sdpa"


def test_attention_that_is_not_plain_does_not_pack():
    model = GptOssForCausalLM(GptOssConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1, head_dim=8)).eval()
    with pytest.raises(UnfitError, match="sinks"):
        OnlineStates(model, (1, 3, 5), packs=True).states(batch_of(*several_rows()))


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(500, 450), (9, 40, 21)], ids=["squares", "ragged"])
@pytest.mark.parametrize("variant", ["3", "3.1", "concat norm", "qk norm"])
def test_a_fused_step_in_half_precision_comes_near(target, variant, lengths):
    """Kernels, compiled functions and packed matrices of a GPU, against float64: gradients as near as bfloat16 gets."""
    drafter = make(target, noise=0.1, **VARIANTS[variant])
    rng = np.random.default_rng(0)
    rows = [(rng.integers(0, V, n), [0] * 3 + [1] * (n - 3)) for n in lengths]
    flat = batch_of(*rows, squares=SquareRule(min_side=512))
    assert (flat.spans.squares is None) == (len(lengths) == 3)
    wanted, _ = run(drafter, target, flat)
    (3 * wanted).backward()
    grads = {name: p.grad.clone() for name, p in drafter.named_parameters() if p.grad is not None}
    states = OnlineStates(target, drafter.bound_aux_layer_ids).states(flat)
    drafter.zero_grad()
    drafter.float().cuda()
    there = flat.to("cuda")
    states = States(*(x.to("cuda", torch.bfloat16) for x in states))
    head = TargetHead(target.lm_head.weight.detach().to("cuda", torch.bfloat16), None, V)
    vocabulary = DraftVocabulary(drafter.draft_to_target_ids, V)
    scale = 0.8 ** torch.arange(K, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        loss, _ = ttt(drafter, there, states, head, vocabulary, Method(LOSSES["forward_kl"], scale, 0 * scale))
    (3 * loss).backward()  # a gradient that is not 1
    assert loss.item() == pytest.approx(wanted.item(), rel=0.02)
    for name, p in drafter.named_parameters():
        if name in grads:
            error = (p.grad.cpu().double() - grads[name]).norm() / grads[name].norm()
            assert error < 0.05, name


@pytest.mark.gpu
def test_packing_is_found_out_on_a_gpu():
    model = LlamaForCausalLM(LlamaConfig(**SMALL, dtype=torch.bfloat16)).to("cuda", torch.bfloat16).eval()
    source = OnlineStates(model, (1, 3, 5))
    batch = batch_of(*several_rows()).to("cuda")
    packed = source.states(batch)
    assert source._packs
    apart = OnlineStates(model, (1, 3, 5), packs=False).states(batch)
    for a, b in zip(packed, apart, strict=True):
        assert (a - b).float().norm() < 0.02 * b.float().norm()


def test_documents_of_like_length_run_together():
    groups = list(group_by_length([100, 10, 98, 95, 11, 9], max_tokens=250))
    assert groups == [[0, 2], [3], [4], [1], [5]] or all(len(g) for g in groups)
    assert sorted(i for group in groups for i in group) == list(range(6))
    lengths = [100, 10, 98, 95, 11, 9]
    for group in groups:
        padded = max(lengths[i] for i in group) * len(group)
        assert padded <= 250
        assert padded - sum(lengths[i] for i in group) <= 0.1 * padded


@pytest.mark.parametrize("family", ["plain", "soft cap", "scaled", "surprise"])
def test_the_head_gives_the_targets_own_logits(family):
    """Caps and factors of the host's configs are known; what is not is found out, and the target's logits taken."""
    torch.manual_seed(0)
    if family == "soft cap":
        model = Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=2.0))
    elif family == "scaled":
        model = CohereForCausalLM(
            CohereConfig(**SMALL, logit_scale=0.25, pad_token_id=0, bos_token_id=1, eos_token_id=2)
        )
    else:
        model = LlamaForCausalLM(LlamaConfig(**SMALL))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(40)
    if family == "surprise":
        model.lm_head.register_forward_hook(lambda _module, _args, out: out * 3)
    model.eval()
    batch = batch_of(*several_rows())
    source = OnlineStates(model, (1, 3, 5))
    states = source.states(batch)
    assert (source.head.weight is None) == (family == "surprise")
    ids = torch.tensor([3, 50, 7, 8, 30])  # not ascending, as some publish it
    found = source.head.logits(states.last_hidden_states, DraftVocabulary(ids, V))
    logits = torch.cat([model(x[None]).logits[0] for x in batch.input_ids.split(batch.lengths)])
    torch.testing.assert_close(found.kept - found.lse[:, None], logits.log_softmax(-1)[:, ids], atol=2e-5, rtol=1e-4)
    assert torch.equal(found.best, logits.argmax(-1))


def test_tiles_of_the_head_are_one_vocabulary():
    torch.manual_seed(0)
    head, last = TargetHead(torch.randn(V, 16), None, V), torch.randn(7, 16)
    ids = torch.tensor([0, 3, 7, 8, 30, 59])
    whole = head.logits(last, DraftVocabulary(ids, V))
    tiled = head.logits(last, DraftVocabulary(ids, V, tile=8))
    torch.testing.assert_close(tiled.kept - tiled.lse[:, None], whole.kept - whole.lse[:, None])
    assert torch.equal(tiled.best, whole.best)


def test_walk_counts_rounds_like_decoding():
    #                     x0 x1 | x2 .. x9
    mask = np.array([0, 0, 1, 1, 1, 1, 1, 1, 1, 1], dtype=bool)
    hits = np.zeros((2, 10), dtype=bool)
    hits[:, 1] = True  # round at slot 1 (root x2): drafts x3 x4 right; next root x5
    hits[1, 4] = True  # slot 4: first draft wrong, so the second does not count; next root x6
    hits[0, 5] = True  # slot 5: one right; next root x8
    hits[0, 7] = True  # slot 7: x9 right, but the turn has room for one token, and that is the target's own
    result = walk(hits, mask)
    assert result.rounds == 4
    assert result.accepted.tolist() == [2, 1]
    assert result.acceptance_length == pytest.approx(7 / 4)  # x3 .. x9 in four rounds
