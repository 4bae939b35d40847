"""D-Flash and DSpark checkpoints of other producers: read, described, exported, and refused by name."""

import copy
import json

import pytest
import torch
from helpers.blocks import make_block_drafter
from helpers.models import NUM_LAYERS, H, V, make_target
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from hf_eagle3.checkpoints.block_flavours import BLOCK_FLAVOURS
from hf_eagle3.checkpoints.blocks import default_outputs
from hf_eagle3.checkpoints.describe import describe_drafter
from hf_eagle3.checkpoints.load import load_published_config
from hf_eagle3.modeling import CheckpointError, DFlashDrafterModel

LAYERS = {
    "model_type": "qwen3",
    "hidden_size": H,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": V,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "rope_theta": 1e4,
    "rope_scaling": None,
    "sliding_window": None,
    "use_sliding_window": False,
    "max_window_layers": 28,
    "layer_types": ["full_attention"] * 2,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.57.1",
}
# Kind of drafter, config.json, and whether embeddings and head are stored: as the producers' own code writes them.
LAYOUTS = {
    "z-lab": (
        "dflash",
        {
            **LAYERS,
            "architectures": ["DFlashDraftModel"],
            "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
            "block_size": 8,
            "num_target_layers": NUM_LAYERS,
            "dflash_config": {"target_layer_ids": [0, 3, NUM_LAYERS - 3], "mask_token_id": 61},
        },
        False,
    ),
    "z-lab, newer": (
        "windows",
        {
            **LAYERS,
            "architectures": ["DFlashDraftModel"],
            "num_target_layers": NUM_LAYERS,
            "layer_types": ["full_attention", "sliding_attention"],
            "sliding_window": 6,
            "dflash_config": {"block_size": 8, "target_layer_ids": [0, 3, NUM_LAYERS - 3], "mask_token_id": 61},
        },
        False,
    ),
    "DeepSpec": (
        "dspark",
        {
            **LAYERS,
            "architectures": ["Qwen3DSparkModel"],
            "num_target_layers": NUM_LAYERS,
            "block_size": 8,
            "mask_token_id": 61,
            "target_layer_ids": [0, 3, NUM_LAYERS - 3],
            "num_anchors": 512,
            "markov_rank": 6,
            "markov_head_type": "vanilla",
            "enable_confidence_head": True,
            "confidence_head_with_markov": True,
        },
        True,
    ),
    "D-Flash, speculators": (
        "own_vocabulary",
        {
            "architectures": ["DFlashSpeculator"],
            "speculators_model_type": "dflash",
            "speculators_version": "0.9.0",
            "transformer_layer_config": LAYERS,
            "draft_vocab_size": 40,
            "block_size": 8,
            "aux_hidden_state_layer_ids": [1, 4, NUM_LAYERS - 2],
            "mask_token_id": 61,
            "sliding_window_non_causal": False,
            "sample_from_anchor": False,
            "target_hidden_size": None,
            "speculators_config": {"verifier": {"name_or_path": "some-owner/some-target"}},
        },
        None,
    ),
    "DSpark, speculators": (
        "gated",
        {
            "architectures": ["DSparkSpeculator"],
            "speculators_model_type": "dspark",
            "transformer_layer_config": LAYERS,
            "draft_vocab_size": V,
            "block_size": 8,
            "aux_hidden_state_layer_ids": [1, 4, NUM_LAYERS - 2],
            "mask_token_id": 61,
            "markov_rank": 6,
            "markov_head_type": "gated",
            "enable_confidence_head": False,
            "confidence_head_with_markov": False,
        },
        True,
    ),
}


@pytest.fixture
def target():
    return make_target("llama")


def write(folder, target, layout, *, change=lambda config, weights: None):
    """A drafter in a producer's layout; `change` may spoil it. The drafter, as ours."""
    kind, config, stores = LAYOUTS[layout]
    drafter = make_block_drafter(target, kind)
    config, weights = json.loads(json.dumps(config)), {k: v.contiguous() for k, v in drafter.state_dict().items()}
    d2t = weights.pop("d2t")
    if stores is None:
        members = torch.zeros(V, dtype=torch.bool)
        members[drafter.draft_to_target_ids] = True
        weights |= {"d2t": d2t, "t2d": members}
    elif stores:
        weights["embed_tokens.weight"] = drafter._weight("embed_tokens").clone()
        weights["lm_head.weight"] = drafter._weight("lm_head").clone()
    change(config, weights)
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return drafter


