"""A paged K/V cache and the scheduler around it: which sequence owns which page, and what each step writes where.

The classes are loaded when they are first used; none of them imports JAX before it needs an array on a device.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paged_attention.batch import ActiveSequenceBatch
    from paged_attention.cache import PagedAttentionCache, PagedAttentionCacheView
    from paged_attention.metadata import PagedAttentionCacheMetaData
    from paged_attention.model_io import ModelIOProcessor
    from paged_attention.model_values import (
        ModelInputBatch,
        ModelOutputBatch,
        ModelOutputSummary,
        PagedAttentionMetadata,
    )
    from paged_attention.pages import HBMPageManager
    from paged_attention.requests import (
        AllocatedPrefillPages,
        GenerationStepTask,
        InitialSequenceRequest,
        NextIterationPlan,
        SlotPageAssignment,
    )
    from paged_attention.sampling import SamplingParams
    from paged_attention.scheduler import InferenceScheduler

__all__ = [
    "ActiveSequenceBatch",
    "AllocatedPrefillPages",
    "GenerationStepTask",
    "HBMPageManager",
    "InferenceScheduler",
    "InitialSequenceRequest",
    "ModelIOProcessor",
    "ModelInputBatch",
    "ModelOutputBatch",
    "ModelOutputSummary",
    "NextIterationPlan",
    "PagedAttentionCache",
    "PagedAttentionCacheMetaData",
    "PagedAttentionCacheView",
    "PagedAttentionMetadata",
    "SamplingParams",
    "SlotPageAssignment",
]

_HOME = {
    "ActiveSequenceBatch": "batch",
    "AllocatedPrefillPages": "requests",
    "GenerationStepTask": "requests",
    "HBMPageManager": "pages",
    "InferenceScheduler": "scheduler",
    "InitialSequenceRequest": "requests",
    "ModelIOProcessor": "model_io",
    "ModelInputBatch": "model_values",
    "ModelOutputBatch": "model_values",
    "ModelOutputSummary": "model_values",
    "NextIterationPlan": "requests",
    "PagedAttentionCache": "cache",
    "PagedAttentionCacheMetaData": "metadata",
    "PagedAttentionCacheView": "cache",
    "PagedAttentionMetadata": "model_values",
    "SamplingParams": "sampling",
    "SlotPageAssignment": "requests",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
