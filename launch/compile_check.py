"""Will it fit? Compile a config's programs for machines that are not there: python -m launch.compile_check --config=...

    python -m launch.compile_check --config=configs/base.py --topology=v5e:4x4 --config.mesh.fsdp=-1 --config.remat=full

TPU topologies are compiled by the real TPU compiler on any Linux machine after
`pip install -r launch/requirements-tpu.txt`. Nothing runs, and neither data nor weights are read.
"""

import os

from absl import flags

from launch import cli

# no metadata server and no neighbours to ask, and no chip to keep other processes from
COMPILER_ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

CONFIG = cli.define_config()
TOPOLOGY = flags.DEFINE_list("topology", ["local"], "local (the devices here), or TPUs: v5e:4x4, v5p-64, ...; a list.")
SLICES = flags.DEFINE_integer("slices", 1, "Slices of that topology, joined by the network.", lower_bound=1)
BACKBONE = flags.DEFINE_list("backbone", None, "Backbones to compile with, if not the config's.")
PROGRAM = flags.DEFINE_list("program", ["train", "sample"], "Programs to compile.")
flags.mark_flag_as_required("config")


def main() -> None:
    """Compile every program for every topology and backbone asked for, and print what each costs."""
    import jax

    from rlawm_jax import fit
    from rlawm_jax.logging import say
    from rlawm_jax.models.vit import variant

    if TOPOLOGY.value != [fit.LOCAL]:
        jax.config.update("jax_platforms", "cpu")  # whatever is here, the TPU is not
        os.environ.update(COMPILER_ALONE)
    config, found = CONFIG.value, []
    backbones = BACKBONE.value or [config.backbone.name]
    for name in backbones:
        variant(name)
    for machine in TOPOLOGY.value:
        devices = fit.devices_of(machine, SLICES.value)
        for config.backbone.name in backbones:
            for program in PROGRAM.value:
                found.append(fit.check(config, machine, devices, program))
                say(fit.table(found[-1:]).splitlines()[-1])
    print(fit.table(found))


if __name__ == "__main__":
    cli.run(main)
