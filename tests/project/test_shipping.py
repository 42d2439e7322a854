"""Cluster files for AWS, KubeRay and SLURM, checked as far as possible without them."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from command_lines import check_ray_command, executable, is_shell, ray_commands

from orchestrator.cli.parser import make_parser
from orchestrator.store.run import RunDirectory
from orchestrator.version import __version__

ROOT = Path(__file__).parents[2]
WHEEL = f"orchestrator-{__version__}-py3-none-any.whl"
CLUSTER = yaml.safe_load((ROOT / "cluster.yaml").read_text())
TYPES = CLUSTER["available_node_types"]
COMMANDS = [line for key, lines in CLUSTER.items() if key.endswith("_commands") for line in lines]
KUBERAY = ROOT / "scripts" / "kuberay"
CLUSTER_SPEC = yaml.safe_load((KUBERAY / "raycluster.yaml").read_text())["spec"]
JOB_SPEC = yaml.safe_load((KUBERAY / "rayjob.yaml").read_text())["spec"]
HEAD = CLUSTER_SPEC["headGroupSpec"]
(GROUP,) = CLUSTER_SPEC["workerGroupSpecs"]
SBATCH = ROOT / "scripts" / "slurm" / "compress.sbatch"
NOTICE_SECONDS = 120
"""Time from the notice to the end of a spot instance."""


def test_cluster_yaml_is_valid_to_ray():
    """The file passes Ray's own schema and checks, with defaults for AWS."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(CLUSTER)
    validate_config(prepared)
    assert prepared["available_node_types"].keys() == {"head", "spot", "on_demand"}
    # one of Ray's defaults would install another version
    assert CLUSTER["setup_commands"]
    assert CLUSTER["head_setup_commands"]


def test_an_unknown_key_is_not_valid_to_ray():
    """The check above can fail."""
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import prepare_config, validate_config

    with pytest.raises(ValidationError, match="wrokers"):
        validate_config(prepare_config(CLUSTER | {"wrokers": 2}))


def test_the_head_runs_no_work_and_is_on_demand():
    """The head declares neither CPU nor GPU, to Ray and to the autoscaler, and is not a spot
    instance."""
    assert TYPES[CLUSTER["head_node_type"]]["resources"] == {"CPU": 0, "GPU": 0}
    (start,) = [words for words in ray_commands(COMMANDS) if "--head" in words]
    assert {"--num-cpus=0", "--num-gpus=0"} <= set(start)
    assert "InstanceMarketOptions" not in TYPES["head"]["node_config"]


def test_spot_workers_have_an_on_demand_fallback():
    """Spot and on-demand workers are the same machine; spot is preferred, and either may be used
    alone."""
    spot, fallback = TYPES["spot"], TYPES["on_demand"]
    market = {"InstanceMarketOptions": {"MarketType": "spot"}}
    assert spot["node_config"] == fallback["node_config"] | market
    assert spot["resources"] == fallback["resources"]
    assert spot["resources"]["GPU"] > 0
    assert spot["priority"] > fallback["priority"]
    assert spot["min_workers"] == fallback["min_workers"] == 0
    assert fallback["max_workers"] == spot["max_workers"] == CLUSTER["max_workers"]


@pytest.mark.parametrize(("spot_can_be_had", "kind"), [(1.0, "spot"), (0.0, "on_demand")])
def test_ray_launches_spot_and_falls_back(spot_can_be_had, kind):
    """Ray's own scheduler selects spot nodes, or on-demand ones without spot capacity.

    No node without requests, one for a run that waits for its first node, two for its workers.
    """
    from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil

    configs = {
        name: NodeTypeConfig(
            name=name,
            min_worker_nodes=node.get("min_workers", 0),
            max_worker_nodes=node.get("max_workers", 0),
            priority=node.get("priority", 0),
            resources=node["resources"],
            labels=node.get("labels", {}),
        )
        for name, node in TYPES.items()
    }
    for asked, count, launched in (
        ({"CPU": 1}, 0, {}),
        ({"CPU": 1}, 1, {kind: 1}),
        ({"GPU": 1, "CPU": 1}, 16, {kind: 2}),
    ):
        demand = [ResourceRequestUtil.make(asked)] * count
        request = SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=configs,
            max_num_nodes=CLUSTER["max_workers"] + 1,
            resource_requests=ResourceRequestUtil.group_by_count(demand),
            recoverable_resource_availabilities={"spot": spot_can_be_had},
        )
        reply = ResourceDemandScheduler(event_logger=None).schedule(request)
        assert {launch.instance_type: launch.count for launch in reply.to_launch} == launched
        assert not reply.infeasible_resource_requests


