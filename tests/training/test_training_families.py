"""A new drafter for every causal family of the host: an update, an evaluation, a forecast and an export, or words."""

import dataclasses
import logging
import math

import pytest
import torch
from helpers.marks import slow_but, slow_rows_but
from helpers.training import make_args
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_eagle3 import Eagle3Trainer
from hf_eagle3.checkpoints.engines import ENGINES
from hf_eagle3.training import StoredStates, new_drafter, store_states
from hf_eagle3.training.evaluation import generate_and_count, generate_and_walk
from hf_eagle3.training.forecast import TargetShape, target_flops
from hf_eagle3.training.new_drafter import ROPES, choose_rope
from hf_eagle3.training.sizes import find_size
from hf_eagle3.training.states.online import OnlineStates
from hf_eagle3.training.step.batch import Collator
from hf_eagle3.training.step.head_loss import Method
from hf_eagle3.training.step.losses import LOSSES
from hf_eagle3.training.step.target_head import DraftVocabulary
from hf_eagle3.training.step.ttt import ttt

V = 64
# Fields of whatever config has them.
TINY = {
    "vocab_size": V,
    "unpadded_vocab_size": V,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 8),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "encoder_attention_heads"), 4
    ),
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rotary_dim": 8,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "max_position_embeddings": 256,
    "n_positions": 256,
    "sliding_window": 8,
    "word_embed_proj_dim": 32,
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts"), 4),
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "expert_ffn_hidden_size": 16,
    "ffn_hidden_size": 48,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_topk": 4,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": V,
    "state_size": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
LATENT = (
    *(
        "axk1",
        "axk2",
        "bailing_hybrid",
        "deepseek_v2",
        "deepseek_v3",
        "deepseek_v32",
        "deepseek_v4",
        "dots3_note_text",
    ),
    *("glm4_moe_lite", "glm_moe_dsa", "kimi_linear", "longcat_flash", "minicpm3", "sarvam_mla", "youtu"),
)
ENCODERS = (
    *(
        "bert",
        "bert-generation",
        "big_bird",
        "camembert",
        "data2vec-text",
        "electra",
        "ernie",
        "megatron-bert",
        "rembert",
    ),
    *("roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod"),
)
OTHERS = {
    **{name: {"num_key_value_heads": 4} for name in LATENT},
    **{name: {"is_decoder": True} for name in ENCODERS},
    "bamba": {"attn_layer_indices": [2, 6]},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"] * 4},
    "gemma3n_text": {"layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 2, "num_kv_shared_layers": 4},
    "glm4": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5}},
    "gpt_neo": {"attention_types": [[["global", "local"], 4]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 4},
    "inkling2_loop_text": {"loop_layer_index_start": 2, "loop_layer_index_end": 6},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 4},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "moe", "mamba", "attention", "mamba", "attention", "moe"]
    },
    "opt": {"word_embed_proj_dim": 16},  # as in OPT 350M
    "phi3": {
        "original_max_position_embeddings": 16,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "original_max_position_embeddings": 16,
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
        },
    },
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}
# What is refused, and by which words.
NOT_CAUSAL, NO_LAYERS, STREAMS = "is not causal", "has no list of", "hand on several streams"
REFUSED = {
    "xlnet": NOT_CAUSAL,
    "cpmant": NOT_CAUSAL,
    "dory": "runs its layers several times",
    "hrm_text": NO_LAYERS,
    "longcat_flash": NO_LAYERS,
    "deepseek_v4": STREAMS,
    "hy_v4": STREAMS,
    "prophetnet": STREAMS,
}
SAMPLE = (
    *("gpt2", "opt", "bloom", "falcon", "mpt", "gemma4_text", "glm4", "nemotron", "phi3"),
    *("mamba", "qwen3_next", "qwen3_5_text", "bert", "xlnet", "gemma3n_text", "roc_bert"),
)
EVERYDAY = ("gpt2", "bloom", "gemma4_text", "glm4", "mamba", "bert", "roc_bert")  # the last has no eos_token_id
LARGEST = 20_000_000  # weights; families whose configs have other names of sizes are left to their own tests