def same_outputs(ours, theirs):
    ids, states = ours.make_block(torch.tensor([3, 5]), 6), torch.randn(2, 9, 3 * H)
    with torch.no_grad():
        a, b = (drafter(input_ids=ids, aux_hidden_states=states) for drafter in (ours, theirs))
        assert torch.equal(a.logits, b.logits)
        before = torch.tensor([7, 9])
        one, other = (
            d.add_markov(x.logits[:, 2], before, x.hidden_states[:, 2], None)[0] for d, x in ((ours, a), (theirs, b))
        )
        assert torch.equal(one, other)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_flavour_loads_to_the_same_drafts(layout, target, tmp_path):
    drafter = write(tmp_path, target, layout)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert type(loaded) is DFlashDrafterModel
    assert loaded.bind(target).bound_aux_layer_ids == (1, 4, NUM_LAYERS - 2)
    assert torch.equal(loaded.draft_to_target_ids, drafter.draft_to_target_ids)
    same_outputs(drafter, loaded)
    for name in ("block_size", "mask_token_id", "drafts_from_root", "is_causal", "sliding_window", "layer_types"):
        assert getattr(loaded.config, name) == getattr(drafter.config, name), name
    found = describe_drafter(tmp_path)
    assert found.flavour == layout.removesuffix(", newer")
    assert {name: value for name, value, _ in found.rows}["aux_layer_ids"] == "[1, 4, 6]"
    family = "DSpark" if "markov_head.markov_w1.weight" in found.tensors else "D-Flash"
    assert f"a {family} drafter, flavour {found.flavour}" in found.head[0]
    assert found.to_dict()["fields"]["block_size"] == {"value": 8, "from": found.sources["block_size"]}
    prompt = torch.tensor([[5, 6, 7]])
    plain = target.generate(prompt, max_new_tokens=12, do_sample=False)
    assert target.generate(prompt, max_new_tokens=12, do_sample=False, assistant_model=loaded).equal(plain)


def test_every_flavour_has_a_layout():
    assert {flavour.name for flavour in BLOCK_FLAVOURS} == {name.removesuffix(", newer") for name in LAYOUTS}


def test_fields_may_be_given(target, tmp_path):
    write(tmp_path, target, "z-lab")
    config = AutoConfig.from_pretrained(tmp_path, aux_layer_ids=[0, 3, 5], block_size=4)
    assert (config.aux_layer_ids, config.block_size) == ([0, 3, 5], 4)


def test_code_of_its_own_is_left_to_it(target, tmp_path):
    write(tmp_path, target, "z-lab")
    assert load_published_config(tmp_path, trust_remote_code=True) is None
    assert load_published_config(tmp_path) is not None


@pytest.mark.parametrize("layout", ["z-lab", "DeepSpec"])
def test_one_that_was_loaded_as_something_else_is_named(layout, target, tmp_path):
    write(tmp_path, target, layout)
    config = Qwen3Config(**{key: value for key, value in LAYOUTS[layout][1].items() if key != "model_type"})
    mistaken = Qwen3ForCausalLM(config)
    with pytest.raises(
        ValueError, match=r"a block drafter that was loaded as Qwen3ForCausalLM, .* without trust_remote_code"
    ):
        target.generate(torch.tensor([[5, 6, 7]]), assistant_model=mistaken, max_new_tokens=3)


def test_layers_that_are_not_stated_are_z_labs(target, tmp_path):
    def change(config, weights):
        del config["dflash_config"]["target_layer_ids"]
        config["num_target_layers"] = NUM_LAYERS
        weights["fc.weight"] = weights["fc.weight"][:, : 2 * H].contiguous()

    write(tmp_path, target, "z-lab", change=change)
    assert AutoModel.from_pretrained(tmp_path).config.aux_layer_ids == [2, NUM_LAYERS - 2]
    assert default_outputs(36, 5) == [1, 9, 17, 25, 33]  # Qwen3-8B's
    assert default_outputs(36, 1) == [18]


# ---- what is refused ----


def put(**values):
    return lambda config, weights: config.update(values)


def nested(**values):
    return lambda config, weights: config["dflash_config"].update(values)


def tensor(name, make):
    def change(config, weights):
        weights[name] = make(weights.get(name))
        if weights[name] is None:
            del weights[name]

    return change


