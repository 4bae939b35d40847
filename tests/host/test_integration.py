"""The host with hf-eagle3 in it: drafters are known, all else is as it was."""

import copy
import sys
import textwrap
from contextlib import nullcontext
from subprocess import run

import pytest
import torch
import transformers
from helpers.models import make_drafter, make_oracle, make_prompt, make_target
from helpers.tokenizers import tokenizer
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, LlamaForCausalLM, pipeline
from transformers.generation import GenerationMixin
from transformers.generation import utils as generation_utils

import hf_eagle3
from hf_eagle3 import Eagle3DrafterConfig, Eagle3DrafterModel
from hf_eagle3.compat import CACHE_NAME
from hf_eagle3.host import install as integration
from hf_eagle3.host.install import WRAPS
from hf_eagle3.host.refusals import is_drafter


def wrapped_names():
    return [f"{owner.__name__}.{name}" for owner, name, _ in WRAPS]


def test_uninstall_restores_the_very_functions():
    hf_eagle3.uninstall()
    before = [vars(owner)[name] for owner, name, _ in WRAPS]
    hf_eagle3.install()
    try:
        during = [vars(owner)[name] for owner, name, _ in WRAPS]
        assert all(a is not b for a, b in zip(before, during, strict=True)), wrapped_names()
        hf_eagle3.install()
        assert [vars(owner)[name] for owner, name, _ in WRAPS] == during  # nothing is wrapped twice
        hf_eagle3.uninstall()
        assert all(a is vars(owner)[name] for a, (owner, name, _) in zip(before, WRAPS, strict=True))
        hf_eagle3.uninstall()
    finally:
        hf_eagle3.install()


def test_wraps_look_like_the_originals():
    for owner, name, _ in WRAPS:
        ours, original = vars(owner)[name], integration._originals[owner, name]
        if isinstance(ours, classmethod):
            ours, original = ours.__func__, original.__func__
        assert ours.__wrapped__ is original
        assert (ours.__name__, ours.__doc__) == (original.__name__, original.__doc__)


CALLS = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
    "beams": {"num_beams": 3, "do_sample": False},
    "prompt_lookup": {"prompt_lookup_num_tokens": 3, "eos_token_id": 2, "do_sample": False},
    "assistant_greedy": {"assistant": True, "do_sample": False},
    "assistant_sampled": {"assistant": True, "do_sample": True},
}


def host_results(calls):
    target = make_target("llama")
    small = LlamaForCausalLM(type(target.config)(**target.config.to_dict() | {"num_hidden_layers": 1})).eval()
    small.load_state_dict(target.state_dict(), strict=False)  # it has fewer layers
    results = {}
    for name, settings in calls.items():
        settings = dict(settings)
        if settings.pop("assistant", False):
            settings["assistant_model"] = copy.deepcopy(small)
        torch.manual_seed(4)
        prompt = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])
        out = target.generate(
            prompt, max_new_tokens=24, return_dict_in_generate=True, output_scores=True, output_logits=True, **settings
        )
        assert not hasattr(out, "speculation")
        results[name] = out
    return results


def test_other_calls_are_bit_identical_to_the_plain_host():
    torch.manual_seed(0)
    ours = host_results(CALLS)
    hf_eagle3.uninstall()
    try:
        torch.manual_seed(0)
        plain = host_results(CALLS)
    finally:
        hf_eagle3.install()
    for name in CALLS:
        assert ours[name].sequences.tolist() == plain[name].sequences.tolist(), name
        assert ours[name].keys() == plain[name].keys()
        for key in ("scores", "logits"):
            assert all(torch.equal(a, b) for a, b in zip(ours[name][key], plain[name][key], strict=True)), name


def test_host_errors_stay_the_hosts(target):
    for settings, error in (
        ({"assistant_model": make_target("qwen3"), "inputs": make_prompt(4).repeat(2, 1)}, ValueError),
        ({"no_such_setting": 1, "inputs": make_prompt(4)}, ValueError),
    ):
        messages = []
        for restore in (hf_eagle3.uninstall, hf_eagle3.install):
            restore()
            with pytest.raises(error) as caught:
                target.generate(max_new_tokens=3, **settings)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
    with pytest.raises(TypeError):
        GenerationMixin.generate(target, *[None] * 20)


def test_ordinary_assistant_next_to_a_drafter(target):
    prompt = make_prompt(6)
    plain = target.generate(prompt, max_new_tokens=12, do_sample=False)
    for assistant in (make_drafter(target), copy.deepcopy(target), make_oracle(target, plain[0])):
        out = target.generate(prompt, max_new_tokens=12, do_sample=False, assistant_model=assistant)
        assert out.tolist() == plain.tolist()


