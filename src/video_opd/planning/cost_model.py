"""The cost model of docs/performance.md: the operations of each stage of a step, from the sizes of the
models.

A test holds it against what torch counts (:mod:`video_opd.bench.operations`).

Symbols: P prompt tokens, G rollouts, R tokens of a rollout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from video_opd.planning.sizes import ModelSizes

Trained = Literal["adapters", "full"]


@dataclass(frozen=True, kw_only=True)
class Costs:
    """The work of a model for each token: the weights that it meets, and the attention scores."""

    weights: int  # weights of the decoder layers
    last: int  # the share of ``weights`` in the last matrix product of each layer
    scores: int  # decoder layers × heads × head size; 4 operations on each for a pair of query and key
    vision_weights: float  # of the vision tower, that a patch meets; mergers in proportion
    vision_scores: int
    patches_a_token: int

    @classmethod
    def of(cls, sizes: ModelSizes) -> Costs:
        """From the base weights; adapters are not counted. A token meets the experts that it is sent to."""
        text, vision = sizes.text, sizes.vision
        D, E, F = text.hidden, text.experts_a_token, text.expert_feed_forward
        dense, mixed = text.layers - text.expert_layers, text.expert_layers
        met = 3 * E * D * F + text.experts * D  # in the experts and the router
        mixed_weights = text.expert_layer.in_matrices + met if mixed else 0
        mergers = vision.mergers.in_matrices / vision.patches_a_token
        return cls(
            weights=dense * text.dense_layer.in_matrices + mixed * mixed_weights,
            last=D * (dense * text.feed_forward + mixed * E * F),
            scores=text.layers * text.queries,
            vision_weights=vision.hidden * vision.patch_numbers
            + vision.depth * vision.block.in_matrices
            + mergers,
            vision_scores=vision.depth * vision.hidden,
            patches_a_token=vision.patches_a_token,
        )

    def forward(self, tokens: int, pairs: float) -> float:
        """Operations of the decoder on ``tokens`` that see ``pairs`` keys together."""
        return 2.0 * self.weights * tokens + 4.0 * self.scores * pairs

    def again(self, tokens: int, pairs: float) -> float:
        """The work of a forward that is recomputed. It stops before the last product of a layer, which the
        backward does not need."""
        return self.forward(tokens, pairs) - 2.0 * self.last * tokens

    def backward(self, tokens: int, pairs: float, trained: Trained) -> float:
        """Adapters leave no gradients of the weights to be computed; scores have two operands in any case."""
        return (2.0 if trained == "adapters" else 4.0) * self.weights * tokens + 8.0 * self.scores * pairs

    def see(self, video_tokens: int, frame_pairs: int) -> float:
        """Operations of the vision tower; a patch attends to those of its own pair of frames."""
        patches = self.patches_a_token * video_tokens
        return patches * (2.0 * self.vision_weights + 4.0 * self.vision_scores * patches / frame_pairs)


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """A step on one prompt: how much is read, how much is written, and which way."""

    prompt: int  # P, the video's tokens among them
    video_tokens: int
    frame_pairs: int
    rollouts: int  # G
    response: int  # R
    shared: bool  # the prefix engine; otherwise each response stands behind a prompt of its own in the update
    recompute: bool
    trained: Trained = "adapters"
    vision: Trained | None = None  # what is trained of the vision tower; None: it is frozen
    sampled: bool = True  # False: the responses are given, as annotations are
    reference: bool = False  # whether the initial student scores the responses

    def operations(self, student: Costs, teacher: Costs | None) -> dict[str, float]:
        """The work of each stage, by the cost model of docs/performance.md; 0 for a stage that is left out.

        The first token of a response comes from the prefill.
        """
        P, G, steps = self.prompt, self.rollouts, self.response - 1
        read = (P, P * (P + 1) / 2)
        written = (G * steps, G * (steps * P + steps * (steps + 1) / 2))
        both = (read[0] + written[0], read[1] + written[1])
        apart = (G * (P + self.response), G * (P + self.response) * (P + self.response + 1) / 2)

        def see(costs: Costs) -> float:
            return costs.see(self.video_tokens, self.frame_pairs)

        prefill = see(student) + student.forward(*read)
        sample = student.forward(*written) if self.sampled else 0.0
        update = both if self.shared else apart
        videos = 1 if self.shared else G
        again = student.again(*update) if self.recompute else 0.0
        tower = 0.0
        if self.vision is not None:
            backward = 1.0 if self.vision == "adapters" else 2.0
            tower = videos * see(student) * (backward + self.recompute)
        stages = {
            "prefill": prefill if self.shared else 0.0,
            "sample": sample if self.shared or not self.sampled else prefill + sample,
            "teacher": 0.0,
            "reference": 0.0,
            "update": student.forward(*written)
            if self.shared
            else G * see(student) + student.forward(*apart),
            "backward": student.backward(*update, self.trained) + again + tower,
        }
        asked = {"teacher": teacher, "reference": student if self.reference else None}
        for name, costs in asked.items():
            if costs is not None:
                stages[name] = videos * see(costs) + costs.forward(*update)
        return stages
