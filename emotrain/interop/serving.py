"""What a server needs to know of a Hugging Face folder that is not its arithmetic: how many experts
each layer has and how they are weighed, where every tensor of the folder goes, and how it may be
spread over processes. Without vLLM, so that all of it runs anywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emotrain.config import ModelConfig
from emotrain.errors import UserError
from emotrain.interop.config_json import LARGEST_SIZE, read_config
from emotrain.interop.layouts import EMBEDDING, HEAD, Layout, links, shape_of, tensors_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OF_TRANSFORMERS = {
    "chunk_size_feed_forward",
    "id2label",
    "is_encoder_decoder",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "partial_rotary_factor",
    "problem_type",
    "return_dict",
}
"""Settings that transformers gives every configuration; an EMO model has no use for them."""
MOST_PADDING = 1024
"""Rows of a vocabulary that can be padding, as for `emotrain import`."""


@dataclass(frozen=True)
class ServedLayer:
    """The experts of one layer as a server runs them."""

    experts: int
    """That the router chooses among, and rows of its matrix."""
    chosen: int
    """Of them, a token."""
    shared: int
    """Further experts, side by side as one, that every token uses with weight 1."""
    routed: int
    """Of `experts`, those that a token chooses K of. The others, where there are any, are shared
    experts weighed by a softmax of their own: every token uses them."""


@dataclass(frozen=True)
class ServedModel:
    """A folder's model."""

    model: ModelConfig
    layout: Layout
    unused: list[str]
    """Settings of config.json that are not used and not known to have no effect."""

    @classmethod
    def read(cls, published: dict[str, Any], folder: str = "") -> ServedModel:
        """Both layouts, as `emotrain import` reads them.

        Args:
            published: config.json.
            folder: where it lies, for errors.
        Raises:
            UserError: a setting that is missing, of a wrong type or size, or not supported.
        """
        config = read_config(published, Path(folder) / "config.json", num_tensors=LARGEST_SIZE)
        return cls(config.model, config.layout, sorted(set(config.unused) - OF_TRANSFORMERS))

    @property
    def weighs_shared(self) -> bool:
        """Whether shared experts have weights: several of the published layout (spec 10.4)."""
        return self.model.experts.shared > 1 and self.model.router.shared_weight == "softmax"

    def layer(self, index: int) -> ServedLayer:
        routed, chosen = self.model.routed_in_layer(index), self.model.chosen_in_layer(index)
        shared = self.model.experts.shared
        if self.weighs_shared:
            return ServedLayer(routed + shared, chosen + shared, 0, routed)
        return ServedLayer(routed, chosen, shared, routed)

    def weights(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The folder's tensors by the names that the served model has for them, each as it comes:
        a shared expert as `mlp.shared_experts`, the router without rows of shared experts whose
        weight is 1, the vocabulary without padding.

        vLLM passes over an expert that a layer does not have, and does not miss one: so names,
        shapes and types are checked here, and that every tensor comes once.

        Raises:
            UserError: a tensor that is missing, unexpected, twice, or of another shape or type; a
                missing one at the end.
        """
        of_tensors = tensors_of(list(links(self.model, self.layout)))
        missing = {name: shape_of(of_tensor) for name, of_tensor in of_tensors.items()}
        renamed = self._renamed()
        for name, tensor in tensors:
            if name not in missing:
                what = "comes twice" if name in of_tensors else "is not of this model"
                raise UserError(f"{name} {what}; config.json belongs to another checkpoint")
            yield renamed.get(name, name), self._fitted(name, tensor, missing.pop(name))
        if missing:
            first, number = next(iter(missing)), len(missing)
            raise UserError(
                f"{first} is missing ({number} of {len(of_tensors)} tensors are); config.json "
                f"belongs to another checkpoint, or a file is missing"
            )

    def _renamed(self) -> dict[str, str]:
        """Tensors that the served model knows by another name."""
        if self.layout != "published" or self.weighs_shared or not self.model.experts.shared:
            return {}
        names = {}
        for layer in range(self.model.num_layers):
            mlp = f"model.layers.{layer}.mlp"
            last = f"{mlp}.experts.{self.model.routed_in_layer(layer)}"
            for part in ("gate_proj", "up_proj", "down_proj"):
                names[f"{last}.{part}.weight"] = f"{mlp}.shared_experts.{part}.weight"
        return names

    def _fitted(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The rows that the served model has."""
        rows = shape[0]
        if tensor.dtype not in DTYPES:
            raise UserError(
                f"{name} has type {tensor.dtype}, weights must be one of "
                f"{', '.join(map(str, DTYPES))}; convert the model"
            )
        padded = tensor.shape[0] if tensor.ndim else 0
        if name in (EMBEDDING, HEAD) and rows < padded < rows + MOST_PADDING:
            shape = (padded, *shape[1:])
        if tuple(tensor.shape) != shape:
            raise UserError(
                f"{name} has shape {list(tensor.shape)}, config.json says {list(shape)}; they "
                f"belong to different checkpoints"
            )
        if name.endswith(".mlp.gate.weight"):
            rows = self.layer(int(name.split(".")[2])).experts
        return tensor[:rows]

    def check_spread(self, parallel: Any, returns_experts: bool) -> None:
        """Refuse what vLLM would do wrong, or fail at later without saying why.

        Args:
            parallel: vLLM's `ParallelConfig`.
            returns_experts: whether the chosen experts of each token are asked for.
        Raises:
            UserError: a way to spread the experts that this model cannot have.
        """
        layers = [self.layer(index) for index in range(self.model.num_layers)]
        fewest = min(layer.experts for layer in layers)
        if parallel.enable_eplb:
            raise UserError(
                "--enable-eplb is not supported for EMO models, whose layers may differ in their "
                "number of experts; leave it out"
            )
        tensor_ranks, hidden = parallel.tensor_parallel_size, self.model.experts.hidden
        ranks = tensor_ranks * parallel.data_parallel_size * parallel.prefill_context_parallel_size
        if not parallel.enable_expert_parallel:
            if hidden % ranks:
                raise UserError(
                    f"{ranks} processes share the {hidden} hidden units of an expert and do not "
                    f"divide them; use another number, or --enable-expert-parallel"
                )
        elif ranks > fewest:
            raise UserError(
                f"--enable-expert-parallel over {ranks} processes: a layer has {fewest} experts; "
                f"use at most {fewest} processes"
            )
        elif parallel.enable_ep_weight_filter:
            raise UserError(
                "--enable-ep-weight-filter counts experts by num_experts of config.json, which is "
                "not the number in each layer of an EMO model; leave it out"
            )
        elif ranks > tensor_ranks and parallel.all2all_backend != "allgather_reducescatter":
            raise UserError(
                f"--all2all-backend {parallel.all2all_backend} wants as many experts on every "
                f"process, which an EMO model does not have; use allgather_reducescatter"
            )
        if returns_experts and (
            self.layout == "published"
            and self.model.experts.shared
            or any(layer.chosen != self.model.experts.top_k for layer in layers)
        ):
            raise UserError(
                "--enable-return-routed-experts wants num_experts_per_tok routed experts of every "
                "token in every layer; export with --layout clean and as many in each layer"
            )


def split_softmax(
    hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool, *, num_routed: int
) -> tuple[Tensor, Tensor]:
    """Routing where several shared experts have weights (spec 10.4): the probabilities of a softmax
    over the routed experts, not divided by their sum, and those of one over the shared experts.

    Args:
        hidden_states: not used; vLLM's interface has it.
        gating_output: logits [T, E], the routed experts first.
        topk: experts of a token, all E - N shared ones among them.
    Returns:
        weights [T, topk] fp32; experts [T, topk] int32.
    """
    assert not renormalize
    routed_TN, shared_TM = gating_output.float().tensor_split((num_routed,), dim=-1)
    num_shared = shared_TM.shape[-1]
    weights_TK, experts_TK = torch.topk(routed_TN.softmax(dim=-1), topk - num_shared, dim=-1)
    shared_M = torch.arange(num_routed, num_routed + num_shared, device=gating_output.device)
    experts = torch.cat((experts_TK, shared_M.expand(len(experts_TK), -1)), dim=-1)
    return torch.cat((weights_TK, shared_TM.softmax(dim=-1)), dim=-1), experts.to(torch.int32)
