"""Planted bugs of the layouts (ML)."""

from __future__ import annotations

from sim.mutants.edit import Edit
from sim.mutants.mutant import Mutant

_LAYOUT = "paged_attention.layout:PagesFirst"
_DRIVER = "device-pages-first"

MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        "ML01",
        "Pages first: heads and offsets are exchanged where single places are indexed.",
        ("K1", "K3"),
        where="device",
        edits=(Edit(f"{_LAYOUT}.index", "(page, offset)", "(page, slice(None), offset)"),),
        driver=_DRIVER,
    ),
    Mutant(
        "ML02",
        "Pages first: the index of a place has its offset before its page.",
        ("K1", "K3"),
        where="device",
        edits=(Edit(f"{_LAYOUT}.index", "(page, offset)", "(offset, page)"),),
        driver=_DRIVER,
    ),
    Mutant(
        "ML03",
        "Pages first: whole pages are written with heads and offsets exchanged.",
        ("K1", "K3"),
        where="device",
        edits=(Edit(f"{_LAYOUT}.write_page", "tokens[None]", "tokens.swapaxes(0, 1)[None]"),),
        driver=_DRIVER,
    ),
    Mutant(
        "ML04",
        "Pages first: a pool is taken to have as many pages as a page has offsets.",
        ("K2", "K1", "K3"),
        where="device",
        edits=(Edit(f"{_LAYOUT}.num_pages", "pool.shape[0]", "pool.shape[1]"),),
        driver=_DRIVER,
    ),
    Mutant(
        "ML05",
        "Pages first: scattered vectors lie heads before tokens, as the other layout wants them.",
        ("K1", "K3"),
        where="device",
        edits=(Edit(f"{_LAYOUT}.from_tokens", "return tokens", "return tokens.swapaxes(0, 1).reshape(tokens.shape)"),),
        driver=_DRIVER,
    ),
    Mutant(
        "ML06",
        "Pages first: the reader takes the offset for the page and the page for the offset.",
        ("O1",),
        where="device",
        edits=(Edit(f"{_LAYOUT}.read_words", "start_index_map=(0, 1, 3)", "start_index_map=(1, 0, 3)"),),
        driver=_DRIVER,
    ),
    Mutant(
        "ML07",
        "Heads first: a single token is written with page and offset exchanged.",
        ("K2", "K1", "K3"),
        where="device",
        edits=(Edit("paged_attention.layout:HeadsFirst.write_token", "(0, page, offset, 0)", "(0, offset, page, 0)"),),
        driver="device-starved",
    ),
)