def test_drafter_may_come_by_position(target):
    drafter = make_drafter(target)
    config = transformers.GenerationConfig(max_new_tokens=6, return_dict_in_generate=True)
    out = target.generate(make_prompt(5), config, None, None, None, None, drafter)
    assert out.speculation.rounds > 0


def test_plain_output_is_a_tensor(target):
    assert isinstance(
        target.generate(make_prompt(5), max_new_tokens=4, assistant_model=make_drafter(target)), torch.Tensor
    )


def test_logged_once_a_call(target, caplog):
    with caplog.at_level("INFO", logger="hf_eagle3"):
        target.generate(make_prompt(5), max_new_tokens=8, assistant_model=make_drafter(target))
    assert [r.getMessage() for r in caplog.records] == [
        "own decode loop (attention caches only): depth 3, target states at boundaries (2, 4, 5)."
    ]


# ---- loading ----


def test_auto_classes_load_a_saved_drafter(target, tmp_path):
    drafter = make_drafter(target)
    drafter.generation_config.num_assistant_tokens = 2
    drafter.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), Eagle3DrafterConfig)
    for auto in (AutoModel, AutoModelForCausalLM):
        loaded = auto.from_pretrained(tmp_path)
        assert type(loaded) is Eagle3DrafterModel
        out = target.generate(make_prompt(5), assistant_model=loaded, max_new_tokens=8, return_dict_in_generate=True)
        assert out.speculation.depth == 2


def test_other_configs_load_as_ever(target, tmp_path):
    target.config.save_pretrained(tmp_path)
    results = []
    for restore in (hf_eagle3.uninstall, hf_eagle3.install):
        restore()
        results.append(AutoConfig.from_pretrained(tmp_path, return_unused_kwargs=True, vocab_size=99, foo=1))
    (plain, plain_unused), (ours, ours_unused) = results
    assert ours.to_dict() == plain.to_dict()
    assert ours_unused == plain_unused == {"foo": 1}
    assert type(ours) is type(plain)


def test_host_complains_itself_about_what_is_no_place():
    for nowhere in (None, 3):
        messages = []
        for restore in (hf_eagle3.uninstall, hf_eagle3.install):
            restore()
            with pytest.raises(Exception) as caught:  # noqa: PT011  whatever the host raises
                AutoConfig.from_pretrained(nowhere)
            messages.append((type(caught.value), str(caught.value)))
        assert messages[0] == messages[1]


@pytest.mark.slow
def test_drafter_from_remote_code_is_recognised(target, tmp_path):
    """Loaded by the host from its own copy of modeling/, before hf_eagle3 is imported: another class altogether."""
    folder = tmp_path / "drafter"
    make_drafter(target).save_pretrained(folder)
    target.save_pretrained(tmp_path / "target")
    code = f"""
        import torch
        from transformers import AutoModel, AutoModelForCausalLM
        drafter = AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True)
        target = AutoModelForCausalLM.from_pretrained({str(tmp_path / "target")!r})
        import hf_eagle3
        assert type(drafter).__module__.startswith("transformers_modules"), type(drafter).__module__
        assert not isinstance(drafter, hf_eagle3.Eagle3DrafterModel)
        prompt = torch.tensor([[5, 6, 7, 8]])
        out = target.generate(prompt, assistant_model=drafter, max_new_tokens=12, return_dict_in_generate=True)
        assert out.speculation.rounds > 0
        assert out.sequences.tolist() == target.generate(prompt, max_new_tokens=12).tolist()
    """
    environment = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(integration.__file__).rsplit("/hf_eagle3/", 1)[0], "HOME": str(tmp_path)}
    done = run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr


def test_is_drafter_goes_by_model_type(target):
    assert is_drafter(make_drafter(target))
    assert not is_drafter(target)
    assert not is_drafter(None)
    assert not is_drafter("eagle3")


def test_the_line_that_an_export_ends_with_works_as_it_stands(target, tmp_path):
    named = copy.deepcopy(target.config)
    named.name_or_path = "someone/llama"
    exported = make_drafter(target).export(tmp_path / "out", to="hf", target=named)
    line, _, condition = exported.command.partition("  # ")
    assert condition == "after `import hf_eagle3`"
    drafter = eval(line, {"AutoModel": AutoModel})
    options = {"max_new_tokens": 6, "do_sample": False}
    out = target.generate(make_prompt(5), assistant_model=drafter, **options)
    assert out.tolist() == target.generate(make_prompt(5), **options).tolist()


# ---- what the host deprecates ----


