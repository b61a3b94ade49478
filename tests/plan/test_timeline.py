"""Times of programs whose FLOPs, bytes and waits are worked out by hand here."""

import pytest

from deepseek_jax.plan import rates
from deepseek_jax.plan.timeline import Program, Timeline

# An operation and a byte, also of a link, take a second each, and nothing else any time.
UNIT = rates.speed_of("cpu", "f32=1,memory=1").ideal
MESH = {"data": 1, "fsdp": 4, "expert": 1}
INSIDE = {"fsdp": 4}

HEAD = "HloModule jit_step, is_scheduled=true\n\n"
ADD = """%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

"""


def test_an_unknown_kernel_is_named():
    text = (
        HEAD
        + """ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  ROOT %c = f32[8]{0} custom-call(%x), custom_call_target="somebody$kernel"
}
"""
    )
    compiled = Program(text, MESH, INSIDE)
    assert Timeline(compiled, UNIT).run().seconds == 64
    assert compiled.unknown == {"somebody$kernel": {"c"}}


def loop(name: str, carried: str, turns: int | None, body: str) -> str:
    """A loop's body and condition: so many turns, by a note of the compiler; None: as long as data says."""
    return f"""%{name}_body (c: (s32[], {carried})) -> (s32[], {carried}) {{
  %c = (s32[], {carried}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %x = {carried} get-tuple-element(%c), index=1
{body}  ROOT %out = (s32[], {carried}) tuple(%i, %y)
}}

%{name}_condition (c: (s32[], {carried})) -> pred[] {{
  %c = (s32[], {carried}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %n = s32[] constant({turns or 0})
  ROOT %more = pred[] compare(%i, %n), direction={"LT" if turns else "NE"}
}}

"""


def call_loop(name: str, carried: str, turns: int | None, result: str, operand: str = "%x") -> str:
    noted = f', backend_config={{"known_trip_count":{{"n":"{turns}"}}}}' if turns else ""
    where = ', metadata={op_name="jit(step)/jvp(dispatch)/while"}' if turns is None else ""
    return (
        f"  %{result}_zero = s32[] constant(0)\n"
        f"  %{result}_first = s32[] {'bitcast' if turns else 'opt-barrier'}(%{result}_zero)\n"
        f"  %{result}_in = (s32[], {carried}) tuple(%{result}_first, {operand})\n"
        f"  %{result}_loop = (s32[], {carried}) while(%{result}_in), condition=%{name}_condition, "
        f"body=%{name}_body{noted}{where}\n"
        f"  %{result} = {carried} get-tuple-element(%{result}_loop), index=1\n"
    )


X = "f32[4,4]{1,0}"  # 64 bytes; a product of two is 128 FLOPs, a copy 128 bytes
DOT = (
    f"  %dot = {X} dot(%x, %x), lhs_contracting_dims={{1}}, "
    'metadata={op_name="jit(step)/jvp(attention)/dot"}\n'
)
COPY = f'  %y = {X} negate(%dot), metadata={{op_name="jit(step)/transpose(jvp(mlp))/neg"}}\n'


def nested(inner_turns: int | None) -> str:
    inner = loop("inner", X, inner_turns, DOT + COPY)
    outer = loop("outer", X, 5, call_loop("inner", X, inner_turns, "y"))
    return (
        HEAD
        + inner
        + outer
        + f"""ENTRY %main (x: {X}) -> {X} {{
  %x = {X} parameter(0)
{call_loop("outer", X, 5, "z")}  ROOT %copy = {X} copy(%z)
}}
"""
    )


def test_nested_loops_multiply():
    spent = Timeline(Program(nested(3), MESH, INSIDE), UNIT).run()
    # A product reads two operands and writes one, 192 bytes of one array counted twice, against 128 FLOPs.
    product, copy = max(192, 128), 128
    assert spent.seconds == 5 * 3 * (product + copy) + copy
    by = {(c.of.part, c.of.phase): c for c in spent.costs if c.of.instruction.opcode != "copy"}
    assert by["attention", "forward"].seconds == 15 * product
    assert by["attention", "forward"].times == 15 and by["mlp", "backward"].times == 15
    assert by["attention", "forward"].work.flops == {"tf32": 128}


def test_further_rounds_are_a_loop_of_unknown_length():
    compiled = Program(nested(None), MESH, INSIDE)
    assert compiled.further_rounds and not Program(nested(3), MESH, INSIDE).further_rounds
    with_host = UNIT._replace(host=1000.0)
    for rounds in (1, 2, 4):
        spent = Timeline(compiled, UNIT, rounds).run()
        assert spent.seconds == 5 * (rounds - 1) * (192 + 128) + 128
        # The host reads whether to go on, before every turn and after the last.
        assert (
            Timeline(compiled, with_host, rounds).run().seconds == spent.seconds + 5 * rounds * 1000
        )
    assert not compiled.uncounted


def test_other_loops_of_unknown_length_are_named_and_count_once():
    text = nested(None).replace("jvp(dispatch)", "jvp(attention)")
    compiled = Program(text, MESH, INSIDE)
    assert Timeline(compiled, UNIT, 3).run().seconds == 5 * (192 + 128) + 128
    assert compiled.uncounted == {"y_loop"} and not compiled.further_rounds


