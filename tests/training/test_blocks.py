"""Training of block drafters: against a definition in loops, and against what is served."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.blocks import BLOCK_DRAFTERS, make_block_drafter
from helpers.marks import slow_but
from helpers.models import V, make_target
from torch.nn import functional as F

from hf_eagle3.drafters.blocks import BLOCKS
from hf_eagle3.drafters.draft import Committed, Prompted
from hf_eagle3.speculation.shape import Shapes, chain
from hf_eagle3.training.states.online import OnlineStates
from hf_eagle3.training.step import blocks as module
from hf_eagle3.training.step.batch import Collator
from hf_eagle3.training.step.blocks import block_step, choose_blocks, mix_markov, run_blocks
from hf_eagle3.training.step.head_loss import Method
from hf_eagle3.training.step.losses import LOSSES
from hf_eagle3.training.step.target_head import DraftVocabulary

pytestmark = pytest.mark.any_release
DECAY = 0.8
EVERYDAY = ["dflash", "dspark", "windows", "rnn"]


@pytest.fixture(scope="module")
def target():
    return make_target("llama").double()


def make(target, kind, **overrides):
    """A drafter in float64; small weights, so that the target's tokens are not ruled out."""
    drafter = make_block_drafter(target, kind, initializer_range=0.1, **overrides).double()
    with torch.no_grad():
        for p in drafter.parameters():
            p.mul_(0.5)
    return drafter.bind(target).eval()


def several_rows(seed=0):
    """A short row, one of two turns, one that ends in the user's turn, one with nothing to train, a long one."""
    rng = np.random.default_rng(seed)
    masks = [
        [0] * 3 + [1] * 6,
        [0] * 2 + [1] * 5 + [0] * 3 + [1] * 7,
        [0] * 4 + [1] * 4 + [0] * 5,
        [0] * 5 + [1] * 1 + [0],
        [0] + [1] * 14,
    ]
    return [{"input_ids": rng.integers(0, V, len(mask)), "loss_mask": np.array(mask)} for mask in masks]


def packed(rows):
    """One row of several documents."""
    return {
        "input_ids": np.concatenate([row["input_ids"] for row in rows]),
        "loss_mask": np.concatenate([row["loss_mask"] for row in rows]),
        "lengths": [len(row["input_ids"]) for row in rows],
    }


def states_of(target, drafter, tokens):
    """The target's states [1, T, A*Ht] and probabilities [T, V] of one document [T]."""
    out = target(torch.as_tensor(tokens)[None], output_hidden_states=True)
    aux = torch.cat([out.hidden_states[i] for i in drafter.bound_aux_layer_ids], dim=-1)
    return aux.detach(), out.logits[0].softmax(-1).detach()


def block_by_hand(drafter, aux, tokens, slot):
    """Logits [k, V_d] and hidden states [k, H] of the block at a slot, by a forward of its own, the text's tokens drafted."""
    config = drafter.config
    ids = torch.full((1, config.block_size), config.mask_token_id)
    ids[0, 0] = int(tokens[slot + 1])
    out = drafter(ids, aux_hidden_states=aux[:, : slot + 1])
    k = config.max_draft_depth
    logits, hidden = out.logits[0, -k:], out.hidden_states[0, -k:]
    scores, state = [], None
    for t in range(k):
        before = torch.tensor(int(tokens[min(slot + 1 + t, len(tokens) - 1)]))
        added, state = drafter.add_markov(logits[t], before, hidden[t], state)
        scores.append(added)
    return torch.stack(scores), hidden


def live_depths(mask, slot, k):
    """How many depths train: tokens slot+1 .. slot+2+t must all be the target's."""
    count = 0
    while count < k and slot + 2 + count < len(mask) and all(mask[slot + 1 : slot + 3 + count]):
        count += 1
    return count


def loss_by_hand(name, q, p, best, alpha):
    """One depth's loss; `best` the draft id of the target's argmax or None; `p` of the draft vocabulary."""
    renormed = p / p.sum()
    kl = (renormed * (renormed / q).log()).sum() if best is not None else 0 * q.sum()
    return {
        "forward_kl": kl,
        "cross_entropy": 0 * q.sum() if best is None else -q[best].log(),
        "total_variation": 1 - alpha,
        "dspark": 0.1 * kl + 0.9 * ((q - p).abs().sum() + 1 - p.sum()),
    }[name]


