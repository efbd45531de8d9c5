"""The ``README.md`` of a model folder: what the model is, in the form that hubs read.

The metadata at its top (YAML) are those of the Hugging Face Hub, so that the folder can be uploaded as it is.
Nothing in the card names a folder of this machine. Names that the card shows come from data files, paths and
records, so each is shown as the text that it is, whatever Markdown, HTML or YAML it holds.
"""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import video_opd
from video_opd.config import Recipe
from video_opd.config.tree import NOT_FOLDED, dump_yaml
from video_opd.evaluation.notes import deviation_lines, protocol_line
from video_opd.evaluation.rows import METRICS
from video_opd.models.checkpoint_files import is_hub_name
from video_opd.terminal import visible
from video_opd.training.run_folder import RunFolder, read_record
from video_opd.types import Sample

if TYPE_CHECKING:
    from jinja2 import Environment

OURS = "this model"
METHODS = {
    "video-opd": "Video-OPD, on-policy distillation: the student samples responses to its training queries, "
    "and every token is rewarded by how much likelier the teacher finds it than the student.",
    "grpo": "GRPO: the student samples a group of responses to each query, and learns from how much better "
    "than its group each response's reward is.",
    "sft": "Supervised fine-tuning on the annotated spans.",
    "op-rkd": "Off-policy distillation by the reverse KL: the teacher scores the annotated spans token by "
    "token.",
    "op-fkd": "Off-policy distillation by the forward KL: the student learns the teacher's distribution over "
    "the whole vocabulary at every token of the annotated spans.",
}
# Keys of a recipe that name folders of this machine and nothing about the model.
LOCAL = (
    ("run", "dir"),
    ("data", "cache_dir"),
    ("data", "video_root"),
    ("evaluate", "video_root"),
)


