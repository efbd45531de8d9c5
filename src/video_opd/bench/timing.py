"""Ways to do the same work take turns; ratios are taken within a turn, so that what else the machine does
falls on all of them."""

from __future__ import annotations

import gc
import multiprocessing
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
    """(what each way returned the first time, its seconds in each of ``repeats`` turns).

    The first round warms up and is not counted. Every turn begins with another way.
    """
    names = list(ways)
    results: dict[str, Any] = {}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats + 1):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            gc.collect()
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
    """Of each way: median seconds, and how many times longer ``reference`` took, with quartiles."""
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
    """Memory that ``work`` had at its peak above what there was before; None where it cannot be told.

    On a GPU of what torch allocated. On a CPU of the resident set of a fork of this process, one thread, so
    that neither what was freed before nor what other work left behind is counted.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not os.path.exists("/proc/self/clear_refs"):
        return None
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_report_peak, args=(work, sender))
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return None  # it was killed
    finally:
        child.join()


def _report_peak(work: Work, sender: Any) -> None:
    torch.set_num_threads(1)
    gc.collect()
    before = _status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the high-water mark starts again
    work()
    sender.send(_status("VmHWM") - before)


def _status(key: str) -> int:
    """Bytes, from /proc/self/status."""
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
