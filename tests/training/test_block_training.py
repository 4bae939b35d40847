"""Training of block drafters: against a definition in loops, and against what is served."""

import copy
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import unrolling
from helpers.blocks import BLOCK_DRAFTERS, make_block_drafter
from helpers.marks import slow_but
from helpers.models import NUM_LAYERS, H, V, make_target
from helpers.reference_blocks import markov_bias
from helpers.training import NEW, PROMPT, TINY, make_args, progressions
from helpers.training import V as V_TINY
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM

from hf_eagle3 import Eagle3Trainer
from hf_eagle3.checkpoints.blocks import spread_boundaries
from hf_eagle3.drafters.blocks import BLOCKS
from hf_eagle3.drafters.draft import Committed, Prompted
from hf_eagle3.speculation.shape import Shapes, chain
from hf_eagle3.training import StoredStates, store_states
from hf_eagle3.training.forecast_blocks import BlockShape
from hf_eagle3.training.new_drafter import choose_mask_token, new_block_drafter
from hf_eagle3.training.states.online import OnlineStates
from hf_eagle3.training.step import blocks as module
from hf_eagle3.training.step.batch import Collator
from hf_eagle3.training.step.blocks import block_step, choose_blocks, read_markov, run_blocks
from hf_eagle3.training.step.head_loss import Method
from hf_eagle3.training.step.losses import LOSSES
from hf_eagle3.training.step.target_head import DraftVocabulary

pytestmark = pytest.mark.any_release
DECAY = 0.8
EVERYDAY = ["dflash", "dspark", "windows", "rnn"]


@pytest.fixture(scope="module")
def target():
    return copy.deepcopy(make_target("llama")).double()


def make(target, kind, **overrides):
    """A drafter in float64; small weights, so that the target's tokens are not ruled out."""
    drafter = make_block_drafter(target, kind, initializer_range=0.1, **overrides).double()
    with torch.no_grad():
        for p in drafter.parameters():
            p.mul_(0.5)
    return drafter.bind(target).eval()


