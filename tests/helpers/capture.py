"""A stand-in for CUDA graphs, so that rounds can be captured on a CPU."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_eagle3 import release_graphs
from hf_eagle3.decoding.captured import CudaGraphs
from hf_eagle3.decoding.lock import why_busy
from hf_eagle3.decoding.phases import Phases
from hf_eagle3.host import generate
from hf_eagle3.kernels import fusion
from hf_eagle3.recorder import StateRecorder
from hf_eagle3.rows.recurrent import running_by_rows


@dataclass
class Counts:
    """What happened."""

    captured: int = 0
    replayed: int = 0
    is_replaying: bool = False


def move(new, old):
    """Copy the tensors of a phase's results to where those of its recording are."""
    if isinstance(old, Tensor):
        assert new.shape == old.shape
        with torch.inference_mode():  # a graph does not ask under which mode it was captured
            old.copy_(new)
    elif isinstance(old, tuple):
        for a, b in zip(new, old, strict=True):
            move(a, b)


@dataclass(frozen=True)
class GraphsOnCpus(CudaGraphs):
    """Captures by running a phase, and replays by running it again: attending by rows, into the same memory."""

    counts: Counts = field(default_factory=Counts)
    around: Callable | None = None  # captures in the place of `capture`, which it is given first

    def why_not(self, target, drafter):
        return why_busy(target)

    def warm_up(self, function, device):
        random_state = torch.get_rng_state()
        function()
        torch.set_rng_state(random_state)

    def capture(self, function, *args, pool):
        if self.around is None:
            return self.capture_here(function, *args, pool=pool)
        return self.around(self.capture_here, function, *args, pool=pool)

    def capture_here(self, function, *args, pool):
        self.counts.captured += 1
        phases: Phases = function.__self__
        random_state = torch.get_rng_state()
        results = function(*args)
        torch.set_rng_state(random_state)  # a capture draws nothing

        def replay():
            self.counts.replayed += 1
            models = phases.models
            with (
                running_by_rows(*models.present),
                StateRecorder(models.target, models.recorder.aux_layer_ids) as recorder,
            ):
                phases.models = models._replace(recorder=recorder)  # that of the recording is closed by now
                self.counts.is_replaying = True
                move(function(*args), results)
                self.counts.is_replaying = False

        return replay, results


def capture_on_cpus(monkeypatch, **options):
    """Let rounds be captured on a CPU, and count it. `options` are those of `GraphsOnCpus`."""
    release_graphs()  # what other tests have captured
    graphs = GraphsOnCpus(**options)
    monkeypatch.setattr(generate, "CAPTURER", graphs)
    return graphs.counts


class PhasesOnGpus(CudaGraphs):
    """Captures nothing: replays by running the same phases on the GPU, kernels and all."""

    def capture(self, function, *args, pool):
        phases = function.__self__
        models = phases.models
        random_state = torch.cuda.get_rng_state()
        results = function(*args)
        torch.cuda.set_rng_state(random_state)

        def replay():
            with (
                running_by_rows(*models.present),
                fusion.fused(*models.present),
                StateRecorder(models.target, models.recorder.aux_layer_ids) as recorder,
            ):
                phases.models = models._replace(recorder=recorder)
                move(function(*args), results)

        return replay, results
