"""Targets whose forward takes masks and positions in another way than most: each row says what plain decoding says."""

import copy
import functools

import pytest
import torch
from helpers import families
from helpers.families import Family, make_batch, make_oracle
from helpers.marks import slow_but
from helpers.models import count_hooks, make_prompt
from transformers import PreTrainedModel

from hf_eagle3.compat import CACHE_NAME
from hf_eagle3.decoding.captured import why_kernels_do_not
from hf_eagle3.host.loop_choice import why_not_target
from hf_eagle3.rows.block import Block
from hf_eagle3.rows.forwards import FORWARDS, narrow_mask, own_windows, why_not_handed
from hf_eagle3.rows.masks import make_mask
from hf_eagle3.speculation.shape import DraftShape
from hf_eagle3.training.states.packed import attends_by_interface

NEW = 24
VARIANTS = {"falcon (alibi)": Family("falcon", "causal", "alibi"), "mpt": Family("mpt", "causal", "use_cache=True")}
INDEXED = ["axk2", "deepseek_v32", "dots3_note_text", "glm_moe_dsa"]  # and a vision-language model
ALL = {
    **{name: Family(name, "causal") for name in (*FORWARDS, *INDEXED)},
    "mistral_large4": Family("mistral_large4", "image-text"),
    **VARIANTS,
}
ALL = {name: family for name, family in ALL.items() if family.model_type in families.CONFIG_MAPPING}
# One of each kind: usual, own attention, own positions, biases by distance, windows of its own, chunks, indexers.
EVERYDAY = ["stablelm", "xglm", "bart", "falcon (alibi)", "gpt_neo", "llama4_text", "glm_moe_dsa"]
BY_SLOT = ["bloom", "falcon (alibi)", "mpt"]
BRANCHING = [name for name in ALL if name not in BY_SLOT]
ONE_ROW, RAGGED, MANY_PADS = (20,), (9, 4, 13), (70, 3, 5)
TREE = (0, 0, 1, 1, 2, 3, 3, 6)


@functools.cache
def make_target(name: str) -> PreTrainedModel:
    return families.build(ALL[name])


@functools.cache
def plain_of(name: str, lengths: tuple[int, ...]):
    options = {"max_new_tokens": NEW, "return_dict_in_generate": True}
    return make_target(name).generate(**make_batch(lengths, "cpu"), **options)


def assert_as_plain(name: str, lengths: tuple[int, ...], *, wrong_share: float = 0.4, **options):
    """What is told of a batch with an oracle that says what it says without; and the output."""
    target, plain, batch = make_target(name), plain_of(name, lengths), make_batch(lengths, "cpu")
    oracle = make_oracle(target, plain.sequences, batch, wrong_share=wrong_share)
    options = {"max_new_tokens": NEW, "return_dict_in_generate": True, **options}
    out = target.generate(**batch, assistant_model=oracle, **options)
    assert out.sequences.tolist() == plain.sequences.tolist()
    assert out.speculation.loop == "own decode loop"
    assert count_hooks(target) == 0
    return plain, out


@pytest.mark.sampled(2)
@pytest.mark.parametrize("lengths", slow_but([RAGGED], [ONE_ROW, RAGGED]), ids=str)
@pytest.mark.parametrize("depth", slow_but([3], [1, 2, 3, 5]))
@pytest.mark.parametrize("name", slow_but(EVERYDAY, ALL))
def test_text_is_plain_decodings(name, depth, lengths):
    _, out = assert_as_plain(name, lengths, num_assistant_tokens=depth)
    assert 1 < out.speculation.acceptance_length < depth + 1


@pytest.mark.sampled(2)
@pytest.mark.slow
@pytest.mark.parametrize("wrong_share", [0.0, 1.0], ids=["all_kept", "all_refused"])
@pytest.mark.parametrize("name", ALL)
def test_text_is_plain_decodings_whatever_is_kept(name, wrong_share):
    for lengths in (ONE_ROW, RAGGED):
        assert_as_plain(name, lengths, num_assistant_tokens=3, wrong_share=wrong_share)


