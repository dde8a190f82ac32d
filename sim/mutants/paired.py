"""Planted bugs that only a second run, or a fork of the core, makes visible for certain (KR)."""

from __future__ import annotations

from sim.mutants.edit import Edit
from sim.mutants.mutant import Mutant

_MANAGER = "paged_attention.pages:HBMPageManager"
_SCRIPT = "backends.scripted:TokenScript"
_ORACLE = "backends.numpy_oracle:NumpyBackend"


def _masked_by_zero(what: str) -> str:
    """Source text: the reader adds up more than it may, times zero; only what is not finite survives that."""
    return f"""    kind = np.dtype(self._dtype)
    with np.errstate(all="ignore"):
        return wrong + int(np.isnan(self._words{what}.view(kind).astype(np.float64) * 0).any())"""


MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        "KR01",
        "The oracle masks the tail of a row's last page by multiplying with zero, which lets NaN through.",
        ("K4",),
        where="deep",
        edits=(
            Edit(
                f"{_ORACLE}._wrong_words",
                "    return wrong",
                _masked_by_zero("[:, :, :, page[-1], (end - 1) % self._cache.page_size + 1 :]"),
            ),
        ),
        driver="deep-oracle",
    ),
    Mutant(
        "KR02",
        "The JAX reader masks what lies beyond a row's end by multiplying with zero, which lets NaN through.",
        ("K4",),
        where="deep",
        edits=(
            Edit(
                "backends.jax_reader:PageReader._count",
                "((raw != expected) & live)",
                "(((raw != expected) & live) | jnp.isnan(jnp.stack(held).astype(jnp.float32)))",
            ),
        ),
        driver="deep-jax",
    ),
    Mutant(
        "KR03",
        "The oracle masks the padding of a row's page table by multiplying the dummy page with zero.",
        ("K5",),
        where="deep",
        edits=(Edit(f"{_ORACLE}._wrong_words", "    return wrong", _masked_by_zero("[:, :, :, 0]")),),
        driver="deep-oracle",
    ),
    Mutant(
        "KR04",
        "A write leaves the bits that were set in its place before.",
        ("K6",),
        where="deep",
        edits=(
            Edit(
                f"{_ORACLE}._write",
                "self._words[..., page, offset, :] = words(",
                "self._words[..., page, offset, :] |= words(",
            ),
        ),
        driver="deep-oracle",
    ),
    Mutant(
        "KR05",
        "A fork shares the page manager with the core that it was made from.",
        ("S14",),
        where="deep",
        edits=(
            Edit(
                "paged_attention.books:Books.fork",
                "{id(self.batch.context_lock): threading.Lock()}",
                "{id(self.batch.context_lock): threading.Lock(), id(self.manager): self.manager}",
            ),
        ),
        driver="deep-host",
    ),
    Mutant(
        "KR06",
        "A plan that never ran counts as a wait of those whom it left out.",
        ("S14",),
        where="deep",
        edits=(
            Edit(
                "paged_attention.planning:take_back",
                "    books.scheduler.decode_wait, books.scheduler.prefill_wait = flight.waits\n",
                "",
            ),
        ),
        driver="deep-host",
    ),
    Mutant(
        "KR07",
        "What is sampled after a prompt's second chunk or a later one is drawn at the position before.",
        ("O4",),
        where="deep",
        edits=(
            Edit(
                f"{_SCRIPT}.outcome",
                "position = plan.start + plan.count",
                "position = (plan.start + plan.count - ((plan.slot < 0) & (plan.start > 0))).astype(np.int32)",
            ),
        ),
        driver="deep-host",
    ),
    Mutant(
        "KR08",
        "Where more than two rows run in a step, every token is one too large.",
        ("O5",),
        where="deep",
        edits=(
            Edit(
                f"{_SCRIPT}.outcome",
                "token = self.tokens(rows.token_seed, position)",
                "token = self.tokens(rows.token_seed, position) + np.int32(len(position) > 2)",
            ),
        ),
        driver="deep-host",
    ),
    Mutant(
        "KR09",
        "Pages come back in ascending order, not in that of their owner's list.",
        ("O6",),
        where="deep",
        edits=(Edit(f"{_MANAGER}.free_hbm_pages", "extend(returned)", "extend(sorted(returned))"),),
        driver="deep-host",
    ),
    Mutant(
        "KR10",
        "A preempted decode loses the last token that it had generated, and yields it again.",
        ("O7",),
        where="deep",
        edits=(Edit("paged_attention.books:Books.preempt", "first + num_new]", "first + num_new - 1]"),),
        driver="deep-host",
    ),
    Mutant(
        "KR11",
        "A cancel takes the last token from everybody who waits.",
        ("O8",),
        where="deep",
        edits=(
            Edit(
                "paged_attention.engine:PagedAttentionEngine.cancel",
                "        if sequence is None:\n",
                """        for other in books.sequences.values():
            if other.state == "waiting" and other.admission == 0:
                other.limit = max(1, min(other.limit, 3) - 1)
        if sequence is None:
""",
            ),
        ),
        driver="deep-host",
    ),
    Mutant(
        "KR12",
        "A step that starts at an odd nanosecond takes one more.",
        ("O9",),
        where="deep",
        edits=(
            Edit(
                "sim.engine:Engine._dispatch",
                "self._cost.duration_ns(plan)",
                "self._cost.duration_ns(plan) + self.now_ns % 2",
            ),
        ),
        driver="deep-host",
    ),
    Mutant(
        "KR13",
        "Ended sequences give back their pages in the order of the hashes of their names.",
        ("D1",),
        where="deep",
        edits=(
            Edit(
                f"{_MANAGER}.free_hbm_pages",
                "extend(returned)",
                "extend(sorted(returned, key=lambda page: hash(f'page {page}')))",
            ),
        ),
        driver="deep-host",
    ),
    Mutant(
        "KR14",
        "The tokens of planning alone are numbered from 2 on.",
        ("D3",),
        where="deep",
        edits=(Edit(f"{_SCRIPT}.tokens", "add(x, ONE, x)", "add(x, np.uint32(2), x)"),),
        driver="deep-host",
    ),
    Mutant(
        "KR15",
        "Looking at the free pages turns their list by one.",
        ("D4",),
        where="deep",
        edits=(
            Edit(
                f"{_MANAGER}.free_pages",
                "    return list(self._available_hbm_pages)",
                """    for page in self._available_hbm_pages.take(min(1, self.num_available_pages)):
        self._available_hbm_pages.put(page)
    return list(self._available_hbm_pages)""",
            ),
        ),
        driver="deep-host",
    ),
    Mutant(
        "KR16",
        "The free pages begin one further on with each core, by a count that belongs to the process.",
        ("D5",),
        where="deep",
        edits=(
            Edit(
                f"{_MANAGER}.__init__",
                "Fifo(range(DUMMY_PAGE + 1, metadata.num_pages_per_layer))",
                """Fifo(range(DUMMY_PAGE + 1, metadata.num_pages_per_layer))
    self._available_hbm_pages.rotate(next(globals().setdefault("_cores", __import__("itertools").count(1))))""",
            ),
        ),
        driver="deep-host",
    ),
)
