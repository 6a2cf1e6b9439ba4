"""Training on a CPU asks for no GPU code: no line of whet imports triton, no kernel file is loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Runs in a process of its own. What torch or bitsandbytes import for themselves is their affair, so the finder looks
# for whose line of code asks for triton.
TRAIN_ONE_STEP = """
import sys
from pathlib import Path

asked = []

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            frame = sys._getframe(1)
            while frame is not None and "importlib" in frame.f_code.co_filename:
                frame = frame.f_back
            asked.append("" if frame is None else frame.f_code.co_filename)
        return None

sys.meta_path.insert(0, Finder)
from whet.recipe import parse
from whet.training.run import train

model, data, out, *storages = sys.argv[1:]
for storage in storages:
    settings = [f"model.path={model}", f"data.dataset={data}", f"output_dir={out}/{storage}", "train.max_steps=1",
                "base.device=cpu", f"base.storage={storage}", "data.val_size=0", "method.r=4"]
    train(parse(None, settings))
    own = [name for name in asked if Path(name).parent.parent.name == "whet"]
    kernels = [name for name in sys.modules if name.startswith("whet.") and name.endswith("_triton")]
    print("RESULT", storage, own, kernels)
"""


STORAGES = ("bf16", "nf4", "fp8")


def test_a_cpu_run_loads_no_kernel(tmp_path: Path, model_dir: Path, data_file: Path) -> None:
    places = map(str, (model_dir, data_file, tmp_path / "run"))
    command = [sys.executable, "-c", TRAIN_ONE_STEP, *places, *STORAGES]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for storage in STORAGES:
        assert f"RESULT {storage} [] []" in done.stdout
        assert (tmp_path / "run" / storage / "finished.json").is_file()
