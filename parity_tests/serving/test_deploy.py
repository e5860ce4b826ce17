"""`deploy/`: manifests against Kubernetes' schemas, and what they name against the code."""

import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest

from ettin.runtimes.commands import serve as cli_serve
from ettin.runtimes.serving.gate import PROBES

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
kubernetes_validate = pytest.importorskip("kubernetes_validate", reason='needs pip install "ettin-export[dev]"')
yaml = pytest.importorskip("yaml")

RESOURCES = [
    pytest.param(document, id=f"{file.stem}-{document['kind']}")
    for file in sorted((DEPLOY / "kubernetes").glob("*.yaml"))
    if file.stem in ("triton", "gateway")
    for document in yaml.safe_load_all(file.read_text())
]


def resource(kind: str, name: str) -> Any:
    return next(case.values[0] for case in RESOURCES
                if case.values[0]["kind"] == kind and case.values[0]["metadata"]["name"] == name)  # fmt: skip


@pytest.mark.parametrize("manifest", RESOURCES)
def test_kubernetes_accepts_it(manifest: Any) -> None:
    kubernetes_validate.validate(manifest, "1.31", strict=True)


def test_the_schemas_see_a_mistake() -> None:
    wrong = {**resource("Service", "ettin-triton"), "spec": {"ports": [{"prot": 1}]}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.31", strict=True)


@pytest.mark.parametrize("name", ["ettin-triton", "ettin-gateway"])
def test_services_reach_their_pods(name: str) -> None:
    deployment, service = resource("Deployment", name), resource("Service", name)
    template = deployment["spec"]["template"]
    assert (
        service["spec"]["selector"] == template["metadata"]["labels"] == deployment["spec"]["selector"]["matchLabels"]
    )
    (container,) = template["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert {port["targetPort"]: port["port"] for port in service["spec"]["ports"]} == ports
    probes = [container[key] for key in container if key.endswith("Probe")]
    assert {(probe.get("httpGet") or probe["tcpSocket"])["port"] for probe in probes} <= ports.keys()
    volumes = {volume["name"] for volume in template["spec"].get("volumes", [])}
    assert {mount["name"] for mount in container.get("volumeMounts", [])} == volumes


def test_scaled_by_a_metric_that_exists() -> None:
    (metric,) = resource("HorizontalPodAutoscaler", "ettin-triton")["spec"]["metrics"]
    name = metric["pods"]["metric"]["name"]
    assert f'"{name}"' in (ROOT / "runtimes" / "triton" / "model.py").read_text()
    (rule,) = yaml.safe_load((DEPLOY / "kubernetes" / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    assert rule["name"]["as"] == name and rule["seriesQuery"].startswith(name)
    scaled = resource("HorizontalPodAutoscaler", "ettin-triton")["spec"]["scaleTargetRef"]
    assert resource(scaled["kind"], scaled["name"])["apiVersion"] == scaled["apiVersion"]


def test_everything_is_in_the_kustomization() -> None:
    listed = yaml.safe_load((DEPLOY / "kubernetes" / "kustomization.yaml").read_text())["resources"]
    assert set(listed) == {"triton.yaml", "gateway.yaml"}
    patch = yaml.safe_load((DEPLOY / "kubernetes" / "gpu.yaml").read_text())
    target = resource(patch["kind"], patch["metadata"]["name"])["spec"]["template"]["spec"]["containers"]
    assert [container["name"] for container in patch["spec"]["template"]["spec"]["containers"]] == [
        container["name"] for container in target
    ]


def serve_options(words: list[str]) -> None:
    """Fails unless `ettin-serve` takes these."""
    cli_serve.command.make_context("ettin-serve", words, resilient_parsing=False)


def test_commands_have_these_options() -> None:
    unit = (DEPLOY / "ettin-serve.service").read_text()
    line = re.search(r"^ExecStart=(.*)$", unit, re.M)
    assert line
    program, *words = shlex.split(line[1])
    assert program.endswith("/ettin-serve")
    serve_options(words)
    entry = re.search(r"^ENTRYPOINT (\[.*\])$", (DEPLOY / "serve.Dockerfile").read_text(), re.M)
    assert entry
    serve_options(yaml.safe_load(entry[1])[1:])
    (container,) = resource("Deployment", "ettin-gateway")["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["ettin-serve"]
    serve_options(container["args"])
    with pytest.raises(click.NoSuchOption):
        serve_options(["--prot", "1"])


def test_images_install_extras_that_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for file in DEPLOY.glob("*.Dockerfile"):
        named = re.search(r"\.whl\)\[([\w,-]+)\]", file.read_text())
        assert named and set(named[1].split(",")) <= extras.keys(), file


def test_the_unit_is_hardened() -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze")
    words = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(DEPLOY / "ettin-serve.service")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    rated = re.search(r"Overall exposure level for .*: ([\d.]+) ", done.stdout)
    assert rated and float(rated[1]) <= 2.5, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["ettin-triton", "ettin-gateway"])
def test_pods_are_hardened(name: str) -> None:
    spec = resource("Deployment", name)["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] > 0
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    own = container["securityContext"]
    assert own["readOnlyRootFilesystem"] and own["allowPrivilegeEscalation"] is False
    assert own["capabilities"] == {"drop": ["ALL"]}
    assert container["lifecycle"]["preStop"] and container["resources"]["limits"]["memory"]
    labels = resource("Deployment", name)["spec"]["selector"]
    assert resource("PodDisruptionBudget", name)["spec"]["selector"] == labels
    policy = resource("NetworkPolicy", name)["spec"]
    assert policy["podSelector"] == labels and policy["policyTypes"] == ["Ingress", "Egress"]
    ports = {port["name"] for port in container["ports"]}
    assert {port["port"] for rule in policy["ingress"] for port in rule["ports"]} == ports


def test_probes_ask_for_routes_that_exist() -> None:
    (container,) = resource("Deployment", "ettin-gateway")["spec"]["template"]["spec"]["containers"]
    paths = {container[key]["httpGet"]["path"] for key in container if key.endswith("Probe")}
    assert paths <= set(PROBES)


def test_images_do_not_run_as_root() -> None:
    for file in DEPLOY.glob("*.Dockerfile"):
        assert re.search(r"^USER [1-9]\d*$", file.read_text(), re.M), file
