"""Proves that vLLM 0.33 has what its plugin uses: every name, every call and every setting,
compared with the sources of the wheel; that vLLM's runner finds what it calls; and that vLLM's own
loading code brings the weights to the same places as the stand-ins do. Nothing of the wheel is
imported.

EMOTRAIN_VLLM_WHEEL names a wheel that is there already; else pip downloads it (340 MB)."""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from test_huggingface import CONFIG, published_tensors
from test_vllm import compare, exported, plugin, vllm_config  # noqa: F401  fixtures
from torch import nn
from vllm_standins import (
    PLACE,
    FusedMoEFactory,
    Place,
    PPMissingLayer,
    VocabParallelEmbedding,
    expert_map,
)
from vllm_wheel import Found, Wheel, bind, signature_of

from emotrain.interop.serving import split_softmax
from tests.conftest import ROOT

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]

VERSION = "0.33.0"
INTEROP = ROOT / "emotrain/interop"
LAYERS = "vllm.model_executor.layers"
MOE = f"{LAYERS}.fused_moe"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Wheel:
    """Skips where the wheel cannot be had."""
    if given := os.environ.get("EMOTRAIN_VLLM_WHEEL"):
        return Wheel(Path(given))
    folder = tmp_path_factory.mktemp("vllm")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]
    pip += ["--only-binary=:all:", "--dest", str(folder), f"vllm=={VERSION}"]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=1700)
    if done.returncode:
        pytest.skip(f"vllm {VERSION}: {done.stderr.strip().splitlines()[-1]}")
    [path] = folder.glob("vllm-*.whl")
    return Wheel(path)


def parsed(name: str) -> ast.Module:
    return ast.parse((INTEROP / name).read_text(encoding="utf-8"))


def imported() -> dict[str, tuple[str, str]]:
    """Names that the plugin has from vLLM, and where from."""
    return {
        alias.name: (node.module, alias.name)
        for file in ("vllm_model.py", "vllm_plugin.py")
        for node in ast.walk(parsed(file))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm"
        for alias in node.names
    }


def found(wheel: Wheel, name: str) -> Found:
    where = wheel.find(*imported()[name])
    assert where is not None, f"{imported()[name]}"
    return where


def method(wheel: Wheel, where: tuple[str, str], name: str) -> inspect.Signature:
    """Without self."""
    of_class = wheel.find(*where)
    assert of_class is not None, where
    member = wheel.member(of_class, name)
    assert member is not None, f"{where}: {name}"
    signature = signature_of(member[1])
    return signature.replace(parameters=list(signature.parameters.values())[1:])


# ---- what the plugin uses


def test_every_name_is_there(wheel: Wheel) -> None:
    names = imported()
    assert len(names) >= 25
    missing = [where for where in names.values() if wheel.find(*where) is None]
    assert not missing
    assert wheel.find("vllm.attention.layer", "Attention") is None, "the released plugin's import"


def test_every_call_fits(wheel: Wheel) -> None:
    """Of a function, and the making of a class."""
    names, checked = imported(), set()
    for node in ast.walk(parsed("vllm_model.py")):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
            continue
        if node.func.id in names:
            try:
                bind(wheel.signature(found(wheel, node.func.id)), node)
            except TypeError as error:
                pytest.fail(f"{ast.unparse(node)}: {error}")
            checked.add(node.func.id)
    # The others are types, and what `vllm_plugin` asks for.
    assert names.keys() - checked == {"VllmConfig", "SupportsPP", "ModelRegistry"}


def test_a_call_that_does_not_fit_is_seen(wheel: Wheel) -> None:
    """What would be left of the test above without this."""
    factory = wheel.signature(found(wheel, "FusedMoEFactory"))
    for call in ("f(num_experts=8)", "f(1, 2, 3, 4, renormalise=False)", "f(1, 2, 3, 4, top_k=2)"):
        with pytest.raises(TypeError):
            bind(factory, ast.parse(call, mode="eval").body)


