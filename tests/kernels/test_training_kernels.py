"""Kernels that training reads rows of logits with, beside their eager twins."""

import pytest
import torch

from hf_eagle3.kernels import head_loss, language
from hf_eagle3.training.step.head_loss import LossChunk, Method, chunk_loss, chunk_loss_by_kernel
from hf_eagle3.training.step.losses import LOSSES

pytestmark = pytest.mark.any_release

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
kernel = pytest.mark.skipif(
    not language.is_available(torch.device(DEVICE)), reason="needs a GPU, or Triton with TRITON_INTERPRET=1"
)


@kernel
@pytest.mark.gpu
@pytest.mark.parametrize(("n", "V"), [(3, 100), (5, 4096), (2, 5000)])
def test_summary_of_rows(n, V):
    torch.manual_seed(n)
    logits = (torch.randn(n, V, device=DEVICE) * 8).bfloat16()
    logits[0, V // 2 :] = logits[0].max()  # several largest: the first counts
    top, at, lse = head_loss.summarise(logits)
    their_top, _, their_lse = head_loss.summarise_eager(logits)
    assert torch.equal(top, their_top)
    assert at[0] == int((logits[0] == logits[0].max()).nonzero()[0])
    assert torch.equal(logits.gather(1, at[:, None])[:, 0].float(), top)
    torch.testing.assert_close(lse, their_lse, atol=1e-4, rtol=1e-6)


@kernel
@pytest.mark.gpu
@pytest.mark.parametrize(("k", "C", "V"), [(3, 7, 100), (1, 2, 5000), (4, 5, 2048)])
def test_head_loss_is_the_eager_chunk(k, C, V):
    torch.manual_seed(C)
    logits = (torch.randn(k, C, V, device=DEVICE) * 3).bfloat16()
    kept = (torch.randn(C + k - 1, V, device=DEVICE) * 3).bfloat16()
    lse = kept.float().logsumexp(-1) + torch.rand(C + k - 1, device=DEVICE)
    best = kept.argmax(-1)
    best[1] = -1
    token = torch.randint(-1, V, (k, C), device=DEVICE)
    token[0, 0] = logits[0, 0].argmax()
    depth = torch.randint(0, k + 1, (C,), device=DEVICE)
    depth[0], depth[-1] = k, 0
    scale = 0.8 ** torch.arange(k, device=DEVICE)
    live = depth > torch.arange(k, device=DEVICE)[:, None]
    chunk = LossChunk(logits, kept, lse, best, token)
    method = Method(LOSSES["forward_kl"], scale, torch.zeros(k, device=DEVICE))
    *theirs, their_hits, their_alphas, their_grad = chunk_loss(chunk, live, method, scale)
    *ours, hits, alphas, grad = chunk_loss_by_kernel(chunk._replace(logits=logits.clone()), depth, scale)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.float(), b.float(), atol=1e-4, rtol=1e-4)
    assert torch.equal(hits, their_hits)
    torch.testing.assert_close(alphas, their_alphas, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(grad.float(), their_grad.float(), atol=1e-6, rtol=1e-2)
    assert not grad[~live].any()
    assert hits[0, 0]


@kernel
@pytest.mark.gpu
@pytest.mark.parametrize("factor", [1.0, 0.37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaling_in_place(factor, dtype):
    x = torch.randn(3, 5, 1001, device=DEVICE, dtype=dtype)
    factor = torch.tensor(factor, device=DEVICE)
    expected = (x.float() * factor).to(dtype)
    assert head_loss.scale_(x, factor) is x
    torch.testing.assert_close(x, expected, rtol=0, atol=0)
