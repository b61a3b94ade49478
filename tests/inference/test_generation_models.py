"""Generation of every kind of model against transformers' own, batches against prompts alone,
meshes against one device, drafts against none."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from deepseek_jax import hf
from deepseek_jax.errors import UserError
from deepseek_jax.experts import cpu_unstacked
from deepseek_jax.inference.generation import cache_sizes
from deepseek_jax.inference.generation.bound import BoundModel
from deepseek_jax.inference.generation.engine import Engine
from deepseek_jax.inference.generation.sampling import Sampling
from tests.support import conversion, hf_variants
from tests.support import hf_families as families

TOKENS = 8
# The others have no part that these have not; tests/hf_references.py's folders go through
# benchmarks/generate.py.
VARIANTS = (
    "deepseek_v2-lite",
    "deepseek_v3-yarn",
    "glm4_moe-qknorm-group",
    "qwen2-tied",
    "llama",
    "mixtral",
    "qwen3",
    "qwen3_moe-nonorm",
)
MTP = "deepseek_v3-mtp"


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """variant -> (transformers model, folder of its checkpoint). Two layers, of models with experts one of
    each kind; before multi-token prediction three."""

    @functools.cache
    def make(variant):
        folder = tmp_path_factory.mktemp(variant)
        with pytest.MonkeyPatch.context() as m:
            for shapes in (families.SHAPES, hf_variants.SHAPES) if variant != MTP else ():
                m.setitem(shapes, "num_hidden_layers", 2)
            return families.save(variant, folder), str(folder)

    return make


def placed(model):
    return BoundModel(model.layout, model.params, model.bias, model.mesh)


def prompts_of(model, *lengths):
    rng = np.random.default_rng(1)
    return [rng.integers(2, model.vocab_size, n).tolist() for n in lengths]


def expected(theirs, prompt, count):
    theirs.generation_config.eos_token_id = (
        None  # every token may be chosen, and none ends the answer
    )
    out = theirs.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


# test_hf_small_widths.py has V3's attention and router.
SLOW = ("qwen3", "qwen2-tied", "mixtral", "deepseek_v3-yarn", "qwen3_moe-nonorm")


@pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=[pytest.mark.slow] if v in SLOW else []) for v in VARIANTS]
)
def test_greedy_tokens_are_those_of_transformers(variant, folder_of):
    """A batch of two lengths, and with it that a row does not depend on the other."""
    theirs, folder = folder_of(variant)
    model = hf.load(folder)
    prompts = prompts_of(model.config, 5, 19)
    assert model.generate(prompts, TOKENS, stop_ids=()) == [
        expected(theirs, p, TOKENS) for p in prompts
    ]


def test_what_the_cache_holds(folder_of):
    """Of MLA the latent and the shared key, nothing for each head; of grouped-query attention keys
    and values."""
    for variant, shapes in (
        ("deepseek_v2-lite", [(1, 64, 32 + 16)]),
        ("llama", [(1, 2, 64, 12)] * 2),
    ):
        model = hf.load(folder_of(variant)[1])
        if model.config.attention_kind == "mla":
            assert shapes == [(1, 64, model.config.kv_lora_rank + model.config.qk_rope_head_dim)]
        notes = []
        run = Engine(placed(model), note=notes.append)
        with jax.set_mesh(model.mesh):
            _, caches = run.prefill(np.ones((1, 16), np.int32), np.asarray([9], np.int32), 64)
        layers = [layer for group in caches for layer in group]
        assert len(layers) == model.config.num_hidden_layers and all(
            [a.shape for a in layer] == shapes for layer in layers
        )
        numbers = sum(a.size for layer in layers for a in layer)
        size = f"{numbers * 4 / 1e3:.1f} kB for 1 x 64 tokens"
        per_token = numbers // len(layers) // 64
        said = f"{per_token} numbers per token and layer, {len(layers)} layers, {size}"
        assert cache_sizes.describe(model.config, len(layers), 1, 64, 4) == said
    assert [cache_sizes.bucket(n, 64) for n in (1, 64, 65, 129, 193, 257, 400)] == [
        64,
        64,
        128,
        192,
        256,
        384,
        512,
    ]


@pytest.mark.parametrize(
    "variant, rows",
    [
        pytest.param("deepseek_v2-lite", 1, marks=pytest.mark.slow),
        ("deepseek_v2-lite", 2),
        ("llama", 1),
        pytest.param("llama", 2, marks=pytest.mark.slow),
    ],
)
def test_a_step_copies_no_cache(variant, rows, folder_of):
    """In the compiled program: the memory of the cache that goes in is that of the one that comes out."""
    model = hf.load(folder_of(variant)[1])
    run = Engine(placed(model))
    with jax.set_mesh(model.mesh):
        _, caches = run.prefill(np.ones((rows, 16), np.int32), np.full(rows, 9, np.int32), 64)
        start, active = run.put(np.full(rows, 9, np.int32)), run.put(np.ones(rows, bool))
        x, rope = run.programs.embed(
            run.weights.ends.leaves, run.put(np.ones((rows, 1), np.int32)), start
        )
        group = run.weights.groups[-1]
        program = (
            run.programs.decode(group)
            .lower(group.leaves, caches[-1], x, rope, start, active)
            .compile()
            .as_text()
        )
    assert " parameter(" in program and "%caches_0__0_" in program
    assert not re.findall(r"copy\(%caches_\w+\)", program) and not re.findall(
        r"f32\[[\d,]*64,(?:48|12)\]\S* copy\(", program
    )
    assert program.splitlines()[0].count("may-alias") == len(jax.tree.leaves(caches[-1]))


@pytest.fixture(scope="module")
def mtp(folder_of):
    """A model with two depths of multi-token prediction, and an engine that chooses from four
    tokens, so that some drafts are right."""
    _, folder = folder_of(MTP)
    model = hf.load(folder)
    return folder, Engine(placed(model), vocab=4)


SAMPLED = Sampling(0.9, 3, 0.95, seed=3)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(Sampling(), id="greedy"),
        pytest.param(SAMPLED, id="sampled"),
    ],
)
@pytest.mark.slow
def test_drafts_change_nothing(mtp, options):
    """As many drafts as depths, and more; rows end at different steps, by a stop token and by their
    length."""
    _, run = mtp
    prompts = prompts_of(run.config, 5, 19, 3)
    plain = run.generate(prompts, 20, options)
    assert [len(a) for a in plain] == [20] * 3
    for count in (1, 3) if options == Sampling() else (3,):
        run.drafted = run.accepted = 0
        assert run.generate(prompts, 20, options, draft_tokens=count) == plain
        assert (
            0 < run.accepted < run.drafted
            and f"{run.accepted} of {run.drafted} accepted" in run.acceptance
        )
    stop = plain[0][6]
    cut = [a[: a.index(stop)] if stop in a else a for a in plain]
    assert cut != plain
    for count in (0, 3) if options == Sampling() else (3,):
        assert run.generate(prompts, 20, options, stop_ids=[stop], draft_tokens=count) == cut


@pytest.mark.slow
def test_a_draw_depends_on_its_prompt_alone(mtp):
    """A prompt alone, with its number, gives what it gave in a batch; another number or seed gives
    something else."""
    _, run = mtp
    prompts = prompts_of(run.config, 5, 19, 3)
    together = run.generate(prompts, 20, SAMPLED)

    def alone(options, number):
        return [t.id for t in run.batch([prompts[1]], 20, options, indexes=[number])]

    assert alone(SAMPLED, 1) == together[1]
    assert alone(SAMPLED, 0) != together[1] and alone(SAMPLED._replace(seed=4), 1) != together[1]


@pytest.mark.slow
def test_over_a_mesh(mtp):
    """Weights, cache and rows over devices: the same tokens, three rows on four devices."""
    folder, run = mtp
    prompts = prompts_of(run.config, 5, 19, 3)
    model = hf.load(folder, mesh=jax.make_mesh((2, 2), ("expert", "tensor")))
    other = Engine(placed(model), vocab=4)
    assert other.generate(prompts, 6, SAMPLED, draft_tokens=1) == run.generate(prompts, 6, SAMPLED)


def test_python_refuses(folder_of):
    model = hf.load(folder_of("llama")[1])
    for tokens, options, message in (
        ([], {}, None),
        ([[]], {}, "0 tokens, and not 1 to 127"),
        ([1] * 128, {}, "128 tokens"),
        ([96], {}, "ids 0 to 95"),
        ([1], dict(draft_tokens=1), "has none"),
        ([1], dict(top_p=0.0), "top_p=0.0"),
    ):
        if message is None:
            assert model.generate(tokens, **options) == []
            continue
        with pytest.raises(UserError, match=message):
            model.generate(tokens, **options)


@pytest.mark.parametrize(
    "tokens",
    [
        pytest.param(1, marks=pytest.mark.slow),
        5,
        cpu_unstacked.FEW + 1,
        pytest.param(300, marks=pytest.mark.slow),
    ],
)
def test_unstacked_experts(tokens):
    """Against NumPy in float64; some tokens go nowhere, some experts have none. Float32 rounding of
    sums of 24 and 32 terms."""
    rng = np.random.default_rng(0)
    experts, top_k, d, f = 6, 2, 24, 32
    gate_up, down = rng.normal(size=(experts, d, 2 * f)), rng.normal(size=(experts, f, d))
    x, weight = rng.normal(size=(tokens, d)), rng.random((tokens, top_k))
    expert = np.stack([rng.permutation(experts - 1)[:top_k] for _ in range(tokens)])
    expert[3::7] = experts
    wanted = np.zeros((tokens, d))
    for t, k in np.ndindex(tokens, top_k):
        if expert[t, k] < experts:
            gate, up = np.split(x[t] @ gate_up[expert[t, k]], 2)
            wanted[t] += weight[t, k] * (gate / (1 + np.exp(-gate)) * up) @ down[expert[t, k]]
    lists = [
        cpu_unstacked.UnstackedExperts(tuple(jnp.asarray(w, jnp.float32) for w in a))
        for a in (gate_up, down)
    ]
    found = jax.jit(cpu_unstacked.compute)(
        jnp.asarray(x, jnp.float32),
        jnp.asarray(weight, jnp.float32),
        jnp.asarray(expert, jnp.int32),
        *lists,
    )
    conversion.assert_close(np.asarray(found), wanted, 1e-5, "unstacked experts")