def test_every_setting_is_there(wheel: Wheel) -> None:
    """Whatever the plugin reads of vLLM's configuration, down to the first class of another
    package."""
    chains = {
        ast.unparse(node)
        for node in ast.walk(parsed("vllm_model.py"))
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("vllm_config.")
    }
    parallel = {
        ast.unparse(node).replace("parallel.", "vllm_config.parallel_config.")
        for node in ast.walk(parsed("serving.py"))
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("parallel.")
    }
    assert len(chains) >= 8 and len(parallel) >= 6
    for chain in chains | parallel:
        where: Found | None = wheel.find("vllm.config", "VllmConfig")
        for name in chain.split(".")[1:]:
            assert where is not None
            field_of = wheel.member(where, name)
            assert field_of is not None, chain
            assert isinstance(field_of[1], ast.AnnAssign), chain
            kind = ast.unparse(field_of[1].annotation).split("|")[0].strip()
            where = wheel.find(field_of[0], kind)
            if where is None or not isinstance(where[1], ast.ClassDef):
                break


USED: list[tuple[tuple[str, str], str, str]] = [
    ((f"{MOE}", "GateLinear"), "forward", "f(x)"),
    ((f"{MOE}", "MoERunner"), "forward", "f(hidden_states=x, router_logits=x)"),
    ((f"{MOE}", "MoERunner"), "load_weights", "f(weights)"),
    ((f"{LAYERS}.linear", "MergedColumnParallelLinear"), "forward", "f(x)"),
    ((f"{LAYERS}.linear", "MergedColumnParallelLinear"), "load_weights", "f(weights)"),
    ((f"{LAYERS}.linear", "QKVParallelLinear"), "forward", "f(x)"),
    ((f"{LAYERS}.linear", "QKVParallelLinear"), "load_weights", "f(weights)"),
    ((f"{LAYERS}.linear", "RowParallelLinear"), "forward", "f(x)"),
    ((f"{LAYERS}.activation", "SiluAndMul"), "forward_native", "f(x)"),
    ((f"{LAYERS}.attention", "Attention"), "forward", "f(q, k, v)"),
    ((f"{LAYERS}.layernorm", "RMSNorm"), "forward_native", "f(x, residual)"),
    (
        (f"{LAYERS}.rotary_embedding.base", "RotaryEmbedding"),
        "forward_native",
        "f(positions, q, k)",
    ),
    ((f"{LAYERS}.logits_processor", "LogitsProcessor"), "forward", "f(lm_head, hidden_states)"),
    (
        (f"{LAYERS}.vocab_parallel_embedding", "VocabParallelEmbedding"),
        "forward",
        "f(input_ids)",
    ),
    (
        ("vllm.model_executor.models.utils", "AutoWeightsLoader"),
        "load_weights",
        "f(weights, mapper=mapper)",
    ),
    (("vllm.model_executor.models.registry", "_ModelRegistry"), "register_model", "f(arch, name)"),
    (("vllm.sequence", "IntermediateTensors"), "__getitem__", "f(name)"),
]


@pytest.mark.parametrize("where, name, call", USED, ids=lambda value: str(value))
def test_every_method_fits(wheel: Wheel, where, name: str, call: str) -> None:
    expression = ast.parse(call, mode="eval").body
    assert isinstance(expression, ast.Call)
    if name == "forward_native" and where[1] == "SiluAndMul":  # a static method
        of_class = wheel.find(*where)
        member = wheel.member(of_class, name)
        bind(signature_of(member[1]), expression)
    else:
        bind(method(wheel, where, name), expression)


def test_what_methods_give_back(wheel: Wheel) -> None:
    """Pairs where the plugin takes two, and the runner from its factory."""

    def returns(module: str, of_class: str, name: str) -> str:
        where = wheel.find(module, of_class)
        node = where[1] if not name else wheel.member(where, name)[1]
        return ast.unparse(node.returns)

    assert returns(MOE, "FusedMoEFactory", "") == "MoERunner"
    assert returns(f"{MOE}.router.gate_linear", "GateLinear", "forward").count("tuple[") == 1
    assert "tuple[torch.Tensor, torch.Tensor]" in returns(
        f"{LAYERS}.layernorm", "RMSNorm", "forward_native"
    )
    assert returns(
        f"{LAYERS}.rotary_embedding.base", "RotaryEmbedding", "forward_native"
    ).startswith("tuple[")
    group = wheel.find("vllm.distributed", "get_pp_group")
    coordinator = wheel.find(group[0], ast.unparse(group[1].returns))
    for name in ("is_first_rank", "is_last_rank"):
        property_of = wheel.member(coordinator, name)[1]
        assert [ast.unparse(part) for part in property_of.decorator_list] == ["property"]