OPTIONS = {
    "chunks": {"prefill_chunk_size": 5},
    "penalty": {"repetition_penalty": 1.3},
    "eager": {"decode_loop": "eager"},
}


@pytest.mark.sampled(2)
@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", ALL)
def test_text_is_plain_decodings_in_calls_of_other_kinds(name, option):
    target, batch = make_target(name), make_batch(RAGGED, "cpu")
    options = {"max_new_tokens": NEW, **OPTIONS[option]}
    plain = target.generate(**batch, **{k: v for k, v in options.items() if k != "decode_loop"})
    oracle = make_oracle(target, plain, batch)
    out = target.generate(**batch, assistant_model=oracle, num_assistant_tokens=3, **options)
    assert out.tolist() == plain.tolist()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", slow_but(["llama4_text"], ALL))
def test_a_seed_gives_one_text_with_and_without_a_draft(name):
    target, batch = make_target(name), make_batch(RAGGED, "cpu")
    oracle = make_oracle(target, plain_of(name, RAGGED).sequences, batch)
    options = {"assistant_model": oracle, "max_new_tokens": NEW, "do_sample": True, "seed": 7}
    texts = [target.generate(**batch, num_assistant_tokens=depth, **options).tolist() for depth in (0, 3)]
    assert texts[0] == texts[1]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("lengths", slow_but([RAGGED], [ONE_ROW, RAGGED]), ids=str)
@pytest.mark.parametrize("name", slow_but(["bart", "gpt_neo", "llama4_text", "glm_moe_dsa"], BRANCHING))
def test_trees_give_the_targets_text(name, lengths):
    _, out = assert_as_plain(name, lengths, draft_shape=TREE)
    assert out.speculation.acceptance_length > 1


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", BY_SLOT)
def test_trees_are_refused_where_scores_depend_on_the_distance_of_slots(name):
    target, batch = make_target(name), make_batch(ONE_ROW, "cpu")
    oracle = make_oracle(target, plain_of(name, ONE_ROW).sequences, batch)
    with pytest.raises(ValueError, match=r"draft_shape is a tree.*distance between slots.*num_assistant_tokens"):
        target.generate(**batch, assistant_model=oracle, draft_shape=TREE, max_new_tokens=4)
    out = target.generate(
        **batch, assistant_model=oracle, draft_shape="auto", max_new_tokens=NEW, return_dict_in_generate=True
    )
    assert not any("tree" in shape for shape in out.speculation.shapes)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", slow_but(["bart", "glm_moe_dsa"], ALL))
def test_rows_with_many_pads_say_what_they_say_alone(name):
    target, batch = make_target(name), make_batch(MANY_PADS, "cpu")
    alone = [families.decode_alone(target, ids, NEW).tolist() for ids in families.prompts_of(batch)]
    sequences = torch.cat([batch["input_ids"], torch.tensor(alone)], dim=1)
    out = target.generate(
        **batch, assistant_model=make_oracle(target, sequences, batch), max_new_tokens=NEW, num_assistant_tokens=3
    )
    assert out[:, max(MANY_PADS) :].tolist() == alone