def tiny_config(family):
    """The config of a family, tiny as far as its fields have the usual names."""
    config_class = CONFIG_MAPPING[family]
    names = {field.name for field in dataclasses.fields(config_class)}
    given = {**{name: value for name, value in TINY.items() if name in names}, **OTHERS.get(family, {})}
    return config_class(**given)


def make_target(family):
    """A tiny random target; skips the test where the family is none of this host's, or does not get tiny."""
    if family == "xlstm":
        pytest.skip("the host's cache is of another shape than its layers at these sizes, in plain generate too")
    if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip("no family of this host")
    try:
        config = tiny_config(family)
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    except Exception as error:  # noqa: BLE001  whatever the host says of these sizes
        pytest.skip(f"these sizes are none of {family}: {error}"[:200])
    if size > LARGEST:
        pytest.skip(f"{size} weights are not tiny")
    torch.manual_seed(0)
    target = AutoModelForCausalLM.from_config(config).eval()
    target.generation_config.eos_token_id, target.generation_config.pad_token_id = None, 0
    return target


def make_rows():
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "input_ids": torch.randint(3, 60, (24 + i,), generator=generator).tolist(),
            "loss_mask": [0] * 6 + [1] * (18 + i),
        }
        for i in range(2)
    ]


# The others are told no more of a target than its name.
ASK_ITS_CONFIG = {"sglang", "vllm"}


def check_family(family, tmp_path, engines):
    """Train a new drafter for one update, and all that is around it."""
    target, rows = make_target(family), make_rows()
    settings = {
        "max_steps": 1,
        "ttt_steps": 2,
        "min_coverage": 0.0,
        "eval_generate_prompts": 1,
        "eval_max_new_tokens": 4,
    }
    trainer = Eagle3Trainer(
        target_model=target, args=make_args(tmp_path, **settings), train_dataset=rows, eval_dataset=rows
    )
    assert " trained weights" in str(trainer.forecast())
    trainer.train()
    metrics = trainer.evaluate()
    assert math.isfinite(metrics["eval_loss"])
    assert metrics["eval_acceptance_length"] >= 1
    for engine in engines:
        name = target.config if engine in ASK_ITS_CONFIG else "a/b"
        assert trainer.drafter.export(tmp_path / engine, to=engine, target=name).folder == tmp_path / engine


def check(family, tmp_path, engines=ENGINES):
    """`check_family`, or the words of its refusal."""
    if family not in REFUSED:
        check_family(family, tmp_path, engines)
        return
    with pytest.raises(ValueError, match=REFUSED[family]):
        check_family(family, tmp_path, engines)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("family", slow_but(EVERYDAY, SAMPLE))
def test_a_family_trains_and_its_drafter_can_leave(family, tmp_path):
    check(family, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - set(SAMPLE)))
def test_every_family_trains_and_its_drafter_can_leave(family, tmp_path):
    check(family, tmp_path, ASK_ITS_CONFIG)


# ---- rotary embeddings ----

YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
SLIDING = {"rope_type": "default", "rope_theta": 1e4}
PARTIAL = {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5}
PLAIN = {"rope_type": "default", "rope_theta": 5e5}


