"""What classical estimators make of the same examples: the yardsticks of Garg et al. (arXiv 2208.01066).

Shapes: P prompts, k examples, d dimensions.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Estimator = Callable[[], Any]
LASSO, RIDGE, NEIGHBOURS = 0.01, 0.1, 3


def estimators() -> Mapping[str, Estimator]:
    """The estimators of scikit-learn, by name. The linear ones have no intercept: the functions have none on
    average."""
    from sklearn.ensemble import GradientBoostingRegressor
    from sklearn.linear_model import Lasso, LinearRegression, Ridge
    from sklearn.neighbors import KNeighborsRegressor
    from sklearn.tree import DecisionTreeRegressor

    return {
        "least squares": lambda: LinearRegression(fit_intercept=False),
        "ridge": lambda: Ridge(RIDGE, fit_intercept=False),
        "lasso": lambda: Lasso(LASSO, fit_intercept=False, max_iter=10_000),
        "3 nearest": lambda: KNeighborsRegressor(NEIGHBOURS),
        "tree": lambda: DecisionTreeRegressor(random_state=0),
        "boosted trees": lambda: GradientBoostingRegressor(n_estimators=20, random_state=0),
    }


def zero(x: Float[Tensor, "P n d"], y: Float[Tensor, "P n"]) -> Float[Tensor, " P"]:
    """0 for every query."""
    return torch.zeros(len(x))


def averaging(x: Float[Tensor, "P n d"], y: Float[Tensor, "P n"]) -> Float[Tensor, " P"]:
    """w = mean of y_i x_i: least squares as if the points were orthogonal."""
    if x.shape[1] < 2:
        return zero(x, y)
    w = (x[:, :-1] * y[:, :-1, None]).mean(1)
    return (w * x[:, -1]).sum(-1)


def estimated(name: str, x: Float[Tensor, "P n d"], y: Float[Tensor, "P n"]) -> Float[Tensor, " P"]:
    """An estimator's prediction at each prompt's last point, from the pairs before it (0 from too few)."""
    make, least = estimators()[name], NEIGHBOURS if name == "3 nearest" else 1
    if x.shape[1] - 1 < least:
        return zero(x, y)
    out = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lasso on two points need not converge
        for points, values in zip(x.double().numpy(), y.double().numpy(), strict=True):
            out.append(make().fit(points[:-1], values[:-1]).predict(points[-1:])[0])
    return torch.from_numpy(np.array(out)).float()


def references(x: Float[Tensor, "P n d"], y: Float[Tensor, "P n"]) -> dict[str, Float[Tensor, " P"]]:
    """Every yardstick's predictions."""
    found = {"zero": zero(x, y), "averaging": averaging(x, y)}
    return found | {name: estimated(name, x, y) for name in estimators()}
