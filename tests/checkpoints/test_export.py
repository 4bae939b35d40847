"""What is exported is what engines read, comes back bit for bit, and has a card without a gap."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from helpers.layouts import LAYOUTS, write
from helpers.marks import slow_but, slow_rows_but
from helpers.models import DRAFTERS, NUM_LAYERS, make_drafter, make_prompt, make_target
from helpers.texts import PLACEHOLDER, blocks_of
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModel,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MiniMaxM2Config,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from hf_eagle3.checkpoints import exporter
from hf_eagle3.checkpoints.engines import ENGINES, find_refusals
from hf_eagle3.modeling import Eagle3DrafterModel, drafter_eagle3
from hf_eagle3.modeling.modeling_eagle3 import REMOTE_CODE_FILES

pytestmark = pytest.mark.any_release

TARGET = Qwen3Config(num_hidden_layers=NUM_LAYERS, name_or_path="some-owner/some-target")
OTHER_ENGINES = [engine for engine in ENGINES if engine != "hf"]


def same_tensors(a: Eagle3DrafterModel, b: Eagle3DrafterModel) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(
        one[n].dtype == other[n].dtype and torch.equal(one[n], other[n]) for n in one
    )


# ---- there and back ----

# Field -> engines that cannot serve it, from what their loaders read (docs/checkpoints.md).
CANNOT: dict[str, tuple[dict, set[str]]] = {
    "plain": ({}, set()),
    "eagle31": ({"fc_norm": True, "norm_output": True}, set()),
    "norm_before_fc": ({"norm_before_fc": True}, set()),
    "window": ({"sliding_window": 6}, set()),
    "two_layers": ({"num_hidden_layers": 2}, set()),
    "full_vocabulary": ({"draft_vocab_size": 64}, set()),
    "shared_head": ({"draft_vocab_size": 64, "share_lm_head": True}, set()),
    "four_states": ({"num_aux_hidden_states": 4, "aux_layer_ids": [1, 3, 5, 6]}, set()),
    "wider_target": ({"hidden_size": 16, "target_hidden_size": 32, "has_own_embeddings": True}, set()),
    "norm_before_residual": ({"norm_before_residual": True}, {"sglang"}),
    "qk_norm": ({"qk_norm": True}, {"sglang"}),
    "attention_bias": ({"attention_bias": True}, {"sglang"}),
    "mlp_bias": ({"mlp_bias": True}, {"sglang"}),
    "aux_layer_ids": ({"aux_layer_ids": [0, 3, 5]}, {"sglang"}),
    "fc_bias": ({"fc_bias": True}, {"vllm", "speculators"}),
    "use_aux_hidden_state": ({"use_aux_hidden_state": False}, {"speculators"}),
    "hidden_act": ({"hidden_act": "gelu_pytorch_tanh"}, {"sglang", "vllm", "speculators"}),
    "norm_last_state": ({"norm_last_state": True, "aux_layer_ids": [2, 4, 8]}, {"sglang", "vllm", "speculators"}),
    "mask_token_id": (DRAFTERS["peagle"], {"sglang"}),
    "fc_norm": ({**DRAFTERS["peagle"], "fc_norm": True}, {"sglang", "speculators"}),
    "kv_lora_rank": (DRAFTERS["mla"], {"speculators"}),
    "q_lora_rank": ({**DRAFTERS["mla"], "q_lora_rank": None}, {"sglang", "speculators"}),
    "num_hidden_layers": ({**DRAFTERS["mla"], "num_hidden_layers": 2}, {"sglang", "speculators"}),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("engine", slow_but(["sglang"], ENGINES))
@pytest.mark.parametrize("case", CANNOT)
def test_there_and_back(case, engine, tmp_path):
    overrides, cannot = CANNOT[case]
    target = make_target("qwen3")
    drafter = make_drafter(target, **overrides)
    folder = tmp_path / "out"
    if engine in cannot:
        field = "mask_token_id" if engine == "sglang" and "mask_token_id" in overrides else case
        field = "kv_lora_rank" if engine == "speculators" and "kv_lora_rank" in overrides else field
        with pytest.raises(ValueError, match=rf"cannot serve this drafter.*{field}="):
            drafter.export(folder, to=engine, target=TARGET)
        assert not folder.exists()
        return
    exported = drafter.export(folder, to=engine, target=TARGET)
    assert engine in exported.engines
    assert not set(exported.engines) & cannot
    again = AutoModel.from_pretrained(folder)
    assert type(again) is Eagle3DrafterModel
    assert same_tensors(drafter, again)
    prompt = make_prompt(9)
    one, other = (
        target.generate(
            prompt, assistant_model=d, num_assistant_tokens=3, max_new_tokens=6, return_dict_in_generate=True
        )
        for d in (drafter, again)
    )
    assert torch.equal(one.sequences, other.sequences)
    assert one.speculation.rounds_accepting == other.speculation.rounds_accepting
    assert again.bound_aux_layer_ids == drafter.bound_aux_layer_ids
    skip = {"architectures", "auto_map", "target_name_or_path", "_name_or_path", "aux_layer_ids", "pad_token_id"}
    a, b = drafter.config.to_dict(), again.config.to_dict()
    differing = {k for k in a.keys() | b.keys() if k not in skip and a.get(k) != b.get(k)}
    assert differing <= {"dtype", "rope_parameters", "aux_layer_ids_from_outputs", "transformers_version"}


@pytest.mark.parametrize(("qk_norm", "architecture"), [(False, "PEagleDraftModel"), (True, "PeagleQwen3ForCausalLM")])
def test_parallel_drafter_is_described_as_vllm_reads_it(qk_norm, architecture, tmp_path):
    drafter = make_drafter(make_target("qwen3"), qk_norm=qk_norm, **DRAFTERS["peagle"])
    exported = drafter.export(tmp_path / "vllm", to="vllm", target=TARGET)
    config = json.loads((tmp_path / "vllm" / "config.json").read_text())
    assert (config["architectures"], config["pard_token"]) == ([architecture], 61)
    assert load_file(tmp_path / "vllm" / "model.safetensors")["mask_hidden"].shape == (1, 1, 3 * 32)
    assert json.loads(shlex.split(exported.command)[-1])["parallel_drafting"] is True

    drafter.export(tmp_path / "speculators", to="speculators", target=TARGET)
    config = json.loads((tmp_path / "speculators" / "config.json").read_text())
    assert (config["speculators_model_type"], config["mask_token_id"]) == ("peagle", 61)
    assert config["architectures"] == ["PEagleDraftModel"]
    assert config["speculators_config"]["algorithm"] == "peagle"


@pytest.mark.sampled(3)
@pytest.mark.parametrize("layout", slow_but(list(LAYOUTS)[::3], LAYOUTS))
def test_every_imported_flavour_can_leave_again(layout, tmp_path):
    published, weights, _ = LAYOUTS[layout]
    drafter = AutoModel.from_pretrained(write(tmp_path / "theirs", published, weights))
    target = Qwen3Config(num_hidden_layers=100, name_or_path="some-owner/some-target")
    for engine in ENGINES:
        if not find_refusals(drafter.config, engine):
            drafter.export(tmp_path / engine, to=engine, target=target)
            assert same_tensors(drafter, AutoModel.from_pretrained(tmp_path / engine))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("engine", ENGINES)
def test_dtype_stays(engine, dtype, tmp_path):
    drafter = make_drafter(make_target("llama")).to(dtype)
    drafter.export(tmp_path / "out", to=engine, target=TARGET)
    assert same_tensors(drafter, AutoModel.from_pretrained(tmp_path / "out"))


def test_an_unbound_drafter_is_compared_too(tmp_path, monkeypatch):
    drafter = make_drafter(make_target("llama"))
    drafter._borrowed = {}
    honest = exporter.to_tensors
    drafter.export(tmp_path / "good", to="sglang", target=TARGET)
    assert drafter._borrowed == {}

    def spoil(*args, **kwargs):
        tensors = honest(*args, **kwargs)
        tensors["fc.weight"] = tensors["fc.weight"].clone()
        tensors["fc.weight"][0, 0] += 1e-3
        return tensors

    monkeypatch.setattr(exporter, "to_tensors", spoil)
    with pytest.raises(RuntimeError, match=r"bad: fc.weight came back different"):
        drafter.export(tmp_path / "bad", to="sglang", target=TARGET)


def test_drafts_that_differ_are_found(tmp_path, monkeypatch):
    honest = exporter.make_native_config
    monkeypatch.setattr(
        exporter, "make_native_config", lambda *args: {**honest(*args), "norm_output": True, "fc_norm": False}
    )
    with pytest.raises(RuntimeError, match="drafts other tokens"):
        make_drafter(make_target("llama")).export(tmp_path / "bad", to="vllm", target=TARGET)


# ---- as the engines read it ----


def read_by_vllm(config: dict, num_layers: int) -> list[int]:
    """As vLLM 0.33 does, both runners: ids at the top as they are; else the default."""
    return config.get("eagle_aux_hidden_state_layer_ids") or [2, num_layers // 2, num_layers - 3]


def read_by_sglang(config: dict, model_type: str, num_layers: int) -> list[int]:
    """SGLang 0.5.23, by target class: nested ids only."""
    ids = config.get("eagle_config", {}).get("eagle_aux_hidden_state_layer_ids")
    plus_one = [i + 1 for i in ids or []]
    if model_type == "minimax_m3_vl":
        return plus_one or [3, num_layers // 2 + 1, num_layers - 2]
    if not ids:
        return [2, num_layers // 2, num_layers - 3]
    if model_type == "gpt_oss":
        return ids if max(ids) == num_layers else plus_one
    if model_type in ("deepseek_v3", "kimi_k2", "glm4_moe_lite"):
        return plus_one if ids[0] == 1 else ids
    return plus_one


@pytest.mark.sampled(2)
@pytest.mark.parametrize("model_type", ["llama", "gpt_oss", "deepseek_v3", "glm4_moe_lite"])
@pytest.mark.parametrize(
    "ids", [None, [2, 18, 33], [1, 5, 9], [3, 7, 30], [2, 30, 36], [24, 30, 36], [4, 5, 6]], ids=str
)
def test_both_engines_capture_the_drafters_boundaries(model_type, ids, tmp_path):
    config = {"gpt_oss": GptOssConfig}.get(model_type, Qwen3Config)(num_hidden_layers=36)
    config.model_type = model_type
    drafter = make_drafter(make_target("llama"))
    drafter.config.aux_layer_ids = ids
    ends_last, starts_first = ids is not None and ids[-1] == 36, ids is not None and ids[0] == 1
    is_deepseek = model_type in ("deepseek_v3", "glm4_moe_lite")
    can_sglang = not (ends_last and model_type != "gpt_oss") and not (starts_first and is_deepseek)
    wanted = ids or [2, 18, 33]
    for engine in ("vllm", "sglang"):
        if engine == "sglang" and not can_sglang:
            with pytest.raises(ValueError, match=r"aux_layer_ids=\["):
                drafter.export(tmp_path / engine, to=engine, target=config)
            continue
        exported = drafter.export(tmp_path / engine, to=engine, target=config)
        written = json.loads((tmp_path / engine / "config.json").read_text())
        assert read_by_vllm(written, 36) == wanted
        assert set(exported.engines) == ({"vllm", "sglang"} if can_sglang else {"vllm"})
        if can_sglang:
            assert read_by_sglang(written, model_type, 36) == wanted


def test_sglangs_own_default_is_written_out(tmp_path):
    target = MiniMaxM2Config(num_hidden_layers=60)
    target.model_type = "minimax_m3_vl"
    make_drafter(make_target("llama")).export(tmp_path / "out", to="sglang", target=target)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert read_by_sglang(written, "minimax_m3_vl", 60) == [2, 30, 57]


def test_what_sglang_cannot_be_told_without_the_target(tmp_path):
    drafter = make_drafter(make_target("llama"), aux_layer_ids=[2, 3, 5])
    drafter.bound_target_name = None
    with pytest.raises(ValueError, match=r"SGLang counts captured layers by target.*give the target"):
        drafter.export(tmp_path / "a", to="sglang")
    with pytest.raises(ValueError, match="give the target"):
        drafter.export(tmp_path / "b", to="sglang", target="no-such-owner/no-such-target")
    with pytest.raises(ValueError, match="speculators' config names the target"):
        drafter.export(tmp_path / "c", to="speculators")
    exported = drafter.export(tmp_path / "d", to="vllm")
    assert exported.engines == ("vllm",)


def test_sglang_layout_key_by_key(tmp_path):
    drafter = make_drafter(
        make_target("llama"), fc_norm=True, norm_output=True, num_aux_hidden_states=4, aux_layer_ids=[1, 2, 4, 6]
    ).bfloat16()
    drafter.export(tmp_path / "out", to="sglang", target=TARGET)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["model_type"] == "llama"
    assert (config["vocab_size"], config["draft_vocab_size"]) == (64, 40)
    assert config["num_aux_hidden_states"] == 4
    assert config["fc_norm"] is config["norm_output"] is True
    assert config["eagle_config"] == {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": [0, 1, 3, 5]}
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert (config["rope_scaling"], config["rope_theta"]) == (None, 10000.0)
    assert config["tie_word_embeddings"] is False
    assert config["torch_dtype"] == "bfloat16"
    assert "target_hidden_size" not in config
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {n for n in tensors if not n.startswith("layers.0.")} == {
        *("fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d"),
        *(f"fc_norm.{k}.weight" for k in range(4)),
    }
    assert tensors["d2t"].dtype == torch.int64
    assert tensors["t2d"].dtype == torch.bool
    assert torch.equal(tensors["t2d"].nonzero().squeeze(-1), torch.arange(40) + tensors["d2t"])
    assert [p.name for p in sorted((tmp_path / "out").iterdir())] == ["config.json", "model.safetensors"]


def test_speculators_layout_key_by_key(tmp_path):
    drafter = make_drafter(make_target("llama"), qk_norm=True, aux_layer_ids=[2, 3, 5], sliding_window=6)
    drafter.export(tmp_path / "out", to="speculators", target=TARGET)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    layer = config.pop("transformer_layer_config")
    assert "model_type" not in config
    assert config["speculators_model_type"] == "eagle3"
    assert [config[k] for k in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")] == [False] * 4
    assert config["target_hidden_size"] is None
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 3, 5]
    assert config["speculators_config"]["verifier"]["name_or_path"] == "some-owner/some-target"
    assert config["speculators_config"]["proposal_methods"] == [{"proposal_type": "greedy", "speculative_tokens": 3}]
    assert layer["model_type"] == "qwen3"
    assert (layer["vocab_size"], layer["layer_types"], layer["sliding_window"]) == (64, ["sliding_attention"], 6)


def test_two_names_for_the_norm_of_a_further_layer(tmp_path):
    drafter = make_drafter(make_target("llama"), num_hidden_layers=2)
    drafter.export(tmp_path / "both", to="vllm", target=TARGET)
    drafter.export(tmp_path / "one", to="speculators", target=TARGET)
    both, one = (load_file(tmp_path / name / "model.safetensors") for name in ("both", "one"))
    norm = drafter.layers[1].input_layernorm.weight
    assert torch.equal(both["layers.1.input_layernorm.weight"], norm)
    assert torch.equal(both["layers.1.hidden_norm.weight"], norm)
    assert "layers.1.hidden_norm.weight" not in one


def test_launch_lines(tmp_path):
    drafter = make_drafter(make_target("llama"), sliding_window=6)
    drafter.generation_config.num_assistant_tokens = 5
    commands = {e: drafter.export(tmp_path / e, to=e, target=TARGET).command for e in ENGINES}
    sglang = shlex.split(commands["sglang"])
    pairs = dict(zip(sglang[3::2], sglang[4::2], strict=True))
    assert pairs == {
        "--model-path": "some-owner/some-target",
        "--speculative-algorithm": "EAGLE3",
        "--speculative-draft-model-path": str(tmp_path / "sglang"),
        "--speculative-num-steps": "5",
        "--speculative-eagle-topk": "1",
        "--speculative-num-draft-tokens": "6",
        "--speculative-draft-window-size": "6",
    }
    *start, speculation = shlex.split(commands["vllm"])
    assert start == ["vllm", "serve", "some-owner/some-target", "--speculative-config"]
    assert json.loads(speculation) == {
        "method": "eagle3",
        "model": str(tmp_path / "vllm"),
        "num_speculative_tokens": 5,
    }
    assert commands["speculators"] == f"vllm serve {tmp_path / 'speculators'}"
    assert str(tmp_path / "hf") in commands["hf"]


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        ("vllm.transformers_utils.config", "LlamaConfig"),
        ("sglang.srt.utils", "LlamaConfig"),
        ("__main__", "Eagle3DrafterConfig"),
        ("vllm_like", "Eagle3DrafterConfig"),
    ],
)
def test_an_engine_in_the_same_process_gets_the_config_it_knows(module, kind, tmp_path):
    make_drafter(make_target("llama")).export(tmp_path / "out", to="vllm", target=TARGET)
    names = {"__name__": module, "folder": tmp_path / "out"}
    exec("from transformers import AutoConfig\nconfig = AutoConfig.from_pretrained(folder)", names)
    assert type(names["config"]).__name__ == kind


def test_embeddings_that_sglang_would_replace(tmp_path):
    target = make_target("llama")
    drafter = make_drafter(target, has_own_embeddings=True)
    with pytest.raises(ValueError, match="has_own_embeddings=True: SGLang uses the target's token embeddings"):
        drafter.export(tmp_path / "a", to="sglang", target=target)
    assert "target's token embeddings" in drafter.export(tmp_path / "b", to="sglang", target=TARGET).notes[0]
    target.save_pretrained(tmp_path / "target")
    with pytest.raises(ValueError, match="has_own_embeddings=True"):
        drafter.export(tmp_path / "e", to="sglang", target=tmp_path / "target")
    with torch.no_grad():
        drafter.embed_tokens.weight.copy_(target.get_input_embeddings().weight)
    assert drafter.export(tmp_path / "c", to="sglang", target=target).notes == ()
    assert drafter.export(tmp_path / "d", to="vllm", target=target).notes == ()
    assert drafter.export(tmp_path / "e", to="sglang", target=tmp_path / "target").notes == ()


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        make_drafter(make_target("llama")).export(tmp_path, to="sglang", target=TARGET)
    with pytest.raises(ValueError, match="to must be one of sglang, vllm, speculators, hf, got 'gguf'"):
        make_drafter(make_target("llama")).export(tmp_path / "x", to="gguf")


def test_a_whole_vocabulary_in_another_order_is_refused(tmp_path):
    drafter = make_drafter(make_target("llama"), draft_vocab_size=64)
    drafter.set_draft_to_target_ids(torch.arange(64).flip(0))
    with pytest.raises(ValueError, match="draft_vocab_size=64: the draft vocabulary is the whole"):
        drafter.export(tmp_path / "x", to="vllm", target=TARGET)


# ---- the card ----


@pytest.fixture
def saved_target(tmp_path) -> Path:
    """A target with a tokenizer, as a folder."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    target = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=256, num_hidden_layers=NUM_LAYERS, eos_token_id=None))
    target.save_pretrained(tmp_path / "target")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path / "target")
    return tmp_path / "target"


