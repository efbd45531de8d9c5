"""Connects a run with its teacher's servers, and compares both before the first step."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

from video_opd.config import DistillationTeacherConfig, TeacherConfig, VideoConfig
from video_opd.errors import UserError
from video_opd.models.fingerprint import model_fingerprint
from video_opd.models.loading import load_processor, read_model_configs
from video_opd.models.same_tokens import check_same_tokens
from video_opd.models.teachers import Nonfinite
from video_opd.models.vocabulary import Vocabulary
from video_opd.progress import log
from video_opd.serving.client import RemoteTeacher, bfloat16_or_float32
from video_opd.serving.servers import Described, Servers, describe, files_of_model, head_of_model

if TYPE_CHECKING:
    from transformers import Qwen3VLProcessor

TOKEN = "VIDEO_OPD_TOKEN"  # the environment variable with the servers' token


def connect_teacher(
    settings: TeacherConfig,
    video: VideoConfig,
    student: tuple[Any, Qwen3VLProcessor],
    *,
    nonfinite: Nonfinite = "raise",
    device: torch.device | None = None,
    distributions: bool = False,
) -> RemoteTeacher:
    """The teacher behind ``teacher.urls``; it raises as :func:`check_servers` does."""
    servers, found = check_servers(settings, student, distributions=distributions)
    head = None
    if distributions and isinstance(settings, DistillationTeacherConfig) and settings.receive == "hidden":
        head = lm_head_of(servers, device or torch.device("cpu"))
    log(f"the teacher is {found.name} ({found.model}) at {', '.join(settings.urls)}")
    return RemoteTeacher(
        servers,
        Vocabulary.of(*student),
        found,
        send=settings.send,
        video=video,
        nonfinite=nonfinite,
        device=device,
        head=head,
    )


def check_servers(
    settings: TeacherConfig, student: tuple[Any, Qwen3VLProcessor], *, distributions: bool = False
) -> tuple[Servers, Described]:
    """The servers of ``teacher.urls``, and what the first that answers says of its model.

    Of the student, its configs are enough, so this is asked before its weights are loaded. ``distributions``
    says that the run asks for whole ones. Raises :class:`UserError` if the servers hold another model than
    the recipe names, compute in another type, give no distributions, do not share the student's tokens,
    pixels and prompts, or read no files where ``teacher.send`` says so.
    """
    servers = Servers(settings.urls, os.environ.get(TOKEN), settings.wait_s)
    found = describe(servers)
    wanted = settings.fingerprint or model_fingerprint(settings.path)
    if found.model != wanted:
        named = f"teacher.path {settings.path}" if settings.path else "teacher.fingerprint"
        raise UserError(
            f"{settings.urls[0]} holds the model {found.name} ({found.model}), and {named} is {wanted}; "
            "start the server with the recipe's teacher"
        )
    computation = found.computation
    if (computation.dtype, computation.quantization) != (settings.dtype, settings.quantization):
        raise UserError(
            f"{settings.urls[0]} computes in {computation}, and the recipe says teacher.dtype "
            f"{settings.dtype}, teacher.quantization {settings.quantization}; change either"
        )
    if distributions and computation.engine != "hf":
        raise UserError(
            f"{settings.urls[0]} gives no whole distributions (--engine vllm): set teacher.distributions to "
            "false, with loss.estimator sampled, or start it with --engine hf"
        )
    if settings.send == "reference" and not found.reads_files:
        raise UserError(
            f"{settings.urls[0]} reads no files: start it with --root and the folder of the videos, or set "
            "teacher.send to value"
        )
    with files_of_model(servers) as folder:
        teacher = (read_model_configs(folder), load_processor(folder))
        check_same_tokens(student, teacher, other_template=settings.other_template)
    return servers, found


def lm_head_of(servers: Servers, device: torch.device) -> torch.nn.Linear:
    """The ``lm_head`` of the servers' model, frozen, on ``device``."""
    weight = bfloat16_or_float32(head_of_model(servers)).to(device)
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return layer
