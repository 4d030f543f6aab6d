"""Read from environment variables which cluster this process belongs to, if any.

A user sets JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID on each host; Slurm's srun
and Open MPI's mpirun set variables of their own. jax reads all of these too. They are checked here
first, because jax answers a bad value with a traceback.
"""

import glob
import re
from collections.abc import Mapping

from cnn_spmd.errors import UserError

COORDINATOR = "JAX_COORDINATOR_ADDRESS"
BIND_ADDRESS = "JAX_COORDINATOR_BIND_ADDRESS"
# The variables for the number of processes, and for the number of this one.
JAX = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
MPI = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")
SLURM = ("SLURM_NTASKS", "SLURM_PROCID")
PMI_SIZE = "PMI_SIZE"  # MPICH's and Intel MPI's mpirun set it; jax knows neither
LARGEST_INT = 2**31 - 1
LARGEST_PORT = 2**16 - 1


def variable(env: Mapping[str, str]) -> str:
    """Return the variable that makes this process one of several; "" if none does."""
    for name in (*JAX, COORDINATOR):
        if name in env:
            return name
    # Launchers set these for a single process, too. Slurm's srun may set PMI_SIZE as well.
    for count_name in (MPI[0], SLURM[0], PMI_SIZE):
        if env.get(count_name) and number(env, count_name, 1) > 1:
            return count_name
    return ""


def membership(env: Mapping[str, str]) -> dict:
    """Return the arguments for jax.distributed.initialize.

    jax finds an address that is None by itself.
    Raises UserError, which names the variable, for a bad value.
    """
    if variable(env) == PMI_SIZE:
        raise UserError(
            f"{PMI_SIZE}={env[PMI_SIZE]}: one of several processes of an mpirun that jax does not "
            f"know (MPICH, Intel MPI), expected {COORDINATOR}=host:port of process 0, {JAX[0]} and "
            f"{JAX[1]} with it, or, for a run alone, {PMI_SIZE} unset"
        )
    count_name, id_name = _launcher(env)
    _check_address(env, COORDINATOR, needed=count_name == JAX[0])
    _check_address(env, BIND_ADDRESS, needed=False)
    for name, largest in (
        ("JAX_COORDINATOR_PORT", LARGEST_PORT),
        ("JAX_INITIALIZATION_TIMEOUT", LARGEST_INT),
        ("SLURM_JOB_ID", LARGEST_INT),
    ):
        if name in env:
            number(env, name, 1, largest)
    count = number(env, count_name, 1)
    return dict(
        coordinator_address=env.get(COORDINATOR),
        num_processes=count,
        process_id=number(env, id_name, 0, count - 1),
        local_device_ids=local_devices(env),
    )


def local_devices(env: Mapping[str, str]) -> list[int]:
    """Return the numbers of the visible GPUs that this process uses; [] means all.

    The tasks of a node share its GPUs evenly, or as SLURM_GPUS_PER_TASK says. jax by itself gives
    each task one GPU, even if the task is alone on its node.
    """
    ids = "JAX_LOCAL_DEVICE_IDS"
    if ids in env:
        return [number({ids: each}, ids, 0) for each in env[ids].split(",")]
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in env:
        tasks = number(env, "OMPI_COMM_WORLD_LOCAL_SIZE", 1)
        task = number(env, "OMPI_COMM_WORLD_LOCAL_RANK", 0, tasks - 1)
        share = 0
    elif "SLURM_STEP_TASKS_PER_NODE" in env:
        tasks = _slurm_tasks_of_node(env)
        task = number(env, "SLURM_LOCALID", 0, tasks - 1)
        share = _slurm_gpus_per_task(env)
    else:
        return []
    visible = env.get("CUDA_VISIBLE_DEVICES")
    gpus = len(visible.split(",") if visible else glob.glob("/dev/nvidia[0-9]*"))
    share = share or gpus // tasks
    if tasks == 1 or gpus <= share:  # the launcher may show each task only its own GPUs
        return []
    return list(range(task * share, (task + 1) * share))


def number(env: Mapping[str, str], name: str, low: int, high: int = LARGEST_INT) -> int:
    """Return the whole number in a variable. Raises UserError for anything else."""
    value = env.get(name)
    if value is None or not re.fullmatch("[0-9]{1,10}", value) or not low <= int(value) <= high:
        shown = f"{name} is not set" if value is None else f"{name}={value}"
        hint = "; srun sets it" if name.startswith("SLURM") else ""
        raise UserError(f"{shown}: expected a whole number from {low} to {high}{hint}")
    return int(value)


def _launcher(env: Mapping[str, str]) -> tuple[str, str]:
    """Return the variables for the number of processes and the number of this one."""
    name = variable(env)
    if name == COORDINATOR:  # the user gives the address, and a launcher may give the numbers
        return next((names for names in (MPI, SLURM) if names[0] in env), JAX)
    return next(names for names in (MPI, SLURM, JAX) if name in names)


def _check_address(env: Mapping[str, str], name: str, needed: bool) -> None:
    """Raise UserError if a variable is not host:port, or if it is needed and absent."""
    if name not in env and not needed:
        return
    host, _, port = env.get(name, "").rpartition(":")
    if not host or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) <= LARGEST_PORT:
        raise UserError(
            f"{name}={env.get(name, '')}: expected host:port of process 0, with a port from 1 to "
            f"{LARGEST_PORT}"
        )


def _slurm_tasks_of_node(env: Mapping[str, str]) -> int:
    """Return how many tasks this node has.

    Slurm lists them for all nodes: 4(x2),3 means two nodes of 4 tasks and one of 3.
    """
    name = "SLURM_STEP_TASKS_PER_NODE"
    nodes: list[int] = []
    for part in env[name].split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not match:
            raise UserError(f"{name}={env[name]}: expected tasks of each node, such as 4(x2),3")
        nodes += [int(match[1])] * int(match[2] or 1)
    return nodes[number(env, "SLURM_NODEID", 0, len(nodes) - 1)]


def _slurm_gpus_per_task(env: Mapping[str, str]) -> int:
    """Return what --gpus-per-task says, such as 2 or h100:2; 0 if it is not given."""
    name = "SLURM_GPUS_PER_TASK"
    return number({name: env[name].split(":")[-1]}, name, 1) if env.get(name) else 0
