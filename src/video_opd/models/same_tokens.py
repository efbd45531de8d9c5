"""Whether a teacher can score what a student writes: the same tokens, pixels and prompts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from video_opd.data.prompts import STYLES, build_messages
from video_opd.errors import UserError
from video_opd.models.vocabulary import Configured, Vocabulary, eos_token_ids, vision_token_ids

if TYPE_CHECKING:
    from transformers import Qwen3VLProcessor

_QUERY = "a person opens “the door” at 3.5 s"


def check_same_tokens(
    student: tuple[Configured, Qwen3VLProcessor],
    teacher: tuple[Configured, Qwen3VLProcessor],
    *,
    other_template: bool = False,
) -> None:
    """Raise :class:`UserError` unless a teacher can score what a student writes, given the same inputs.

    Both arguments are ``(model, processor)``; a model's configs do as well. Compared are the ids of the
    student's tokens, the ids that stand for pixels, the end-of-sequence ids, the form of the pixels (patch
    sizes, normalisation), and the ids of what both chat templates make of our messages. ``other_template``
    leaves out the last.

    Not compared: the number of embedding rows, which is padded differently from one model size to the next,
    and tokens that only the teacher has, which no student writes.
    """
    (student_model, student_processor), (teacher_model, teacher_processor) = student, teacher
    mine, theirs = student_processor.tokenizer, teacher_processor.tokenizer
    for difference in _token_differences(mine, theirs):
        raise UserError(_mismatch(difference))
    size = Vocabulary.of(*student).size
    if (rows := teacher_model.config.text_config.vocab_size) < size:
        raise UserError(_mismatch(f"the teacher has {rows} embedding rows for {size} tokens"))
    known = set(mine.get_vocab().values())
    pairs = {
        "special tokens": tuple(_special_tokens(tokenizer, known) for tokenizer in (mine, theirs)),
        "vision token ids": (vision_token_ids(student_model), vision_token_ids(teacher_model)),
        "pixels": (_pixel_form(*student), _pixel_form(*teacher)),
    }
    for name, (of_student, of_teacher) in pairs.items():
        for key in sorted(of_student.keys() | of_teacher.keys()):
            a, b = of_student.get(key), of_teacher.get(key)
            if a != b:
                raise UserError(_mismatch(f"{name}: {key} is {a!r}, the teacher's {b!r}"))
    ends = eos_token_ids(*student), eos_token_ids(*teacher) & known
    if ends[0] != ends[1]:
        first = min(ends[0] ^ ends[1])
        token = mine.convert_ids_to_tokens(first)
        who, other, lacking = (
            ("student", "teacher", teacher_model)
            if first in ends[0]
            else ("teacher", "student", student_model)
        )
        raise UserError(
            f"student and teacher do not end a response alike: token {first} ({token!r}) ends one of the "
            f"{who}'s only (end-of-sequence ids {sorted(ends[0])}, the teacher's {sorted(ends[1])}); "
            + _end_remedy(other, lacking.generation_config, first)
        )
    if not other_template:
        _check_prompts(student_processor, teacher_processor)


def _end_remedy(who: str, settings: Any, token: int) -> str:
    """What to do about a model that does not end a response at ``token``."""
    if settings is None or getattr(settings, "_from_model_config", False):  # transformers made it up
        return f"the {who} has no generation_config.json: copy it from the checkpoint that it was made from"
    return f"add {token} to eos_token_id in the {who}'s generation_config.json"


def _check_prompts(student: Qwen3VLProcessor, teacher: Qwen3VLProcessor) -> None:
    """Raises for the first prompt of which the two make other ids."""
    for style in STYLES:
        for thinking in (False, True):
            messages = build_messages(_QUERY, style, thinking)
            (a_ids, a), (b_ids, b) = (_rendered(p, messages) for p in (student, teacher))
            if a_ids == b_ids:
                continue
            at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            raise UserError(
                f"student and teacher do not write a prompt alike: behind {a[max(0, at - 24) : at]!r} the "
                f"student's goes on with {a[at : at + 24]!r}, the teacher's with {b[at : at + 24]!r} (style "
                f"{style}); take a teacher with the same chat template, or set teacher.other_template: it "
                "then scores the student's prompts, which are not its own"
            )


def _rendered(processor: Qwen3VLProcessor, messages: list[dict[str, Any]]) -> tuple[list[int], str]:
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    return processor.tokenizer(text, add_special_tokens=False)["input_ids"], text


def _token_differences(student: Any, teacher: Any) -> Iterator[str]:
    """The student's ids that stand for another token, or none, in the teacher; the smallest comes first."""
    mine = {index: token for token, index in student.get_vocab().items()}
    theirs = {index: token for token, index in teacher.get_vocab().items()}
    for index in sorted(mine):
        if mine[index] != theirs.get(index):
            yield f"token {index} is {mine[index]!r}, the teacher's {theirs.get(index)!r}"


def _special_tokens(tokenizer: Any, known: set[int]) -> dict[str, Any]:
    return {
        f"added token {i}": (str(token), token.special)
        for i, token in tokenizer.added_tokens_decoder.items()
        if i in known
    }


def _pixel_form(model: Configured, processor: Qwen3VLProcessor) -> dict[str, Any]:
    """The form of the encoded pixels: a teacher is given those that the student's processor made."""
    vision, video = model.config.vision_config, processor.video_processor
    sizes = ("patch_size", "temporal_patch_size", "spatial_merge_size", "in_channels")
    steps = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "do_convert_rgb")
    form = {name: getattr(vision, name) for name in sizes}
    for name in steps:
        value = getattr(video, name, None)
        form[name] = list(value) if isinstance(value, (list, tuple)) else value
    return form


def _mismatch(what: str) -> str:
    return f"student and teacher do not share their tokens: {what}; use checkpoints of one tokenizer family"
