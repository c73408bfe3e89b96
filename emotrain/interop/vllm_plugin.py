"""The entry point that makes vLLM serve EMO models: group `vllm.general_plugins`, name `emotrain`.

vLLM calls `register` in every process that it starts, also in those that serve another model.
Nothing here imports torch, and nothing that fails here stops vLLM.
"""

from __future__ import annotations

import logging

ARCHITECTURE = "EmoForCausalLM"
"""What `architectures` of a config.json says, of the released models and of `emotrain export`."""
MODEL = "emotrain.interop.vllm_model:EmoForCausalLM"


def register() -> None:
    """Tell vLLM and transformers what an EMO model is. May be called again.

    A folder's own code is not used, whether vLLM trusts remote code or not. A failure is logged,
    and vLLM goes on without EMO models.
    """
    try:
        from transformers import AutoConfig
        from vllm import ModelRegistry

        from emotrain.interop.vllm_config import EmoConfig

        AutoConfig.register(EmoConfig.model_type, EmoConfig, exist_ok=True)
        # A name, so that neither the model nor CUDA is there before vLLM wants it.
        ModelRegistry.register_model(ARCHITECTURE, MODEL)
    except Exception:
        logging.getLogger(__name__).warning(
            "vLLM cannot serve EMO models: the plugin of emotrain did not register", exc_info=True
        )
