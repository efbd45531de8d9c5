"""The memory of the host beside GPUs: what each process holds there, and the first while it saves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from video_opd.planning.memory import Estimate, held_bytes
from video_opd.planning.setup import Setup, Work
from video_opd.planning.sizes import ModelSizes

#: The parts that a process holds, with what each is.
HOST_PARTS: Mapping[str, str] = {
    "prompts": "videos that are decoded ahead (data.prefetch)",
    "kept_prompts": "prompts whose videos come again (data.memory_gib)",
    "masters": "the weights that the optimiser updates, and their gradients",
    "moments": "the optimiser's moments",
    "teacher": "the teacher's weights, pinned",
    "reference": "the reference's weights, pinned",
}
STORED = 2  # bytes of a weight in a checkpoint's files
LARGEST_FILE = 50 * 10**9  # bytes of a file of weights that transformers writes, by default


@dataclass(frozen=True, kw_only=True)
class HostMemory:
    """Bytes. What Python and its libraries take, some GiB a process, is not in them.

    ``parts`` are in each process, and ``saving`` comes on top in the first while it writes a checkpoint.
    ``pages`` are those of checkpoints in 16 bits: the processes of a host share them, and they need not stay.
    """

    parts: Mapping[str, int]
    saving: int
    pages: int

    @property
    def each(self) -> int:
        return sum(self.parts.values())


def host_memory_of(
    student: ModelSizes, teachers: tuple[ModelSizes, ...], setup: Setup, work: Work
) -> HostMemory:
    """What a run on GPUs holds on their host."""
    estimate = Estimate(student, teachers, setup, work, cuda=True)
    shards = setup.processes if setup.sharded else 1
    trained, frozen_number = estimate.all_trained, setup.number if setup.adapted else 4
    video = 4 * work.video_tokens * student.vision.patches_a_token * student.vision.patch_numbers
    parts = {
        "prompts": work.videos_ahead * video,
        "kept_prompts": int(min(work.memory_bytes, work.rows * video)),
    }
    if estimate.away:
        parts["masters"] = 8 * trained // shards
        parts["moments"] = estimate.moments // shards
    if setup.teacher_placement == "cpu":
        if setup.has_teacher and not setup.teacher_is_adapter:
            parts["teacher"] = sum(held_bytes(sizes, setup.teacher_number, None) for sizes in teachers)
        if estimate.holds_reference:
            parts["reference"] = held_bytes(student, setup.number, None)
    # The whole state dicts, on the CPU of the first process (training/sharding.py, Shards.states).
    saving = estimate.moments
    if setup.sharded or setup.offload:
        full = sum(count for part, count in estimate.trained.items() if estimate.roles[part] == "full")
        saving += 4 * trained + frozen_number * (student.weights - full)
    else:  # the GPU has them: a file's tensors are copied to the host before they are written
        held = setup.number if setup.weights == "bfloat16" else 4
        saving += min(LARGEST_FILE, 4 * trained if setup.adapted else held * student.weights)
    return HostMemory(
        parts={part: parts[part] for part in HOST_PARTS if parts.get(part)},
        saving=saving,
        pages=STORED * (student.weights + sum(teacher.weights for teacher in teachers)),
    )
