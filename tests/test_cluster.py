"""Test clusters of several processes.

Each process knows its place, all run the same config, and none waits for one that is lost.
"""

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
import types

import pytest
from conftest import ROOT
from jax._src.clusters import ClusterEnv

import launch
from cnn_spmd.errors import UserError
from cnn_spmd.training import cluster, cluster_env, peers

RUN = [
    sys.executable,
    str(ROOT / "launch.py"),
    "--config",
    str(ROOT / "experiments/alexnet_cifar.py"),
    "--config.model.name=simple_cnn",
    "--config.model.fast=False",  # otherwise JAX traces kernels for GPUs in each process
    "--config.data.name=synthetic",
    "--config.data.synthetic.train_examples=64",
    "--config.data.synthetic.test_examples=40",
    "--config.batch_size=16",
    "--config.optimizer.learning_rate=0.001",
    "--config.epochs=1",
    "--cpu_devices=1",
]
JAX = dict(JAX_COORDINATOR_ADDRESS="host0:1234", JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="0")
SLURM = dict(
    SLURM_JOB_ID="77",
    SLURM_STEP_NODELIST="n[3-4]",
    SLURM_NTASKS="2",
    SLURM_PROCID="1",
    SLURM_NODEID="1",
    SLURM_LOCALID="0",
    SLURM_STEP_TASKS_PER_NODE="1(x2)",
)
MPI = dict(
    OMPI_COMM_WORLD_SIZE="4",
    OMPI_COMM_WORLD_RANK="3",
    OMPI_COMM_WORLD_LOCAL_SIZE="2",
    OMPI_COMM_WORLD_LOCAL_RANK="1",
    OMPI_MCA_orte_hnp_uri="1314521088.0;tcp://10.1.1.1:3491",
)
HEARTBEAT_SECONDS = 6  # of processes that a test kills
EIGHT = dict(CUDA_VISIBLE_DEVICES="0,1,2,3,4,5,6,7")


