"""Runs exported folders with transformers, in a process that has no emotrain: `test_modeling.py`
starts it, with the Python of whichever version is to be tested.

    python modeling_peer.py FOLDER ...

Beside each FOLDER lies FOLDER.safetensors with what our model computes: `input_ids` [B, S],
`logits` [B, S, V] and, where there are any, gradients of the mean loss by name, and `text` in UTF-8
with its `token_ids`. Prints a JSON object with what was found, and leaves FOLDER-saved, written by
`save_pretrained`.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")

REFUSED: dict[str, Any] = {
    "attention_bias": True,
    "always_active_experts": [0],
    "expert_layout": "other",
    "head_dim": 3,
    "n_shared_experts": 7,
    "norm_topk_prob": True,
    "num_experts_per_layer": [4],
    "num_experts_per_tok": 1,
    "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    "tie_word_embeddings": True,
}
"""Settings that the code does not compute, on top of those of a model with one shared expert."""


def load(folder: str, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)


def largest_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape, (one.shape, other.shape)
    return float((one.detach() - other).abs().max())


def gradients(model: Any, tokens_BS: torch.Tensor, names: list[str]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(tokens_BS, labels=tokens_BS).loss.backward()
    return {name: model.get_parameter(name).grad.clone() for name in names}


def balance_by_hand(outputs: Any, config: Any, counted_T: list[bool]) -> float:
    """The balance loss in loops over layers and tokens."""
    losses = []
    for layer, logits_TE in enumerate(outputs.router_logits):
        num_routed, chosen = config.num_routed_experts(layer), config.num_chosen_experts(layer)
        counts, sums = torch.zeros(num_routed), torch.zeros(num_routed)
        for logits_E, counted in zip(logits_TE, counted_T, strict=True):
            if counted:
                probabilities_N = logits_E[:num_routed].exp() / logits_E[:num_routed].exp().sum()
                sums += probabilities_N
                for expert in probabilities_N.sort(descending=True).indices[:chosen]:
                    counts[expert] += 1
        num = sum(counted_T)
        losses.append(float(num_routed / chosen * (counts / num * sums / num).sum()))
    return sum(losses) / len(losses)


def generated(model: Any, tokens_BS: torch.Tensor) -> dict[str, bool]:
    """Whether greedy tokens are the same with a cache, without one, and with padding before."""
    model.generation_config.eos_token_id = None
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    mask_BS = torch.ones_like(tokens_BS)
    cached_BS = model.generate(tokens_BS, attention_mask=mask_BS, use_cache=True, **options)
    plain_BS = model.generate(tokens_BS, attention_mask=mask_BS, use_cache=False, **options)
    short_BS = model.generate(
        tokens_BS[:1, 2:], attention_mask=mask_BS[:1, 2:], use_cache=True, **options
    )
    padded_BS = tokens_BS.clone()
    padded_BS[0, :2] = 0
    mask_BS[0, :2] = 0
    beside_BS = model.generate(padded_BS, attention_mask=mask_BS, use_cache=True, **options)
    assert cached_BS.shape[1] == tokens_BS.shape[1] + 8
    return {
        "cached": torch.equal(cached_BS, plain_BS),
        "padded": torch.equal(beside_BS[0, 2:], short_BS[0])
        and torch.equal(beside_BS[1], cached_BS[1]),
    }


def refusals(config: Any) -> dict[str, str]:
    """The line that refuses each of `REFUSED`; empty where nothing does."""
    lines = dict.fromkeys(REFUSED, "")
    for name, value in REFUSED.items():
        settings = {**config.to_dict(), name: value}
        try:
            type(config)(**settings)
        except ValueError as error:
            lines[name] = str(error)
    return lines


def run(folder: str) -> dict[str, Any]:
    expected = load_file(f"{folder}.safetensors")
    tokens_BS, found = expected.pop("input_ids"), {}
    logits_BSV, token_ids = expected.pop("logits"), expected.pop("token_ids", None)
    text = bytes(expected.pop("text", torch.empty(0)).tolist()).decode()
    half = tokens_BS.shape[1] // 2
    for name in IMPLEMENTATIONS:
        model = load(folder, experts_implementation=name).eval()
        assert model.dtype == torch.float32 and model.config._experts_implementation == name
        with torch.no_grad():
            found[f"{name}_logits"] = largest_difference(model(tokens_BS).logits, logits_BSV)
            first = model(tokens_BS[:, :half], use_cache=True)
            second = model(tokens_BS[:, half:], past_key_values=first.past_key_values)
            found[f"{name}_cached_logits"] = largest_difference(second.logits, logits_BSV[:, half:])
        of_loss = gradients(model, tokens_BS, list(expected))
        differences = [largest_difference(of_loss[key], grad) for key, grad in expected.items()]
        found[f"{name}_gradients"] = max(differences, default=0.0)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        outputs = model(tokens_BS, output_router_logits=True, output_attentions=True)
    found["attention_logits"] = largest_difference(outputs.logits, logits_BSV)
    assert len(outputs.attentions) == model.config.num_hidden_layers
    everything = [True] * tokens_BS.numel()
    by_hand = balance_by_hand(outputs, model.config, everything)
    found["balance"] = abs(float(outputs.aux_loss) - by_hand)
    labels_BS = tokens_BS.clone()
    labels_BS[:, ::3] = -100
    outputs = model(tokens_BS, labels=labels_BS, output_router_logits=True)
    by_hand = balance_by_hand(outputs, model.config, (labels_BS != -100).flatten().tolist())
    found["balance_of_labels"] = abs(float(outputs.aux_loss) - by_hand)
    plain = model(tokens_BS, labels=labels_BS, output_router_logits=False).loss
    weighed = plain + model.config.router_aux_loss_coef * outputs.aux_loss
    found["loss"] = largest_difference(outputs.loss, weighed)
    # As one of several micro-batches of a step, which share a number of items.
    items = 3 * (labels_BS != -100).sum()
    part = model(tokens_BS, labels=labels_BS, output_router_logits=True, num_items_in_batch=items)
    found["balance_of_part"] = largest_difference(3 * part.aux_loss, outputs.aux_loss.detach())

    model.set_attn_implementation("sdpa")
    found |= generated(model, tokens_BS[:, :6])
    model.train()
    before = gradients(model, tokens_BS, list(expected))
    model.gradient_checkpointing_enable()
    after = gradients(model, tokens_BS, list(expected))
    found["recomputed"] = all(torch.allclose(before[key], after[key], atol=1e-6) for key in before)
    model.eval().save_pretrained(f"{folder}-saved")

    body = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        hidden_BSD = body(tokens_BS).last_hidden_state
        found["body_logits"] = largest_difference(model.lm_head(hidden_BSD), logits_BSV)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    torch.manual_seed(0)
    fresh = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    found["fresh_std"] = {
        name: float(parameter.detach().std() / config.initializer_range)
        for name, parameter in fresh.named_parameters()
        if parameter.ndim > 1
    }
    found["refused"] = refusals(config)
    if token_ids is not None:
        for trusted in (False, True):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
            assert tokenizer(text)["input_ids"] == token_ids.tolist()
            assert tokenizer.decode(token_ids.tolist()) == text
            assert model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=1).numel()
        found["eos_token"] = tokenizer.eos_token
    return found


if __name__ == "__main__":
    cases = {folder: run(folder) for folder in sys.argv[1:]}
    assert not [name for name in sys.modules if name.split(".")[0] == "emotrain"]
    print(json.dumps({"transformers": transformers.__version__, "cases": cases}))
