"""A manifest that is wrong is found out on somebody's cluster, hours later: check every field and number here."""

from __future__ import annotations

import copy
import json
import re
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from vlrank import __version__
from vlrank.config import EngineConfig, TrainConfig
from vlrank.stages import STAGES
from vlrank.submit import Environment

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
LINES = (ROOT / "constraints-cpu.txt").read_text().lower().replace("_", "-").splitlines()
PINS = dict(line.split("==") for line in LINES if re.match(r"[\w.-]+==", line))
RAY = PINS["ray"]
TAG = f"{__version__}-ray{RAY}"
OVERLAYS = ("one-gpu", "eight-gpu", "cpu-trial")

KUBERAY = yaml.safe_load(Path(__file__).with_name("kuberay_schema.yaml").read_text())


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def base() -> list[dict[str, Any]]:
    kustomization = documents(CLUSTER / "kuberay/base/kustomization.yaml")[0]
    return [d for name in kustomization["resources"] for d in documents(CLUSTER / "kuberay/base" / name)]


def ray_cluster(overlay: str) -> dict[str, Any]:
    """The RayCluster of an overlay: its JSON patches (RFC 6902) and images applied to the base, as Kustomize does."""
    (cluster,) = (copy.deepcopy(d) for d in base() if d["kind"] == "RayCluster")
    kustomization = documents(CLUSTER / "kuberay/overlays" / overlay / "kustomization.yaml")[0]
    for patch in kustomization["patches"]:
        assert patch["target"] == {"kind": "RayCluster", "name": cluster["metadata"]["name"]}
        for step in yaml.safe_load(patch["patch"]):
            *parents, leaf = step["path"].strip("/").split("/")
            place: Any = cluster
            for part in parents:
                place = place[int(part) if isinstance(place, list) else part]
            key: Any = int(leaf) if isinstance(place, list) else leaf
            place[key]  # replace and remove need something there
            if step["op"] == "remove":
                del place[key]
            else:
                assert step["op"] == "replace"
                place[key] = step["value"]
    renamed = {image["name"]: image["newName"] for image in kustomization["images"]}
    for container in containers(cluster):
        name, _, tag = container["image"].partition(":")
        container["image"] = f"{renamed[name]}:{tag}"
    return cluster


def pods(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    spec = cluster["spec"]
    return [group["template"]["spec"] for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]]


def containers(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    return [container for pod in pods(cluster) for container in pod["containers"]]


def quantity(text: str) -> float:
    number, unit = re.fullmatch(r"([\d.]+)(m|Mi|Gi|)", text).groups()  # type: ignore[union-attr]
    return float(number) * {"m": 0.001, "": 1, "Mi": 2**20, "Gi": 2**30}[unit]


@pytest.mark.parametrize("path", sorted(CLUSTER.rglob("*.y*ml")), ids=lambda path: str(path.relative_to(CLUSTER)))
def test_every_file_is_yaml(path: Path) -> None:
    assert documents(path)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_only_fields_and_values_that_kuberay_knows(overlay: str) -> None:
    cluster = ray_cluster(overlay)
    jsonschema.validate(cluster, KUBERAY)
    groups = cluster["spec"]["workerGroupSpecs"]
    assert len({group["groupName"] for group in groups}) == len(groups)
    for group in groups:
        assert 0 == group["minReplicas"] <= group["replicas"] <= group["maxReplicas"], "nothing runs without a job"


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("spec.headGroupSpec.rayStartParams.num-cpus", 0),
        ("spec.workerGroupSpecs.0.maxReplica", 4),
        ("spec.workerGroupSpecs.0.template.spec.toleration", []),
        ("spec.workerGroupSpecs.0.template.spec.containers.0.resources.limits.memory", 32),
        ("spec.autoscalerOptions.upscalingMode", "default"),
        ("spec.authOptions.mode", "Token"),
        ("apiVersion", "ray.io/v1alpha1"),
    ],
)
def test_slips_of_the_pen_are_found(place: str, value: Any) -> None:
    """The API server drops an unknown field without a word, and the cluster comes up without what it said."""
    cluster = ray_cluster("eight-gpu")
    *parents, leaf = place.split(".")
    at: Any = cluster
    for part in parents:
        at = at[int(part) if isinstance(at, list) else part]
    at[leaf] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(cluster, KUBERAY)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_ray_and_image_versions_are_the_pinned_ones(overlay: str) -> None:
    cluster = ray_cluster(overlay)
    assert cluster["spec"]["rayVersion"] == RAY
    for container in containers(cluster):
        assert container["image"].startswith("registry.example.com/vlrank-")
        assert container["image"].endswith(f":{TAG}")


