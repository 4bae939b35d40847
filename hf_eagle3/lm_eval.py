"""The model `hf-eagle3` of lm-evaluation-harness: its `hf` with a drafter, whose requests join running rounds.

    python -m hf_eagle3.lm_eval run --model hf-eagle3 --model_args pretrained=TARGET,drafter=DRAFTER --tasks gsm8k

The harness finds models where it is told of them: its own command line does not know this one, and a script does after
`import hf_eagle3.lm_eval`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from torch import Tensor
from transformers import AutoModel, ContinuousBatchingConfig, PreTrainedTokenizerBase, StoppingCriteria

from .host.attaching import attach
from .host.batching import why_not_open
from .host.refusals import refuse_other_models

LOOKS_BACK = 2  # tokens further than a stop string has, since it may be written in others


class Until(StoppingCriteria):
    """Ends a text whose new part holds one of some strings.

    Args:
        tokenizer: The target's.
        strings: Those.
        prompt_length: Tokens before the new part.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str], prompt_length: int):
        self.tokenizer, self.strings, self.prompt_length = tokenizer, strings, prompt_length
        lengths = [len(tokenizer.encode(string, add_special_tokens=False)) for string in strings]
        self.num_tokens = max(lengths, default=0) + LOOKS_BACK

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # noqa: ARG002  as the host has it
        """[B] bool."""
        new = input_ids[:, self.prompt_length :][:, -self.num_tokens :]
        texts = self.tokenizer.batch_decode(new)
        found = [any(string in text for string in self.strings) for text in texts]
        return torch.tensor(found, dtype=torch.bool, device=input_ids.device)


@register_model("hf-eagle3")
class DraftingLM(HFLM):
    """The harness' own model of Transformers, with a drafter attached: the same answers, sooner.

    Args:
        pretrained: As of `hf`.
        drafter: Folder or repository of the drafter.
        num_draft_tokens: Tokens of a draft; chosen by cost unless given.
        others: As of `hf`.
    """

    def __init__(self, pretrained: Any, drafter: str, num_draft_tokens: int | None = None, **others: Any):
        super().__init__(pretrained, **others)
        target = self.model
        model = AutoModel.from_pretrained(drafter, dtype=target.dtype)
        refuse_other_models(model, drafter)
        settings = {} if num_draft_tokens is None else {"num_assistant_tokens": num_draft_tokens}
        attach(target, model.to(target.device), **settings)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:  # as the harness has it
        """The texts that follow the contexts of `requests`, each up to one of its stop strings."""
        if self.backend != "causal" or self.batch_size == "auto" or why_not_open(self.model) is not None:
            return super().generate_until(requests, disable_tqdm)
        asked = [self._ask(*request.args) for request in requests]
        prompts, settings, _ = zip(*asked, strict=True) if asked else ((), (), ())
        with torch.autocast(
            self.device.type, dtype=self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None
        ):
            outputs = self.model.generate_batch(
                list(prompts),
                continuous_batching_config=ContinuousBatchingConfig(max_requests_per_batch=int(self.batch_size)),
                request_kwargs=list(settings),
                progress_bar=not disable_tqdm and self.rank == 0,
            )
        texts = []
        for request, (_, _, until), output in zip(requests, asked, outputs.values(), strict=True):
            if output.error is not None:
                raise RuntimeError(f"{output.request_id} could not be decoded: {output.error}")
            texts.append(self._read(output.generated_tokens, until))
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts

    def _ask(self, context: str, gen_kwargs: dict[str, Any]) -> tuple[list[int], dict[str, Any], list[str]]:
        """The prompt of a request, its settings and its stop strings, as `hf` reads them.

        Raises:
            ValueError: The target has no room for a prompt beside so many new tokens.
        """
        settings = normalize_gen_kwargs(gen_kwargs, self.max_gen_toks)
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        until = handle_stop_sequences(settings.pop("until", None), eos=eos)
        most = settings.pop("max_gen_toks")
        if (room := self.max_length - most) <= 0:
            raise ValueError(
                f"max_gen_toks is {most}, and the target's texts have up to {self.max_length} tokens: leave room for a prompt."
            )
        ids, _ = self.tok_batch_encode([context], left_truncate_len=room, truncation=self.truncation)
        prompt = ids[0].tolist()
        if settings.setdefault("temperature", 0.0) == 0.0 and not settings.get("do_sample"):
            settings["do_sample"] = False
            del settings["temperature"]
        settings |= {"max_new_tokens": settings.pop("max_length", len(prompt) + most) - len(prompt)}
        return prompt, {**settings, "stopping_criteria": [Until(self.tokenizer, until, len(prompt))]}, until

    def _read(self, tokens: list[int], until: list[str]) -> str:
        """The text of an answer."""
        end = self.think_end_token
        if isinstance(end, int) and end in tokens:
            tokens = tokens[len(tokens) - tokens[::-1].index(end) :]
        text = self.tok_decode(tokens)
        text = text.lstrip() if isinstance(end, int) else text
        return postprocess_generated_text(
            generation=text, stop=until, think_end_token=end if isinstance(end, str) else None
        )


if __name__ == "__main__":
    cli_evaluate()
