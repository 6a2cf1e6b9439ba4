"""Metrics of the caller's own: a function of predictions and references, asked for base and tuned alike.

It has no rows, so its difference has no interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from whet.base.errors import UserError

# From predictions and references in the same order (texts, names of labels or values) to numbers by name.
ComputeMetrics = Callable[[Sequence[Any], Sequence[Any]], Mapping[str, float]]


def with_custom(
    result: dict[str, Any], compute: ComputeMetrics | None, sides: Mapping[str, Sequence[Any]],
    references: Sequence[Any],
) -> dict[str, Any]:  # fmt: skip
    """The evaluation with the caller's metrics among those of each side. Raises UserError for what is no number."""
    if compute is None:
        return result
    for side, predictions in sides.items():
        for name, value in dict(compute(list(predictions), list(references))).items():
            if name in result[side]["metrics"]:
                raise UserError(
                    "a metric of this name is there already",
                    field="compute_metrics",
                    found=name,
                    fix="name it otherwise",
                )
            if isinstance(value, bool) or not _is_finite(value):
                raise UserError(
                    "a metric is a finite number", field="compute_metrics", found=f"{name}: {value!r}",
                    expected="a float", fix="return numbers alone",
                )  # fmt: skip
            result[side]["metrics"][name] = float(value)
    return result


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False