@functools.cache
def _environment() -> Environment:
    """The template engine, which compiles the template once."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("video_opd.training"),
        undefined=StrictUndefined,
        autoescape=False,  # the card is Markdown, and finalize escapes for that
        finalize=lambda value: value if isinstance(value, _AsItIs) else as_markdown(str(value)),
        keep_trailing_newline=True,
    )


def model_card(recipe: Recipe, folder: RunFolder, samples: Sequence[Sample]) -> str:
    """The text of the card, with the metrics of whatever ``eval/*.json`` of the run holds.

    ``samples`` are the rows that the run trained on.
    """
    sources = Counter(sample.source or Path(recipe.data.train).stem for sample in samples)
    evaluations = _evaluations(recipe, folder)
    name = _name(folder.path)
    base = public_name(recipe.model.path)
    title = f"{Path(base).name}-{recipe.method}"
    published = [source for source in sources if is_hub_name(source)]
    about = _metadata(title, recipe, published, evaluations)
    protocols = [record["protocol"] for record in evaluations if record["model"] == OURS]
    notes = [line for each in protocols for line in (protocol_line(each), *deviation_lines(each))]
    shown_recipe = _as_yaml(_public(recipe))
    longest = max(map(len, re.findall("`+", shown_recipe)), default=0)
    template = _environment().get_template("model_card.md.j2")
    return template.render(
        name=name,
        name_in_code=_AsItIs(visible(json.dumps(name, ensure_ascii=False))),
        title=title,
        metadata=_as_yaml(about),
        base=base,
        local_base=not is_hub_name(recipe.model.path),
        teacher=public_name(recipe.teacher.path) if recipe.teacher.path else recipe.teacher.fingerprint,
        method=METHODS[recipe.method],
        version=video_opd.__version__,
        data=dict(sources),
        local_data=len(published) < len(sources),
        steps=folder.last_metrics().get("step", 0),
        recipe=shown_recipe,
        fence=_AsItIs("`" * max(3, longest + 1)),
        metrics=METRICS,
        evaluations=evaluations,
        notes=list(dict.fromkeys(notes)),
    )


class _AsItIs(str):
    """A part of the card that is not escaped."""


def as_markdown(text: str) -> str:
    """``text`` as Markdown that shows it: nothing in it is markup, HTML, a link, or the end of a cell.

    Control characters and ends of lines become their escapes, as on a terminal.
    """
    text = re.sub(r"[\\`*_\[\]<>&|~#!$]", r"\\\g<0>", visible(text).strip())
    text = re.sub(r"^([-+=]|\d+(?=[.)](\s|$)))", _first_escaped, text)  # a list, or a heading
    return text.replace("://", ":\\//").replace("www.", "www\\.")


def _first_escaped(found: re.Match[str]) -> str:
    return f"\\{found.group()}" if found.group() in "-+=" else f"{found.group()}\\"


def _as_yaml(tree: Mapping[str, Any]) -> _AsItIs:
    """The tree with every text on a line of its own, so that none can end the block that it stands in."""
    return _AsItIs(dump_yaml(_shown(tree), width=NOT_FOLDED))


def _shown(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {_shown(key): _shown(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_shown(each) for each in value]
    return visible(value) if isinstance(value, str) else value


def public_name(path: str) -> str:
    """A name on a hub as it is; the name of a local folder without where it lies."""
    if not Path(path).exists():
        return path if not Path(path).is_absolute() else Path(path).name
    return _name(Path(path).parent) if Path(path).name == "model" else Path(path).name


def _name(run: Path) -> str:
    """The name of a run's folder; a round is named after the run, too."""
    run = Path(run).absolute()
    return f"{run.parent.name}-{run.name}" if run.name.startswith("round-") else run.name


def _public(recipe: Recipe) -> dict[str, Any]:
    """The recipe as a tree, without folders of this machine; files are named without where they lie."""
    tree = recipe.to_dict()
    for section, key in LOCAL:
        tree.get(section, {}).pop(key, None)
    return _named(tree)


def _named(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _named(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_named(each) for each in value]
    if not isinstance(value, str):
        return value
    path, colon, function = value.partition(":") if ".py:" in value else (value, "", "")
    return public_name(path) + colon + function if "/" in path or "\\" in path else value


def _evaluations(recipe: Recipe, folder: RunFolder) -> list[dict[str, Any]]:
    """The records of ``eval/MODEL-DATA.json``, each with ``model`` and ``data``; the run's own come first."""
    found = []
    for who in ("student", "base", "teacher"):
        for data in [Path(path).stem for path in recipe.evaluate.data]:
            path = folder.evaluations / f"{who}-{data}.json"
            if (record := read_record(path)) is not None and _is_whole(record):
                found.append({**record, "model": OURS if who == "student" else who, "data": data})
    return found


def _is_whole(record: Mapping[str, Any]) -> bool:
    """Whether a record has all that the card shows. The evaluation at the end of the run writes it anew."""
    try:
        protocol_line(record["protocol"]), deviation_lines(record["protocol"])
        numbers = [record["n"], *(record[metric] for metric in METRICS)]
        for metric in METRICS:
            low, high = record["ci95"][metric] or (0, 0)
            numbers += [low, high]
        return all(type(number) in (int, float) and abs(number) < 1e15 for number in numbers)
    except (KeyError, TypeError, ValueError, AttributeError):
        return False


def _metadata(
    name: str, recipe: Recipe, datasets: Sequence[str], evaluations: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """See https://huggingface.co/docs/hub/model-cards#model-card-metadata.

    A hub refuses a ``base_model`` or data set that is no ``owner/name``, so the metadata leave others out.
    """
    about: dict[str, Any] = {
        **({"base_model": recipe.model.path} if is_hub_name(recipe.model.path) else {}),
        "pipeline_tag": "video-text-to-text",
        "library_name": "transformers",
        "tags": list(dict.fromkeys(["video-opd", "temporal-grounding", recipe.method])),
        **({"datasets": list(datasets)} if datasets else {}),
    }
    results = [
        {
            "task": {"type": "video-text-to-text", "name": "Temporal grounding"},
            "dataset": {"type": record["data"], "name": record["data"]},
            "metrics": [
                {"type": metric, "name": metric, "value": round(record[metric], 2)} for metric in METRICS
            ],
        }
        for record in evaluations
        if record["model"] == OURS
    ]
    if results:
        about["model-index"] = [{"name": name, "results": results}]
    return about
