"""Careless edits of training/: checkpoints, schedule, records, Ctrl-C."""

from mutants.mutant import Mutant

EDGES = "test_training_edges.py"
RESUME = f"{EDGES} test_resume.py"
SCHEDULE = "test_training.py -k 'schedule or rates or ends'"

MUTANTS = [
    Mutant(
        "checkpoint: sizes are enough", "training/checkpoint.py",
        '        if _sha256(file) != facts["sha256"]:\n', "        if not file.name:\n",
        "a flipped bit is trained on", "test_resume.py -k damaged",
    ),
    Mutant(
        "checkpoint: the oldest", "training/checkpoint.py",
        '    for path in sorted(directory.glob("step-*"), key=_step_of, reverse=True):\n',
        '    for path in sorted(directory.glob("step-*"), key=_step_of):\n',
        "a run goes on from an old checkpoint although a newer one is there", EDGES,
    ),
    Mutant(
        "checkpoint: steps by the alphabet", "training/checkpoint.py",
        "return int(tail) if tail.isdigit() else -1", "return tail if tail.isdigit() else \"\"  # type: ignore",
        "step-9 counts as newer than step-10", EDGES,
    ),
    Mutant(
        "checkpoint: other rows go unseen", "training/checkpoint.py",
        '            if manifest["data"] != identity.data:\n', '            if manifest["data"] != manifest["data"]:\n',
        "a run is continued on other data", EDGES,
    ),
    Mutant(
        "checkpoint: one fewer is kept", "training/checkpoint.py",
        "    for path in found[keep:]:\n", "    for path in found[keep - 1 :]:\n",
        "save_total_limit=1 leaves nothing to resume from",
        "test_resume.py test_training.py -k 'pruning or best_weights'",
    ),
    Mutant(
        "checkpoint: the best is pruned", "training/checkpoint.py",
        "        if _step_of(path) not in protected:\n", "        if _step_of(path) in protected:\n",
        "the best weights are gone when they are wanted", "test_training.py -k best_weights",
    ),
    Mutant(
        "checkpoint: damaged later ones count", "training/checkpoint.py",
        "reverse=True) if _step_of(path) <= saved]", "reverse=True)]",
        "the only sound checkpoint is removed for a damaged one", "test_resume.py -k pruning",
    ),
    Mutant(
        "checkpoint: random numbers start anew", "training/checkpoint.py",
        '    restore_random_state(load_file(path / "random.safetensors"), state["random"])\n', "",
        "a resumed run draws other dropout masks", RESUME,
    ),
    Mutant(
        "checkpoint: moments start anew", "training/checkpoint.py",
        '    _unflatten(optimiser, load_file(path / "optimizer.safetensors"), state["optimizer"])\n', "",
        "a resumed run has no momentum", RESUME,
    ),
    Mutant(
        "checkpoint: the manifest is written first", "training/checkpoint.py",
        "        for file in sorted(beside.iterdir()):\n            sync(file)\n",
        "        for file in sorted(beside.iterdir())[:-1]:\n            sync(file)\n",
        "a file is missing in the manifest and may be damaged unseen", EDGES,
    ),
    Mutant(
        "checkpoint: leftovers stay", "training/checkpoint.py",
        'if path.suffix in (".tmp", ".old"):', 'if path.suffix in (".old",):',
        "what killed writes left fills the disk", "test_resume.py -k swept",
    ),
    Mutant(
        "checkpoint: device weights for exact ones", "training/checkpoint.py",
        "    return trained_state(model, {} if optimiser is None else optimiser.exact_weights)\n",
        "    return trained_state(model, {})\n",
        "halved weights lose the bits that only the host has", "test_host_adam.py",
    ),
    Mutant(
        "checkpoint: masters do not follow", "training/checkpoint.py",
        "        optimiser.follow_weights()\n", "        optimiser.zero_grad()\n",
        "a resumed run with its optimiser on the host goes on from the first weights", "test_host_adam.py",
    ),
    Mutant(
        "checkpoint: shared tables are saved once", "training/checkpoint.py",
        "tensors[f\"{prefix}/{name}\"] = value.clone() if shared else value.contiguous()",
        "tensors[f\"{prefix}/{name}\"] = value.contiguous()",
        "8-bit optimisers cannot be saved", EDGES,
    ),
    Mutant(
        "schedule: warm-up from 0", "training/schedule.py",
        "return peak * (step + 1) / warmup", "return peak * step / warmup",
        "the first step learns nothing and the peak comes late", SCHEDULE,
    ),
    Mutant(
        "schedule: warm-up rounded down", "training/schedule.py",
        "warmup = math.ceil(warmup_ratio * total)", "warmup = int(warmup_ratio * total)",
        "short runs have no warm-up", SCHEDULE,
    ),
    Mutant(
        "schedule: falls over all steps", "training/schedule.py",
        "left = (total - step) / max(1, total - warmup)", "left = (total - step) / total",
        "the rate jumps down after warm-up", SCHEDULE,
    ),
    Mutant(
        "schedule: cosine rises", "training/schedule.py",
        "math.cos(math.pi * (1 - left))", "math.cos(math.pi * left)",
        "the rate rises to the end", SCHEDULE,
    ),
    Mutant(
        "schedule: decay one step late", "training/schedule.py",
        "return peak * min(1.0, (total - step) / decay)", "return peak * min(1.0, (total - step + 1) / decay)",
        "the last step of warmup_stable_decay is too large", SCHEDULE,
    ),
    Mutant(
        "schedule: decay share of what is left", "training/schedule.py",
        "decay = max(1, math.ceil(decay_ratio * total))", "decay = max(1, math.ceil(decay_ratio * (total - warmup)))",
        "the decay phase is shorter than it was asked to be", SCHEDULE,
    ),
    Mutant(
        "observers: one offset for both files", "training/observers.py",
        "os.ftruncate(file.fileno(), state.offsets[name])", 'os.ftruncate(file.fileno(), state.offsets["metrics"])',
        "after a resume the timing is cut in the middle of a line", EDGES,
    ),
    Mutant(
        "observers: nothing is forgotten", "training/observers.py",
        "            os.ftruncate(file.fileno(), state.offsets[name])\n", "",
        "after a resume steps stand twice in metrics.jsonl", RESUME,
    ),
    Mutant(
        "observers: the file begins anew", "training/observers.py",
        '{"metrics": metrics.open("a", encoding="utf-8")', '{"metrics": metrics.open("w", encoding="utf-8")',
        "a resumed run loses the lines before", RESUME,
    ),
    Mutant(
        "observers: lines wait in memory", "training/observers.py",
        "        self._files[name].flush()\n",
        "",
        "whoever follows metrics.jsonl sees nothing for minutes",
        EDGES,
    ),
    Mutant(
        "observers: kind and step are drawn", "training/observers.py",
        'if key not in ("kind", "step"):', 'if key in ("kind", "step"):',
        "TensorBoard shows nothing but the step", EDGES,
    ),
    Mutant(
        "interrupt: the second Ctrl-C waits too", "training/interrupt.py",
        "        self.asked()\n        signal.signal(signal.SIGINT, self.before)\n", "        self.asked()\n",
        "a run that hangs cannot be stopped with Ctrl-C", EDGES,
    ),
    Mutant(
        "interrupt: the handler stays", "training/interrupt.py",
        "        if self.before is not None:\n            signal.signal(signal.SIGINT, self.before)\n",
        "        pass\n",
        "after training Ctrl-C does nothing", EDGES,
    ),
    Mutant(
        "interrupt: in any thread", "training/interrupt.py",
        "if threading.current_thread() is threading.main_thread():", "if threading.current_thread():",
        "training in a thread ends with an error", EDGES,
    ),
    Mutant(
        "finish: what was saved is not opened", "training/finish.py",
        "        check_saved(ready, arranged.model, directory)\n", "        pass\n",
        "a run is finished that evaluation cannot open", "test_saved.py",
    ),
    Mutant(
        "saved: other numbers pass", "methods/saved.py",
        "if not _begins_with(saved.get_tensor(name), wanted[name], cast)", "if saved.get_tensor(name) is None",
        "a flipped bit in an adapter is not seen", "test_saved.py",
    ),
    Mutant(
        "experts: silence", "methods/experts.py",
        "    if left:\n", "    if not left:\n",
        "nobody is told that most of a model is not trained", "test_experts.py -k share",
    ),
    Mutant(
        "extend: a finished run of another recipe goes on", "runs.py",
        "if set(differing) <= LENGTH:", "if LENGTH & set(differing):",
        "another rate or other rows are trained on top of a finished run", "test_extend.py -k cannot_go_on",
    ),
    Mutant(
        "extend: without its checkpoint a run begins anew", "runs.py",
        'if not (old.checkpoints / f"step-{steps}" / "manifest.json").is_file():', "if False:",
        "a finished run is trained again from its first step", "test_extend.py -k last_checkpoint",
    ),
]  # fmt: skip
