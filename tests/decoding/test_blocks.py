"""D-Flash and DSpark drafters in both loops: a round's draft comes from one block, and the text is the target's."""

import copy
from dataclasses import replace

import pytest
import torch
from helpers.batches import GREEDY, pad, plain_of, prompts_of
from helpers.blocks import BLOCK_DRAFTERS, make_block_drafter, make_block_oracle
from helpers.capture import capture_on_cpus
from helpers.distributions import TINY_V, assert_distributed_as
from helpers.marks import slow_but
from helpers.models import make_prompt, make_target

from hf_eagle3 import release_graphs
from hf_eagle3.drafters import kinds
from hf_eagle3.drafters.blocks import BLOCKS
from hf_eagle3.drafters.draft import choose_greedy
from hf_eagle3.recorder import StateRecorder
from hf_eagle3.rows.attention import attending_by_rows
from hf_eagle3.speculation.shape import DraftShape, chain
from hf_eagle3.speculation.tree import find_paths

pytestmark = pytest.mark.any_release

KINDS = list(BLOCK_DRAFTERS)
LENGTHS = slow_but([(30, 7, 1, 18)], [(5,), (1,), (30, 7, 1, 18)])
NAMES = ["one_row", "one_token", "ragged"]
TREE = DraftShape((0, 0, 1, 1, 2, 3, 3, 6))


def assert_same(family, lengths, kind, *, depth=3, wrong_share=0.4, **options):
    """A batch with an oracle gives what it gives without; the output."""
    target, batch = make_target(family), pad(prompts_of(*lengths))
    options = {"max_new_tokens": 24, "return_dict_in_generate": True, **GREEDY, **options}
    if options.keys() - {"decode_loop", *GREEDY} == {"max_new_tokens", "return_dict_in_generate"}:
        plain = plain_of(family, lengths, options["max_new_tokens"]).sequences
    else:
        plain = target.generate(**batch, **options).sequences
    oracle = make_block_oracle(target, plain, batch, wrong_share=wrong_share, **BLOCK_DRAFTERS[kind])
    out = target.generate(**batch, assistant_model=oracle, num_assistant_tokens=depth, **options)
    assert out.sequences.tolist() == plain.tolist()
    return out


# ---- greedy text ----


