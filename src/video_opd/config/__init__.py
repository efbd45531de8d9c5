"""The settings of a run: what a recipe file may say, with the paper's values as defaults.

``sections.py`` holds the sections that all methods share, ``method_sections.py`` those that depend on the
method, and ``recipe.py`` a class of recipe for each method. ``largest_video.py`` computes what a video budget
allows.
Unknown keys, wrong types and settings that contradict each other are a
:class:`~video_opd.errors.UserError` here, before anything is loaded. No torch.

Example::

    recipe = load_recipe("recipes/tiny/video-opd.yaml", ["--optim.lr", "3e-4", "--run.seed", "1"])
    recipe.optim.lr  # 0.0003
    recipe.changed(**{"model.path": "runs/a/model"})  # a checked copy
"""

from video_opd.config.method_sections import (
    DistillationTeacherConfig,
    GRPOLossConfig,
    GRPOSamplingConfig,
    LossConfig,
    OnPolicySamplingConfig,
    RewardConfig,
    SamplingConfig,
    SurrogateLossConfig,
    TeacherConfig,
    VideoOPDLossConfig,
)
from video_opd.config.recipe import (
    METHODS,
    WITH_TEACHER,
    DistillationRecipe,
    GRPORecipe,
    MethodName,
    OffPolicyRecipe,
    OnPolicyRecipe,
    OPFKDRecipe,
    OPRKDRecipe,
    Recipe,
    SFTRecipe,
    VideoOPDRecipe,
    dump_recipe,
    load_recipe,
    recipe_from_dict,
)
from video_opd.config.sections import (
    DataConfig,
    Dtype,
    EvaluateConfig,
    LoraConfig,
    ModelConfig,
    ModelPart,
    OptimConfig,
    PromptConfig,
    Quantization,
    RoundsConfig,
    RunConfig,
    SelectionConfig,
    TVDFConfig,
    VideoConfig,
    VideoForm,
    VLLMConfig,
)
from video_opd.config.settings import Settings, read_settings

__all__ = [
    "METHODS",
    "WITH_TEACHER",
    "DataConfig",
    "DistillationRecipe",
    "DistillationTeacherConfig",
    "Dtype",
    "EvaluateConfig",
    "GRPOLossConfig",
    "GRPORecipe",
    "GRPOSamplingConfig",
    "LoraConfig",
    "LossConfig",
    "MethodName",
    "ModelConfig",
    "ModelPart",
    "OPFKDRecipe",
    "OPRKDRecipe",
    "OffPolicyRecipe",
    "OnPolicyRecipe",
    "OnPolicySamplingConfig",
    "OptimConfig",
    "PromptConfig",
    "Quantization",
    "Recipe",
    "RewardConfig",
    "RoundsConfig",
    "RunConfig",
    "SFTRecipe",
    "SamplingConfig",
    "SelectionConfig",
    "Settings",
    "SurrogateLossConfig",
    "TVDFConfig",
    "TeacherConfig",
    "VLLMConfig",
    "VideoConfig",
    "VideoForm",
    "VideoOPDLossConfig",
    "VideoOPDRecipe",
    "dump_recipe",
    "load_recipe",
    "read_settings",
    "recipe_from_dict",
]
