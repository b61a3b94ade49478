"""Which part of the model an instruction is of: the rules name what the package has, and each is found."""

import ast
import re

import jax
import pytest

from deepseek_jax.config.options import Config, MeshConfig, ModelConfig, ShardingConfig, TrainConfig
from deepseek_jax.plan import topology
from deepseek_jax.xla import hlo, loops
from deepseek_jax.xla.origin import AROUND, INSIDE, NAMED, Origin, scope_of
from tests.support import ROOT, quick

PACKAGE = ROOT / "deepseek_jax"
RULES = (*INSIDE, *AROUND)


def names_in(path) -> set[str]:
    """The qualified names of a file's functions and classes, without "<locals>"."""
    out = set()

    def walk(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                out.add(prefix + child.name)
                walk(child, f"{prefix}{child.name}.")

    walk(ast.parse(path.read_text(encoding="utf-8")), "")
    return out


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_rule_names_what_is_there(rule):
    """A file or function that has moved takes its rule with it."""
    path = PACKAGE / rule.file
    assert path.exists(), f"{rule} is about a file that is gone"
    assert not rule.name or rule.name in names_in(path), f"{rule} is about a function that is gone"


def test_every_scope_is_given_by_the_model():
    text = "".join(p.read_text(encoding="utf-8") for p in PACKAGE.rglob("*.py"))
    assert set(re.findall(r'named_scope\("(\w+)"\)', text)) == set(NAMED)


@pytest.mark.slow
def test_every_rule_and_scope_is_found_in_a_compiled_step():
    """Pipeline, experts on two devices, compressed sums, dense and MoE layers, shared experts,
    multi-token prediction."""
    model = ModelConfig(
        hidden_size=32,
        vocab_size=64,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        num_attention_heads=2,
        q_lora_rank=16,
        kv_lora_rank=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        num_nextn_predict_layers=1,
    )
    compressed = ShardingConfig("hybrid_shard", gradient_compression="int8")
    frames, scopes, parts = set(), set(), set()
    for mesh_config, sharding in (
        (MeshConfig(data=2, stage=2, expert=2), ShardingConfig()),
        (MeshConfig(data=2, fsdp=2, expert=2), compressed),
    ):
        config = Config(
            model=model,
            mesh=mesh_config,
            train=TrainConfig(batch_size=16, sequence_length=16),
            sharding=sharding,
        )
        mesh, layout = topology.lay_out(config, jax.devices())
        step = topology.compile_step(config, mesh, layout, quick.older_loops())
        module = hlo.Module(step.compiled.as_text())
        source = Origin(module)
        for _, instruction, _ in loops.visits(module, lambda i: bool(i.op_name)):
            parts.add(source._part(instruction))
            frames.update(module.frames(instruction))
            scopes.add(scope_of(instruction.op_name))
    assert not [rule for rule in RULES if not any(rule.holds(*frame) for frame in frames)]
    assert set(NAMED) <= scopes
    # No rule stands in the shadow of others.
    assert {rule.part for rule in RULES} | set(NAMED.values()) <= parts
