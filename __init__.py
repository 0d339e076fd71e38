"""trainstep: a pluggable catalogue of training strategies for Keras on TensorFlow.

trainstep.apply(model, {"gradient_accumulation": {"steps": 4}, "gradient_clipping": {}})
model.compile(...)
model.fit(...)
"""

from typing import TYPE_CHECKING, Any

from trainstep import errors, models, strategies
from trainstep.batch_norm import reestimate_batch_norm
from trainstep.composition import applied, apply, model_class, remove
from trainstep.declaration import Cost, Declaration, Report, Slot, Stage, StrategyOptions
from trainstep.plan import Plan, describe, plan
from trainstep.registry import get, names, register
from trainstep.step import Batch, Evaluation, Objective, Strategy, Update

if TYPE_CHECKING:
    from trainstep.benchmarks.compare import compare
    from trainstep.benchmarks.comparison import Comparison
    from trainstep.robustness import Robustness, evaluate_robustness

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "Comparison",
    "Cost",
    "Declaration",
    "Evaluation",
    "Objective",
    "Plan",
    "Report",
    "Robustness",
    "Slot",
    "Stage",
    "Strategy",
    "StrategyOptions",
    "Update",
    "applied",
    "apply",
    "compare",
    "describe",
    "errors",
    "evaluate_robustness",
    "get",
    "model_class",
    "models",
    "names",
    "plan",
    "reestimate_batch_norm",
    "register",
    "remove",
    "strategies",
]


def __getattr__(name: str) -> Any:
    # Only who compares pays for the import of plots and tables.
    if name == "compare":
        from trainstep.benchmarks.compare import compare

        return compare
    if name == "Comparison":
        from trainstep.benchmarks.comparison import Comparison

        return Comparison
    if name in ("Robustness", "evaluate_robustness"):
        from trainstep import robustness

        return getattr(robustness, name)
    raise AttributeError(f"module 'trainstep' has no attribute {name!r}")
