"""Will it fit? Compile a config's programs for absent machines: python -m launch.compile_check --config=...

    python -m launch.compile_check --config=configs/base.py --topology=v5e-16 --config.mesh.fsdp=-1 --config.remat=full

TPU topologies are compiled by the real TPU compiler on any Linux machine after
`pip install -r launch/requirements-tpu.txt`. Nothing runs, and neither data nor weights are read. Programs: train (the
training step), rl (one PPO iteration in imagination by --rl_config, with a policy of --policy_config and 100
demonstrations of 100 frames), sample (a predicted chunk for every window of a batch, and its decoded image).

The table in launch/README.md covers every machine, backbone and program, minutes each. Finished rows are kept in the
file, and the same command resumes from them.

    python -m launch.compile_check --config=configs/base.py --table=fit.jsonl --config.mesh.fsdp=-1 --config.remat=full

The compiler runs at low effort (set JAX_EXEC_TIME_OPTIMIZATION_EFFORT to change this): it is several times faster,
with the same collectives, and asked for 5 % less memory in the program that was compiled both ways.
"""

import os
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from launch import cli

# there is no metadata server, no neighbouring worker and no chip to lock
COMPILER_ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
LEAST_EFFORT = -1.0
# the default machines, backbones and programs for --table
MACHINES = ("v5e-16", "v5e-64", "v5p-8", "v5p-64", "v6e-16")
BACKBONES = ("dinov3_vitl16", "dinov3_vith16plus", "dinov3_vit7b16")
PROGRAMS = ("train", "rl", "sample")

CONFIG = cli.define_config()
RL = config_flags.DEFINE_config_file("rl_config", "configs/rl.py", "Recipe of the RL iteration.", lock_config=True)
POLICY = config_flags.DEFINE_config_file("policy_config", "configs/policy.py", "Its policy.", lock_config=True)
TOPOLOGY = flags.DEFINE_list(
    "topology", None, "local (the devices here; the default), or TPUs: v5e-16, v5e:4x4; a list."
)
SLICES = flags.DEFINE_integer("slices", 1, "Slices of that topology, joined by the network.", lower_bound=1)
BACKBONE = flags.DEFINE_list("backbone", None, "Backbones to compile with, if not the config's.")
PROGRAM = flags.DEFINE_list("program", list(PROGRAMS), "Programs to compile.")
TABLE = flags.DEFINE_string("table", None, "File of finished rows; with it, all machines and backbones by default.")
flags.mark_flag_as_required("config")


def main() -> None:
    """Compile every program for every requested topology and backbone, and print the cost of each."""
    import jax

    from rlawm_jax.compile_check import check
    from rlawm_jax.models.vit import variant
    from rlawm_jax.run_folder.logging import announce

    config = CONFIG.value
    machines = TOPOLOGY.value or (MACHINES if TABLE.value else [check.LOCAL])
    backbones = BACKBONE.value or (BACKBONES if TABLE.value else [config.backbone.name])
    if check.LOCAL not in machines:
        jax.config.update("jax_platforms", "cpu")  # the devices of this machine are not used
        os.environ.update(COMPILER_ALONE)
        if hasattr(jax.config, check.EFFORT) and check.EFFORT.upper() not in os.environ:
            jax.config.update(check.EFFORT, LEAST_EFFORT)
    for name in backbones:
        variant(name)
    for name in PROGRAM.value:
        check.check_program(name)
    kept = check.Rows(Path(TABLE.value).expanduser() if TABLE.value else None)
    rows = []
    for machine in machines:
        devices = check.devices_of(machine, SLICES.value)
        for config.backbone.name in backbones:
            for program in PROGRAM.value:
                recipes = {"rl": RL.value, "policy": POLICY.value} if program == "rl" else {}
                key = check.row_key(machine, SLICES.value, program, config, recipes)
                cells = kept.get(key)
                if cells is None:
                    cells = check.check(config, machine, devices, program, **recipes).cells()
                    kept.put(key, cells)
                rows.append(cells)
                announce(check.table(rows[-1:]).splitlines()[-1])
    print(check.table(rows))


if __name__ == "__main__":
    cli.run(main)
