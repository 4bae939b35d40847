"""Draft trees through the engine: greedy and by shared noise, eager and captured, in order and in step."""

import copy
import functools
import itertools
import random

import pytest
import torch
import transformers
from helpers.batches import GREEDY, make_oracle, pad, plain_of, prompts_of
from helpers.blocks import BLOCK_DRAFTERS, make_block_drafter, make_block_oracle
from helpers.capture import GraphsOnCpus
from helpers.engine import run_rows
from helpers.marks import slow_but, slow_rows_but
from helpers.models import DRAFTERS, TEXT, V, make_drafter, make_target
from packaging.version import Version
from transformers import (
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
)

from hf_eagle3 import release_graphs
from hf_eagle3.decoding.row import Row
from hf_eagle3.decoding.state import RoundConfig
from hf_eagle3.drafters.chain import CHAIN
from hf_eagle3.drafters.draft import Committed, Prompted, choose_greedy
from hf_eagle3.drafters.kinds import find_kind
from hf_eagle3.recorder import StateRecorder
from hf_eagle3.rows.attention import attending_by_rows
from hf_eagle3.speculation.shape import NONE, DraftShape, Shapes, chain
from hf_eagle3.speculation.tree import find_paths
from hf_eagle3.speculation.warpers import RowSettings

pytestmark = pytest.mark.any_release

FAMILIES = ["llama", "gemma3", "gpt_oss", "deepseek_v3", "mistral"]
EAGLES = {
    "eagle": {},
    "window": {"sliding_window": 6, "num_hidden_layers": 2},
    "mla": DRAFTERS["mla"],
    "peagle": DRAFTERS["peagle"],
}
KINDS = (*EAGLES, "dflash", "dspark", "rnn")
WIDE, DEEP, BY_DEPTH = DraftShape((0, 0, 0)), DraftShape((0, 0, 1, 1, 2, 3, 3, 6)), DraftShape((0, 1, 2, 1, 0, 5))


def random_tree(seed: int, most: int = 14) -> DraftShape:
    generator = random.Random(seed)
    return DraftShape(tuple(generator.randint(max(0, n - 5), n) for n in range(generator.randint(2, most))))


def capture_rows(*args, **options) -> None:
    """As `run_rows`, in captured rounds."""
    release_graphs()
    how = run_rows(*args, capturer=GraphsOnCpus(), **options)
    release_graphs()
    assert how.startswith("captured")


RUNS = {"eager": run_rows, "captured": capture_rows}


def make(target: PreTrainedModel, kind: str) -> PreTrainedModel:
    return make_drafter(target, **EAGLES[kind]) if kind in EAGLES else make_block_drafter(target, kind)


class Looks(LogitsProcessor):
    """Looks at the text: bans what stands two tokens before."""

    def __call__(self, input_ids, scores):
        return scores.scatter(1, input_ids[:, -2:-1], -torch.inf)


# ---- greedy ----


@pytest.mark.sampled(2)
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(
    ("family", "kind", "seed"),
    slow_rows_but(
        [
            *(("llama", "eagle", 0), ("gemma3", "window", 1), ("gpt_oss", "peagle", 2), ("deepseek_v3", "mla", 3)),
            *(("llama", "dflash", 1), ("mistral", "dspark", 2)),
        ],
        [(family, kind, seed) for family in FAMILIES for kind in KINDS for seed in range(4)],
    ),
)
def test_greedy_rows_are_the_targets_by_random_trees(family, kind, seed, run):
    target, lengths = make_target(family), (9, 4, 14)
    batch, shape = pad(prompts_of(*lengths)), random_tree(seed + 10 * list(KINDS).index(kind))
    plain = plain_of(family, lengths, 24).sequences
    if kind in EAGLES:
        oracle = make_oracle(target, plain, batch, wrong_share=0.3, **EAGLES[kind])
    else:
        oracle = make_block_oracle(target, plain, batch, wrong_share=0.3, **BLOCK_DRAFTERS[kind])
    rows = [Row(prompt, max_new=24) for prompt in prompts_of(*lengths)]
    RUNS[run](target, oracle, prompts_of(*lengths), rows, RoundConfig(shape=shape))
    assert [row.text for row in rows] == plain[:, 14:].tolist()
    assert max(end - start for row in rows for _, start, end in row._taken) > 1  # something was kept


