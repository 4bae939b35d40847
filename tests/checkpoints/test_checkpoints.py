"""Published layouts, written by hand, load through `AutoModel`; what is wrong with them is refused by name."""

import json
import logging
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.layouts import (
    ALSO,
    FUZZED,
    LAYOUTS,
    ROPE,
    USED,
    H,
    Ht,
    I,
    V,
    V_d,
    Weights,
    bf16,
    change,
    make_config,
    make_weights,
    write,
)
from helpers.models import drafter_config
from helpers.reference_drafter import ReferenceDrafter, in_float64
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    Qwen3ForCausalLM,
)

import hf_eagle3
from hf_eagle3.checkpoints.load import load_published_config
from hf_eagle3.drafters.draft import Committed, Prompted
from hf_eagle3.drafters.parallel import PARALLEL
from hf_eagle3.modeling import CheckpointError, Eagle3DrafterConfig, Eagle3DrafterModel, weights_eagle3
from hf_eagle3.speculation.shape import Shapes, chain

layouts = pytest.mark.parametrize("layout", LAYOUTS)


def our_names(weights: Weights) -> Weights:
    """By a table of its own: what each published tensor is."""
    weights = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    table = {"midlayer.0": "layers.0", "midlayer.1": "layers.1", "midlayer": "layers.0"}
    table |= {"aux_norm_low": "fc_norm.0", "aux_norm_mid": "fc_norm.1", "aux_norm_high": "fc_norm.2"}
    table |= {"layers.1.hidden_norm": "layers.1.input_layernorm", "midlayer.1.hidden_norm": "layers.1.input_layernorm"}
    out = {}
    for name, tensor in weights.items():
        old = max((old for old in table if name.startswith(old + ".")), key=len, default="")
        out[table.get(old, "") + name.removeprefix(old)] = tensor
    if "mask_hidden" in out:
        out["mask_hidden"] = out["mask_hidden"].reshape(1, 1, -1)
    return out


def make_target(hidden_size: int = H) -> LlamaForCausalLM:
    torch.manual_seed(4)
    sizes = {"intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    target = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=V, hidden_size=hidden_size)).eval()
    target.config.num_hidden_layers = 100  # only its embeddings are used, so only they are there
    return target


def check_against_reference(drafter: Eagle3DrafterModel, weights: Weights, published: dict) -> None:
    """Logits, in float32, equal the reference over the published tensors."""
    drafter = drafter.float()
    target = make_target(drafter.config.target_hidden_size)
    drafter.bind(target)
    generator = torch.Generator().manual_seed(6)
    width = drafter.config.num_captured_states * drafter.config.target_hidden_size
    states, ids = torch.randn(1, 7, width, generator=generator), torch.randint(V, (1, 7), generator=generator)
    with torch.no_grad():
        out = drafter(ids, aux_hidden_states=states)

    ours = our_names(weights)
    ours.setdefault("embed_tokens.weight", target.model.embed_tokens.weight.detach())
    ours.setdefault("lm_head.weight", target.lm_head.weight.detach())
    config = drafter.config.to_dict()
    inner = published.get("transformer_layer_config") or published.get("model") or published
    nested = published.get("eagle_config", {})
    config["rms_norm_eps"] = inner["rms_norm_eps"]
    config["norm_output"] = published.get("norm_output", nested.get("norm_output", False))
    logits, feedback = ReferenceDrafter(ours, config).step(ids[0], states=states[0], positions=list(range(7)))
    torch.testing.assert_close(out.logits[0].double(), logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.feedback[0].double(), feedback, rtol=1e-4, atol=1e-4)
    drafter.bind(target.double())
    with torch.no_grad(), in_float64(drafter):
        exact = drafter(ids, aux_hidden_states=states.double())
    torch.testing.assert_close(exact.logits[0], logits, rtol=0, atol=1e-10)
    torch.testing.assert_close(exact.feedback[0], feedback, rtol=0, atol=1e-10)
    wanted = USED if "d2t" in weights or "t2d" in weights else torch.arange(V)
    wanted = torch.arange(V) if drafter.config.draft_vocab_size == V else wanted
    assert torch.equal(drafter.draft_to_target_ids, wanted)


# ---- what loads ----


@pytest.fixture
def host_says(caplog):
    """What the host warns of while it loads; its own logger is quiet in tests."""
    logger = logging.getLogger("transformers.modeling_utils")
    level = logger.level
    logger.setLevel("WARNING")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
    logger.setLevel(level)


@pytest.mark.sampled(2)
@layouts
def test_layout_loads_through_auto_model(layout, tmp_path, host_says):
    published, weights, expected = LAYOUTS[layout]
    write(tmp_path, published, weights)
    drafter = AutoModel.from_pretrained(tmp_path)
    assert "REPORT" not in host_says.text
    assert type(drafter) is Eagle3DrafterModel
    assert not drafter.training
    assert drafter.dtype == torch.bfloat16
    for key, value in expected.items():
        actual = getattr(drafter.config, key)
        if key == "rope_parameters":
            actual = {name: actual[name] for name in value}
        assert actual == value, key
    check_against_reference(drafter, weights, published)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout.startswith("peagle")])
def test_all_draft_tokens_come_from_one_forward(layout, tmp_path):
    """Position k behind the last state reads mask token and `mask_hidden`, through fc, and stands k further."""
    published, weights, _ = LAYOUTS[layout]
    drafter = AutoModel.from_pretrained(write(tmp_path, published, weights), dtype=torch.float64)
    target = make_target().double()
    drafter.bind(target)
    T, K, token = 6, 4, drafter.config.mask_token_id
    generator = torch.Generator().manual_seed(8)
    states = torch.randn(1, T, 3 * H, generator=generator).double()
    ids = torch.randint(V, (1, T), generator=generator)

    ours = {"embed_tokens.weight": target.model.embed_tokens.weight.detach(), **our_names(weights)}
    config = {**drafter.config.to_dict(), "rms_norm_eps": 1e-5}
    all_ids = torch.cat([ids[0], torch.full((K - 1,), token)])
    all_states = torch.cat([states[0], ours["mask_hidden"][0].double().expand(K - 1, -1)])
    wanted, _ = ReferenceDrafter(ours, config).step(all_ids, states=all_states, positions=list(range(T + K - 1)))
    wanted = wanted[T - 1 :]  # [K, V_d]

    seen = []
    with torch.no_grad(), in_float64(drafter):
        # At once, behind junk:
        padded, more = torch.zeros(1, T + K - 1, dtype=torch.long), torch.ones(1, T + K - 1, 3 * H).double()
        padded[:, :T], more[:, :T] = ids, states
        padded, more = drafter.with_masks(padded, more, torch.tensor([[T]]))
        at_once = drafter(padded, aux_hidden_states=more).logits[0, T - 1 :]

        # As a round does it, over a cache:
        def choose(logits: Tensor, depths: range, width: int) -> tuple[Tensor, None]:
            assert (len(depths), width) == (K, 1)
            seen.append(logits[0])
            return logits.argmax(-1, keepdim=True), None

        count = torch.tensor([T])
        prompted = Prompted(ids.roll(1, dims=1), states, count, torch.zeros_like(count))
        memory = PARALLEL.begin(drafter, prompted, Shapes((chain(K),)))
        PARALLEL.catch_up(memory, Committed(ids[:, -1:], None, torch.ones_like(count)), chain(K))
        tokens = PARALLEL.propose(drafter, memory, chain(K), choose).tokens
    torch.testing.assert_close(at_once, wanted, rtol=0, atol=1e-10)
    torch.testing.assert_close(torch.cat(seen), wanted, rtol=0, atol=1e-10)
    assert torch.equal(tokens[0], drafter.to_target_ids(wanted.argmax(-1)))
    assert int(memory.start) == T - 1