def test_defaults_that_the_plugin_relies_on(wheel: Wheel) -> None:
    """And `renormalize`, which it must not leave to the default."""
    factory = wheel.signature(found(wheel, "FusedMoEFactory")).parameters
    defaults = {
        "renormalize": True,
        "scoring_func": "softmax",
        "activation": "silu",
        "ckpt_names": ("gate_proj", "down_proj", "up_proj"),
        "apply_router_weight_on_input": False,
        "routed_scaling_factor": 1.0,
        "use_grouped_topk": False,
        "reduce_results": True,
        "enable_eplb": False,
    }
    assert {name: ast.literal_eval(factory[name].default) for name in defaults} == defaults
    row = wheel.signature(found(wheel, "RowParallelLinear")).parameters
    assert ast.literal_eval(row["reduce_results"].default) is True
    assert ast.literal_eval(row["input_is_parallel"].default) is True


# ---- what vLLM uses


def test_the_plugin_is_found_by_its_group(wheel: Wheel) -> None:
    _, node = wheel.find("vllm.plugins", "DEFAULT_PLUGINS_GROUP")
    assert ast.literal_eval(node.value) == "vllm.general_plugins"
    text = ast.unparse(wheel.find("vllm.plugins", "load_general_plugins")[1])
    assert "func()" in text and "try" not in text, "so that `register` must not raise"


def test_the_runner_finds_what_it_calls(wheel: Wheel, plugin: ModuleType) -> None:  # noqa: F811
    model = plugin.EmoForCausalLM
    for of_class in ("VllmModel", "VllmModelForTextGeneration"):
        _, protocol = wheel.find("vllm.model_executor.models.interfaces_base", of_class)
        for node in protocol.body:
            # It says itself that this one is optional.
            if isinstance(node, ast.FunctionDef) and node.name != "is_unused_checkpoint_weight":
                ours = inspect.signature(getattr(model, node.name)).parameters
                assert signature_of(node).parameters.keys() <= ours.keys(), node.name
    _, supports_pp = wheel.find("vllm.model_executor.models.interfaces", "SupportsPP")
    asked = {node.name: signature_of(node) for node in supports_pp.body if hasattr(node, "name")}
    assert asked["forward"].parameters.keys() <= inspect.signature(model.forward).parameters.keys()
    empty = found(wheel, "make_empty_intermediate_tensors_factory")[1]
    methods = {
        "self.model": inspect.signature(model.forward),
        "self.model.compute_logits": inspect.signature(model.compute_logits),
    }
    for name, signature in methods.items():
        methods[name] = signature.replace(parameters=list(signature.parameters.values())[1:])
    methods["self.model.make_empty_intermediate_tensors"] = signature_of(empty.body[0])
    calls = set()
    for file in ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner"):
        for node in ast.walk(wheel.tree(file)):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if name not in methods:
                continue
            # Models of several kinds of input get more by `**`, ours does not.
            node.keywords = [keyword for keyword in node.keywords if keyword.arg]
            if node.args or node.keywords:
                bind(methods[name], node)
                calls.add((file, name))
    assert len(calls) == 5, "one runner hands over all its inputs by `**`"


def test_routing_is_called_as_it_is_written(wheel: Wheel) -> None:
    where = wheel.find(f"{MOE}.router.custom_routing_router", "CustomRoutingRouter")
    [call] = [
        node
        for node in ast.walk(wheel.member(where, "_compute_routing")[1])
        if isinstance(node, ast.Call) and "custom_routing_function" in ast.unparse(node.func)
    ]
    call.keywords.append(ast.keyword("num_routed", call))
    bind(inspect.signature(split_softmax), call)


