"""P-EAGLE drafters in both loops: a round's draft comes from one forward, and the text is the target's."""

import copy
from dataclasses import replace

import pytest
import torch
from helpers.batches import GREEDY, assert_same, pad, plain_of, prompts_of
from helpers.capture import capture_on_cpus
from helpers.marks import slow_but
from helpers.models import DRAFTERS, H, V, make_drafter, make_prompt, make_target

from hf_eagle3 import release_graphs
from hf_eagle3.drafters import kinds
from hf_eagle3.drafters.draft import Committed, DrafterMemory, choose_greedy
from hf_eagle3.drafters.parallel import PARALLEL as PARALLEL_KIND
from hf_eagle3.modeling.fields_eagle3 import FIELD_NAMES
from hf_eagle3.recorder import StateRecorder
from hf_eagle3.rows.cache import RowCache
from hf_eagle3.speculation.shape import chain
from hf_eagle3.training import Eagle3Trainer, Eagle3TrainingArguments

pytestmark = pytest.mark.any_release

PARALLEL = DRAFTERS["peagle"]
WINDOW = {**PARALLEL, "sliding_window": 6, "norm_before_fc": True}


# ---- greedy text ----


@pytest.mark.parametrize(
    "lengths", slow_but([(30, 7, 1, 18)], [(5,), (1,), (30, 7, 1, 18)]), ids=["one_row", "one_token", "ragged"]
)
@pytest.mark.parametrize("depth", slow_but([2], [1, 2, 5]))
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss", "qwen_vlm"])
def test_greedy_rows_are_the_targets(family, depth, lengths):
    options = {"drafter_options": PARALLEL, "max_new_tokens": 24, "plain": plain_of(family, lengths, 24)}
    _, out = assert_same(make_target(family), pad(prompts_of(*lengths)), depth=depth, **options)
    assert 1 < out.speculation.acceptance_length < depth + 1


@pytest.mark.parametrize("depth", [1, 3, 8])
def test_perfect_draft_is_accepted_whole(depth):
    target, batch = make_target("llama"), pad(prompts_of(9))
    options = {"wrong_share": 0.0, "drafter_options": PARALLEL, "max_new_tokens": 2 * (depth + 1) + 1}
    _, out = assert_same(target, batch, depth=depth, **options)
    assert (out.speculation.rounds, out.speculation.acceptance_length) == (2, depth + 1)


@pytest.mark.parametrize("eos", [[11, 25, 37, 41, 52, 7, 13], list(range(3, 60, 3))])
@pytest.mark.parametrize("depth", [3, 20])
def test_rows_that_are_done_do_no_harm(target, depth, eos):
    batch = pad(prompts_of(9, 4, 6, 12, 3))
    options = {"max_new_tokens": 70, "eos_token_id": eos, "drafter_options": PARALLEL}
    assert_same(target, batch, depth=depth, **options)


def test_a_row_that_is_done_stays_in_the_cache(target):
    """It goes on over junk, K+1 positions a round, and a round is 2K wide."""
    K, drafter = 5, make_drafter(target, **PARALLEL)
    cache, zeros = RowCache(drafter.config.num_hidden_layers, 64), torch.zeros(2, dtype=torch.long)
    states, tokens = torch.randn(2, K + 1, 3 * H), torch.randint(V, (2, K + 1))
    start, pending = torch.tensor([64 - K, 13]), torch.tensor([1, K + 1])
    memory = DrafterMemory(tokens.clone(), states.clone(), pending, start, zeros, chain(K).num_drafter_slots, cache)
    PARALLEL_KIND.catch_up(memory, Committed(tokens, states, torch.tensor([1, K + 1])), chain(K))
    with torch.no_grad():
        draft = PARALLEL_KIND.propose(drafter, memory, chain(K), choose_greedy)
    assert draft.tokens.shape == (2, K)
    at = 13 + K + 1
    assert cache.layers[0].keys[1, :at].count_nonzero() == 0
    assert cache.layers[0].keys[1, at:][: 2 * K].all()
    assert cache.layers[0].keys[0, 64 - 2 * K - 2 :][: 2 * K].all()


# ---- what is drafted ----