def reference(drafter, target, rows, name):
    """Loss and sums by depth, over documents, slots and depths."""
    k, ids = drafter.config.max_draft_depth, drafter.draft_to_target_ids.tolist()
    total, losses, correct, live = 0, torch.zeros(k).double(), [0] * k, [0] * k
    for row in rows:
        tokens, mask = row["input_ids"], row["loss_mask"]
        aux, probs = states_of(target, drafter, tokens)
        for slot in range(len(tokens) - 1):
            if not (depth := live_depths(mask, slot, k)):
                continue
            logits, hidden = block_by_hand(drafter, aux, tokens, slot)
            for t in range(depth):
                at, q = probs[slot + 1 + t], logits[t].softmax(-1)
                best = ids.index(int(at.argmax())) if int(at.argmax()) in ids else None
                alpha = torch.minimum(q, at[ids]).sum()
                value = loss_by_hand(name, q, at[ids], best, alpha)
                losses[t] += value.item()
                correct[t] += int(logits[t].argmax()) == best
                live[t] += 1
                if drafter.config.has_confidence_head:
                    score = drafter.find_confidence(torch.tensor(int(tokens[slot + 1 + t])), hidden[t])
                    a = alpha.detach()
                    value = value - a * F.logsigmoid(score) - (1 - a) * F.logsigmoid(-score)
                total = total + DECAY**t * value
    return total, losses, correct, live


def run(drafter, target, batch, name="forward_kl", **options):
    k = drafter.config.max_draft_depth
    source = OnlineStates(target, drafter.bound_aux_layer_ids)
    vocabulary = DraftVocabulary(drafter.draft_to_target_ids, V)
    scale = DECAY ** torch.arange(k, dtype=torch.float64)
    method = Method(LOSSES[name], scale, torch.zeros(k).double(), **options)
    return block_step(drafter, batch, source.states(batch), source.head, vocabulary, method)


# ---- the definition ----


