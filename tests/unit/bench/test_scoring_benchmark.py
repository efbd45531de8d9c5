"""The ways that ``benchmarks/scoring.py`` compares do the same work, and share as much as their names say."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import pytest
import torch
from model_cases import QUERIES, encode, model, processor
from places import ROOT

from video_opd.models.policy import HFPolicy


@pytest.fixture
def scoring(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("scoring")
    del sys.modules["scoring"]


def test_the_ways_write_the_same_and_share_what_they_say(scoring: Any) -> None:
    policy = HFPolicy(model(0, sharpness=3.0), processor())
    videos = [[encode(query) for query in QUERIES[:2]]]
    positions: list[int] = []

    def count(_: Any, args: tuple[Any, ...]) -> None:
        positions.append(args[0].shape[0] * args[0].shape[1])

    layer = policy.model.model.language_model.layers[0]
    found, computed = {}, {}
    for way in (scoring.together, scoring.unshared, scoring.one_at_a_time):
        positions.clear()
        with torch.no_grad(), layer.register_forward_pre_hook(count):
            found[way] = way(policy, videos, 2, 1.0)
        computed[way] = sum(positions)
    together, unshared, apart = found  # in the order of the loop
    assert len(found[together]) == 4
    assert all(scoring.compare(found[together], rollouts) < scoring.TOLERANCE for rollouts in found.values())
    assert computed[together] < computed[unshared] < computed[apart]
