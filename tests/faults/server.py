"""Run commands of whet in children of one process that has imported everything, with a fault in a file operation.

Started with `shim.c` in front of libc. Reads a JSON object a line: {"words": [...], "place": DIRECTORY, "kind": the
fault as the shim numbers it, "at": N, "stay": bool, "log": FILE, "online": may it ask an endpoint}; the command runs
in `place`, and operations below it count. Answers {"status": exit status, "operations": a letter for each, as the shim
has them}.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

USED = ("torch", "peft", "safetensors.torch", "transformers.models.llama.modeling_llama", "ruamel.yaml", "sacrebleu",
        "rouge_score.rouge_scorer", "matplotlib.backends.backend_agg", "matplotlib.figure", "whet.api",
        "whet.data.judge.added", "whet.data.judge.scores", "whet.data.row_model", "whet.engine.load.stream",
        "whet.evaluation.printed", "whet.evaluation.run", "whet.methods.layers.lora_layer", "whet.methods.saved",
        "whet.report.charts", "whet.report.data_page", "whet.report.page", "whet.ship.compose", "whet.ship.merge",
        "whet.ship.predict", "whet.training.run")  # fmt: skip


def child(order: dict[str, Any], counted: int) -> None:
    import torch

    from whet import cli

    torch.set_num_threads(1)
    if order["online"]:
        del os.environ["HF_HUB_OFFLINE"]
    shim = ctypes.CDLL(None)
    os.chdir(order["place"])
    shim.fault_arm(os.fsencode(order["place"]), order["kind"], order["at"], int(order["stay"]))
    try:
        status = cli.run(order["words"])
    except SystemExit as ended:
        status = int(ended.code or 0)
    shim.fault_letters.restype = ctypes.c_char_p
    letters = shim.fault_letters()
    shim.fault_arm(b"", 0, 0, 0)
    os.write(counted, letters)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def answer(order: dict[str, Any]) -> dict[str, Any]:
    read, counted = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        with Path(order["log"]).open("wb") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        try:
            child(order, counted)
        finally:
            sys.excepthook(*sys.exc_info())
            sys.stderr.flush()
            os._exit(70)
    os.close(counted)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read()
    return {"status": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), "operations": said.decode()}


def warm_up() -> None:
    """Do once what each child would do over again: import, make the check of recipes, find the fonts of a figure."""
    for name in USED:
        importlib.import_module(name)
    from whet import recipe
    from whet.report.loss_plot import write_loss_plot

    recipe.parse(None)
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "metrics.jsonl").touch()
        write_loss_plot(Path(directory))
    gc.collect()
    gc.freeze()  # what is there by now is no child's garbage, and need not be walked nor copied


def serve() -> None:
    warm_up()
    from whet.base.console import quiet_libraries

    quiet_libraries()
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    serve()
