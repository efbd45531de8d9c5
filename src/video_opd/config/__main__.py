"""``python -m video_opd.config > recipes/schema.json``: the JSON Schema of a recipe, for editors."""

import json

from video_opd.config.recipe import ANY_RECIPE


def schema() -> str:
    """The schema as indented JSON, ended by a newline."""
    return json.dumps(ANY_RECIPE.json_schema(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    print(schema(), end="")
