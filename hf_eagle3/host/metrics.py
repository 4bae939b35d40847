"""How a manager's requests go, as a page that Prometheus reads (its text format, version 0.0.4)."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from .desk import Stats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "hf_eagle3_"


class Metric(NamedTuple):
    """One name of the page."""

    name: str
    kind: str  # gauge or counter
    help: str
    values: list[tuple[dict[str, str], float]]  # by labels


def list_metrics(stats: Stats) -> list[Metric]:
    """What the page says of a manager."""
    outcomes = {"finished": stats.finished, "failed": stats.failed}
    firsts = {"0.5": stats.time_to_first_token, "0.95": stats.time_to_first_token_p95}
    length = None if stats.acceptance_length != stats.acceptance_length else stats.acceptance_length
    return [
        Metric("requests_running", "gauge", "Requests in rounds now.", alone(stats.running)),
        Metric("requests_waiting", "gauge", "Requests that wait for a place.", alone(stats.waiting)),
        Metric("requests_total", "counter", "Requests that have ended.", by("outcome", outcomes)),
        Metric("generated_tokens_total", "counter", "New tokens of all requests.", alone(stats.tokens)),
        Metric("tokens_per_second", "gauge", "New tokens a second of work.", alone(stats.tokens_per_second)),
        Metric("rounds_total", "counter", "Rounds by what they proposed.", by("shape", stats.rounds)),
        Metric("acceptance_length", "gauge", "Tokens gained per round of a row.", alone(length)),
        Metric("time_to_first_token_seconds", "gauge", "Of the newest requests.", by("quantile", firsts)),
        Metric(
            "time_per_token_seconds",
            "gauge",
            "Behind the first, of the newest requests.",
            by("quantile", {"0.5": stats.time_per_token}),
        ),
    ]


def alone(value: float | None) -> list[tuple[dict[str, str], float]]:
    """One value without labels; none if it is not known."""
    return [] if value is None else [({}, value)]


def by(label: str, values: dict[str, int] | dict[str, float | None]) -> list[tuple[dict[str, str], float]]:
    """Those values that are known, by a label."""
    return [({label: name}, value) for name, value in values.items() if value is not None]


def make_page(stats: Stats | None, model: str = "") -> str:
    """The page; `stats` are None while nothing was asked of a manager."""
    running = Metric("manager_running", "gauge", "Whether requests share rounds.", alone(0 if stats is None else 1))
    metrics = [running, *([] if stats is None else list_metrics(stats))]
    return "".join(f"{line}\n" for metric in metrics for line in make_lines(metric, {"model": model} if model else {}))


def make_lines(metric: Metric, labels: dict[str, str]) -> Iterator[str]:
    """The lines of one name."""
    name = f"{PREFIX}{metric.name}"
    yield f"# HELP {name} {metric.help}"
    yield f"# TYPE {name} {metric.kind}"
    for own, value in metric.values:
        yield f"{name}{show_labels({**labels, **own}.items())} {value:.10g}"


def show_labels(labels: Iterable[tuple[str, str]]) -> str:
    """Labels as they are written."""
    escapes = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})
    shown = ",".join(f'{name}="{value.translate(escapes)}"' for name, value in labels)
    return f"{{{shown}}}" if shown else ""