@pytest.mark.skipif(CACHE_NAME == "past_key_values", reason="Transformers deprecates past_key_values from 5.24 on")
@pytest.mark.parametrize("assisted", [False, True], ids=["plain", "assisted"])
@pytest.mark.parametrize("caller", ["somewhere", "peft.somewhere", "hf_eagle3.somewhere"])
def test_an_old_name_is_an_error_in_calls_of_ours_alone(target, caller, assisted):
    """As tests/conftest.py tells them apart: our wraps stand between a caller and the host, too."""
    namespace = {"__name__": caller}
    exec("def call(function, *args, **kwargs): return function(*args, **kwargs)", namespace)
    assistant = {"assistant_model": make_drafter(target)} if assisted else {}
    is_ours = caller.startswith("hf_eagle3")
    with pytest.raises(FutureWarning, match="Use `cache` instead") if is_ours else nullcontext():
        namespace["call"](
            target.generate, make_prompt(5), past_key_values=DynamicCache(), max_new_tokens=2, **assistant
        )
    with pytest.raises(FutureWarning, match="Use `cache` instead") if is_ours else nullcontext():
        namespace["call"](target, make_prompt(5), past_key_values=DynamicCache())


# ---- pipelines ----


@pytest.mark.parametrize("given", ["name", "path", "published", "drafter", "drafter_and_tokenizer"])
def test_pipeline_takes_a_drafter_by_its_name(target, tmp_path, given):
    """Neither a class of the host's nor a tokenizer is looked for."""
    drafter, words, options = make_drafter(target), tokenizer(), {"max_new_tokens": 8, "do_sample": False}
    folder = tmp_path / "drafter"
    if given == "published":
        drafter.config.verifier_name_or_path = None
        drafter.export(folder, to="sglang", target=target)
    else:
        drafter.save_pretrained(folder)
    assistant = {
        "assistant_model": drafter if given.startswith("drafter") else folder if given == "path" else str(folder)
    }
    if given == "drafter_and_tokenizer":
        assistant["assistant_tokenizer"] = words
    plain = pipeline("text-generation", model=target, tokenizer=words)(["w5 w9 w11", "w7 w8 w9"], **options)
    drafting = pipeline("text-generation", model=target, tokenizer=words, **assistant)
    assert isinstance(drafting.assistant_model, Eagle3DrafterModel)
    assert (drafting.assistant_model.device, drafting.assistant_model.dtype) == (target.device, target.dtype)
    calls = []
    drafting.assistant_model.register_forward_pre_hook(lambda *_: calls.append(1))
    assert drafting(["w5 w9 w11", "w7 w8 w9"], batch_size=2, **options) == plain
    assert len(plain[0][0]["generated_text"].split()) > 7
    assert calls


def test_pipeline_loads_both_by_name(target, tmp_path):
    target.save_pretrained(tmp_path / "target")
    tokenizer().save_pretrained(tmp_path / "target")
    make_drafter(target).to(torch.bfloat16).save_pretrained(tmp_path / "drafter")
    names = {"model": str(tmp_path / "target"), "assistant_model": str(tmp_path / "drafter")}
    drafting = pipeline("text-generation", **names)
    assert drafting.assistant_model.dtype == drafting.model.dtype == torch.float32
    options = {"max_new_tokens": 8, "do_sample": False}
    plain = pipeline("text-generation", model=names["model"])("w5 w9 w11", **options)
    assert drafting("w5 w9 w11", **options) == plain


def test_other_assistants_of_a_pipeline_are_the_hosts(target, tmp_path):
    small = LlamaForCausalLM(type(target.config)(**target.config.to_dict() | {"num_hidden_layers": 1})).eval()
    small.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    outs = []
    for restore in (hf_eagle3.uninstall, hf_eagle3.install):
        restore()
        for assistant in (small, str(tmp_path)):
            made = pipeline("text-generation", model=target, tokenizer=tokenizer(), assistant_model=assistant)
            outs.append((type(made.assistant_model), made("w5 w9 w11", max_new_tokens=8, do_sample=False)))
    assert outs[0] == outs[1] == outs[2] == outs[3]
    with pytest.raises(OSError, match="no/such/folder"):
        pipeline("text-generation", model=target, tokenizer=tokenizer(), assistant_model="/no/such/folder")


# ---- hosts that will not do ----


def test_too_old_a_host_is_told_the_minimum(monkeypatch):
    # The module that ours imported: a model class may import the host anew.
    monkeypatch.setattr(integration.transformers, "__version__", "5.1.0")
    with pytest.raises(ImportError, match=rf"needs transformers>={integration.MINIMUM_TRANSFORMERS}, found 5\.1\.0"):
        hf_eagle3.install()


def test_a_host_that_lost_a_function_is_refused(monkeypatch):
    hf_eagle3.uninstall()
    try:
        monkeypatch.delattr(generation_utils, "_speculative_sampling")
        with pytest.raises(ImportError, match=r"has no transformers\.generation\.utils\._speculative_sampling"):
            hf_eagle3.install()
        assert not integration._originals  # nothing half installed
    finally:
        monkeypatch.undo()
        hf_eagle3.install()
