"""`generate(seed=...)`: from a seed comes one text, with and without a draft, in any batch and by any loop."""

import copy
import itertools

import pytest
import torch
from helpers.batches import pad, prompts_of
from helpers.capture import capture_on_cpus
from helpers.marks import slow_but, slow_rows_but
from helpers.models import DRAFTERS, make_drafter, make_prompt, make_target
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from hf_eagle3 import release_graphs
from hf_eagle3.host.seeds import resolve_seeds, seeds_of_rows
from hf_eagle3.speculation.shared_noise import MAX_SEED, make_bits, make_keys

HOT = {"do_sample": True, "temperature": 1.2, "top_k": 0, "max_new_tokens": 16}
TREE = {"draft_shape": (0, 0, 1, 1, 2, 3, 3)}


class Looks(LogitsProcessor):
    """Looks at the text: bans the last token but one."""

    def __call__(self, input_ids, scores):
        return scores.scatter(1, input_ids[:, -2:-1], -torch.inf)


def say(target, drafter, batch, **options):
    out = target.generate(**batch, assistant_model=drafter, **{**HOT, **options})
    return out[:, batch["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("num_calls", slow_but([1], [1, 16]))
@pytest.mark.parametrize("family", slow_but(["llama"], ["llama", "gemma3", "gpt_oss"]))
def test_seeded_calls_are_equal_with_and_without_a_drafter(family, num_calls):
    """Rows of many lengths, chains and trees, as they would be called one by one: 63 rows, or a thousand."""
    target = make_target(family)
    drafters = [make_drafter(target, **DRAFTERS[kind]) for kind in ("reduced_vocab", "peagle")]
    for call in range(num_calls):
        batch = pad(prompts_of(*(3 + (5 * b + call) % 17 for b in range(21))))
        options = {"seed": 1000 * call, "temperature": 0.6 + 0.1 * call, "top_k": 50 - 3 * call}
        plain = say(target, drafters[0], batch, num_assistant_tokens=0, **options)
        assert len({tuple(row) for row in plain}) == 21
        for shape, drafter in [({"num_assistant_tokens": 2}, 0), (TREE, 0), (TREE, 1)]:
            assert say(target, drafters[drafter], batch, **shape, **options) == plain


@pytest.mark.parametrize(
    ("looks", "options"),
    slow_rows_but(
        [(False, {}), (True, {"top_k": 20, "top_p": 0.9})],
        itertools.product([False, True], [{}, {"top_k": 20, "top_p": 0.9}, {"min_p": 0.02}]),
    ),
)
def test_every_loop_says_the_same(target, looks, options, monkeypatch):
    drafter, batch = make_drafter(target, draft_vocab_size=40), pad(prompts_of(7))
    options = {**options, "seed": 5, "max_new_tokens": 10}
    if looks:
        options["logits_processor"] = LogitsProcessorList([Looks()])
    plain = say(target, drafter, batch, num_assistant_tokens=0, **options)
    assert say(target, None, batch, decode_loop="own", **options) == plain
    chain = {"num_assistant_tokens": 4}
    for loop, shape in [("own", chain), ("own", {}), ("eager", TREE), ("host", chain)]:
        assert say(target, drafter, batch, decode_loop=loop, **shape, **options) == plain
    capture_on_cpus(monkeypatch)
    assert say(target, drafter, batch, **TREE, **options) == plain
    release_graphs()
    assert say(target, drafter, batch, num_assistant_tokens=0, **{**options, "seed": 6}) != plain


def test_a_row_says_in_a_batch_what_it_says_alone(target):
    """Row b draws by the number b above the call's."""
    drafter, prompts = make_drafter(target), prompts_of(9, 4, 12)
    together = say(target, drafter, pad(prompts), seed=30)
    for b, prompt in enumerate(prompts):
        assert say(target, drafter, pad([prompt]), seed=30 + b, num_assistant_tokens=5) == together[b : b + 1]
    assert say(target, drafter, pad(prompts[::-1]), seed=[32, 31, 30]) == together[::-1]
    assert say(target, drafter, pad(prompts, "right"), seed=30) == together


def test_several_answers_to_one_prompt_differ(target):
    drafter, batch = make_drafter(target), pad(prompts_of(6))
    answers = say(target, drafter, batch, seed=3, num_return_sequences=4)
    assert len(set(map(tuple, answers))) == 4
    assert say(target, drafter, batch, seed=5) == answers[2:3]


def test_a_text_goes_on_as_if_it_had_not_stopped(target):
    """Numbers go by the place in the text, so a text that is cut and resumed is the same."""
    drafter, prompt = make_drafter(target), make_prompt(8)
    whole = target.generate(prompt, assistant_model=drafter, seed=4, **HOT)
    half = target.generate(prompt, assistant_model=drafter, seed=4, **{**HOT, "max_new_tokens": 7})
    assert half.tolist() == whole[:, :15].tolist()
    for loop in ("own", "host"):
        rest = {**HOT, "max_new_tokens": 9, "decode_loop": loop}
        assert target.generate(half, assistant_model=drafter, seed=4, **rest).tolist() == whole.tolist()


def test_pytorchs_generator_is_left_alone(target):
    drafter, batch = make_drafter(target), pad(prompts_of(6))
    for loop in ("own", "host"):
        state = torch.get_rng_state()
        say(target, drafter, batch, seed=3, decode_loop=loop)
        assert torch.equal(torch.get_rng_state(), state)


def test_without_a_seed_pytorchs_generator_decides(target):
    drafter, batch = make_drafter(target), pad(prompts_of(6, 9))
    for shape in ({"num_assistant_tokens": 2}, TREE):
        texts = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            texts.append(say(target, drafter, batch, **shape))
        assert texts[0] == texts[1] != texts[2]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"do_sample": False}, "greedy"),
        ({"num_assistant_tokens": 2}, "block verification"),
        ({"num_assistant_tokens": 2, "seed": 3}, "shared noise"),
        (TREE, "shared noise"),
        ({**TREE, "do_sample": False}, "greedy"),
        ({"num_assistant_tokens": 2, "repetition_penalty": 1.2}, "ratio test, token by token"),
        ({"num_assistant_tokens": 2, "repetition_penalty": 1.2, "seed": 3}, "shared noise, token by token"),
        ({"num_assistant_tokens": 2, "decode_loop": "host"}, "block verification"),
        ({"num_assistant_tokens": 2, "decode_loop": "host", "seed": 3}, "shared noise"),
        ({"num_assistant_tokens": 2, "decode_loop": "host", "do_sample": False}, "greedy"),
    ],
    ids=str,
)
def test_the_rule_is_told(target, options, rule):
    out = target.generate(
        make_prompt(6), assistant_model=make_drafter(target), return_dict_in_generate=True, **{**HOT, **options}
    )
    assert out.speculation.rule == rule
    assert all(row.rule == rule for row in out.speculation.rows)