def draft_afresh(target, drafter, text, position: int, depth: int) -> list[int]:
    """The greedy draft after `text` [S] up to `position` + 1, without a cache: states so far, then masks."""
    with torch.no_grad(), StateRecorder(target, drafter.bound_aux_layer_ids) as recorder:
        target(text[None, : position + 1], use_cache=False)
        states = recorder.take(drafter.device)  # [1, S, A*Ht]
        ids = torch.cat(
            [text[None, 1 : position + 2], torch.full((1, depth - 1), drafter.config.mask_token_id)], dim=1
        )
        states = torch.cat([states, drafter.mask_hidden.expand(1, depth - 1, -1)], dim=1)
        logits = drafter(ids, aux_hidden_states=states).logits[0, -depth:]
    return drafter.to_target_ids(logits.argmax(-1)).tolist()


@pytest.mark.parametrize("overrides", [PARALLEL, WINDOW], ids=["full", "window"])
def test_drafts_of_our_loop_are_those_of_a_fresh_forward(target, monkeypatch, overrides):
    drafter, seen = make_drafter(target, **overrides), []
    drafter.generation_config.decode_loop = "own"

    def spy(drafter, memory, *args):
        out = PARALLEL_KIND.propose(drafter, memory, *args)
        roots = memory.tokens.gather(1, memory.num_pending[:, None] - 1)[:, 0]
        length = memory.first + memory.start + memory.num_pending + 1
        seen.append((length.tolist(), roots.tolist(), out.tokens.tolist()))
        return out

    monkeypatch.setattr(kinds, "KINDS", [replace(PARALLEL_KIND, propose=spy)])
    batch = pad(prompts_of(12, 3, 7))
    options = {"num_assistant_tokens": 4, "max_new_tokens": 15, "return_dict_in_generate": True, **GREEDY}
    out = target.generate(**batch, assistant_model=drafter, **options)
    plain = target.generate(**batch, max_new_tokens=30, **GREEDY)  # a last round may draft behind the end
    texts = [row[12 - n :] for row, n in zip(plain, (12, 3, 7), strict=True)]
    assert 5 < len(seen) < out.speculation.rounds
    for lengths, roots, drafts in seen:
        for text, length, root, tokens in zip(texts, lengths, roots, drafts, strict=True):
            assert text[length - 1] == root
            assert tokens == draft_afresh(target, drafter, text, length - 2, 4)


@pytest.mark.parametrize("overrides", [PARALLEL, WINDOW], ids=["full", "window"])
def test_drafts_of_the_hosts_loop_are_those_of_a_fresh_forward(target, monkeypatch, overrides):
    drafter, seen = make_drafter(target, **overrides), []

    def spy(drafter, memory, *args):
        before = memory.over(memory.cache)
        out = PARALLEL_KIND.propose(drafter, memory, *args)
        assert all(torch.equal(getattr(memory, name), getattr(before, name)) for name in memory.TENSORS)
        seen.append((int(memory.first + memory.start + memory.num_pending) - 1, out.tokens[0].tolist()))
        return out

    monkeypatch.setattr(kinds, "KINDS", [replace(PARALLEL_KIND, propose=spy)])
    prompt = make_prompt(9)
    options = {"num_assistant_tokens": 4, "max_new_tokens": 15, "decode_loop": "host", **GREEDY}
    text = target.generate(prompt, assistant_model=drafter, **options)[0]
    assert len(seen) > 5
    for position, tokens in seen:
        assert tokens == draft_afresh(target, drafter, text, position, len(tokens))


def test_a_round_is_one_forward_of_the_drafter(target):
    drafter, calls = make_drafter(target, **PARALLEL), []
    drafter.generation_config.decode_loop = "own"
    drafter.norm.register_forward_hook(lambda *_: calls.append(1))
    options = {"num_assistant_tokens": 6, "max_new_tokens": 20, "return_dict_in_generate": True, **GREEDY}
    out = target.generate(make_prompt(1), assistant_model=drafter, **options)
    assert len(calls) == out.speculation.rounds + 1  # in the last no draft token had room


# ---- graphs ----


