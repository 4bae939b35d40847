"""Linear layers by oneDNN in rounds on a CPU give what stock layers give."""

import itertools
import threading
import weakref

import pytest
import torch
from helpers.marks import slow_but
from helpers.models import TARGETS, count_hooks, make_drafter, make_prompt, make_target
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer

from hf_eagle3.kernels import onednn as packed
from hf_eagle3.rows.attention import FOLDED

pytestmark = [
    pytest.mark.any_release,
    pytest.mark.skipif(not packed.is_available(), reason="needs oneDNN on a CPU with AVX2"),
]

NEW = 24
SIZES = [(24, 16, False), (33, 7, True), (1, 5, True), (130, 64, True)]  # N, K, bias


class Products(list):
    """What oneDNN was asked for: whether of a packed weight."""


@pytest.fixture(autouse=True)
def onednn(monkeypatch) -> packed.OneDnn:
    """What calls use in each test: packs small layers too, in the second round, and has compared nothing yet."""
    fresh = packed.OneDnn(min_weights=1, pack_after=1)
    monkeypatch.setattr(packed, "ONEDNN", fresh)
    return fresh


@pytest.fixture(autouse=True)
def products(onednn) -> Products:
    """Note what runs."""
    seen, run = Products(), onednn.linear

    def noted(x, weight, bias):
        seen.append(weight.is_mkldnn)
        return run(x, weight, bias)

    onednn.linear = noted
    return seen


def generate(target, prompt, drafter, **options):
    return target.generate(prompt, assistant_model=drafter, **{"max_new_tokens": NEW, **options})


def are_as_they_were(target) -> bool:
    """Whether no module carries another forward, no hook of ours is left and the attention is the user's."""
    are_bare = all("forward" not in vars(module) for module in target.modules())
    return are_bare and not count_hooks(target) and target.config._attn_implementation != FOLDED


# ---- products ----


