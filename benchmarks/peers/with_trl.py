"""TRL's GRPOTrainer on the tiny model: ``with_trl.py SETTINGS.json RECORD.json``, in TRL's own environment.

It takes no video (its trainer hands on images alone), so a prompt shows the first frame of every pair that
the others are shown as a video: as many tokens, half as many frames, and no times between them.
"""

from __future__ import annotations

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import reward
import torch
import transformers
import trl
from datasets import Dataset, Image, List, load_dataset
from measure import Measure, Tokens, read_settings, write_record
from transformers import TrainerCallback


def rows_of(path: str) -> Dataset:
    """Conversations, and images that are read from their files when a row is taken."""
    return load_dataset("json", data_files=path, split="train").cast_column("images", List(Image()))


class Loaded(TrainerCallback):
    def __init__(self, measure: Measure) -> None:
        self.measure = measure

    def on_train_begin(self, args, state, control, model=None, processing_class=None, **_):  # type: ignore[no-untyped-def]
        config = model.config
        Tokens(
            self.measure,
            model,
            processing_class.tokenizer.pad_token_id,
            (config.image_token_id, config.video_token_id),
        )
        self.measure.loaded(model)


def main(settings_path: str, record_path: str) -> None:
    asked = read_settings(settings_path)
    assert asked["method"] == "grpo"
    torch.set_num_threads(asked["threads"])
    answers = asked["prompts"] * asked["rollouts"]
    measure = Measure(asked["warmup"])
    trainer = trl.GRPOTrainer(
        model=asked["model"],
        reward_funcs=reward.of_completions,
        args=trl.GRPOConfig(
            output_dir=asked["folder"],
            model_init_kwargs={"dtype": "float32"},
            per_device_train_batch_size=asked["answers_at_once"],
            gradient_accumulation_steps=answers // asked["answers_at_once"],
            num_generations=asked["rollouts"],
            max_completion_length=asked["tokens"],
            max_steps=asked["steps"],
            learning_rate=asked["lr"],
            lr_scheduler_type="constant",
            optim="adamw_torch",
            weight_decay=0.0,
            max_grad_norm=1.0,
            beta=0.0,
            num_iterations=1,
            loss_type="grpo",
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            shuffle_dataset=False,
            seed=asked["seed"],
            save_strategy="no",
            eval_strategy="no",
            report_to="none",
            logging_steps=1,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=rows_of(asked["rows"]),
        callbacks=[Loaded(measure)],
    )
    trainer.train()
    write_record(
        record_path,
        measure.record(framework=f"TRL {trl.__version__}", transformers=transformers.__version__),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
