"""Tests share their machine with whatever else runs on it: one thread each, and no verdict by the clock."""

import gc
import os
import sys

from hypothesis import HealthCheck, settings

# Two processes that spin on two cores slow each other tenfold.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Container images often set it. Tests start hundreds of processes, and each would compile what it imports.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False


def _in_fork() -> None:
    gc.freeze()
    gc.enable()


# A fork has no threads but its own. If it collected a decoder or a frame that its parent had let go of, it
# would wait for their threads without end; and every collection would copy the memory that it looks at.
os.register_at_fork(before=gc.disable, after_in_parent=gc.enable, after_in_child=_in_fork)

# Overruled by --hypothesis-profile.
settings.register_profile("video-opd", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("video-opd")


def pytest_collection_finish() -> None:
    """What is imported by now stays: no collection looks at it again, and none copies it in a fork."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # bindings complain about what is never freed


def pytest_runtest_setup() -> None:
    if torch := sys.modules.get("torch"):  # where a test needs it, it is imported by now
        torch.set_num_threads(1)
