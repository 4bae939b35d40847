"""Criteria and processors that look at the whole batch, or keep state: asked as plain decoding asks, no more, no less."""

import copy

import pytest
import torch
from helpers.batches import assert_same_caches, make_oracle, pad, prompts_of
from helpers.capture import capture_on_cpus
from helpers.marks import slow_but
from helpers.models import make_drafter, make_target
from helpers.tokenizers import word_tokenizer
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from hf_eagle3 import release_graphs
from hf_eagle3.compat import CACHE_NAME
from hf_eagle3.host.loop_choice import ASKED

GREEDY = {"do_sample": False}
T = 9  # columns of the prompts below
LENGTHS = (9, 4, 7)
ALL = list(range(3, 64))


class Noting:
    """Notes what it is called with."""

    def __init__(self):
        self.calls = []

    def note(self, input_ids, scores):
        last = scores[-1] if isinstance(scores, tuple) else scores
        num_scores = len(scores) if isinstance(scores, tuple) else None
        self.calls.append((input_ids.tolist(), num_scores, None if last is None else last.clone()))


class Criterion(Noting, StoppingCriteria):
    """Notes its calls and answers by `decide`."""

    def __call__(self, input_ids, scores, **kwargs):
        self.note(input_ids, scores)
        return self.decide(input_ids[:, T:])

    def decide(self, new: Tensor):
        raise NotImplementedError


class RemembersRows(Criterion):
    """As lm-eval's `MultiTokenEOSCriteria`: one flag a row, one answer for all."""

    def __init__(self):
        super().__init__()
        self.is_done, self.tokenizer = [False for _ in LENGTHS], word_tokenizer()

    def decide(self, new):
        texts = self.tokenizer.batch_decode(new[:, -3:])
        for row, done in enumerate(self.is_done):
            if not done:
                self.is_done[row] = "w1" in texts[row]
        return False not in self.is_done


class AllRows(Criterion):
    def decide(self, new):
        return all(any(token in range(10, 22) for token in row) for row in new.tolist())


class FirstRow(Criterion):
    def decide(self, new):
        return int(new[0, -1]) in range(10, 16)


class Steps(Criterion):
    def decide(self, new):
        return len(self.calls) >= 6


class EachRow(Criterion):
    """One answer a row, by a token and by how often it was asked."""

    def decide(self, new):
        return (new[:, -1] + len(self.calls)) % 5 == 0  # [B]


class OneTensor(Criterion):
    def decide(self, new):
        return torch.tensor(int(new[-1, -1]) % 7 == 0, device=new.device)


class OneInTensor(Criterion):
    def decide(self, new):
        return torch.tensor([int(new[-1, -1]) % 7 == 0], device=new.device)


class Never(Criterion):
    def decide(self, new):
        return False


class List(Criterion):
    def decide(self, new):
        return [False] * len(new)


class Raises(Criterion):
    def decide(self, new):
        if new.shape[1] >= 4:
            raise LookupError(f"no more of {new.shape}")
        return False


CRITERIA = [RemembersRows, AllRows, FirstRow, Steps, EachRow, OneTensor, OneInTensor, Never, List, Raises]


class Columns:
    """A streamer that notes its columns, and what a criterion has been asked until then."""

    def __init__(self, criterion):
        self.criterion, self.puts = criterion, []

    def put(self, value):
        self.puts.append((len(self.criterion.calls), value.tolist()))

    def end(self):
        self.puts.append("end")


def run(target, batch, *, criterion=None, processor=None, streams=False, **options):
    """What a call gives, or how it fails, and what it called with what."""
    noting = criterion or processor
    streamer = Columns(noting) if streams else None
    options = {"max_new_tokens": 16, "return_dict_in_generate": True, "streamer": streamer, **GREEDY, **options}
    if criterion is not None:
        options["stopping_criteria"] = StoppingCriteriaList([criterion])
    if processor is not None:
        options["logits_processor"] = LogitsProcessorList([processor])
    try:
        out = target.generate(**batch, **options)
    except Exception as error:  # noqa: BLE001  compared with plain decoding's
        out = f"{type(error).__name__}: {error}"
    return out, noting.calls, streamer and streamer.puts