@pytest.mark.parametrize(("N", "K", "bias"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_products_are_stock_ones(N, K, bias, dtype, products):
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bfloat16 on this CPU, so such layers are left alone")
    module = nn.Linear(K, N, bias=bias, dtype=dtype)
    linears = packed.PackedLinears(nn.Sequential(module))
    with torch.no_grad():
        for num_tokens in (2, 3, 5, 8, 16, 31, 64, 1):
            x = torch.randn(num_tokens, K, dtype=dtype)
            for shaped in (x, x[:, None], x[None]):
                with linears:
                    ours = module(shaped)
                theirs = module(shaped)
                assert ours.shape == theirs.shape
                tolerance = 1e-5 if dtype == torch.float32 else 1e-2
                torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    assert products[-1]
    assert products.count(False) == (1 if dtype == torch.float32 else 0)  # before the second round


def test_single_rows_of_float32_are_pytorchs_and_pack_nothing(products):
    module, x = nn.Linear(16, 24), torch.randn(1, 16)
    linears = packed.PackedLinears(nn.Sequential(module))
    with torch.no_grad():
        for _ in range(4):
            with linears:
                assert torch.equal(module(x), nn.functional.linear(x, module.weight, module.bias))
    assert not products
    assert linears._layers[0].packed is None


@pytest.mark.parametrize("error", [1.0, 1e-3])
def test_products_that_differ_are_left_alone(error, onednn, products, caplog):
    module, x = nn.Linear(16, 24), torch.randn(3, 16)
    linears = packed.PackedLinears(nn.Sequential(module))
    run = onednn.linear
    onednn.linear = lambda x, w, b: run(x, w, b) * (1 + error)
    with torch.no_grad():
        stock = module(x)
        for _ in range(3):
            with linears:
                assert torch.equal(module(x), stock)
    assert len(products) == 2  # one comparison unpacked, one packed
    assert "not PyTorch's" in caplog.text


def test_products_that_fail_are_left_alone(onednn):
    module, x = nn.Linear(16, 24), torch.randn(3, 16)

    def fail(*_):
        raise RuntimeError("could not create a primitive")

    onednn.linear = fail
    with torch.no_grad():
        stock = module(x)
        with packed.PackedLinears(nn.Sequential(module)):
            assert torch.equal(module(x), stock)


def test_nan_tells_nothing(onednn):
    module, x = nn.Linear(16, 24), torch.randn(3, 16)
    with torch.no_grad(), packed.PackedLinears(nn.Sequential(module)):
        assert module(x * torch.nan).isnan().all()
        assert onednn.agreed == {}
        module(x)
    assert list(onednn.agreed.values()) == [True]


class OtherLinear(nn.Linear):
    pass


class OtherParameter(nn.Parameter):
    pass


def _replaced_forward() -> nn.Module:
    module = nn.Linear(16, 24)
    module.forward = lambda x: F.linear(x, module.weight, module.bias)
    return module


def _other_parameter() -> nn.Module:
    module = nn.Linear(16, 24)
    module.weight = OtherParameter(module.weight.data)
    return module


@pytest.mark.parametrize(
    "make",
    [
        lambda: OtherLinear(16, 24),
        _replaced_forward,
        _other_parameter,
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(16, 24)),
        lambda: nn.Linear(16, 24, device="meta"),
        lambda: nn.Linear(16, 24, dtype=torch.float64),
        lambda: nn.Linear(16, 24, dtype=torch.float16),
    ],
    ids=["class", "forward", "parameter", "parametrized", "meta", "float64", "float16"],
)
def test_what_is_more_than_a_linear_layer_is_left_alone(make):
    module = make()
    before = vars(module).get("forward")
    linears = packed.PackedLinears(nn.Sequential(module))
    assert not linears._layers
    with linears:
        assert vars(module).get("forward") is before


def test_gradients_autocast_and_other_weights_go_to_pytorch(onednn, products):
    module, x = nn.Linear(16, 24), torch.randn(3, 16)
    with packed.PackedLinears(nn.Sequential(module)):
        module(x).sum().backward()
        assert module.weight.grad is not None
        with torch.no_grad():
            with torch.autocast("cpu"):
                assert module(x).dtype == torch.bfloat16
            module(torch.randn(onednn.max_tokens + 1, 16))
            module.weight = nn.Parameter(torch.zeros(24, 16))
            assert torch.equal(module(x), module.bias.expand(3, -1))
    assert products == []


def test_weight_written_to_in_a_call_is_read_anew(products):
    module, x = nn.Linear(16, 24, bias=False), torch.randn(3, 16)
    linears = packed.PackedLinears(nn.Sequential(module))
    with torch.no_grad():
        for _ in range(3):
            with linears:
                module(x)
        assert products[-1]
        module.weight.mul_(2)
        with linears:
            torch.testing.assert_close(module(x), F.linear(x, module.weight))
        assert not products[-1]


def test_tied_weights_are_packed_once(onednn):
    made = []
    onednn.pack = lambda weight: made.append(weight) or packed.pack(weight)
    one, other = nn.Linear(16, 24), nn.Linear(16, 24)
    other.weight = one.weight
    linears = packed.PackedLinears(nn.Sequential(one), nn.Sequential(other))
    with torch.no_grad():
        for _ in range(3):
            with linears:
                one(torch.randn(3, 16))
    assert len(made) == 1


def test_large_models_are_not_packed(onednn, products):
    target = make_target("llama")
    onednn.max_packed_bytes = sum(p.nbytes for p in target.parameters()) // 2
    prompt = make_prompt(7)
    assert torch.equal(generate(target, prompt, make_drafter(target)), target.generate(prompt, max_new_tokens=NEW))
    assert products
    assert not any(products)


def test_compiled_models_are_left_alone():
    module = nn.Sequential(nn.Linear(16, 24))
    module.compile(backend="eager")
    assert not packed.PackedLinears(module)._layers
    assert not packed.PackedLinears(torch.compile(nn.Linear(16, 24), backend="eager"))._layers


def test_packs_go_with_the_call(onednn):
    target, prompt = make_target("llama"), make_prompt(7)
    references = []

    def noted(weight):
        made = packed.pack(weight)
        references.append(weakref.ref(made))
        return made

    onednn.pack = noted
    generate(target, prompt, make_drafter(target))
    assert references
    assert not any(reference() is not None for reference in references)


# ---- whole calls ----


@pytest.mark.parametrize("family", slow_but(["gpt_oss"], TARGETS))
@pytest.mark.parametrize("depth", slow_but([3], [0, 1, 3]))
def test_text_is_the_targets(family, depth, products):
    target = make_target(family)
    drafter = make_drafter(target)
    for prompt in (make_prompt(7), make_prompt(12).view(2, 6)):
        plain = target.generate(prompt, max_new_tokens=14)
        for loop in ("own", "eager"):
            products.clear()
            options = {"decode_loop": loop, "num_assistant_tokens": depth, "max_new_tokens": 14}
            out = generate(target, prompt, drafter, **options)
            assert torch.equal(out, plain)
            if (
                depth or len(prompt) > 1 or loop == "eager"
            ):  # a row that drafts nothing has hardly more than single tokens
                assert any(products) == (loop == "own")
            assert are_as_they_were(target)


def test_rows_of_different_lengths(products):
    target = make_target("llama")
    lengths = (3, 11, 7)
    prompt, mask = torch.zeros(3, 11, dtype=torch.long), torch.zeros(3, 11, dtype=torch.long)
    for b, length in enumerate(lengths):
        prompt[b, 11 - length :], mask[b, 11 - length :] = make_prompt(length)[0], 1
    out = generate(target, prompt, make_drafter(target), attention_mask=mask)
    for b, length in enumerate(lengths):
        alone = target.generate(make_prompt(length), max_new_tokens=NEW)
        assert out[b, 11:].tolist() == alone[0, length:].tolist()
    assert any(products)


def test_a_short_call_packs_nothing(onednn, products):
    target, prompt = make_target("llama"), make_prompt(7)
    onednn.pack_after = packed.OneDnn().pack_after
    target.generate(prompt, max_new_tokens=8, assistant_model=make_drafter(target))
    assert products
    assert not any(products)


def test_bfloat16_agrees_with_stock_layers(products):
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bfloat16 on this CPU, so such layers are left alone")
    target = LlamaForCausalLM(LlamaConfig(**make_target("llama").config.to_diff_dict())).to(torch.bfloat16).eval()
    x = make_prompt(9)
    linears = packed.PackedLinears(target)
    with torch.no_grad():
        theirs = target(x).logits
        for _ in range(2):
            with linears:
                ours = target(x).logits
    assert any(products)
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("write", slow_but(["data"], ["in place", "data", "new parameter"]))
def test_weights_may_change_between_calls(write):
    target = LlamaForCausalLM(make_target("llama").config).eval()
    target.load_state_dict(make_target("llama").state_dict())
    target.generation_config = make_target("llama").generation_config
    drafter, prompt = make_drafter(target), make_prompt(7)
    texts = []
    for _ in range(3):
        plain = target.generate(prompt, max_new_tokens=NEW)
        assert torch.equal(generate(target, prompt, drafter), plain)
        texts.append(plain.tolist())
        for layer in target.model.layers:
            weight = layer.mlp.down_proj.weight
            if write == "in place":
                with torch.no_grad():
                    weight.neg_()
            elif write == "data":
                weight.data.mul_(-1.5)
            else:
                layer.mlp.down_proj.weight = nn.Parameter(-1.5 * weight.detach())
    assert texts[0] != texts[1]  # it does matter


@pytest.mark.slow
def test_adapters_may_be_switched_between_calls(products):
    peft = pytest.importorskip("peft")
    base = LlamaForCausalLM(make_target("llama").config).eval()
    base.load_state_dict(make_target("llama").state_dict())
    base.generation_config = make_target("llama").generation_config
    settings = {"target_modules": ["q_proj", "up_proj"], "init_lora_weights": False, "r": 4, "lora_alpha": 32}
    model = peft.get_peft_model(base, peft.LoraConfig(**settings), adapter_name="one")
    model.add_adapter("two", peft.LoraConfig(**settings))
    drafter, prompt = make_drafter(base), make_prompt(7)
    texts = set()

    def check() -> None:
        products.clear()
        plain = model.generate(input_ids=prompt, max_new_tokens=NEW)
        assert torch.equal(
            model.generate(input_ids=prompt, max_new_tokens=NEW, assistant_model=drafter, decode_loop="own"), plain
        )
        assert any(products)
        texts.add(tuple(plain[0].tolist()))

    for adapter in ("one", "two"):
        model.set_adapter(adapter)
        check()
    model.merge_adapter()
    check()
    model.unmerge_adapter()
    with model.disable_adapter():
        check()
    assert len(texts) >= 3


class Stop(BaseException):
    """As a KeyboardInterrupt, which pytest takes for its own."""


class Streamer(BaseStreamer):
    """Calls `act` once, in the midst of a text."""

    def __init__(self, act):
        self.act, self.num_puts = act, 0

    def put(self, _value):
        self.num_puts += 1
        if self.num_puts == 12:
            self.act()

    def end(self):
        pass


def raise_stop() -> None:
    raise Stop


@pytest.mark.parametrize("where", slow_but(["layer"], ["streamer", "layer", "pack", "attention"]))
def test_a_call_that_is_cut_off_leaves_modules_as_they_were(where, onednn, monkeypatch):
    target, prompt = make_target("llama"), make_prompt(7)
    drafter, options, num_calls, run = make_drafter(target), {}, itertools.count(), onednn.linear
    with monkeypatch.context() as patch:
        if where == "streamer":
            options["streamer"] = Streamer(raise_stop)
        elif where == "layer":
            onednn.linear = lambda *args: raise_stop() if next(num_calls) > 99 else run(*args)
        elif where == "pack":
            onednn.pack = lambda _: raise_stop()
        else:
            patch.setattr("hf_eagle3.rows.attention.scaled_dot_product_attention", lambda *_, **__: raise_stop())
        with pytest.raises(Stop):
            generate(target, prompt, drafter, **options)
    onednn.linear, onednn.pack = run, packed.pack
    assert are_as_they_were(target)
    assert are_as_they_were(drafter)
    assert torch.equal(generate(target, prompt, drafter), target.generate(prompt, max_new_tokens=NEW))


def test_interrupted_on_entering(monkeypatch):
    target, prompt = make_target("llama"), make_prompt(7)
    enter = packed.PackedLinears.__enter__

    def enter_and_stop(self):
        enter(self)
        raise Stop

    monkeypatch.setattr(packed.PackedLinears, "__enter__", enter_and_stop)
    with pytest.raises(Stop):
        generate(target, prompt, make_drafter(target))
    assert are_as_they_were(target)


def test_a_streamer_may_generate_with_the_same_models():
    target, prompt = make_target("llama"), make_prompt(7)
    drafter = make_drafter(target)
    other = make_prompt(5)
    plain, texts = target.generate(other, max_new_tokens=NEW), []

    def act():
        assert all("forward" not in vars(module) for module in target.modules())
        texts.append(target.generate(other, max_new_tokens=NEW))
        texts.append(generate(target, other, make_drafter(target)))

    out = generate(target, prompt, drafter, streamer=Streamer(act))
    assert torch.equal(out, target.generate(prompt, max_new_tokens=NEW))
    assert len(texts) == 2
    assert all(torch.equal(text, plain) for text in texts)
    assert are_as_they_were(target)


@pytest.mark.slow
def test_two_threads_on_one_target():
    target = make_target("llama")
    prompts = [make_prompt(7), make_prompt(9), make_prompt(4)]
    plain = [target.generate(prompt, max_new_tokens=NEW) for prompt in prompts]
    problems = []

    def work(index: int, drafter) -> None:
        try:
            for _ in range(6):
                options = {} if drafter is None else {"assistant_model": drafter, "decode_loop": "own"}
                out = target.generate(prompts[index], max_new_tokens=NEW, **options)
                if not torch.equal(out, plain[index]):
                    problems.append(f"text of thread {index}")
        except Exception as error:  # noqa: BLE001  to be told in the test's own thread
            problems.append(repr(error))

    drafters = [make_drafter(target), make_drafter(target), None]
    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(drafters)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert are_as_they_were(target)