CARDS = [
    ({"fc_norm": True, "norm_output": True}, {"Acceptance length, MT-Bench": 2.42}),
    ({"aux_layer_ids": [1, 2, 3]}, {}),
    ({"use_aux_hidden_state": False, "norm_before_residual": True, "qk_norm": True, "fc_bias": False}, {"a": 1.0}),
    (DRAFTERS["mla"], {}),
]


@pytest.mark.parametrize(
    ("overrides", "metrics"),
    slow_rows_but(CARDS[:1], CARDS),
    ids=["eagle31", "ids", "no_fc", "mla"],
)
def test_card_is_whole_and_its_snippet_runs(overrides, metrics, saved_target, tmp_path, capsys):
    target = LlamaForCausalLM.from_pretrained(saved_target)
    drafter = make_drafter(target, vocab_size=256, draft_vocab_size=100, **overrides)
    drafter.export(tmp_path / "out", to="hf", target=saved_target, metrics=metrics)
    text = (tmp_path / "out" / "README.md").read_text()
    assert not PLACEHOLDER.search(text), PLACEHOLDER.search(text)
    card = ModelCard(text)
    assert card.data.library_name == "transformers"
    assert card.data.base_model is None  # a folder of somebody's
    assert f"]({saved_target}" not in text
    assert f"drafter for a llama model of {NUM_LAYERS} layers" in text
    assert {"eagle3", "speculative-decoding"} <= set(card.data.tags)
    assert ("eagle3.1" in card.data.tags) == bool(overrides.get("norm_output"))
    assert [(r.metric_name, r.metric_value) for r in card.data.eval_results or []] == list(metrics.items())
    assert ("## Measured" in text) == bool(metrics)
    (snippet,) = (block.code for block in blocks_of(tmp_path / "out" / "README.md") if block.language == "python")
    exec(compile(snippet, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("The capital of France is")
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {*REMOTE_CODE_FILES, "config.json", "README.md"}


@pytest.mark.parametrize("text", ["[More Information Needed]", "{target}", "TODO", "by None", "<repo_id>"])
def test_a_placeholder_would_be_found(text):
    assert PLACEHOLDER.search(text)


def test_a_folder_that_reads_like_a_repository_is_no_base_model(saved_target, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    target = LlamaForCausalLM.from_pretrained("target")
    drafter = make_drafter(target, vocab_size=256, draft_vocab_size=100)
    for name, base in (("target", None), ("some-owner/some-target", "some-owner/some-target")):
        drafter.export(tmp_path / f"out {base}", to="hf", target=name)
        card = ModelCard.load(tmp_path / f"out {base}" / "README.md")
        assert card.data.base_model == base
        assert ("https://huggingface.co/" in card.text) == (base is not None)


def test_a_card_needs_its_target(tmp_path):
    drafter = make_drafter(make_target("llama"))
    drafter.bound_target_name = None
    with pytest.raises(ValueError, match="names the target the drafter is for"):
        drafter.export(tmp_path / "out", to="hf")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("by_saving", [False, True])
def test_push_to_hub_goes_through_the_export(by_saving, tmp_path, monkeypatch):
    uploaded = {}

    class Made:
        repo_id = "me/drafter"

    def upload(*, repo_id, folder_path, **kwargs):
        uploaded.update(
            {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}, repo_id=repo_id, **kwargs
        )

    monkeypatch.setattr(drafter_eagle3, "create_repo", lambda *args, **kwargs: Made)
    monkeypatch.setattr(drafter_eagle3, "upload_folder", upload)
    drafter = make_drafter(make_target("llama"))
    drafter.bound_target_name = "some-owner/some-target"
    if by_saving:
        drafter.save_pretrained(tmp_path / "out", push_to_hub=True, repo_id="drafter", commit_message="first")
    else:
        drafter.push_to_hub("drafter", commit_message="first")
    card = uploaded["README.md"].decode()
    assert "base_model: some-owner/some-target" in card
    assert 'AutoModel.from_pretrained("me/drafter"' in card
    assert not PLACEHOLDER.search(card)
    assert uploaded["repo_id"] == "me/drafter"
    assert uploaded["commit_message"] == "first"
    assert uploaded.keys() >= {*REMOTE_CODE_FILES, "model.safetensors"}
