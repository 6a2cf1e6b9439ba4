"""Several adapters on one base that is loaded once: load, switch per request, compose, rename, delete, write.

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
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from whet.base.errors import UserError, nearest
from whet.base.files import whole_directory
from whet.engine.config import Base, Model
from whet.engine.load.load import load_model, load_tokenizer, locate
from whet.engine.load.open import answering
from whet.methods.layers.adapter import attach_adapter
from whet.runs import open_run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

How = Literal["cat", "linear", "svd", "ties", "dare"]
_PEFT_NAMES = {"ties": "ties_svd", "dare": "dare_linear_svd"}
BESIDE = ("use_dora", "trainable_token_indices", "modules_to_save")
CONFIG, WEIGHTS, NOTE = "adapter_config.json", "adapter_model.safetensors", "whet_composed.json"


@dataclass(frozen=True)
class Described:
    """An adapter on disk. parameters: numbers in it; tasks: PEFT's name of what it was trained for."""

    name: str
    path: Path
    kind: str
    task: str | None
    base: str | None
    rank: int | None
    parameters: int
    bytes: int


def adapter_directory(target: str | Path) -> Path:
    """The adapter that a run directory or an adapter directory holds. Raises UserError."""
    place = Path(target)
    for candidate in (place, place / "adapter"):
        if (candidate / CONFIG).is_file():
            return candidate
    raise UserError(
        "there is no adapter here", file=str(place), expected=f"a run of whet train, or a folder with {CONFIG}",
        fix="give runs/NAME, or its adapter/ folder",
    )  # fmt: skip


