"""`hf-eagle3 bench --open-loop`: requests that come and go, and what is told of them."""

import json
from types import SimpleNamespace

import pytest
from helpers.marks import slow_but

from hf_eagle3 import cli
from hf_eagle3.bench.names import DRAFTED
from hf_eagle3.bench.open_loop import Answer, draw_arrivals, find_percentiles, summarise
from hf_eagle3.speculation.stats import Speculation

pytestmark = pytest.mark.any_release

OPEN = ["bench", "--shape", "tiny", "--prompt-length", "9", "--dtype", "float32", "--device", "cpu", "--open-loop"]
OPEN += ["--simulate-acceptance-length", "2", "--requests", "6", "--max-new-tokens", "12"]


@pytest.mark.parametrize(
    "engines", slow_but([2], [2, 3]), ids=["ours", "the host's, too"]
)  # whose start takes a minute
def test_engines_are_measured_at_each_rate_and_number_of_places(engines, tmp_path, capsys):
    out = tmp_path / "queue"
    more = ["--batch-sizes", "2", "3", "--request-rates", "500", "--mean-new-tokens", "6", "--out", str(out)]
    assert cli.main([*OPEN, *more, "--kinds", *["stock", "plain", "drafted"][-engines:]]) == 0
    results = json.loads((tmp_path / "queue.json").read_text())["results"]
    kinds = ["the host's engine", "ours, no drafting", "ours, drafting"][-engines:]
    assert [(r["kind"], r["places"]) for r in results] == [(kind, n) for n in (2, 3) for kind in kinds]
    assert {r["tokens"] for r in results} == {results[0]["tokens"]}  # the same requests, without an end of their own
    for result in results:
        assert (result["requests"], result["failed"], result["rate"]) == (6, 0, 500.0)
        assert 0 < result["to_first_token"]["p50"] <= result["to_first_token"]["p95"] <= result["seconds"]
        assert (result["acceptance_length"] is not None) == (result["kind"] == kinds[-1])
    shown = capsys.readouterr().out
    assert all(kind in shown for kind in kinds)
    assert "first token p50" in (tmp_path / "queue.md").read_text()


def test_requests_are_the_same_each_time():
    args = SimpleNamespace(requests=200, max_new_tokens=1000, mean_new_tokens=100.0)
    first, second = (draw_arrivals([[1], [2]], args, 4.0) for _ in range(2))
    assert first == second
    assert 35 < first[-1].seconds < 70  # 200 at 4 a second
    assert 80 < sum(arrival.max_new for arrival in first) / 200 < 120
    assert [arrival.prompt for arrival in first[:3]] == [[1], [2], [1]]
    at_once = draw_arrivals([[1]], SimpleNamespace(requests=3, max_new_tokens=7, mean_new_tokens=None), None)
    assert {(arrival.seconds, arrival.max_new) for arrival in at_once} == {(0.0, 7)}


def test_times_count_from_when_a_request_came():
    told = Speculation("own decode loop", "", 3)
    told.count(3, 2)
    answers = [
        Answer(10.0, [12.0, 12.5, 13.0], None, told),
        Answer(11.0, [15.0], None, None),
        Answer(11.0, [], "no room", None),
    ]
    served = summarise(answers, DRAFTED, 4, None, 8.0)
    assert (served.tokens, served.failed, served.tokens_per_second) == (4, 1, 0.5)
    assert (served.to_first_token["p50"], served.to_first_token["p95"]) == (2.0, 4.0)
    assert served.per_token["p50"] == 0.5
    assert served.acceptance_length == 3
    assert find_percentiles([]) == {}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--draft-shapes", "2"], "--open-loop compares stock, plain, drafted"),
        (["--kinds", "lookup"], "--open-loop compares"),
        (["--dp-size", "2"], "--open-loop does not go with --dp-size"),
        (["--request-rates", "1", "0"], "--request-rates must be above 0; got 0.0"),
        (["--mean-new-tokens", "nan"], "--mean-new-tokens must be above 0; got nan"),
    ],
)
def test_what_it_cannot_measure_is_said(words, said, capsys):
    assert cli.main([*OPEN, *words]) == 2
    assert said in capsys.readouterr().err


def test_its_options_need_it(capsys):
    words = [word for word in OPEN if word != "--open-loop"]
    assert cli.main([*words, "--request-rates", "3"]) == 2
    assert "give --open-loop, too" in capsys.readouterr().err