def test_commands_are_shell_and_options_are_ray_s():
    """Every line is a shell command, and its Ray options exist in the installed Ray."""
    assert all(map(is_shell, COMMANDS))
    calls = ray_commands(COMMANDS)
    assert [words[0] for words in calls] == ["stop", "start", "stop", "start"]
    for words in calls:
        check_ray_command(words)
    with pytest.raises(Exception, match="no-such-option"):
        check_ray_command(["start", "--no-such-option=1"])


def test_what_travels_is_there():
    """Mounted files are in the checkout, or made by commands in the head of the file."""
    mounts = CLUSTER["file_mounts"]
    made = {"~/.ray/auth_token": "ray get-auth-token", "./dist": "--wheel-dir dist"}
    text = (ROOT / "cluster.yaml").read_text()
    for local in mounts.values():
        assert made[local] in text if local in made else (ROOT / local).exists(), local
    for path in re.findall(r"/home/ray/[\w./-]+", " ".join(COMMANDS)):
        remote = next(name for name in mounts if path == name or path.startswith(f"{name}/"))
        local = ROOT / path.replace(remote, mounts[remote], 1)
        assert local.exists() or local == ROOT / "dist" / WHEEL, path
    assert f"/home/ray/dist/{WHEEL}" in " ".join(COMMANDS)