BAD = {
    "mask outside": ("z-lab", nested(mask_token_id=V), "config.json: .*mask_token_id must be a token"),
    "no mask": ("z-lab", nested(mask_token_id=None), "config.json: mask_token_id must be given"),
    "block of nothing": ("z-lab", put(block_size=0), "block_size must be from 2 to 64, got 0"),
    "two block sizes": ("z-lab", nested(block_size=5), "block_size is 8 and dflash_config.block_size is 5"),
    "ids in no order": ("z-lab", nested(target_layer_ids=[3, 0, 5]), "must be ascending layer numbers from -1"),
    "ids of text": ("z-lab", nested(target_layer_ids=["a"]), "must be ascending layer numbers from -1"),
    "id behind the norm": (
        "z-lab",
        nested(target_layer_ids=[0, 3, NUM_LAYERS - 1]),
        f"names layer {NUM_LAYERS - 1} of {NUM_LAYERS}, whose output z-lab reads behind the target's final norm",
    ),
    "no ids": (
        "DeepSpec",
        put(target_layer_ids=None, architectures=["Qwen3DSparkModel"]),
        "target_layer_ids must be given",
    ),
    "no table": ("z-lab", put(dflash_config=[1]), "dflash_config must be a table"),
    "width": ("z-lab", put(hidden_size=16), "hidden_size is 16, but by the tensors hidden_size is 32"),
    "heads": ("z-lab", put(num_attention_heads=8), "num_attention_heads is 8, but by the tensors .* is 4"),
    "layers": ("z-lab", put(num_hidden_layers=3), "num_hidden_layers is 3, but by the tensors .* is 2"),
    "markov rank": ("DeepSpec", put(markov_rank=5), "markov_rank is 5, but by the tensors markov_rank is 6"),
    "markov vocabulary": (
        "DeepSpec",
        tensor("markov_head.markov_w1.weight", lambda x: x[:50].contiguous()),
        r"markov_head.markov_w1.weight has shape \[50, 6\], expected \[64, 6\]",
    ),
    "markov kind": ("DeepSpec", put(markov_head_type="rnn"), "markov_head.joint_proj.weight is missing"),
    "confidence": (
        "DeepSpec",
        put(enable_confidence_head=False),
        "enable_confidence_head is False, but by the tensors has_confidence_head is True",
    ),
    "missing": (
        "z-lab",
        tensor("layers.1.mlp.up_proj.weight", lambda _: None),
        "layers.1.mlp.up_proj.weight is missing",
    ),
    "missing norm": ("z-lab", tensor("layers.0.self_attn.q_norm.weight", lambda _: None), "q_norm.weight is missing"),
    "extra": ("z-lab", tensor("fc.bias", lambda _: torch.zeros(H)), "fc.bias has no place in this drafter"),
    "narrow fc": (
        "z-lab",
        tensor("fc.weight", lambda x: x[:, :-1].contiguous()),
        "95 columns, which is no multiple of the 3",
    ),
    "gates": ("z-lab", tensor("layers.0.self_attn.g_proj.weight", lambda _: torch.zeros(4, H)), "gated attention"),
    "fused": (
        "z-lab",
        tensor("layers.0.self_attn.qkv_proj.weight", lambda _: torch.zeros(4, H)),
        "one tensor for queries",
    ),
    "sinks": ("z-lab", tensor("layers.0.self_attn.sinks", lambda _: torch.zeros(4)), "attention sinks"),
    "gemma": ("DeepSpec", put(architectures=["Gemma4DSparkModel"]), "its network is Gemma 4's"),
    "softcap": ("z-lab", put(final_logit_softcapping=30.0), "final_logit_softcapping is 30.0, and our network"),
    "window without a number": ("z-lab", put(layer_types=["sliding_attention"] * 2), "sliding_window is null|None"),
    "mixed": (
        "D-Flash, speculators",
        lambda config, _: config["transformer_layer_config"].update(
            layer_types=["full_attention", "sliding_attention"], sliding_window=4
        ),
        "its sliding layers are causal within the block",
    ),
    "two tables": ("D-Flash, speculators", put(hidden_size=8), "hidden_size is 8 at the top and 32 in transformer"),
    "no weights": ("DeepSpec", lambda _, weights: weights.clear(), "without weights beside it"),
    "rope": ("z-lab", put(rope_scaling={"rope_type": "odd"}), "config.json: "),
    "partial rope": ("z-lab", put(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_named(case, target, tmp_path):
    layout, change, says = BAD[case]
    write(tmp_path, target, layout, change=change)
    with pytest.raises(CheckpointError, match=says) as caught:
        AutoModel.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_sliding_layers_of_speculators_are_causal_unless_told(target, tmp_path):
    def windows(**further):
        def change(config, _weights):
            config["transformer_layer_config"].update(layer_types=["sliding_attention"] * 2, sliding_window=6)
            config.update(further)

        return change

    write(tmp_path / "causal", target, "D-Flash, speculators", change=windows())
    write(tmp_path / "both", target, "D-Flash, speculators", change=windows(sliding_window_non_causal=True))
    for name, is_causal in (("causal", True), ("both", False)):
        config = AutoConfig.from_pretrained(tmp_path / name)
        assert (config.is_causal, config.sliding_window, config.layer_types) == (is_causal, 6, None)


def test_z_labs_windows_by_another_name(target, tmp_path):
    write(tmp_path, target, "z-lab", change=nested(use_swa=True, swa_window_size=5))
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.sliding_window, config.layer_types) == (5, None)


# ---- export ----

EXPORTS = [
    ("dflash", "sglang", "--speculative-algorithm DFLASH"),
    ("dflash", "vllm", '"method": "dflash"'),
    ("dflash", "speculators", "vllm serve "),
    ("windows", "sglang", "DFLASH"),
    ("causal", "vllm", '"num_speculative_tokens": 7'),
    ("dspark", "sglang", "--speculative-algorithm DSPARK"),
    ("dspark", "vllm", '"num_speculative_tokens": 8'),
    ("dspark", "speculators", "vllm serve "),
    ("gated", "sglang", "DSPARK"),
    ("rnn", "speculators", "vllm serve "),
    ("own_vocabulary", "speculators", "vllm serve "),
    ("one_window", "speculators", "vllm serve "),
    ("dspark", "hf", "AutoModel.from_pretrained"),
]


@pytest.mark.parametrize(("kind", "engine", "command"), EXPORTS)
def test_what_is_exported_comes_back(kind, engine, command, target, tmp_path):
    drafter = make_block_drafter(target, kind)
    exported = drafter.export(tmp_path / "out", to=engine, target="some-owner/some-target")
    assert command in exported.command
    again = AutoModel.from_pretrained(tmp_path / "out").eval().bind(target)
    same_outputs(drafter, again)
    for name, weight in drafter.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)
    if engine in ("sglang", "vllm"):
        assert exported.engines in ((engine, "vllm"), (engine, "sglang"))
        stored = load_file(tmp_path / "out" / "model.safetensors")
        assert ("embed_tokens.weight" in stored) == drafter.config.drafts_from_root
    if engine == "hf":
        assert "# " in (tmp_path / "out" / "README.md").read_text()
        assert "A DSpark drafter" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("kind", "engine", "says"),
    [
        ("own_vocabulary", "sglang", "draft_vocab_size=40: z-lab's and DeepSpec's layouts have the target's whole"),
        ("own_vocabulary", "vllm", "has_own_embeddings=True: z-lab's layout has the target's embeddings"),
        ("rnn", "vllm", "markov_rank=6: z-lab's layout has no Markov head"),
        ("causal", "speculators", "is_causal=True: in that layout only sliding layers can be causal"),
    ],
)
def test_what_an_engine_cannot_serve_is_said(kind, engine, says, target, tmp_path):
    with pytest.raises(ValueError, match=says):
        make_block_drafter(target, kind).export(tmp_path / "out", to=engine, target="some-owner/some-target")


