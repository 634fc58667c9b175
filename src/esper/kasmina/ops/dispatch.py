"""The one place that decides which implementation of an operation runs.

Every operation has a plain PyTorch reference and a twin in Triton. Tensors on a GPU take the twin once it has built
there and agreed with the reference on a small problem; all others take the reference. ``ESPER_OPS`` forces either:

``ESPER_OPS=reference``
    plain PyTorch everywhere.
``ESPER_OPS=triton``
    Triton on every GPU; where it does not build, that is an error instead of a warning.

Under ``TRITON_INTERPRET=1`` tensors on the CPU take the twin too: that is how it is tested without a GPU.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from esper.errors import ConfigError, EsperError

OPERATIONS = ("telemetry", "graft", "slot_adam", "fit")
"""Each is a package beside this module, with ``reference``, ``triton`` and ``agreement``."""
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run in Triton's interpreter: fixed when Triton decorates them, so read once."""
_CHOICES = ("reference", "triton")
_BUILD_FAULTS = (
    ImportError, RuntimeError, OSError, subprocess.SubprocessError, TypeError, ValueError, AttributeError, KeyError,
    NotImplementedError,
)  # fmt: skip
"""What a missing compiler, driver or package, or another version of Triton, is known to raise (and its own errors)."""
_verdicts: dict[tuple[str, torch.device], bool] = {}
_warned: set[str] = set()


class DisagreementError(EsperError, ArithmeticError):
    """A Triton kernel and its reference compute different numbers."""


def forced() -> str | None:
    """The value of ``ESPER_OPS``, or ``None`` where nothing is forced.

    Raises
    ------
    ConfigError
        For any other word.
    """
    choice = os.environ.get("ESPER_OPS", "")
    if choice not in ("", "auto", *_CHOICES):
        raise ConfigError(f"ESPER_OPS must be reference, triton or unset, got {choice!r}; unset it to choose by device")
    return choice if choice in _CHOICES else None


def runs_triton(operation: str, tensor: Tensor) -> bool:
    """Whether ``operation`` on tensors beside ``tensor`` takes its Triton twin; the first look builds and checks it."""
    if not (tensor.is_cuda or INTERPRETED):
        return False
    key = (operation, tensor.device)
    verdict = _verdicts.get(key)
    if verdict is None:
        if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
            return False  # a check must wait for the device, which a capture forbids: `prepare` comes before
        verdict = _verdicts[key] = _works(operation, tensor.device)
    return verdict


def prepare(device: torch.device) -> None:
    """Build and check all operations for ``device`` now, so that nothing waits for it in a training step."""
    if device.type == "cuda":
        probe = torch.empty(0, device=device)
        for operation in OPERATIONS:
            runs_triton(operation, probe)


def agree(name: str, pairs: Iterable[tuple[Tensor, Tensor]], tolerance: float) -> None:
    """Compare pairs of (got, wanted) by the norm of their difference.

    Raises
    ------
    DisagreementError
        A pair differs by more than ``tolerance``, relative to the norm of what is wanted, or is not finite.
    """
    for number, (got, wanted) in enumerate(pairs):
        difference = float((got.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))
        if not difference <= tolerance:
            raise DisagreementError(
                f"{name} must agree with its reference within {tolerance:g}, result {number} differs by "
                f"{difference:.3g}; set ESPER_OPS=reference and report the GPU, torch and triton versions"
            )


def _works(operation: str, device: torch.device) -> bool:
    choice = forced()
    if choice == "reference":
        return False
    package = f"esper.kasmina.ops.{operation}"
    try:
        importlib.import_module(f"{package}.triton")
    except ImportError as error:
        return _refuse(operation, f"Triton cannot be imported ({error})", choice, error)
    from triton import TritonError

    try:
        importlib.import_module(f"{package}.agreement").check(device)
    except (TritonError, DisagreementError, *_BUILD_FAULTS) as error:
        # its last line: a compiler's message may print the kernel
        last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        return _refuse(
            operation, f"the {operation} kernels do not work here ({type(error).__name__}: {last})", choice, error
        )
    return True


def _refuse(operation: str, reason: str, choice: str | None, error: Exception) -> bool:
    if choice == "triton":
        raise EsperError(f"ESPER_OPS=triton needs working kernels, but {reason}; unset it to use PyTorch") from error
    if "said" not in _warned:
        _warned.add("said")
        warnings.warn(
            f"{reason}; using plain PyTorch for what cannot be built, which is slower and gives the same results; "
            "pip install 'esper-morph[triton]' brings Triton, ESPER_OPS=reference silences this",
            RuntimeWarning,
            stacklevel=5,
        )
    return False