@pytest.mark.parametrize("shape", [DEEP, BY_DEPTH], ids=["deep", "by_depth"])
def test_processors_that_look_at_the_text_take_trees(target, shape):
    prompts, options = prompts_of(9, 4), {"logits_processor": LogitsProcessorList([Looks()]), "max_new_tokens": 16}
    plain = torch.cat([target.generate(prompt, **options, **GREEDY)[:, -16:] for prompt in prompts])
    batch = pad(prompts)
    oracle = make_oracle(target, torch.cat([batch["input_ids"], plain], dim=1), batch, wrong_share=0.2)
    rows = [Row(prompt, max_new=16, processors=options["logits_processor"]) for prompt in prompts]
    run_rows(target, oracle, prompts, rows, RoundConfig(shape=shape, in_order=True))
    assert [row.text for row in rows] == plain.tolist()
    assert max(end - start for row in rows for _, start, end in row._taken) > 1


@pytest.mark.parametrize(
    "options", [GREEDY, {"do_sample": True, "seed": 4, "temperature": 1.5}], ids=["greedy", "seed"]
)
@pytest.mark.parametrize("shape", slow_but([DEEP], [WIDE, DEEP, BY_DEPTH]), ids=lambda shape: shape.name)
def test_rows_in_step_take_trees(target, shape, options):
    """A processor of somebody's may look at the whole batch: pads of rows that have ended go on along the deepest path."""
    batch = pad(prompts_of(9, 4, 12))
    options = {"logits_processor": LogitsProcessorList([Looks()]), "max_new_tokens": 16, **options}
    options["eos_token_id"] = [5, 17, 23, 31, 44, 50]
    drafter = make_drafter(target, draft_vocab_size=V)
    plain = target.generate(**batch, assistant_model=drafter, num_assistant_tokens=0, **options)
    if options["do_sample"] is False:
        assert torch.equal(plain, target.generate(**batch, **options))
        drafter = make_oracle(target, plain, batch, wrong_share=0.1)
    out = target.generate(**batch, assistant_model=drafter, draft_shape=shape, return_dict_in_generate=True, **options)
    assert out.sequences.tolist() == plain.tolist()
    assert "rows in step" in out.speculation.why
    assert out.speculation.num_accepted > 0


class PlacedByText(LlamaForCausalLM):
    """A token's position is how many before it are no multiples of three."""

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        position_ids = (input_ids % 3 > 0).long().cumsum(-1)
        return {**inputs, "position_ids": position_ids[:, -inputs["input_ids"].shape[1] :]}


def make_placed() -> LlamaForCausalLM:
    target = copy.deepcopy(make_target("llama"))
    target.__class__ = PlacedByText
    return target


def make_rotated() -> PreTrainedModel:
    """Rotates by the length of the text from 12 tokens on."""
    sizes = {key: value for key, value in TEXT.items() if key != "head_dim"}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 16.0, "original_max_position_embeddings": 12}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]}
    config = Phi3Config(**sizes, rope_parameters=rope, original_max_position_embeddings=12)
    torch.manual_seed(5)
    target = Phi3ForCausalLM(config).eval()
    target.generation_config.eos_token_id = None
    target.generation_config.pad_token_id = 0
    return target