@pytest.mark.sampled(2)
@pytest.mark.parametrize("files", ["safetensors", "sharded", "bin", "old_bin", "sharded_bin"])
@pytest.mark.parametrize(
    "layout",
    [
        *("specforge", "eagle31_old_names", "safeailab", "two_layers_both_names", "speculators", "nemo_mla"),
        "peagle_flat_mask_and_pard_token",
    ],
)
def test_every_kind_of_file_loads(layout, files, tmp_path):
    published, weights, _ = LAYOUTS[layout]
    write(tmp_path, published, weights, files)
    drafter = AutoModelForCausalLM.from_pretrained(str(tmp_path))
    check_against_reference(drafter, weights, published)


def swap_halves(tensor: Tensor) -> Tensor:
    return torch.cat(tensor.chunk(2, dim=1)[::-1], dim=1).contiguous()


def swap_pairs(tensor: Tensor) -> Tensor:
    """The last ROPE rows in Llama's order of halves, where MLA has neighbours."""
    return torch.cat([tensor[:-ROPE], tensor[-ROPE:].unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)]).contiguous()


@pytest.mark.parametrize(
    ("layout", "name", "permute"),
    [
        ("specforge", "midlayer.self_attn.k_proj.weight", swap_halves),  # [hidden ; embedding]
        ("specforge", "fc.weight", lambda w: w.roll(H, dims=1)),  # states in another order
        ("mla_kimi", "midlayer.self_attn.kv_a_proj_with_mqa.weight", swap_pairs),
        ("eagle31_four_states", "fc_norm.0.weight", lambda w: w.flip(0)),
        ("speculators_qwen3_eagle31", "layers.0.self_attn.q_norm.weight", lambda w: w.flip(0)),
    ],
)
def test_a_wrong_permutation_is_noticed(layout, name, permute, tmp_path):
    """Negative control: the comparison with the reference is sharp."""
    published, weights, _ = LAYOUTS[layout]
    drafter = AutoModel.from_pretrained(write(tmp_path, published, {**weights, name: permute(weights[name])}))
    with pytest.raises(AssertionError, match="not close"):
        check_against_reference(drafter, weights, published)


@pytest.mark.sampled(3)
@layouts
def test_saved_again_under_our_names_bit_for_bit(layout, tmp_path):
    published, weights, _ = LAYOUTS[layout]
    drafter = AutoModel.from_pretrained(write(tmp_path / "theirs", published, weights))
    drafter.save_pretrained(tmp_path / "ours")
    saved = load_file(tmp_path / "ours" / "model.safetensors")
    wanted = {name: tensor for name, tensor in our_names(weights).items() if name != "t2d"}
    wanted.setdefault("d2t", drafter.d2t)
    if layout == "absolute_table":
        wanted["d2t"] = D2T
    assert saved.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert saved[name].dtype == tensor.dtype, name
        assert torch.equal(saved[name], tensor), name

    again = AutoModel.from_pretrained(tmp_path / "ours")
    drop = {"_name_or_path", "transformers_version"}
    a, b = drafter.config.to_dict(), again.config.to_dict()
    assert {k: a[k] for k in a.keys() - drop} == {k: b[k] for k in b.keys() - drop}
    again.save_pretrained(tmp_path / "ours_again")
    files = [tmp_path / folder / "model.safetensors" for folder in ("ours", "ours_again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    check_against_reference(again, weights, published)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, "auto"])
@pytest.mark.parametrize("device_map", [None, {"": "cpu"}, "cpu"])
def test_dtype_and_device_map(dtype, device_map, tmp_path):
    published, weights, _ = LAYOUTS["old_rope"]
    write(tmp_path, published, weights)
    drafter = AutoModel.from_pretrained(tmp_path, dtype=dtype, device_map=device_map)
    assert {p.dtype for p in drafter.parameters()} == {torch.bfloat16 if dtype == "auto" else dtype}
    assert torch.equal(drafter.d2t, weights["d2t"])
    assert drafter.d2t.dtype == torch.int64
    fresh = Eagle3DrafterModel(drafter.config)
    assert drafter.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(drafter.rotary_emb.inv_freq, fresh.rotary_emb.inv_freq)
    assert torch.equal(drafter.rotary_emb.original_inv_freq, fresh.rotary_emb.original_inv_freq)


def test_published_half_precision_stays(tmp_path):
    weights = {n: t.half() if t.is_floating_point() else t for n, t in make_weights().items()}
    write(tmp_path, make_config(torch_dtype="bfloat16"), weights)  # the file is right, config.json is not
    assert AutoModel.from_pretrained(tmp_path).dtype == torch.float16


def test_int32_table_loads(tmp_path):
    weights = make_weights()
    write(tmp_path, make_config(), {**weights, "d2t": weights["d2t"].int(), "t2d": weights["t2d"].byte()})
    drafter = AutoModel.from_pretrained(tmp_path)
    assert drafter.d2t.dtype == torch.int64
    assert torch.equal(drafter.draft_to_target_ids, USED)


def test_a_subfolder(tmp_path):
    write(tmp_path / "compressed", make_config(), make_weights())
    drafter = AutoModel.from_pretrained(tmp_path, subfolder="compressed")
    assert type(drafter) is Eagle3DrafterModel


def test_user_overrides(tmp_path):
    write(tmp_path, make_config(), make_weights())
    drafter = AutoModel.from_pretrained(tmp_path, aux_layer_ids=[1, 2, 3], attn_implementation="eager")
    assert drafter.config.aux_layer_ids == [1, 2, 3]
    assert drafter.config._attn_implementation == "eager"
    config, unused = AutoConfig.from_pretrained(
        tmp_path, aux_layer_ids=[3, 4, 5], something=1, return_unused_kwargs=True
    )
    assert (config.aux_layer_ids, unused) == ([3, 4, 5], {"something": 1})


def test_the_config_loads_by_itself(tmp_path):
    write(tmp_path, make_config(), make_weights())
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is Eagle3DrafterConfig
    drafter = Eagle3DrafterModel.from_pretrained(tmp_path, config=config)
    assert torch.equal(drafter.layers[0].hidden_norm.weight, make_weights()["midlayer.hidden_norm.weight"])


def test_output_loading_info(tmp_path):
    write(tmp_path, make_config(), make_weights())
    drafter, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(drafter) is Eagle3DrafterModel
    assert not info["missing_keys"]


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("angelslim", "tie_word_embeddings is ignored"),
        ("angelslim", "num_hidden_layers is 24, but by the tensors it is 1"),
        ("default_boundaries_nested", "are the default boundaries"),
    ],
)
def test_doubts_are_said(layout, message, tmp_path, caplog):
    published, weights, _ = LAYOUTS[layout]
    with caplog.at_level(logging.WARNING, logger="hf_eagle3"):
        AutoConfig.from_pretrained(write(tmp_path, published, weights))
    assert message in caplog.text


