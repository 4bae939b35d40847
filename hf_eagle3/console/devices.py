"""`--device` and `--dtype`, checked before anything is loaded."""

import torch


def choose_device(name: str, device_map: str | None = None) -> str:
    """The device that `--device` names; for auto, a GPU where there is one, and else the CPU.

    Raises:
        ValueError: There is no such device here, or `--device-map` says something else.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device_map is not None:
        raise ValueError(f"--device {name} and --device-map {device_map} both say where the target goes: give one.")
    refuse_device(name)
    return name


def choose_dtype(name: str | None, device: str) -> torch.dtype | str:
    """The dtype that a user names; for None, as stored, and float32 on a CPU: few have fast half precision."""
    return getattr(torch, name) if name is not None else "float32" if torch.device(device).type == "cpu" else "auto"


def refuse_device(name: str) -> None:
    """Raise if there is no such device here."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(
            f"--device {name} is no device that PyTorch knows: give auto, cpu, cuda, cuda:1, ..."
        ) from error
    if device.type == "cuda":  # checked without using it: a launcher must not take memory there
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ValueError(
                f"--device {name} is not there: PyTorch sees {count} CUDA devices. Give --device cpu, ..."
            )
        return
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError, NotImplementedError) as error:
        raise ValueError(f"--device {name} cannot be used here ({type(error).__name__}: {error}).") from error