@pytest.mark.parametrize(
    "lengths", slow_but([(30, 7, 1, 18)], [(5,), (1,), (30, 7, 1, 18)]), ids=["one_row", "one_token", "ragged"]
)
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen_vlm"])
def test_captured_rounds(family, lengths, counts):
    batch = pad(prompts_of(*lengths))
    _, out = assert_same(make_target(family), batch, drafter_options=PARALLEL, max_new_tokens=24)
    assert 1 < out.speculation.acceptance_length < 4
    assert out.speculation.graphs.startswith("captured in")
    assert counts.captured == 3


@pytest.mark.slow
@pytest.mark.parametrize("depth", [3, 20])
def test_captured_rounds_over_growing_memory_and_shrinking_batches(target, monkeypatch, depth):
    counts = capture_on_cpus(monkeypatch, first_room=16, worth_capture=20)
    batch = pad(prompts_of(50, 4, 60, 12, 3))
    options = {"drafter_options": PARALLEL, "max_new_tokens": 100, "eos_token_id": [11, 25, 37, 41]}
    assert_same(target, batch, depth=depth, **options)
    drafter = make_drafter(target, **PARALLEL)
    drafter.generation_config.num_assistant_tokens = depth
    options = {"max_new_tokens": 100, "eos_token_id": [11, 25, 37, 41], **GREEDY}
    plain = target.generate(**batch, **options)
    assert target.generate(**batch, assistant_model=drafter, **options).tolist() == plain.tolist()
    assert counts.captured > 6


def test_captured_sampling_draws_the_same_numbers(target, monkeypatch):
    batch, drafter, runs = pad(prompts_of(5, 3)), make_drafter(target, **PARALLEL), []
    counts = capture_on_cpus(monkeypatch, rounds_in_flight=0)
    for loop in ("own", "own", "eager"):
        torch.manual_seed(3)
        options = {"do_sample": True, "top_k": 5, "max_new_tokens": 20, "decode_loop": loop}
        options["return_dict_in_generate"] = True  # keeps rows that are done
        runs.append(target.generate(**batch, assistant_model=drafter, **options).sequences.tolist())
    assert runs[0] == runs[1] == runs[2]
    assert counts.captured == 3


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(5,), (30, 7, 1, 18)], ids=["one_row", "ragged"])
def test_captured_rounds_on_a_gpu(lengths):
    target = copy.deepcopy(make_target("llama")).cuda()
    batch = {name: value.cuda() for name, value in pad(prompts_of(*lengths)).items()}
    plain = target.generate(**batch, max_new_tokens=24, **GREEDY)
    drafter = make_drafter(target, **PARALLEL).cuda()
    options = {"max_new_tokens": 24, "return_dict_in_generate": True, **GREEDY}
    for loop in ("own", "own", "eager", "host") if len(lengths) == 1 else ("own", "own", "eager"):
        out = target.generate(**batch, assistant_model=drafter, decode_loop=loop, **options)
        assert out.sequences.tolist() == plain.tolist()
        if loop == "own":
            assert out.speculation.graphs.startswith(("captured", "replayed"))
    release_graphs()


# ---- what is refused ----


@pytest.mark.parametrize("token", [-1, 64])
def test_mask_token_outside_the_vocabulary(target, token):
    with pytest.raises(Exception, match="mask_token_id must be a token of the target's vocabulary of 64"):
        make_drafter(target, mask_token_id=token)


@pytest.mark.parametrize("overrides", [{"use_aux_hidden_state": False}, DRAFTERS["mla"]], ids=["no_fc", "mla"])
def test_no_such_network(target, overrides):
    with pytest.raises(Exception, match="No P-EAGLE drafter"):
        make_drafter(target, mask_token_id=3, **overrides)


def test_other_drafters_have_no_mask(target):
    drafter = make_drafter(target)
    assert not drafter.config.is_parallel
    assert not any("mask" in name for name, _ in drafter.named_parameters())
    assert "mask_token_id" in FIELD_NAMES


def test_training_is_refused(target, tmp_path):
    args = Eagle3TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    drafter = make_drafter(target, **PARALLEL)
    with pytest.raises(ValueError, match="mask_token_id=61: a P-EAGLE drafter has no later steps"):
        Eagle3Trainer(drafter, target, args, train_dataset=[])