@pytest.mark.sampled(2)
@pytest.mark.parametrize("lengths", slow_but([ONE_ROW], [ONE_ROW, RAGGED]), ids=str)
@pytest.mark.parametrize("name", slow_but(["bart", "llama4_text", "glm_moe_dsa"], ALL))
def test_the_cache_is_left_as_plain_decoding_leaves_it(name, lengths):
    target = make_target(name)
    plain, out = assert_as_plain(name, lengths, num_assistant_tokens=3)
    for ours, theirs in zip(out[CACHE_NAME].layers, plain[CACHE_NAME].layers, strict=True):
        assert ours.keys.shape == theirs.keys.shape
        for held in ("keys", "values", "indexer_keys"):
            mine, plains = (getattr(layer, held, None) for layer in (ours, theirs))
            for b, length in enumerate(lengths if plains is not None and plains.numel() else ()):
                # A window or a chunk has the last ones; before the text, plain decoding computes pads and we do not.
                real = slice(max(mine.shape[-2] - length - NEW + 1, 0), None)
                tolerance = {"rtol": 1e-4, "atol": 1e-4 * float(plains.abs().max())}  # CPUs round differently
                torch.testing.assert_close(mine[b, ..., real, :], plains[b, ..., real, :], **tolerance)
    if len(lengths) == 1:
        texts, more = [], torch.cat([plain.sequences, make_prompt(5)], dim=1)
        for cache, assistant in ((plain[CACHE_NAME], {}), (out[CACHE_NAME], {"assistant_model": oracle_of(name)})):
            options = {CACHE_NAME: copy.deepcopy(cache), "max_new_tokens": 8}
            texts.append(target.generate(more, **options, **assistant).tolist())
        assert texts[0] == texts[1]


def oracle_of(name: str):
    return make_oracle(make_target(name), plain_of(name, ONE_ROW).sequences, make_batch(ONE_ROW, "cpu"))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", slow_but(["falcon (alibi)"], ["falcon (alibi)", "falcon", "stablelm", "bart"]))
def test_either_attention_of_the_host(name, implementation):
    target = copy.deepcopy(make_target(name))
    target.set_attn_implementation(implementation)
    batch = make_batch(RAGGED, "cpu")
    plain = target.generate(**batch, max_new_tokens=NEW)
    oracle = make_oracle(target, plain, batch)
    out = target.generate(**batch, assistant_model=oracle, max_new_tokens=NEW, return_dict_in_generate=True)
    assert out.sequences.tolist() == plain.tolist()
    assert out.speculation.loop == "own decode loop"


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", slow_but(["mpt"], ["mpt", "bart", "gpt_neo", "xglm"]))
def test_texts_that_end_where_positions_do(name):
    """A draft would go on behind the last position that the target has."""
    target = families.build(ALL[name], **{"max_seq_len" if name == "mpt" else "max_position_embeddings": 44})
    plain = target.generate(make_prompt(20), max_new_tokens=NEW)
    oracle = make_oracle(target, plain, {"input_ids": make_prompt(20)}, wrong_share=0.2)
    out = target.generate(make_prompt(20), assistant_model=oracle, max_new_tokens=NEW, num_assistant_tokens=5)
    assert out.tolist() == plain.tolist()


def test_pads_between_tokens_are_left_to_the_host_where_windows_count_them():
    target, batch = make_target("gpt_neo"), make_batch(ONE_ROW, "cpu")
    batch["attention_mask"] = torch.ones_like(batch["input_ids"]).index_fill(1, torch.tensor([7, 8]), 0)
    out = target.generate(
        **batch, assistant_model=oracle_of("gpt_neo"), max_new_tokens=4, return_dict_in_generate=True
    )
    assert "pads between tokens" in out.speculation.why


def test_forwards_of_others_keep_their_windows():
    target = make_target("gpt_neo")
    with torch.no_grad():
        outside = target(make_prompt(20)).logits
        with own_windows(target), own_windows(target):
            assert torch.equal(target(make_prompt(20)).logits, outside)
    assert not any("_attn" in vars(module) for module in target.modules())


def test_attention_of_its_own_without_masks_is_left_to_the_host():
    target = copy.deepcopy(make_target("falcon"))
    target.config._attn_implementation_internal = "flash_attention_2"
    assert "attends by flash_attention_2" in why_not_handed(target)
    assert why_not_target(target) == why_not_handed(target)


def test_code_that_is_not_the_hosts_is_not_taken_for_it():
    target = copy.deepcopy(make_target("bloom"))
    target.transformer.__class__ = type("Mine", (type(target.transformer),), {"__module__": "mine"})
    assert "does not take masks and positions" in why_not_target(target)


