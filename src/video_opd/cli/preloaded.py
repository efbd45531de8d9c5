"""What commands import, all of it. The process that commands are forked from imports this module."""

# ruff: noqa: E402, F401
import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as every command does, before torch is imported
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's; it starts them when it is imported
# Container images often forbid bytecode, and torch and transformers would be compiled again each time.
sys.dont_write_bytecode = False

import av
import transformers
from transformers.models.qwen3_vl import modeling_qwen3_vl

import video_opd.evaluation.comparison
import video_opd.reports.html
import video_opd.training.rounds
from video_opd.cli import commands

transformers.AutoProcessor, transformers.AutoTokenizer  # noqa: B018 (they import when they are asked)
