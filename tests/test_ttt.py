"""TTT against a literal simulation of serving, and the supervision table."""

import numpy as np
import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from hf_eagle3.modeling import Eagle3DrafterConfig, Eagle3DrafterModel
from hf_eagle3.training.acceptance import walk
from hf_eagle3.training.data import collate
from hf_eagle3.training.losses import soft_cross_entropy
from hf_eagle3.training.ttt import Lesson, teach, ttt
from hf_eagle3.unroll import live_slots, shift, unroll

V, V_D, K = 60, 32, 4
BASE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": V,
    "draft_vocab_size": V_D,
    "rms_norm_eps": 1e-6,
}
VARIANTS = {
    "3": {},
    "3.1": {"fc_norm": True, "norm_output": True},
    "concat norm": {"norm_before_fc": True, "norm_before_residual": True},
    "two layers": {"num_hidden_layers": 2, "norm_output": True},
    "window": {"sliding_window": 3},
    "qk norm": {"qk_norm": True, "attention_bias": True},
}


@pytest.fixture(scope="module")
def target():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).double().eval()


def make(target, attn="sdpa", **variant):
    torch.manual_seed(1)
    drafter = Eagle3DrafterModel(Eagle3DrafterConfig(**{**BASE, **variant})).double()
    drafter.set_attn_implementation(attn)
    assert drafter.config._attn_implementation == attn
    with torch.no_grad():
        for p in drafter.parameters():
            p.add_(0.3 * torch.randn_like(p))
    drafter.set_draft_to_target_ids(torch.arange(V_D) * 2 - torch.arange(V_D) // 8)
    return drafter.bind(target).eval()


def batch_of(*rows):
    return collate([{"input_ids": np.array(ids), "loss_mask": np.array(mask)} for ids, mask in rows])


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
    from hf_eagle3 import unroll as module

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


def test_teacher_is_the_target_restricted_to_the_draft_vocabulary(target):
    drafter = make(target)
    batch = batch_of((list(range(10, 20)), [0] * 4 + [1] * 6), (list(range(30, 36)), [0] * 3 + [1] * 3))
    lesson = teach(target, drafter, batch)
    ids = drafter.draft_to_target_ids
    for b, n in ((0, 10), (1, 6)):
        alone = batch["input_ids"][b : b + 1, :n]
        out = target(alone, output_hidden_states=True)
        probs = out.logits[0, :, ids].softmax(-1)
        for i in batch["loss_mask"][b].nonzero().flatten().tolist():
            torch.testing.assert_close(lesson.probs[lesson.row[b, i - 1]].double(), probs[i - 1], atol=1e-6, rtol=0)
            best = int(out.logits[0, i - 1].argmax())
            assert int(lesson.argmax[b, i - 1]) == best
            assert bool(lesson.in_vocabulary[b, i - 1]) == (best in ids.tolist())
        states = torch.cat([out.hidden_states[j][0] for j in (2, 4, 5)], dim=-1)
        torch.testing.assert_close(lesson.aux_hidden_states[b, :n], states, atol=1e-10, rtol=0)


def test_sums_equal_a_loop_over_slots(target):
    drafter = make(target, fc_norm=True, norm_output=True)
    batch = batch_of((list(range(10, 22)), [0] * 4 + [1] * 8), (list(range(30, 37)), [0] * 3 + [1] * 4))
    lesson = teach(target, drafter, batch)
    sums = ttt(drafter, batch, lesson, K)
    steps = list(unroll(drafter, batch["input_ids"], lesson.aux_hidden_states, K))
    ids = drafter.draft_to_target_ids
    for t in range(K):
        loss = correct = count = 0
        for b in range(2):
            mask, x = batch["loss_mask"][b].tolist(), batch["input_ids"][b]
            for i in range(len(mask)):
                span = range(i + 1, i + 3 + t)
                if max(span) >= len(mask) or not all(mask[j] for j in span):
                    continue
                at = i + 1 + t
                logits = drafter.compute_logits(steps[t][b, i])
                teacher = lesson.probs[lesson.row[b, at]]
                if int(lesson.argmax[b, at]) in ids.tolist():
                    loss = loss - (teacher * logits.log_softmax(-1)).sum()
                guess = int(ids[logits.argmax()])
                correct += guess == int(lesson.argmax[b, at])
                assert bool(sums.hits[t, b, i]) == (guess == int(x[i + 2 + t]))
                count += 1
        assert int(sums.num_live[t]) == count
        assert int(sums.correct[t]) == correct
        torch.testing.assert_close(sums.loss[t].double(), torch.as_tensor(loss).double(), atol=1e-4, rtol=1e-5)


def test_padding_changes_nothing(target):
    drafter = make(target)
    row = (list(range(10, 20)), [0] * 4 + [1] * 6)
    short = batch_of(row)
    long = batch_of(row, (list(range(25)), [0] * 10 + [1] * 15))
    alone = ttt(drafter, short, teach(target, drafter, short), K)
    other = batch_of((list(range(25)), [0] * 10 + [1] * 15))
    rest = ttt(drafter, other, teach(target, drafter, other), K)
    both = ttt(drafter, long, teach(target, drafter, long), K)
    torch.testing.assert_close(both.loss, alone.loss + rest.loss, atol=1e-5, rtol=1e-5)
    assert torch.equal(both.num_live, alone.num_live + rest.num_live)


def test_loss_and_its_gradient_are_those_of_the_definition():
    torch.manual_seed(0)
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    probs = torch.randn(5, 7, dtype=torch.float64).softmax(-1)
    weights = torch.rand(5, dtype=torch.float64)
    wanted = -(probs * logits.log_softmax(-1)).sum(-1)
    (wanted_grad,) = torch.autograd.grad((weights * wanted).sum(), logits)
    loss = soft_cross_entropy(logits, probs)
    (grad,) = torch.autograd.grad((weights * loss).sum(), logits)
    torch.testing.assert_close(loss, wanted, atol=1e-12, rtol=0)
    torch.testing.assert_close(grad, wanted_grad, atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(soft_cross_entropy, (logits, probs))


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


def test_lesson_is_not_trained(target):
    drafter = make(target)
    batch = batch_of((list(range(10, 20)), [0] * 4 + [1] * 6))
    lesson = teach(target, drafter, batch)
    assert isinstance(lesson, Lesson)
    assert not any(x.requires_grad for x in lesson)
    ttt(drafter, batch, lesson, 2).loss.sum().backward()
    assert all(p.grad is None for p in target.parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in drafter.parameters())