def test_transformers_reads_a_folder_by_the_plugins_class(tmp_path: Path) -> None:
    """With transformers itself, in a process of its own: code that lies in the folder is not run,
    also where it is trusted, and config.json arrives whole. vLLM pickles what was read."""
    pytest.importorskip("transformers")
    auto = {"auto_map": {"AutoConfig": "code.EmoConfig"}, "expert_layout": "published"}
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **auto}))
    (tmp_path / "code.py").write_text("raise SystemExit('the code of the folder ran')")
    program = f"""
import json, pickle, sys
from types import ModuleType
vllm = sys.modules["vllm"] = ModuleType("vllm")
class ModelRegistry:
    register_model = staticmethod(lambda *names: None)
vllm.ModelRegistry = ModelRegistry
from emotrain.interop.vllm_plugin import register
register()
register()
from transformers import AutoConfig
from emotrain.interop.serving import ServedModel
folder = {str(tmp_path)!r}
read = ServedModel.read(json.load(open(folder + "/config.json")))
for trusted in (False, True):
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
    config = pickle.loads(pickle.dumps(config))
    assert type(config).__module__ == "emotrain.interop.vllm_config", type(config)
    served = ServedModel.read(config.to_dict())
    assert served == read and not served.unused, (served, read)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


# ---- vLLM's own loading code


LOGGER = logging.getLogger("vllm")
LOGGER.warning_once = LOGGER.info_once = LOGGER.debug_once = LOGGER.warning


def loading_code(wheel: Wheel) -> SimpleNamespace:
    """vLLM's mapper, loader, grouped experts and map of experts, as they stand in the wheel."""
    names: dict[str, Any] = {
        **{"itertools": itertools, "re": re, "torch": torch, "nn": nn, "logger": LOGGER},
        **{"dataclass": dataclass, "field": field, "replace": replace, "Mapping": Mapping},
        **{"VocabParallelEmbedding": VocabParallelEmbedding, "PPMissingLayer": PPMissingLayer},
        "StageMissingLayer": type("StageMissingLayer", (), {}),
        "support_quantized_model_reload_from_hp_weights": lambda function: function,
        "maybe_prefix": lambda prefix, name: f"{prefix}.{name}" if prefix else name,
        "__name__": __name__,  # where dataclasses look for types
    }
    loader_of = "vllm.model_executor.model_loader.weight_utils"
    wheel.run(loader_of, ["default_weight_loader"], names)
    wheel.run("vllm.model_executor.models.utils", ["_get_tied_embedding_params"], names)
    wheel.run("vllm.model_executor.models.utils", ["WeightsMapper", "AutoWeightsLoader"], names)

    class PluggableLayer(nn.Module):
        register = staticmethod(lambda name: lambda cls: cls)

    names |= {"PluggableLayer": PluggableLayer, "Enum": Enum}
    names |= {"overload": lambda function: function, "cdiv": lambda a, b: -(-a // b)}
    state = wheel.member(
        wheel.find("vllm.distributed.eplb.eplb_state", "EplbState"),
        "build_initial_global_physical_to_logical_map",
    )[1]
    assert "list(range(num_routed_experts))" in ast.unparse(state)
    names["EplbState"] = SimpleNamespace(
        build_initial_global_physical_to_logical_map=lambda experts, more: list(range(experts))
    )
    wheel.run(
        f"{MOE}.routed_experts",
        ["_index_expert_mapping", "FusedMoeWeightScaleSupported", "RoutedExperts"],
        names,
    )
    wheel.run(f"{MOE}.expert_map_manager", ["determine_expert_map"], names)
    return SimpleNamespace(**names)


def real_factory(code: SimpleNamespace) -> type:
    """The stand-in for grouped experts with vLLM's own container of weights."""

    class Factory(FusedMoEFactory):
        def __init__(self, num_experts: int, *args: Any, prefix: str = "", **kwargs: Any):
            super().__init__(num_experts, *args, **kwargs)
            place, ranks = PLACE.now, self.cut[1]
            experts, rank = len(self.map), self.cut[0]
            routed = code.RoutedExperts.__new__(code.RoutedExperts)
            nn.Module.__init__(routed)
            _, of_expert, _ = code.determine_expert_map(
                place.ranks if place.expert_parallel else 1, place.rank, num_experts
            )
            routed.expert_map_manager = SimpleNamespace(
                num_fused_shared_experts=0,
                map_global_to_local=lambda i: i if of_expert is None else of_expert[i].item(),
            )
            hidden, width = self.w2.shape[2], self.w2.shape[1]
            routed.moe_config = SimpleNamespace(
                num_experts=num_experts,
                num_logical_experts=num_experts,
                is_act_and_mul=True,
                tp_shard_with_padding=False,
                tp_rank=rank,
                tp_size=ranks,
                intermediate_size=hidden * ranks,
                intermediate_size_per_partition=hidden,
                moe_parallel_config=SimpleNamespace(tp_size=ranks),
            )
            routed.layer_name, routed.lora_base_layer_prefix = prefix, ""
            routed.quant_config, routed.quant_method = None, SimpleNamespace()
            routed.ckpt_gate_proj_name, routed.ckpt_up_proj_name = "gate_proj", "up_proj"
            routed.ckpt_down_proj_name = "down_proj"
            routed.is_fused_checkpoint_transposed = False
            routed._fused_shared_expert_quantizer = None
            for name, shape in (
                ("w13_weight", (experts, 2 * hidden, width)),
                ("w2_weight", (experts, width, hidden)),
            ):
                own = nn.Parameter(torch.full(shape, torch.nan), requires_grad=False)
                own.weight_loader = routed.weight_loader
                setattr(routed, name, own)
            del self.w13, self.w2
            self.routed_experts = routed

        def load_weights(self, weights):
            for name in self.routed_experts.load_weights(weights):
                yield f"routed_experts.{name}"

        @property
        def w13(self):
            return self.routed_experts.w13_weight.unflatten(1, (2, -1))

        @property
        def w2(self):
            return self.routed_experts.w2_weight

    return Factory


@pytest.fixture
def with_loading_code(wheel, plugin, monkeypatch) -> ModuleType:  # noqa: F811
    code = loading_code(wheel)
    monkeypatch.setattr(plugin, "AutoWeightsLoader", code.AutoWeightsLoader)
    monkeypatch.setattr(plugin, "FusedMoEFactory", real_factory(code))
    model = plugin.EmoForCausalLM
    stacked = model.hf_to_vllm_mapper.orig_to_new_stacked
    mapper = code.WeightsMapper(orig_to_new_stacked=stacked)
    monkeypatch.setattr(model, "hf_to_vllm_mapper", mapper)
    online = ModuleType("vllm.model_executor.layers.quantization.online.moe_base")
    online.OnlineMoEMethodBase = type("OnlineMoEMethodBase", (), {})
    for name in (
        "vllm.model_executor.layers.quantization",
        "vllm.model_executor.layers.quantization.online",
    ):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, online.__name__, online)
    return plugin


@pytest.mark.parametrize(
    "kind, layout, spread",
    [
        ("one shared", "published", {}),
        ("two shared of weight one", "clean", {}),
        ("none shared", "clean", {}),
        ("two shared of weights", "published", {"ranks": 4, "experts": True}),
        ("layers differ", "published", {"ranks": 2}),
        ("layers differ", "clean", {"ranks": 4, "experts": True}),
        ("layers differ", "published", {"ranks": 2, "stages": 2}),
    ],
)
def test_its_loading_code_gives_our_logits(
    with_loading_code,
    exported: Callable[..., Path],  # noqa: F811
    kind: str,
    layout: str,
    spread: dict[str, Any],
) -> None:
    compare(with_loading_code, exported(kind, layout), **spread)


def test_its_loading_code_passes_over_experts_as_the_stand_in_does(with_loading_code) -> None:
    """Why the plugin counts tensors itself: without that, a missing expert is not missed, and one
    too many is not seen."""
    tensors = published_tensors()
    tensors["model.layers.0.mlp.experts.17.up_proj.weight"] = torch.zeros(8, 16)
    del tensors["model.layers.0.mlp.experts.2.up_proj.weight"]
    PLACE.now = Place()
    model = with_loading_code.EmoForCausalLM(vllm_config=vllm_config(CONFIG))
    weights = (
        (
            name.replace(".mlp.experts.5.", ".mlp.shared_experts."),
            tensor[:5] if name.endswith("gate.weight") else tensor,
        )
        for name, tensor in tensors.items()
    )
    loader = with_loading_code.AutoWeightsLoader(model)
    names = loader.load_weights(weights, mapper=model.hf_to_vllm_mapper)
    assert names == {name for name, _ in model.named_parameters()}
    assert model.model.layers[0].mlp.experts.w13[2, 1].isnan().all()


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("experts", [8, 127])
def test_it_spreads_experts_as_the_stand_in_does(wheel, experts: int, ranks: int) -> None:
    code = loading_code(wheel)
    for rank in range(ranks):
        count, places, _ = code.determine_expert_map(ranks, rank, experts)
        ours = expert_map(experts, rank, ranks)
        assert count == len(ours)
        if places is not None:
            assert {i: place for i, place in enumerate(places.tolist()) if place >= 0} == ours
