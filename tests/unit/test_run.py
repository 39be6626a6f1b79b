"""The group runner: counts, skips in CI, groups that hang, and the closing line."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from gumshoe import ROOT


def load_runner() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gumshoe_test_runner", ROOT / "tests" / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


runner = load_runner()

TESTS = """
import pytest
def test_good(): pass
def test_bad(): assert False
def test_without_server(): pytest.skip("needs an Elasticsearch server")
def test_later(): pytest.skip("not written yet")
@pytest.fixture
def broken(): raise RuntimeError
def test_error(broken): pass
"""


@pytest.mark.parametrize(("in_ci", "expected"), [(False, (1, 2, 2)), (True, (1, 3, 1))])
def test_group_counts(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], in_ci: bool, expected: tuple[int, int, int]
) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    outcome = runner.run_group("unit", ["-p", "no:cacheprovider"], in_ci, tmp_path)
    assert (outcome.passed, outcome.failed, outcome.skipped) == expected
    assert len(outcome.needs) == 1 and "Elasticsearch" in outcome.needs[0]
    runner.show([outcome], in_ci)
    assert capfd.readouterr().out.splitlines()[-1] == "{} passed, {} failed, {} skipped".format(*expected)


def test_file_that_does_not_import_is_a_failure(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "test_broken.py").write_text("import nothing_of_this_name")
    outcome = runner.run_group("unit", ["-p", "no:cacheprovider"], False, tmp_path)
    assert outcome.passed == 0 and outcome.failed >= 1


def test_folder_without_tests_is_left_out(tmp_path: Path) -> None:
    assert runner.run_group("kills", [], True, tmp_path) is None


def test_hanging_child_is_ended() -> None:
    assert runner.run_limited([sys.executable, "-c", "import time; time.sleep(60)"], limit_s=0.3) is None


def test_unknown_group_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main(["units"]) == 2
    assert "no group 'units'" in capsys.readouterr().err
