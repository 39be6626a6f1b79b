"""The GPU checks: what is counted, what runs where, what is said when nothing can run. A rehearsal runs every check (tests/engines)."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.gpu_profile import by_purpose, purpose
from cluster import cli, doctor, gpu_check
from cluster.flops import Decoder, mfu, peak_tflops
from cluster.gpu_check import CHECKS, NEVER_RUN, Bench, Check, Facts, Failed, NotRun, answer, run, unavailable
from gumshoe import ROOT

QWEN3_4B = json.loads((ROOT / "configs/shapes/qwen3_4b.json").read_text())


# ------------------------------------------------------------------------------------------------------ arithmetic


def test_operations_by_hand() -> None:
    # width 4, 2 heads of 3, 1 head of keys and values, inner 5, 7 words, 2 layers
    tiny = {
        "hidden_size": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 3, "intermediate_size": 5,
        "vocab_size": 7, "num_hidden_layers": 2,
    }  # fmt: skip
    # a layer: q 4x6, k 4x3, v 4x3, out 6x4, gate, up and down 4x5 each
    assert Decoder.of(tiny) == Decoder(2 * (24 + 12 + 12 + 24 + 60), 28, 2 * 2 * 3)
    # sequences of 2 and 3 tokens, 4 trained: 6 x 264 x 5 + 6 x 28 x 4 + 6 x 12 x (4 + 9)
    assert Decoder.of(tiny).training_flops([2, 3], 4) == 7920 + 672 + 936


def test_operations_of_a_published_model() -> None:
    # Qwen3-4B by its config: 36 x (2560 x 4096 x 2 + 2560 x 1024 x 2 + 3 x 2560 x 9728)
    four = Decoder.of(QWEN3_4B)
    assert four.body_weights == 36 * (20_971_520 + 5_242_880 + 74_711_040) == 3_633_315_840
    assert four.head_weights == 2560 * 151_936 and four.attention_width == 36 * 32 * 128
    # one sequence of 4096, all trained: 6 N T of 4.02 billion, and attention 6 x 147456 x 4096^2
    flops = four.training_flops([4096], 4096)
    assert flops == 6 * (3_633_315_840 + 388_956_160) * 4096 + 6 * 147_456 * 4096**2
    # in 0.25 s on a card of 989.4 TFLOP/s: 113.7 of 247.35 tera-operations
    assert mfu(flops, 0.25, "NVIDIA H200") == pytest.approx(0.4596, abs=1e-4)
    assert mfu(flops, 0.25, "NVIDIA H200", 2) == pytest.approx(0.2298, abs=1e-4)
    assert mfu(flops, 0.25, "A card of tomorrow") is None


def test_padding_and_recomputing_count_for_nothing_and_experts_are_refused() -> None:
    four = Decoder.of(QWEN3_4B)
    assert four.training_flops([1000, 1000], 0) < four.training_flops([2000], 0)
    with pytest.raises(ValueError, match="give a dense decoder"):
        Decoder.of(QWEN3_4B | {"num_experts": 128})


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756.0), ("NVIDIA H100 80GB PCIe", 756.0), ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H200", 989.4), ("NVIDIA H200 NVL", 835.0), ("NVIDIA A100-SXM4-80GB", 312.0), ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA L4", 121.0), ("NVIDIA L40S", 362.0), ("NVIDIA GH200 480GB", 989.4), ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA RTX A6000", 154.8), ("NVIDIA A10", 125.0), ("NVIDIA A1000", None), ("", None),
    ],
)  # fmt: skip
def test_peaks_by_the_names_drivers_give(name: str, peak: float | None) -> None:
    assert peak_tflops(name) == peak


# ---------------------------------------------------------------------------------------------- what runs, and why not


def test_without_a_gpu_every_check_says_so_and_that_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    none = Facts((), frozenset({"torch"}), {"torch": "2.11.0", "no_gpu": "no GPU that torch 2.11.0 can use"})
    monkeypatch.setattr(gpu_check, "look", lambda cpu=False: none)
    out = tmp_path / "new" / "gpu.json"
    assert gpu_check.main(["--out", str(out)]) == 0
    report, said = json.loads(out.read_text()), capsys.readouterr().out
    assert [c["name"] for c in report["checks"]] == [c.name for c in CHECKS]
    assert {(c["status"], c["why"]) for c in report["checks"]} == {("not run", "no GPU that torch 2.11.0 can use")}
    assert report["counts"] == {"passed": 0, "failed": 0, "not run": len(CHECKS)} and not report["rehearsal_on_cpu"]
    assert said.splitlines()[-1] == f"0 passed, 0 failed, {len(CHECKS)} not run (no GPU)"
    assert doctor.examine_gpu(lambda line: None)


def test_the_doctor_rehearses_on_the_cpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    told: list[bool] = []

    def rehearsed(*, cpu: bool, tell: Any) -> dict[str, Any]:
        told.append(cpu)
        counts = {"passed": 1, "failed": 1, "not run": 0}
        return {"counts": counts, "gpus": [], "rehearsal_on_cpu": cpu}

    monkeypatch.setattr(doctor, "run", rehearsed)
    assert cli.main(["doctor", "--gpu", "--cpu"]) == 1 and told == [True], "a rehearsal that fails is not healthy"
    out = capsys.readouterr().out
    assert out.startswith("rehearsal on CPU, which proves nothing about a GPU: 1 passed, 1 failed")
    assert f"- {NEVER_RUN[0].what}" in out


def test_what_is_missing_is_named() -> None:
    bare = Facts(("NVIDIA H200",), frozenset({"torch", "numpy", "safetensors"}))
    by_name = {c.name: unavailable(c, bare, cpu=False) for c in CHECKS}
    assert by_name["chunked_logprobs"] == by_name["cuda_ipc"] == ""
    assert by_name["bf16_loss"] == "transformers not installed here"
    assert by_name["vllm_logprobs"] == "transformers and vllm not installed here"
    assert unavailable(CHECKS[0], Facts(), cpu=True) == "torch and transformers and safetensors not installed here"


def test_an_unknown_check_is_refused_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_check.main(["--only", "bf16_los"])
    assert "no check 'bf16_los'; there are bf16_loss, packed_attention" in capsys.readouterr().err


def broken(bench: Bench) -> dict[str, Any]:
    raise Failed("log-probs differ by 3", {"logprob_max": 3.0})


def wanting(bench: Bench) -> dict[str, Any]:
    raise NotRun("this FAISS was built without GPUs", {"gpus": 0})


def crashing(bench: Bench) -> dict[str, Any]:
    raise RuntimeError("CUDA error:\nan illegal memory access")


FUNCTIONS = {"good": lambda bench: {"tiny": bench.tiny}, "broken": broken, "wanting": wanting, "crashing": crashing}


@pytest.mark.parametrize(
    "name, expected",
    [
        ("good", ("passed", "", {"tiny": True})),
        ("broken", ("failed", "log-probs differ by 3", {"logprob_max": 3.0})),
        ("wanting", ("not run", "this FAISS was built without GPUs", {"gpus": 0})),
        ("crashing", ("failed", "RuntimeError: CUDA error: an illegal memory access", {})),
    ],
)
def test_what_comes_of_a_check(name: str, expected: tuple[str, str, dict], tmp_path: Path) -> None:
    out = tmp_path / "one.json"
    assert answer(FUNCTIONS, ["--one", name, "--device", "cpu", "--out", str(out)]) == 0
    told = json.loads(out.read_text())
    assert (told["status"], told["why"], told["figures"]) == expected


@pytest.mark.parametrize(
    "code, limit_s, why",
    [
        ("import os; os.kill(os.getpid(), 9)", 30.0, "it ended with signal 9"),
        ("raise SystemExit('libcuda.so is missing')", 30.0, "it ended with exit status 1: libcuda.so is missing"),
        ("import time; time.sleep(60)", 0.3, "it was still running after 0 s"),
        ("", 30.0, "it ended without an answer"),
    ],
)
def test_a_check_that_dies_or_hangs_ends_no_other(
    code: str, limit_s: float, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "own.py").write_text(code)
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    check = Check("own", "own", "it works", (), limit_s)
    report = run([check, replace(check, name="lacking", needs=("no_such",))], facts=Facts(("NVIDIA H200",)))
    assert [(c["status"], c["why"]) for c in report["checks"]] == [
        ("failed", why), ("not run", "no_such not installed here")
    ]  # fmt: skip
    assert not gpu_check.healthy(report)


@pytest.mark.parametrize(
    "then, limit_s, why",
    [
        ("time.sleep(60)", 20.0, "it was still running after 20 s"),
        ("os.kill(os.getpid(), 9)", 30.0, "it ended with signal 9"),
        ("raise RuntimeError('no kernel')", 30.0, "RuntimeError: no kernel"),
    ],
)
def test_what_was_measured_is_told_however_a_check_ends(
    then: str, limit_s: float, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "own.py").write_text(
        "import os, sys, time\n"
        "from cluster.gpu_check import answer\n"
        "def own(bench):\n"
        "    bench.note({'kinds': {'first': 1.0}})\n"
        "    bench.note({'kinds': {'first': 1.0, 'second': 2.0}})\n"
        f"    {then}\n"
        "sys.exit(answer({'own': own}, sys.argv[1:]))\n"
    )
    if "sleep" in then:  # the limit strikes when all is noted, however slow the machine
        wait = subprocess.Popen.wait

        def noted(self: Any, timeout: float | None = None) -> int:
            while (
                timeout
                and self.poll() is None
                and "second" not in "".join(p.read_text() for p in tmp_path.rglob("result.json"))
            ):
                time.sleep(0.02)
            return wait(self, timeout and 0.01)

        monkeypatch.setattr(subprocess.Popen, "wait", noted)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    (told,) = run([Check("own", "own", "it works", (), limit_s)], cpu=True, facts=Facts())["checks"]
    assert (told["status"], told["why"]) == ("failed", why)
    assert told["figures"] == {"kinds": {"first": 1.0, "second": 2.0}}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_who_ends_the_doctor_ends_the_check_with_all_it_started(number: int, tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "own.py").write_text(
        "import os, subprocess, sys, tempfile, time\n"
        "from cluster.gpu_check import answer\n"
        "def own(bench):\n"
        "    other = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "    open(tempfile.mkdtemp() + '/half', 'w').write('x')\n"
        f"    open({str(tmp_path / 'part')!r}, 'w').write(f'{{os.getpid()}} {{other.pid}}')\n"
        f"    os.rename({str(tmp_path / 'part')!r}, {str(tmp_path / 'pids')!r})\n"
        "    time.sleep(60)\n"
        "sys.exit(answer({'own': own}, sys.argv[1:]))\n"
    )
    (tmp_path / "tmp").mkdir()
    code = (
        "from pathlib import Path\nfrom cluster import gpu_check as g\n"
        f"g.ROOT = Path({str(tmp_path)!r})\n"
        "g.run([g.Check('own', 'own', 'it works', ())], cpu=True, facts=g.Facts())"
    )
    doctor_ = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path / "tmp")}, stderr=subprocess.DEVNULL
    )  # fmt: skip
    ends_at = time.monotonic() + 30
    while not (tmp_path / "pids").exists():
        assert time.monotonic() < ends_at and doctor_.poll() is None
        time.sleep(0.02)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    doctor_.send_signal(number)
    assert doctor_.wait(20) == (128 + number if number == signal.SIGTERM else -number)
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < ends_at, "a check outlives the command that began it"
        time.sleep(0.02)
    if number != signal.SIGKILL:
        assert not list((tmp_path / "tmp").iterdir())


def alive(pid: int) -> bool:
    """Also False for a process that has ended and that nobody has asked about."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ------------------------------------------------------------------------------------------------ what is promised


