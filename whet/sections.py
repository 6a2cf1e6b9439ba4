"""The sections of a recipe, and the classes that define the settings of each."""

from __future__ import annotations

from whet.data.config import Data
from whet.engine.config import Base, Model
from whet.methods.all import METHODS
from whet.settings import Eval, Train

# Of `method` all classes; the name of the method in a recipe says which one applies.
SECTION_CLASSES: dict[str, tuple[type, ...]] = {
    "model": (Model,), "base": (Base,), "method": tuple(dict.fromkeys(METHODS.values())), "data": (Data,),
    "train": (Train,), "eval": (Eval,),
}  # fmt: skip
SECTIONS = tuple(SECTION_CLASSES)