def test_positions_that_cannot_be_handed_over_are_left_to_the_host():
    target = families.build(Family("trocr", "causal"), use_learned_position_embeddings=False)
    assert "does not take masks and positions" in why_not_target(target)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("name", "words"),
    [("bloom", "were never compared"), ("llama4_text", "attends in chunks"), ("glm_moe_dsa", "by an indexer")],
)
def test_rounds_that_no_kernel_computes_are_not_captured(name, words):
    assert words in why_kernels_do_not(make_target(name))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["xglm", "llama4_text", "glm_moe_dsa", "stablelm"])
def test_documents_of_targets_that_attend_in_other_ways_are_not_packed(name):
    assert attends_by_interface(make_target(name)) == (name == "stablelm")


# ---- chunks and indexers ----


@pytest.mark.sampled(2)
@pytest.mark.parametrize("parents", [None, TREE, (0, 0, 0, 1, 4)], ids=["chain", "tree", "wide"])
@pytest.mark.parametrize("start", [0, 3, 6, 7, 8])
def test_a_token_sees_its_ancestors_of_its_own_chunk(parents, start):
    chunk, shape = 4, None if parents is None else DraftShape(parents)
    T = 6 if shape is None else shape.num_verified
    mask = make_mask(Block(torch.tensor([start, 1]), T, shape and shape.ancestry("cpu")), 24, window=None, chunk=chunk)
    for b, first in enumerate((start, 1)):
        above = [list(range(t)) for t in range(T)]
        if parents is not None:
            above = [[]]
            for parent in parents:
                above.append([*above[parent], parent])
        for t in range(T):
            position = first + len(above[t])
            seen = {slot for slot in range(first) if slot // chunk == position // chunk} | {first + t}
            seen |= {first + j for j in above[t] if (first + len(above[j])) // chunk == position // chunk}
            assert set(mask[b, 0, t].nonzero().flatten().tolist()) == seen


def build_tempered(floor_scale: int) -> PreTrainedModel:
    fields = {"floor_scale": floor_scale, "attn_scale": 8.0, "no_rope_layers": [1, 0, 1, 0]}
    return families.build(Family("llama4_text", "causal"), **fields)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("lengths", [ONE_ROW, RAGGED], ids=["one_row", "ragged"])
@pytest.mark.parametrize("floor_scale", slow_but([5], [3, 5, 17, 30]))
def test_scales_by_position_are_those_of_each_row(floor_scale, lengths):
    """Where plain decoding of a padded batch counts pads, each row says what it says alone."""
    target, batch = build_tempered(floor_scale), make_batch(lengths, "cpu")
    alone = [families.decode_alone(target, ids, NEW).tolist() for ids in families.prompts_of(batch)]
    if floor_scale <= 5:  # else the scale may be too late to change a token
        assert alone[0] != families.decode_alone(build_tempered(8192), families.prompts_of(batch)[0], NEW).tolist()
    sequences = torch.cat([batch["input_ids"], torch.tensor(alone)], dim=1)
    oracle = make_oracle(target, sequences, batch)
    for shape in ({"num_assistant_tokens": 3}, {"draft_shape": TREE}):
        out = target.generate(**batch, assistant_model=oracle, max_new_tokens=NEW, **shape)
        assert out[:, max(lengths) :].tolist() == alone


def test_pads_that_count_behind_a_cache_are_refused():
    target, batch = build_tempered(5), make_batch(RAGGED, "cpu")
    first = target.generate(**batch, max_new_tokens=4, return_dict_in_generate=True)
    more = torch.cat([first.sequences, make_prompt(3).expand(3, 3)], dim=1)
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 7), value=1)
    oracle = make_oracle(target, more, {"input_ids": more, "attention_mask": mask})
    with pytest.raises(ValueError, match=r"counts pads as positions.*without pads"):
        target.generate(
            more, attention_mask=mask, **{CACHE_NAME: first[CACHE_NAME]}, assistant_model=oracle, max_new_tokens=4
        )


