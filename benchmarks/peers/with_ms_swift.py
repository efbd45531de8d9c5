"""ms-swift's GRPO, GKD and OPD-RL on the tiny model: ``with_ms_swift.py SETTINGS.json RECORD.json``.

In ms-swift's own environment, through ``swift rlhf``'s own pipeline and arguments. OPD-RL is what ms-swift
calls GRPO with a teacher and no reward: the advantage of a sampled token is the teacher's log-prob less the
student's, which is what Video-OPD optimises; GKD compares whole distributions.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from typing import Any

from measure import Measure, Tokens, read_settings, write_record

REWARD, CALLBACK, TEMPLATE = "peers_reward", "peers_measure", "peers_qwen3_vl"


def arguments(asked: dict[str, Any]) -> list[str]:
    """Returns the arguments of ``swift rlhf``."""
    method, answers = asked["method"], asked["prompts"] * asked["rollouts"]
    given: dict[str, Any] = {
        "rlhf_type": "gkd" if method == "gkd" else "grpo",
        "model": asked["model"],
        "model_type": "qwen3_vl",
        "template": TEMPLATE,
        "torch_dtype": "float32",
        "bf16": "false",
        "fp16": "false",
        "use_cpu": "true",
        "attn_impl": "sdpa",
        "tuner_type": "full",
        "freeze_vit": "false",
        "freeze_aligner": "false",
        "freeze_llm": "false",
        "dataset": asked["rows"],
        "dataset_shuffle": "false",
        "train_dataloader_shuffle": "false",
        "max_length": "4096",
        "use_vllm": "false",
        "max_completion_length": asked["tokens"],
        "temperature": "1.0",
        "top_p": "1.0",
        "per_device_train_batch_size": asked["answers_at_once"],
        "gradient_accumulation_steps": answers // asked["answers_at_once"],
        "max_steps": asked["steps"],
        "learning_rate": asked["lr"],
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "weight_decay": "0",
        "max_grad_norm": "1.0",
        "gradient_checkpointing": "false",
        "vit_gradient_checkpointing": "false",
        "dataloader_num_workers": "0",
        "seed": asked["seed"],
        "output_dir": asked["folder"],
        "add_version": "false",
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "logging_steps": "1",
        "callbacks": CALLBACK,
    }
    teacher = {"teacher_model": asked["teacher"], "teacher_model_type": "qwen3_vl"}
    if method == "grpo":
        given |= {"num_generations": asked["rollouts"], "beta": "0", "reward_funcs": REWARD}
    elif method == "opd-rl":
        given |= {"num_generations": "1", "beta": "0", **teacher}
    else:
        # lmbda 1: every response is the student's own; beta 1: the reverse KL, over the whole vocabulary
        given |= {"lmbda": "1", "beta": "1", **teacher}
    return [word for key, value in given.items() for word in (f"--{key}", str(value))]


def register(model: str, measure: Measure) -> None:
    """Makes the reward, the callback and the template known to ms-swift, by its own registries.

    Its template for Qwen3-VL has the published models' numbers of the image and video tokens written into it;
    the tiny models have others.
    """
    import reward
    from swift.callbacks import TrainerCallback, callbacks_map
    from swift.rewards import ORM, orms
    from swift.template import TEMPLATE_MAPPING, register_template
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    known = TEMPLATE_MAPPING["qwen3_vl"]

    class Template(known.template_cls):  # type: ignore[name-defined, misc]
        image_token_id = config.image_token_id
        video_token_id = config.video_token_id

    class Reward(ORM):
        def __call__(self, completions: list[Any], **_: Any) -> list[float]:
            return reward.of_completions(completions)

    class Loaded(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            teacher = getattr(self.trainer, "teacher_model", None)
            pad = self.trainer.template.tokenizer.pad_token_id
            Tokens(measure, model, pad, (config.image_token_id, config.video_token_id))
            measure.loaded(model, *([] if teacher is None else [teacher]))

    register_template(replace(known, template_type=TEMPLATE, template_cls=Template))
    orms[REWARD] = Reward
    callbacks_map[CALLBACK] = Loaded


def main(settings_path: str, record_path: str) -> None:
    asked = read_settings(settings_path)
    shutil.rmtree(asked["folder"], ignore_errors=True)
    # Before the import: nothing is asked of a hub, and a frame keeps the size that its file has.
    os.environ |= {"HF_HUB_OFFLINE": "1", "USE_HF": "1", "CUDA_VISIBLE_DEVICES": ""}
    os.environ |= {
        "FPS": str(asked["fps"]),
        "VIDEO_MIN_TOKEN_NUM": str(asked["frame_tokens"]),
        "VIDEO_MAX_TOKEN_NUM": str(asked["frame_tokens"]),
    }

    import swift
    import torch
    import transformers
    from swift.pipelines import rlhf_main

    measure = Measure(asked["warmup"])
    register(asked["model"], measure)
    torch.set_num_threads(asked["threads"])
    rlhf_main(arguments(asked))
    record = measure.record(framework=f"ms-swift {swift.__version__}", transformers=transformers.__version__)
    write_record(record_path, record)


if __name__ == "__main__":
    main(*sys.argv[1:])
