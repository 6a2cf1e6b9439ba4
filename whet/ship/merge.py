"""Fold the adapter into plain weights, and prove that the result answers as the trained model does.

What the adapter was trained on (the dequantised base) and the base as its checkpoint has it are both tried, in the type
of the checkpoint first and in wider ones when that loses answers or cannot hold a weight; each is written, read back by
plain transformers with the attention that it gives the model, and compared with the live adapter on held-out rows:
`ship.agreement` for models that write, `ship.label_agreement` for labels and values. The first candidate that agrees
everywhere is kept, else the closest; too far away is refused. The certificate lies beside the weights and says what
they were made of and what they are, so that the same merge is not made twice. A directory with anything else in it is
never replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from whet import runs
from whet.base.console import say
from whet.base.content import difference, digest_of, files_in
from whet.base.errors import UserError
from whet.base.files import hidden_directory, read_json, sweep, whole_directory, write_json
from whet.base.out_of_memory import ran_out
from whet.base.outputs import output_directory
from whet.data.prepare import Prepared
from whet.data.template.goldens import FILE as CONTRACT
from whet.data.template.goldens import write_contract
from whet.engine.compute.proven_attention import EAGER, prove_attention
from whet.engine.device import DTYPES, PACKED, Placement
from whet.engine.load.identity import base_identity, seal_digest
from whet.engine.load.left_out import left_out
from whet.engine.load.load import checkpoint_type, load_model, rebuilding_notice
from whet.engine.load.open import Opened, check_trained
from whet.engine.memory.scarce import NoRoom, forget_frames, let_go, refusing
from whet.engine.task import Task
from whet.engine.weights.linear import FrozenLinear
from whet.inputs import inputs_of_run
from whet.methods.all import METHODS
from whet.opening import open_answerer
from whet.planning.phases import FOLDED_IN
from whet.runs import Run
from whet.ship.agreement import MEAN_KL_LIMIT, Agreement, decoder_reference, encoder_decoder_reference, no_room
from whet.ship.carry import carry_over
from whet.ship.label_agreement import LabelAgreement, label_reference

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CERTIFICATE = "whet_merge.json"
TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# Types to write in after that of the checkpoint: none that holds less than it.
WIDER = {"fp16": ("bf16", "fp32"), "bf16": ("fp32",), "fp32": ()}
__all__ = ["CERTIFICATE", "MEAN_KL_LIMIT", "merge"]
Verdict = Agreement | LabelAgreement


class Judge(Protocol):
    """What the live adapter says, to hold a candidate against."""

    def compare(self, name: str, dtype: str, candidate: Opened, best: Any | None) -> Verdict: ...
    def certificate(self, best: Any, tried: Sequence[Any]) -> dict[str, Any]: ...


def merge(run: Run, out: Path) -> dict[str, Any]:
    """Write a plain transformers model to `out` and the certificate to results/merge.json; returns the certificate.

    Raises UserError when the method cannot be merged, `out` is in the way, or no candidate is near enough.
    """
    target = _check(run, out)
    origin = _origin(run)
    sweep(target.parent, target.name)
    if (earlier := _earlier(target, origin)) is not None:
        say(f"{out} holds this merge already: nothing to do")
        if run.has_recipe and run.read("results/merge.json") != earlier:  # killed between the two
            _remember(run, earlier)
        return earlier
    prepared = runs.rows_of(run)
    live = open_answerer(run, row_tokenizer=prepared.row_tokenizer).opened
    with refusing(lambda: no_room(live.placement.device)), hidden_directory(target) as scratch:
        judge = _judge(live, prepared)
        best, folder, tried = _best_candidate(run, live, judge, prepared, scratch)
        certificate = {
            "chosen": f"{best.name} base, {best.dtype}", "summary": best.summary,
            **judge.certificate(best, tried), "path": str(out), "of": origin,
        }  # fmt: skip
        if not best.near:
            run.write("results/merge.json", certificate | {"path": None})
            difference, limit = best.complaint
            raise UserError(
                "no merged model is near enough to the adapter, so none was written", file=str(run.path),
                found=difference, expected=limit, fix="serve the adapter itself; results/merge.json holds the figures",
            )  # fmt: skip
        with whole_directory(target) as directory:
            for file in folder.iterdir():
                file.rename(directory / file.name)
            prepared.row_tokenizer.tokenizer.save_pretrained(str(directory))
            if live.task.name == "causal" and prepared.row_tokenizer.template is not None:
                write_contract(prepared.row_tokenizer, directory / CONTRACT)
            certificate["files"] = files_in(directory)
            write_json(directory / CERTIFICATE, certificate)
    _remember(run, certificate)
    return certificate


def _origin(run: Run) -> dict[str, Any]:
    """What a merge is made of, by content: what was trained, and the base."""
    trained = seal_digest(run.trained) or digest_of(files_in(run.trained))
    return {"trained": trained, "base": digest_of(base_identity(run.recipe.model))}


def _earlier(out: Path, origin: dict[str, Any]) -> dict[str, Any] | None:
    """The certificate in `out` where the same was merged before; None where nothing stands there.

    Raises UserError where anything else does: nothing that stands there is ever replaced.
    """
    if not out.exists() or not any(out.iterdir()):
        return None
    changed = "it is no merge of this run as it is now"
    try:
        found = read_json(out / CERTIFICATE)
        if found["of"] == origin:
            changed = difference(found["files"], out) or ""
    except (OSError, ValueError, LookupError, TypeError):
        found = None
    if found is None or changed:
        raise UserError(
            "the output is in the way: the directory is not empty", file=str(out), found=changed,
            expected="a new or empty directory", fix="give a new directory, or remove this one yourself",
        )  # fmt: skip
    return found


def _remember(run: Run, certificate: dict[str, Any]) -> None:
    """Keep the certificate in the run; the folder of an adapter alone is somebody's input, and left as it is."""
    if run.has_recipe:
        run.write("results/merge.json", certificate)


