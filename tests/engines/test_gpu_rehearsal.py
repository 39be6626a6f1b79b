"""Every GPU check's code runs on the CPU at tiny sizes: in this process, so that torch is imported once, and one as it is started for real.

That vLLM and the learner agree on the CPU is asserted in test_vllm_publish.py; the check's own rehearsal is `python -m cluster.gpu_check --cpu`.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import gpu_check
from cluster.gpu_check import CHECKS, Bench
from gumshoe import ROOT

# Of the learner's sizes one is enough: in a rehearsal they are the same.
HERE = [c for c in CHECKS if c.name not in ("cuda_ipc", "vllm_logprobs", "learner_1.7b", "learner_4b")]


@pytest.mark.parametrize("check", HERE, ids=lambda c: c.name)
def test_the_code_of_the_check_runs_and_its_answer_is_yes(check: gpu_check.Check) -> None:
    figures = importlib.import_module(f"benchmarks.{check.program}").FUNCTIONS[check.name](Bench("cpu"))
    print(json.dumps(figures))
    if check.name.startswith("learner_0"):
        assert {told["padding"] for kind, told in figures["kinds"].items() if "packed" in kind} == {0.0}
        assert figures["mfu"] is None and all(told["tokens_per_s"] > 0 for told in figures["kinds"].values())
    if check.name == "learner_profile":
        assert figures["purposes_s"]["matrix products"] > 0
    json.dumps(figures, allow_nan=False)


def test_a_check_in_its_own_process_sends_tensors_to_another(tmp_path: Path) -> None:
    out = tmp_path / "ipc.json"
    assert gpu_check.main(["--cpu", "--only", "cuda_ipc", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["rehearsal_on_cpu"] and report["checks"][0]["status"] == "passed"


def test_the_learner_checks_start_on_a_bare_image() -> None:
    """Torch, transformers, safetensors and numpy, and nothing else of what Gumshoe is installed with."""
    code = """
import sys
GONE = {"ray", "vllm", "omegaconf", "faiss", "tantivy", "msgpack", "httpx", "jinja2", "pyarrow", "tensorboard", "Stemmer"}
class Gone:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in GONE:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Gone())
sys.path.insert(0, sys.argv[1])
import benchmarks.gpu_learner, benchmarks.gpu_ipc, benchmarks.gpu_retrieval, benchmarks.gpu_sampler, cluster.gpu_check
assert "torch" not in sys.modules, "looking at what there is must not need torch"
import benchmarks.gpu_work, agents.learning.learner, agents.learning.shard, agents.learning.logprobs, agents.learning.packing
import cluster.memory, retrieval.encode_hf
"""
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
