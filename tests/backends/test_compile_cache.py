"""Where compiled programs are kept, and when JAX's own settings are left alone."""

import jax
import pytest

from backends.jax_compile_cache import use_compilation_cache

SETTINGS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture(autouse=True)
def settings():
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    yield before
    for name, value in before.items():
        jax.config.update(name, value)


def test_programs_are_kept_below_the_users_cache_directory(tmp_path):
    folder = use_compilation_cache({"XDG_CACHE_HOME": str(tmp_path)})
    assert folder == tmp_path / "kvproof" / "xla"
    assert folder.is_dir()
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0


def test_who_opts_out_gets_jax_as_it_was(tmp_path, settings):
    assert use_compilation_cache({"XDG_CACHE_HOME": str(tmp_path), "KVPROOF_NO_COMPILATION_CACHE": "1"}) is None
    assert {name: getattr(jax.config, name) for name in SETTINGS} == settings
    assert not list(tmp_path.iterdir())


def test_a_cache_directory_that_cannot_be_made_changes_nothing(tmp_path, settings):
    (tmp_path / "kvproof").write_text("a file in the way")
    assert use_compilation_cache({"XDG_CACHE_HOME": str(tmp_path)}) is None
    assert {name: getattr(jax.config, name) for name in SETTINGS} == settings


def test_a_directory_that_jax_was_given_stays(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "given"))
    asked = {"XDG_CACHE_HOME": str(tmp_path / "other"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "3"}
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    assert use_compilation_cache(asked) == tmp_path / "given"
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "given")
    assert jax.config.jax_persistent_cache_min_compile_time_secs == seconds
    assert not (tmp_path / "other").exists()