def build_blocks() -> PreTrainedModel:
    fields = {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
        "index_block_size": 4,
        "index_topk_blocks": 3,
    }
    return families.build(Family("minimax_m3_vl_text", "causal"), **fields, index_n_heads=2, index_head_dim=16)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("depth", slow_but([3], [1, 3, 5]))
@pytest.mark.parametrize("lengths", [ONE_ROW, RAGGED], ids=["one_row", "ragged"])
def test_blocks_that_an_indexer_chooses_are_those_of_each_row(lengths, depth):
    """Pads move them in plain decoding of a padded batch."""
    target, batch = build_blocks(), make_batch(lengths, "cpu")
    alone = [families.decode_alone(target, ids, NEW).tolist() for ids in families.prompts_of(batch)]
    sequences = torch.cat([batch["input_ids"], torch.tensor(alone)], dim=1)
    oracle = make_oracle(target, sequences, batch)
    options = {"assistant_model": oracle, "max_new_tokens": NEW, "return_dict_in_generate": True}
    out = target.generate(**batch, num_assistant_tokens=depth, **options)
    assert out.sequences[:, max(lengths) :].tolist() == alone
    assert out.speculation.loop == "own decode loop"
    with pytest.raises(ValueError, match=r"draft_shape is a tree.*chooses blocks of slots"):
        target.generate(**batch, draft_shape=TREE, **options)
    if lengths == ONE_ROW:
        plain = target.generate(**batch, max_new_tokens=NEW, return_dict_in_generate=True)
        for ours, theirs in zip(out[CACHE_NAME].layers[1::2], plain[CACHE_NAME].layers[1::2], strict=True):
            torch.testing.assert_close(ours.idx_keys, theirs.idx_keys, rtol=1e-4, atol=1e-4)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", slow_but(["glm_moe_dsa"], ["glm_moe_dsa", "deepseek_v32", "llama4_text", "bloom"]))
def test_rows_leave_and_caches_grow(name):
    """Past the slots that memory is made for at first, over rows that end at different lengths."""
    target, batch = make_target(name), make_batch(RAGGED, "cpu")
    plain = target.generate(**batch, max_new_tokens=90)
    eos = [int(plain[0, 20]), int(plain[1, 40])]
    plain = target.generate(**batch, max_new_tokens=90, eos_token_id=eos, pad_token_id=0)
    oracle = make_oracle(target, plain, batch, wrong_share=0.2)
    options = {"max_new_tokens": 90, "eos_token_id": eos, "pad_token_id": 0, "num_assistant_tokens": 5}
    assert target.generate(**batch, assistant_model=oracle, **options).tolist() == plain.tolist()


UNKNOWN = {
    "deepseek_v4": {},
    "qwen4_exp_text": {},
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", UNKNOWN)
def test_what_chooses_in_ways_that_are_not_known_is_refused_by_name(name):
    if name not in families.MAPPINGS["causal"][0]:
        pytest.skip("not of this host")
    assert "our loop does not know" in why_not_target(families.build(Family(name, "causal"), **UNKNOWN[name]))


def test_a_mask_is_narrowed_whatever_it_is_made_of():
    mask = torch.tensor([[[[True, False, True]]]])
    assert narrow_mask(None, mask) is mask
    assert narrow_mask(torch.tensor([[[[True, True, False]]]]), mask).tolist() == [[[[True, False, False]]]]
    bias = torch.tensor([[[[1.0, 2.0, 3.0]]]])
    assert narrow_mask(bias, mask)[0, 0, 0].tolist() == [1.0, torch.finfo(torch.float32).min, 3.0]
    assert torch.equal(narrow_mask(bias, torch.where(mask, 0.0, -1e30)), narrow_mask(bias, mask))