@pytest.fixture
def start(tmp_path):
    """Return a function that starts one process; kill those that are left over."""
    with contextlib.ExitStack() as stack:

        def start(*arguments, cwd=tmp_path, **environment):
            environment = os.environ | dict(JAX_PLATFORMS="cpu", PYTHONUNBUFFERED="1") | environment
            process = subprocess.Popen(
                [*RUN, *map(str, arguments)],
                cwd=cwd,
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            stack.callback(process.communicate)
            stack.callback(process.kill)
            return process

        yield start


@pytest.fixture
def pair(start):
    """Return a function that starts the two processes of a cluster.

    Both get the same arguments; `more` and `settings` hold further ones for each process.
    """

    def pair(arguments, more=((), ()), settings=({}, {})):
        with socket.socket() as listener:
            listener.bind(("localhost", 0))
            address = f"localhost:{listener.getsockname()[1]}"
        return [
            start(
                *arguments,
                *more[i],
                **settings[i],
                JAX_COORDINATOR_ADDRESS=address,
                JAX_NUM_PROCESSES="2",
                JAX_PROCESS_ID=str(i),
            )
            for i in range(2)
        ]

    return pair


def errors(processes, code, seconds=60):
    """Return the one line of error of each process; all must end with this code."""
    ended = [process.communicate(timeout=seconds) for process in processes]
    assert [process.returncode for process in processes] == [code] * len(processes), ended
    assert [err.count("\n") for _, err in ended] == [1] * len(processes), ended
    assert not any("Gloo" in out for out, _ in ended)
    return [err for _, err in ended]


@pytest.mark.parametrize(
    "variables",
    [
        {},
        dict(SLURM_NTASKS="1", SLURM_PROCID="0"),
        dict(SLURM_NTASKS=""),
        dict(OMPI_COMM_WORLD_SIZE="1"),
        dict(PMI_SIZE="1", PMI_RANK="0"),
    ],
)
def test_one_process_is_no_cluster(variables):
    assert cluster_env.variable(variables) == ""


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (dict(SLURM_NTASKS="x"), "SLURM_NTASKS=x: expected a whole number"),
        (
            dict(SLURM_NTASKS="2"),
            "SLURM_PROCID is not set: expected a whole number from 0 to 1; srun sets it",
        ),
        (SLURM | dict(SLURM_PROCID="2"), "SLURM_PROCID=2"),
        (SLURM | dict(SLURM_LOCALID="-1"), "SLURM_LOCALID=-1"),
        (SLURM | dict(SLURM_NODEID="2"), "SLURM_NODEID=2"),
        (SLURM | dict(SLURM_JOB_ID="j"), "SLURM_JOB_ID=j"),
        (SLURM | dict(SLURM_STEP_TASKS_PER_NODE="1x2"), "SLURM_STEP_TASKS_PER_NODE=1x2: expected"),
        (SLURM | dict(SLURM_GPUS_PER_TASK="many"), "SLURM_GPUS_PER_TASK=many"),
        (dict(OMPI_COMM_WORLD_SIZE="2.5"), "OMPI_COMM_WORLD_SIZE=2.5"),
        (
            dict(SLURM_NTASKS="1", PMI_SIZE="4", PMI_RANK="0"),
            "PMI_SIZE=4: .* expected JAX_COORDINATOR_ADDRESS=.* JAX_NUM_PROCESSES and JAX_PROCESS",
        ),
        (MPI | dict(OMPI_COMM_WORLD_RANK="4"), "OMPI_COMM_WORLD_RANK=4"),
        (MPI | dict(OMPI_COMM_WORLD_LOCAL_RANK="2"), "OMPI_COMM_WORLD_LOCAL_RANK=2"),
        (dict(JAX_COORDINATOR_ADDRESS="h:1"), "JAX_NUM_PROCESSES is not set"),
        (
            dict(JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="0"),
            "JAX_COORDINATOR_ADDRESS=: expected host:port",
        ),
        (
            JAX | dict(JAX_COORDINATOR_ADDRESS="host0:abc"),
            "JAX_COORDINATOR_ADDRESS=host0:abc: expected host:port",
        ),
        (
            JAX | dict(JAX_COORDINATOR_ADDRESS="host0:99999"),
            "JAX_COORDINATOR_ADDRESS=host0:99999: expected host:port",
        ),
        (
            JAX | dict(JAX_COORDINATOR_ADDRESS=":80"),
            "JAX_COORDINATOR_ADDRESS=:80: expected host:port",
        ),
        (
            JAX | dict(JAX_COORDINATOR_BIND_ADDRESS="x"),
            "JAX_COORDINATOR_BIND_ADDRESS=x: expected host:port",
        ),
        (JAX | dict(JAX_NUM_PROCESSES="two"), "JAX_NUM_PROCESSES=two"),
        (JAX | dict(JAX_PROCESS_ID="2"), "JAX_PROCESS_ID=2: expected a whole number from 0 to 1"),
        (JAX | dict(JAX_LOCAL_DEVICE_IDS="0,a"), "JAX_LOCAL_DEVICE_IDS=a"),
        (JAX | dict(JAX_INITIALIZATION_TIMEOUT="x"), "JAX_INITIALIZATION_TIMEOUT=x"),
        (SLURM | dict(JAX_COORDINATOR_PORT="0"), "JAX_COORDINATOR_PORT=0"),
    ],
)
def test_a_bad_variable_is_named(variables, message):
    with pytest.raises(UserError, match="^" + message.replace("(", r"\(")):
        cluster_env.membership(variables)


