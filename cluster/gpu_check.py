"""Checks that want a GPU, in one command and one JSON: `make gpu-check`, `gumshoe doctor --gpu`, `python -m cluster.gpu_check`.

Each check is passed, failed or not run, and the last two say why in a line. Invariants:
- A check runs in a process of its own: one that is killed, hangs or runs out of memory ends no other, and memory peaks are its own. It ends
  with this process, with all it started; unless this one is killed outright nothing of it is left on disk either.
- Standard library only, here; so it starts on a bare image with torch alone, and what is missing there is a reason, not an error.
- Nothing is claimed that did not run: without a GPU every check says so. A rehearsal (`--cpu`) runs the code of the checks at tiny sizes on
  the CPU, marks its JSON as one, and proves nothing about a GPU. `NEVER_RUN` lists what no committed result covers.
- What a check has noted (`Bench.note`) is told however it ends: a time limit takes the rest, not the figures.
- The checks themselves are in `benchmarks/gpu_*.py`, each file a program for its own ones.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from gumshoe import ROOT, child_env

SCHEMA = 1
GIB = 1 << 30
PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"


@dataclass(frozen=True)
class Check:
    """One question to a GPU."""

    name: str
    program: str
    """File in benchmarks/ whose `FUNCTIONS` has it."""
    asks: str
    """What is true if it passes."""
    needs: tuple[str, ...] = ("torch", "transformers", "safetensors")
    """Modules without which it is not run."""
    limit_s: float = 240.0


CHECKS = (
    Check("bf16_loss", "gpu_learner", "loss, gradient and log-probs in bfloat16 are those of float32, within rounding"),
    Check("packed_attention", "gpu_learner", "packed and padded micro-batches give the same log-probs in every attention"),
    Check(
        "chunked_logprobs", "gpu_learner", "log-probs in chunks are the full ones, in less memory", ("torch",), 120.0
    ),
    Check("fsdp2_one_gpu", "gpu_learner", "a step under FSDP2 on one GPU is the step without it"),
    Check("learner_0.6b", "gpu_learner", "a learner of 0.6 billion parameters reaches 40 % MFU", limit_s=300.0),
    Check("learner_1.7b", "gpu_learner", "a learner of 1.7 billion parameters reaches 40 % MFU", limit_s=300.0),
    Check("learner_4b", "gpu_learner", "a learner of 4 billion parameters reaches 40 % MFU", limit_s=400.0),
    Check("learner_profile", "gpu_learner", "where the time of a learner step goes, kernel by kernel"),
    Check("cuda_ipc", "gpu_ipc", "tensors sent through CUDA IPC arrive whole in another process", ("torch",), 120.0),
    Check(
        "ipc_publish", "gpu_ipc", "the learner's IPC sender and vLLM's consumer agree, pass after pass, and leak no buffer",
        ("torch", "vllm"), 500.0,
    ),
    Check("faiss_gpu", "gpu_retrieval", "faiss-gpu in half precision finds what the CPU finds", ("numpy", "faiss"), 400.0),
    Check(
        "encoder_gpu", "gpu_retrieval", "an encoder in half precision on the GPU gives the CPU's vectors",
        ("torch", "transformers", "tokenizers", "safetensors", "numpy"), 120.0,
    ),
    Check(
        "vllm_logprobs", "gpu_sampler", "log-probs of vLLM and of the learner agree; tokens per second",
        ("torch", "transformers", "safetensors", "vllm"), 500.0,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Untried:
    """Code that no GPU has run."""

    what: str
    where: str
    check: str = ""
    """The check that would cover it, whole; empty: none does, it takes more than one GPU or a whole run."""
    also: tuple[str, ...] = ()
    """Other files that it takes."""


NEVER_RUN = (
    Untried("the learner in bfloat16, and whether it agrees with float32", "agents/learning/model.py", "bf16_loss"),
    Untried(
        "attention over packed sequences: the varlen and flash kernels, FlexAttention's backward pass",
        "agents/learning/attention.py",
        "packed_attention",
    ),
    Untried(
        "log-probs in chunks on a GPU, and their peak of memory", "agents/learning/logprobs.py", "chunked_logprobs"
    ),
    Untried(
        "speed (MFU) and memory of the learner at 0.6 to 4 billion parameters",
        "agents/learning/",
        "learner_4b",
        ("agents/learning/stopwatch.py",),
    ),
    Untried("the learner with LoRA, a critic or a reference", "agents/learning/lora.py"),
    Untried("FSDP2 by NCCL on one GPU", "agents/learning/shard.py", "fsdp2_one_gpu"),
    Untried("FSDP2 over NCCL in bfloat16 on several GPUs", "agents/learning/loading.py"),
    Untried("ranks that tell each other over NCCL why one cannot gather", "agents/learning/agreement.py"),
    Untried("context parallelism (Ulysses) over NCCL", "agents/learning/context.py"),
    Untried("sharded checkpoints (DCP) from the memory of GPUs", "agents/learning/sharded.py"),
    Untried("CUDA IPC between two processes of one GPU", "benchmarks/gpu_ipc.py", "cuda_ipc"),
    Untried("the learner's IPC sender beside vLLM's consumer", "cluster/vllm/senders.py", "ipc_publish"),
    Untried("publishing weights into engines by CUDA IPC", "cluster/vllm/receivers.py", also=("cluster/vllm/ipc.py",)),
    Untried(
        "publishing weights into engines by NCCL, one engine or several, tensor-parallel or not; aborting a hung broadcast",
        "cluster/vllm/senders.py",
        also=("cluster/publisher.py", "cluster/vllm/worker.py", "cluster/vllm/deadline.py"),
    ),
    Untried("weights by shared memory, relay or gloo into engines on GPUs", "cluster/vllm/segment.py"),
    Untried("LoRA adapters in engines on GPUs", "cluster/vllm/adapters.py"),
    Untried("the sampler on a GPU: log-probs, speed, CUDA graphs", "cluster/vllm/engine.py", "vllm_logprobs"),
    Untried("judge engines on GPUs", "cluster/judges.py"),
    Untried("chat engines of evaluations on GPUs", "cluster/evaluation/engines.py"),
    Untried("collocated layouts: sleep and wake of engines on a shared GPU", "cluster/vllm/residence.py"),
    Untried("learners on the GPUs of engines, their tensors moved out and back", "cluster/turns.py"),
    Untried(
        "nodes on several machines; seats with GPUs; s3:// and gs:// storage; vLLM tensor parallel inside a placement group",
        "cluster/placement.py",
    ),
    Untried("FAISS on a GPU, in half precision", "retrieval/faiss_index.py", "faiss_gpu"),
    Untried("FAISS cut over several GPUs", "retrieval/faiss_index.py"),
    Untried("encoders on a GPU", "retrieval/encode_hf.py", "encoder_gpu"),
    Untried("rerankers on a GPU", "retrieval/rerank.py"),
    Untried("GPUs shared by fractions, engines and learners at the same time", "cluster/layout.py"),
    Untried("what `gumshoe plan` counts, held against the memory of a GPU", "cluster/memory.py"),
    Untried(
        "a machine's GPUs looked for before a run, and its needs held against them",
        "cluster/machine.py",
        also=("cluster/doctor.py",),
    ),
    Untried("a whole training run on GPUs", "cluster/train.py", also=("cluster/learner.py",)),
)
"""What was never run on a GPU. An entry goes when a committed result (`benchmarks/results/gpu_*.json`) has its check passed; a test compares."""


@dataclass(frozen=True)
class Bench:
    """What a check runs on."""

    device: str
    """`cuda` or `cpu`."""
    card: str = ""
    """The GPU's name; empty on CPU."""
    note: Callable[[Mapping[str, Any]], None] = field(default=lambda figures: None, compare=False)
    """Takes all figures so far, in place of those before: of a check with several parts after each of them."""

    @property
    def tiny(self) -> bool:
        """A rehearsal: the same code at sizes a CPU does in seconds."""
        return self.device == "cpu"


