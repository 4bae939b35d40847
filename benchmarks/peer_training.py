"""A peer's training step, for `bench_training.py --peer`: SpecForge, from its own package, with its online defaults.

    pip install --no-deps specforge==0.2.0

Its model, loss, attention (flex attention, compiled) and teacher (all logits of the target) are its own; bf16 weights and
a fused AdamW without float32 masters, which is less than its own optimizer does; the target is the host's, by sdpa.
"""

import torch
from torch import Tensor, nn


class Peer:
    """Frozen target and SpecForge's drafter, trained on batches of equally long documents.

    Args:
        target: A Llama of the host's.
        kept: [V_d] int64, sorted, the draft vocabulary.
        steps: TTT steps.
    """

    def __init__(self, target: nn.Module, kept: Tensor, steps: int):
        from specforge.algorithms.eagle3.model import OnlineEagle3Model
        from specforge.modeling.draft.llama3_eagle import LlamaForCausalLMEagle3
        from specforge.utils import padding

        self.target, self.shift = target, padding
        config = type(target.config)(**target.config.to_dict())
        config.draft_vocab_size, config.num_hidden_layers, config.target_hidden_size = len(kept), 1, config.hidden_size
        device = next(target.parameters()).device
        backend = "flex_attention" if device.type == "cuda" else "sdpa"
        drafter = LlamaForCausalLMEagle3(config, attention_backend=backend).to(device, torch.bfloat16).train()
        drafter.freeze_embedding()
        with torch.no_grad():
            drafter.d2t.copy_(kept.to(device) - torch.arange(len(kept), device=device))
            drafter.t2d.zero_()[kept.to(device)] = True
        self.parameters = [p for p in drafter.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=device.type == "cuda"
        )
        self.drafter, self.model = drafter, OnlineEagle3Model(drafter, length=steps, attention_backend=backend)

    def states(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states [B, S, 3H] and logits [B, S, V] of documents [B, S]."""
        L, seen = self.target.config.num_hidden_layers, []

        def keep(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            seen.append(args[0] if args else kwargs["hidden_states"])

        layers = [self.target.model.layers[i] for i in (2, L // 2, L - 3)]
        hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
        try:
            with torch.no_grad():
                logits = self.target(input_ids, use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat(seen, dim=-1), logits

    def learn(self, input_ids: Tensor, loss_mask: Tensor, hidden_states: Tensor, logits: Tensor) -> None:
        """One update."""
        losses, *_ = self.model(
            input_ids=self.shift(input_ids, left=False),
            attention_mask=torch.ones_like(input_ids),
            loss_mask=loss_mask[..., None],
            target=self.shift(logits, left=False),
            hidden_states=hidden_states,
        )
        sum(0.8**t * loss for t, loss in enumerate(losses)).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 0.5)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def num_bytes(self) -> int:
        """What stays on the device between steps, without the target."""
        moments = [x for state in self.optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
        tensors = [*self.drafter.parameters(), *self.drafter.buffers(), *moments]
        return sum(x.nbytes for x in tensors if x.device.type != "cpu")
