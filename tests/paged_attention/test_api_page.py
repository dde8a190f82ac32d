"""The documented API is there: names, kinds, parameter order and defaults, all 17 classes and 191 members."""

import dataclasses
import inspect
import subprocess
import sys
from typing import Any

import ml_dtypes
import pytest

import paged_attention
from paged_attention import HBMPageManager, InferenceScheduler, PagedAttentionCacheMetaData
from tests.paged_attention.api_table import API

MEMBERS = [(cls, name) for cls, members in API.items() for name in members if name != "__init__"]


def documented(spec: str) -> list[str]:
    """The parameters in "kind(a, b=1)", as written."""
    inside = spec[spec.index("(") + 1 : spec.rindex(")")]
    return inside.split(", ") if inside else []


def found_default(parameter: inspect.Parameter) -> str:
    if parameter.default is ml_dtypes.bfloat16:
        return "bfloat16"
    return str(parameter.default)


def assert_signature(found: list[inspect.Parameter], spec: str, where: str) -> None:
    wanted = documented(spec)
    for at, text in enumerate(wanted):
        name, _, default = text.partition("=")
        parameter = found[at]
        if name.startswith("*"):
            kinds = {1: inspect.Parameter.VAR_POSITIONAL, 2: inspect.Parameter.VAR_KEYWORD}
            assert parameter.kind is kinds[name.count("*")], where
            continue
        assert parameter.name == name, where
        assert parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD, where
        if default:
            assert found_default(parameter) == default, where
    for extra in found[len(wanted) :]:
        assert extra.default is not inspect.Parameter.empty, f"{where}: {extra.name} is an extension without a default"


def instance(cls_name: str) -> Any:
    manager = HBMPageManager(PagedAttentionCacheMetaData(2, 1, 5, 4, 8, 2, 1, 4, 0.5))
    return manager if cls_name == "HBMPageManager" else InferenceScheduler(manager)


def test_the_table_has_17_classes_and_208_documented_names():
    assert len(API) == 17
    assert len(API) + len(MEMBERS) == 208


def test_the_package_exports_exactly_the_documented_classes():
    assert sorted(paged_attention.__all__) == sorted(API)
    assert all(inspect.isclass(getattr(paged_attention, name)) for name in API)
    assert set(API) <= set(dir(paged_attention))


def test_an_undocumented_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="PagedAttentionKernel"):
        _ = paged_attention.PagedAttentionKernel


@pytest.mark.parametrize("cls_name", API)
def test_constructors_take_the_documented_parameters_in_order(cls_name: str):
    cls = getattr(paged_attention, cls_name)
    assert_signature(list(inspect.signature(cls).parameters.values()), API[cls_name]["__init__"], cls_name)


@pytest.mark.parametrize(("cls_name", "name"), MEMBERS)
def test_members_have_the_documented_kind_and_parameters(cls_name: str, name: str):
    cls, spec = getattr(paged_attention, cls_name), API[cls_name][name]
    kind = spec.partition("(")[0]
    where = f"{cls_name}.{name}"
    if kind == "field":
        if dataclasses.is_dataclass(cls):
            assert name in {field.name for field in dataclasses.fields(cls)}, where
        else:
            assert name in vars(instance(cls_name)), where
        return
    member = inspect.getattr_static(cls, name)
    if kind == "property":
        assert isinstance(member, property), where
        return
    wrappers = {"classmethod": classmethod, "staticmethod": staticmethod}
    assert type(member) is wrappers.get(kind, type(test_members_have_the_documented_kind_and_parameters)), where
    parameters = list(inspect.signature(getattr(cls, name)).parameters.values())
    assert_signature(parameters[1:] if kind == "method" else parameters, spec, where)


def test_planning_starts_without_jax():
    program = (
        "import sys\n"
        "from paged_attention import *\n"
        "meta = PagedAttentionCacheMetaData(2, 1, 9, 4, 8, 2, 1, 4, 0.5)\n"
        "scheduler = InferenceScheduler(HBMPageManager(meta))\n"
        "batch = ActiveSequenceBatch.init_numpy(meta)\n"
        "scheduler.enqueue_prefill_request(InitialSequenceRequest.create('a', None, meta, 4, [1, 2, 3]))\n"
        "plan = scheduler.create_plan(None, batch)\n"
        "ModelIOProcessor.build_input(plan, meta, ActiveSequenceBatch.create(meta, None))\n"
        "PagedAttentionCache.from_json(PagedAttentionCache([]).to_json())\n"
        "print('jax' in sys.modules)\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (ran.stdout.strip(), ran.stderr) == ("False", "")