def test_every_check_has_its_function() -> None:
    for program in {c.program for c in CHECKS}:
        functions = importlib.import_module(f"benchmarks.{program}").FUNCTIONS
        assert set(functions) == {c.name for c in CHECKS if c.program == program}


def test_readme_and_doctor_list_the_same_paths_that_no_gpu_has_run() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.partition("## Never run on a GPU")[2].partition("\n## ")[0]
    listed = [line.removeprefix("- ") for line in section.splitlines() if line.startswith("- ")]
    assert listed == [untried.what for untried in NEVER_RUN]
    said = "\n".join(doctor._never())
    assert all(untried.what in said for untried in NEVER_RUN)
    for untried in NEVER_RUN:
        assert all((ROOT / where).exists() for where in (untried.where, *untried.also)), untried
        assert not untried.check or untried.check in {c.name for c in CHECKS}


def test_every_file_that_does_something_of_its_own_on_a_gpu_is_on_the_list() -> None:
    marks = re.compile(r"torch\.cuda|[\"']cuda|Nccl|NCCL\w+Engine|\"nccl\" if|cpu_to_all_gpus|sleep\(level")
    rooms = ("agents", "envs", "rewards", "retrieval", "cluster")
    code = (file for room in rooms for file in (ROOT / room).rglob("*.py"))
    found = {str(file.relative_to(ROOT)) for file in code if marks.search(file.read_text(encoding="utf-8"))}
    listed = {where for untried in NEVER_RUN for where in (untried.where, *untried.also)}
    assert len(found) > 12 and found - listed == {"cluster/gpu_check.py"}