@pytest.mark.parametrize(
    ("theirs", "ours", "is_said"),
    [
        (PLAIN, PLAIN, False),
        ({**YARN, "beta_fast": 32.0, "truncate": False}, {**YARN, "beta_fast": 32.0, "truncate": False}, False),
        (
            {"type": "linear", "rope_theta": 1e4, "factor": 2.0},
            {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
            False,
        ),
        (PARTIAL, PLAIN, True),
        ({**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}, YARN, True),
        ({**YARN, "partial_rotary_factor": 0.75}, YARN, True),
        ({**PLAIN, "mrope_section": [1, 1, 2], "mrope_interleaved": True}, PLAIN, True),
        ({**PLAIN, "rope_type": "mrope", "mrope_section": [1, 1, 2]}, PLAIN, True),
        ({**PLAIN, "rope_type": "proportional", "partial_rotary_factor": 0.25}, PLAIN, True),
        ({**PLAIN, "rope_type": "dynamic", "factor": 4.0}, PLAIN, True),
        ({**PLAIN, "rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}, PLAIN, True),
        ({"sliding_attention": SLIDING, "full_attention": PARTIAL}, PLAIN, True),
        ({"sliding_attention": SLIDING, "full_attention": PLAIN}, PLAIN, False),
        ({"chunked_attention": SLIDING, "full_attention": None}, SLIDING, False),
        ({"rope_type": "default", "rope_theta": None}, {"rope_type": "default", "rope_theta": 1e4}, True),
        ({}, {"rope_type": "default", "rope_theta": 1e4}, False),
        (None, {"rope_type": "default", "rope_theta": 1e4}, False),
    ],
)
def test_a_new_drafter_takes_a_rope_that_can_leave(theirs, ours, is_said, said):
    assert choose_rope(theirs) == ours
    assert ours["rope_type"] in ROPES
    assert len(said) == is_said
    assert all(str(ours) in text for text in said)


@pytest.fixture
def said():
    """What training warns of, whatever it warned of once before."""
    logging.Logger.warning_once.cache_clear()
    texts: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: texts.append(record.getMessage())
    logger = logging.getLogger("hf_eagle3.training")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.WARNING)
    yield texts
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.mark.parametrize(
    "rope",
    [PARTIAL, {"full_attention": PLAIN}, {"rope_type": "none of these", "rope_theta": 1e4}],
)
def test_a_rope_that_cannot_leave_is_refused_before_training(rope, tmp_path):
    target = make_target("llama")
    with pytest.raises(ValueError, match="rotary parameters"):
        new_drafter(target, torch.arange(3, 43), rope_parameters=rope)


def test_a_drafter_that_cannot_leave_is_not_trained_further(tmp_path):
    """Such as earlier versions made for targets with partial rotary embeddings."""
    target = make_target("llama")
    drafter = new_drafter(target, torch.arange(3, 43))
    drafter.config.rope_parameters = dict(PARTIAL)
    with pytest.raises(ValueError, match=r"no drafter has rotary parameters .*Leave out partial_rotary_factor"):
        Eagle3Trainer(drafter, target, make_args(tmp_path), train_dataset=make_rows())


def test_states_do_not_depend_on_longer_texts_beside(tmp_path):
    """Longrope takes other angles when a text is longer than the target was trained on at first (16 here)."""
    target = make_target("phi3")
    source = OnlineStates(target, (1, 4, 6))
    texts = [torch.arange(3, 3 + n) for n in (15, 17, 15)]

    def states(*some):
        return source.run(some, torch.device("cpu"))

    together, alone = states(*texts), [states(text) for text in texts]
    for part in range(2):
        expected = torch.cat([one[part] for one in alone])
        torch.testing.assert_close(together[part], expected, rtol=1e-4, atol=1e-5)


# ---- sizes ----


def test_sizes_by_layer_are_the_largest():
    config = tiny_config("gemma3n_text")
    config.intermediate_size = [16, 48, 32, 16, 16, 16, 16, 16]
    assert find_size(config, "nothing", "intermediate_size", "hidden_size") == 48
    assert find_size(config, "nothing") is None
    gemma = tiny_config("gemma4_text")
    assert find_size(gemma, "head_dim") == max(layer.head_dim for layer in gemma.per_layer_config) > 8


def test_a_narrow_drafter_has_the_targets_embeddings_as_its_own():
    target = make_target("opt")
    drafter = new_drafter(target, torch.arange(3, 43))
    assert (drafter.config.hidden_size, drafter.config.target_hidden_size) == (16, 32)
    assert torch.equal(drafter.embed_tokens.weight, target.get_input_embeddings().weight)


def test_states_of_a_target_with_a_narrow_head_are_stored(tmp_path):
    target, rows = make_target("opt"), make_rows()
    stored = StoredStates(store_states(target, rows, tmp_path / "states", [2, 4, 5]))
    args = make_args(tmp_path, max_steps=1, min_coverage=0.0, aux_layer_ids=[2, 4, 5])
    losses = []
    for source in (
        {"states": stored, "train_dataset": stored.dataset},
        {"target_model": target, "train_dataset": rows},
    ):
        trainer = Eagle3Trainer(args=args, **source)
        losses.append(trainer.train().training_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_forecast_counts_each_layer_as_it_attends():
    shape = TargetShape.of(gemma := make_target("gemma4_text"))
    widths = [4 * layer.head_dim for layer in gemma.config.per_layer_config]
    windows = [8 if kind == "sliding_attention" else None for kind in gemma.config.layer_types]
    assert shape.attending == tuple(zip(widths, windows, strict=True))
    hybrid = TargetShape.of(target := make_target("qwen3_next"))
    assert len(hybrid.attending) == target.config.layer_types.count("full_attention") < 8
    recurrent = TargetShape.of(make_target("mamba"))
    assert target_flops(recurrent, 4096) == target_flops(recurrent, 1) == 2 * recurrent.active


# ---- what cannot be assisted ----


@pytest.mark.parametrize(
    ("depth", "ends"), slow_rows_but([(3, range(3, 64, 5))], [(1, None), (3, None), (3, range(3, 64, 5))])
)
def test_what_is_walked_is_what_is_decoded(tmp_path, depth, ends):
    target, rows = make_target("llama"), make_rows()
    target.generation_config.eos_token_id = ends and list(ends)
    args = make_args(tmp_path, eval_depth=depth, max_steps=20, ttt_steps=3, min_coverage=0.0)
    trainer = Eagle3Trainer(target_model=target, args=args, train_dataset=rows)
    trainer.train()
    drafter = trainer.drafter.eval()
    prompts = [torch.tensor(row["input_ids"][:n]) for row in rows for n in (3, 6)]
    vocabulary = DraftVocabulary(drafter.draft_to_target_ids, V)
    source, method = (
        OnlineStates(target, drafter.bound_aux_layer_ids),
        Method(LOSSES["forward_kl"], *torch.zeros(2, depth)),
    )

    def find_hits(batch):
        return ttt(drafter, batch, source.states(batch), source.head, vocabulary, method)[1].hits

    if ends is None:  # what the config says ends nothing then, as in `generate`
        target.config.eos_token_id = list(range(3, 64, 5))
    for length in (1, 2, 3, 9):
        decoded = generate_and_count(target, drafter, prompts, depth, length)
        walked = generate_and_walk(target, prompts, length, Collator(depth), find_hits)
        assert (walked.rounds, walked.accepted.tolist()) == (decoded.rounds, decoded.accepted.tolist())
    assert decoded.rounds > 4


def test_that_it_walks_is_said_once(tmp_path, said):
    rows = make_rows()
    args = make_args(tmp_path, eval_generate_prompts=1, eval_max_new_tokens=3, min_coverage=0.0)
    target = make_target("recurrent_gemma")  # whose states are no part of a cache
    trainer = Eagle3Trainer(target_model=target, args=args, train_dataset=rows, eval_dataset=rows)
    trainer.evaluate()
    trainer.evaluate()
    assert sum("walked along its greedy answers" in text for text in said) == 1


def test_hybrids_decode_in_evaluation(tmp_path, said):
    rows = make_rows()
    args = make_args(tmp_path, eval_generate_prompts=2, eval_max_new_tokens=6, min_coverage=0.0)
    trainer = Eagle3Trainer(target_model=make_target("qwen3_5_text"), args=args, train_dataset=rows, eval_dataset=rows)
    assert trainer.evaluate()["eval_acceptance_length"] >= 1
    assert not any("walked along its greedy answers" in text for text in said)
