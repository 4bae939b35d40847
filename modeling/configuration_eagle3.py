"""Configuration of an EAGLE-3, EAGLE-3.1 or P-EAGLE drafter.

Copied into every published drafter and run from there with `trust_remote_code=True`: it imports nothing but
Transformers, huggingface_hub and its siblings.
"""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .fields_eagle3 import FIELD_NAMES, Eagle3Fields
from .strict_eagle3 import StrictConfig


@strict
class Eagle3DrafterConfig(StrictConfig, Eagle3Fields, PreTrainedConfig):
    r"""Sizes and switches of an EAGLE-3 drafter (arXiv:2503.01840) or an EAGLE-3.1 drafter (arXiv:2605.09992).

    Every size must be given: a drafter that guesses one loads without an error and accepts nothing. Keys that are
    neither listed here nor the host's own bookkeeping are refused, since an ignored key may change the arithmetic.

    Args:
        hidden_size (`int`): H, the drafter's width.
        intermediate_size (`int`): Width of the gated MLP.
        num_hidden_layers (`int`): Decoder layers of the drafter. The first takes 2H inputs, the others H.
        num_attention_heads (`int`): Query heads.
        num_key_value_heads (`int`): Key and value heads; divides `num_attention_heads`.
        head_dim (`int`): Width of one head, not necessarily H / heads.
        vocab_size (`int`): V, rows of the *target's* vocabulary.
        draft_vocab_size (`int`): V_d, the tokens the drafter can propose; at most V.
        target_hidden_size (`int`, *optional*): Width of the target's states. Default: H.
        num_aux_hidden_states (`int`): A, how many of the target's states `fc` reads.
        aux_layer_ids (`list[int]`, *optional*): The boundaries they are taken at, ascending: boundary i is the input
            of target layer i, boundary n (after all n layers) is before the final norm. Null means
            (2, n // 2, n - 3), resolved when the drafter is bound to a target.
        aux_layer_ids_from_outputs (`bool`): `aux_layer_ids` were published as layer outputs and have had one added. If
            that leads one past a target's last boundary, they were boundaries after all, and are read so.
        norm_last_state (`bool`): Boundary n is read after the target's final norm instead of before it.
        use_aux_hidden_state (`bool`): False: no `fc`; the drafter reads the target's final, normed state instead.
        fc_norm (`bool`): One norm per captured state, before `fc` (EAGLE-3.1).
        norm_before_fc (`bool`): One norm over the concatenation, before `fc`.
        norm_before_residual (`bool`): The first layer's residual is the normed hidden state.
        norm_output (`bool`): Feed the normed output to the next draft step (EAGLE-3.1) instead of the un-normed one.
        qk_norm (`bool`): Norms over each query and key head.
        mask_token_id (`int`, *optional*): Makes it a P-EAGLE drafter: all draft tokens come from one forward, in which
            every position behind the last real one reads this token and the learned state `mask_hidden`.
        kv_lora_rank (`int`, *optional*): Width of the keys' and values' latent. Given, the layers have multi-head latent
            attention (MLA) instead of Llama's; `head_dim` then is the width of a head's rotated part,
            `qk_nope_head_dim` that of its other part, `v_head_dim` that of its values, and `num_key_value_heads` equals
            `num_attention_heads`.
        q_lora_rank (`int`, *optional*): With MLA, width of the queries' latent. Null: queries are projected directly.
        attention_bias, mlp_bias, fc_bias (`bool`): Biases of the attention projections, the MLP and `fc`.
        has_own_embeddings (`bool`): False: token embeddings are borrowed from the target by `bind`.
        share_lm_head (`bool`): True: the head is borrowed from the target, and V_d = V.
        sliding_window (`int`, *optional*): Position p sees keys j > p - sliding_window.
        rope_parameters (`dict`, *optional*): The host's rotary parameters; any kind it knows.
        max_position_embeddings (`int`): Positions seen in training. Longer prompts work.
        target_model_type (`str`, *optional*): `model_type` of the target, for the record.
        target_name_or_path (`str`, *optional*): Where the target is, for the record and the model card.
    """

    model_type = Eagle3Fields.model_type
    field_names = FIELD_NAMES