@pytest.mark.parametrize("make", [make_placed, make_rotated], ids=["placed_by_text", "rotated_by_length"])
@pytest.mark.parametrize("shape", [DEEP, BY_DEPTH], ids=["deep", "by_depth"])
def test_targets_with_ways_of_their_own_take_trees(make, shape):
    target, batch = make(), pad(prompts_of(7))
    if make is make_rotated and Version(transformers.__version__).release < (5, 24):
        pytest.skip("plain decoding forgets the text there")
    plain = target.generate(**batch, max_new_tokens=16, **GREEDY)
    oracle = make_oracle(target, plain, batch, wrong_share=0.2)
    options = {"draft_shape": shape, "max_new_tokens": 16, "return_dict_in_generate": True, **GREEDY}
    out = target.generate(**batch, assistant_model=oracle, **options)
    assert out.sequences.tolist() == plain.tolist()
    assert out.speculation.num_accepted > 3


# ---- by shared noise ----

SETTINGS = [RowSettings(temperature=0.8), RowSettings(temperature=1.3, top_k=20), RowSettings(top_p=0.9)]


def sample(target, drafter, shape, *, run=run_rows, processors=None, **config) -> list[list[int]]:
    """What three rows say by their seeds."""
    prompts = prompts_of(9, 4, 12)
    rows = [
        Row(prompt, max_new=12, settings=own, seed=40 + b, processors=processors)
        for b, (prompt, own) in enumerate(zip(prompts, SETTINGS, strict=True))
    ]
    run(target, drafter, prompts, rows, RoundConfig(shape, do_sample=True, **{"is_reproducible": True, **config}))
    return [row.text for row in rows]


@functools.cache
def sample_plainly(family) -> list[list[int]]:
    target = make_target(family)
    return sample(target, make_drafter(target), NONE)


SAMPLED = {"chain_1": chain(1), "chain_4": chain(4), "wide": WIDE, "deep": DEEP, "by_depth": BY_DEPTH}
SAMPLED |= {f"random_{seed}": random_tree(seed) for seed in range(3)}


@pytest.mark.parametrize(
    ("family", "kind", "shape"),
    slow_rows_but(
        [
            ("llama", "eagle", "chain_4"),
            ("llama", "peagle", "deep"),
            ("gemma3", "window", "random_0"),
            ("gpt_oss", "mla", "by_depth"),
            ("llama", "dspark", "deep"),
            ("mistral", "dflash", "chain_4"),
        ],
        itertools.product(FAMILIES, KINDS, SAMPLED),
    ),
)
def test_a_seed_says_the_same_by_any_shape(family, kind, shape):
    target = make_target(family)
    plain = sample_plainly(family)
    assert all(len(set(text)) > 3 for text in plain)
    assert sample(target, make(target, kind), SAMPLED[shape]) == plain


@pytest.mark.parametrize("shape", [chain(3), DEEP, BY_DEPTH], ids=["chain", "deep", "by_depth"])
def test_captured_rounds_say_the_same(target, shape):
    drafter = make_drafter(target, draft_vocab_size=40)
    assert sample(target, drafter, shape, run=capture_rows) == sample_plainly("llama")


@pytest.mark.parametrize("shape", [chain(1), chain(4)], ids=["chain_1", "chain_4"])
def test_captured_ratio_tests_are_the_eager_ones(target, shape):
    drafter = make_drafter(target, draft_vocab_size=40)
    options = {"is_reproducible": False, "is_seeded": True}
    eager = sample(target, drafter, shape, **options)
    assert sample(target, drafter, shape, run=capture_rows, **options) == eager
    assert eager != sample_plainly("llama")


@pytest.mark.parametrize("shape", [chain(3), DEEP, BY_DEPTH], ids=["chain", "deep", "by_depth"])
def test_rows_whose_text_is_looked_at_say_the_same(target, shape):
    drafter, processors = make_drafter(target), LogitsProcessorList([Looks()])
    plain = sample(target, drafter, NONE, processors=processors, in_order=True)
    assert sample(target, drafter, shape, processors=processors, in_order=True) == plain
    assert plain != sample_plainly("llama")