def _best_candidate(
    run: Run, live: Opened, judge: Judge, prepared: Prepared, scratch: Path
) -> tuple[Verdict, Path, list[Verdict]]:
    """The verdict on the nearest merged model, or the first that agrees everywhere; its folder; all that were tried."""
    stop_ids = prepared.row_tokenizer.stop_ids() if live.task.name == "causal" else []
    best: tuple[Verdict, Path] | None = None
    tried: list[Verdict] = []
    for base_kind, dtype in _candidates(run.recipe.base.storage or "", checkpoint_type(run.recipe.model)):
        folder = scratch / f"{base_kind}-{dtype}"
        if not _write_candidate(run, live, base_kind, dtype, folder, stop_ids):
            say(f"merged on {base_kind} base, weights are too large for {dtype}: trying another type", style="yellow")
            continue
        verdict = _judged(folder, live, judge, (base_kind, dtype), best[0] if best else None)
        tried.append(verdict)
        if not verdict.perfect:  # the one that is kept is said at the end
            say(f"tried {base_kind} base in {dtype}: {verdict.summary}", style="dim")
        if best is None or verdict.order < best[0].order:
            best = (verdict, folder)
        if verdict.perfect:
            break
    if best is None:
        raise UserError(
            "the merged weights are not finite in any type, so none was written", file=str(run.path),
            expected="finite weights", fix="train again with a lower train.learning_rate",
        )  # fmt: skip
    return *best, tried


def _check(run: Run, out: Path) -> Path:
    """The directory to write; refuses what cannot be merged, and an `out` that is, or lies above, an input."""
    method = run.recipe.method
    if not method.can.mergeable and method.can.whole_model:
        raise UserError(
            f"a {method.name} run has no adapter to merge", file=str(run.path), field="method.name",
            expected="lora", fix=f"{run.model} is a plain model already",
        )  # fmt: skip
    if not method.can.mergeable:
        raise UserError(
            f"what {method.name} trains does not fold into the weights", file=str(run.path), field="method.name",
            found=method.name,
            expected=", ".join(name for name, kind in METHODS.items() if kind(name=name).can.mergeable),  # type: ignore[arg-type]
            fix=f"serve the adapter as it is: {run.adapter}; or train with method=lora, which merges",
        )  # fmt: skip
    check_trained(run.trained)
    return output_directory(out, inputs_of_run(run))


def _judge(live: Opened, prepared: Prepared) -> Judge:
    if live.task.labelled:
        return label_reference(live, prepared)
    if live.task.name == "seq2seq":
        return encoder_decoder_reference(live, prepared)
    return decoder_reference(live, prepared)


def _candidates(storage: str, stored: str) -> list[tuple[str, str]]:
    """(base, dtype) in the order in which they are tried: what was trained on, the type of the checkpoint first."""
    bases = ["dequantised", "16-bit"] if storage in PACKED else ["trained"]
    return [(base, dtype) for dtype in (stored, *WIDER[stored]) for base in bases]


