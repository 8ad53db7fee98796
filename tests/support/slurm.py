"""Variables that a real SLURM (22.05.8, two nodes n1 and n2) set; those that mswift does not read are left out.

Recorded with `env` in a batch script, in srun's tasks, and in shells of salloc.
"""

ALLOCATION = {
    "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NTASKS": "4", "SLURM_NPROCS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_TASKS_PER_NODE": "2(x2)",
}  # fmt: skip

SALLOC_SHELL = ALLOCATION  # the shell that salloc starts where it was called
BATCH_SCRIPT = {
    **ALLOCATION, "SLURMD_NODENAME": "n1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
    "SLURM_GTIDS": "0",
}  # fmt: skip
# salloc with LaunchParameters=use_interactive_step, which gives the shell a step of its own on the first node.
INTERACTIVE_STEP = {
    **BATCH_SCRIPT, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NODELIST": "n1", "SLURM_STEP_NUM_TASKS": "1",
}  # fmt: skip
# A batch script that `sbatch --nodes=2 --ntasks-per-node=2` submitted from inside a step of two tasks.
BATCH_SCRIPT_FROM_A_STEP = {
    **BATCH_SCRIPT, "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "n1", "SLURM_STEP_NUM_TASKS": "2",
}  # fmt: skip
# Task 0 of `srun --distribution=arbitrary` with n2 first in SLURM_HOSTFILE.
ARBITRARY = {
    **ALLOCATION, "SLURMD_NODENAME": "n2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "1",
    "SLURM_DISTRIBUTION": "arbitrary", "SLURM_STEP_ID": "4", "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_NUM_TASKS": "4",
}  # fmt: skip


def task(rank: int) -> dict[str, str]:
    """Task `rank` of `srun` in a batch script: 4 tasks on 2 nodes."""
    node = rank // 2
    return {
        **ALLOCATION, "SLURMD_NODENAME": f"n{node + 1}", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank % 2),
        "SLURM_NODEID": str(node), "SLURM_GTIDS": "2,3" if node else "0,1", "SLURM_DISTRIBUTION": "block",
        "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_LAUNCH_NODE_IPADDR": "10.77.0.11",
    }  # fmt: skip


def task_on_second_node(rank: int) -> dict[str, str]:
    """Task `rank` of `srun --nodes=1 --ntasks=2 --nodelist=n2` in the same job: a step smaller than the job."""
    return {
        **task(rank), "SLURMD_NODENAME": "n2", "SLURM_NODEID": "0", "SLURM_GTIDS": "0,1", "SLURM_NTASKS": "2",
        "SLURM_NPROCS": "2", "SLURM_STEP_ID": "5", "SLURM_STEP_NODELIST": "n2", "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
    }  # fmt: skip
