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

BUCKET = 128  # row capacities are rounded up to this, so that few graphs serve all batches


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
    """A batch being decoded; the graph reads and writes these tensors in place."""

    tokens: Tensor  # [B] int64, newest token of each row
    lengths: Tensor  # [B] int64, tokens in the cache
    temperature: Tensor  # [B] float32, 0 = greedy
    done: Tensor  # [B] bool
    answers: Tensor  # [B, N] int64
    step: Tensor  # [1] int64


class Answerer:
    """Decodes batches of a Llama target on one GPU.

    Args:
        target: On its device, bf16.
        cache_tokens: Slots of KV cache, shared by the rows of a batch.
    """

    def __init__(self, target: LlamaForCausalLM, cache_tokens: int = 2048 * 512):
        self.model, self.config = target.model, target.config
        self.head = target.lm_head.weight
        self.device = self.head.device
        c = self.config
        shape = (c.num_hidden_layers, cache_tokens, c.num_key_value_heads, c.head_dim)
        self.keys = torch.zeros(shape, dtype=self.head.dtype, device=self.device)
        self.values = torch.zeros_like(self.keys)
        self.cache_tokens = cache_tokens
        self.attend: Callable = attend_matmul
        self.graphs: dict[tuple[int, int, int], tuple[torch.cuda.CUDAGraph, Batch]] = {}

    def rows_of(self, capacity: int) -> int:
        return self.cache_tokens // capacity

    def _views(self, layer: int, rows: int, capacity: int) -> tuple[Tensor, Tensor]:
        n = rows * capacity
        shape = (rows, capacity, self.config.num_key_value_heads, self.config.head_dim)
        return self.keys[layer, :n].view(shape), self.values[layer, :n].view(shape)

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
    def _prefill(self, prompts: Sequence[np.ndarray], rows: int, capacity: int, chunk: int = 256) -> Tensor:
        """Fill the cache with `prompts`; logits [B, V] after each."""
        last = []
        for start in range(0, len(prompts), chunk):
            part = prompts[start : start + chunk]
            T = max(len(p) for p in part)
            ids = torch.zeros(len(part), T, dtype=torch.int64)
            for i, p in enumerate(part):
                ids[i, : len(p)] = torch.from_numpy(p.astype(np.int64))
            ends = torch.tensor([len(p) - 1 for p in part], device=self.device)
            hidden = self.model.embed_tokens(ids.to(self.device))
            position_ids = torch.arange(T, device=self.device)[None]
            for layer in range(self.config.num_hidden_layers):
                keys, values = self._views(layer, rows, capacity)

                def attend(q: Tensor, k: Tensor, v: Tensor, keys: Tensor = keys, values: Tensor = values) -> Tensor:
                    keys[start : start + len(part), :T] = k
                    values[start : start + len(part), :T] = v
                    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
                    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

                hidden = self._block(layer, hidden, position_ids, attend)
            hidden = self.model.norm(hidden[torch.arange(len(part), device=self.device), ends])
            last.append(F.linear(hidden, self.head))
        return torch.cat(last)

    def _sample(self, logits: Tensor, temperature: Tensor) -> Tensor:
        logits = logits.float()
        greedy = logits.argmax(-1)
        probs = (logits / temperature.clamp_min(1e-2)[:, None]).softmax(-1)
        drawn = (probs / torch.empty_like(probs).exponential_()).argmax(-1)
        return torch.where(temperature > 0, drawn, greedy)

    def _commit(self, batch: Batch, new: Tensor) -> None:
        eos = self.config.eos_token_id
        new = torch.where(batch.done, eos, new)
        batch.answers.scatter_(1, batch.step.expand(len(new), 1), new[:, None])
        batch.tokens.copy_(new)
        batch.done |= new == eos
        batch.step += 1

    @torch.no_grad()
    def _decode_step(self, batch: Batch, rows: int, capacity: int) -> None:
        hidden = self.model.embed_tokens(batch.tokens)[:, None]  # [B, 1, H]
        position_ids = batch.lengths[:, None]
        where = torch.arange(rows, device=self.device)
        for layer in range(self.config.num_hidden_layers):
            keys, values = self._views(layer, rows, capacity)

            def attend(q: Tensor, k: Tensor, v: Tensor, keys: Tensor = keys, values: Tensor = values) -> Tensor:
                keys.index_put_((where, batch.lengths), k[:, 0])
                values.index_put_((where, batch.lengths), v[:, 0])
                return self.attend(q[:, 0], keys, values, batch.lengths + 1)

            hidden = self._block(layer, hidden, position_ids, attend)
        logits = F.linear(self.model.norm(hidden[:, 0]), self.head)
        batch.lengths += 1
        self._commit(batch, self._sample(logits, batch.temperature))

    def _graph(self, rows: int, capacity: int, max_new_tokens: int) -> tuple[torch.cuda.CUDAGraph, Batch]:
        key = (rows, capacity, max_new_tokens)
        if key not in self.graphs:
            dev = self.device
            batch = Batch(
                tokens=torch.zeros(rows, dtype=torch.int64, device=dev),
                lengths=torch.ones(rows, dtype=torch.int64, device=dev),
                temperature=torch.zeros(rows, device=dev),
                done=torch.zeros(rows, dtype=torch.bool, device=dev),
                answers=torch.zeros(rows, max_new_tokens, dtype=torch.int64, device=dev),
                step=torch.zeros(1, dtype=torch.int64, device=dev),
            )
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self._decode_step(batch, rows, capacity)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._decode_step(batch, rows, capacity)
            self.graphs[key] = (graph, batch)
        return self.graphs[key]

    @torch.no_grad()
    def answer(
        self, prompts: Sequence[np.ndarray], temperatures: np.ndarray, max_new_tokens: int, desc: str = "answers"
    ) -> list[np.ndarray]:
        """Answer each prompt, end-of-turn token included where it came; uint16 ids, in the order given."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        answers: list[np.ndarray] = [np.empty(0, np.uint16)] * len(prompts)
        eos, at, tokens, began = self.config.eos_token_id, 0, 0, time.time()
        progress = tqdm(total=len(order), desc=desc)
        while at < len(order):
            rows, capacity = self._fit(prompts, order, at, max_new_tokens)
            part = order[at : at + rows]
            graph, batch = self._graph(rows, capacity, max_new_tokens)
            padded = [prompts[i] for i in part] + [prompts[part[0]]] * (rows - len(part))
            logits = self._prefill(padded, rows, capacity)
            temps = np.concatenate([temperatures[part], np.zeros(rows - len(part))])
            batch.temperature.copy_(torch.from_numpy(temps).float())
            batch.lengths.copy_(torch.tensor([len(p) for p in padded]))
            batch.step.zero_()
            batch.done.zero_()
            self._commit(batch, self._sample(logits, batch.temperature))
            for step in range(1, max_new_tokens):
                graph.replay()
                if step % 32 == 0 and bool(batch.done.all()):
                    break
            out = batch.answers.cpu().numpy()[: len(part), : int(batch.step)]
            for i, row in zip(part, out):
                end = np.flatnonzero(row == eos)
                answers[i] = row[: end[0] + 1 if len(end) else len(row)].astype(np.uint16)
                tokens += len(answers[i])
            at += len(part)
            progress.update(len(part))
            progress.set_postfix_str(f"{tokens / (time.time() - began):,.0f} tokens/s")
        return answers

    def _fit(self, prompts: Sequence, order: list[int], at: int, max_new_tokens: int) -> tuple[int, int]:
        """Rows and capacity of the next batch: as many of the next shortest prompts as the cache holds."""
        longest = len(prompts[order[at]])
        while True:
            capacity = -(-(longest + max_new_tokens) // BUCKET) * BUCKET
            rows = self.rows_of(capacity)
            last = min(at + rows, len(order)) - 1
            if len(prompts[order[last]]) + max_new_tokens <= capacity:
                return rows, capacity
            longest = len(prompts[order[last]])


def pick_attention(answerer: Answerer) -> None:
    """Take the faster of the two attentions where they agree; print both."""
    rows, capacity = answerer.rows_of(512), 512
    q = torch.randn(
        rows, answerer.config.num_attention_heads, answerer.config.head_dim, device=answerer.device, dtype=torch.bfloat16
    )
    keys, values = answerer._views(0, rows, capacity)
    keys.normal_()
    values.normal_()
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