def test_boundaries_that_look_like_outputs_are_told(tmp_path, caplog):
    config = make_config(eagle_config=..., eagle_aux_hidden_state_layer_ids=[1, 17, 32])
    with caplog.at_level(logging.WARNING, logger="hf_eagle3"):
        assert AutoConfig.from_pretrained(write(tmp_path, config, make_weights())).aux_layer_ids == [1, 17, 32]
    assert "aux_layer_ids=[2, 18, 33]" in caplog.text


# ---- what is not ours ----


def small_llama(model_class: type = LlamaForCausalLM, **extra):
    sizes = {"intermediate_size": I, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    torch.manual_seed(0)
    return model_class(LlamaConfig(**sizes, vocab_size=V, hidden_size=H, **extra))


def test_stock_llama_loads_as_llama_and_its_weights_stay_closed(tmp_path, monkeypatch):
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("looked at a weight file")

    small_llama().save_pretrained(tmp_path)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((tmp_path / "config.json").read_bytes())
    (broken / "model.safetensors.index.json").write_text("{")
    with pytest.raises(CheckpointError, match="not an index of shards"):
        weights_eagle3.find_weight_files(str(broken))
    assert load_published_config(broken) is None
    monkeypatch.setattr(weights_eagle3, "safe_open", refuse)
    with pytest.raises(AssertionError, match="looked at a weight file"):
        weights_eagle3.list_tensors(weights_eagle3.find_weight_files(str(tmp_path)))
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is LlamaForCausalLM
    assert type(AutoModel.from_pretrained(tmp_path)) is LlamaModel


@pytest.mark.parametrize(
    "odd", [{"draft_vocab_size": 10}, {"eagle_config": {"a": 1}}, {"fc_norm": True}, {"norm_output": True}]
)
@pytest.mark.parametrize("model_class", [LlamaForCausalLM, LlamaModel])
def test_a_llama_with_an_odd_key_stays_a_llama(odd, model_class, tmp_path):
    model = small_llama(model_class, **odd)
    model.save_pretrained(tmp_path)
    loaded = model_class.from_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is LlamaConfig
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def test_no_config_or_no_repository_is_the_hosts_business(tmp_path):
    assert load_published_config(tmp_path) is None
    assert load_published_config(tmp_path / "nothing" / "here") is None
    assert load_published_config("no-such-owner/no-such-repository", local_files_only=True) is None
    (tmp_path / "config.json").write_text("{broken")
    assert load_published_config(tmp_path) is None
    (tmp_path / "config.json").write_text("[1]")
    assert load_published_config(tmp_path) is None


def test_a_repository_with_code_of_its_own_is_left_to_it(tmp_path):
    config = make_config(
        architectures=["DSparkDraftModel"], eagle_config=..., auto_map={"AutoModel": "d.D"}, dflash_config={"a": 1}
    )
    assert load_published_config(write(tmp_path, config, make_weights())) is None


@pytest.mark.parametrize("path", [None, 7, b"bytes"])
def test_what_is_no_path_is_the_hosts_business(path):
    assert load_published_config(path) is None


@pytest.mark.parametrize(
    ("layout", "stock", "kind"),
    [
        ("specforge", LlamaForCausalLM, "a Llama"),
        ("safeailab", LlamaModel, "a Llama"),
        ("mla_kimi", DeepseekV3ForCausalLM, "deepseek_v3"),
        ("torchspec", Qwen3ForCausalLM, "qwen3"),
    ],
)
def test_a_drafter_that_became_a_stock_model_is_told_with_the_line_to_type(layout, stock, kind, tmp_path):
    published, weights, _ = LAYOUTS[layout]
    sizes = {"n_routed_experts": 2, "moe_intermediate_size": 8, "num_key_value_heads": 4, "first_k_dense_replace": 99}
    sizes |= {"num_experts_per_tok": 1, "n_group": 1, "topk_group": 1, "rope_scaling": None}
    published = {**published, "model_type": stock.config_class.model_type, **(sizes if layout == "mla_kimi" else {})}
    write(tmp_path, published, weights)
    mistaken = stock.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    target = make_target()
    target.config.num_hidden_layers = 1
    line = re.escape(f'AutoModel.from_pretrained("{tmp_path}")')
    with pytest.raises(ValueError, match=rf"loaded as {kind}, most of it with random weights.*{line}"):
        target.generate(torch.tensor([[1, 2]]), assistant_model=mistaken, max_new_tokens=2)


def test_a_repository_in_the_cache_loads_by_name_and_revision(tmp_path):
    """As the Hub's client lays it out: nothing is asked of the network."""
    for commit, layout in (("a" * 40, "specforge"), ("b" * 40, "speculators")):
        published, weights, _ = LAYOUTS[layout]
        write(tmp_path / "models--some-owner--some-drafter" / "snapshots" / commit, published, weights)
    refs = tmp_path / "models--some-owner--some-drafter" / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    (refs / "newer").write_text("b" * 40)
    where = {"cache_dir": tmp_path, "local_files_only": True, "token": False}
    for revision, has_own in ((None, False), ("newer", True), ("b" * 40, True)):
        drafter = AutoModel.from_pretrained("some-owner/some-drafter", **where, revision=revision or "main")
        assert type(drafter) is Eagle3DrafterModel
        assert drafter.config.has_own_embeddings == has_own
    with pytest.raises(OSError, match="in the cached files"):
        AutoModel.from_pretrained("some-owner/another", **where)


def test_no_code_beside_the_weights_runs(tmp_path):
    """In speculators folders lies a config.py, with an auto_map of an empty key; in ours, their own code."""
    published, weights, _ = LAYOUTS["speculators"]
    write(tmp_path / "speculators", published, weights)
    AutoModel.from_pretrained(tmp_path / "speculators").save_pretrained(tmp_path / "ours")
    for file in (tmp_path / "speculators" / "config.py", *(tmp_path / "ours").glob("*_eagle3.py")):
        file.write_text("raise SystemExit('code from a checkpoint ran')")
    for folder in ("speculators", "ours"):
        assert type(AutoModel.from_pretrained(tmp_path / folder)) is Eagle3DrafterModel


def test_every_parameter_comes_from_the_file(tmp_path, monkeypatch):
    """Whatever would be made up is made of NaN here, and none is left."""
    honest = Eagle3DrafterModel._init_weights

    def make_up(drafter: Eagle3DrafterModel, module: torch.nn.Module) -> None:
        honest(drafter, module)  # also zeroes d2t, which is the identity where a file has no table
        for parameter in module.parameters(recurse=False):
            parameter.data.fill_(float("nan"))

    monkeypatch.setattr(Eagle3DrafterModel, "_init_weights", make_up)
    for layout, (published, weights, _) in LAYOUTS.items():
        drafter = AutoModel.from_pretrained(write(tmp_path / layout, published, weights))
        assert all(p.isfinite().all() and not p.is_meta for p in drafter.parameters()), layout
        assert drafter.rotary_emb.inv_freq.isfinite().all()


def test_the_class_alone_says_how_to_load(tmp_path):
    write(tmp_path, make_config(), make_weights())
    with pytest.raises(ValueError, match=r"model_type 'llama', expected 'eagle3'.*AutoModel.from_pretrained"):
        Eagle3DrafterModel.from_pretrained(tmp_path)


def test_weights_given_by_hand(tmp_path):
    drafter = AutoModel.from_pretrained(write(tmp_path, make_config(), make_weights()))
    again = Eagle3DrafterModel.from_pretrained(None, config=drafter.config, state_dict=drafter.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(drafter.parameters(), again.parameters(), strict=True))
    assert torch.equal(drafter.d2t, again.d2t)


def test_our_own_layout_is_left_to_the_class(tmp_path):
    drafter = AutoModel.from_pretrained(write(tmp_path / "a", make_config(), make_weights()))
    drafter.save_pretrained(tmp_path / "b")
    assert load_published_config(tmp_path / "b") is None
    assert type(AutoConfig.from_pretrained(tmp_path / "b")) is Eagle3DrafterConfig


# ---- what is refused ----


def put(**tensors: Tensor | None) -> Callable[[dict, Weights], None]:
    """Replace or (None) remove tensors; `__` for a dot."""

    def edit(_config: dict, weights: Weights) -> None:
        for name, tensor in tensors.items():
            weights.pop(name.replace("__", "."), None)
            if tensor is not None:
                weights[name.replace("__", ".")] = tensor

    return edit


def state(**keys: object) -> Callable[[dict, Weights], None]:
    def edit(config: dict, _weights: Weights) -> None:
        config.update(keys)

    return edit


def both(*edits: Callable[[dict, Weights], None]) -> Callable[[dict, Weights], None]:
    def edit(config: dict, weights: Weights) -> None:
        for one in edits:
            one(config, weights)

    return edit


D2T = USED - torch.arange(V_d)
NAN = bf16(V_d, H)
NAN[3, 4] = float("nan")
REFUSALS: dict[str, tuple[Callable[[dict, Weights], None], str]] = {
    # the vocabulary
    "d2t_short": (put(d2t=D2T[:-1]), r"lm_head.weight and d2t differ in length.*Both are draft_vocab_size"),
    "d2t_float": (put(d2t=D2T.float()), "d2t has dtype torch.float32, expected int64"),
    "d2t_int16": (put(d2t=D2T.short()), "d2t has dtype torch.int16"),
    "d2t_two_dims": (put(d2t=D2T[:, None]), r"d2t has shape \[20, 1\], expected \[20\]"),
    "d2t_out_of_range": (put(d2t=D2T + 40, t2d=None), "outside the target's vocabulary of 50. d2t holds offsets"),
    "d2t_negative": (put(d2t=D2T - 40, t2d=None), "outside the target's vocabulary"),
    "d2t_absolute_of_others": (put(d2t=(USED + 1) % V), "t2d and d2t disagree|outside|same target id"),
    "d2t_duplicate": (put(d2t=torch.cat([D2T[:1] + 1 + D2T[1:2] - D2T[:1], D2T[1:]]), t2d=None), "same target id"),
    "d2t_zero_but_t2d": (put(d2t=torch.zeros(V_d, dtype=torch.int64)), "t2d and d2t disagree"),
    "t2d_short": (
        put(t2d=torch.isin(torch.arange(V - 1), USED)),
        r"vocab_size is 50, but by the tensors vocab_size is 49",
    ),
    "t2d_count": (put(t2d=torch.arange(V) < V_d - 1), "t2d marks 19 tokens, but the draft vocabulary has 20"),
    "t2d_disagrees": (put(t2d=torch.arange(V) >= V - V_d), "t2d and d2t disagree: d2t reaches"),
    "t2d_float": (put(t2d=torch.isin(torch.arange(V), USED).float()), "t2d has dtype torch.float32, expected bool"),
    "no_tables": (put(d2t=None, t2d=None), "draft vocabulary has 20 tokens and the target's 50.*d2t or t2d"),
    "draft_vocab_too_large": (
        both(state(draft_vocab_size=V + 4), put(d2t=None, t2d=None, lm_head__weight=bf16(V + 4, H))),
        "vocabulary",
    ),
    "draft_vocab_size_wrong": (state(draft_vocab_size=21), "draft_vocab_size is 21, but by the tensors.* is 20"),
    "head_rows": (put(lm_head__weight=bf16(21, H)), "lm_head.weight and d2t differ in length"),
    "head_columns": (
        put(lm_head__weight=bf16(V_d, H + 1)),
        r"lm_head.weight has shape \[20, 17\], expected \[20, 16\]",
    ),
    "no_head": (put(lm_head__weight=None), "needs an lm_head.weight of its own"),
    "tied": (
        both(state(tie_word_embeddings=True, draft_vocab_size=V), put(lm_head__weight=None, d2t=None, t2d=None)),
        "tie_word",
    ),
    # fc
    "no_fc": (put(fc__weight=None), "fc.weight is missing, but use_aux_hidden_state is True"),
    "fc_though_none": (
        state(eagle_config={"use_aux_hidden_state": False}),
        "fc.weight is there, but use_aux_hidden_state is False",
    ),
    "fc_rows": (put(fc__weight=bf16(H + 1, 3 * H)), r"fc.weight has shape \[17, 48\], expected \[16, A x 16\]"),
    "fc_columns": (put(fc__weight=bf16(H, 3 * H + 1)), r"fc.weight has shape \[16, 49\]"),
    "fc_four": (put(fc__weight=bf16(H, 4 * H)), "number of captured layer ids is 3, but by the tensors.* is 4"),
    "stated_states": (
        state(num_aux_hidden_states=5, eagle_config=None),
        "num_aux_hidden_states is 5, but by the tensors",
    ),
    "fc_bias_missing": (state(bias=True), "bias is True, but by the tensors fc_bias is False"),
    "fc_norm_missing": (state(fc_norm=True), "fc_norm is True, but by the tensors fc_norm is False"),
    "fc_norm_denied": (
        both(state(fc_norm=False), lambda _c, w: w.update({f"fc_norm.{k}.weight": bf16(H) for k in range(3)})),
        "fc_norm is False, but by the tensors fc_norm is True",
    ),
    "fc_norm_two": (
        both(state(fc_norm=True), lambda _c, w: w.update({f"fc_norm.{k}.weight": bf16(H) for k in range(2)})),
        "there are 2 fc norms .*, but fc reads 3 states",
    ),
    "fc_norm_size": (
        both(state(fc_norm=True), lambda _c, w: w.update({f"fc_norm.{k}.weight": bf16(H + k) for k in range(3)})),
        r"fc_norm.1.weight has shape \[17\], expected \[16\]",
    ),
    "input_norm_size": (
        both(state(norm_before_fc=True), put(input_norm__weight=bf16(H))),
        r"input_norm.weight has shape \[16\], expected \[48\]",
    ),
    "input_norm_missing": (
        state(norm_before_fc=True),
        "norm_before_fc is True, but by the tensors norm_before_fc is False",
    ),
    "input_norm_and_fc_norm": (
        lambda _c, w: w.update(
            {f"fc_norm.{k}.weight": bf16(H) for k in range(3)}, **{"input_norm.weight": bf16(3 * H)}
        ),
        "has one of them",
    ),
    "wider_target_borrows": (
        both(state(target_hidden_size=Ht), put(fc__weight=bf16(H, 3 * Ht))),
        "the target is 24 wide and the drafter 16.*needs its own embed_tokens.weight",
    ),
    "embedding_width": (put(embed_tokens__weight=bf16(V, H + 2)), r"embed_tokens.weight has shape \[50, 18\]"),
    "embedding_rows": (put(embed_tokens__weight=bf16(V + 2, H)), "embed_tokens.weight and t2d differ in length"),
    # the layers
    "eagle1": (
        both(
            state(architectures=["LlamaForCausalLM"]),
            put(
                fc__weight=bf16(H, 2 * H),
                midlayer__hidden_norm__weight=None,
                midlayer__self_attn__q_proj__weight=bf16(32, H),
            ),
        ),
        r"q_proj.weight has shape \[32, 16\].*looks like an EAGLE-1 or EAGLE-2 drafter",
    ),
    "no_hidden_norm": (
        put(midlayer__hidden_norm__weight=None),
        "layers.0.hidden_norm.weight .or midlayer.*is missing",
    ),
    "no_input_norm": (put(midlayer__input_layernorm__weight=None), "layers.0.input_layernorm.weight .*is missing"),
    "no_final_norm": (put(norm__weight=None), "model.safetensors: norm.weight is missing"),
    "no_down_proj": (put(midlayer__mlp__down_proj__weight=None), "layers.0.mlp.down_proj.weight is missing"),
    "q_rows": (
        put(midlayer__self_attn__q_proj__weight=bf16(30, 2 * H)),
        r"has 30 rows, expected num_attention_heads \(4\)",
    ),
    "k_rows": (
        put(midlayer__self_attn__k_proj__weight=bf16(8, 2 * H)),
        r"has 8 rows, expected num_key_value_heads \(2\)",
    ),
    "v_rows": (put(midlayer__self_attn__v_proj__weight=bf16(8, 2 * H)), r"midlayer.self_attn.v_proj.weight has shape"),
    "o_shape": (put(midlayer__self_attn__o_proj__weight=bf16(H, 8)), r"midlayer.self_attn.o_proj.weight has shape"),
    "heads": (state(num_attention_heads=8), "has 32 rows, expected num_attention_heads .8. x head_dim .8. = 64"),
    "no_heads": (lambda c, _w: c.pop("num_attention_heads"), "num_attention_heads is missing, and the tensors do not"),
    "hidden_size": (state(hidden_size=17), "hidden_size is 17, but by the tensors hidden_size is 16"),
    "intermediate_size": (state(intermediate_size=41), "intermediate_size is 41"),
    "half_biased": (put(midlayer__self_attn__o_proj__bias=bf16(H)), "midlayer.self_attn.o_proj.bias has no place"),
    "extra": (put(extra__weight=bf16(2)), "model.safetensors: extra.weight has no place in this drafter"),
    # With an empty base_model_prefix the host would load it as norm.weight.
    "first_letter": (put(xnorm__weight=bf16(H)), "xnorm.weight has no place in this drafter"),
    "layer_gap": (put(layers__2__mlp__up_proj__weight=bf16(I, H)), "layers.1.*is missing"),
    "twice": (
        put(layers__0__hidden_norm__weight=bf16(H)),
        "midlayer.hidden_norm.weight and .* are both|are both layers.0",
    ),
    "int_query": (
        put(midlayer__self_attn__q_proj__weight=torch.ones(32, 2 * H).char()),
        "q_proj.weight has dtype torch.int8",
    ),
    "ints": (
        put(midlayer__mlp__up_proj__weight=torch.ones(I, H, dtype=torch.int32)),
        "up_proj.weight has dtype torch.int32",
    ),
    "nan": (put(lm_head__weight=NAN), "lm_head.weight holds NaN or infinity"),
    "infinite": (put(fc__weight=bf16(H, 3 * H) * float("inf")), "model.safetensors: fc.weight holds NaN or infinity"),
    # the config
    "unknown_key": (state(logit_bias_scale=3), r"config.json: SpecForge.*not known to have \['logit_bias_scale'\]"),
    "unknown_nested": (state(eagle_config={"mystery": 1}), r"eagle_config.mystery"),
    "eagle_config_no_table": (state(eagle_config=[1]), "eagle_config must be a table"),
    "partial_rotary": (state(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
    "logit_scale": (state(logit_scale=0.3), "logit_scale is 0.3"),
    "no_last_norm": (state(eagle_config={"use_last_layernorm": False}), "eagle_config.use_last_layernorm is False"),
    "no_vocab_size": (both(lambda c, _w: c.pop("vocab_size"), put(t2d=None)), "vocab_size is missing"),
    "ids_duplicate": (state(eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 1, 4]}), "distinct layer numbers"),
    "ids_negative": (
        state(eagle_config={"eagle_aux_hidden_state_layer_ids": [-1, 1, 4]}),
        "distinct layer numbers from 0",
    ),
    "ids_text": (
        state(eagle_config={"eagle_aux_hidden_state_layer_ids": "auto"}),
        "list of layer numbers, got 'auto'",
    ),
    "ids_contradict": (state(eagle_aux_hidden_state_layer_ids=[2, 3, 5]), "at the top, and .* in eagle_config"),
    "mixed_windows": (
        both(
            state(layer_types=["full_attention", "sliding_attention"], sliding_window=4),
            put(layers__1__input_layernorm__weight=bf16(H)),
        ),
        "the same for every layer",
    ),
    "window_missing": (state(layer_types=["sliding_attention"]), "sliding_window is None"),
    "odd_layer_type": (state(layer_types=["linear_attention"]), "linear_attention"),
    "rope_unknown": (state(rope_scaling={"rope_type": "spiral", "factor": 2.0}), "config.json: "),
    "rope_incomplete": (state(rope_scaling={"rope_type": "llama3"}), "config.json: "),
    "rope_odd_key": (
        state(rope_scaling={"rope_type": "dynamic", "factor": 2.0, "alpha": 1000.0}),
        r"not known: \['alpha'\]",
    ),
    "rope_theta_text": (state(rope_theta="big"), "config.json: "),
    "rope_odd_mrope": (state(rope_scaling={"rope_type": "odd", "mrope_section": [1, 1, 2]}), "config.json: "),
    "eps": (state(rms_norm_eps=-1e-5), "rms_norm_eps must be a small positive number"),
    "positions": (state(max_position_embeddings=0), "max_position_embeddings must be at least 1"),
    "rope_text": (state(rope_scaling="yarn"), "config.json: "),
    "activation": (state(hidden_act="no_such"), "no_such"),
    "size_text": (state(num_attention_heads="4"), "num_attention_heads must be a positive whole number, got '4'"),
    "flag_text": (state(norm_output="yes"), "norm_output"),
    # other kinds
    "speculators_other": (state(speculators_model_type="mtp"), "speculators checkpoint of another algorithm"),
    "speculators_peagle": (state(speculators_model_type="peagle"), "a P-EAGLE drafter, but .* mask_hidden is missing"),
    "two_tables": (
        state(transformer_layer_config={"hidden_size": 3}),
        "hidden_size is 16 at the top and 3 in transformer",
    ),
    "table_no_table": (state(transformer_layer_config=[1]), "transformer_layer_config must be a table"),
    "flags_contradict": (
        state(norm_output=True, eagle_config={"norm_output": False}),
        "norm_output is True and eagle_config.norm_output is False",
    ),
    "kimi_k3": (put(midlayer__self_attn__g_proj__weight=bf16(32, 2 * H)), "Kimi-K3"),
    "dflash": (state(dflash_config={"mask_token_id": 3}), "a z-lab block drafter, but .* is missing"),
    "medusa": (
        lambda _c, w: (w.clear(), w.update({"medusa_heads.0.0.linear.weight": bf16(H, H)})),
        "a Medusa drafter",
    ),
    "parallel_heads": (
        lambda _c, w: (w.clear(), w.update({"parallel_draft_heads.0.medusa_layers.0.linear.weight": bf16(H, H)})),
        "Medusa-like parallel heads",
    ),
    "peagle_without_a_token": (
        both(put(mask_hidden=bf16(1, 1, 3 * H)), state(architectures=["PEagleDraftModel"])),
        "none of mask_token_id, pard_token and ptd_token_id",
    ),
    "peagle_without_a_mask": (
        state(architectures=["PEagleDraftModel"], mask_token_id=3),
        "a P-EAGLE drafter, but .* mask_hidden is missing",
    ),
    "peagle_two_tokens": (
        both(put(mask_hidden=bf16(1, 1, 3 * H)), state(mask_token_id=3, pard_token=4)),
        "mask_token_id is 3 and pard_token is 4",
    ),
    "peagle_token_outside": (
        both(put(mask_hidden=bf16(1, 1, 3 * H)), state(mask_token_id=V)),
        "mask_token_id must be a token of the target's vocabulary of 50, got 50",
    ),
    "peagle_narrow_mask": (
        both(put(mask_hidden=bf16(1, 1, 2 * H)), state(mask_token_id=3)),
        r"mask_hidden has shape \[1, 1, 32\], expected \[1, 1, 48\] or \[48\]",
    ),
    "peagle_denied": (
        both(put(mask_hidden=bf16(1, 1, 3 * H)), state(mask_token_id=3, parallel_drafting=False)),
        "parallel_drafting is False, but there is a tensor mask_hidden",
    ),
    "peagle_nan": (
        both(put(mask_hidden=bf16(1, 1, 3 * H) * float("nan")), state(mask_token_id=3)),
        "mask_hidden holds NaN",
    ),
    "peagle_no_fc": (
        both(
            put(mask_hidden=bf16(1, 1, 3 * H), fc__weight=None),
            state(mask_token_id=3, eagle_config={"use_aux_hidden_state": False}),
        ),
        "fc.weight, which reads mask_hidden, is missing",
    ),
    "peagle_of_nemo": (
        both(put(mask_hidden=bf16(1, 1, 3 * H)), state(mask_token_id=3, architectures=["LlamaEagle3DraftModel"])),
        "a P-EAGLE drafter of NeMo Automodel",
    ),
    "nemo_twice": (put(model__norm__weight=bf16(H)), "are both norm.weight"),
    "mla_half": (
        put(midlayer__self_attn__kv_a_proj_with_mqa__weight=bf16(8, 2 * H)),
        "multi-head latent attention .MLA., but .*kv_b_proj.weight is missing",
    ),
    "mtp": (put(enorm__weight=bf16(H), eh_proj__weight=bf16(H, 2 * H)), "multi-token-prediction"),
    "quantised": (
        state(quantization_config={"quant_method": "compressed-tensors"}),
        "quantised, which is not supported",
    ),
    "packed": (put(midlayer__mlp__up_proj__weight_scale=bf16(1)), "quantised, which is not supported"),
    "only_a_name": (lambda _c, w: (w.clear(), w.update({"something.weight": bf16(2)})), "a model of another kind"),
    "a_llama_named_eagle3": (
        lambda _c, w: (w.clear(), w.update({n: t.clone() for n, t in small_llama().state_dict().items()})),
        "a model of another kind, or damaged",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused(case, tmp_path):
    edit, message = REFUSALS[case]
    config, weights = make_config(), make_weights()
    edit(config, weights)
    write(tmp_path, config, weights)
    with pytest.raises(CheckpointError, match=message) as caught:
        AutoModel.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "case", ["no_final_norm", "o_shape", "extra", "d2t_float", "nan", "t2d_disagrees", "ints", "no_fc"]
)
@pytest.mark.parametrize("files", ["sharded", "bin"])
def test_refused_in_other_files_and_our_own_layout(case, files, tmp_path):
    edit, message = REFUSALS[case]
    config, weights = make_config(), make_weights()
    edit(config, weights)
    write(tmp_path / "theirs", config, weights, files)
    with pytest.raises(CheckpointError, match=message.replace("model.safetensors: ", "")):
        AutoModel.from_pretrained(tmp_path / "theirs")

    AutoModel.from_pretrained(write(tmp_path / "good", make_config(), make_weights())).save_pretrained(
        tmp_path / "ours"
    )
    save_file(our_names(weights), tmp_path / "ours" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"ours.model.safetensors") as caught:
        AutoModel.from_pretrained(tmp_path / "ours")
    assert caught.value.args


def test_two_names_of_one_norm_must_agree(tmp_path):
    published, weights, _ = LAYOUTS["two_layers_both_names"]
    write(tmp_path, published, {**weights, "layers.1.input_layernorm.weight": bf16(H)})
    with pytest.raises(
        CheckpointError, match=r"layers.1.hidden_norm.weight name the same norm, but their values differ"
    ):
        AutoModel.from_pretrained(tmp_path)


def test_a_table_of_zeros_is_told(tmp_path, caplog):
    weights = {**change(make_weights(), t2d=None), "d2t": torch.zeros(V_d, dtype=torch.int64)}
    with caplog.at_level(logging.WARNING, logger="hf_eagle3"):
        drafter = AutoModel.from_pretrained(write(tmp_path, make_config(), weights))
    assert "d2t is all zeros" in caplog.text
    assert torch.equal(drafter.draft_to_target_ids, torch.arange(V_d))


# ---- damaged files ----


class Payload:
    """A pickle that would run code."""

    def __reduce__(self):
        return (print, ("code from a checkpoint ran",))


DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "half": ("safetensors", lambda f: f.write_bytes(f.read_bytes()[: f.stat().st_size // 2])),
    "last_byte": ("safetensors", lambda f: f.write_bytes(f.read_bytes()[:-1])),
    "empty": ("safetensors", lambda f: f.write_bytes(b"")),
    "text": ("safetensors", lambda f: f.write_text("version https://git-lfs.github.com/spec/v1")),
    "header": ("safetensors", lambda f: f.write_bytes(f.read_bytes().replace(b'"dtype"', b'"dtipe"', 1))),
    "bin_half": ("bin", lambda f: f.write_bytes(f.read_bytes()[: f.stat().st_size // 2])),
    "bin_empty": ("bin", lambda f: f.write_bytes(b"")),
    "bin_text": ("bin", lambda f: f.write_text("version https://git-lfs.github.com/spec/v1")),
    "bin_code": ("bin", lambda f: torch.save({"fc.weight": bf16(2, 2), "x": Payload()}, f)),
    "bin_list": ("bin", lambda f: torch.save([bf16(2, 2)], f)),
    "bin_nested": ("bin", lambda f: torch.save({"model": {"fc.weight": bf16(2, 2)}}, f)),
    "old_bin_half": ("old_bin", lambda f: f.write_bytes(f.read_bytes()[: f.stat().st_size // 2])),
    "shard_gone": ("sharded", lambda f: f.unlink()),
    "shard_half": ("sharded", lambda f: f.write_bytes(f.read_bytes()[: f.stat().st_size // 2])),
    "index_text": ("sharded", lambda f: (f.parent / "model.safetensors.index.json").write_text("{]")),
    "index_list": ("sharded", lambda f: (f.parent / "model.safetensors.index.json").write_text("[]")),
    "index_no_map": ("sharded", lambda f: (f.parent / "model.safetensors.index.json").write_text("{}")),
    "no_weights": ("safetensors", lambda f: f.unlink()),
}
WEIGHT_FILE = {
    "safetensors": "model.safetensors",
    "bin": "pytorch_model.bin",
    "old_bin": "pytorch_model.bin",
    "sharded": "model-00002-of-00002.safetensors",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file(damage, tmp_path, capsys):
    files, spoil = DAMAGES[damage]
    write(tmp_path, make_config(), make_weights(), files)
    spoil(tmp_path / WEIGHT_FILE[files])
    with pytest.raises(CheckpointError) as caught:
        AutoModel.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "code from a checkpoint ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "damage", [d for d, (files, _) in DAMAGES.items() if files == "safetensors" and d != "no_weights"]
)
def test_damaged_file_of_our_own_layout(damage, tmp_path):
    AutoModel.from_pretrained(write(tmp_path / "a", make_config(), make_weights())).save_pretrained(tmp_path / "b")
    file = tmp_path / "b" / "model.safetensors"
    DAMAGES[damage][1](file)
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        AutoModel.from_pretrained(tmp_path / "b")


def test_our_own_layout_without_weights_is_the_hosts_error(tmp_path):
    AutoModel.from_pretrained(write(tmp_path / "a", make_config(), make_weights())).save_pretrained(tmp_path / "b")
    (tmp_path / "b" / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModel.from_pretrained(tmp_path / "b")


# ---- fuzz ----

WRONG_VALUES = {
    "intermediate_size": (41, 0, "40", 2.5, [40]),
    "num_attention_heads": (5, 0, -4, "4", 2.5, True),
    "vocab_size": (51, 0, "50"),
    "rms_norm_eps": (-1e-5, 0, 2, "small", [1e-5]),
    "hidden_act": ("no_such", 3),
    "max_position_embeddings": (0, -1, "many"),
    "attention_dropout": ("none",),
    "rope_parameters": ("yarn", {"rope_type": "spiral"}, {"rope_type": "yarn", "rope_theta": "big"}),
    "draft_vocab_size": (21, "20", 51),
    "a_key_of_nobody": (1,),
}
INTEGERS = ("d2t", "t2d")


def corrupt_tensor(rng: random.Random, weights: Weights) -> str:
    """Spoil one tensor; the name that the error must have."""
    name = rng.choice(sorted(weights))
    tensor = weights[name]
    is_table = name in INTEGERS
    # Gone, these are the target's, or there under another name.
    is_dispensable = is_table or name in ("embed_tokens.weight", "layers.1.input_layernorm.weight")
    is_dispensable |= name == "lm_head.weight" and "d2t" not in weights
    kinds = ["grow", "shrink", "dims", "dtype", "value", "add", *([] if is_table else ["reshape"])]
    kinds += [] if is_dispensable else ["drop", "rename"]
    kind = rng.choice(kinds)
    if kind == "drop":
        del weights[name]
    elif kind == "rename":
        weights[name + rng.choice(["x", ".weight", "_"])] = weights.pop(name)
    elif kind == "add":
        name = rng.choice(["layers.7.mlp.up_proj.weight", "fc.scale", "xfc.weight", "fc_norm.9.weight", "mystery"])
        weights[name] = bf16(H)
    else:
        spoiled = tensor.clone()
        if kind == "value":
            spoiled.flatten()[0] = float("nan") if not is_table else (0 if tensor.flatten()[0] else V)
        weights[name] = {
            "grow": lambda: torch.cat([tensor, tensor[:1]]),
            "shrink": lambda: tensor[:-1].clone(),
            "dims": lambda: tensor[None].clone(),
            "reshape": lambda: tensor.reshape(-1, *([2] if tensor.dim() == 1 else [])).clone(),
            "dtype": lambda: tensor.to(torch.float64 if is_table else torch.int16),
            "value": lambda: spoiled,
        }[kind]()
    return name


def corrupt_config(rng: random.Random, config: dict, weights: Weights) -> str:
    """Spoil one key, wherever the config has it; the key."""
    tables = [config, config.get("transformer_layer_config"), config.get("model")]
    inner = next(table for table in reversed(tables) if isinstance(table, dict))
    is_nemo = "a_key_of_the_target" in config  # whose other keys are the target's
    harmless = {"a_key_of_nobody"} if is_nemo else set()
    harmless |= {"vocab_size"} if not weights.keys() & {"t2d", "embed_tokens.weight"} else set()  # nothing tells it
    harmless |= {"draft_vocab_size"} if "truncated_vocab_size" in config else set()  # which says it already
    key = rng.choice(sorted(WRONG_VALUES.keys() - harmless))
    owner = config if key == "draft_vocab_size" and key in config else inner
    owner[key] = rng.choice(WRONG_VALUES[key])
    if key == "rope_parameters":
        owner.pop("rope_scaling", None)
    return key


def cut(rng: random.Random, file: Path) -> str:
    content = file.read_bytes()
    file.write_bytes(content[: rng.randrange(len(content.rstrip()) - 1)])
    return file.name


@pytest.mark.sampled(2)
@pytest.mark.parametrize("seed", range(200))
def test_a_corrupted_checkpoint_is_refused(seed, tmp_path):
    rng = random.Random(seed)
    layout = rng.choice(FUZZED)
    published, weights, _ = LAYOUTS["specforge" if layout == "ours" else layout]
    config, weights = json.loads(json.dumps(published)), dict(weights)
    if layout == "ours":
        AutoModel.from_pretrained(write(tmp_path / "theirs", config, weights)).save_pretrained(tmp_path / "ours")
        config = json.loads((tmp_path / "ours" / "config.json").read_text())
        weights = load_file(tmp_path / "ours" / "model.safetensors")
    folder = tmp_path / "spoiled"
    kind = rng.choice(["tensor", "tensor", "tensor", "config", "config", "cut"])
    if kind == "tensor":
        what = corrupt_tensor(rng, weights)
    elif kind == "config":
        what = corrupt_config(rng, config, weights)
    files = rng.choice(["safetensors", "sharded", "bin"])
    write(folder, config, weights, files)
    if kind == "cut":
        what = cut(rng, folder / rng.choice(["config.json", WEIGHT_FILE[files]]))
    print(kind, what, "in", layout, files)  # noqa: T201  shown if it fails
    with pytest.raises(CheckpointError) as caught:
        AutoModel.from_pretrained(folder)
    message = str(caught.value)
    assert str(folder) in message
    part = what if kind == "cut" else what.removesuffix(".weight").split(".")[-1]
    part = what.split(".")[0] if part.isdigit() else part
    assert re.search(rf"{re.escape(part)}|{ALSO.get(part, '^$')}", message), message


def test_no_file_stays_open_for_writing(tmp_path):
    # A refused checkpoint can be replaced in place.
    write(tmp_path, make_config(), change(make_weights(), norm=None))
    with pytest.raises(CheckpointError):
        AutoModel.from_pretrained(tmp_path)
    write(tmp_path, make_config(), make_weights())
    assert type(AutoModel.from_pretrained(tmp_path)) is Eagle3DrafterModel
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert "midlayer.hidden_norm.weight" in file.keys()  # noqa: SIM118


def test_public_names():
    assert hf_eagle3.CheckpointError is CheckpointError


@pytest.mark.parametrize("field", ["intermediate_size", "num_key_value_heads"])
def test_a_field_given_to_from_pretrained_mends_a_wrong_config(field, tmp_path):
    """What is loaded is checked against what was given, not against the file."""
    drafter = Eagle3DrafterModel(drafter_config())
    drafter.save_pretrained(tmp_path)
    right = getattr(drafter.config, field)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, field: 2 * right}))
    with pytest.raises(CheckpointError, match="expected"):
        AutoModel.from_pretrained(tmp_path)
    loaded = Eagle3DrafterModel.from_pretrained(tmp_path, **{field: right})
    assert torch.equal(loaded.fc.weight, drafter.fc.weight)
