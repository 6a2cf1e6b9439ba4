"""The refusal of models that need more than token ids: before any weight is read, as far as that can be seen."""

from __future__ import annotations

from typing import Any

import torch

from whet.base.errors import UserError
from whet.engine.compute.probe import ODD_LENGTH, first_line, probe_inputs, unreadable


def check_readable(network: Any) -> None:
    """Raise UserError where the model `network`, which is without memory, cannot read rows of token ids alone."""
    if reason := unreadable(network):
        raise cannot_read(network, reason)


def check_trainable(network: Any) -> None:
    """Raise UserError where a loaded model cannot be run in training on a row of any length (Reformer)."""
    was_training = network.training
    network.train()
    try:
        with torch.random.fork_rng(), torch.no_grad():
            network(**probe_inputs(network, ODD_LENGTH))
    except (ValueError, TypeError, AttributeError, LookupError, AssertionError) as error:
        raise cannot_read(network, first_line(error)) from error
    finally:
        network.train(was_training)


def cannot_read(network: Any, reason: str) -> UserError:
    """The error for a model that cannot."""
    return UserError(
        "the model cannot be trained on rows of tokens alone", field="model.path",
        found=f"{type(network).__name__}: {reason}", expected="a model whose only input is token ids",
        fix="give another model; where config.json leaves out what the family needs, add it there",
    )  # fmt: skip