def several_rows(seed=0):
    """Rows of several kinds, as the trainer's."""
    return [{"input_ids": ids, "loss_mask": np.array(mask)} for ids, mask in unrolling.several_rows(seed)]


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
    if config.markov_rank:
        before = [int(tokens[min(slot + 1 + t, len(tokens) - 1)]) for t in range(k)]
        logits = logits + markov_bias(dict(drafter.named_parameters()), config.markov_head_type, before, hidden)
    return logits, hidden


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
    ce = 0 * q.sum() if best is None else -q[best].log()
    return {
        "forward_kl": kl,
        "cross_entropy": ce,
        "total_variation": 1 - alpha,
        "ce_tv": 0.1 * ce + 0.9 * ((q - p).abs().sum() + 1 - p.sum()),
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
@pytest.mark.parametrize("name", slow_but(["ce_tv"], ["forward_kl", "cross_entropy", "total_variation", "ce_tv"]))
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
            logits = logits + drafter.markov_head.markov_w2(read_markov(drafter, before, hidden))
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
    for slot, wanted in zip(batch.slots[: -k - 1].tolist(), trained[: -k - 1], strict=True):
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


def test_depths_weigh_by_confidence(target, exact_norms):
    """D-PACE: the loss of a block is that of its depths, each weighed by the chance to get there and beyond."""
    drafter, rows = make(target, "dflash"), several_rows()
    k, total = drafter.config.max_draft_depth, 0
    for row in rows:
        tokens = row["input_ids"]
        aux, probs = states_of(target, drafter, tokens)
        for slot in range(len(tokens) - 1):
            depth = live_depths(row["loss_mask"], slot, k)
            logits = block_by_hand(drafter, aux, tokens, slot)[0] if depth else None
            said = [logits[t].log_softmax(-1)[int(probs[slot + 1 + t].argmax())] for t in range(depth)]
            smooth = [0.5 + 0.5 * x.exp().item() for x in said]
            reached = np.cumprod(smooth)
            total = total - sum(reached[t:].sum() * said[t] for t in range(depth))
    total.backward()
    wanted = drafter.fc.weight.grad.clone()
    drafter.zero_grad()
    source, vocabulary = (
        OnlineStates(target, drafter.bound_aux_layer_ids),
        DraftVocabulary(drafter.draft_to_target_ids, V),
    )
    method, batch = Method(LOSSES["dpace"], torch.ones(k).double(), torch.zeros(k).double()), Collator(k)(rows)
    value, _ = block_step(drafter, batch, source.states(batch), source.head, vocabulary, method)
    value.backward()
    torch.testing.assert_close(value, total, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(drafter.fc.weight.grad, wanted, rtol=1e-9, atol=1e-10)


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
    return batch.with_slots(np.flatnonzero(keep))


def test_evaluation_runs_blocks_in_parts(target, monkeypatch):
    drafter = make(target, "windows")
    batch = Collator(drafter.config.max_draft_depth)(several_rows())
    aux = torch.randn(len(batch.input_ids), 3 * 32, dtype=torch.float64)
    wanted = run_blocks(drafter, batch, aux).detach()
    monkeypatch.setattr(module, "MOST_WITHOUT_GRADIENT", 40)
    with torch.no_grad():
        torch.testing.assert_close(run_blocks(drafter, batch, aux), wanted)


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
        loss, _ = run(drafter, target, Collator(8)(several_rows()), "ce_tv")
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


# ---- the trainer ----


@pytest.fixture(scope="module")
def taught():
    """A tiny target that was taught progressions."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(150):
        ids = progressions(32, PROMPT + NEW, seed=step)
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def answers(taught):
    """A handful of the target's own greedy answers."""
    prompts = progressions(24, PROMPT, seed=1000)
    out = taught.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=NEW, do_sample=False)
    return [{"input_ids": ids.tolist(), "loss_mask": [0] * PROMPT + [1] * NEW} for ids in out]


KINDS = {
    "dflash": {"drafter_version": "dflash", "loss_type": "cross_entropy"},
    "dspark": {"drafter_version": "dspark", "loss_type": "ce_tv", "markov_rank": 16},
}


def block_args(tmp_path, kind="dspark", **changes):
    given = {"block_size": 4, "num_hidden_layers": 2, "num_anchors": 64, "draft_vocab_size": None, "eval_depth": None}
    return make_args(tmp_path, **{**given, **KINDS[kind], **changes})


def make_trainer(target, rows, tmp_path, kind="dspark", model=None, **changes):
    args = block_args(tmp_path, kind, **changes)
    return Eagle3Trainer(model=model, target_model=target, args=args, train_dataset=rows, eval_dataset=rows[:6])


@pytest.mark.parametrize("kind", KINDS)
def test_a_tiny_run_learns_to_draft(taught, answers, tmp_path, kind):
    """Trained on a few answers, the drafter is accepted in real decoding, and then loads and drafts the same."""
    changes = {"max_steps": 120, "learning_rate": 1e-2, "eval_max_new_tokens": NEW, "eval_generate_prompts": 6}
    trainer = make_trainer(taught, answers, tmp_path, kind, **changes)
    assert trainer.drafter.config.max_draft_depth == trainer.eval_depth
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_acceptance_length"] > before["eval_acceptance_length"] + 1
    assert after["eval_acceptance_length"] > 2.5
    # The text is the target's own, so walking along it counts the same rounds.
    assert after["eval_walked_acceptance_length"] == pytest.approx(after["eval_acceptance_length"], rel=0.1)
    assert after["eval_accuracy_0"] > 0.8
    assert f"eval_accuracy_{trainer.eval_depth - 1}" in after
    trainer.save_model()
    again = AutoModel.from_pretrained(tmp_path / "out").bind(taught)
    prompt = torch.tensor([answers[0]["input_ids"][:PROMPT]])
    said = taught.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, assistant_model=again)
    assert said[0].tolist() == answers[0]["input_ids"]
    for name, value in trainer.drafter.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_a_training_goes_on_as_if_it_had_never_stopped(taught, answers, tmp_path):
    """The drawn blocks are the same, too; and averages of the weights are."""
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "ema_decay": 0.5}
    whole = make_trainer(taught, answers, tmp_path, **changes, num_anchors=20)
    whole.train()
    again = make_trainer(taught, answers, tmp_path, **changes, num_anchors=20)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    for name, value in whole.drafter.state_dict().items():
        assert torch.equal(again.drafter.state_dict()[name], value), name
    with pytest.raises(ValueError, match="block_size was 4, and is 5"):
        make_trainer(taught, answers, tmp_path, **changes, block_size=5).train(
            resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2")
        )