CONDITIONAL = (
    HEAD
    + f"""%dear (p: {X}) -> {X} {{
  %x = {X} parameter(0)
{DOT}  ROOT %y = {X} negate(%dot)
}}

%cheap (p: {X}) -> {X} {{
  %x = {X} parameter(0)
  ROOT %y = {X} negate(%x)
}}

ENTRY %main (x: {X}, p: pred[]) -> {X} {{
  %x = {X} parameter(0)
  %p = pred[] parameter(1)
  ROOT %y = {X} conditional(%p, %x, %x), true_computation=%dear, false_computation=%cheap
}}
"""
)


def test_the_dearest_branch_counts():
    compiled = Program(CONDITIONAL, MESH, INSIDE)
    assert Timeline(compiled, UNIT).run().seconds == 192 + 128
    assert Timeline(compiled, UNIT, cheapest=True).run().seconds == 128
    assert Timeline(compiled, UNIT._replace(host=7.0)).run().seconds == 192 + 128 + 7


def exchanged(work_between: str, kind: str = "all-gather") -> str:
    return (
        HEAD
        + ADD
        + f"""ENTRY %main (x: {X}) -> f32[16,4] {{
  %x = {X} parameter(0)
  %start = ({X}, f32[16,4]{{1,0}}) {kind}-start(%x), replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}, \
metadata={{op_name="jit(step)/jvp(attention)/all_gather"}}
{work_between}  %got = f32[16,4]{{1,0}} {kind}-done(%start)
  ROOT %out = f32[16,4]{{1,0}} copy(%got)
}}
"""
    )


GATHER = 3 * 64  # seconds: three devices' shards of 64 bytes, at one byte a second


@pytest.mark.parametrize("kernels_between, exposed", [(0, GATHER), (1, GATHER - 128), (2, 0)])
def test_a_collective_is_hidden_by_what_runs_beside_it(kernels_between, exposed):
    between = "".join(f"  %k{n} = {X} negate(%x)\n" for n in range(kernels_between))
    spent = Timeline(Program(exchanged(between), MESH, INSIDE), UNIT).run()
    assert spent.waits["start"] == (GATHER, exposed)
    assert spent.seconds == kernels_between * 128 + exposed + 2 * 256
    # With a latency of its own it takes longer.
    late = Timeline(
        Program(exchanged(between), MESH, INSIDE), UNIT._replace(collective=500.0)
    ).run()
    assert late.waits["start"].exposed == GATHER + 500 - kernels_between * 128


def test_collectives_wait_for_each_other():
    """Two start at once; the second waits for the first one's links."""
    text = (
        HEAD
        + f"""ENTRY %main (x: {X}) -> f32[16,4] {{
  %x = {X} parameter(0)
  %one = ({X}, f32[16,4]{{1,0}}) all-gather-start(%x), replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}
  %two = ({X}, f32[16,4]{{1,0}}) all-gather-start(%x), replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}
  %b = f32[16,4]{{1,0}} all-gather-done(%two)
  ROOT %a = f32[16,4]{{1,0}} all-gather-done(%one)
}}
"""
    )
    spent = Timeline(Program(text, MESH, INSIDE), UNIT).run()
    assert spent.seconds == 2 * GATHER and spent.waits["two"] == (GATHER, 2 * GATHER)


def test_a_synchronous_collective_is_exposed():
    text = (
        exchanged("")
        .replace("all-gather-start", "all-gather")
        .replace(f"({X}, f32[16,4]{{1,0}}) all", "f32[16,4]{1,0} all")
    )
    text = text.replace("all-gather-done(%start)", "bitcast(%start)")
    spent = Timeline(Program(text, MESH, INSIDE), UNIT).run()
    assert spent.waits["start"] == (GATHER, GATHER) and spent.seconds == GATHER + 2 * 256


def test_between_hosts_the_network_counts():
    """Two hosts of two: a device gets half of what is on the other host, and the other device the rest."""
    compiled = Program(exchanged(""), MESH, {"fsdp": 2})
    slow = UNIT._replace(network=0.1)
    # 2 of 3 shards are on the other host; two devices share them; at a tenth of a byte a second.
    assert Timeline(compiled, slow).run().waits["start"].busy == pytest.approx(64 * 2 / 2 / 0.1)
    assert Timeline(Program(exchanged(""), MESH, INSIDE), slow).run().waits["start"].busy == GATHER


def test_copies_to_the_host_have_a_stream_of_their_own():
    text = (
        HEAD
        + f"""ENTRY %main (x: {X}) -> {X} {{
  %x = {X} parameter(0)
  %start = (f32[4,4]{{1,0:S(5)}}, {X}, u32[]) copy-start(%x)
  %k = {X} negate(%x)
  %done = f32[4,4]{{1,0:S(5)}} copy-done(%start)
  ROOT %y = {X} negate(%k)
}}
"""
    )
    spent = Timeline(Program(text, MESH, INSIDE), UNIT._replace(host_link=0.25)).run()
    assert spent.waits["start"] == (256, 128) and spent.seconds == 128 + 128 + 128


def test_a_cpu_does_one_after_the_other_and_reads_nothing_back():
    """A product of 128 FLOPs and 192 bytes takes the sum there, on a GPU the longest; loops of further rounds
    wait for no host."""
    rates_of_cpu = UNIT._replace(host=1000.0, vector=2.0)
    on_cpu = Program(nested(None), MESH, INSIDE, on_gpu=False)
    spent = Timeline(on_cpu, rates_of_cpu, 2).run()
    assert spent.seconds == 5 * (192 + 128 + 128) + 128
    # Half of the layers take a second round.
    assert Timeline(on_cpu, rates_of_cpu, 1.5).run().seconds == 2.5 * (192 + 128 + 128) + 128
