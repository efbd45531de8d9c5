"""``video-opd predict``: a model's responses to every row of a data file."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from video_opd.cli.arguments import PROTOCOLS, add_shared, check_engine, positive
from video_opd.cli.output import print_json
from video_opd.cli.parser import MODEL_SETTINGS, VLLM_SETTINGS, Parser
from video_opd.progress import is_first_process
from video_opd.terminal import print_line

if TYPE_CHECKING:
    from video_opd.evaluation.predict import GenerationSettings, PredictResult
    from video_opd.models.inference import InferenceConfig, InferenceModel, VLLMModel
    from video_opd.processes import Processes
    from video_opd.types import Sample

HELP = "a model's responses to every row of a data file; repeated, it continues"
EXAMPLE = "video-opd predict runs/a/model data/test.jsonl --out runs/a/eval/predictions.jsonl"
SETTINGS = (*MODEL_SETTINGS, *VLLM_SETTINGS)


def add_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a model folder")
    parser.add_argument("data", reads="file", metavar="DATA", help="a data file (JSON Lines)")
    parser.add_argument("--out", writes="file", required=True, metavar="P.jsonl", help="the predictions file")
    parser.add_argument("--n", type=positive, default=1, metavar="K", help="responses a row; default: 1")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default): greedy")
    add_shared(parser, "--engine")
    parser.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        help="decides the prompt and the length of responses; default: the prompt the model was trained with",
    )
    add_shared(parser, "--device")
    add_shared(parser, "--max-new-tokens", default=None, help="default: the protocol's")
    add_shared(parser, "--seed", "--overwrite", "--batch-size", "--video-root", "--workers", "--json")


def run(arguments: argparse.Namespace) -> None:
    from video_opd.data.annotations import read_samples
    from video_opd.evaluation.protocols import get_protocol
    from video_opd.locks import locked_file
    from video_opd.models.inference import load_inference_model, load_vllm_model, read_inference_config
    from video_opd.processes import Processes

    check_engine(arguments.engine, arguments.overrides)
    samples = read_samples(arguments.data, arguments.video_root)
    protocol = None if arguments.protocol is None else get_protocol(arguments.protocol)
    config = read_inference_config(arguments.model, arguments.overrides, protocol, arguments.device)
    settings = response_settings(arguments, config, n=arguments.n, temperature=arguments.temperature)
    processes = Processes.of_environment()
    with locked_file(arguments.out, processes):  # before the model is loaded
        load = load_vllm_model if arguments.engine == "vllm" else load_inference_model
        model = load(config, arguments.device)
        result = respond(arguments, model, samples, arguments.out, settings, processes)
    if not is_first_process():
        return
    if arguments.json:
        print_json({**asdict(result), "out": arguments.out})
    else:
        print_line(f"{arguments.out}: {result.kept + result.answered} of {len(samples)} rows answered")


def response_settings(
    arguments: argparse.Namespace, config: InferenceConfig, *, n: int = 1, temperature: float = 0.0
) -> GenerationSettings:
    """The length of responses is that of ``--max-new-tokens``, or that of the protocol of the prompt."""
    from video_opd.evaluation.predict import GenerationSettings, response_length
    from video_opd.evaluation.protocols import PROTOCOLS, protocol_of

    protocol, thinking = protocol_of(config.prompt.style) or PROTOCOLS["paper"], config.prompt.thinking
    return GenerationSettings(
        n=n,
        temperature=temperature,
        max_new_tokens=response_length(arguments.max_new_tokens, protocol.max_new_tokens, thinking=thinking),
        seed=arguments.seed,
        thinking=thinking,
    )


def respond(
    arguments: argparse.Namespace,
    model: InferenceModel | VLLMModel,
    samples: list[Sample],
    out: str,
    settings: GenerationSettings,
    processes: Processes | None = None,
) -> PredictResult:
    """Lets the model answer the samples whose rows are not in ``out`` yet."""
    from video_opd.evaluation.predict import predict

    return predict(
        model.policy,
        samples,
        replace(model, workers=arguments.workers).prompts,
        out,
        provenance=model.provenance(),
        settings=settings,
        batch_size=arguments.batch_size,
        overwrite=arguments.overwrite,
        processes=processes,
    )