@pytest.mark.parametrize("given", ["model", "folder", "tied folder"])
def test_an_export_takes_the_targets_vocabulary_from_it(given, tmp_path):
    source = make_target("llama")
    drafter = make_block_drafter(source, "dspark")
    wanted = {name: drafter._weight(name) for name in ("embed_tokens", "lm_head")}
    if given == "tied folder":
        source = copy.deepcopy(source)
        source.config.tie_word_embeddings = True
        source.tie_weights()
        wanted["lm_head"] = wanted["embed_tokens"]
    drafter._borrowed = {}
    if given != "model":
        source.save_pretrained(tmp_path / "target")
    drafter.export(tmp_path / "out", to="vllm", target=source if given == "model" else tmp_path / "target")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in wanted.items():
        assert torch.equal(stored[f"{name}.weight"], weight)


def test_an_export_without_the_targets_vocabulary_is_refused(tmp_path):
    drafter = make_block_drafter(make_target("llama"), "dspark")
    drafter._borrowed = {}
    with pytest.raises(
        ValueError, match="target's own embed_tokens, which this drafter borrows: give the target as a model"
    ):
        drafter.export(tmp_path / "out", to="vllm", target="some-owner/some-target")
    config = copy.deepcopy(make_target("llama").config)
    config.hidden_size = 48
    other = LlamaForCausalLM(config)
    with pytest.raises(ValueError, match=r"target's embed_tokens is \[64, 48\].* made for another target"):
        drafter.export(tmp_path / "out", to="vllm", target=other)