def test_images_and_cloud_files_pin_the_same_ray() -> None:
    for name in ("aws", "gcp"):
        assert documents(CLUSTER / f"{name}.yaml")[0]["docker"]["image"].endswith(f"vlrank-gpu:{TAG}")
    for name in ("train", "generate"):
        lines = (CLUSTER / f"requirements-{name}.txt").read_text().splitlines()
        pins = dict(re.sub(r"\[.*\]", "", line).split("==") for line in lines if not line.startswith("#"))
        assert pins["ray"] == RAY
        shared = {"train": ("torch", "transformers", "peft", "trl", "datasets", "bitsandbytes")}.get(name, ())
        for package in shared:
            assert pins[package] == PINS[package], package
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    assert f"unsloth=={PINS['unsloth']} unsloth-zoo=={PINS['unsloth-zoo']}" in dockerfile
    assert f":{TAG}" in dockerfile
    stages = re.findall(r"^FROM (\S+) AS (\S+)$", dockerfile, re.MULTILINE)
    assert {"cpu", "train", "generate", "gpu"} <= {name for _, name in stages}
    for target in ("cpu", "train", "generate"):
        text = dockerfile.split(f" AS {target}\n")[1].split("\nFROM ")[0]
        assert "\nUSER ray\n" in text, f"{target} must not run as root"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_cluster_is_closed(overlay: str) -> None:
    cluster = ray_cluster(overlay)
    spec = cluster["spec"]
    assert spec["authOptions"]["mode"] == "token"
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert not spec["headGroupSpec"].get("enableIngress")
    for pod in pods(cluster):
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["runAsUser"] > 0
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
    policies = [d for d in base() if d["kind"] == "NetworkPolicy"]
    selected = [policy["spec"]["podSelector"]["matchLabels"] for policy in policies]
    assert {"ray.io/cluster": cluster["metadata"]["name"]} in selected
    assert all(source["from"] for policy in policies for source in policy["spec"]["ingress"]), (
        "no rule admits everybody"
    )


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_can_be_scheduled_and_have_what_they_mount(overlay: str) -> None:
    cluster = ray_cluster(overlay)
    claims = {d["metadata"]["name"] for d in base() if d["kind"] == "PersistentVolumeClaim"}
    for pod in pods(cluster):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for container in pod["containers"]:
            resources = container["resources"]
            assert resources["requests"] == resources["limits"], "Ray counts limits, Kubernetes schedules requests"
            assert {mount["name"] for mount in container["volumeMounts"]} <= set(volumes)
            if "nvidia.com/gpu" in resources["limits"]:
                assert any(toleration["key"] == "nvidia.com/gpu" for toleration in pod["tolerations"])
        for volume in volumes.values():
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims
    spot = [pod for pod in pods(cluster) if pod.get("nodeSelector", {}).get("vlrank.io/spot")]
    assert all(any(t["key"] == "vlrank.io/spot" for t in pod["tolerations"]) for pod in spot)


