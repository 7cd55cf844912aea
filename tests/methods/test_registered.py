"""A method of another package: its options, its hooks and an entry point; nothing of ours is edited."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from finished_runs import rows
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent.parent
OPTIONS = '''
"""Norm tuning, as its options."""
from typing import ClassVar, Literal
from methods.options import Options

class Norms(Options):
    """Train the norms of a base."""
    kind: Literal["norms"] = "norms"
    implementation: ClassVar[str] = "norm_tuning.hooks:NormTuning"
    default_lr: ClassVar[float] = 1e-2
    makes_model: ClassVar[bool] = True

    def added_parameters(self, linears, others):
        return 0

    def trained_parameters(self, linears, others):
        return sum(shape[0] for name, shape in others.items() if "norm" in name)

class Taken(Norms):
    kind: Literal["lora"] = "lora"
'''
HOOKS = '''
"""Norm tuning, as its hooks."""
from methods.base import Method

class NormTuning(Method):
    def attach(self, model):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("norm" in name)
        return model.float()

    def export(self, model, weights, folder):
        model.save_pretrained(folder, state_dict=weights)
'''
ENTRY_POINTS = """
[fleetune.methods]
norms = norm_tuning.options:Norms
lora = norm_tuning.options:Taken
dreams = norm_tuning.dreams:Dreams
other = norm_tuning.options:Norms
"""
# What a laptop does with them: plan a job of one, and say of another why it cannot be used; without torch.
LAPTOP = """
import json, sys
import fleetune
from orchestrator import doctor
from methods.options import UNUSABLE
plan = fleetune.plan(sys.argv[1])
try:
    fleetune.plan(sys.argv[1], ["method=dreams"])
except fleetune.InputError as error:
    told = str(error)
warned = [check.found for check in doctor._methods()]
kinds = [method["kind"] for method in fleetune.methods()]
planned = [plan.method, plan.sizes.trained, plan.steps]
print(json.dumps([planned, told, kinds, UNUSABLE, warned, "torch" in sys.modules]))
"""


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A folder with an installed distribution, as pip would leave it."""
    package, metadata = tmp_path / "packages" / "norm_tuning", tmp_path / "packages" / "norm_tuning-1.0.dist-info"
    for folder in (package, metadata):
        folder.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "options.py").write_text(OPTIONS)
    (package / "hooks.py").write_text(HOOKS)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: norm-tuning\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    return package.parent


def python(packages: Path, *arguments: str | Path) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(packages)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-P", *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_method_of_another_package_is_planned_and_trained(packages: Path, new_run: Any, tiny_base: Path) -> None:
    run = new_run("norms", method={"kind": "norms"}, train={"steps": 2}, evaluation={"before": False})
    job = packages / "job.yaml"
    job.write_text(yaml.safe_dump(yaml.safe_load((run / "job.yaml").read_text())["job"]))
    planned, told, kinds, unusable, warned, torch = json.loads(python(packages, "-c", LAPTOP, job))
    start = load_file(tiny_base / "model.safetensors")
    norms = {name for name in start if "norm" in name}
    assert planned == ["norms", sum(start[name].numel() for name in norms), 2]
    assert not torch
    assert {"norms", "lora"} < set(kinds)
    assert not {"dreams", "other"} & set(kinds)
    assert unusable == {
        "dreams": "norm-tuning registers norm_tuning.dreams:Dreams: No module named 'norm_tuning.dreams'",
        "lora": "norm-tuning registers norm_tuning.options:Taken: another method has this kind already",
        "other": "norm-tuning registers norm_tuning.options:Norms: "
        "its kind is 'norms'; allowed: the name of its entry point, 'other'",
    }
    assert warned == list(unusable.values())
    assert f"method.kind: found 'dreams', which cannot be used ({unusable['dreams']}); " in told
    python(packages, "-m", "trainer", run)
    assert list(rows(run, 1)) == [1, 2]
    tuned = load_file(run / "output" / "model.safetensors")
    assert {name for name, weight in start.items() if not weight.equal(tuned[name])} == norms
