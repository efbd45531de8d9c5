"""The memory of a step by part, in each of its phases, on the process that holds most.

A phase is a moment of :class:`~video_opd.training.step.Stepper`'s work at which memory may be fullest. What
is held all the time (weights, masters, moments, the teacher) stands in every phase; the graph, caches and
gradients stand where they exist. Sums are of the tensors alone, and ``runtime`` is what the device and its
libraries take beside them.

Symbols: P prompt tokens of a micro-batch, G rollouts, R response tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from video_opd.models.chunk_sizes import (
    CACHE_ROOM,
    MOMENTS_A_SCALE,
    ROWS_A_CHUNK,
    TOKENS_A_CHUNK,
    WEIGHTS_A_CHUNK,
)
from video_opd.planning import graph
from video_opd.planning.setup import Setup, Work
from video_opd.planning.sizes import ModelSizes, TextSizes

#: The parts of a plan, with what each is.
PARTS: Mapping[str, str] = {
    "weights": "the student's weights, as it computes with them",
    "casts": "autocast's copies of weights",
    "masters": "the weights that the optimiser updates",
    "moments": "the optimiser's moments",
    "gradients": "gradients",
    "buckets": "the copy in which DDP exchanges gradients",
    "gathered": "the largest layer that is gathered or reduced at a time",
    "vision": "activations of the vision tower",
    "decoder": "activations of the decoder",
    "caches": "keys and values of prompts, and their gradients",
    "responses": "distributions at response tokens, and lm_head in float32",
    "teacher": "the teacher's weights",
    "teacher_work": "the teacher's forward: keys and values, one layer's activations",
    "reference": "the reference's weights",
    "optimiser": "what the optimiser's step needs beside moments",
    "pixels": "the frames of a micro-batch",
    "runtime": "the device's own: context, libraries, buffers of the exchange",
}
CHUNK_WORK = 56  # temporary bytes for each weight that the optimiser for fewer bits updates at once
GIB = 2**30
CUDA_RUNTIME = GIB  # context, cuBLAS and cuDNN workspaces
CUDA_EXCHANGE = GIB  # NCCL's buffers and channels


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of each part in each phase."""

    phases: Mapping[str, Mapping[str, int]]

    @property
    def fullest(self) -> str:
        """The name of the phase that takes most."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def parts(self) -> Mapping[str, int]:
        """The parts in the fullest phase, in the order of ``PARTS``."""
        return self.phases[self.fullest]

    @property
    def peak(self) -> int:
        return sum(self.parts.values())


def memory_of(
    student: ModelSizes,
    teachers: tuple[ModelSizes, ...],
    setup: Setup,
    work: Work,
    *,
    cuda: bool = True,
) -> Memory:
    """The memory of a step from the second on: moments exist from the end of the first. ``cuda`` adds what a
    GPU's libraries take. Where ``setup.recompute`` is None, activations are kept."""
    estimate = Estimate(student, teachers, setup, work, cuda=cuda)
    phases = {
        "prefill": estimate.prefill(),
        "sampling": estimate.sampling() if work.sampled and not setup.vllm else Counter[str](),
        "teacher": estimate.teacher_turn() if setup.has_teacher or setup.reference else Counter[str](),
        "backward, responses": estimate.backward_starts(),
        "backward, last layer": estimate.backward_of_prompt() if setup.prefix else Counter[str](),
        "backward, first layer": estimate.backward_ends(),
        "reduction": estimate.reduction(),
        "optimiser": estimate.optimiser(),
    }
    return Memory(
        phases={
            name: {part: parts[part] for part in PARTS if parts[part]}
            for name, parts in phases.items()
            if parts
        }
    )


def held_bytes(weights: ModelSizes, number: int, quantization: str | None) -> int:
    """A frozen model: in numbers of ``number`` bytes, or its linear layers but ``lm_head`` in 8 bits with a
    float32 scale for each row."""
    if quantization is None:
        return number * weights.weights
    kept = weights.weights
    quantised = 0
    for part, found in weights.parts.items():
        if part != "lm_head":
            kept -= found.in_matrices
            quantised += found.in_matrices + 4 * sum(rows for _, rows in found.matrices)
    return number * kept + quantised