def held(pod: dict[str, Any]) -> tuple[float, float]:
    limits = pod["containers"][0]["resources"]["limits"]
    return quantity(limits["cpu"]), quantity(limits.get("nvidia.com/gpu", "0"))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_groups_hold_what_the_stages_ask_for(overlay: str) -> None:
    spec = ray_cluster(overlay)["spec"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0", "the head does no work"
    groups = {group["groupName"]: held(group["template"]["spec"]) for group in spec["workerGroupSpecs"]}
    drivers = Environment.read(CLUSTER / "environments/gpu.yaml")
    assert max(drivers.driver_cpus(stage) for stage in STAGES) <= groups["data"][0], "drivers run in the data group"
    worker, engine = TrainConfig.model_fields["cpus_per_worker"].default, EngineConfig().cpus
    for name in set(groups) - {"data"}:
        cpus, gpus = groups[name]
        each = worker if name == "training" else engine
        assert gpus >= 1
        assert cpus >= gpus * (each + 1), "a CPU per GPU process, and as many for loading data"
    if overlay == "cpu-trial":
        assert set(groups) == {"data"}
    else:
        assert "training" in groups


def test_the_capacity_of_the_gpu_environment_is_that_of_one_gpu() -> None:
    """With less, a job on a cluster that is scaled down to nothing would be told that it has no GPU."""
    grown = [0.0, 0.0]
    for group in ray_cluster("one-gpu")["spec"]["workerGroupSpecs"]:
        for kind, number in enumerate(held(group["template"]["spec"])):
            grown[kind] += number * group["maxReplicas"]
    capacity = Environment.read(CLUSTER / "environments/gpu.yaml").capacity
    assert [capacity["CPU"], capacity["GPU"]] == grown


def test_the_eight_gpu_overlay_gives_training_a_whole_machine() -> None:
    groups = {g["groupName"]: held(g["template"]["spec"]) for g in ray_cluster("eight-gpu")["spec"]["workerGroupSpecs"]}
    assert groups["training"][1] == 8


def test_the_ray_job_runs_a_stage_that_exists() -> None:
    (job,) = documents(CLUSTER / "kuberay/jobs/tune.yaml")
    assert job["kind"] == "RayJob"
    jsonschema.validate(job, KUBERAY)
    python, _, module, stage, *_ = job["spec"]["entrypoint"].split()
    assert (module, stage in STAGES) == ("vlrank.jobs", True)
    assert yaml.safe_load(job["spec"]["runtimeEnvYAML"])["py_executable"] == python
    assert Environment.read(CLUSTER / "environments/gpu.yaml").interpreter(stage) == python
    cluster = next(d for d in base() if d["kind"] == "RayCluster")
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}


def test_interpreters_of_the_environments_are_those_of_the_images() -> None:
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    for file in (CLUSTER / "environments").glob("*.yaml"):
        environment = Environment.read(file)
        for python in set(environment.python.values()) - {"python"}:
            assert f"python -m venv {python.removesuffix('/bin/python')}" in dockerfile


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_ray_up_files_pass_rays_own_schema(name: str) -> None:
    import ray.autoscaler

    schema = json.loads(Path(ray.autoscaler.__file__).with_name("ray-schema.json").read_text())
    config = documents(CLUSTER / f"{name}.yaml")[0]
    jsonschema.validate(config, schema)
    assert config["head_node_type"] in config["available_node_types"]
    assert config["available_node_types"]["head"]["resources"] == {"CPU": 0}
    assert all("RAY_AUTH_MODE=token" in command for command in config["head_start_ray_commands"][1:])


def test_dashboards_and_alerts_ask_only_for_metrics_that_exist() -> None:
    from ray.dashboard.modules.metrics import dashboards

    sources = [*Path(dashboards.__path__[0]).glob("*.py"), *(ROOT / "platform/vlrank").rglob("*.py")]
    known = "\n".join(source.read_text() for source in sources)
    dashboard = json.loads((CLUSTER / "monitoring/vlrank_dashboard.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked += [
        rule["expr"] for group in documents(CLUSTER / "monitoring/alerts.yaml")[0]["groups"] for rule in group["rules"]
    ]
    metrics = {metric for expression in asked for metric in re.findall(r"\bray_\w+", expression)}
    assert len(metrics) > 8
    for metric in metrics:
        # Ray puts ray_ before the names of applications, and _total behind counters.
        own = metric.removeprefix("ray_").removesuffix("_total") if metric.startswith("ray_vlrank_") else metric
        assert re.search(rf"\b{own}\b", known), metric
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_rays_own_dashboards_can_be_exported(tmp_path: Path) -> None:
    sys.path.insert(0, str(CLUSTER / "monitoring"))
    try:
        import export_dashboards

        export_dashboards.main(tmp_path)
    finally:
        sys.path.pop(0)
    assert {path.name for path in tmp_path.iterdir()} == {
        "ray_default.json",
        "ray_data.json",
        "ray_train.json",
        "vlrank.json",
    }
