"""Configs: what a user writes, and the one line a user reads when it is wrong."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from cluster.config import ConfigError, config_yaml, keys_of, load_config, nearest_key, save_resolved


@dataclass
class Inner:
    lr: float = 1e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    kind: Literal["adamw", "sgd"] = "adamw"
    clip: float | None = None

    def __post_init__(self) -> None:
        if self.lr < 0:
            raise ValueError(f"learner.lr {self.lr} is negative; give a positive number")


@dataclass(frozen=True)
class Frozen:
    path: str = "nowhere"
    copies: int = 1
    api_key: str = ""


@dataclass
class Top:
    name: str = "toy"
    seed: int = 0
    learner: Inner = field(default_factory=Inner)
    model: Frozen = field(default_factory=Frozen)
    extra: Frozen | None = None
    weights: dict[str, float] = field(default_factory=dict)
    worlds: list[Frozen] = field(default_factory=list)


@dataclass
class Nested:
    hops: dict[int, float] = field(default_factory=lambda: {1: 1.0, 2: 1.0})


@dataclass
class Hops:
    hops: dict[int, float] = field(default_factory=lambda: {1: 1.0, 2: 1.0})
    nested: dict[str, Nested] = field(default_factory=dict)
    model: Frozen = field(default_factory=Frozen)


def write(folder: Path, text: str, name: str = "a.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def error_of(path: Path | str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, Top)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_file_base_and_overrides_in_order(tmp_path: Path) -> None:
    write(tmp_path, "seed: 1\nlearner: {lr: 3e-4, clip: 2}\nmodel: {path: base, copies: 3}", "low.yaml")
    path = write(tmp_path, "base: low.yaml\nname: high\nmodel:\n  path: mine\n")
    config = load_config(path, ["learner.betas=[0.8,0.9]", "seed=7"], Top)
    assert config == Top("high", 7, Inner(lr=3e-4, betas=[0.8, 0.9], clip=2.0), Frozen("mine", 3))


def test_no_values_give_the_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, ""), [], Top) == Top()


def test_references_and_optional_sections(tmp_path: Path) -> None:
    path = write(tmp_path, "extra: {path: '${model.path}', copies: 2}\nworlds: [{path: a}, {copies: 4}]")
    config = load_config(path, ["model.path=/m", "weights.a=2"], Top)
    assert config.extra == Frozen("/m", 2)
    assert config.worlds == [Frozen("a"), Frozen(copies=4)]
    assert config.weights == {"a": 2.0}


@pytest.mark.parametrize(
    ("text", "wrong", "near"),
    [
        ("learner: {lrr: 1}", "learner.lrr", "learner.lr"),
        ("lr: 1", "lr", "learner.lr"),
        ("model: {lr: 1}", "model.lr", "learner.lr"),
        ("lerner: {lr: 1}", "lerner", "learner"),
        ("worlds: [{pth: x}]", "worlds.0.pth", "worlds.0.path"),
    ],
)
def test_unknown_key_names_file_key_and_nearest(tmp_path: Path, text: str, wrong: str, near: str) -> None:
    line = error_of(write(tmp_path, text))
    assert "a.yaml" in line and f"unknown key '{wrong}'" in line and f"did you mean '{near}'?" in line


def test_a_mapping_replaces_and_a_section_merges(tmp_path: Path) -> None:
    write(tmp_path, "hops: {1: 5.0}\nnested: {a: {hops: {4: 1}}}\nmodel: {path: low}", "low.yaml")
    path = write(tmp_path, "base: low.yaml\nhops: {2: 1.0, 3: 2}\nnested: {b: {hops: {7: 1}}}\nmodel: {copies: 2}")
    config = load_config(path, [], Hops)
    assert config.hops == {2: 1.0, 3: 2.0}
    assert config.nested == {"b": Nested({7: 1.0})}
    assert config.model == Frozen("low", 2)
    assert load_config(path, ["hops.5=4"], Hops).hops == {2: 1.0, 3: 2.0, 5: 4.0}
    assert load_config(path, ["hops={5: 4}"], Hops).hops == {5: 4.0}
    saved = save_resolved(config, tmp_path / "saved.yaml")
    assert load_config(saved, [], Hops) == config


def test_unknown_key_on_the_command_line(tmp_path: Path) -> None:
    line = error_of(write(tmp_path, ""), "model.coppies=2")
    assert line == "command line: unknown key 'model.coppies'; did you mean 'model.copies'?"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: many", "seed: expected a whole number, got 'many'"),
        ("seed: 1.5", "seed: expected a whole number, got 1.5"),
        ("learner: {lr: fast}", "learner.lr: expected a number, got 'fast'"),
        ("learner: {clip: soft}", "learner.clip: expected a number or null, got 'soft'"),
        ("learner: {kind: lion}", "learner.kind: expected one of adamw, sgd, got 'lion'"),
        ("learner: {betas: 3}", "learner.betas: expected a list (a number each), got 3"),
        ("learner: {betas: [x]}", "learner.betas[0]: expected a number, got 'x'"),
        ("name: null", "name: expected text, got null"),
        ("weights: {a: b}", "weights.a: expected a number, got 'b'"),
        ("learner: 3", "learner: expected a section with keys such as lr, betas, kind, clip; got 3"),
        ("learner: null", "learner: expected a section, got null"),
    ],
)
def test_wrong_type_names_key_expected_and_given(tmp_path: Path, text: str, expected: str) -> None:
    assert error_of(write(tmp_path, text)).endswith(f"a.yaml: {expected}")


def test_a_dataclass_that_refuses_its_values_is_one_line(tmp_path: Path) -> None:
    assert "learner.lr -1.0 is negative" in error_of(write(tmp_path, "learner: {lr: -1}"))


def test_bad_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not valid YAML" in error_of(write(tmp_path, "a: [1\nb: }"))
    assert ":2: not valid YAML" in error_of(write(tmp_path, "seed: 1\n name: 2\n"))
    assert "expected 'key: value' lines" in error_of(write(tmp_path, "- 1\n- 2"))
    (tmp_path / "bin.yaml").write_bytes(b"\xff\xfe\x00\x80")
    assert "bin.yaml" in error_of(tmp_path / "bin.yaml")
    assert "leads back to itself" in error_of(write(tmp_path, "base: a.yaml"))
    write(tmp_path, "", "other.yaml")
    assert "did you mean 'other.yaml'?" in error_of(write(tmp_path, "base: othr.yaml"))
    assert "correct the reference '${nothing.there}'" in error_of(write(tmp_path, "name: ${nothing.there}"))
    monkeypatch.setattr("cluster.config.CONFIGS", tmp_path)
    write(tmp_path, "seed: 5", "demo.yaml")
    assert load_config("demo", [], Top).seed == 5
    assert "did you mean 'demo'?" in error_of("dmeo")


@pytest.mark.parametrize("override", ["seed", "--seed=1", "=3", "a.=3"])
def test_override_of_another_form(tmp_path: Path, override: str) -> None:
    assert "is not of the form key=value" in error_of(write(tmp_path, ""), override)


def test_saved_config_loads_as_itself_and_hides_secrets(tmp_path: Path) -> None:
    config = Top(name="a ${b} c", weights={"x": 1.5}, extra=Frozen("p", 2, api_key="s3cret"), worlds=[Frozen()])
    path = save_resolved(config, tmp_path / "run" / "config.yaml")
    again = load_config(path, [], Top)
    assert again.extra == Frozen("p", 2, "<hidden>") and again.name == "a ${b} c" and again.worlds == [Frozen()]
    assert "s3cret" not in config_yaml(config)


def test_keys_and_nearest() -> None:
    known = list(keys_of(Top))
    assert {"seed", "learner", "learner.lr", "extra.path"} <= set(known)
    assert nearest_key("zzzzzz", known) is None