def test_a_good_drafter_is_followed_by_the_same_noise(target):
    """Children are the largest of log q + G: of a drafter that is told the text they hold the target's own token."""
    prompts, shape = prompts_of(9), DraftShape((0, 0, 1, 1, 2))
    drafter = make_drafter(target, draft_vocab_size=V)
    kept = {}
    for wanted in (chain(1), shape):
        row = Row(prompts[0], max_new=60, settings=RowSettings(temperature=2.5), seed=3)
        run_rows(target, drafter, prompts, [row], RoundConfig(shape=wanted, do_sample=True))
        kept[wanted] = sum(end - start - 1 for _, start, end in row._taken)
    assert kept[shape] > kept[chain(1)] > 0


# ---- what is drafted ----


def remember(drafter, target, prompts, shape):
    """The drafter's memory behind prompts, with their next tokens pending."""
    batch = pad(prompts)
    lengths = batch["attention_mask"].sum(-1)
    with torch.no_grad(), StateRecorder(target, drafter.bound_aux_layer_ids) as recorder:
        states, tokens = [], []
        for prompt in prompts:
            target(prompt, use_cache=False)
            states.append(recorder.take(drafter.device)[0])
            tokens.append(prompt[0])
    pad_to = torch.nn.utils.rnn.pad_sequence
    prompted = Prompted(pad_to(tokens, True), pad_to(states, True), lengths, torch.zeros_like(lengths))
    kind = find_kind(drafter.config)
    memory = kind.begin(drafter, prompted, Shapes((shape,)))
    memory.cache.reserve(64)
    kind.catch_up(memory, Committed(torch.tensor([[7], [11]]), None, torch.ones_like(lengths)), shape)
    return memory


@pytest.mark.sampled(2)
@pytest.mark.parametrize("attention", ["masks", "rows"])
@pytest.mark.parametrize("seed", slow_but([1, 2], range(8)))
@pytest.mark.parametrize("kind", ["eagle", "window", "mla"])
def test_each_node_is_drafted_as_if_its_path_were_a_chain(target, kind, seed, attention):
    drafter, shape = make(target, kind), random_tree(seed)
    prompts = prompts_of(9, 5)
    with torch.no_grad():
        memory, logits = remember(drafter, target, prompts, shape), []

        def choose(given, depths, width):
            logits.append(given)
            return choose_greedy(given, depths, width)

        propose = CHAIN.propose
        with attending_by_rows(drafter) if attention == "rows" else torch.no_grad():
            tokens = propose(drafter, memory, shape, choose).tokens  # [2, N]
        for node, path in enumerate(find_paths(shape.parents)):
            way = [n for n in dict.fromkeys(path) if n]
            forced, alone = iter([tokens[:, n - 1] for n in way]), []

            def follow(given, depths, width, forced=forced, alone=alone):
                alone.append(given[:, 0])
                wanted = next(forced, torch.full((2,), -1))
                ids = (drafter.draft_to_target_ids == wanted[:, None]).long().argmax(-1)
                return ids[:, None, None], None

            propose(drafter, remember(drafter, target, prompts, chain(len(way) + 1)), chain(len(way) + 1), follow)
            children = [n for n, parent in enumerate(shape.parents, start=1) if parent == node]
            if children:
                best = alone[-1].topk(len(children)).indices
                assert tokens[:, [n - 1 for n in children]].tolist() == drafter.to_target_ids(best).tolist()
    assert len(logits) == shape.depth


@pytest.mark.parametrize("kind", KINDS)
def test_siblings_differ(target, kind):
    shape = random_tree(3, most=30)
    drafter = make(target, kind)
    with torch.no_grad():
        tokens = (
            find_kind(drafter.config)
            .propose(drafter, remember(drafter, target, prompts_of(9, 5), shape), shape, choose_greedy)
            .tokens
        )
    for node in range(len(shape.parents) + 1):
        children = [n - 1 for n, parent in enumerate(shape.parents, start=1) if parent == node]
        assert all(len(set(row)) == len(children) for row in tokens[:, children].tolist())