Figures = dict[str, Any]
Function = Callable[[Bench], Figures]


class Failed(Exception):
    """A check's answer is no. `figures`: what was measured all the same."""

    def __init__(self, why: str, figures: Mapping[str, Any] | None = None) -> None:
        super().__init__(why)
        self.figures = dict(figures or {})


class NotRun(Exception):
    """A check finds, once it runs, that this machine cannot answer it. `figures`: what was measured all the same."""

    def __init__(self, why: str, figures: Mapping[str, Any] | None = None) -> None:
        super().__init__(why)
        self.figures = dict(figures or {})


@dataclass(frozen=True)
class Result:
    """What came of a check."""

    name: str
    asks: str
    status: str
    """`passed`, `failed` or `not run`."""
    why: str = ""
    """Why it failed or was not run, one line."""
    seconds: float = 0.0
    figures: Figures = field(default_factory=dict)


@dataclass(frozen=True)
class Facts:
    """What the machine offers."""

    gpus: tuple[str, ...] = ()
    modules: frozenset[str] = frozenset()
    about: Mapping[str, Any] = field(default_factory=dict)


def unavailable(check: Check, facts: Facts, *, cpu: bool) -> str:
    """Why a check is not started on this machine; empty when it is."""
    if not cpu and not facts.gpus:
        return str(facts.about.get("no_gpu") or "no GPU")
    missing = [name for name in check.needs if name not in facts.modules]
    return f"{' and '.join(missing)} not installed here" if missing else ""


