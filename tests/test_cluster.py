"""The shipped cluster files, against Ray's own schema and what they promise."""

import copy
import json
import re
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parent.parent
FILES = ["cluster.yaml", "deploy/gcp.yaml"]
RAYS_OWN = "ray-autoscaler-v1"
"""The role and the instance profile that Ray makes where the head names none."""


def load(name):
    return yaml.safe_load((ROOT / name).read_text())


@pytest.mark.parametrize("name", FILES)
def test_ray_accepts_it(name):
    validate_config(prepare_config(copy.deepcopy(load(name))))


def test_ray_would_notice_a_typo():
    config = load("cluster.yaml")
    config["idle_timeout_minute"] = 5
    with pytest.raises(Exception, match="idle_timeout_minute"):
        validate_config(prepare_config(config))


@pytest.mark.parametrize("name", FILES)
def test_what_it_promises(name):
    config = load(name)
    types = config["available_node_types"]
    head = types[config["head_node_type"]]
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    workers = {key: value for key, value in types.items() if value is not head}
    assert all(worker["min_workers"] == 0 for worker in workers.values())
    assert all(worker["resources"]["GPU"] == 1 for worker in workers.values())
    text = str([worker["node_config"] for worker in workers.values()]).lower()
    assert "spot" in text
    assert config["idle_timeout_minutes"] == 10
    for command in config["head_start_ray_commands"] + config["worker_start_ray_commands"]:
        if " start " in command:
            assert "RAY_AUTH_MODE=token" in command and "ulimit -n 65536" in command
    assert "--dashboard-host=127.0.0.1" in " ".join(config["head_start_ray_commands"])
    assert "0.0.0.0" not in (ROOT / name).read_text()


@pytest.mark.parametrize("name", FILES)
def test_set_up_pins_what_the_project_is_tested_with(name):
    import ray

    commands = " ".join(load(name)["setup_commands"])
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"TORCH \?= (\S+)", makefile)[1] in commands
    assert f"ray[default]=={ray.__version__}" in commands


def run_instances_errors(node_config):
    """What EC2's own request model says, offline."""
    import botocore.session
    from botocore.validate import ParamValidator

    model = botocore.session.get_session().get_service_model("ec2")
    shape = model.operation_model("RunInstances").input_shape
    return (
        ParamValidator()
        .validate({**node_config, "MinCount": 1, "MaxCount": 1}, shape)
        .generate_report()
    )


@pytest.mark.parametrize("node_type", ["head", "gpu_spot", "gpu_on_demand"])
def test_ec2_knows_every_field_of_the_machines(node_type):
    node_config = load("cluster.yaml")["available_node_types"][node_type]["node_config"]
    assert run_instances_errors(node_config) == ""
    typo = {**node_config, "InstanceMarketOption": {}}
    assert "InstanceMarketOption" in run_instances_errors(typo)
    wrong = copy.deepcopy(node_config)
    wrong["BlockDeviceMappings"][0]["Ebs"]["VolumeSize"] = "300"
    assert "VolumeSize" in run_instances_errors(wrong)


def test_a_fresh_account_has_what_the_machines_name():
    """Ray makes a profile for the head where none is named; workers take that one."""
    head, *workers = load("cluster.yaml")["available_node_types"].values()
    assert "IamInstanceProfile" not in head["node_config"]
    profiles = [worker["node_config"]["IamInstanceProfile"] for worker in workers]
    assert profiles == [{"Name": RAYS_OWN}] * 2
    policy = json.loads((ROOT / "deploy" / "aws-role-policy.json").read_text())
    hand_on, look_up = policy["Statement"]
    assert hand_on["Action"] == "iam:PassRole"
    assert hand_on["Resource"].endswith(f":role/{RAYS_OWN}")
    place = look_up["Resource"].split(":parameter")[1].rstrip("*")
    images = {worker["node_config"]["ImageId"] for worker in workers}
    assert all(image.startswith(f"resolve:ssm:{place}") for image in images)
    command = f"aws iam put-role-policy --role-name {RAYS_OWN} "
    page = (ROOT / "docs" / "how-to.md").read_text()
    assert command in page and "file://deploy/aws-role-policy.json" in page


def test_set_up_installs_what_the_clouds_buckets_need():
    for name, extra in (("cluster.yaml", "s3"), ("deploy/gcp.yaml", "gcs")):
        assert f'"$HOME/sparse-expansion[{extra}]"' in " ".join(load(name)["setup_commands"])
    assert "sparse-expansion[s3,gcs]" in (ROOT / "deploy" / "Dockerfile").read_text()


def test_rayjob_ends_and_is_cleared_away():
    spec = load("deploy/rayjob.yaml")["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert 0 < spec["ttlSecondsAfterFinished"] < spec["activeDeadlineSeconds"]


def test_rayjob():
    job = load("deploy/rayjob.yaml")
    spec = job["spec"]["rayClusterSpec"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["enableInTreeAutoscaling"] and spec["authOptions"]["mode"] == "token"
    (group,) = spec["workerGroupSpecs"]
    assert group["minReplicas"] == 0 and group["template"]["spec"]["restartPolicy"] == "Never"
    for pods in (spec["headGroupSpec"], group):
        pod = pods["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        (container,) = pod["containers"]
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        for bound in ("requests", "limits"):
            assert container["resources"][bound]["ephemeral-storage"].endswith("Gi")
        (variable,) = container["env"]
        secret = variable["valueFrom"]["secretKeyRef"]
        # Optional: models that anybody may have need none.
        assert variable["name"] == "HF_TOKEN" and secret["optional"] is True
    (toleration,) = group["template"]["spec"]["tolerations"]
    assert toleration["key"] in group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert "tolerations" not in spec["headGroupSpec"]["template"]["spec"]
    from sparse_expansion.cli.parser import parse_arguments

    parse_arguments(job["spec"]["entrypoint"].split()[1:])
