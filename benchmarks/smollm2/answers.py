"""Answers of a small Llama target to many prompts, as token ids: one CUDA graph a decode step, thousands of rows.

The host's batched `generate` is bound by kernel launches on a model this small; this is the same arithmetic with the
launches captured. Only for the recipe in this folder, until our own decode loop does it for any target.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

REFILL = 32  # decode steps between two looks at the finished rows
PREFILL = 256  # prompts started in one forward


def attend_matmul(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """One query a row over its first `lengths` slots, the query heads of a KV head packed: [B, heads, D]."""
    B, L, G, D = keys.shape
    packed = query.view(B, G, -1, D)  # [B, G, heads / G, D]
    scores = torch.matmul(packed, keys.permute(0, 2, 3, 1)) * D**-0.5  # [B, G, heads / G, L]
    seen = torch.arange(L, device=query.device) < lengths[:, None]  # [B, L]
    scores = scores.float().masked_fill(~seen[:, None, None], -torch.inf).softmax(-1).to(query.dtype)
    return torch.matmul(scores, values.transpose(1, 2)).view(B, -1, D)


def attend_flash(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """The same through the flash kernel's per-row key lengths (torch's ATen operator)."""
    B, L, G, D = keys.shape
    starts = torch.arange(0, B + 1, device=query.device, dtype=torch.int32)
    out = torch.ops.aten._flash_attention_forward(
        *(query, keys.reshape(B * L, G, D), values.reshape(B * L, G, D)),
        *(starts, starts * L, 1, L, 0.0, False, False),
        scale=D**-0.5,
        seqused_k=lengths.to(torch.int32),
    )
    return out[0]


@dataclass
class Batch:
    """The rows being decoded; the graph reads and writes these tensors in place. R rows."""

    tokens: Tensor  # [R] int64, newest token of each row
    lengths: Tensor  # [R] int64, tokens in the cache
    counts: Tensor  # [R] int64, tokens answered
    temperature: Tensor  # [R] float32, 0 = greedy
    done: Tensor  # [R] bool
    answers: Tensor  # [R, N] int64


class Answerer:
    """Decodes many prompts with a Llama target on one GPU; finished rows are refilled every `REFILL` steps.

    Args:
        target: On its device, bf16.
        rows: Rows decoded side by side.
        capacity: Slots of KV cache a row: prompt and answer together.
        max_new_tokens: Longest answer.
    """

    def __init__(self, target: LlamaForCausalLM, rows: int, capacity: int, max_new_tokens: int):
        self.model, self.config, self.head = target.model, target.config, target.lm_head.weight
        self.device, self.rows, self.capacity = self.head.device, rows, capacity
        c = self.config
        shape = (c.num_hidden_layers, rows, capacity, c.num_key_value_heads, c.head_dim)
        self.keys = torch.zeros(shape, dtype=self.head.dtype, device=self.device)
        self.values = torch.zeros_like(self.keys)
        self.where = torch.arange(rows, device=self.device)
        self.attend: Callable = attend_matmul
        self.batch = Batch(
            tokens=torch.zeros(rows, dtype=torch.int64, device=self.device),
            lengths=torch.zeros(rows, dtype=torch.int64, device=self.device),
            counts=torch.zeros(rows, dtype=torch.int64, device=self.device),
            temperature=torch.zeros(rows, device=self.device),
            done=torch.ones(rows, dtype=torch.bool, device=self.device),
            answers=torch.zeros(rows, max_new_tokens, dtype=torch.int64, device=self.device),
        )

    def _block(self, layer_idx: int, hidden: Tensor, position_ids: Tensor, attend: Callable) -> Tensor:
        """One decoder layer over `hidden` [B, T, H]; `attend(q, k, v)` takes [B, T, heads, D]."""
        layer = self.model.layers[layer_idx]
        B, T, _ = hidden.shape
        x = layer.input_layernorm(hidden)
        attn = layer.self_attn
        q, k, v = (p(x).view(B, T, -1, self.config.head_dim) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
        cos, sin = self.model.rotary_emb(hidden, position_ids)
        q, k = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
        hidden = hidden + attn.o_proj(attend(q, k, v).reshape(B, T, -1))
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))

    @torch.no_grad()
    def _fill(self, rows: Tensor, prompts: Sequence[np.ndarray], temperatures: np.ndarray) -> None:
        """Start `prompts` in `rows`: fill their caches and answer the first token."""
        batch, T = self.batch, max(len(p) for p in prompts)
        ids = torch.zeros(len(prompts), T, dtype=torch.int64)
        for i, p in enumerate(prompts):
            ids[i, : len(p)] = torch.from_numpy(p.astype(np.int64))
        lengths = torch.tensor([len(p) for p in prompts], device=self.device)
        hidden = self.model.embed_tokens(ids.to(self.device))
        position_ids = torch.arange(T, device=self.device)[None]
        for layer in range(self.config.num_hidden_layers):

            def attend(q: Tensor, k: Tensor, v: Tensor, layer: int = layer) -> Tensor:
                self.keys[layer, rows, :T] = k
                self.values[layer, rows, :T] = v
                q, k, v = (x.transpose(1, 2) for x in (q, k, v))
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

            hidden = self._block(layer, hidden, position_ids, attend)
        hidden = self.model.norm(hidden[torch.arange(len(prompts), device=self.device), lengths - 1])
        temperature = torch.from_numpy(temperatures).float().to(self.device)
        first = self._sample(F.linear(hidden, self.head), temperature)
        batch.temperature[rows] = temperature
        batch.lengths[rows] = lengths
        batch.tokens[rows] = first
        batch.answers[rows, 0] = first
        batch.counts[rows] = 1
        batch.done[rows] = first == self.config.eos_token_id

    def _sample(self, logits: Tensor, temperature: Tensor) -> Tensor:
        logits = logits.float()
        probs = (logits / temperature.clamp_min(1e-2)[:, None]).softmax(-1)
        drawn = (probs / torch.empty_like(probs).exponential_()).argmax(-1)
        return torch.where(temperature > 0, drawn, logits.argmax(-1))

    @torch.no_grad()
    def _step(self) -> None:
        batch = self.batch
        hidden = self.model.embed_tokens(batch.tokens)[:, None]  # [R, 1, H]
        position_ids = batch.lengths[:, None]
        for layer in range(self.config.num_hidden_layers):

            def attend(q: Tensor, k: Tensor, v: Tensor, layer: int = layer) -> Tensor:
                self.keys[layer].index_put_((self.where, batch.lengths), k[:, 0])
                self.values[layer].index_put_((self.where, batch.lengths), v[:, 0])
                return self.attend(q[:, 0], self.keys[layer], self.values[layer], batch.lengths + 1)

            hidden = self._block(layer, hidden, position_ids, attend)
        new = self._sample(F.linear(self.model.norm(hidden[:, 0]), self.head), batch.temperature)
        going = ~batch.done  # a finished row repeats its last step, changing nothing that is read
        slot = batch.counts.clamp_max(batch.answers.shape[1] - 1)[:, None]
        batch.answers.scatter_(1, slot, torch.where(going[:, None], new[:, None], batch.answers.gather(1, slot)))
        batch.tokens.copy_(torch.where(going, new, batch.tokens))
        batch.lengths += going
        batch.counts += going
        batch.done |= (new == self.config.eos_token_id) | (batch.counts >= batch.answers.shape[1])

    def capture(self) -> Callable[[], None]:
        """The decode step as one CUDA graph."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        return graph.replay

    @torch.no_grad()
    def answer(
        self, step: Callable[[], None], prompts: Sequence[np.ndarray], temperatures: np.ndarray, desc: str = "answers"
    ) -> list[np.ndarray]:
        """Answer each prompt, end-of-turn token included where it came; uint16 ids, in the order given."""
        batch, answers = self.batch, [np.empty(0, np.uint16)] * len(prompts)
        waiting = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # shortest last, taken first
        running = np.full(self.rows, -1)
        batch.done.fill_(True)
        tokens, began, progress = 0, time.time(), tqdm(total=len(prompts), desc=desc, mininterval=5)
        while True:
            free = np.flatnonzero(batch.done.cpu().numpy())
            finished = free[running[free] >= 0]
            if len(finished):
                counts, texts = batch.counts.cpu().numpy(), batch.answers.cpu().numpy()
                for row in finished:
                    answers[running[row]] = texts[row, : counts[row]].astype(np.uint16)
                    tokens += counts[row]
                running[finished] = -1
                progress.update(len(finished))
                progress.set_postfix_str(f"{tokens / (time.time() - began):,.0f} tokens/s")
            if not waiting and (running < 0).all():
                return answers
            for start in range(0, len(free), PREFILL):
                rows = free[start : start + PREFILL][: len(waiting)]
                if len(rows):
                    running[rows] = [waiting.pop() for _ in rows]
                    taken = [prompts[i] for i in running[rows]]
                    self._fill(torch.from_numpy(rows).to(self.device), taken, temperatures[running[rows]])
            for _ in range(REFILL):
                step()


def pick_attention(answerer: Answerer) -> None:
    """Take the faster of the two attentions where they agree; print both."""
    rows, capacity, config = answerer.rows, answerer.capacity, answerer.config
    shape = (rows, config.num_attention_heads, config.head_dim)
    q = torch.randn(shape, device=answerer.device, dtype=torch.bfloat16)
    keys, values = answerer.keys[0].normal_(), answerer.values[0].normal_()
    lengths = torch.randint(1, capacity, (rows,), device=answerer.device)
    want = attend_matmul(q, keys, values, lengths).float()
    times = {}
    for attend in (attend_matmul, attend_flash):
        try:
            error = float((attend(q, keys, values, lengths).float() - want).abs().max())
        except RuntimeError as failure:
            print(f"{attend.__name__}: not on this build ({str(failure).splitlines()[0]})")
            continue
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(20):
            attend(q, keys, values, lengths)
        end.record()
        torch.cuda.synchronize()
        print(f"{attend.__name__}: {start.elapsed_time(end) / 20:.3f} ms a layer, largest difference {error:.2e}")
        if error < 2e-2:
            times[attend] = start.elapsed_time(end)
    answerer.attend = min(times, key=times.get)
