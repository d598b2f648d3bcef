"""Owns the numbers that a worker publishes through TorchServe's metrics (`:8082/metrics`).

Knows the engine's statistics by their names, and nothing of requests.
"""

from __future__ import annotations

from typing import Any

from ts.metrics.metric_type_enum import MetricTypes

# Gauges by name, and the attribute of EngineStats that each shows.
_GAUGES = {
    "llama_requests_running": "running",
    "llama_requests_waiting": "waiting",
    "llama_kv_blocks_free": "free_blocks",
    "llama_engine_steps": "steps",
    # In tokens, under the names that vLLM gave them: hits divided by queries are the hit rate.
    "llama_prefix_cache_queries": "prompt_tokens",
    "llama_prefix_cache_hits": "cached_tokens",
}


class EngineMetrics:
    """Publishes what has changed. `cache` is TorchServe's metrics cache of this worker."""

    def __init__(self, cache: Any, model_name: str) -> None:
        self._model_name = model_name
        self._shown: dict[str, int] = {}
        self._gauges = {
            name: cache.add_metric_to_cache(
                metric_name=name, unit="count", dimension_names=["ModelName"], metric_type=MetricTypes.GAUGE
            )
            for name in _GAUGES
        }

    def publish(self, stats: Any) -> None:
        for name, attribute in _GAUGES.items():
            value = getattr(stats, attribute)
            if self._shown.get(name) != value:
                self._gauges[name].add_or_update(value, [self._model_name])
                self._shown[name] = value
