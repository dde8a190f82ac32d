"""The parts of a run, built from its scenario: core, cache, backend, auditor."""

from __future__ import annotations

from backends.protocol import Backend, CacheSpec, DeviceSpec, ModelSpec
from backends.registry import make_backend
from invariants.auditor import AuditConfig, Auditor
from invariants.decoder_oracle import DecoderOracle
from sim.backend_wrapper import RowsOnly
from sim.cores.protocol import CoreConfig, ServingCore
from sim.cores.registry import core_factory
from sim.mutants import Mutant
from sim.scenario import Scenario


class SetupError(Exception):
    """The scenario asks for a core or a backend that cannot be built like that; the message says why."""


def build_core(
    scenario: Scenario,
    mutant: Mutant | None = None,
    *,
    free_pages: tuple[int, ...] = (),
    free_slots: tuple[int, ...] = (),
) -> ServingCore:
    """The core that the scenario asks for, with its planted bug and, where given, its first free lists.

    UnknownCoreError: there is none of that kind. SetupError: it takes no such sizes or options.
    """
    core, cache = scenario.core, scenario.cache
    config = CoreConfig(
        batch_size=core.batch_size,
        page_size=cache.page_size,
        num_pages=cache.num_pages,
        max_sequence_length=cache.max_sequence_length,
        prefill_chunk=core.prefill_chunk,
        lag=core.lag,
        preemption=core.preemption,
        mix=core.mix,
        max_decode_wait=core.max_decode_wait,
        max_prefill_wait=core.max_prefill_wait,
        layers=cache.layers,
        kv_heads=cache.kv_heads,
        head_dim=cache.head_dim,
        free_pages=free_pages,
        free_slots=free_slots,
        options=core.options,
    )
    try:
        built = core_factory(core.kind)(config)
    except ValueError as error:
        raise SetupError(f"core: {error}") from error
    return mutant.core(built) if mutant is not None and mutant.core is not None else built


def cache_spec(scenario: Scenario) -> CacheSpec:
    """The cache that the scenario asks for."""
    core, cache, settings = scenario.core, scenario.cache, scenario.backend
    return CacheSpec(
        layers=cache.layers,
        kv_heads=cache.kv_heads,
        num_pages=cache.num_pages,
        page_size=cache.page_size,
        head_dim=cache.head_dim,
        dtype=cache.dtype,
        max_sequence_length=cache.max_sequence_length,
        batch_size=core.batch_size,
        prefill_chunk=core.prefill_chunk,
        lag=core.lag,
        layout=cache.layout,
        writer=settings.writer,
        quantize=cache.quantize,
    )


def model_spec(scenario: Scenario) -> ModelSpec:
    """The model that the scenario asks for."""
    model = scenario.model
    eos = scenario.workload.end_by == "eos"
    return ModelSpec(model.kind, model.vocab_size, model.lanes, model.query_heads or 0, model.seed, eos)


def open_backend(scenario: Scenario, mutant: Mutant | None = None) -> Backend:
    """The opened backend, with its planted bug.

    BackendUnavailableError: it or its devices are not there. SetupError: it cannot hold such a cache.
    """
    settings = scenario.backend
    backend = make_backend(settings.kind)
    if settings.road == "rows":
        backend = RowsOnly(backend)
    if mutant is not None and mutant.backend is not None:
        backend = mutant.backend(backend)
    try:
        backend.open(
            cache_spec(scenario), model_spec(scenario), DeviceSpec(settings.platform, dict(settings.mesh.items()))
        )
    except ValueError as error:
        raise SetupError(f"backend: {error}") from error
    return backend


def build_auditor(scenario: Scenario, core: ServingCore) -> Auditor:
    """The auditor that the scenario asks for."""
    settings = scenario.invariants
    config = AuditConfig(
        every=settings.every,
        full_every=settings.full_every,
        device_every=settings.device_every,
        only=None if settings.only is None else frozenset(settings.only),
    )
    oracle = None
    if scenario.model.kind == "tiny":
        oracle = DecoderOracle(model_spec(scenario).decoder(cache_spec(scenario)), scenario.cache.dtype)
    return Auditor(core.policy, config, scenario.model.vocab_size, oracle)
