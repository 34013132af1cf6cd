"""A manifest that is wrong is found out on somebody's cluster, hours later: check every field and number here."""

from __future__ import annotations

import copy
import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from tests.test_lists import LISTS
from vlrank import __version__
from vlrank.config import EngineConfig, ServeConfig, TrainConfig
from vlrank.serving.limits import TOKEN, needs_token
from vlrank.serving.proxy import CALLBACK
from vlrank.stages import STAGES
from vlrank.submit import Environment

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
PINS, GPU_PINS = (pin_list.pins() for pin_list in LISTS[:2])
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


def dockerfile_stages() -> dict[str, str]:
    text = (CLUSTER / "Dockerfile").read_text()
    return dict(re.findall(r"^FROM \S+ AS (\S+)\n(.*?)(?=^FROM|\Z)", text, re.M | re.S))


@pytest.mark.parametrize(("target", "file"), [("cpu", "constraints-cpu.txt"), ("gpu", "constraints-gpu.txt")])
def test_an_image_installs_exactly_its_list(target: str, file: str) -> None:
    stage = dockerfile_stages()[target]
    assert f"--no-deps --requirement /tmp/{file}" in stage
    lists = set(re.findall(r"[\w-]+\.txt", stage))
    assert lists == {file}
    assert stage.rstrip().endswith("USER ray"), "images do not run as root"


def test_ray_serve_finds_what_repeats_lost_requests_in_every_image() -> None:
    [(name, place)] = CALLBACK.items()
    assert f"\nENV {name}={place}\n" in dockerfile_stages()["base"]
    module, function = place.split(":")
    assert getattr(importlib.import_module(module), function)()


def test_nothing_in_cluster_pins_a_version_of_its_own() -> None:
    """The lists are resolved against PyPI on every run of the tests; a pin beside them would be resolved by nobody."""
    pins = {
        path.name: found
        for path in CLUSTER.rglob("*")
        if path.is_file() and (found := re.findall(r"[\w\]-]+[=<>~]=\s*\d[\w.]*", path.read_text()))
    }
    assert not pins
    assert not list(CLUSTER.rglob("requirements*"))


def test_all_nodes_have_the_same_ray_and_a_python_that_both_lists_are_for() -> None:
    assert GPU_PINS["ray"] == RAY
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    (python,) = re.findall(r"^ARG PYTHON=(\d+\.\d+)", dockerfile, re.M)
    assert all(python in pin_list.pythons for pin_list in LISTS)
    assert f":{TAG}" in dockerfile
    for name in ("aws", "gcp"):
        assert documents(CLUSTER / f"{name}.yaml")[0]["docker"]["image"].endswith(f"vlrank-gpu:{TAG}")


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_cloud_nodes_can_mount_and_run_containers(name: str) -> None:
    """Ray's default image on AWS is Ubuntu 18.04 with an old driver; Ray expands no variables of the user's shell."""
    config = documents(CLUSTER / f"{name}.yaml")[0]
    commands = config["initialization_commands"]
    assert not [c for c in commands if re.search(r"\$\{?[A-Za-z_]", c)], "no variable is set there"
    mount = next(i for i, command in enumerate(commands) if "mount -t nfs" in command)
    assert any("nfs-common" in command for command in commands[:mount])
    for node in config["available_node_types"].values():
        if name == "aws":
            assert node["node_config"]["ImageId"].startswith("ami-")
        else:
            assert node["node_config"]["disks"][0]["initializeParams"]["sourceImage"]
    if name == "gcp":
        assert any("docker.io" in command for command in commands)


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
    assert Environment.read(CLUSTER / "environments/gpu.yaml").interpreter(stage) == python
    cluster = next(d for d in base() if d["kind"] == "RayCluster")
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}


@pytest.fixture
def service() -> dict[str, Any]:
    (service, policy) = documents(CLUSTER / "kuberay/services/rerank.yaml")
    assert (service["kind"], policy["kind"]) == ("RayService", "NetworkPolicy")
    label = policy["spec"]["podSelector"]["matchLabels"]["ray.io/originated-from-cr-name"]
    assert label == service["metadata"]["name"]
    return service


def test_the_ray_service_serves_what_vlrank_serve_would(service: dict[str, Any]) -> None:
    jsonschema.validate(service, KUBERAY)
    served = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    (application,) = served.applications
    module, _, name = application.import_path.partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    config = ServeConfig.model_validate(application.args)
    assert (config.host, config.port) == (served.http_options.host, served.http_options.port)
    assert config.timeout_s == served.http_options.request_timeout_s
    assert needs_token(config.host)
    cluster = {"spec": service["spec"]["rayClusterConfig"]}
    for container in containers(cluster):
        (token,) = [variable for variable in container["env"] if variable["name"] == TOKEN]
        assert token["valueFrom"]["secretKeyRef"]["name"] == "vlrank-serve"
        assert container["image"].startswith("registry.example.com/vlrank-")
        assert container["image"].endswith(f":{TAG}")
        assert container["resources"]["requests"] == container["resources"]["limits"]
    (workers,) = cluster["spec"]["workerGroupSpecs"]
    cpus, gpus = held(workers["template"]["spec"])
    # While a model takes over, each replica is there twice, each with the processes that make its prompts.
    assert gpus * workers["maxReplicas"] >= 2 * config.replicas * (config.engine.gpus or 1)
    assert cpus * workers["maxReplicas"] >= 2 * config.replicas * (config.engine.cpus + 4 * 0.5)
    spec = cluster["spec"]
    assert (spec["rayVersion"], spec["authOptions"]["mode"]) == (RAY, "token")
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert all(pod["securityContext"]["runAsNonRoot"] for pod in pods(cluster))


def test_a_slip_in_the_ray_service_is_found(service: dict[str, Any]) -> None:
    service["spec"]["serveConfig"] = service["spec"]["serveConfigV2"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(service, KUBERAY)


def test_every_stage_runs_in_the_one_environment_of_an_image() -> None:
    assert "python -m venv /opt/vlrank" in dockerfile_stages()["base"]
    assert "ENV PATH=/opt/vlrank/bin:$PATH" in dockerfile_stages()["base"]
    for file in (CLUSTER / "environments").glob("*.yaml"):
        assert {Environment.read(file).interpreter(stage) for stage in STAGES} == {"python"}


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