def describe(target: str | Path) -> Described:
    """What an adapter is, read from its files without loading a model. Raises UserError."""
    from safetensors import SafetensorError, safe_open

    place = adapter_directory(target)
    try:
        config = json.loads((place / CONFIG).read_text(encoding="utf-8"))
        with safe_open(str(place / WEIGHTS), "np") as file:
            numbers = sum(_count(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"the adapter cannot be read: {error}", file=str(place), expected=f"{CONFIG} and {WEIGHTS}",
            fix="copy it again, whole",
        ) from error  # fmt: skip
    name = place.parent.name if place.name == "adapter" else place.name
    return Described(
        name, place, str(config.get("peft_type", "?")).lower(), config.get("task_type"),
        config.get("base_model_name_or_path"), config.get("r"), numbers, (place / WEIGHTS).stat().st_size,
    )  # fmt: skip


def find(folder: str | Path) -> list[Described]:
    """The adapters in `folder` and one or two levels below it, by name."""
    place = Path(folder)
    if not place.is_dir():
        raise UserError("there is no such folder", file=str(place), fix="give a folder of runs or adapters")
    patterns = (CONFIG, f"*/{CONFIG}", f"*/*/{CONFIG}")
    return [describe(path) for path in sorted({file.parent for pattern in patterns for file in place.glob(pattern)})]


class Adapters:
    """The adapters on one loaded base, by name; one of them is in use, or none."""

    def __init__(self, network: PreTrainedModel) -> None:
        self.network = network
        self.wrapped: Any = None
        self.in_use: str | None = None
        self._inside: dict[str, str] = {}
        self._made = 0

    @property
    def names(self) -> list[str]:
        return list(self._inside)

    def load(self, name: str, target: str | Path) -> None:
        """Put the adapter of `target` beside the others, under `name`, without changing which one is in use.

        Raises UserError for a name that is taken, an adapter of another kind than those there, and one that does not
        fit the base.
        """
        place = adapter_directory(target)
        self._free(name)
        kind = describe(place).kind
        inside = self._new_name()
        if self.wrapped is None:
            self.wrapped = attach_adapter(self.network, place, name=inside)
        else:
            here = self._kind()
            if kind != here:
                raise UserError(
                    "adapters of different kinds cannot stand side by side", file=str(place), found=kind,
                    expected=here, fix="merge one of them, or open the model twice",
                )  # fmt: skip
            attach_adapter(self.network, place, name=inside, beside=self.wrapped)
        self._inside[name] = inside
        self.use(self.in_use)

    def use(self, name: str | None) -> None:
        """Answer with this adapter from now on; None: as the base does. Nothing is loaded."""
        if name is not None:
            self.wrapped.set_adapter(self._known(name))
        self.in_use = name

    @contextlib.contextmanager
    def using(self, name: str | None) -> Iterator[PreTrainedModel]:
        """The network, answering with one adapter (None: as the base) inside the block."""
        before = self.in_use
        self.use(name)
        try:
            if name is None and self.wrapped is not None:
                with self.wrapped.disable_adapter():
                    yield self.network
            else:
                yield self.network
        finally:
            self.use(before)

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
        inside = [self._known(part) for part in parts]
        configs = [self.wrapped.peft_config[one] for one in inside]
        for part, config in zip(parts, configs, strict=True):
            _check_plain(part, config)
        options: dict[str, Any] = {"combination_type": _PEFT_NAMES.get(how, how)}
        if how in ("svd", "ties", "dare"):
            options["svd_rank"] = rank or max(config.r for config in configs)
        if how in ("ties", "dare"):
            options["density"] = density
        made = self._new_name()
        try:
            self.wrapped.add_weighted_adapter(inside, weights, made, **options)
        except (ValueError, NotImplementedError) as error:
            raise UserError(
                f"these adapters cannot be composed: {error}", found=", ".join(parts),
                expected="LoRA adapters of one base", fix="compose others, or how=cat",
            ) from error  # fmt: skip
        self._inside[name] = made
        self.use(self.in_use)

    def rename(self, old: str, new: str) -> None:
        """Call adapter `old` `new`."""
        self._known(old)
        self._free(new)
        self._inside = {new if name == old else name: inside for name, inside in self._inside.items()}
        self.in_use = new if self.in_use == old else self.in_use

    def delete(self, name: str) -> None:
        """Forget an adapter; one in use gives way to the base."""
        inside = self._known(name)
        if len(self._inside) == 1:
            self.network = self.wrapped.unload()
            self.wrapped = None
        else:
            if self.in_use in (name, None):
                self.wrapped.set_adapter(next(other for key, other in self._inside.items() if key != name))
            self.wrapped.delete_adapter(inside)
        del self._inside[name]
        self.use(None if self.in_use == name else self.in_use)

    def write(self, name: str, out: str | Path, note: dict[str, Any] | None = None) -> Path:
        """Write an adapter in PEFT's format to the new directory `out`; note: kept beside it. Raises UserError."""
        inside, place = self._known(name), Path(out)
        if place.exists():
            raise UserError("the output is in the way", file=str(place), fix="give a new directory")
        with whole_directory(place) as directory:
            self.wrapped.save_pretrained(str(directory), selected_adapters=[inside], safe_serialization=True)
            for file in (directory / inside).iterdir():  # PEFT makes a folder of every name but its default
                file.rename(directory / file.name)
            (directory / inside).rmdir()
            if note is not None:
                (directory / NOTE).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
        return place

    def _check_composition(
        self, name: str, parts: Sequence[str], weights: Sequence[float], how: str, density: float
    ) -> None:
        self._free(name)
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
        self._made += 1
        return f"a{self._made}"

    def _known(self, name: str) -> str:
        if name not in self._inside:
            near = nearest(name, self._inside)
            raise UserError(
                "there is no such adapter", found=name, expected=", ".join(self._inside) or "none is loaded",
                fix=f"did you mean {near}?" if near else "load it first",
            )  # fmt: skip
        return self._inside[name]

    def _free(self, name: str) -> None:
        if name in self._inside:
            raise UserError("this name is taken", found=name, fix="give another one, or delete the adapter first")


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


def home(target: str | Path) -> tuple[Model, Base]:
    """The base model that an adapter was trained on: as its run says, or its own files. Raises UserError."""
    place = adapter_directory(target)
    if (place.parent / "recipe.yaml").is_file():
        recipe = open_run(place.parent).recipe
        return recipe.model, recipe.base
    note = place / NOTE
    if note.is_file():
        kept = json.loads(note.read_text(encoding="utf-8"))["base"]
        return Model(**kept), Base()
    found = describe(place).base
    if found is None:
        raise UserError(
            "the adapter does not say which model it was trained on", file=str(place / CONFIG),
            field="base_model_name_or_path", expected="a model directory or a hub name", fix="write it there",
        )  # fmt: skip
    return Model(path=found, new_tokens=_added(found, place)), Base()


def _added(base: str, place: Path) -> list[str]:
    """Tokens of the tokenizer beside an adapter whose rows it trained, and that the base's tokenizer does not have."""
    if not json.loads((place / CONFIG).read_text(encoding="utf-8")).get("trainable_token_indices"):
        return []
    if not (place / "tokenizer.json").is_file():
        return []
    from tokenizers import Tokenizer

    known = load_tokenizer(Model(path=base)).get_vocab()
    theirs = Tokenizer.from_file(str(place / "tokenizer.json")).get_vocab()
    return sorted(theirs.keys() - known.keys(), key=theirs.__getitem__)


def compose_on_disk(
    out: str | Path, parts: Sequence[str | Path], *, weights: Sequence[float] | None = None, how: How = "cat",
    rank: int | None = None, density: float = 0.5,
) -> Path:  # fmt: skip
    """Load the base of the first part, compose the parts and write the result to the new directory `out`.

    What stands beside the first adapter (tokenizer, template contract) is copied. Raises UserError, also when the parts
    were trained on different bases.
    """
    if Path(out).exists():
        raise UserError("the output is in the way", file=str(out), fix="give a new directory")
    places = [adapter_directory(part) for part in parts]
    homes = [home(part) for part in parts]
    for place, (model, _) in zip(places[1:], homes[1:], strict=True):
        if locate(model.path) != locate(homes[0][0].path):
            raise UserError(
                "the adapters were trained on different models", file=str(place), found=model.path,
                expected=homes[0][0].path, fix="compose adapters of one base",
            )  # fmt: skip
    model, base = homes[0]
    adapters = Adapters(load_model(model, answering(model, base)))
    names = [str(index) for index in range(len(parts))]
    for name, place in zip(names, places, strict=True):
        adapters.load(name, place)
    adapters.compose("out", names, weights, how=how, rank=rank, density=density)
    note = {
        "parts": [str(part) for part in parts], "weights": list(weights or [1.0] * len(parts)), "how": how,
        "base": {name: value for name, value in asdict(model).items() if value is not None},
    }  # fmt: skip
    made = adapters.write("out", out, note)
    for file in places[0].iterdir():
        if file.is_file() and _of_tokenizer(file):
            shutil.copy2(file, made / file.name)
    return made


def rename_on_disk(target: str | Path, new: str | Path) -> Path:
    """Rename the directory of an adapter (not the adapter/ of a run: that belongs to its run). Raises UserError."""
    place, out = adapter_directory(target), Path(new)
    _own_directory(place)
    if out.exists():
        raise UserError("the new name is in the way", file=str(out), fix="give another one")
    out.parent.mkdir(parents=True, exist_ok=True)
    return place.rename(out)


def delete_on_disk(target: str | Path) -> Path:
    """Remove the directory of an adapter. Raises UserError when other files lie in it, or it belongs to a run."""
    place = adapter_directory(target)
    _own_directory(place)
    known = {CONFIG, WEIGHTS, NOTE, "README.md"}
    if others := sorted(path.name for path in place.iterdir() if path.name not in known and not _of_tokenizer(path)):
        raise UserError(
            "other files lie beside the adapter, so it is left alone", file=str(place), found=", ".join(others[:5]),
            fix="remove the folder by hand",
        )  # fmt: skip
    shutil.rmtree(place)
    return place


def _own_directory(place: Path) -> None:
    if (place.parent / "recipe.yaml").is_file():
        raise UserError(
            "this adapter belongs to its run", file=str(place), fix=f"move or remove the whole run {place.parent}"
        )


def _of_tokenizer(path: Path) -> bool:
    return path.name.startswith(("tokenizer", "special_tokens", "chat_template", "whet_")) or path.suffix == ".jinja"


def _count(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
