"""Builds a small tokenizer with Qwen3-VL's special tokens, splitting pattern and chat template.

It is a byte-level BPE, so that it encodes any text without loss. Its merges are learnt from the world's own
sentences. A digit is one token, as in Qwen3-VL. The fixed phrases of the grounding prompt (figure 7) are one
token each, because a tiny model should not spend its time on a paragraph that never changes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Qwen3 keeps these as added tokens that are not special: they are text, but always one token.
PLAIN_TOKENS = ("<think>", "</think>")
PHRASES = (
    "You are a video analysis expert.",
    "To accurately pinpoint the event “",
    "” in the video, determine the precise time period of the event. Provide the start and end times "
    "(in seconds, precise to two decimal places) in the format “start time to end time”. For example: "
    "“12.54 to 17.83”.",
)
# The pre-tokenizer of Qwen2 and Qwen3. It makes every digit a token of its own.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The structure of Qwen3-VL's template: system, the user's content in its order, generation prompt.
CHAT_TEMPLATE = """{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}{{- message.content -}}
{%- else -%}
{%- for item in message.content -%}
{%- if item.type == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif item.type == 'video' -%}{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif item.type == 'text' -%}{{- item.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""


@functools.lru_cache(maxsize=1)
def _learnt(sentences: tuple[str, ...], vocab_size: int) -> str:
    """The tokenizer as JSON: reading it takes a hundredth of the time that learning the merges takes."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    core.train_from_iterator(sentences, trainer)
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    core.add_tokens([AddedToken(t, special=False, normalized=False) for t in (*PLAIN_TOKENS, *PHRASES)])
    return core.to_str()


def build_tokenizer(sentences: Iterable[str], vocab_size: int = 640) -> PreTrainedTokenizerFast:
    """Learns the merges from ``sentences``. The same sentences in the same order give the same tokenizer,
    a new object each time."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_learnt(tuple(sentences), vocab_size)),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