def assert_as_plain(target, batch, make, *, depth=4, wrong_share=0.15, **options):
    """The same text or error, the same calls with the same arguments in the same order, the same caches."""
    kind = "criterion" if issubclass(make, StoppingCriteria) else "processor"
    plain, calls, puts = run(target, batch, **{kind: make()}, **options)
    base = {k: v for k, v in options.items() if k not in ("streams", "output_scores", "output_logits", "eos_token_id")}
    if kind == "processor" and not isinstance(plain, str):
        text = plain.sequences
    else:
        text = target.generate(**batch, **{"max_new_tokens": 16, **GREEDY, **base})
    oracle = make_oracle(target, text, batch, wrong_share=wrong_share).to(target.device)
    out, our_calls, our_puts = run(
        target, batch, **{kind: make()}, **options, assistant_model=oracle, num_assistant_tokens=depth
    )
    if isinstance(plain, str):
        assert out == plain
    else:
        assert out.sequences.tolist() == plain.sequences.tolist()
        assert_same_caches(target, plain, out)
        for ours, theirs in zip(out[CACHE_NAME].layers, plain[CACHE_NAME].layers, strict=True):
            torch.testing.assert_close(ours.keys[:, :, T:], theirs.keys[:, :, T:], rtol=1e-3, atol=1e-3)
        rows = plain.sequences[:, T:].tolist()
        if options.get("eos_token_id"):  # behind the last token that is no pad there are pads
            rows = [row[: max(i + 1 for i, token in enumerate(row) if token)] for row in rows]
        assert out.speculation.num_tokens == sum(map(len, rows))
        for name in ("scores", "logits"):
            assert (out.get(name) is None) == (plain.get(name) is None)
            if plain.get(name) is not None and kind == "processor":
                torch.testing.assert_close(torch.stack(out[name]), torch.stack(plain[name]), rtol=1e-3, atol=1e-3)
    assert [call[:2] for call in our_calls] == [call[:2] for call in calls]
    for (*_, ours), (*_, theirs) in zip(our_calls, calls, strict=True):
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert our_puts == puts
    return plain, out


@pytest.mark.sampled(2)
@pytest.mark.parametrize("eos", slow_but([[5, 17, 23]], [None, [5, 17, 23]]), ids=["no_eos", "eos"])
@pytest.mark.parametrize("make", CRITERIA, ids=lambda c: c.__name__)
def test_criteria_are_asked_as_in_plain_decoding(target, make, eos):
    assert_as_plain(target, pad(prompts_of(*LENGTHS)), make, eos_token_id=eos, streams=True)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("eos", [None, [5, 17, 23]], ids=["no_eos", "eos"])
@pytest.mark.parametrize("make", [EachRow, RemembersRows, Never], ids=lambda c: c.__name__)
def test_criteria_see_the_scores_of_plain_decoding(target, make, eos):
    assert_as_plain(target, pad(prompts_of(*LENGTHS)), make, eos_token_id=eos, output_scores=True)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("scores", [{}, {"output_scores": True}], ids=["", "scores"])
@pytest.mark.parametrize("make", [FirstRow, Steps, EachRow, OneTensor, List, Raises], ids=lambda c: c.__name__)
@pytest.mark.parametrize("loop", slow_but(["own"], ASKED))
def test_one_row_is_asked_about_as_in_plain_decoding_by_every_loop(target, make, loop, scores):
    batch, options = pad(prompts_of(T)), {"eos_token_id": [5, 17, 23], "streams": True, **scores}
    plain, calls, puts = run(target, batch, criterion=make(), **options)
    assistant = {"assistant_model": make_drafter(target, draft_vocab_size=64), "decode_loop": loop}
    out, our_calls, our_puts = run(target, batch, criterion=make(), **options, **assistant)
    assert (out == plain) if isinstance(plain, str) else (out.sequences.tolist() == plain.sequences.tolist())
    assert [call[:2] for call in our_calls] == [call[:2] for call in calls]
    assert our_puts == puts


class Processor(Noting, LogitsProcessor):
    """Notes its calls and bans some likely tokens by `ban`."""

    def __call__(self, input_ids, scores):
        self.note(input_ids, scores)
        scores = scores.clone()
        for row in range(len(input_ids)):
            if self.bans(row, input_ids):
                scores[row, scores[row].argmax()] = -torch.inf
        return scores

    def bans(self, row: int, input_ids: Tensor) -> bool:
        raise NotImplementedError


class CountsInDict(Processor):
    def __init__(self):
        super().__init__()
        self.count = {}

    def bans(self, row, input_ids):
        self.count[row] = self.count.get(row, 0) + 1
        return self.count[row] % 3 == 0


class CountsInList(Processor):
    """Made for a number of rows, and insists on it."""

    def __init__(self):
        super().__init__()
        self.count = [[0] for _ in LENGTHS]

    def bans(self, row, input_ids):
        assert len(input_ids) == len(LENGTHS)
        self.count[row][0] += row + 1
        return self.count[row][0] % 4 == 0


class CountsInTensor(Processor):
    def __init__(self):
        super().__init__()
        self.count = torch.zeros(len(LENGTHS), dtype=torch.long)

    def bans(self, row, input_ids):
        self.count[row] += int(input_ids[row, -1])
        return int(self.count[row]) % 3 == 0


class CountsCalls(Processor):
    def bans(self, row, input_ids):
        return len(self.calls) % 4 == row


class LooksAtOthers(Processor):
    def bans(self, row, input_ids):
        return row > 0 and int(input_ids[0, -1]) % 2 == 0


class WritesInPlace(CountsInDict):
    def __call__(self, input_ids, scores):
        self.note(input_ids, scores)
        scores[:, len(self.calls) % 60 :] -= 3.0
        return scores


