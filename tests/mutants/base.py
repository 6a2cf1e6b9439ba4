"""Careless edits of what keeps users' files: outputs against inputs, locks, identity, headers, whole files."""

from mutants.mutant import Mutant

OUTPUTS, LOCK, IDENTITY = "test_outputs.py", "test_lock.py", "test_identity.py"
HEADERS, FILES, DAMAGED = "test_headers.py", "test_whole_files.py", "test_damaged_runs.py"

MUTANTS = [
    Mutant(
        "outputs: names are compared, not files", "base/outputs.py",
        "if path == real or (state is not None and _same(state, real)):", "if path == real:",
        "a hard link to the data is overwritten", OUTPUTS,
    ),
    Mutant(
        "outputs: a folder above is taken", "base/outputs.py",
        "            above = [real, *real.parents]\n", "            above = [real]\n",
        "a folder that holds the model is replaced", OUTPUTS,
    ),
    Mutant(
        "outputs: rows may be added to the data", "base/outputs.py",
        'if one.closed != "no" and _would_be_read(path, one):', 'if one.closed == "all" and not path:',
        "what a check leaves out is read as data the next time", OUTPUTS,
    ),
    Mutant(
        "outputs: devices are files", "base/outputs.py",
        "not stat.S_ISREG(state.st_mode)", "stat.S_ISCHR(state.st_mode)",
        "a pipe becomes a file", "test_outputs.py -k no_output",
    ),
    Mutant(
        "check: outputs are not held against inputs", "verbs/data.py",
        "    inputs = inputs_of_recipe(parsed)\n    page =", "    inputs: list[Input] = []\n    page =",
        "whet data check d.jsonl --removed d.jsonl loses the data", OUTPUTS,
    ),
    Mutant(
        "merge: the output is not held against the inputs", "ship/merge.py",
        "return output_directory(out, inputs_of_run(run))", "return output_directory(out, [])",
        "a merge lands in the folder of an adapter", OUTPUTS,
    ),
    Mutant(
        "merge: what stands there is not looked at", "ship/merge.py",
        "    if not out.exists() or not any(out.iterdir()):\n", "    if not out.exists() or any(out.iterdir()):\n",
        "merging again fails late, or takes what it finds for its own", "test_merge.py -k 'again or replaced'",
    ),
    Mutant(
        "lock: nobody is kept out", "base/lock.py",
        "            held = True\n", "            held = False\n",
        "two processes write in one run directory", LOCK,
    ),
    Mutant(
        "lock: another host is not believed", "base/lock.py",
        '        if owner.get("host", here) != here:\n', '        if not owner.get("host", here):\n',
        "two hosts write in one run directory", LOCK,
    ),
    Mutant(
        "lock: taken and left", "base/lock.py",
        "            self.path.unlink(missing_ok=True)\n", "            pass\n",
        "a lock stays behind in every run", LOCK,
    ),
    Mutant(
        "identity: the base is not compared", "opening.py",
        "        check_base(run.recipe.model, base)\n    return base\n", "        pass\n    return base\n",
        "a run answers on another model without a word", "test_identity.py -k every_verb",
    ),
    Mutant(
        "identity: the seal is not remembered", "training/finish.py",
        ' | {"trained_sha256": seal_digest(run.trained)}', "",
        "the adapter of another run may be copied over", IDENTITY,
    ),
    Mutant(
        "identity: the config does not count", "engine/load/identity.py",
        '    for part, what in (("config", "config"), ', "    for part, what in (",
        "another sliding window than was trained with", IDENTITY,
    ),
    Mutant(
        "adapters: a recipe above an adapter is its run", "adapters/loaded.py",
        'if directory.name != "adapter" or not all(', "if not any(",
        "a stray recipe names another base", "test_identity.py -k happens_to_stand",
    ),
    Mutant(
        "headers: doubled keys", "engine/load/headers.py",
        "    if len(found) < len(pairs):\n", "    if len(found) > len(pairs):\n",
        "one of two tensors of a name is trained on", HEADERS,
    ),
    Mutant(
        "headers: numbers that are none", "engine/load/headers.py",
        "not bool(torch.isfinite(file.get_tensor(name)).all())", "not bool(file.get_tensor(name).numel())",
        "an adapter with NaN is evaluated", HEADERS,
    ),
    Mutant(
        "headers: layers too many", "engine/load/headers.py",
        "        if known and not any(", "        if not known and not any(",
        "a config that says fewer layers is believed", HEADERS,
    ),
    Mutant(
        "files: permissions of a library", "base/files.py",
        "                file.chmod(mode)", "                pass",
        "weights that nobody else may read", FILES,
    ),
    Mutant(
        "files: a directory is replaced unasked", "base/files.py",
        "        if replace and path.exists():\n", "        if path.exists():\n",
        "an output takes the place of a folder of the user", FILES,
    ),
    Mutant(
        "files: what killed writes left of a file stays", "base/files.py",
        "    sweep(path.parent, path.name)\n    beside = hidden_beside(path)\n    encoding",
        "    beside = hidden_beside(path)\n    encoding",
        "hidden files pile up beside an output", FILES,
    ),
    Mutant(
        "files: what is being written is not locked", "base/files.py",
        "            _lock(file.fileno())\n            yield file\n", "            yield file\n",
        "the file that another process is writing is removed", FILES,
    ),
    Mutant(
        "predict: answers are written in place", "ship/answer_file.py",
        "    with whole_file(path) as file:\n", '    with path.open("w", encoding="utf-8", newline="") as file:\n',
        "half of the answers stand there after a kill", "test_faults.py -k predict",
    ),
    Mutant(
        "judge: scores are written in place", "data/judge/output.py",
        "stack.enter_context(whole_file(target))", 'stack.enter_context(target.open("w", encoding="utf-8"))',
        "half of the scores stand there after a kill, and the old ones are gone", "test_faults.py -k judge",
    ),
    Mutant(
        "delete: file by file", "base/files.py",
        "    path.rename(nameless)\n    remove_tree(nameless)\n", "    remove_tree(path)\n",
        "a part of an adapter stays behind, and cannot be deleted as one", "test_faults.py -k delete",
    ),
    Mutant(
        "delete: what a killed call left stays", "ship/compose.py",
        "    sweep(place.parent, place.name)\n", "",
        "a hidden adapter fills the disk for ever", "test_adapters.py -k on_disk",
    ),
    Mutant(
        "rename: any recipe beside makes it a run's", "ship/compose.py",
        'directory.resolve().name == "adapter" and ', "",
        "an adapter in a folder with a recipe cannot be renamed or deleted", "test_adapters.py -k on_disk",
    ),
    Mutant(
        "train: a finished run has its report", "api.py",
        "        if lacks_report(run.path):\n", "        if False:\n",
        "a run that was killed at its very end never gets a report", "test_early.py -k report",
    ),
    Mutant(
        "train: any report is that of a run", "report/of_run.py",
        "file.is_file() and file.stat().st_mtime_ns >= ended for", "file.is_file() for",
        "more steps leave the report of fewer", "test_early.py -k report",
    ),
    Mutant(
        "finish: a damaged best checkpoint is loaded", "training/finish.py",
        "        if problem is None:\n", "        if problem is None or step:\n",
        "the result has a turned bit", DAMAGED,
    ),
    Mutant(
        "cli: threads that wait spin", "cli.py",
        "if not any(name in os.environ for name in same):", "if False:",
        "beside a busy process each step takes longer", "test_waiting_threads.py",
    ),
    Mutant(
        "cli: what the user set about waiting is overwritten", "cli.py",
        "if not any(name in os.environ for name in same):", "if True:",
        "a user cannot choose how threads wait", "test_waiting_threads.py",
    ),
]  # fmt: skip
