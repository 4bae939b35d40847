"""Copies of a drafter, and pickles: nothing of the target goes with them."""

import copy
import io
import pickle

import pytest
import torch
from helpers.models import H, V, make_drafter, make_prompt

from hf_eagle3 import Eagle3DrafterModel

pytestmark = pytest.mark.any_release

COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda drafter: pickle.loads(pickle.dumps(drafter)),
    "torch.save": lambda drafter: torch.load(io.BytesIO(saved(drafter)), weights_only=False),
}


def saved(drafter) -> bytes:
    buffer = io.BytesIO()
    torch.save(drafter, buffer)
    return buffer.getvalue()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("when", ["bound", "used"])
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_holds_nothing_of_the_target_and_borrows_again(target, way, when):
    borrows_all = {"share_lm_head": True, "draft_vocab_size": V}
    drafter = make_drafter(target, **borrows_all)
    options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    before = target.generate(make_prompt(6), assistant_model=drafter, **options)
    if when == "bound":
        drafter = make_drafter(target, **borrows_all)
    copied = COPIES[way](drafter)
    theirs = {p.data_ptr() for p in target.parameters()}
    assert not vars(copied)["_borrowed"]
    assert not any(t.data_ptr() in theirs for t in copied.state_dict().values())
    with pytest.raises(ValueError, match=r"bound to none yet"):
        copied.embed(make_prompt(3))
    other = copy.deepcopy(target)
    out = other.generate(make_prompt(6), assistant_model=copied, **options)
    assert out.sequences.tolist() == before.sequences.tolist()
    assert out.speculation.rounds_accepting == before.speculation.rounds_accepting
    assert copied._weight("embed_tokens").data_ptr() == other.get_input_embeddings().weight.data_ptr()
    assert drafter.embed(make_prompt(3)).shape == (1, 3, H)  # the original is bound as before


def test_a_pickle_is_as_large_as_the_drafter_alone(target):
    bound = make_drafter(target)
    alone = Eagle3DrafterModel(bound.config).eval()
    assert len(pickle.dumps(bound)) < 1.02 * len(pickle.dumps(alone))


def test_target_and_drafter_are_copied_together(target):
    pair = copy.deepcopy((target, make_drafter(target)))
    options = {"max_new_tokens": 8, "do_sample": False}
    out = pair[0].generate(make_prompt(6), assistant_model=pair[1], **options)
    assert out.tolist() == target.generate(make_prompt(6), **options).tolist()
