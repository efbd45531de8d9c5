"""Measures several ways to do the same work, in turns.

Ratios are taken within a turn, so that other work on the machine falls on all ways alike.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Work = Callable[[], Any]


def take_turns(
    ways: Mapping[str, Work],
    repeats: int,
    device: torch.device,
    report: Callable[[int], None] = lambda _: None,
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Runs each way once to warm up, and then in each of ``repeats`` turns.

    Returns what each way returned when it warmed up, and its seconds in each turn. Every turn begins with
    another way. ``report`` is called with the number of each finished turn.
    """
    names = list(ways)
    results: dict[str, Any] = {}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats + 1):
        start = turn % len(names)
        gc.collect()
        for name in names[start:] + names[:start]:
            settle(device)
            began_s = time.perf_counter()
            result = ways[name]()
            settle(device)
            if turn:
                seconds[name].append(time.perf_counter() - began_s)
            else:
                results[name] = result
        report(turn)
    return results, seconds


def summary(seconds: Mapping[str, Sequence[float]], reference: str) -> dict[str, dict[str, Any]]:
    """Gives each way's median seconds, and how many times as long ``reference`` took, with quartiles."""
    return {
        name: {
            "seconds": statistics.median(values),
            "speedup": quartiles([a / b for a, b in zip(seconds[reference], values, strict=True)]),
        }
        for name, values in seconds.items()
    }


def quartiles(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {"median": middle, "low": low, "high": high}


def peak_bytes(work: Work, device: torch.device) -> int | None:
    """The peak memory of ``work`` above what was in use before it; None if the system does not tell.

    On a GPU this is the memory that torch allocates. On a CPU it is the resident set, which Linux tells,
    after the C library has given back freed memory.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None or not os.path.exists("/proc/self/clear_refs"):
        return None
    gc.collect()
    trim(0)
    before = _status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the high-water mark
    work()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    """A value of /proc/self/status, in bytes."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    raise KeyError(key)


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def machine(device: torch.device) -> dict[str, Any]:
    import transformers

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    return {
        "device": name,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "load_before": os.getloadavg()[0],
    }