def look(cpu: bool = False) -> Facts:
    """What is installed, and the GPUs torch can use. They are asked for in another process, which leaves no context on them."""
    wanted = {name for check in CHECKS for name in check.needs}
    modules = frozenset(name for name in wanted if importlib.util.find_spec(name) is not None)
    about: dict[str, Any] = {
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
    }
    if "torch" not in modules:
        return Facts((), modules, about | {"no_gpu": "no GPU can be looked for: torch is not installed here"})
    done = subprocess.run(
        [sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=300, check=False, env=_environment()
    )
    try:
        told = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return Facts((), modules, about | {"no_gpu": f"no GPU can be looked for: torch does not start ({last[:200]})"})
    gpus = tuple(told.pop("gpus"))
    about |= told
    return Facts(gpus, modules, about | ({} if gpus else {"no_gpu": f"no GPU that torch {told['torch']} can use"}))


_PROBE = """
import importlib.metadata as m, json, torch
have = torch.cuda.is_available()
each = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())] if have else []
def version(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return None
print(json.dumps({
    "torch": torch.__version__, "cuda": torch.version.cuda, "transformers": version("transformers"), "vllm": version("vllm"),
    "gpus": [p.name for p in each], "gpu_gib": [round(p.total_memory / 2**30, 1) for p in each],
    "capability": [f"{p.major}.{p.minor}" for p in each]}))
"""


def run(
    checks: Iterable[Check] = CHECKS,
    *,
    cpu: bool = False,
    facts: Facts | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """All checks, one after the other: the JSON. `cpu`: rehearse them at tiny sizes on the CPU. `tell` gets a line per check."""
    results = []
    with _ended_in_order():
        facts = look(cpu) if facts is None else facts
        for check in checks:
            why = unavailable(check, facts, cpu=cpu)
            result = Result(check.name, check.asks, NOT_RUN, why) if why else _start(check, facts, cpu=cpu)
            results.append(result)
            tell(line_of(result))
    return {
        "schema": SCHEMA,
        "date": time.strftime("%Y-%m-%d"),
        "commit": _commit(),
        "rehearsal_on_cpu": cpu,
        "gpus": list(facts.gpus),
        "machine": {k: v for k, v in facts.about.items() if v is not None},
        "counts": {status: sum(r.status == status for r in results) for status in (PASSED, FAILED, NOT_RUN)},
        "checks": [asdict(r) for r in results],
        "never_run_on_a_gpu": [untried.what for untried in NEVER_RUN],
    }


def line_of(result: Result) -> str:
    """A result as a line for people."""
    shown = ", ".join(f"{k} {_short(v)}" for k, v in result.figures.items() if isinstance(v, int | float))
    return f"{result.status:<8} {result.name:<17} {result.why or shown}"


def healthy(report: Mapping[str, Any]) -> bool:
    """Whether no check failed. What was not run is no failure, and no proof."""
    return not report["counts"][FAILED]


def summary(report: Mapping[str, Any]) -> str:
    """The last line of all."""
    counts, where = report["counts"], ", ".join(report["gpus"]) or "no GPU"
    kind = "rehearsal on CPU, which proves nothing about a GPU: " if report["rehearsal_on_cpu"] else ""
    return f"{kind}{counts[PASSED]} passed, {counts[FAILED]} failed, {counts[NOT_RUN]} not run ({where})"


def write(content: Mapping[str, Any], path: Path) -> Path:
    """Writes the JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
    return path


# ------------------------------------------------------------------------------------------------------- one check


def _start(check: Check, facts: Facts, *, cpu: bool) -> Result:
    """Runs a check in a process of its own."""
    bench = Bench("cpu") if cpu else Bench("cuda", facts.gpus[0])
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gumshoe-gpu-") as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, str(ROOT / "benchmarks" / f"{check.program}.py"), "--one", check.name]
        command += ["--device", bench.device, "--card", bench.card, "--out", str(out), "--tied"]
        ended = _watched(command, Path(folder) / "log", check.limit_s)
        seconds = round(time.monotonic() - began, 1)
        told = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {"figures": {}}
    status, why = (told["status"], told["why"]) if "status" in told else (FAILED, ended or "it ended without an answer")
    return Result(check.name, check.asks, status, why, seconds, told["figures"])


def answer(functions: Mapping[str, Function], argv: Sequence[str]) -> int:
    """The child's side: runs one function and writes what came of it."""
    args = _arguments(functions, argv)
    if args.tied:
        threading.Thread(target=_end_with_parent, name="tied", daemon=True).start()
    out = Path(args.out)
    status, why, figures = PASSED, "", dict[str, Any]()

    def note(noted: Mapping[str, Any]) -> None:
        nonlocal figures
        figures = dict(noted)
        write({"figures": figures}, out)  # without a status: no answer yet

    try:
        figures = functions[args.one](Bench(args.device, args.card, note))
    except Failed as error:
        status, why, figures = FAILED, str(error), error.figures or figures
    except NotRun as error:
        status, why, figures = NOT_RUN, str(error), error.figures or figures
    except Exception as error:  # what breaks a check is its answer
        status, why = FAILED, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        traceback.print_exc()
    write({"status": status, "why": why, "figures": figures}, out)
    return 0


def program(name: str, functions: Mapping[str, Function], argv: Sequence[str]) -> int:
    """What a file of checks does as a program: all its checks or `--only` some, or, as the child, one of them."""
    if "--one" in argv:
        return answer(functions, argv)
    return main(argv, checks=[c for c in CHECKS if c.program == name], prog=f"python benchmarks/{name}.py")


def main(
    argv: Sequence[str] | None = None, checks: Sequence[Check] = CHECKS, prog: str = "python -m cluster.gpu_check"
) -> int:
    """Runs checks, prints a line for each, writes the JSON. Exit status 1 when one failed."""
    parser = argparse.ArgumentParser(prog=prog, description="Run the checks that want a GPU.")
    parser.add_argument("--cpu", action="store_true", help="rehearse them at tiny sizes on the CPU")
    parser.add_argument("--only", default="", metavar="A,B", help="these checks alone")
    parser.add_argument("--limit", type=float, default=0.0, metavar="S", help="most seconds of one check")
    parser.add_argument("--out", type=Path, default=None, metavar="FILE", help="write the JSON there")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    names = [c.name for c in checks]
    only = [name for name in args.only.split(",") if name]
    if unknown := [name for name in only if name not in names]:
        parser.error(f"no check {unknown[0]!r}; there are {', '.join(names)}")
    chosen = [c for c in checks if not only or c.name in only]
    if args.limit:
        chosen = [replace(c, limit_s=min(c.limit_s, args.limit)) for c in chosen]
    report = run(chosen, cpu=args.cpu, tell=lambda line: print(line, flush=True))
    if args.out is not None:
        print(f"written: {write(report, args.out)}")
    print(summary(report))
    return 0 if healthy(report) else 1


def _arguments(functions: Mapping[str, Function], argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--one", choices=sorted(functions), required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--card", default="")
    parser.add_argument("--out", required=True)
    parser.add_argument("--tied", action="store_true", help="end when standard input does")
    return parser.parse_args(argv)


def _watched(command: Sequence[str], log: Path, limit_s: float) -> str:
    """Runs a command to its end or its limit, with all it starts. Returns how it ended, empty if well."""
    # What it leaves in a temporary folder goes with the log's; its standard input ends with this process, however that ends.
    env = _environment() | {"TMPDIR": str(log.parent)}
    env.setdefault(
        "TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}"
    )  # for the next check too
    with log.open("wb") as output:
        child = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True
        )
        try:
            status = child.wait(limit_s)
        except subprocess.TimeoutExpired:
            return f"it was still running after {limit_s:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)  # an engine's processes, say, which hold memory of the GPU
            child.wait()
            assert child.stdin is not None
            child.stdin.close()
    if status == 0:
        return ""
    said = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    ended = f"signal {-status}" if status < 0 else f"exit status {status}"
    return f"it ended with {ended}" + (f": {said[-1][:300]}" if said else "")


def _end_with_parent() -> None:
    """In a check's process, which leads a process group of its own: the group ends as soon as nobody holds the other end of its input."""
    with contextlib.suppress(OSError):
        while os.read(0, 1):
            pass
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


@contextlib.contextmanager
def _ended_in_order() -> Iterator[None]:
    """SIGTERM, SIGHUP and Ctrl-C end what runs within, once: a second one does not cut the cleaning up short."""

    def end(number: int, _: object) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + number)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # nobody else may set handlers
        for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            before[each] = signal.signal(each, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _environment() -> dict[str, str]:
    return {**os.environ, **child_env()}


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:  # an image without git
        return "unknown"
    return done.stdout.strip() or "unknown"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