class Estimate:
    """The bytes of each part, for one set of models and settings."""

    def __init__(
        self,
        student: ModelSizes,
        teachers: tuple[ModelSizes, ...],
        setup: Setup,
        work: Work,
        *,
        cuda: bool,
    ) -> None:
        self.student, self.teachers, self.setup, self.work = student, teachers, setup, work
        self.recompute, self.cuda = bool(setup.recompute), cuda
        self.text, self.vision = student.text, student.vision
        self.R = work.micro_batch * work.rollouts * work.response_tokens  # response tokens of a micro-batch
        # The plain engine puts every response behind a prompt of its own.
        prompts = work.micro_batch if setup.prefix else work.micro_batch * work.rollouts
        self.P = prompts * work.prompt_tokens + (0 if setup.prefix else self.R)
        self.patches = prompts * work.video_tokens * student.vision.patches_a_token
        roles = {part: setup.role(part) for part in student.parts}
        #: Trained weights by part, and all of them.
        self.trained = {
            part: {"full": weights.count, "adapters": weights.adapters(setup.rank)}.get(roles[part] or "", 0)
            for part, weights in student.parts.items()
        }
        if student.tied and roles["language"] == "full" and roles["lm_head"] is None:
            self.trained["language"] -= student.embedding  # the shared tensor is frozen with lm_head
        self.all_trained = sum(self.trained.values())
        layers = {
            "language": student.text.all_layers.count,
            "vision": student.vision.depth * student.vision.block.count,
        }
        #: Trained weights of layers whose gradients are reduced as soon as they are there, by part.
        self.in_layers = {
            part: min(count, layers.get(part, 0)) if setup.by_layer else 0
            for part, count in self.trained.items()
        }
        self.roles = roles
        self.mode = setup.mode("language")

    # -------------------------------------------------------------------------------------- held all the time

    def held(self) -> Counter[str]:
        """What is there in every phase, but the student's weights: :meth:`weights` counts them."""
        setup, shards = self.setup, self.setup.processes if self.setup.sharded else 1
        parts = Counter[str]()
        if setup.sharded or setup.offload:
            parts["masters"] = self._masters()
        if not self.away:
            parts["moments"] = self.moments // shards
        if setup.has_teacher:
            parts["teacher"] = self._teacher_held()
        if setup.served_head:  # whose width only the servers know: the student's stands for it
            parts["teacher"] = setup.teacher_number * self.student.embedding
        if self.holds_reference:
            parts["reference"] = self._placed(held_bytes(self.student, setup.number, None))
        parts["pixels"] = 4 * self.patches * self.vision.patch_numbers
        if self.cuda:
            parts["runtime"] = CUDA_RUNTIME + (CUDA_EXCHANGE if setup.processes > 1 else 0)
        return parts

    @property
    def away(self) -> bool:
        """Whether masters and moments are on the CPU, beside a GPU."""
        return self.setup.offload and self.cuda

    @property
    def moments(self) -> int:
        """The optimiser's moments of all trained weights, over all processes."""
        bytes_each = 8 if self.setup.moments == "float32" else 2 + 2 * 4 / MOMENTS_A_SCALE
        return round(bytes_each * self.all_trained)

    @property
    def holds_reference(self) -> bool:
        """Whether the reference has weights of its own: not if it is the student without its adapters."""
        return self.setup.reference and not self._only_adapters

    def _masters(self) -> int:
        """What the optimiser updates, where that is not what the student computes with. If the masters are
        on the CPU, the device still holds this process's shard of a sharded model, in the computation's
        type."""
        setup = self.setup
        if not setup.offload:
            return self._as_loaded() // setup.processes
        shards = setup.processes if setup.sharded else 1
        on_device = self._as_loaded() // shards if setup.sharded else 0
        return on_device + (0 if self.cuda else 4 * self.all_trained // shards)

    @property
    def _only_adapters(self) -> bool:
        return "adapters" in self.roles.values() and "full" not in self.roles.values()

    def _as_loaded(self) -> int:
        """The student's weights in the types that they are trained or frozen in, before they are gathered."""
        setup = self.setup
        total = 0
        for part, weights in self.student.parts.items():
            role = self.roles[part]
            trained = 4 if setup.weights == "float32" and not setup.offload else setup.number
            if role == "full":
                total += trained * weights.count
            elif role == "adapters" and setup.base_quantization is not None:
                total += setup.number * weights.others + weights.in_matrices
                total += 4 * sum(rows for _, rows in weights.matrices) + 4 * self.trained[part]
            else:
                total += (setup.number if setup.adapted else trained) * weights.count
                total += 4 * self.trained[part]
        return total

    def _teacher_held(self) -> int:
        setup = self.setup
        if setup.teacher_is_adapter:
            return 0
        return self._placed(
            sum(
                held_bytes(sizes, setup.teacher_number, setup.teacher_quantization) for sizes in self.teachers
            )
        )

    def _placed(self, whole: int) -> int:
        """What a process holds of a frozen model outside its turn."""
        if self.setup.teacher_placement == "cpu":
            return 0
        return whole // self.setup.processes if self.setup.teacher_placement == "sharded" else whole

    def weights(self) -> Counter[str]:
        """The student's weights while it runs: as loaded, or gathered from the shards."""
        setup = self.setup
        if not setup.sharded:
            return Counter(weights=self._as_loaded())
        if setup.by_layer:
            # FSDP gathers a layer into one buffer, and copies its weights out of it.
            layer = 2 * (self.student.largest_unit + self._adapters_of_a_layer)
            return Counter(weights=setup.number * self.student.rest, gathered=setup.number * layer)
        return Counter(weights=setup.number * (self.student.weights + self._adapters))

    @property
    def _adapters(self) -> int:
        return sum(count for part, count in self.trained.items() if self.roles[part] == "adapters")

    @property
    def _adapters_of_a_layer(self) -> int:
        return self._adapters // self.text.layers

    def casts(self) -> int:
        """Autocast's copies of the weights of linear layers in float32, as far as a gradient goes through
        them. They live as long as the forward, and as long as its graph where that is kept."""
        parts = ("vision", "merger", "language")
        cast = [part for part in parts if self.setup.mode(part) == "autocast" and self.roles[part]]
        return 2 * sum(self.student.parts[part].in_matrices for part in cast)

    # -------------------------------------------------------------------------------------------- activations

    def vision_graph(self) -> int:
        """Nothing where no gradient goes into the tower; its features are then only inputs of the decoder."""
        role, mode = self.roles["vision"], self.setup.mode("vision")
        if role is not None:
            return graph.vision_graph_bytes(
                self.vision, self.patches, mode, role, recompute=self.recompute, cuda=self.cuda
            )
        merger = self.roles["merger"]
        return (
            0
            if merger is None
            else self.patches * graph.merger_bytes(self.vision, mode, merger, cuda=self.cuda)
        )

    def features(self) -> int:
        """What the vision tower gives to the decoder."""
        numbers = self.vision.out_hidden * (1 + self.vision.levels) // self.vision.patches_a_token
        return self.setup.number * self.patches * numbers

    def decoder_graph(self) -> int:
        role = self.roles["language"]
        if role is None:
            return 0
        if self.recompute:
            inputs = self.text.layers * graph.input_bytes(self.text, self.mode)
            return self.P * (inputs + graph.last_norm_bytes(self.text, self.mode, role))
        return graph.graph_bytes(self.text, self.P, self.mode, role)

    def prompt_cache(self) -> int:
        if not self.setup.prefix:
            return 0
        return self.P * self.text.layers * graph.cache_bytes(self.text, self.mode)

    def own_cache(self) -> int:
        """The prompt's keys and values as far as the graph does not hold them anyhow."""
        if self.recompute or self.roles["language"] is None:
            return self.prompt_cache()
        # Under autocast the cache is float32, and the graph keeps casts of it.
        return self.prompt_cache() if self.mode == "autocast" else 0

    def response_graph(self) -> int:
        """What the forward of the responses keeps of the prompt."""
        if not self.setup.prefix:
            return 0
        layers = 1 if self.recompute else self.text.layers
        return layers * self._response_bytes(self.text, self.setup.number, self.P, self.R)

    def _response_bytes(self, text: TextSizes, number: int, prompts: int, responses: int) -> int:
        """The same of one layer of any model, for so many tokens of prompts and of responses."""
        work, together = self.work, self.setup.side_by_side
        columns = prompts * (1 if together else work.rollouts) + responses
        queries = work.response_tokens * (work.rollouts if together else 1)
        return graph.response_bytes(text, number, columns, queries, masked=together)

    def one_layer(self) -> int:
        """What the backward of a layer needs beside what is kept: the layer's own graph where it is
        recomputed, and gradients of the feed-forward layer."""
        text, number = self.text, self.setup.number
        role = self.roles["language"]
        if role is None:
            return 0
        F = text.experts_a_token * text.expert_feed_forward if text.expert_layers else text.feed_forward
        again = 0
        if self.recompute:
            again = self.P * graph.layer_bytes(text, self.mode, role, experts=bool(text.expert_layers))
        return again + self.P * (3 * number * F + (4 + number) * text.hidden)

    def head(self, *, backward: bool) -> int:
        """Logits and log-probabilities in float32, and ``lm_head`` in float32 where its weights are not."""
        text, setup = self.text, self.setup
        copies = (6 if setup.distributions else 3) + (2 if backward else 0)
        logits = 4 * text.vocabulary * min(self.R, TOKENS_A_CHUNK) * copies
        sixteen_bit = self.setup.mode("lm_head") == "bfloat16"
        converted = 4 * self.student.embedding if sixteen_bit else 0
        if backward and sixteen_bit and self.roles["lm_head"] == "full":
            converted += 6 * self.student.embedding  # its gradient in pieces
        return logits + converted

    # ------------------------------------------------------------------------------------------------- phases

    def accumulated(self) -> Counter[str]:
        """Gradients of earlier micro-batches of the step."""
        if self.work.micro_batches == 1:
            return Counter()
        if self.setup.reduce == "micro_batch" and self.setup.sharded:
            return Counter(gradients=self._gradient_shard(self.all_trained))
        return self.gradients()

    def gradients(self) -> Counter[str]:
        """All gradients at the end of a backward."""
        setup = self.setup
        if not setup.sharded:
            return Counter(gradients=4 * self.all_trained, buckets=4 * self.all_trained * setup.ddp)
        inside = sum(self.in_layers.values())
        outside, reduced = self.all_trained - inside, self._gradient_shard(inside)
        if setup.reduce == "micro_batch":
            return Counter(gradients=reduced + setup.number * outside + self._gradient_shard(outside))
        several = self.work.micro_batches > 1
        return Counter(gradients=reduced + (4 if several else setup.number) * outside)

    def _gradient_shard(self, weights: int) -> int:
        """The mean over processes, in float32; masters on the CPU have it there."""
        return 0 if self.away else 4 * weights // self.setup.processes

    def one_layers_gradients(self) -> Counter[str]:
        """Where layers are gathered one at a time: the gradients of one on their way to shards, and the one
        that is reduced, in float32."""
        if not self.setup.by_layer:
            return Counter()
        text = self.text
        trained = max(
            self.in_layers["language"] // text.layers, self.in_layers["vision"] // self.vision.depth
        )
        largest = min(trained, max(text.largest_layer.largest, self.vision.block.largest))
        return Counter(gradients=self.setup.number * trained, gathered=2 * 4 * largest)

    def running(self) -> Counter[str]:
        parts = self.held() + self.weights() + self.accumulated() + self.following()
        parts["casts"] += self.casts()
        return parts

    def following(self) -> Counter[str]:
        """The graph of one more micro-batch: the next one's, while servers score; or, while that is sampled,
        the one that they score."""
        work, setup = self.work, self.setup
        kept = setup.prefix and work.sampled and work.sampled_ahead is None and work.micro_batches > 1
        if not (setup.overlaps and kept):
            return Counter()
        casts = 0 if self.recompute else self.casts()
        return self.prompt_graph() + Counter(casts=casts)

    def prompt_graph(self) -> Counter[str]:
        """What a prefill with gradients leaves behind."""
        return Counter(vision=self.vision_graph(), decoder=self.decoder_graph(), caches=self.own_cache())

    def prefill(self) -> Counter[str]:
        parts = self.running() + self.prompt_graph()
        parts["vision"] += self.features()
        parts["decoder"] += self.P * graph.layer_work_bytes(self.text, self.setup.number)
        return parts

    def sampling(self) -> Counter[str]:
        """Sampling copies the prompt's keys and values once, with room for responses. What is sampled before
        the update has no graph."""
        prompts = self.work.sampled_ahead or self.work.micro_batch
        rows = prompts * self.work.rollouts
        share = prompts / self.work.micro_batch  # of what a micro-batch reads
        a_token = self.text.layers * graph.cache_bytes(self.text, self.mode)
        parts = self.running()
        if self.setup.prefix:
            room = CACHE_ROOM * math.ceil(self.work.response_tokens / CACHE_ROOM)
            parts["caches"] += round(self.P * share + rows * room) * a_token
        if self.setup.prefix and self.work.sampled_ahead is None:
            parts += self.prompt_graph()
        else:
            parts["caches"] += round(self.prompt_cache() * share)
            seen = self.patches * graph.block_work_bytes(self.vision, self.setup.number)
            read = self.P * graph.layer_work_bytes(self.text, self.setup.number)
            parts["vision"] += round(share * seen)
            parts["decoder"] += round(share * read)
        sixteen_bit = self.setup.mode("lm_head") == "bfloat16"
        parts["responses"] += 4 * 4 * self.text.vocabulary * rows
        parts["responses"] += 4 * ROWS_A_CHUNK * self.text.hidden if sixteen_bit else 0
        return parts

    def teacher_turn(self) -> Counter[str]:
        """Teacher and reference score the responses; if these were sampled before the update, the student has
        no graph yet."""
        parts = self.running()
        if self.setup.prefix and self.work.sampled_ahead is None:
            parts += self.prompt_graph()
        setup = self.setup
        if setup.has_teacher:
            number = setup.teacher_number
            largest = max(self.teachers, key=lambda sizes: sizes.weights)
            parts["teacher_work"] = max(self._teacher_work(sizes, number) for sizes in self.teachers)
            if not setup.teacher_is_adapter:
                self._take_turn(parts, "teacher", largest, number, setup.teacher_quantization)
        if setup.reference:
            number = setup.number
            parts["teacher_work"] = max(parts["teacher_work"], self._teacher_work(self.student, number))
            if not self._only_adapters:
                self._take_turn(parts, "reference", self.student, number, None)
        return parts

    def _take_turn(
        self, parts: Counter[str], part: str, sizes: ModelSizes, number: int, quantization: str | None
    ) -> None:
        """Adds what a frozen model takes only while it scores. Models that come from the CPU are all there
        together; layers are gathered for one model at a time."""
        if self.setup.teacher_placement == "cpu":
            parts[part] += held_bytes(sizes, number, quantization)
        if self.setup.teacher_placement == "sharded":
            embedding = 0 if sizes.tied else sizes.embedding  # is gathered by itself
            unit = max(sizes.largest_unit, embedding)
            gathered = number * (sizes.rest - embedding + 2 * unit)
            parts["gathered"] = max(parts["gathered"], gathered)

    def _teacher_work(self, sizes: ModelSizes, number: int) -> int:
        """A forward without a graph: the vision tower, then the decoder with its keys and values."""
        work = self.work
        prompts = work.teacher_micro_batch * (1 if self.setup.prefix else work.rollouts)
        tokens = prompts * work.prompt_tokens
        patches = prompts * work.video_tokens * sizes.vision.patches_a_token
        mode: graph.Mode = "float32" if number == 4 else "bfloat16"
        seen = patches * graph.block_work_bytes(sizes.vision, number)
        text = sizes.text
        features = tokens * number * text.hidden * (1 + sizes.vision.levels)
        cache = tokens * text.layers * graph.cache_bytes(text, mode) if self.setup.prefix else 0
        copies = 2 if self.setup.distributions else 1
        logits = (
            4 * copies * text.vocabulary * work.teacher_micro_batch * work.rollouts * work.response_tokens
        )
        logits += 0 if number == 4 else 4 * ROWS_A_CHUNK * text.hidden
        layer = max(tokens * graph.layer_work_bytes(text, number), logits)
        if self.setup.prefix:
            responses = work.teacher_micro_batch * work.rollouts * work.response_tokens
            layer = max(layer, self._response_bytes(text, number, tokens, responses))
        return max(seen, features + cache + layer)

    def backward_starts(self) -> Counter[str]:
        """The loss is differentiated, and the responses' last layer. The plain engine's responses are behind
        prompts of their own, so this is the last layer of all."""
        parts = self.running()
        parts += self.prompt_graph()
        parts["caches"] += self.response_graph()
        parts["responses"] += self.head(backward=True)
        if not self.setup.prefix:
            parts["decoder"] += self.one_layer()
        if not self.accumulated():
            parts["gradients"] += self._leaf_number * self.trained["lm_head"]
        parts += self.one_layers_gradients()
        if self.recompute:
            parts["casts"] = 0
        return parts

    def backward_of_prompt(self) -> Counter[str]:
        """The responses' layers are differentiated, and the prompts' last layer is next.

        Weights have met both. In a single backward autograd adds up the two gradients of a weight before it
        gives them away: those of the responses wait for those of the prompts, beside what earlier
        micro-batches have left. DDP wants a single one, and where activations are kept it is not cut.
        """
        setup = self.setup
        single = setup.ddp or not self.recompute
        parts = self.running()
        parts["vision"] += self.vision_graph()
        parts["decoder"] += self.decoder_graph() + self.one_layer()
        parts["caches"] += self.prompt_cache() if self.roles["language"] else 0  # gradients
        parts["caches"] += self.own_cache() if single else 0
        met = self.trained["language"] + self.trained["lm_head"] - self.in_layers["language"]
        parts += self.one_layers_gradients()
        if setup.by_layer and not self.accumulated():
            parts["gradients"] += self._gradient_shard(self.in_layers["language"])  # of the responses
        if setup.sharded and setup.reduce == "micro_batch":
            parts["gradients"] += setup.number * met
        elif not self.accumulated():
            parts["gradients"] += self._leaf_number * met
        elif single:
            parts["gradients"] += self._leaf_number * self.trained["language"]
        if self.recompute:
            parts["casts"] = 0
        return parts

    @property
    def _leaf_number(self) -> int:
        """Bytes of a number of a gradient in the backward: FSDP's whole weights have the computation's type,
        and bfloat16 weights ask for float32."""
        return self.setup.number if self.setup.sharded else 4

    def backward_ends(self) -> Counter[str]:
        """The decoder's graph is freed, and its gradients are there; the vision tower's graph is left."""
        parts = self.held() + self.weights() + self.following()
        gradients = self.gradients()
        vision = self.trained["vision"] + self.trained["merger"]
        share = 1 - vision / max(1, self.all_trained) if self.work.micro_batches == 1 else 1.0
        parts["gradients"] += round(gradients["gradients"] * share)
        parts += self.one_layers_gradients()
        parts["buckets"] += gradients["buckets"]
        parts["vision"] += self.vision_graph()
        parts["decoder"] += self.one_layer()
        if self.roles["language"] == "full":
            parts["gradients"] += (
                self.setup.number * self.student.embedding
            )  # on its way to what was added up
        return parts

    def reduction(self) -> Counter[str]:
        """Gradients are reduced one weight after the other, in float32, while all weights are gathered."""
        parts = self.held() + self.weights() + self.gradients()
        if self.setup.sharded:
            parts["gathered"] += 2 * 4 * min(self._largest_weight, self.all_trained)
        return parts

    @property
    def _largest_weight(self) -> int:
        return max(weights.largest for weights in self.student.parts.values())

    def optimiser(self) -> Counter[str]:
        """torch's optimiser works on all weights at once on a GPU, and on one at a time on a CPU; ours, for
        weights and moments in fewer bits, on chunks."""
        setup = self.setup
        shards = setup.processes if setup.sharded else 1
        parts = self.held()
        if not setup.sharded:
            parts += self.weights()
        if self.away:
            return parts
        parts["gradients"] += 4 * self.all_trained // shards
        parts["buckets"] += 4 * self.all_trained * setup.ddp
        largest = min(self._largest_weight, self.all_trained)
        if setup.weights == "bfloat16" or setup.moments == "int8":
            parts["optimiser"] += CHUNK_WORK * min(WEIGHTS_A_CHUNK, largest)
        else:
            parts["optimiser"] += 4 * (self.all_trained if self.cuda else 2 * largest) // shards
        return parts
