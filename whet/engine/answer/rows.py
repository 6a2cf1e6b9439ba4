"""The rows that are being answered, as tensors on the device: newest token, position, and the answer so far.

All tensors keep their memory while rows are answered, so that a captured step stays valid, and no operation here asks
the device for a value. Rows that come and go need two more methods here (put a prompt into a free row, take a finished
one out) and a count of tokens for each row in the place of `written`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class StopRule:
    """When an answer ends: at one of `stop_ids`, which is no part of it, or after `max_new_tokens`."""

    stop_ids: tuple[int, ...]
    max_new_tokens: int

    @classmethod
    def of(cls, stop_ids: Iterable[int], max_new_tokens: int) -> StopRule:
        """The rule of any collection of ids."""
        return cls(tuple(int(token) for token in stop_ids), max_new_tokens)

    @property
    def pad(self) -> int:
        """The token that fills rows up."""
        return self.stop_ids[0] if self.stop_ids else 0

    def cut(self, ids: list[int]) -> list[int]:
        """`ids` up to the first stop token."""
        return ids[: next((index for index, token in enumerate(ids) if token in self.stop_ids), len(ids))]


class Rows:
    """B rows with room for N new tokens each.

    ids [B, 1]: the newest token of each row; positions [B, 1]: its place in the row's own text; finished [B]; answers
    [B, N], padded; written [1]: tokens in each of them.
    """

    def __init__(self, count: int, rule: StopRule, device: torch.device) -> None:
        self.rule = rule
        self.ids = torch.zeros(count, 1, dtype=torch.long, device=device)
        self.positions = torch.zeros_like(self.ids)
        self.finished = torch.zeros(count, dtype=torch.bool, device=device)
        self.written = torch.zeros(1, dtype=torch.long, device=device)
        self.answers = torch.zeros(count, rule.max_new_tokens, dtype=torch.long, device=device)
        self.stops = torch.tensor(list(rule.stop_ids), dtype=torch.long, device=device)
        self._all_answers, self._origin = self.answers, torch.arange(count, device=device)

    def __len__(self) -> int:
        return len(self.finished)

    def begin(self, prompts: int, positions: torch.Tensor) -> None:
        """Start the first `prompts` rows at `positions` [B, 1] of their last tokens; the other rows count as done."""
        self.written.zero_()
        self.answers.fill_(self.rule.pad)
        self.finished.copy_(torch.arange(len(self), device=self.finished.device) >= prompts)
        self.positions.copy_(positions)

    def accept(self, tokens: torch.Tensor) -> None:
        """Write the next token of each row, [B]; finished rows get a pad."""
        tokens = tokens.masked_fill(self.finished, self.rule.pad)
        self.answers.index_copy_(1, self.written, tokens[:, None])
        self.finished.logical_or_((tokens[:, None] == self.stops).any(1))
        self.ids.copy_(tokens[:, None])
        # A finished row stands still, so that it never walks past the last position the model knows.
        self.positions.add_(1).masked_fill_(self.finished[:, None], 0)
        self.written.add_(1)

    def unfinished(self) -> torch.Tensor:
        """The numbers of the rows that go on."""
        return (~self.finished).nonzero()[:, 0]

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with `rows` alone, in new memory; the answers of the others are remembered."""
        if self._all_answers is self.answers:
            self._all_answers = self.answers.clone()
        self._all_answers[self._origin] = self.answers
        self._origin = self._origin[rows]
        self.ids, self.positions, self.finished = self.ids[rows], self.positions[rows], self.finished[rows]
        self.answers = self.answers[rows]

    def result(self, prompts: int, tokens: int) -> list[list[int]]:
        """The first `tokens` ids of the answers to the first `prompts` rows, with what follows a stop token."""
        if self._all_answers is not self.answers:
            self._all_answers[self._origin] = self.answers
        return self._all_answers[:prompts, :tokens].tolist()

    def tensors(self) -> list[torch.Tensor]:
        """All that a step changes."""
        return [self.ids, self.positions, self.finished, self.written, self.answers]
