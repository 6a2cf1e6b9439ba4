"""Adapters on disk, and several of them on one base that is loaded once: load, switch, compose, rename, delete, write.

PEFT owns how adapters stand side by side in a layer and how they are combined; here are names, checks and the choice
of what is exact. A weighted sum of updates is `cat`: it is exact, at the sum of the ranks. PEFT's `linear` adds A to A
and B to B, which also multiplies one adapter's A with the other's B: it keeps the rank and is not the sum of the
updates. `svd` is the best approximation of the sum at a chosen rank; `ties` (Yadav et al., 2023, arXiv:2306.01708)
and `dare` (Yu et al., 2023, arXiv:2311.03099) thin out the updates first. Gives up: adapters of different kinds side
by side, which PEFT does not hold in one model; several bases.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from whet.adapters.files import CONFIG, NOTE, adapter_directory, describe
from whet.base.errors import UserError, nearest
from whet.base.files import read_json, whole_directory
from whet.base.outputs import output_path
from whet.engine.config import Base, Model
from whet.engine.load.identity import check_sealed, seal, seal_digest
from whet.engine.load.load import load_tokenizer
from whet.methods.layers.adapter import attach_adapter
from whet.runs import Run, open_run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

How = Literal["cat", "linear", "svd", "ties", "dare"]
_PEFT_HOW = {"ties": "ties_svd", "dare": "dare_linear_svd"}
BESIDE = ("use_dora", "trainable_token_indices", "modules_to_save")


class Adapters:
    """The adapters on one loaded base, by name; one of them is in use, or none, and the network answers so."""

    def __init__(self, network: PreTrainedModel) -> None:
        self.network = network
        self.wrapped: Any = None
        self.in_use: str | None = None
        self._peft_names: dict[str, str] = {}  # PEFT's, made up: it has rules for them, and cannot rename
        self._loaded = 0
        self._switched_off = contextlib.ExitStack()

    @property
    def names(self) -> list[str]:
        return list(self._peft_names)

    def load(self, name: str, target: str | Path) -> None:
        """Put the adapter of `target` beside the others, under `name`, without changing which one is in use.

        Raises UserError for a name that is taken, an adapter of another kind than those there, and one that does not
        fit the base.
        """
        directory = adapter_directory(target)
        check_adapter(directory)
        self._check_free(name)
        kind = describe(directory).kind
        if kind in ("prompt_tuning", "p_tuning", "prefix_tuning"):
            raise UserError(
                "virtual tokens stand in front of each row, and cannot be switched beside other adapters",
                file=str(directory), found=kind, expected="an adapter inside of the layers", fix="chat with it alone",
            )  # fmt: skip
        if self.wrapped is not None and kind != self._kind():
            raise UserError(
                "adapters of different kinds cannot stand side by side", file=str(directory), found=kind,
                expected=self._kind(), fix="merge one of them, or open the model twice",
            )  # fmt: skip
        with self._all_on():
            peft_name = self._new_name()
            self.wrapped = attach_adapter(self.network, directory, name=peft_name, beside=self.wrapped)
            self._peft_names[name] = peft_name

    def use(self, name: str | None) -> None:
        """Answer with this adapter from now on; None: as the base does. Nothing is loaded."""
        peft_name = None if name is None else self._known(name)
        self._switched_off.close()
        if peft_name is not None:
            self.wrapped.set_adapter(peft_name)
        elif self.wrapped is not None:
            self._switched_off.enter_context(self.wrapped.disable_adapter())
        self.in_use = name

    @contextlib.contextmanager
    def using(self, name: str | None) -> Iterator[PreTrainedModel]:
        """The network, answering with one adapter (None: as the base) inside the block."""
        before = self.in_use
        self.use(name)
        try:
            yield self.network
        finally:
            self.use(before)

    @contextlib.contextmanager
    def _all_on(self) -> Iterator[None]:
        """For changes: inside no adapter is switched off, outside the one in use is used, if it is still there."""
        self._switched_off.close()
        try:
            yield
        finally:
            self.use(self.in_use if self.in_use in self._peft_names else None)

    def compose(
        self, name: str, parts: Sequence[str], weights: Sequence[float] | None = None, *, how: How = "cat",
        rank: int | None = None, density: float = 0.5,
    ) -> None:  # fmt: skip
        """Make adapter `name` of `parts`: their updates times `weights` (1 each), added up.

        how: cat is exact and has the ranks' sum; linear keeps the rank and mixes A's with B's; svd, ties and dare have
        `rank` (the largest part's). density: the share of each update that ties and dare keep. Raises UserError.
        """
        weights = [1.0] * len(parts) if weights is None else [float(weight) for weight in weights]
        self._check_composition(name, parts, weights, how, density)
        peft_names = [self._known(part) for part in parts]
        configs = [self.wrapped.peft_config[peft_name] for peft_name in peft_names]
        for part, config in zip(parts, configs, strict=True):
            _check_plain(part, config)
        options: dict[str, Any] = {"combination_type": _PEFT_HOW.get(how, how)}
        if how in ("svd", "ties", "dare"):
            options["svd_rank"] = rank or max(config.r for config in configs)
        if how in ("ties", "dare"):
            options["density"] = density
        composed = self._new_name()
        try:
            with self._all_on():
                self.wrapped.add_weighted_adapter(peft_names, weights, composed, **options)
                self._peft_names[name] = composed
        except (ValueError, NotImplementedError) as error:
            raise UserError(
                f"these adapters cannot be composed: {error}", found=", ".join(parts),
                expected="LoRA adapters of one base", fix="compose others, or how=cat",
            ) from error  # fmt: skip

    def rename(self, old: str, new: str) -> None:
        """Call adapter `old` `new`."""
        self._known(old)
        self._check_free(new)
        self._peft_names = {new if name == old else name: inner for name, inner in self._peft_names.items()}
        self.in_use = new if self.in_use == old else self.in_use

    def delete(self, name: str) -> None:
        """Forget an adapter; one in use gives way to the base."""
        peft_name = self._known(name)
        with self._all_on():
            others = [other for key, other in self._peft_names.items() if key != name]
            if not others:
                self.network, self.wrapped = self.wrapped.unload(), None
            else:
                if self.in_use in (name, None):
                    self.wrapped.set_adapter(others[0])
                self.wrapped.delete_adapter(peft_name)
            del self._peft_names[name]

    def write(
        self, name: str, out: str | Path, note: dict[str, Any] | None = None, *, beside: Sequence[Path] = (),
        base: Any = None,
    ) -> Path:  # fmt: skip
        """Write an adapter in PEFT's format to the new directory `out`, whole or not at all. Raises UserError.

        note: kept beside it; beside: files to copy there; base: the model by content, for the seal.
        """
        peft_name, new = self._known(name), output_path(out)
        if os.path.lexists(new):
            raise UserError("the output is in the way", file=str(new), fix="give a new directory")
        with whole_directory(new) as directory:
            self.wrapped.save_pretrained(str(directory), selected_adapters=[peft_name], safe_serialization=True)
            for file in (directory / peft_name).iterdir():  # PEFT makes a folder of every name but its default
                file.rename(directory / file.name)
            (directory / peft_name).rmdir()
            (directory / "README.md").write_text(_card(name, note), encoding="utf-8")
            if note is not None:
                (directory / NOTE).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
            for file in beside:
                (shutil.copytree if file.is_dir() else shutil.copyfile)(file, directory / file.name)
            seal(directory, base)
        return new

    def _check_composition(
        self, name: str, parts: Sequence[str], weights: Sequence[float], how: str, density: float
    ) -> None:
        self._check_free(name)
        if how not in get_args(How):
            raise UserError(
                "there is no such way to compose", field="how", found=how, expected=", ".join(get_args(How)),
                fix=f"how={nearest(how, get_args(How)) or 'cat'}",
            )  # fmt: skip
        if len(parts) < 1 or len(weights) != len(parts):
            raise UserError(
                "each adapter needs one weight", field="weights", found=f"{len(weights)} for {len(parts)} adapters",
                expected=str(len(parts)), fix="give as many weights as adapters, or none",
            )  # fmt: skip
        if not 0 < density <= 1:
            raise UserError("density is a share", field="density", found=str(density), expected="above 0, at most 1",
                            fix="density=0.5")  # fmt: skip
        if how == "linear" and any(weight < 0 for weight in weights):
            raise UserError(
                "linear takes the square root of each weight", field="weights", found=str(min(weights)),
                expected="0 or more", fix="how=cat, which is exact",
            )  # fmt: skip

    def _kind(self) -> str:
        return next(iter(self.wrapped.peft_config.values())).peft_type.value.lower()

    def _new_name(self) -> str:
        self._loaded += 1
        return f"a{self._loaded}"

    def _known(self, name: str) -> str:
        """PEFT's name of an adapter. UserError when there is none of this name."""
        if name not in self._peft_names:
            near = nearest(name, self._peft_names)
            raise UserError(
                "there is no such adapter", found=name, expected=", ".join(self._peft_names) or "none is loaded",
                fix=f"did you mean {near}?" if near else "load it first",
            )  # fmt: skip
        return self._peft_names[name]

    def _check_free(self, name: str) -> None:
        if name in self._peft_names:
            raise UserError("this name is taken", found=name, fix="give another one, or delete the adapter first")


def _card(name: str, note: dict[str, Any] | None) -> str:
    """The page beside an adapter that was composed, in place of PEFT's empty form."""
    parts = zip((note or {}).get("parts", ()), (note or {}).get("weights", ()), strict=False)
    lines = [f"| {Path(part).name} | {weight:g} |" for part, weight in parts]
    table = (
        ["| part | weight |", "| --- | --- |", *lines, "", f"Combined by {(note or {}).get('how')}.", ""]
        if lines
        else []
    )
    return "\n".join(["---", "library_name: peft", "---", "", f"# {name}", "", *table,
                      "`whet chat`, `whet eval` and `whet merge` open this folder, and so does PEFT.", ""])  # fmt: skip


def _check_plain(part: str, config: Any) -> None:
    """PEFT adds up the updates A and B alone: whatever else an adapter trained would be lost without a word."""
    kind = config.peft_type.value.lower()
    more = [name for name in BESIDE if getattr(config, name, None)]
    if kind == "lora" and getattr(config, "bias", "none") != "none":
        more.append("bias")
    if kind != "lora" or more:
        raise UserError(
            "only plain LoRA can be composed: the rest of what this adapter trained would be lost", found=f"{part}: "
            + (", ".join(more) if kind == "lora" else kind), expected="LoRA on linear layers alone",
            fix="merge it into the model first, or compose others",
        )  # fmt: skip


def run_of(directory: Path) -> Run | None:
    """The finished run whose adapter this is, by its path and by what the run remembers of it; None for any other."""
    remembered = _remembered(directory)
    mine = remembered is not None and remembered in ("", seal_digest(directory))
    return open_run(directory.parent) if mine else None


def check_adapter(directory: Path) -> Any:
    """The base that an adapter was trained on, as its folder or its run recorded it; None where neither did.

    Raises UserError where its files are not as they were written.
    """
    return check_sealed(directory, _remembered(directory) or None)


def _remembered(directory: Path) -> str | None:
    """The digest that the run around an adapter remembers, "" for none; None where there is no run."""
    run = directory.resolve().parent
    if directory.name != "adapter" or not all((run / name).is_file() for name in ("recipe.yaml", "finished.json")):
        return None
    return str((read_json(run / "finished.json") or {}).get("trained_sha256", ""))


def base_of(target: str | Path) -> tuple[Model, Base]:
    """The base model that an adapter was trained on: as its run says, or its own files. Raises UserError."""
    directory = adapter_directory(target)
    run = run_of(directory)
    if run is not None:
        return run.recipe.model, run.recipe.base
    note = directory / NOTE
    if note.is_file():
        return Model(**json.loads(note.read_text(encoding="utf-8"))["base"]), Base()
    found = describe(directory)
    if not found.base:
        raise UserError(
            "the adapter does not say which model it was trained on", file=str(directory / CONFIG),
            field="base_model_name_or_path", expected="a model directory or a hub name", fix="write it there",
        )  # fmt: skip
    path = found.base
    if not Path(path).is_absolute() and not Path(path).exists() and (directory / path / "config.json").is_file():
        path = str(directory / path)
    return Model(path=path, new_tokens=_added_tokens(path, directory)), Base()


def _added_tokens(base: str, directory: Path) -> list[str]:
    """Tokens of the tokenizer beside an adapter whose rows it trained, and that the base's tokenizer does not have."""
    if not json.loads((directory / CONFIG).read_text(encoding="utf-8")).get("trainable_token_indices"):
        return []
    if not (directory / "tokenizer.json").is_file():
        return []
    from tokenizers import Tokenizer

    known = load_tokenizer(Model(path=base)).get_vocab()
    theirs = Tokenizer.from_file(str(directory / "tokenizer.json")).get_vocab()
    return sorted(theirs.keys() - known.keys(), key=theirs.__getitem__)
