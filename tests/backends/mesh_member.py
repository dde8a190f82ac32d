"""One of several processes that share a mesh: runs our backend, and saves the raw words of the shards it holds.

python -m tests.backends.mesh_member INDEX COUNT DEVICES COORDINATOR FOLDER
"""

import os
import sys
from pathlib import Path

MEMBER, COUNT, DEVICES = map(int, sys.argv[1:4])
COORDINATOR, FOLDER = sys.argv[4], Path(sys.argv[5])
HERE = DEVICES // COUNT
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={HERE}"


def main():
    import numpy as np

    from backends.jax_device import JaxBackend
    from backends.jax_processes import join_processes
    from backends.protocol import DeviceSpec, ProcessShare
    from tests.backends.harness import EngineRun, cache_spec, opened
    from tests.backends.planner import Planner

    if COUNT > 1:
        join_processes(ProcessShare(MEMBER, COUNT, COORDINATOR))
    devices = DeviceSpec(mesh={"heads": DEVICES})
    cache = cache_spec(kv_heads=4)

    def save(name, backend):
        for nth, pool in enumerate(backend._pools):
            for shard in pool.addressable_shards:
                heads = shard.index[0]
                np.save(FOLDER / f"{name}-{nth}-{heads.start or 0}.npy", np.asarray(shard.data).view(np.uint16))

    backend = opened(JaxBackend(), cache, devices=devices)
    run = EngineRun(cache, 3, 1)
    run.run(lambda plan, rows: backend.execute(plan, rows).result())
    save("native", backend)
    backend.close()

    backend = opened(JaxBackend(), cache, devices=devices)
    planner = Planner(cache, 5, eos=True)
    for _ in range(20):
        plan, rows = planner.plan()
        if plan.num_rows:
            backend.execute(plan, rows).result()
    assert backend.verify(*planner.places()) == ()
    backend.poison(np.array([1], np.int32), "big")
    found = backend.verify(np.array([1], np.int32), np.zeros(1, np.int32), np.array([77], np.uint32), limit=99)
    # Each process learns of every wrong place, those on the other's devices included.
    assert {wrong.head for wrong in found} == set(range(cache.kv_heads))
    save("rows", backend)
    print(backend.describe()["processes"], run.steps)


main()
