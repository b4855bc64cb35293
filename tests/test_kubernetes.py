"""The Kubernetes manifests: the schema, strictly, and the API server's rules between fields, which no schema holds."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from arc_dist.checkpoint_store.store import Store
from arc_dist.errors import ExitCode
from ranks import Job

yaml = pytest.importorskip("yaml")
kubernetes_validate = pytest.importorskip("kubernetes_validate")

DIRECTORY = Path(__file__).resolve().parent.parent / "examples" / "kubernetes"
KILLED = {128 + 9, 128 + 15}


def load(name: str) -> dict[str, Any]:
    (document,) = yaml.safe_load_all((DIRECTORY / name).read_text())
    return document


@pytest.fixture
def job() -> dict[str, Any]:
    return load("job.yaml")


@pytest.fixture
def pod(job: dict[str, Any]) -> dict[str, Any]:
    return job["spec"]["template"]["spec"]


def action_for(job: dict[str, Any], exit_code: int) -> str:
    """What the Job controller does about a container that ended so: the first rule that matches, else Count."""
    for rule in job["spec"]["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes")
        if codes and (exit_code in codes["values"]) == (codes["operator"] == "In"):
            return rule["action"]
    return "Count"


@pytest.mark.parametrize("name", ["job.yaml", "service.yaml", "checkpoints.yaml"])
def test_strict_schema(name: str):
    kubernetes_validate.validate(load(name), kubernetes_validate.latest_version(), strict=True)


def test_the_schema_check_finds_a_wrong_field(job: dict[str, Any]):
    job["spec"]["podFailurePolice"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)


def test_kustomization_lists_every_manifest_and_the_image(pod: dict[str, Any]):
    kustomization = load("kustomization.yaml")
    manifests = {path.name for path in DIRECTORY.glob("*.yaml")} - {"kustomization.yaml"}
    assert set(kustomization["resources"]) == manifests
    assert [image["name"] for image in kustomization["images"]] == [pod["containers"][0]["image"]]


def test_pod_failure_policy_rules(job: dict[str, Any], pod: dict[str, Any]):
    assert pod["restartPolicy"] == "Never"
    containers = {container["name"] for container in pod["containers"]}
    rules = job["spec"]["podFailurePolicy"]["rules"]
    assert 1 <= len(rules) <= 20
    for rule in rules:
        assert rule["action"] in {"FailJob", "FailIndex", "Ignore", "Count"}
        assert rule["action"] != "FailIndex" or "backoffLimitPerIndex" in job["spec"]
        assert ("onExitCodes" in rule) != ("onPodConditions" in rule)
        for condition in rule.get("onPodConditions", []):
            assert condition["status"] in {"True", "False", "Unknown"}
        if "onExitCodes" in rule:
            codes = rule["onExitCodes"]
            assert codes["operator"] in {"In", "NotIn"}
            assert codes["containerName"] in containers
            assert codes["values"] == sorted(set(codes["values"]))
            assert codes["operator"] == "NotIn" or 0 not in codes["values"]
            assert 1 <= len(codes["values"]) <= 255


def test_every_exit_code_leads_to_the_action_that_the_table_promises(job: dict[str, Any]):
    expected = {
        ExitCode.USER_BUG: "FailJob",
        ExitCode.PREEMPTED: "Ignore",
        ExitCode.INFRASTRUCTURE: "Count",
        ExitCode.NO_PROGRESS: "FailJob",
        ExitCode.CONFIGURATION: "FailJob",
    }
    assert set(expected) == set(ExitCode) - {ExitCode.SUCCESS}
    assert {code: action_for(job, code) for code in expected} == expected
    assert {action_for(job, code) for code in KILLED} == {"Count"}
    assert action_for(job, 3) == "FailJob"
    assert job["spec"]["backoffLimit"] > 0


def test_an_evicted_pod_is_nobodys_fault(job: dict[str, Any]):
    first = job["spec"]["podFailurePolicy"]["rules"][0]
    assert first["action"] == "Ignore"
    assert first["onPodConditions"][0]["type"] == "DisruptionTarget"


def test_indexed_pods_find_each_other(job: dict[str, Any], pod: dict[str, Any]):
    service = load("service.yaml")
    (container,) = pod["containers"]
    (command,) = container["args"]
    assert job["spec"]["completionMode"] == "Indexed"
    assert job["spec"]["parallelism"] == job["spec"]["completions"]
    assert f"--nnodes={job['spec']['completions']} " in command
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"].items() <= job["spec"]["template"]["metadata"]["labels"].items()
    port = service["spec"]["ports"][0]["port"]
    endpoint = f"{job['metadata']['name']}-0.{service['metadata']['name']}:{port}"
    assert f"--rdzv-endpoint={endpoint} " in command
    assert port in {entry["containerPort"] for entry in container["ports"]}


def test_a_pod_has_what_a_clean_end_and_its_snapshots_need(pod: dict[str, Any]):
    (container,) = pod["containers"]
    assert pod["terminationGracePeriodSeconds"] >= 60
    assert re.match(r"exec arcrun ", container["args"][0]), "SIGTERM has to reach the launcher itself"
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    store = next(entry["value"] for entry in container["env"] if entry["name"] == "ARC_STORE")
    claim = mounts[store]["persistentVolumeClaim"]["claimName"]
    assert claim == load("checkpoints.yaml")["metadata"]["name"]
    assert load("checkpoints.yaml")["spec"]["accessModes"] == ["ReadWriteMany"]


def test_the_command_uses_only_options_that_the_launcher_knows(pod: dict[str, Any]):
    from torch.distributed.run import get_args_parser

    command = pod["containers"][0]["args"][0]
    words = re.sub(r"\$\(\([^)]*\)\)", "0", command).split()
    options = [word.partition("=")[0] for word in words[2 : words.index("examples/train_gpt.py")]]
    known = {option for action in get_args_parser()._actions for option in action.option_strings}
    assert set(options) <= known


def test_the_scripts_named_exist(pod: dict[str, Any]):
    root = DIRECTORY.parent.parent
    for script in re.findall(r"\S+\.py", pod["containers"][0]["args"][0]):
        assert (root / script).is_file()


@pytest.mark.soak  # test_preempt.py does the like without a pod
def test_sigterm_to_the_command_commits_a_checkpoint_and_the_next_pod_goes_on_from_it(
    pod: dict[str, Any], tmp_path: Path
):
    arcrun = Path(sys.executable).with_name("arcrun")
    if not arcrun.exists():
        pytest.skip("arcrun is not installed beside this interpreter")
    (container,) = pod["containers"]
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    env |= {"JOB_COMPLETION_INDEX": "0", "ARC_STORE": str(tmp_path / "checkpoints")}
    env["PATH"] = f"{arcrun.parent}:{os.environ['PATH']}"
    # What differs from the cluster: both ranks on this host, which has no DNS name for the pod.
    command = container["args"][0]
    for old, new in (
        ("--nnodes=2", "--nnodes=1"),
        ("--nproc-per-node=1", "--nproc-per-node=2"),
        ("--rdzv-endpoint=arc-train-0.arc-train:29500", "--rdzv-endpoint=localhost:0"),
    ):
        assert old in command
        command = command.replace(old, new)
    (tmp_path / "examples").symlink_to(DIRECTORY.parent)  # not in the checkout, whose arc_dist would be imported

    with Job([*container["command"], command], env=env, cwd=tmp_path) as first:
        first.wait_for(lambda: "step   20/" in first.stdout(), 90, "step 20")
        first.process.send_signal(signal.SIGTERM)
        ended = first.wait(pod["terminationGracePeriodSeconds"] / 2)
    assert ended.exit_code == ExitCode.PREEMPTED, ended
    saved = Store(env["ARC_STORE"]).steps()
    assert saved, ended
    newest = max(info.step for info in saved)
    assert newest >= 20
    assert Store(env["ARC_STORE"]).open(newest).verify() == []

    with Job(
        [*container["command"], command.replace("--steps 2000", f"--steps {newest + 12}")], env=env, cwd=tmp_path
    ) as second:
        ended = second.wait(90)
    assert ended.exit_code == ExitCode.SUCCESS, ended
    steps = [int(number) for number in re.findall(r"^step +(\d+)/", ended.stdout, re.MULTILINE)]
    assert steps
    assert min(steps) > newest