PROCESSORS = [CountsInDict, CountsInList, CountsInTensor, CountsCalls, LooksAtOthers, WritesInPlace]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("eos", slow_but([[5, 17, 23, 31, 44]], [None, [5, 17, 23, 31, 44]]), ids=["no_eos", "eos"])
@pytest.mark.parametrize("make", PROCESSORS, ids=lambda c: c.__name__)
def test_processors_are_called_as_in_plain_decoding(make, eos):
    target = make_target("mistral" if make is CountsInDict else "llama")
    asked = {"eos_token_id": eos, "output_scores": True, "output_logits": True, "repetition_penalty": 1.2}
    assert_as_plain(target, pad(prompts_of(*LENGTHS)), make, streams=True, **asked)


@pytest.mark.parametrize("eos", slow_but([[5, 17, 23, 31, 44]], [None, [5, 17, 23, 31, 44]]), ids=["no_eos", "eos"])
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("loop", ASKED)
def test_a_processor_is_called_once_for_each_token_of_the_text(target, loop, do_sample, eos):
    """In every loop: never about a draft token that was refused, nor about what lies behind an end."""
    noting = CountsCalls()
    options = {"do_sample": do_sample, "temperature": 0.6, "eos_token_id": eos, "max_new_tokens": 24}
    drafter = make_drafter(target, draft_vocab_size=64)
    prompts = prompts_of(9) if loop == "host" else prompts_of(*LENGTHS)
    out = target.generate(
        **pad(prompts),
        assistant_model=drafter,
        decode_loop=loop,
        logits_processor=LogitsProcessorList([noting]),
        **options,
    )
    assert [ids for ids, *_ in noting.calls] == [out[:, :n].tolist() for n in range(T, out.shape[1])]


@pytest.mark.parametrize("make", [RemembersRows, EachRow, CountsInDict, LooksAtOthers], ids=lambda c: c.__name__)
def test_rows_padded_on_the_right_are_as_if_padded_on_the_left(target, make):
    kind = "criterion" if issubclass(make, StoppingCriteria) else "processor"
    out, calls, _ = run(target, pad(prompts_of(*LENGTHS)), **{kind: make()})
    right = {**pad(prompts_of(*LENGTHS), "right"), "assistant_model": make_drafter(target)}
    ours, our_calls, _ = run(target, right, **{kind: make()})
    assert ours.sequences[:, T:].tolist() == out.sequences[:, T:].tolist()
    assert [call[:2] for call in our_calls] == [call[:2] for call in calls]


@pytest.mark.parametrize("make", [Steps, Never, CountsInDict, CountsCalls], ids=lambda c: c.__name__)
def test_prompts_of_embeddings_are_asked_about(target, make):
    kind = "criterion" if issubclass(make, StoppingCriteria) else "processor"
    batch = pad(prompts_of(*LENGTHS))
    batch["inputs_embeds"] = target.get_input_embeddings()(batch.pop("input_ids"))
    out, calls, _ = run(target, batch, **{kind: make()}, max_new_tokens=24)
    ours, our_calls, _ = run(
        target, {**batch, "assistant_model": make_drafter(target)}, **{kind: make()}, max_new_tokens=24
    )
    assert ours.sequences.tolist() == out.sequences.tolist()
    assert [call[:2] for call in our_calls] == [call[:2] for call in calls]


# ---- captured rounds, read late ----


@pytest.mark.sampled(2)
@pytest.mark.parametrize("lateness", slow_but([2], [0, 2]))
@pytest.mark.parametrize("eos", [None, [5, 17, 23]], ids=["no_eos", "eos"])
@pytest.mark.parametrize("make", [RemembersRows, EachRow, CountsInTensor], ids=lambda c: c.__name__)
def test_captured_rounds_that_are_read_late_ask_alike(target, make, eos, lateness, monkeypatch):
    counts = capture_on_cpus(monkeypatch, rounds_in_flight=lateness)
    _, out = assert_as_plain(target, pad(prompts_of(*LENGTHS)), make, eos_token_id=eos, streams=True)
    assert out.speculation.graphs.startswith("captured in")
    assert counts.replayed > 3
    release_graphs()


@pytest.mark.gpu
@pytest.mark.parametrize("eos", [None, [5, 17, 23]], ids=["no_eos", "eos"])
@pytest.mark.parametrize("scores", [{}, {"output_scores": True}], ids=["", "scores"])
@pytest.mark.parametrize("make", [*CRITERIA, *PROCESSORS], ids=lambda c: c.__name__)
def test_captured_rounds_on_a_gpu_ask_alike(make, scores, eos):
    target = copy.deepcopy(make_target("llama")).cuda()
    batch = {name: value.cuda() for name, value in pad(prompts_of(*LENGTHS)).items()}
    _, out = assert_as_plain(target, batch, make, eos_token_id=eos, streams=True, **scores)
    if not isinstance(out, str):
        assert out.speculation.graphs.startswith(("captured in", "replayed"))
