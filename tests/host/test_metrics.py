"""A page of how requests go, in the format that Prometheus reads."""

import math
import re

from hf_eagle3.host.desk import Stats
from hf_eagle3.host.metrics import make_page

STATS = Stats(
    running=3,
    waiting=1,
    finished=40,
    failed=2,
    tokens=12345678,
    tokens_per_second=250.5,
    time_to_first_token=0.25,
    time_to_first_token_p95=1.5,
    time_per_token=None,
    acceptance_length=2.5,
    rounds={"chain of 3": 70, "no draft": 2},
    graphs="replayed",
)
SAMPLE = re.compile(r'hf_eagle3_[a-z_]+(\{[a-z_]+="(\\.|[^"\\])*"(,[a-z_]+="(\\.|[^"\\])*")*\})? [0-9.e+-]+')


def test_each_line_is_a_comment_or_a_number():
    for line in make_page(STATS, 'a "folder"\\x@main').splitlines():
        assert line.startswith(("# HELP hf_eagle3_", "# TYPE hf_eagle3_")) or SAMPLE.fullmatch(line), line


def test_numbers_are_those_of_the_manager():
    page = make_page(STATS)
    for line in (
        "hf_eagle3_requests_running 3",
        'hf_eagle3_requests_total{outcome="failed"} 2',
        "hf_eagle3_generated_tokens_total 12345678",
        'hf_eagle3_rounds_total{shape="chain of 3"} 70',
        'hf_eagle3_time_to_first_token_seconds{quantile="0.95"} 1.5',
        "hf_eagle3_acceptance_length 2.5",
    ):
        assert f"\n{line}\n" in page


def test_what_is_not_known_has_no_number():
    page = make_page(STATS._replace(acceptance_length=math.nan))
    assert "\nhf_eagle3_acceptance_length " not in page
    assert "nan" not in page
    assert "None" not in page


def test_without_a_manager_the_page_says_so():
    assert make_page(None).splitlines()[-1] == "hf_eagle3_manager_running 0"
