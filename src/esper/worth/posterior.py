"""Bayesian linear regression with a normal-inverse-gamma posterior (Murphy 2012, section 7.6.3).

    y = x @ w + noise,   noise ~ N(0, s2),   w | s2 ~ N(0, s2 / precision),   s2 ~ InverseGamma(shape, rate)

Several targets may share the features: each has weights and a noise of its own. Draws from the posterior are what
Thompson sampling acts on (Agrawal & Goyal 2013, arXiv:1209.3352).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from esper.errors import ConfigError, StateError

Floats = npt.NDArray[np.float64]


class LinearPosterior:
    """What is known of the weights after the rows seen so far.

    Parameters
    ----------
    precision:
        ``(D,)`` positive: prior precision of each weight, in units of the noise's.
    num_targets:
        Values observed a row.
    shape, rate:
        Of the prior over the noise variance; its mean is ``rate / (shape - 1)`` for a shape above 1.

    Raises
    ------
    ConfigError
        For values that make no prior.
    """

    def __init__(
        self, precision: npt.ArrayLike, *, num_targets: int = 1, shape: float = 2.0, rate: float = 1.0
    ) -> None:
        prior = np.array(precision, dtype=np.float64)
        if prior.ndim != 1 or not prior.size or not (np.isfinite(prior) & (prior > 0)).all():
            raise ConfigError(f"a prior precision must be a vector of positive numbers, got {prior}; use ones")
        if num_targets < 1 or not shape > 0 or not rate > 0:
            raise ConfigError(
                f"num_targets, shape and rate must be positive, got {num_targets}, {shape} and {rate}; use 1, 2 and 1"
            )
        self._prior_shape, self._prior_rate = float(shape), float(rate)
        self._precision = np.diag(prior)
        self._moment = np.zeros((prior.size, num_targets))
        self._squares = np.zeros(num_targets)
        self.num_rows = 0
        self._factor: Floats | None = None

    @property
    def num_features(self) -> int:
        """D."""
        return self._precision.shape[0]

    @property
    def num_targets(self) -> int:
        """K."""
        return self._moment.shape[1]

    def update(self, x: npt.ArrayLike, y: npt.ArrayLike) -> None:
        """See further rows, ``x (N, D)`` and ``y (N, K)``, in any order and any portions.

        Raises
        ------
        ConfigError
            Shapes that do not fit, or numbers that are not finite: an unknown value has no place here.
        """
        rows, seen = np.atleast_2d(np.asarray(x, np.float64)), np.atleast_2d(np.asarray(y, np.float64))
        if rows.shape[1] != self.num_features or seen.shape != (rows.shape[0], self.num_targets):
            raise ConfigError(
                f"rows must be (N, {self.num_features}) with values (N, {self.num_targets}), got {rows.shape} and "
                f"{seen.shape}; encode them for this posterior"
            )
        if not (np.isfinite(rows).all() and np.isfinite(seen).all()):
            raise ConfigError("rows and values must be finite, got NaN or infinity; mark the unknown by a feature")
        self._precision = self._precision + rows.T @ rows
        self._moment = self._moment + rows.T @ seen
        self._squares = self._squares + np.square(seen).sum(axis=0)
        self.num_rows += rows.shape[0]
        self._factor = None

    @property
    def mean(self) -> Floats:
        """Posterior mean of the weights, ``(D, K)``."""
        factor = self._cholesky()
        return np.asarray(np.linalg.solve(factor.T, np.linalg.solve(factor, self._moment)), np.float64)

    @property
    def shape(self) -> float:
        """Of the posterior over the noise variance."""
        return self._prior_shape + self.num_rows / 2

    @property
    def rate(self) -> Floats:
        """Of the posterior over the noise variance, ``(K,)``."""
        explained = np.einsum("dk,dk->k", self.mean, self._moment)
        # rounding may leave a hair below zero where the fit is perfect
        return self._prior_rate + np.maximum(0.0, self._squares - explained) / 2

    def predict(self, x: npt.ArrayLike) -> tuple[Floats, Floats]:
        """Mean and standard deviation of ``x @ w``, each ``(N, K)``: what is not known of the weights, without noise.

        The marginal is Student's t with ``2 * shape`` degrees of freedom; the deviation is infinite for a shape of at
        most 1.
        """
        rows = np.atleast_2d(np.asarray(x, np.float64))
        leverage = np.square(np.linalg.solve(self._cholesky(), rows.T)).sum(axis=0)
        if self.shape <= 1:
            return rows @ self.mean, np.full((rows.shape[0], self.num_targets), np.inf)
        variance = leverage[:, None] * self.rate / (self.shape - 1)
        return rows @ self.mean, np.sqrt(variance)

    def sample(self, rng: np.random.Generator) -> Floats:
        """One draw of the weights, ``(D, K)``."""
        variance = self.rate / rng.gamma(self.shape, size=self.num_targets)
        noise = rng.standard_normal(self._moment.shape)
        return self.mean + np.sqrt(variance) * np.linalg.solve(self._cholesky().T, noise)

    def state(self) -> dict[str, Any]:
        """All of it as JSON-ready plain values."""
        return {
            "precision": self._precision.tolist(), "moment": self._moment.tolist(), "squares": self._squares.tolist(),
            "num_rows": self.num_rows, "prior": [self._prior_shape, self._prior_rate],
        }  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` has told.

        Raises
        ------
        StateError
            It is no state of a posterior over as many features and targets; nothing was changed.
        """
        try:
            parts = [np.array(state[name], dtype=np.float64) for name in ("precision", "moment", "squares")]
            num_rows, (shape, rate) = int(state["num_rows"]), map(float, state["prior"])
        except (KeyError, TypeError, ValueError) as error:
            raise StateError(f"a posterior's state must be what state() returned, got {error!r}; begin anew") from error
        wanted = [self._precision.shape, self._moment.shape, self._squares.shape]
        if [part.shape for part in parts] != wanted or not all(np.isfinite(part).all() for part in parts):
            raise StateError(
                f"a posterior's state must have the shapes {wanted} and finite numbers, got "
                f"{[part.shape for part in parts]}; it is of another version, begin anew"
            )
        self._precision, self._moment, self._squares = parts
        self.num_rows, self._prior_shape, self._prior_rate = num_rows, shape, rate
        self._factor = None

    def _cholesky(self) -> Floats:
        """Lower factor of the precision, made once after each update."""
        if self._factor is None:
            self._factor = np.asarray(np.linalg.cholesky(self._precision), np.float64)
        return self._factor