def test_versions_are_pinned_and_agree():
    """Images have the Ray and Python versions of the tests, and this wheel."""
    (ray,) = re.findall(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    gpu = f"rayproject/ray:{ray}-py311-gpu"
    assert CLUSTER["docker"]["image"] == gpu
    assert CLUSTER["docker"]["head_image"] == gpu.replace("gpu", "cpu")
    dockerfile = (KUBERAY / "Dockerfile").read_text()
    assert f"\nFROM {gpu}\n" in dockerfile
    assert f"dist/{WHEEL} " in dockerfile
    assert CLUSTER_SPEC["rayVersion"] == ray
    for group in (HEAD, GROUP):
        (container,) = group["template"]["spec"]["containers"]
        assert container["image"].endswith(f"/orchestrator:{__version__}")


def test_the_token_is_asked_for_and_not_written():
    """Nodes get the mode and a file; no file in the checkout contains a token."""
    options = CLUSTER["docker"]["run_options"]
    assert "--env=RAY_AUTH_MODE=token" in options
    (path,) = [text.partition("PATH=")[2] for text in options if "RAY_AUTH_TOKEN_PATH" in text]
    assert CLUSTER["file_mounts"][path] == "~/.ray/auth_token"
    assert CLUSTER_SPEC["authOptions"] == {"mode": "token"}
    assert "export RAY_AUTH_MODE=token" in SBATCH.read_text()
    for file in (ROOT / "cluster.yaml", SBATCH, *KUBERAY.iterdir()):
        assert "RAY_AUTH_TOKEN=" not in file.read_text()


def test_what_must_be_edited_stands_at_the_top():
    """Fields to edit are at the top only, and unedited files are refused by AWS or Kubernetes."""
    lines = (ROOT / "cluster.yaml").read_text().splitlines()
    top = lines.index("max_workers: 2")
    assert {n for n, line in enumerate(lines) if "EDIT" in line} <= set(range(top))
    assert TYPES["head"]["node_config"]["ImageId"] == "ami-EDIT"


ROOT_DISK = "/dev/sda Amazon Elastic Block Store\n"
STORES = "/dev/sdb /dev/sdc"


@pytest.mark.parametrize(
    ("disks", "mounted", "does"),
    [
        (0, "", []),
        (1, "", ["mkfs.xfs -f /dev/sdb", "mount /dev/sdb /mnt/nvme"]),
        (
            2,
            "",
            [
                f"mdadm --create /dev/md0 --run --level=0 --raid-devices=2 {STORES}",
                "mkfs.xfs -f /dev/md0",
                "mount /dev/md0 /mnt/nvme",
            ],
        ),
        (2, "/opt/dlami/nvme", ["mount --bind /opt/dlami/nvme /mnt/nvme"]),
        (2, "/mnt/nvme", []),
    ],
)
def test_instance_store_is_mounted_once(disks, mounted, does, tmp_path):
    """Several disks are striped, the root disk is never used, and a repeated `ray up` does not
    mount again."""
    stores = STORES.split()[:disks]
    listed = "".join(f"{store} Amazon EC2 NVMe Instance Storage\n" for store in stores)
    executable(tmp_path / "lsblk", f"#!/bin/sh\nprintf '{ROOT_DISK}{listed}'\n")
    executable(tmp_path / "mountpoint", f'#!/bin/sh\n[ "$2" = "{mounted}" ]\n')
    executable(tmp_path / "sudo", f'#!/bin/sh\necho "$*" >> {tmp_path}/done\n')
    (command,) = [line for line in COMMANDS if "lsblk" in line]
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", f"({command})"], env=environment, check=True)
    done = tmp_path / "done"
    assert (done.read_text().splitlines() if done.exists() else []) == does


# Field names of KubeRay 1.6, after its API reference.
RAY_CLUSTER_FIELDS = (
    "authOptions autoscalerOptions enableInTreeAutoscaling gcsFaultToleranceOptions headGroupSpec "
    "headServiceAnnotations managedBy rayVersion suspend upgradeStrategy workerGroupSpecs"
)
AUTOSCALER_FIELDS = (
    "env envFrom idleTimeoutSeconds image imagePullPolicy resources securityContext upscalingMode "
    "version volumeMounts"
)
HEAD_FIELDS = "enableIngress headService labels rayStartParams resources serviceType template"
GROUP_FIELDS = (
    "groupName idleTimeoutSeconds labels maxReplicas minReplicas numOfHosts rayStartParams "
    "replicas resources scaleStrategy suspend template"
)
RAY_JOB_FIELDS = (
    "activeDeadlineSeconds backoffLimit clusterSelector deletionStrategy entrypoint "
    "entrypointNumCpus entrypointNumGpus entrypointResources jobId managedBy metadata "
    "rayClusterSpec runtimeEnvYAML shutdownAfterJobFinishes submissionMode submitterConfig "
    "submitterPodTemplate suspend ttlSecondsAfterFinished"
)


def test_the_fields_are_kuberay_s():
    """Kubernetes drops or refuses unknown fields."""
    assert JOB_SPEC.keys() <= set(RAY_JOB_FIELDS.split())
    assert CLUSTER_SPEC.keys() <= set(RAY_CLUSTER_FIELDS.split())
    assert CLUSTER_SPEC["autoscalerOptions"].keys() <= set(AUTOSCALER_FIELDS.split())
    assert HEAD.keys() <= set(HEAD_FIELDS.split())
    assert GROUP.keys() <= set(GROUP_FIELDS.split())
    for file, kind in (("raycluster.yaml", "RayCluster"), ("rayjob.yaml", "RayJob")):
        manifest = yaml.safe_load((KUBERAY / file).read_text())
        assert manifest["apiVersion"] == "ray.io/v1"
        assert manifest["kind"] == kind
    for group in (HEAD, GROUP):
        volumes = {volume["name"] for volume in group["template"]["spec"]["volumes"]}
        (container,) = group["template"]["spec"]["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        assert container["resources"]["requests"] == container["resources"]["limits"]


def test_the_job_s_cluster_is_the_cluster():
    """The cluster description exists twice because Kubernetes has no includes; both are equal."""
    assert JOB_SPEC["rayClusterSpec"] == CLUSTER_SPEC


def test_a_pod_has_the_time_to_drain():
    """Kubernetes kills a pod after Ray's drain, and EC2 the node after Kubernetes."""
    pod = GROUP["template"]["spec"]
    variables = {item["name"]: item["value"] for item in pod["containers"][0]["env"]}
    drain = float(variables["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
    assert 30 < drain < pod["terminationGracePeriodSeconds"] < NOTICE_SECONDS


def test_the_autoscaler_scales_gpu_workers_only():
    """Workers scale between bounds from zero; the head has no work and is not on a spot node."""
    assert CLUSTER_SPEC["enableInTreeAutoscaling"] is True
    assert 1 <= GROUP["minReplicas"] <= GROUP["replicas"] <= GROUP["maxReplicas"]
    assert int(GROUP["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert HEAD["rayStartParams"].items() >= {"num-cpus": "0", "num-gpus": "0"}.items()
    for group in (HEAD, GROUP):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        check_ray_command(["start", *(f"--{k}={v}" for k, v in group["rayStartParams"].items())])


def test_the_job_is_tried_again_and_cleans_up():
    """Each retry is a new cluster, which is removed some time after the end; the command is
    valid."""
    assert JOB_SPEC["backoffLimit"] >= 1
    assert JOB_SPEC["shutdownAfterJobFinishes"] is True
    assert JOB_SPEC["ttlSecondsAfterFinished"] > 0
    python, module, name, *arguments = shlex.split(JOB_SPEC["entrypoint"])
    assert [python, module, name] == ["python", "-m", "orchestrator"]
    options = vars(make_parser().parse_args(arguments))
    (mount,) = HEAD["template"]["spec"]["containers"][0]["volumeMounts"]
    for path in (options["model"], options["out"], options["calibration"]):
        assert path.startswith(f"{mount['mountPath']}/")


@pytest.fixture
def slurm(tmp_path):
    """Run the batch script with `srun`, `scontrol`, `scancel` and `ray` that record their calls.

    `ray symmetric-run` writes the given state of the run, and ends with the given code.
    """
    bin_dir, out = tmp_path / "bin", tmp_path / "out"
    bin_dir.mkdir()
    calls = tmp_path / "calls"
    note = f'#!/bin/sh\necho "$(basename $0) $*" >> {calls}\n'
    executable(bin_dir / "srun", f'{note}shift\nexec "$@"\n')
    executable(bin_dir / "scancel", note)
    executable(bin_dir / "scontrol", f"{note}printf 'node1\\nnode2\\n'\n")
    executable(bin_dir / "ray", f'{note}[ "$1" = get-auth-token ] || exit $CODE\n')
    variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    variables |= {"SLURM_CPUS_ON_NODE": "96", "SLURM_GPUS_ON_NODE": "8"}
    path = f"{bin_dir}:{Path(sys.executable).parent}:{os.environ['PATH']}"

    def slurm(state, code, **more):
        if state is not None:
            run = RunDirectory(Path(f"{out}.run"))
            run.claim({})
            run.write_status(state=state)
        arguments = ["bash", SBATCH, "/shared/dense", out, "--keep", "0.5", "--calibration", "t"]
        environment = os.environ | variables | {"PATH": path, "CODE": str(code)} | more
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
        return done.returncode, calls.read_text().splitlines()

    return slurm


def test_slurm_calls_are_ray_s_and_ours(slurm):
    """The options of `ray symmetric-run` and `ray start` exist, as do the arguments of
    `compress`."""
    code, calls = slurm("done", 0)
    assert code == 0
    (call,) = [shlex.split(call)[1:] for call in calls if call.startswith("ray symmetric-run")]
    separator = call.index("--")
    check_ray_command(call)
    symmetric, start = call[1:5], call[5:separator]
    assert symmetric == ["--address", "node1:6379", "--min-nodes", "2"]
    check_ray_command(["start", *start])
    python, module, name, *arguments = call[separator + 1 :]
    assert [python, module, name] == ["python", "-m", "orchestrator"]
    assert make_parser().parse_args(arguments).address == "auto"
    assert not any("requeue" in call for call in calls)


@pytest.mark.parametrize(
    ("state", "code", "ends", "requeued"),
    [
        ("done", 0, 0, False),
        ("done", 143, 0, False),
        ("stopped", 143, 0, True),
        ("running", 137, 0, True),
        ("failed", 3, 3, False),
        ("failed", 0, 1, False),
        (None, 0, 1, False),
    ],
)
def test_slurm_queues_a_run_again_until_it_is_done(slurm, state, code, ends, requeued):
    """The run directory decides, not the exit code of `ray symmetric-run`."""
    ended, calls = slurm(state, code)
    assert ended == ends
    assert ("scontrol requeue 7" in calls) is requeued


def test_slurm_stops_the_run_before_its_time_is_up(slurm, tmp_path):
    """On USR1 the script stops the step, waits for its end, and requeues the run."""
    run = RunDirectory(tmp_path / "out.run")
    run.claim({})
    run.write_status(state="stopped")
    bin_dir = tmp_path / "bin"
    executable(bin_dir / "srun", f"#!/bin/sh\necho $$ > {tmp_path}/step\nexec sleep 60\n")
    # the step takes some time to end
    kill = f"(sleep 0.5; kill -TERM $(cat {tmp_path}/step)) &"
    executable(bin_dir / "scancel", f'#!/bin/sh\necho "scancel $*" >> {tmp_path}/calls\n{kill}\n')
    # the shell signals itself once the step is running
    executable(bin_dir / "ray", "#!/bin/sh\n(sleep 0.5; kill -USR1 $PPID) &\n")
    ended, calls = slurm("stopped", 0)
    assert ended == 0
    assert calls[-2:] == ["scancel --signal=TERM 7.0", "scontrol requeue 7"]


def test_slurm_does_not_queue_again_without_end(slurm):
    """A run whose node fails each time ends after twenty attempts."""
    ended, calls = slurm("running", 137, SLURM_RESTART_COUNT="20")
    assert ended == 137
    assert "scontrol requeue 7" not in calls


def test_slurm_script_is_shell():
    """The script is valid shell, and explains its arguments at the top."""
    assert is_shell(SBATCH.read_text())
    done = subprocess.run(["bash", SBATCH], capture_output=True, text=True)
    assert done.returncode
    assert "give MODEL and OUT" in done.stderr
