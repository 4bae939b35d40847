"""Training of D-Flash and DSpark drafters: against the definition, against what is served, and whether it learns."""

import copy
import math

import numpy as np
import pytest
import torch
from helpers.blocks import BLOCK_DRAFTERS, make_block_drafter
from helpers.models import NUM_LAYERS, H, V, make_prompt, make_target
from helpers.reference_blocks import markov_bias
from helpers.reference_drafter import in_float64
from helpers.training import make_args
from torch.nn import functional as F
from transformers import AutoModel

from hf_eagle3 import Eagle3Trainer
from hf_eagle3.drafters.blocks import BLOCKS
from hf_eagle3.drafters.draft import Committed, Prompted
from hf_eagle3.modeling import DFlashDrafterModel
from hf_eagle3.speculation.shape import Shapes, chain
from hf_eagle3.training.new_drafter import choose_mask_token, new_block_drafter, spread_boundaries
from hf_eagle3.training.states.online import OnlineStates
from hf_eagle3.training.step import blocks
from hf_eagle3.training.step.batch import AnchorCollator
from hf_eagle3.training.step.blocks import find_anchors, run_anchors, train_blocks
from hf_eagle3.training.step.head_loss import Method
from hf_eagle3.training.step.losses import LOSSES
from hf_eagle3.training.step.target_head import DraftVocabulary

KINDS = list(BLOCK_DRAFTERS)


