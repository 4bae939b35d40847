"""A stand-in for CUDA graphs, so that rounds can be captured on a CPU."""

import torch
from torch import Tensor

import hf_eagle3.host.own_loop as own_loop
from hf_eagle3.decoding import captured as graphs
from hf_eagle3.recorder import StateRecorder

ATTEND_BY_ROWS = graphs.attending_by_rows


class Counts:
    """What happened."""

    captured = replayed = 0


def move(new, old):
    """Copy the tensors of a phase's results to where those of its recording are."""
    if isinstance(old, Tensor):
        assert new.shape == old.shape
        with torch.inference_mode():  # a graph does not ask under which mode it was captured
            old.copy_(new)
    elif isinstance(old, tuple):
        for a, b in zip(new, old, strict=True):
            move(a, b)


def capture_on_cpus(monkeypatch):
    """Let rounds be captured on a CPU, and count it."""
    counts = Counts()

    def capture(function, *args, pool):
        counts.captured += 1
        phases = function.__self__
        target, drafter = phases.target, phases.drafter
        random_state = torch.get_rng_state()
        results = function(*args)
        torch.set_rng_state(random_state)  # a capture draws nothing

        def replay():
            counts.replayed += 1
            with (
                ATTEND_BY_ROWS(target),
                ATTEND_BY_ROWS(drafter),
                StateRecorder(target, drafter.bound_aux_layer_ids) as recorder,
            ):
                # The recording lets go of the models; a graph has no need of them.
                phases.target, phases.drafter, phases.recorder = target, drafter, recorder
                move(function(*args), results)
            phases.target = phases.drafter = phases.recorder = None

        return replay, results

    def warm_up(function, device):
        random_state = torch.get_rng_state()
        function()
        torch.set_rng_state(random_state)

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(graphs, "warm_up", warm_up)
    monkeypatch.setattr(own_loop, "why_not_captured", lambda *_: None)
    return counts