def test_what_a_gpu_has_run_is_no_longer_listed() -> None:
    results = [json.loads(p.read_text()) for p in (ROOT / "benchmarks" / "results").glob("gpu_*.json")]
    assert not any(r["rehearsal_on_cpu"] for r in results), "a rehearsal is no result"
    passed = {c["name"] for r in results if r["gpus"] for c in r["checks"] if c["status"] == "passed"}
    assert not passed & {untried.check for untried in NEVER_RUN}


# ------------------------------------------------------------------------------------------------------- profiles


def test_kernels_by_what_they_are_for() -> None:
    for name, what in {
        "nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNT": "matrix products",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>": "attention",
        "triton_tem_fused_flex_attention_backward_0": "attention",
        "void at::native::multi_tensor_apply_kernel<at::native::FusedAdamMathFunctor<float, 4, ...>>": "optimiser",
        "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)": "communication",
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>": "elementwise",
        "Memcpy DtoD (Device -> Device)": "copies and casts",
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>": "softmax and reductions",
    }.items():
        assert purpose(name) == what, name


def test_a_profile_counts_a_moment_of_the_device_once() -> None:
    def event(name: str, seconds: float, kind: str, own: float = 0.0, **more: Any) -> Any:
        spent = SimpleNamespace(elapsed_us=lambda: seconds * 1e6)
        return SimpleNamespace(
            name=name, time_range=spent, self_cpu_time_total=own * 1e6, device_type=f"DeviceType.{kind}", **more
        )

    events = [
        event("aten::mm", 2.0, "CPU", own=0.25), event("nvjet_a", 1.0, "CUDA"), event("nvjet_a", 0.5, "CUDA"),
        event("flash_fwd_kernel", 0.5, "CUDA"), event("Optimizer.step#AdamW.step", 2.0, "CUDA"),
        event("mark", 2.0, "CUDA", is_user_annotation=True),
    ]  # fmt: skip
    told = by_purpose(events, "cuda", 4.0)
    assert told["device_s"] == 2.0 and told["device_share"] == 0.5
    assert told["purposes_s"] == {"matrix products": 1.5, "attention": 0.5}
    assert told["longest"][0] == {"kernel": "nvjet_a", "seconds": 1.5, "calls": 2}
    assert by_purpose(events, "cpu", 4.0)["purposes_s"] == {"matrix products": 0.25}
