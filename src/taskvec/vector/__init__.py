"""Task vectors as plain data: ops, places, edits, origins, folders. Nothing here knows a model."""

from taskvec.vector.edits import LAST_PROMPT, Edit, Where
from taskvec.vector.ops import OPS, Add, AddKeepNorm, Affine, Blend, Op, Replace
from taskvec.vector.origin import Cost, ModelId, Origin
from taskvec.vector.task_vector import Adapted, Predictor, TaskVector, VectorSource

__all__ = [
    "LAST_PROMPT",
    "OPS",
    "Adapted",
    "Add",
    "AddKeepNorm",
    "Affine",
    "Blend",
    "Cost",
    "Edit",
    "ModelId",
    "Op",
    "Origin",
    "Predictor",
    "Replace",
    "TaskVector",
    "VectorSource",
    "Where",
]