@pytest.mark.parametrize(
    ("variables", "ids"),
    [
        (SLURM | EIGHT, []),  # a task that is alone on its node uses all GPUs
        (
            SLURM
            | EIGHT
            | dict(SLURM_STEP_TASKS_PER_NODE="8(x2)", SLURM_NTASKS="16", SLURM_LOCALID="5"),
            [5],
        ),
        (
            SLURM
            | EIGHT
            | dict(SLURM_STEP_TASKS_PER_NODE="3,2", SLURM_NTASKS="5", SLURM_LOCALID="1"),
            [4, 5, 6, 7],
        ),
        (
            SLURM
            | EIGHT
            | dict(
                SLURM_STEP_TASKS_PER_NODE="2(x2)", SLURM_LOCALID="1", SLURM_GPUS_PER_TASK="h100:2"
            ),
            [2, 3],
        ),
        # Slurm shows each task only its own GPUs.
        (
            SLURM
            | dict(
                SLURM_STEP_TASKS_PER_NODE="2(x2)",
                SLURM_LOCALID="1",
                SLURM_GPUS_PER_TASK="1",
                CUDA_VISIBLE_DEVICES="0",
            ),
            [],
        ),
        (MPI | EIGHT, [4, 5, 6, 7]),
        (MPI | dict(OMPI_COMM_WORLD_LOCAL_SIZE="1", OMPI_COMM_WORLD_LOCAL_RANK="0") | EIGHT, []),
        (MPI, [1]),  # /dev has two GPUs
        (JAX | EIGHT, []),
        (JAX | EIGHT | dict(JAX_LOCAL_DEVICE_IDS="2,3"), [2, 3]),
    ],
)
def test_processes_of_a_node_share_its_gpus(monkeypatch, variables, ids):
    """jax, which finds the rest of the cluster by itself, must not change the choice."""
    monkeypatch.setattr(cluster_env.glob, "glob", lambda _: ["/dev/nvidia0", "/dev/nvidia1"])
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    membership = cluster_env.membership(os.environ)
    address, count, number, found = ClusterEnv.auto_detect_unset_distributed_params(
        *membership.values(), cluster_detection_method=None, initialization_timeout=1
    )
    assert found == ids
    assert address.split(":")[0] in ("n3", "10.1.1.1", "host0")
    assert (count, number) == (membership["num_processes"], membership["process_id"])


def test_open_mpi_gives_the_numbers_and_the_user_the_address():
    """Open MPI 5 does not give the address."""
    variables = dict(
        OMPI_COMM_WORLD_SIZE="4", OMPI_COMM_WORLD_RANK="3", JAX_COORDINATOR_ADDRESS="h:1"
    )
    assert list(cluster_env.membership(variables).values()) == ["h:1", 4, 3, []]


def test_the_first_field_that_differs_is_named_with_both_values(monkeypatch):
    joined = types.SimpleNamespace(client=True, num_processes=3)
    monkeypatch.setattr(peers, "record", lambda: joined)
    monkeypatch.setattr(cluster, "exchange", lambda mine: [mine, mine, dict(mine, b=dict(c=3))])
    with pytest.raises(UserError, match=r"^b\.c: process 0 has 2, process 2 has 3: give all"):
        cluster.agree(dict(a=1, b=dict(c=2)))
    monkeypatch.setattr(cluster, "exchange", lambda mine: [mine, mine])
    cluster.agree(dict(a=1, b=dict(c=2)))


def test_processes_with_different_configs_do_not_train(pair, tmp_path):
    processes = pair(["--workdir", "r"], ([], ["--config.optimizer.learning_rate=0.5"]))
    for error in errors(processes, 2):
        assert "config.optimizer.learning_rate: process 0 has 0.001, process 1 has 0.5" in error
    assert not (tmp_path / "r").exists()


def test_a_workdir_that_is_not_shared_is_refused_on_each_process(pair, tmp_path):
    folders = [dict(cwd=tmp_path / name) for name in "ab"]
    for folder in folders:
        folder["cwd"].mkdir()
    for error in errors(pair(["--workdir", "r"], settings=folders), 2):
        assert "--workdir=r: process 1 sees another folder there than process 0" in error