def test_a_drafter_that_is_given_trains_on(taught, answers, tmp_path):
    first = make_trainer(taught, answers, tmp_path)
    first.save_model(str(tmp_path / "drafter"))
    trainer = make_trainer(taught, answers, tmp_path, "dflash", model=str(tmp_path / "drafter"))
    assert trainer.drafter.config.markov_rank == 16
    start = {name: value.clone() for name, value in trainer.drafter.state_dict().items()}
    trainer.train()
    assert not torch.equal(start["fc.weight"], trainer.drafter.fc.weight)
    assert torch.equal(start["d2t"], trainer.drafter.d2t)


@pytest.mark.parametrize("changes", [{"packing": True}, {"gradient_accumulation_steps": 4, "batch": 2}], ids=str)
def test_neither_packing_nor_accumulation_changes_the_gradients(taught, answers, tmp_path, changes):
    changes = dict(changes)
    size = changes.pop("batch", 8)
    found = []
    for options in ({}, {**changes, "per_device_train_batch_size": size}):
        args = {"max_steps": 1, "num_anchors": 10**4, "max_grad_norm": 0.0, "train_sampling_strategy": "sequential"}
        args |= {"optim": "sgd", "warmup_steps": 0, "learning_rate": 1.0, "max_length": 10**4}
        trainer = make_trainer(taught, answers[:8], tmp_path, **{**args, **options})
        trainer.train()
        found.append(torch.cat([p.detach().flatten() for p in trainer.drafter.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_stored_states_train_the_same(taught, answers, tmp_path):
    online = make_trainer(taught, answers, tmp_path, max_steps=2, num_anchors=20)
    store_states(taught, answers, tmp_path / "states", online.drafter, dtype=torch.float32)
    states = StoredStates(tmp_path / "states")
    drafter = copy.deepcopy(online.drafter)
    online.train()
    args = block_args(tmp_path, max_steps=2, num_anchors=20)
    stored = Eagle3Trainer(model=drafter, args=args, train_dataset=states.dataset, states=states)
    stored.train()
    for name, value in online.drafter.state_dict().items():
        torch.testing.assert_close(stored.drafter.state_dict()[name], value, rtol=1e-4, atol=1e-5)


REFUSED = {
    "eval_depth": ({"eval_depth": 5}, "eval_depth is 5, and blocks of 4 draft 4 tokens"),
    "fc_norm": ({"fc_norm": True}, "A dspark drafter has no fc_norm"),
    "block_size": ({"block_size": 0}, "block_size must be from 1 to 64"),
    "drafter_version": ({"drafter_version": "medusa"}, "3, 3.1, dflash, dspark"),
    "num_anchors": ({"num_anchors": 0}, "num_anchors"),
    "mask_token_id": ({"mask_token_id": V_TINY}, "mask_token_id must be a token"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_in_words(taught, answers, tmp_path, name):
    changes, words = REFUSED[name]
    with pytest.raises((ValueError, StrictDataclassClassValidationError), match=words):
        make_trainer(taught, answers, tmp_path, **changes)


def test_adapters_of_a_block_drafter_are_refused(taught, answers, tmp_path):
    with pytest.raises(ValueError, match="drafts blocks"):
        Eagle3Trainer(
            target_model=taught, args=block_args(tmp_path), train_dataset=answers, peft_config=types.SimpleNamespace()
        )


# ---- a new drafter ----


def test_a_new_drafter_has_the_fields_of_its_version(taught, answers, tmp_path):
    dflash = make_trainer(taught, answers, tmp_path, "dflash").drafter.config
    assert (dflash.share_lm_head, dflash.drafts_from_root, dflash.markov_rank) == (True, False, 0)
    assert dflash.max_draft_depth == 3
    dspark = make_trainer(taught, answers, tmp_path, draft_vocab_size=40).drafter
    assert (dspark.config.drafts_from_root, dspark.config.has_confidence_head) == (True, True)
    assert (dspark.config.draft_vocab_size, dspark.config.share_lm_head) == (40, False)
    assert torch.equal(dspark.lm_head.weight, taught.lm_head.weight[dspark.draft_to_target_ids])


def test_a_new_drafter_is_as_the_target(target):
    drafter = new_block_drafter(copy.deepcopy(target).float(), block_size=6, drafts_from_root=True, markov_rank=4)
    config = drafter.config
    assert (config.num_hidden_layers, config.hidden_size, config.draft_vocab_size) == (5, H, V)
    assert config.share_lm_head
    assert not config.has_own_embeddings
    assert config.aux_layer_ids == spread_boundaries(NUM_LAYERS, 5) == [2, 3, 4, 5, 6]
    assert drafter.bound_aux_layer_ids == (2, 3, 4, 5, 6)
    assert spread_boundaries(36, 5) == [2, 10, 18, 26, 34]
    assert spread_boundaries(2, 5) == [0, 1, 2]


class Tokens:
    """Stands for a tokenizer with some special tokens."""

    def __init__(self, **ids):
        self.__dict__.update(ids)


@pytest.mark.parametrize(
    ("tokenizer", "token"),
    [
        (None, V - 1),
        (Tokens(mask_token_id=7), 7),
        (Tokens(mask_token_id=None, pad_token_id=9), 9),
        (Tokens(pad_token_id=2, unk_token_id=4), 4),  # padded with what ends a text
        (Tokens(pad_token_id=V + 3), V - 1),
    ],
)
def test_a_mask_token_is_chosen(tokenizer, token, target, monkeypatch):
    monkeypatch.setattr(target.config, "eos_token_id", 2)
    assert choose_mask_token(target.config, tokenizer) == token


# ---- the forecast ----


@pytest.mark.parametrize("kind", KINDS)
def test_the_forecast_counts_the_products(taught, answers, tmp_path, kind):
    """Of weights, to within what is left out; attention has a count of its own."""
    trainer = make_trainer(taught, answers, tmp_path, kind)
    drafter, k = trainer.drafter, trainer.eval_depth
    batch = trainer.data_collator([{name: np.array(x) for name, x in row.items()} for row in answers[:4]])
    states = trainer._source.states(batch)
    method = Method(LOSSES["forward_kl"], torch.ones(k), torch.zeros(k))
    drafter.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        block_step(drafter, batch, states, trainer._source.head, trainer._vocabulary, method)[0].backward()
    counts = counter.get_flop_counts()["Global"]
    found = sum(count for op, count in counts.items() if "bmm" not in str(op))  # attention's are batched
    shape, tokens, share = BlockShape.of(drafter.config), len(batch.input_ids), len(batch.rows) / len(batch.input_ids)
    expected = tokens * replace(shape, heads_width=0).count_flops(PROMPT + NEW, k, share)
    expected += 2 * k * len(batch.rows) * shape.target_width * V_TINY  # the target's head
    assert found == pytest.approx(expected, rel=0.03)
    text = str(trainer.forecast())
    assert "slots train" in text
    assert trainer.forecast().share == pytest.approx(64 / (8 * (PROMPT + NEW)), rel=0.1)


def test_half_precision_arithmetic_comes_near(taught, answers, tmp_path):
    """Losses of an update in bfloat16 arithmetic are those of float32 to its rounding."""
    losses = []
    for bf16 in (False, True):
        trainer = make_trainer(taught, answers, tmp_path, max_steps=4, bf16=bf16, logging_steps=1, num_anchors=10**4)
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != losses[0]