def make_rows(*lengths, prompt=5):
    """Rows whose tokens behind the prompt the target is said to have generated; the second half of one is a new turn."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length in lengths:
        mask = np.arange(length) >= prompt
        if length > 20:
            mask[12:15] = False
        ids = torch.randint(3, 60, (length,), generator=generator).numpy()
        rows.append({"input_ids": ids, "loss_mask": mask})
    return rows


@pytest.fixture
def exact():
    """A target in float64."""
    return copy.deepcopy(make_target("llama")).double()


def make_method(loss, scale):
    return Method(LOSSES[loss], scale, torch.full_like(scale, 0.3))


# ---- the definition ----


def define(drafter, target, rows, loss_name, scale):
    """The loss by documents, slots and depths, each block by itself."""
    config, D, total = drafter.config, drafter.config.max_draft_depth, 0.0
    weights = dict(drafter.named_parameters())
    counts = torch.zeros(len(scale), dtype=torch.long)
    correct = torch.zeros(len(scale), dtype=torch.long)
    for row in rows:
        ids, mask = torch.from_numpy(row["input_ids"]), torch.from_numpy(row["loss_mask"])
        with torch.no_grad():
            out = target(ids[None], output_hidden_states=True)
        states = torch.cat([out.hidden_states[i] for i in drafter.bound_aux_layer_ids], dim=-1)  # [1, T, A*Ht]
        for i in range(len(ids)):
            depth = 0
            while depth < len(scale) and i + 2 + depth < len(ids) and mask[i + 1 : i + 3 + depth].all():
                depth += 1
            if not depth:
                continue
            block = drafter.make_block(ids[i + 1 : i + 2], D if config.drafts_from_root else D + 1)
            run = drafter(input_ids=block, aux_hidden_states=states[:, : i + 1])
            outputs, logits = run.hidden_states[0, -D:], run.logits[0, -D:]
            before = [int(x) for x in ids[i + 1 : i + 1 + depth]]
            logits = logits[:depth]
            if config.markov_rank:
                logits = logits + markov_bias(weights, config.markov_head_type, before, outputs[:depth])
            draft_ids = drafter.draft_to_target_ids
            for t in range(depth):
                log_p = out.logits[0, i + 1 + t].log_softmax(-1)
                best = int(log_p.argmax())
                can = (draft_ids == best).nonzero()
                alpha = torch.minimum(log_p[draft_ids].exp(), logits[t].softmax(-1)).sum()
                ce = F.cross_entropy(logits[t], can[0, 0]) if len(can) else logits.new_zeros(())
                kept = log_p[draft_ids].log_softmax(-1)
                kl = (kept.exp() * (kept - logits[t].log_softmax(-1))).sum() * bool(len(can))
                value = {"cross_entropy": ce, "forward_kl": kl, "total_variation": 1 - alpha}
                value["ce_tv"] = 0.1 * ce + 0.9 * (2 - 2 * alpha)
                total = total + scale[t] * value[loss_name]
                counts[t] += 1
                correct[t] += int(draft_ids[logits[t].argmax()]) == best
                if config.has_confidence_head:
                    said = drafter.find_confidence(torch.tensor(before[t]), outputs[t])
                    total = total + scale[t] * F.binary_cross_entropy_with_logits(said, alpha.detach())
    return total, counts, correct


@pytest.mark.parametrize(
    ("kind", "loss"),
    [
        *((kind, "ce_tv") for kind in KINDS),
        *(("dspark", loss) for loss in ("cross_entropy", "forward_kl", "total_variation")),
    ],
)
def test_loss_and_gradients_are_those_of_the_definition(kind, loss, exact, monkeypatch):
    monkeypatch.setattr(blocks, "MASK_ELEMENTS", 8 * 80 * 5)  # several forwards
    rows = make_rows(13, 24, 7)
    drafter = make_block_drafter(exact, kind)
    with in_float64(drafter):
        drafter.requires_grad_(True)
        scale = 0.8 ** torch.arange(drafter.config.max_draft_depth, dtype=torch.float64)
        batch = AnchorCollator(len(scale))(rows)
        source, vocabulary = (
            OnlineStates(exact, drafter.bound_aux_layer_ids),
            DraftVocabulary(drafter.draft_to_target_ids, V),
        )
        total, sums = train_blocks(
            drafter, batch, source.states(batch), source.head, vocabulary, make_method(loss, scale)
        )
        wanted, counts, correct = define(drafter, exact, rows, loss, scale)
        torch.testing.assert_close(total, wanted, rtol=1e-10, atol=1e-10)
        assert sums.num_live.tolist() == counts.tolist()
        assert sums.correct.tolist() == correct.tolist()
        ours = torch.autograd.grad(total, list(drafter.parameters()), allow_unused=True)
        theirs = torch.autograd.grad(wanted, list(drafter.parameters()), allow_unused=True)
    for (name, _), a, b in zip(drafter.named_parameters(), ours, theirs, strict=True):
        wanted = torch.zeros_like(a) if b is None else b
        torch.testing.assert_close(a, wanted, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_what_is_trained_is_what_is_served(kind, exact):
    """The logits of each block, at each anchor of packed documents, are those of a draft behind that much text."""
    drafter = make_block_drafter(exact, kind)
    with in_float64(drafter):
        D = drafter.config.max_draft_depth
        rows = make_rows(9, 14)
        batch = AnchorCollator(D)(rows)
        states = OnlineStates(exact, drafter.bound_aux_layer_ids).states(batch)
        anchors, _ = find_anchors(batch)
        outputs = run_anchors(drafter, batch, states.aux_hidden_states, anchors)  # [D, L, H]
        starts = np.cumsum([0, *batch.lengths])
        for j, slot in enumerate(anchors.tolist()):
            start = int(starts[np.searchsorted(starts, slot, side="right") - 1])
            seen = []

            def choose(logits, depths, width, seen=seen):
                seen.append(logits)
                return logits.topk(width, dim=-1).indices, None

            text, count = batch.input_ids[None, start : slot + 1], torch.tensor([slot + 1 - start])
            prompted = Prompted(text, states.aux_hidden_states[None, start : slot + 1], count, torch.zeros_like(count))
            memory = BLOCKS.begin(drafter, prompted, Shapes((chain(D),)))
            root = batch.input_ids[None, slot + 1 : slot + 2]
            BLOCKS.catch_up(memory, Committed(root, None, torch.ones_like(count)), chain(D))
            memory.cache.reserve(64)
            BLOCKS.propose(drafter, memory, chain(D), choose)
            first = seen[0][0, 0]
            wanted = drafter.compute_logits(outputs[0, j])
            if drafter.config.markov_rank:
                wanted, _ = drafter.add_markov(wanted, root[0, 0], outputs[0, j], None)
            torch.testing.assert_close(first, wanted, rtol=1e-9, atol=1e-9)
            if not drafter.config.markov_rank:
                torch.testing.assert_close(seen[0][0], drafter.compute_logits(outputs[:, j]), rtol=1e-9, atol=1e-9)


def test_some_anchors_are_drawn():
    rows = make_rows(40, 30)
    every = AnchorCollator(7)(rows)
    torch.manual_seed(0)
    some, others = AnchorCollator(7, num_anchors=9)(rows), AnchorCollator(7, num_anchors=9)(rows)
    assert len(some.rows) == len(others.rows) == 9 < len(every.rows)
    assert some.rows.tolist() != others.rows.tolist()
    depths = dict(zip(every.rows.tolist(), every.depth.tolist(), strict=True))
    assert all(depths[slot] == depth for slot, depth in zip(some.rows.tolist(), some.depth.tolist(), strict=True))
    assert len(AnchorCollator(7, num_anchors=900)(rows).rows) == len(every.rows)


# ---- new drafters ----


def test_a_new_drafter_is_as_the_target(exact):
    drafter = new_block_drafter(exact.float(), block_size=6, drafts_from_root=True, markov_rank=4)
    config = drafter.config
    assert (config.num_hidden_layers, config.hidden_size, config.draft_vocab_size) == (5, H, V)
    assert config.share_lm_head
    assert not config.has_own_embeddings
    assert config.aux_layer_ids == spread_boundaries(NUM_LAYERS) == [2, 3, 4, 5, 6]
    assert drafter.bound_aux_layer_ids == (2, 3, 4, 5, 6)
    assert spread_boundaries(36) == [2, 10, 18, 26, 34]
    assert spread_boundaries(2) == [0, 1, 2]


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
def test_a_mask_token_is_chosen(tokenizer, token, exact):
    exact.config.eos_token_id = 2
    assert choose_mask_token(exact.config, tokenizer) == token


# ---- training ----


def make_answers(target, count=6, length=24):
    prompts = torch.randint(3, 60, (count, 6), generator=torch.Generator().manual_seed(3))
    ids = target.generate(prompts, max_new_tokens=length, do_sample=False)
    return [{"input_ids": row.tolist(), "loss_mask": [0] * 6 + [1] * length} for row in ids]


SETTINGS = {
    "max_steps": 90,
    "learning_rate": 1e-2,
    "block_size": 4,
    "num_hidden_layers": 2,
    "markov_rank": 8,
    "per_device_train_batch_size": 6,
    "eval_generate_prompts": 6,
    "eval_max_new_tokens": 24,
}


@pytest.mark.parametrize(("version", "loss", "depth"), [("dflash", "cross_entropy", 3), ("dspark", "ce_tv", 4)])
def test_it_learns_and_what_it_learnt_is_decoded(version, loss, depth, tmp_path):
    target = make_target("llama")
    rows = make_answers(target)
    args = make_args(tmp_path, drafter_version=version, loss_type=loss, eval_depth=depth, **SETTINGS)
    trainer = Eagle3Trainer(target_model=target, args=args, train_dataset=rows, eval_dataset=rows)
    assert type(trainer.drafter) is DFlashDrafterModel
    assert args.ttt_steps == depth
    assert " trained weights" in str(trainer.forecast())
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_acceptance_length"] < 1.3
    assert after["eval_acceptance_length"] > 1.8
    # Answers are the target's own: rounds walked along them are those that are decoded.
    assert math.isclose(after["eval_walked_acceptance_length"], after["eval_acceptance_length"], rel_tol=0.05)
    assert after[f"eval_loss_{depth - 1}"] < before[f"eval_loss_{depth - 1}"]
    trainer.save_model(tmp_path / "saved")
    again = AutoModel.from_pretrained(tmp_path / "saved").bind(target)
    for name, weight in trainer.drafter.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)
    prompt = make_prompt(6)
    plain = target.generate(prompt, max_new_tokens=12, do_sample=False)
    assert target.generate(prompt, max_new_tokens=12, do_sample=False, assistant_model=again).equal(plain)


def test_a_run_goes_on_where_it_stopped(tmp_path):
    target = make_target("llama")
    rows = make_answers(target)
    settings = {**SETTINGS, "max_steps": 6, "num_anchors": 20, "per_device_train_batch_size": 2, "warmup_steps": 0}

    def train(folder, **further):
        args = make_args(tmp_path / folder, drafter_version="dspark", save_strategy="steps", save_steps=3, **settings)
        trainer = Eagle3Trainer(target_model=target, args=args, train_dataset=rows)
        trainer.train(**further)
        return trainer.drafter.state_dict(), args.output_dir

    whole, folder = train("whole")
    resumed, _ = train("again", resume_from_checkpoint=f"{folder}/checkpoint-3")
    for name, weight in whole.items():
        torch.testing.assert_close(resumed[name], weight, rtol=1e-5, atol=1e-6)


def test_a_drafter_that_is_given_trains_on(tmp_path):
    target = make_target("llama")
    rows, drafter = make_answers(target), make_block_drafter(target, "gated")
    before = {name: weight.clone() for name, weight in drafter.state_dict().items()}
    args = make_args(tmp_path, packing=True, ema_decay=0.5, **{**SETTINGS, "max_steps": 2})
    trainer = Eagle3Trainer(drafter, target, args=args, train_dataset=rows)
    trainer.train()
    changed = {name for name, weight in trainer.drafter.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed >= {"fc.weight", "markov_head.markov_w2.weight", "layers.1.self_attn.q_proj.weight"}
    assert "d2t" not in changed


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"loss_type": "expected_acceptance"}, "loss_type expected_acceptance is one over the steps of a chain"),
        ({"eval_depth": 5}, "eval_depth is 5, and blocks of 4 draft 3 tokens"),
        ({"fc_norm": True}, "A dflash drafter has no fc_norm"),
        ({"block_size": 1}, "block_size must be from 2 to 64"),
        ({"mask_token_id": V}, "mask_token_id must be a token"),
    ],
)
def test_what_blocks_do_not_have_is_refused(options, says, tmp_path):
    target = make_target("llama")
    args = make_args(tmp_path, drafter_version="dflash", **{**SETTINGS, "eval_depth": 3, **options})
    with pytest.raises(Exception, match=says):
        Eagle3Trainer(target_model=target, args=args, train_dataset=make_answers(target, 2))
