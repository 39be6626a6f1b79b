"""Every GPU check's code runs on the CPU at tiny sizes: those of the learner on what a bare image has, the others in this process, so that
torch is imported once, and one as it is started for real.

That vLLM and the learner agree on the CPU is asserted in test_vllm_publish.py; the rehearsal of `vllm_logprobs` is
`python benchmarks/gpu_sampler.py --cpu`.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster import gpu_check
from cluster.gpu_check import CHECKS, Bench
from gumshoe import ROOT

# Of the learner's sizes two are enough: in a rehearsal they are the same.
BARE = [c.name for c in CHECKS if c.program == "gpu_learner" and c.name not in ("learner_1.7b", "learner_4b")]
HERE = [c for c in CHECKS if c.name in ("learner_1.7b", "ipc_publish", "faiss_gpu", "encoder_gpu")]

ON_A_BARE_IMAGE = """
import json, sys
GONE = {"ray", "vllm", "omegaconf", "faiss", "tantivy", "msgpack", "pyarrow", "tensorboard", "Stemmer", "jsonschema"}
class Gone:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in GONE:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Gone())
root, out, *names = sys.argv[1:]
sys.path.insert(0, root)
import benchmarks.gpu_ipc, benchmarks.gpu_retrieval, benchmarks.gpu_sampler, cluster.gpu_check
from benchmarks.gpu_learner import FUNCTIONS
assert "torch" not in sys.modules, "looking at what there is must not need torch"
import cluster.memory, retrieval.encode_hf
found = {}
for name in names:
    try:
        found[name] = FUNCTIONS[name](cluster.gpu_check.Bench("cpu"))
    except Exception as error:
        found[name] = f"{type(error).__name__}: {error}"
open(out, "w").write(json.dumps({"found": found, "loaded": sorted(GONE & {name.partition(".")[0] for name in sys.modules})}))
"""


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the learner's checks come to where there are torch, transformers, safetensors, numpy and nothing else of what Gumshoe needs."""
    out = tmp_path_factory.mktemp("bare") / "found.json"
    command = [sys.executable, "-c", ON_A_BARE_IMAGE, str(ROOT), str(out), *BARE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize("name", BARE)
def test_a_learner_check_says_yes_on_a_bare_image(name: str, bare: dict[str, Any]) -> None:
    assert bare["loaded"] == []
    figures = bare["found"][name]
    print(json.dumps(figures))
    assert isinstance(figures, dict), figures
    if name == "learner_profile":
        assert figures["purposes_s"]["matrix products"] > 0
    json.dumps(figures, allow_nan=False)


@pytest.mark.parametrize("check", HERE, ids=lambda c: c.name)
def test_the_code_of_the_check_runs_and_its_answer_is_yes(check: gpu_check.Check) -> None:
    figures = importlib.import_module(f"benchmarks.{check.program}").FUNCTIONS[check.name](Bench("cpu"))
    print(json.dumps(figures))
    if check.program == "gpu_learner":
        assert {told["padding"] for kind, told in figures["kinds"].items() if "packed" in kind} == {0.0}
        assert figures["mfu"] is None and all(told["predicted_gib"] > 0 for told in figures["kinds"].values())
    if check.name == "ipc_publish":
        assert figures["pieces"] > 3 and figures["lost_gib"] == 0
    json.dumps(figures, allow_nan=False)


def test_a_check_in_its_own_process_sends_tensors_to_another(tmp_path: Path) -> None:
    out = tmp_path / "ipc.json"
    assert gpu_check.main(["--cpu", "--only", "cuda_ipc", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["rehearsal_on_cpu"] and report["checks"][0]["status"] == "passed"
