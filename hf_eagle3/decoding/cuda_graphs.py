"""Capturing a function as a CUDA graph, and undoing a capture that failed."""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

_one_capture = threading.Lock()  # PyTorch captures one graph at a time, and waiting for the device breaks a capture
_failed: list[torch.cuda.CUDAGraph] = []  # kept, since the allocator of pinned memory still queries them


def warm_up(function: Callable[[], None], device: torch.device) -> None:
    """Run `function` twice before its capture, so that kernels are compiled and libraries have their workspaces.

    The device's random state is put back.
    """
    random_state = torch.cuda.get_rng_state(device)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    try:
        with torch.cuda.stream(stream):
            for _ in range(2):
                function()
    finally:
        torch.cuda.current_stream(device).wait_stream(stream)
        torch.cuda.set_rng_state(random_state, device)


def capture(function: Callable, *args: Any, pool: Any) -> tuple[Callable[[], None], Any]:
    """Capture `function(*args)` on the current device; how to replay it, and the tensors that hold its results.

    A failed capture is undone.
    """
    graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    stream = stream_of_captures(before.device_index)
    with _one_capture, workspaces_apart():
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                results = function(*args)
        except BaseException:
            torch.cuda.set_stream(before)  # PyTorch leaves `stream` the current one
            clean_up_failed_capture(graph, stream, pool)
            raise
    return graph.replay, results


@functools.cache
def stream_of_captures(device_index: int) -> torch.cuda.Stream:
    """One for each device; PyTorch's own default is on the device that was current when it was first used."""
    return torch.cuda.Stream(device_index)


@contextmanager
def workspaces_apart() -> Iterator[None]:
    """Give cuBLAS new workspaces inside, and drop them afterwards.

    PyTorch keeps one for each stream. Captured, it lies in the memory of the graphs that first used it, and would go with
    them, or whenever somebody clears all workspaces, as `torch.compile` does for graphs of its own: later graphs would
    write to memory that is gone.
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


def clean_up_failed_capture(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: Any) -> None:
    """Undo what PyTorch begins with a capture, and leaves if CUDA refuses to end it.

    Memory stays set apart for it, and (to 2.11 at least) the device's random numbers wait for its end, so that nothing can
    be drawn outside of one. `pool` cannot be captured into again.
    """
    graph.reset()
    _failed.append(graph)
    names = ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool")  # from PyTorch 2.8 on, and before
    end_allocation = next(getattr(torch._C, name) for name in names if hasattr(torch._C, name))
    with suppress(RuntimeError):  # it ended well: the function failed, and CUDA did not mind
        end_allocation(stream.device_index, pool)
        torch._C._cuda_releasePool(stream.device_index, pool)
    with (
        suppress(torch.OutOfMemoryError),  # the failure to tell of is the first
        torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local"),  # one that ends
    ):
        torch.zeros(1, device=stream.device)


def new_pool() -> Any:
    """Memory for graphs that are replayed in turn."""
    return torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None


def synchronize(device: torch.device) -> None:
    """Wait for all that was launched on `device`, and for a capture in another thread, which that would break."""
    if device.type == "cuda":
        with _one_capture:
            torch.cuda.synchronize(device)


def memory_in_use(device: torch.device) -> int:
    """Bytes that PyTorch holds on `device`."""
    return torch.cuda.memory_reserved(device)
