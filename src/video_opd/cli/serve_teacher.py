"""``video-opd serve-teacher``: a frozen teacher for runs in other processes."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from video_opd.cli.arguments import add_shared, check_engine, positive
from video_opd.cli.parser import VLLM_SETTINGS, Parser
from video_opd.errors import UserError
from video_opd.files import read_text

HELP = "score the tokens that students write, for runs that name this server in teacher.urls"
EXAMPLE = "video-opd serve-teacher models/teacher --port 8400 --root /data/videos"
SETTINGS = VLLM_SETTINGS


def add_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help="the teacher's folder")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at; default: this machine alone (%(default)s)"
    )
    parser.add_argument("--port", type=int, default=8400, metavar="N", help="0: a free one; default: 8400")
    parser.add_argument(
        "--root", type=Path, action="append", default=[], metavar="DIR",
        help="a folder whose videos runs may name instead of sending frames; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--token-file", metavar="FILE",
        help="holds the token that clients must give; default: the variable VIDEO_OPD_TOKEN",
    )  # fmt: skip
    parser.add_argument(
        "--tls-certificate", type=Path, metavar="PEM", help="answer over TLS, with this chain"
    )
    parser.add_argument("--tls-key", type=Path, metavar="PEM", help="its private key")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"),
        help="of weights and computation; default: bfloat16 on a GPU, float32 elsewhere",
    )  # fmt: skip
    parser.add_argument(
        "--quantization", choices=("int8", "float8"), help="hold linear layers in 8 bits (torchao)"
    )
    add_shared(parser, "--device", "--engine")
    add_shared(parser, "--batch-size", help="prompts of waiting requests that are scored at once; default: 8")
    parser.add_argument("--cache-dir", metavar="DIR", help="keep decoded clips there, up to 20 GiB")
    parser.add_argument(
        "--max-body-mib", type=positive, default=512, metavar="N", help="of a request; default: %(default)s"
    )
    parser.add_argument(
        "--max-in-flight", type=positive, default=64, metavar="N",
        help="requests at a time; others are told to come back; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--timeout-s", type=positive, default=600, metavar="S", help="for scoring a request; default: 600"
    )


def run(arguments: argparse.Namespace) -> None:
    from video_opd.serving.address import Address, check_address
    from video_opd.serving.requirements import check_requirements

    token = _token(arguments.token_file)
    address = Address(
        host=arguments.host,
        port=arguments.port,
        certificate=arguments.tls_certificate,
        key=arguments.tls_key,
    )
    check_engine(arguments.engine, arguments.overrides)
    check_address(address, token)  # before torch is imported
    for root in arguments.root:
        if not root.is_dir():
            raise UserError(f"--root {root}: no such folder")
    check_requirements()
    from video_opd.config import VLLMConfig, read_settings
    from video_opd.config.tree import apply_overrides
    from video_opd.serving.app import ServiceSettings
    from video_opd.serving.limits import Limits
    from video_opd.serving.serve import serve

    sections = apply_overrides({}, arguments.overrides)
    serve(
        arguments.model,
        address,
        ServiceSettings(token=token, in_flight=arguments.max_in_flight, score_s=float(arguments.timeout_s)),
        limits=Limits(body_bytes=arguments.max_body_mib << 20),
        roots=arguments.root,
        dtype=arguments.dtype,
        quantization=arguments.quantization,
        device=arguments.device,
        engine=arguments.engine,
        vllm=read_settings(VLLMConfig, sections.get("vllm", {})),
        batch_size=arguments.batch_size,
        cache_dir=arguments.cache_dir,
    )


def _token(path: str | None) -> str | None:
    if path is None:
        return os.environ.get("VIDEO_OPD_TOKEN") or None
    try:
        token = read_text(path).strip()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; --token-file names the file with the token") from error
    if not token or not token.isascii() or any(c.isspace() for c in token):
        raise UserError(f"{path}: a token is one word of ASCII characters")
    return token