def _write_candidate(run: Run, live: Opened, base_kind: str, dtype: str, folder: Path, stop_ids: list[int]) -> bool:
    """Fold base and what was trained together in fp32, and write a plain model in `dtype`; False where that cannot
    hold a weight."""
    target = Placement(torch.device("cpu"), FOLDED_IN, DTYPES[FOLDED_IN], False, {})
    if notice := rebuilding_notice(run.recipe.model, target):
        say(notice, style="yellow")
    plain = load_model(run.recipe.model, target, run.task)
    with torch.no_grad():
        if base_kind == "dequantised":
            _copy_dequantised(live.network, plain)
        plain = run.recipe.method.fold(plain, run.trained, run.task)
    plain.to(TYPES[dtype])  # type: ignore[arg-type]
    if not all(bool(tensor.isfinite().all()) for tensor in plain.parameters()):
        return False
    if run.task.name == "causal":
        plain.generation_config.eos_token_id = stop_ids  # type: ignore[union-attr]
    plain.save_pretrained(str(folder), safe_serialization=True)
    if parts := left_out(run.recipe.model, plain):
        carry_over(run.recipe.model, folder, parts, str(TYPES[dtype]).removeprefix("torch."))
    return True


def _judged(folder: Path, live: Opened, judge: Judge, of: tuple[str, str], best: Any | None) -> Verdict:
    """The verdict on a candidate, beside the live model, and where there is no room for both, on the CPU. of: its base
    and its type."""
    try:
        return judge.compare(*of, _read_back(folder, live, of[1], live.placement.device), best)
    except (RuntimeError, MemoryError, NoRoom) as error:
        if not ran_out(error) and not isinstance(error, NoRoom):
            raise
        forget_frames(error)
    let_go()
    say("out of memory: the merged model is compared on the CPU, which is slow", style="yellow")
    with refusing(lambda: no_room(live.placement.device)):
        return judge.compare(*of, _read_back(folder, live, of[1], torch.device("cpu")), best)


def _read_back(folder: Path, live: Opened, dtype: str, device: torch.device) -> Opened:
    """The candidate from the disk on `device` as a stranger would read it: plain transformers, the attention that it
    chooses, in the arithmetic of the live model (fp16 as it is, where that is a short one).

    Where the attention that transformers chooses computes something else than the family's own (UMT5 loses its
    positions with it), the candidate's config asks for its own, which every later reader then gets. Nothing is told of
    labels: that the config knows them is part of what is proven.
    """
    placement, task = live.placement, live.task
    short = placement.compute != torch.float32
    compute = torch.float16 if short and dtype == "fp16" else placement.compute
    plain = Placement(device, "fp32" if compute == torch.float32 else "bf16", compute, False, {})
    network = _plain_network(folder, plain, task)
    if prove_attention(network):
        say("the merged config asks for the attention that the family is written in: with the one that transformers "
            "would choose, its logits are others", style="yellow")  # fmt: skip
        write_json(folder / "config.json", read_json(folder / "config.json") | {"attn_implementation": EAGER})
        network = _plain_network(folder, plain, task)
    if task.labelled:
        names = tuple(network.config.id2label[index] for index in range(len(task.labels)))
        assert names == task.labels, f"the merged model names its labels {names}, not {task.labels}"
    return Opened(network, None, plain, task=task)


def _plain_network(folder: Path, placement: Placement, task: Task) -> Any:
    """The model in `folder` as transformers opens it when nothing is said of attention."""
    network = task.auto_class().from_pretrained(str(folder), dtype=placement.compute, use_safetensors=True)
    return network.to(placement.device).eval()


def _copy_dequantised(source: PreTrainedModel, plain: PreTrainedModel) -> None:
    """Give `plain` the weights of every quantised layer as they are computed with."""
    for name, module in source.named_modules():
        if isinstance(module, FrozenLinear):
            plain.get_submodule(name.removesuffix(".base_layer")).weight.copy_(_dense_on_host(module))  # type: ignore[union-attr,operator]


def _dense_on_host(module: FrozenLinear) -> torch.Tensor:
    """The dense weight of a layer, made where the layer is, or on the host where that has no room for it."""
    try:
        return module.dense(torch.float32).to("cpu")
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        forget_frames(error)
    let_go()
    home = next(tensor.device for tensor in (*module.parameters(), *module.buffers()))
    try:
        return module.to("cpu").dense(torch.float32)
    finally:
        module.to(home)
