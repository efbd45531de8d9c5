"""Connects a run with its teacher's servers, and compares both before the first step."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from video_opd.config import DistillationTeacherConfig, OnPolicyRecipe, Recipe, TeacherConfig, VideoConfig
from video_opd.errors import UserError, need
from video_opd.models.checkpoint_files import base_of
from video_opd.models.fingerprint import model_fingerprint
from video_opd.models.loading import load_processor, read_model_configs
from video_opd.models.same_tokens import check_same_tokens
from video_opd.models.teachers import Nonfinite
from video_opd.models.vocabulary import Vocabulary
from video_opd.progress import log
from video_opd.serving.client import RemoteTeacher, bfloat16_or_float32
from video_opd.serving.limits import token_bytes
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


def check_served_teacher(recipe: Recipe, student: str | Path) -> None:
    """Raises :class:`UserError`, before any weights are loaded, for servers of ``teacher.urls`` that
    :func:`connect_teacher` would refuse, and for responses that are too long for their replies. ``student``
    is its folder, or its adapter's."""
    base = base_of(student)
    form = read_model_configs(base), load_processor(base)
    distributions = recipe.computes_distributions
    _, found = check_servers(recipe.teacher, form, distributions=distributions)
    if distributions:
        _check_longest_reply(recipe, found, Vocabulary.of(*form).size)


def _check_longest_reply(recipe: Recipe, found: Described, vocabulary: int) -> None:
    """Raises :class:`UserError` if the distributions of a single response may be more than a reply holds."""
    teacher = recipe.teacher
    hidden = isinstance(teacher, DistillationTeacherConfig) and teacher.receive == "hidden"
    most = found.reply_bytes // token_bytes(vocabulary, full=not hidden, hidden=hidden)
    lengths: dict[str, int] = {}
    if isinstance(recipe, OnPolicyRecipe):
        lengths["sampling.max_new_tokens"] = recipe.sampling.max_new_tokens
    if recipe.measures_analytic_kl and recipe.evaluate.data:  # the failures are shown with the teacher's
        lengths["evaluate.max_new_tokens"] = recipe.evaluate.max_new_tokens
    for key, length in lengths.items():
        remedies = [] if hidden else ["teacher.receive to hidden"]
        if key.startswith("evaluate.") or not recipe.needs_distributions:
            remedies.append("run.analytic_kl to false")
        need(
            length <= most,
            f"{key} is {length}, and {teacher.urls[0]} gives whole distributions at no more than {most} "
            f"tokens of a response ({found.reply_bytes >> 20} MiB a reply): set "
            + ", or ".join([*remedies, f"{key} to at most {most}"]),
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
