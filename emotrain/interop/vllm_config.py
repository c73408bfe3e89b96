"""The configuration class of EMO models in vLLM. Nothing imports this file but `vllm_plugin`, where
transformers is installed."""

from __future__ import annotations

from transformers import PreTrainedConfig


class EmoConfig(PreTrainedConfig):
    """config.json as it is: `serving` reads it. It stands at the top of a file because vLLM sends
    it to other processes."""

    model_type = "emo"