def test_bad_input_of_one_process_ends_the_others(pair, tmp_path):
    """A bad flag ends process 1 before it joins, a locked workdir process 0 later."""
    early = pair(["--workdir", "r"], ([], ["--config.foo=1"]))
    (tmp_path / "locked").mkdir()
    with (tmp_path / "locked/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        late = errors(pair(["--workdir", "locked"]), 2)
    assert errors(early, 2) == [
        "error: process 1 of the cluster ended: --config.foo=1: no such field, expected one of "
        "docs/config.md\n",
        "error: --config.foo=1: no such field, expected one of docs/config.md\n",
    ]
    line = "--workdir=locked: another run is using it: wait for it, or give another folder\n"
    assert late == [f"error: {line}", f"error: process 0 of the cluster ended: {line}"]


def test_a_port_that_is_taken_is_named():
    with socket.socket() as other:
        other.bind(("localhost", 0))
        address = f"localhost:{other.getsockname()[1]}"
        other.listen()
        message = f"JAX_COORDINATOR_ADDRESS={address}: port .* cannot be used .*: give another"
        with pytest.raises(UserError, match=message):
            cluster.refuse_taken_port(address)
    cluster.refuse_taken_port(address)


def test_an_absent_process_is_one_line(start):
    address = dict(
        JAX_COORDINATOR_ADDRESS="localhost:1", JAX_NUM_PROCESSES="2", JAX_INITIALIZATION_TIMEOUT="1"
    )
    (error,) = errors([start(**address, JAX_PROCESS_ID="1")], 1)
    assert error.startswith(
        "error: cannot join the cluster: process 0 does not answer at localhost:1 ("
    )


def test_a_sweep_is_refused_at_once(start, monkeypatch, capsys):
    (error,) = errors([start("--sweep", "seed=0,1", **JAX)], 2, 20)
    for variables in (JAX, SLURM, MPI):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            assert launch.launch_sweep() == launch.BAD_INPUT
    said = capsys.readouterr().err.splitlines(keepends=True)
    assert len(said) == 3
    assert all("a sweep runs in one process, expected a single" in line for line in [error, *said])


# Python runs it as each process starts: 20 s would be long to wait.
LOST_SOON = f"""
from cnn_spmd.training import peers
peers.HEARTBEAT_SECONDS = {HEARTBEAT_SECONDS}
"""


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_process_ends_the_others_and_the_same_command_goes_on(pair, tmp_path, lost):
    (tmp_path / "sitecustomize.py").write_text(LOST_SOON)
    surroundings = dict(PYTHONPATH=f"{tmp_path}:{ROOT}")
    command = [
        "--workdir",
        "r",
        "--config.steps=1000000",
        "--config.checkpoint.every_epochs=2",  # of 4 steps
        "--config.eval.every_epochs=0",
        "--config.optimizer.decay=constant",
        "--config.optimizer.warmup=0.0",
    ]

    def saved():
        return set((tmp_path / "r/checkpoints").glob("[0-9]*/SHA256.json"))

    def training():
        """Start both processes; return them once they have saved a checkpoint."""
        before = saved()
        processes = pair(command, settings=(surroundings, surroundings))
        assert processes[0].stdout.readline() == "2 processes x 1 devices\n"
        while saved() <= before:
            if any(process.poll() is not None for process in processes):
                pytest.fail(str([process.communicate() for process in processes]))
            time.sleep(0.1)
        return processes

    processes = training()
    processes[lost].kill()
    (error,) = errors([processes[1 - lost]], 1)
    assert error == (
        f"error: process {lost} of the cluster was lost; the same command goes on from the last "
        "checkpoint\n"
    )
    if lost:
        processes = training()
        processes[1].send_signal(signal.SIGTERM)  # one gets the signal, and all save
        ended = [process.communicate(timeout=60) for process in processes]
        assert [process.returncode for process in processes] == [75, 75], ended
        assert "Resumed r at step" in ended[0][0]
