"""The shipped cluster files, against Ray's own schema and what they promise."""

import copy
import re
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parent.parent
FILES = ["cluster.yaml", "deploy/gcp.yaml"]


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
    from sparse_expansion.cli.parser import parse_arguments

    parse_arguments(job["spec"]["entrypoint"].split()[1:])
