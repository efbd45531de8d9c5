"""What a recipe will need before it is started: memory by part, time by stage, and what to change. No
torch."""

from __future__ import annotations

from video_opd.planning.plan import Plan, RecipeSizes, make_plan, teacher_placement

__all__ = ["Plan", "RecipeSizes", "make_plan", "teacher_placement"]