def test_a_seed_may_stand_where_other_settings_do(target, tmp_path):
    drafter, prompt = make_drafter(target), make_prompt(6)
    expected = target.generate(prompt, assistant_model=drafter, seed=9, **HOT).tolist()
    given = GenerationConfig(**HOT, seed=9, pad_token_id=0)
    assert target.generate(prompt, assistant_model=drafter, generation_config=given).tolist() == expected
    drafter.generation_config.seed = 9
    drafter.save_pretrained(tmp_path)
    saved = type(drafter).from_pretrained(tmp_path)
    assert target.generate(prompt, assistant_model=saved, **HOT).tolist() == expected
    assert target.generate(prompt, assistant_model=saved, seed=10, **HOT).tolist() != expected
    torch.manual_seed(1)
    one = target.generate(prompt, assistant_model=saved, seed=None, **HOT).tolist()
    torch.manual_seed(2)
    assert target.generate(prompt, assistant_model=saved, seed=None, **HOT).tolist() != one


def assert_same_columns(ours, theirs):
    """But for rounding: a forward over several tokens adds up in another order."""
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=1e-3, atol=1e-3)


def test_scores_are_those_without_noise(target):
    """What a token was chosen by are the processed logits, as without a drafter; the noise comes on top."""
    drafter, prompt = make_drafter(target), make_prompt(6)
    told = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "top_k": 7}
    ways = [("own", 0), ("own", 2), ("host", 2)]
    plain, *others = (
        target.generate(
            *(prompt,),
            assistant_model=drafter,
            seed=3,
            decode_loop=loop,
            num_assistant_tokens=depth,
            **{**HOT, **told},
        )
        for loop, depth in ways
    )
    assert all((score > -torch.inf).sum() == 7 for score in plain.scores)
    for out in others:
        assert out.sequences.tolist() == plain.sequences.tolist()
        for name in ("scores", "logits"):
            assert_same_columns(getattr(out, name), getattr(plain, name))