@pytest.mark.parametrize("kind", slow_but(EVERYDAY, BLOCK_DRAFTERS))
@pytest.mark.parametrize("name", slow_but(["dspark"], ["forward_kl", "cross_entropy", "total_variation", "dspark"]))
def test_loss_and_gradients_are_those_of_the_definition(target, exact_norms, monkeypatch, kind, name):
    """In one packed row, in chunks of a few slots, and in groups of a few blocks."""
    drafter, rows = make(target, kind), several_rows()
    k = drafter.config.max_draft_depth
    wanted, losses, correct, live = reference(drafter, target, rows, name)
    wanted.backward()
    grads = {name: p.grad.clone() for name, p in drafter.named_parameters()}
    for most, rows_of_batch in ((10**6, rows), (40, [packed(rows)])):
        monkeypatch.setattr(module, "MOST_TOKENS", most)
        drafter.zero_grad()
        value, sums = run(drafter, target, Collator(k)(rows_of_batch), name, chunk_elements=3 * k * V)
        value.backward()
        torch.testing.assert_close(value, wanted, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(sums.loss, losses, rtol=1e-10, atol=1e-10)
        assert sums.correct.tolist() == correct
        assert sums.num_live.tolist() == live
        for weight, p in drafter.named_parameters():
            torch.testing.assert_close(p.grad, grads[weight], rtol=1e-9, atol=1e-10)
            assert p.grad.abs().sum() > 0


def logits_in_training(drafter, batch, aux):
    """[L, k, V_d] what the losses see, of blocks at the slots of `batch`."""
    with torch.no_grad():
        hidden = run_blocks(drafter, batch, aux)  # [k, L, H]
        logits = drafter.compute_logits(hidden)
        if drafter.config.markov_rank:
            at = batch.rows + 1 + torch.arange(len(hidden))[:, None]
            before = batch.input_ids[at.clamp_max(len(batch.input_ids) - 1)]
            logits = logits + drafter.markov_head.markov_w2(mix_markov(drafter, before, hidden))
    return logits.transpose(0, 1)


@pytest.mark.parametrize("kind", slow_but(EVERYDAY, BLOCK_DRAFTERS))
def test_a_block_in_training_is_a_block_that_is_served(target, kind):
    """The engine's kind, begun with the states before the root, gives the logits of training at the same place."""
    drafter = make(target, kind)
    k, ids = drafter.config.max_draft_depth, drafter.draft_to_target_ids
    tokens = ids[torch.randint(0, len(ids), (24,))]
    row = {"input_ids": tokens.numpy(), "loss_mask": np.array([0] * 4 + [1] * 20)}
    aux = states_of(target, drafter, tokens)[0]
    batch = Collator(k)([row])
    trained = logits_in_training(drafter, batch, aux[0])  # [L, k, V_d]
    shape = chain(k)
    for slot, wanted in zip(batch.slots.tolist()[: -k - 1], trained, strict=False):
        served, follows = [], iter(tokens[slot + 2 :])

        def choose_the_text(logits, depths, width, served=served, follows=follows):
            served.append(logits[0])
            said = torch.stack([next(follows) for _ in range(logits.shape[1])])
            return (ids == said[:, None]).int().argmax(-1)[None, :, None], None

        count = torch.tensor([slot + 1])
        prompted = Prompted(tokens[None, : slot + 1], aux[:, : slot + 1], count, torch.zeros(1, dtype=torch.long))
        memory = BLOCKS.begin(drafter, prompted, Shapes((shape,)))
        BLOCKS.catch_up(
            memory, Committed(tokens[None, slot + 1 : slot + 2], None, torch.ones(1, dtype=torch.long)), shape
        )
        with torch.no_grad():
            draft = BLOCKS.propose(drafter, memory, shape, choose_the_text)
        assert draft.tokens[0].tolist() == tokens[slot + 2 : slot + 2 + k].tolist()
        torch.testing.assert_close(torch.cat(served), wanted, rtol=1e-9, atol=1e-9)


# ---- which blocks ----


def test_blocks_are_drawn_anew_and_the_same_by_the_same_seed():
    batch = Collator(3)(several_rows())

    def draw(seed, count=7):
        return choose_blocks(batch, count, np.random.default_rng(seed))

    one, other = draw(0), draw(1)
    assert one.slots.tolist() == draw(0).slots.tolist() != other.slots.tolist()
    for chosen in (one, other):
        assert len(chosen.slots) == 7
        assert chosen.rows.tolist() == chosen.slots.tolist() == sorted(chosen.slots.tolist())
        depths = dict(zip(batch.slots.tolist(), batch.depth.tolist(), strict=True))
        assert chosen.depth.tolist() == [depths[slot] for slot in chosen.slots.tolist()]
    assert draw(0, 10**6) is batch


def test_every_block_has_the_same_chance():
    """Over many draws, each slot comes up as often; the mean loss over drawn blocks is that over all."""
    batch = Collator(3)(several_rows())
    counts = np.zeros(len(batch.input_ids))
    draws, size = 3000, 5
    for seed in range(draws):
        counts[choose_blocks(batch, size, np.random.default_rng(seed)).slots] += 1
    expected = draws * size / len(batch.slots)
    assert (np.abs(counts[batch.slots] - expected) < 5 * expected**0.5).all()
    assert counts.sum() == draws * size


def test_what_lies_behind_the_root_has_no_part(target):
    """States from the root on, and other documents, may be anything."""
    drafter = make(target, "dspark")
    batch = Collator(drafter.config.max_draft_depth)(several_rows())
    aux = torch.randn(len(batch.input_ids), 3 * 32, dtype=torch.float64)
    kept = int(np.flatnonzero(batch.position_ids.numpy() == 4)[1])  # in the second document
    batch = choose_by(batch, batch.slots == kept)
    strange = torch.full_like(aux, 1e6)
    begin = kept - int(batch.position_ids[kept])
    strange[begin : kept + 1] = aux[begin : kept + 1]
    torch.testing.assert_close(run_blocks(drafter, batch, strange), run_blocks(drafter, batch, aux))


def choose_by(batch, keep):
    index = torch.from_numpy(np.flatnonzero(keep))
    return replace(batch, rows=batch.rows[index], depth=batch.depth[index], slots=batch.slots[keep])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_both_attentions_give_the_same(target, attention):
    drafter = make(target, "windows").float()
    batch = Collator(drafter.config.max_draft_depth)(several_rows())
    aux = torch.randn(len(batch.input_ids), 3 * 32)
    wanted = run_blocks(drafter.double(), batch, aux.double())
    drafter.float().set_attn_implementation(attention)
    torch.testing.assert_close(run_blocks(drafter, batch, aux), wanted.float(), rtol=1e-4, atol=1e-4)


def test_recomputed_activations_give_the_same_gradients(target):
    drafter, found = make(target, "dspark"), []
    for recomputes in (False, True):
        drafter.train().zero_grad()
        for layer in drafter.layers:
            layer.gradient_checkpointing = recomputes
        loss, _ = run(drafter, target, Collator(8)(several_rows()), "dspark")
        loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in drafter.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-14)


def test_a_batch_without_blocks_trains_nothing_and_touches_every_weight(target):
    drafter = make(target, "dspark")
    nothing = [{"input_ids": np.arange(5), "loss_mask": np.zeros(5, dtype=int)}]
    loss, sums = run(drafter, target, Collator(8)(nothing))
    loss.backward()
    assert loss.item() == 0
    assert not sums.num_live.any()
    assert all(p.grad is not None and not p.grad.any() for p in drafter.parameters())
