"""The algorithms by name: each module has ``play``, which makes a rollout, and ``update``, which learns from it."""

from __future__ import annotations

from types import ModuleType

from . import dpo, grpo, ppo, supervised
from .learning import Recipe

SUPERVISED = "supervised"

RECIPES: dict[str, Recipe] = {
    "ppo": ppo.PPORecipe(),
    **grpo.VARIANTS,
    "dpo": dpo.DPORecipe(),
    SUPERVISED: supervised.SupervisedRecipe(),
}
MODULES: dict[str, ModuleType] = {
    name: {ppo.PPORecipe: ppo, grpo.GRPORecipe: grpo, dpo.DPORecipe: dpo}.get(type(recipe), supervised)
    for name, recipe in RECIPES.items()
}