def test_scores_along_a_tree_are_those_of_the_text(target):
    drafter, batch = make_drafter(target), pad(prompts_of(6, 9))
    told = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    plain, tree = (
        target.generate(**batch, assistant_model=drafter, seed=3, **shape, **{**HOT, **told, "temperature": 0.3})
        for shape in ({"num_assistant_tokens": 0}, TREE)
    )
    assert tree.sequences.tolist() == plain.sequences.tolist()
    assert tree.speculation.num_accepted > 0
    for name in ("scores", "logits"):
        assert_same_columns(getattr(tree, name), getattr(plain, name))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["reduced_vocab", "peagle", "mla"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
def test_a_gpu_says_what_a_cpu_says(family, kind):
    """Numbers are the same on every device; captured, eager and in the host's loop, whatever is drafted."""
    cpu, batch = make_target(family), pad(prompts_of(9, 4, 12))
    expected = say(cpu, None, batch, seed=8, decode_loop="own")
    target = copy.deepcopy(cpu).cuda()
    drafter = make_drafter(cpu, **DRAFTERS[kind]).cuda()
    batch = {name: value.cuda() for name, value in batch.items()}
    for loop, shape in itertools.product(
        ("own", "eager"), ({"num_assistant_tokens": 0}, {"num_assistant_tokens": 3}, TREE)
    ):
        assert say(target, drafter, batch, seed=8, decode_loop=loop, **shape) == expected
    alone = {name: value[2:] for name, value in batch.items()}
    assert say(target, drafter, alone, seed=10, decode_loop="host", num_assistant_tokens=3) == expected[2:]
    bits = [
        make_bits(
            make_keys(torch.arange(5, device=d), torch.arange(3, device=d).expand(5, 3))[..., None],
            torch.arange(999, device=d),
        )
        for d in ("cpu", "cuda")
    ]
    assert torch.equal(bits[0], bits[1].cpu())


@pytest.mark.parametrize("seed", [-1, 1.5, "3", True, MAX_SEED + 1, [], [1, -2], [[1]], len], ids=str)
def test_what_is_no_seed_is_refused(target, seed):
    with pytest.raises(ValueError, match=r"seed is a whole number from 0 to \d+ for the first row"):
        target.generate(make_prompt(4), assistant_model=make_drafter(target), seed=seed, **HOT)


@pytest.mark.parametrize("loop", ["own", "host"])
def test_a_list_has_a_seed_for_each_row(target, loop):
    with pytest.raises(ValueError, match="seed has 3 numbers for 1 rows"):
        target.generate(make_prompt(4), assistant_model=make_drafter(target), seed=[1, 2, 3], decode_loop=loop, **HOT)


def test_seeds_come_as_numbers_lists_and_tensors():
    assert resolve_seeds(None) is None
    assert resolve_seeds(torch.tensor(3)) == 3
    assert resolve_seeds(torch.tensor([3, 4])) == resolve_seeds((3, 4)) == [3, 4]
    assert seeds_of_rows(None, 2) == [None, None]
    assert seeds_of_rows(MAX_SEED, 2) == [MAX_SEED, 0]