@pytest.mark.sampled(2)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("depth", slow_but([2], [1, 2, 5]))
@pytest.mark.parametrize("kind", ["dflash", "windows", "dspark"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss", "qwen_vlm"])
def test_greedy_rows_are_the_targets(family, kind, depth, lengths):
    out = assert_same(family, lengths, kind, depth=depth)
    assert 1 < out.speculation.acceptance_length < depth + 1


@pytest.mark.parametrize("kind", ["dflash", "dspark"])
@pytest.mark.parametrize("depth", [1, 3, 7])
def test_perfect_draft_is_accepted_whole(kind, depth):
    out = assert_same("llama", (9,), kind, depth=depth, wrong_share=0.0, max_new_tokens=2 * (depth + 1) + 1)
    assert (out.speculation.rounds, out.speculation.acceptance_length) == (2, depth + 1)


@pytest.mark.parametrize("eos", [[11, 25, 37, 41, 52, 7, 13], list(range(3, 60, 3))])
def test_rows_that_are_done_do_no_harm(eos):
    assert_same("llama", (9, 4, 6, 12, 3), "dflash", depth=7, max_new_tokens=70, eos_token_id=eos, pad_token_id=0)


@pytest.mark.parametrize("kind", KINDS)
def test_any_kind_leaves_the_text(target, kind):
    drafter, batch = make_block_drafter(target, kind), pad(prompts_of(20, 7, 1))
    plain = plain_of("llama", (20, 7, 1), 20).sequences.tolist()
    given = {"max_new_tokens": 20, **GREEDY, "assistant_model": drafter}
    for shape in ({"num_assistant_tokens": 6}, {"draft_shape": TREE}, {"draft_shape": "auto"}):
        assert target.generate(**batch, **given, **shape).tolist() == plain
    outputs = target.generate_batch(
        [prompt[0].tolist() for prompt in prompts_of(20, 7, 1)], assistant_model=drafter, max_new_tokens=20
    )
    assert [output.generated_tokens for output in outputs.values()] == [row[20:] for row in plain]


# ---- what is drafted ----


def draft_afresh(target, drafter, text, length: int, depth: int) -> list[int]:
    """The greedy draft behind the first `length` tokens of `text` [S], without a cache, token by token."""
    config = drafter.config
    with torch.no_grad(), StateRecorder(target, drafter.bound_aux_layer_ids) as recorder:
        target(text[None, : length - 1], use_cache=False)
        states = recorder.take(drafter.device)  # [1, S, A*Ht]
        ids = drafter.make_block(text[length - 1 : length], depth + (not config.drafts_from_root))
        out = drafter(input_ids=ids, aux_hidden_states=states)
        tokens, state = [int(text[length - 1])], None
        for t in range(-depth, 0):
            before = torch.tensor(tokens[-1])
            scores, state = drafter.add_markov(out.logits[0, t], before, out.hidden_states[0, t], state)
            tokens.append(int(drafter.to_target_ids(scores.argmax(-1))))
    return tokens[1:]


@pytest.mark.parametrize("loop", ["own", "host"])
@pytest.mark.parametrize("kind", KINDS)
def test_drafts_are_those_of_a_fresh_forward(target, monkeypatch, kind, loop):
    drafter, seen = make_block_drafter(target, kind), []

    def spy(drafter, memory, shape, choose):
        before = memory.over(memory.cache)
        out = BLOCKS.propose(drafter, memory, shape, choose)
        assert all(torch.equal(getattr(memory, name), getattr(before, name)) for name in memory.TENSORS)
        roots = memory.tokens.gather(1, memory.num_pending[:, None] - 1)[:, 0]
        length = memory.first + memory.start + memory.num_pending + 1
        seen.append((length.tolist(), roots.tolist(), out.tokens.tolist()))
        return out

    monkeypatch.setattr(kinds, "KINDS", [replace(BLOCKS, propose=spy)])
    lengths = (12, 3, 7) if loop == "own" else (9,)
    options = {"num_assistant_tokens": 4, "max_new_tokens": 15, "decode_loop": loop, **GREEDY}
    options["return_dict_in_generate"] = True  # keeps rows that are done
    target.generate(**pad(prompts_of(*lengths)), assistant_model=drafter, **options)
    plain = target.generate(
        **pad(prompts_of(*lengths)), max_new_tokens=30, **GREEDY
    )  # a last round may draft behind the end
    texts = [row[max(lengths) - n :] for row, n in zip(plain, lengths, strict=True)]
    assert len(seen) > 5
    for places, roots, drafts in seen:
        for text, n, length, root, tokens in zip(texts, lengths, places, roots, drafts, strict=True):
            if length > n + 15:
                continue  # a row that is done goes on over junk
            assert text[length - 1] == root
            assert tokens == draft_afresh(target, drafter, text, length, len(tokens))


@pytest.mark.parametrize("attention", ["masks", "rows"])
@pytest.mark.parametrize("kind", ["dflash", "windows", "dspark", "gated", "rnn"])
def test_each_node_is_drafted_as_if_its_path_were_a_chain(target, monkeypatch, kind, attention):
    drafter, shape, seen = make_block_drafter(target, kind), TREE, []

    def spy(drafter, memory, given, choose):
        """The tree's tokens, and for each node the choice behind it along a chain of the same depth."""
        with attending_by_rows(drafter) if attention == "rows" else torch.no_grad():
            tokens = BLOCKS.propose(drafter, memory, shape, choose_greedy).tokens  # [B, N]
            for node, path in enumerate(find_paths(shape.parents)):
                way = [n for n in dict.fromkeys(path) if n]
                children = [n for n, parent in enumerate(shape.parents, start=1) if parent == node]
                if not children:
                    continue
                scores, forced = [], [tokens[:, n - 1] for n in way]

                def follow(logits, depths, width, scores=scores, forced=forced):
                    rows = []
                    for t, depth in enumerate(depths if len(depths) == logits.shape[1] else [depths.start]):
                        scores.append(logits[:, t])
                        wanted = (
                            forced[depth]
                            if depth < len(forced)
                            else drafter.draft_to_target_ids[:1].expand(len(logits))
                        )
                        rows.append((drafter.draft_to_target_ids == wanted[:, None]).long().argmax(-1))
                    return torch.stack(rows, dim=1)[..., None], None

                BLOCKS.propose(drafter, memory, chain(shape.depth), follow)
                best = scores[len(way)].topk(len(children)).indices
                ours = tokens[:, [n - 1 for n in children]]
                seen.append(ours.tolist() == drafter.to_target_ids(best).tolist())
        return BLOCKS.propose(drafter, memory, given, choose)

    monkeypatch.setattr(kinds, "KINDS", [replace(BLOCKS, propose=spy)])
    options = {"num_assistant_tokens": shape.depth, "max_new_tokens": 8, "decode_loop": "eager", **GREEDY}
    target.generate(**pad(prompts_of(9, 5)), assistant_model=drafter, **options)
    assert len(seen) > 10
    assert all(seen)


def test_a_round_is_one_forward_of_the_drafter(target):
    drafter, calls = make_block_drafter(target), []
    drafter.norm.register_forward_hook(lambda *_: calls.append(1))
    options = {"num_assistant_tokens": 6, "max_new_tokens": 20, "return_dict_in_generate": True, **GREEDY}
    out = target.generate(make_prompt(1), assistant_model=drafter, decode_loop="own", **options)
    assert len(calls) == out.speculation.rounds + 1  # in the last no draft token had room


def test_blocks_are_no_longer_than_trained(target):
    drafter = make_block_drafter(target)
    with pytest.raises(ValueError, match=r"num_assistant_tokens asks for 8 draft tokens .* blocks of 8 have 7"):
        target.generate(make_prompt(4), assistant_model=drafter, num_assistant_tokens=8)
    from_root = make_block_drafter(target, "dspark")
    target.generate(make_prompt(4), assistant_model=from_root, num_assistant_tokens=8, max_new_tokens=4)


# ---- sampling ----


@pytest.mark.parametrize("kind", ["own_vocabulary", "dspark", "rnn"])
def test_samples_have_the_targets_distribution(kind):
    """Three tokens behind a prompt, thousands of rows at once, by the ratio test."""
    torch.manual_seed(5)
    target = make_target("llama")
    prompt, options = make_prompt(6), {"do_sample": True, "top_k": TINY_V, "temperature": 1.3, "max_new_tokens": 2}
    with torch.no_grad():
        first = target(prompt).logits[0, -1] / 1.3
        top = first.topk(TINY_V).indices  # [8]
        p = first[top].softmax(-1)
        nexts = torch.cat([torch.cat([prompt, token.view(1, 1)], dim=1) for token in top])
        second = target(nexts).logits[:, -1] / 1.3  # [8, V]
        tops = second.topk(TINY_V, dim=-1).indices
        joint = p[:, None] * second.gather(1, tops).softmax(-1)  # [8, 8]
    drafter = make_block_drafter(target, kind)
    rows = prompt.expand(4000, -1)
    out = target.generate(rows, assistant_model=drafter, num_assistant_tokens=2, **options)[:, 6:]
    i = (out[:, :1] == top).long().argmax(-1)
    assert (out[:, :1] == top).any(-1).all()
    j = (out[:, 1:] == tops[i]).long().argmax(-1)
    assert_distributed_as(torch.stack([i, j], dim=1), joint)


# ---- graphs ----


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("kind", ["dflash", "causal", "windows", "dspark", "rnn"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_captured_rounds(family, kind, lengths, counts):
    out = assert_same(family, lengths, kind, decode_loop="own")
    assert 1 < out.speculation.acceptance_length < 4
    assert out.speculation.graphs.startswith("captured in")
    assert counts.captured == 3


@pytest.mark.parametrize("kind", ["own_vocabulary", "dspark"])
def test_captured_sampling_draws_the_same_numbers(target, monkeypatch, kind):
    batch, drafter, runs = pad(prompts_of(5, 3)), make_block_drafter(target, kind), []
    counts = capture_on_cpus(monkeypatch, rounds_in_flight=0)
    for loop in ("own", "own", "eager"):
        torch.manual_seed(3)
        options = {"do_sample": True, "top_k": 5, "max_new_tokens": 20, "decode_loop": loop}
        options["return_dict_in_generate"] = True  # keeps rows that are done
        options["num_assistant_tokens"] = 3
        runs.append(target.generate(**batch, assistant_model=drafter, **options).sequences.tolist())
    assert runs[0] == runs[1] == runs[2]
    assert counts.captured == 3


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(5,), (30, 7, 1, 18)], ids=["one_row", "ragged"])
@pytest.mark.parametrize("kind", KINDS)
def test_captured_rounds_on_a_gpu(kind, lengths):
    target = copy.deepcopy(make_target("llama")).cuda()
    batch = {name: value.cuda() for name, value in pad(prompts_of(*lengths)).items()}
    plain = target.generate(**batch, max_new_tokens=24, **GREEDY)
    drafter = make_block_drafter(target, kind).cuda()
    options = {"max_new_tokens": 24, "return_dict_in_generate": True, "num_assistant_tokens": 5, **GREEDY}
    for loop in ("own", "own", "eager", "host") if len(lengths) == 1 else ("own", "own", "eager"):
        out = target.generate(**batch, assistant_model=drafter, decode_loop=loop, **options)
        assert out.sequences.tolist() == plain.tolist()
        if loop == "own":
            assert out.speculation.graphs.startswith(("captured", "replayed"))
    release_graphs()
