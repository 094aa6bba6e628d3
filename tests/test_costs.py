import dataclasses
import math
import os
import subprocess
import sys
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding, PartitionSpec

from maskgen import sharding
from maskgen.config import Mesh
from maskgen.costs import chips, flops, hlo


def shape(*sizes, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(sizes, dtype)


# Operations


def attention_block(params, x):
  """A transformer's block: b t d -> b t d."""
  q, k, v = (jnp.einsum("btd,dhe->bthe", x, params[name]) for name in "qkv")
  weights = jax.nn.softmax(jnp.einsum("bthe,bshe->bhts", q, k))
  x = x + jnp.einsum("bhts,bshe,hed->btd", weights, v, params["o"], optimize="optimal")
  return x + jax.nn.gelu(x @ params["up"]) @ params["down"]


def test_a_transformer_by_its_formula():
  b, t, d, heads, hidden = 3, 32, 16, 4, 48
  split = shape(d, heads, d // heads)
  params = dict.fromkeys("qkv", split) | {"o": shape(heads, d // heads, d)}
  params |= {"up": shape(d, hidden), "down": shape(hidden, d)}
  per_token = 4 * d * d + 2 * t * d + 2 * d * hidden
  assert flops.count(attention_block, params, shape(b, t, d)) == 2 * b * t * per_token


def mlp(weights, x):
  for w in weights:
    x = jnp.tanh(x @ w)
  return (x**2).sum()


def test_a_backward_pass_is_two_forward_passes_except_for_the_gradient_of_the_input():
  weights, x = [shape(8, 16), shape(16, 32), shape(32, 4)], shape(5, 8)
  forward = flops.count(mlp, weights, x)
  assert forward == 2 * 5 * (8 * 16 + 16 * 32 + 32 * 4)
  assert flops.count(jax.value_and_grad(mlp), weights, x) == 3 * forward - 2 * 5 * 8 * 16
  assert flops.count(jax.value_and_grad(mlp, (0, 1)), weights, x) == 3 * forward


@pytest.mark.parametrize(
  "size,stride,padding,groups,dilation",
  [
    (3, 1, "SAME", 1, 1),
    (3, 2, "SAME", 1, 1),
    (4, 2, "VALID", 1, 1),
    (3, 1, "SAME", 8, 1),
    (3, 1, "SAME", 2, 2),
  ],
)
def test_a_convolution_and_its_gradients_are_as_xla_counts_them(size, stride, padding, groups, dilation):
  def convolve(x, w):
    return jax.lax.conv_general_dilated(
      x,
      w,
      (stride, stride),
      padding,
      rhs_dilation=(dilation, dilation),
      feature_group_count=groups,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )

  def gradient(index, x, w, cotangent):
    return jax.vjp(convolve, x, w)[1](cotangent)[index]

  x, w = shape(2, 12, 10, 8), shape(size, size, 8 // groups, 16)
  y = jax.eval_shape(convolve, x, w)
  forward = flops.count(convolve, x, w)
  for fn, args in [(convolve, (x, w)), (partial(gradient, 0), (x, w, y)), (partial(gradient, 1), (x, w, y))]:
    assert flops.count(fn, *args) == forward
    assert jax.jit(fn).lower(*args).compile().cost_analysis()["flops"] == pytest.approx(forward, rel=0.02)
  if padding == "VALID":
    assert forward == 2 * math.prod(y.shape) * size**2 * 8 // groups


def test_loops_count_their_iterations():
  w, x = shape(8, 8), shape(4, 8)
  one = 2 * 4 * 8 * 8

  def unrolled(w, x):
    for _ in range(5):
      x = jnp.tanh(x @ w)
    return x.sum()

  def scanned(w, x):
    return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=5)[0].sum()

  def counted(w, x):
    return jax.lax.fori_loop(0, 5, lambda _, x: jnp.tanh(x @ w), x).sum()

  for change in (lambda fn: fn, partial(jax.grad, argnums=(0, 1))):
    assert len({flops.count(change(fn), w, x) for fn in (unrolled, scanned, counted)}) == 1
  assert flops.count(scanned, w, x) == 5 * one
  unknown = lambda w, x: jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: x @ w, x)  # noqa: E731
  assert flops.count(unknown, w, x) == one
  either = lambda w, x: jax.lax.cond(x.sum() > 0, lambda: x @ w, lambda: x @ w @ w)  # noqa: E731
  assert flops.count(either, w, x) == 2 * one


def custom_vjp(fn):
  wrapped = jax.custom_vjp(fn)
  wrapped.defvjp(lambda *args: (fn(*args), args), lambda args, g: jax.vjp(fn, *args)[1](g))
  return wrapped


def custom_jvp(fn):
  wrapped = jax.custom_jvp(fn)
  wrapped.defjvp(lambda args, tangents: jax.jvp(fn, args, tangents))
  return wrapped


def custom_vmap(fn):
  wrapped = jax.custom_batching.custom_vmap(fn)
  wrapped.def_vmap(lambda size, batched, *args: (fn(*args), True))
  return wrapped


def sharded(fn):
  mesh = sharding.make_mesh(Mesh(data=2, fsdp=4))
  rows, whole = PartitionSpec(("data", "fsdp")), PartitionSpec()
  return jax.shard_map(fn, mesh=mesh, in_specs=(rows, whole), out_specs=rows)


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, custom_vjp, custom_jvp, custom_vmap, sharded])
def test_calls_are_entered(wrap):
  args = shape(16, 8), shape(8, 4)
  assert flops.count(wrap(lambda x, w: jnp.tanh(x @ w)), *args) == 2 * 16 * 8 * 4


def test_a_kernel_counts_once_per_element_of_its_grid():
  def product(x_ref, w_ref, y_ref):
    y_ref[...] = jnp.tanh(x_ref[...] @ w_ref[...])

  def kernel(x, w):
    block = pl.BlockSpec((4, 8), lambda i: (i, 0))
    return pl.pallas_call(
      product,
      jax.ShapeDtypeStruct((24, 8), jnp.float32),
      grid=(6,),
      in_specs=[block, pl.BlockSpec((8, 8), lambda i: (0, 0))],
      out_specs=block,
    )(x, w)

  args = shape(24, 8), shape(8, 8)
  one, tile = 2 * 24 * 8 * 8, 8 * 128
  assert flops.count_kernels(lambda x, w: jnp.tanh(kernel(x, w) @ w), *args) == (one, 6 * tile)
  assert flops.count(lambda x, w: kernel(x, w) @ w, *args) == 2 * one


def test_a_checkpoint_recomputes():
  w, x = shape(8, 8), shape(4, 8)
  layer = lambda w, x: jnp.sin(jnp.sin(x @ w) @ w).sum()  # noqa: E731
  plain, again = (flops.count(jax.value_and_grad(fn), w, x) for fn in (layer, jax.checkpoint(layer)))
  assert again - plain == flops.count(layer, w, x)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_unused_computation_does_not_count(accumulation):
  params = {"generator": shape(8, 16), "critic": shape(16, 4)}
  x = shape(6, 8)

  def losses(params, x):
    made = jnp.tanh(x @ params["generator"])
    for_generator = made @ jax.lax.stop_gradient(params["critic"])
    for_critic = jax.lax.stop_gradient(made) @ params["critic"]
    return {"generator": (for_generator**2).sum(), "critic": (jnp.tanh(for_critic)).sum()}

  def gradients(params, x):  # as in a training step: one pull-back per group, one gradient of each kept
    values, pull_back = jax.vjp(lambda params: losses(params, x), params)
    return {
      group: pull_back({name: jnp.float32(name == group) for name in values})[0][group] for group in params
    }

  def accumulated(params, x):
    def add(sums, _):
      return jax.tree.map(jnp.add, sums, gradients(params, x)), x @ params["generator"]  # not used

    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), length=accumulation)[0]

  generator, critic = 2 * 6 * 8 * 16, 2 * 6 * 16 * 4
  forward, backward = generator + 2 * critic, (critic + generator) + critic
  found = flops.count(gradients if accumulation == 1 else accumulated, params, x)
  assert found == accumulation * (forward + backward)


# Programs for eight CPU devices

WIDTH, LAYERS, BATCH = 64, 3, 32


def layer(w, x):
  return x + jnp.tanh(x @ w["up"]) @ w["down"]


def scan_layers(weights, x):
  return (jax.lax.scan(lambda x, w: (layer(w, x), None), x, weights)[0] ** 2).sum()


def unrolled_layers(weights, x):
  for index in range(LAYERS):
    x = layer(jax.tree.map(lambda w: w[index], weights), x)  # noqa: B023
  return (x**2).sum()


def train(loss, accumulation, weights, x):
  def add(sums, x):
    return jax.tree.map(jnp.add, sums, jax.grad(loss)(weights, x)), None

  if accumulation == 1:
    grads = jax.grad(loss)(weights, x)
  else:
    micro = jnp.moveaxis(x.reshape(-1, accumulation, WIDTH), 1, 0)
    grads, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, weights), micro)
  return jax.tree.map(lambda w, g: w - 0.1 * g, weights, grads)


SPECS = {  # of the weights that lead up, and down
  "data": (PartitionSpec(), PartitionSpec()),
  "fsdp": (PartitionSpec(None, None, "fsdp"), PartitionSpec(None, "fsdp")),
  "tensor": (PartitionSpec(None, None, "tensor"), PartitionSpec(None, "tensor")),
}
WEIGHTS = {"up": shape(LAYERS, WIDTH, 4 * WIDTH), "down": shape(LAYERS, 4 * WIDTH, WIDTH)}
WEIGHT_BYTES = 4 * 2 * LAYERS * WIDTH * 4 * WIDTH


def compiled(axis, loss=unrolled_layers, accumulation=1, batch=BATCH):
  mesh = sharding.make_mesh(Mesh(**{"data": 1, axis: 8}))
  specs = dict(zip(("up", "down"), (NamedSharding(mesh, spec) for spec in SPECS[axis]), strict=True))
  step = jax.jit(
    partial(train, loss, accumulation),
    in_shardings=(specs, sharding.batch_sharding(mesh)),
    out_shardings=specs,
  )
  return step.lower(WEIGHTS, shape(batch * accumulation, WIDTH)).compile()


def analysed(*args, **kwargs):
  return hlo.analyse(compiled(*args, **kwargs).as_text())


@pytest.mark.parametrize("loss", [unrolled_layers, scan_layers, jax.checkpoint(scan_layers)])
def test_data_parallelism_reduces_every_gradient_once(loss):
  found = analysed("data", loss=loss).collectives
  assert set(found) == {"all-reduce"}
  assert found["all-reduce"].bytes == WEIGHT_BYTES
  assert {use.groups for use in found["all-reduce"].uses} == {(tuple(range(8)),)}


def test_sharded_parameters_are_gathered():
  found = analysed("fsdp", batch=8192).collectives  # so that activations are larger
  assert found["all-gather"].bytes >= WEIGHT_BYTES  # forward; backward gathers again or kept them


def test_tensor_parallelism_reduces_activations():
  found = analysed("tensor").collectives
  assert set(found) == {"all-reduce"}
  # Each layer's output, and the gradient of each layer's input but the first's.
  assert found["all-reduce"].bytes == (2 * LAYERS - 1) * BATCH * WIDTH * 4


@pytest.mark.parametrize("axis", SPECS)
def test_accumulation_in_a_loop_multiplies(axis):
  once, thrice = (analysed(axis, loss=scan_layers, accumulation=k) for k in (1, 3))
  assert once.collectives.keys() == thrice.collectives.keys()
  for kind, collective in once.collectives.items():
    assert thrice.collectives[kind].bytes == 3 * collective.bytes
  assert 2.5 < thrice.traffic / once.traffic < 4.5


@pytest.mark.parametrize("axis", ["data", "tensor"])
def test_traffic_without_loops_is_as_xla_estimates_it(axis):
  program = compiled(axis)
  estimate = program.cost_analysis()["bytes accessed"]
  assert hlo.analyse(program.as_text()).traffic == pytest.approx(estimate, rel=0.05)


def test_slices_of_a_carried_array_are_counted_as_slices():
  def write(x):
    rows = jnp.zeros((1000, x.size))
    return jax.lax.fori_loop(0, 1000, lambda i, rows: rows.at[i].set(rows[i] + x), rows)

  program = hlo.analyse(jax.jit(write).lower(shape(256)).compile().as_text())
  array = 1000 * 256 * 4
  assert 2 * array < program.traffic < 10 * array  # not a thousand arrays


def test_a_loop_of_unknown_length_needs_a_guess():
  def search(w, x):
    return jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: x @ w, x)

  text = jax.jit(search).lower(shape(8, 8), shape(8, 8)).compile().as_text()
  with pytest.raises(ValueError, match=r"the loop while\S* has an unknown trip count"):
    hlo.analyse(text)
  once, twice = (hlo.analyse(text, unknown_trips=trips).traffic for trips in (1, 2))
  assert once < twice <= 2 * once


def test_a_text_that_is_not_hlo_is_rejected():
  with pytest.raises(ValueError, match="not the text of an HLO module"):
    hlo.analyse("nothing")


# Snippets in the manner of the TPU compiler

HEADER = "HloModule jit_f, is_scheduled=true, num_partitions=8\n"


def entry(*lines):
  return (
    HEADER + "ENTRY %main (p: f32[8,4]) -> f32[8,4] {\n" + "\n".join(f"  {line}" for line in lines) + "\n}\n"
  )


PAIRS = ((0, 1), (2, 3), (4, 5), (6, 7))


@pytest.mark.parametrize(
  "written,groups",
  [
    ("{{0,1,2,3},{4,5,6,7}}", ((0, 1, 2, 3), (4, 5, 6, 7))),
    ("{}", (tuple(range(8)),)),
    ("[2,4]<=[8]", ((0, 1, 2, 3), (4, 5, 6, 7))),
    ("[4,2]<=[2,4]T(1,0)", ((0, 4), (1, 5), (2, 6), (3, 7))),
    ("[2,4]<=[2,2,2]T(1,0,2)", ((0, 1, 4, 5), (2, 3, 6, 7))),
    ("mesh['axis_0'=8,'axis_1'=1] {'axis_0'}", (tuple(range(8)),)),
    ("mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
    ("mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_0','axis_2'}", ((0, 1, 4, 5), (2, 3, 6, 7))),
    ("mesh['axis_0'=1,'axis_1'=2,'axis_2'=4], device_ids=([4,2]T(1,0)) {'axis_1'}", PAIRS),
    ("mesh['axis_0'=4,'axis_1'=2], device_ids=([8]) {'axis_1'}", PAIRS),
  ],
)
def test_groups_of_devices(written, groups):
  program = hlo.analyse(
    entry(
      "%p = f32[8,4]{1,0} parameter(0)",
      f"%g = f32[99,4]{{1,0}} all-gather(%p), channel_id=1, replica_groups={written}, dimensions={{0}}",
    )
  )
  (use,) = program.collectives["all-gather"].uses
  assert use == hlo.Use(groups, 8 * 4 * 4 * len(groups[0]), 1)


def test_groups_in_an_unknown_notation_are_rejected():
  with pytest.raises(ValueError, match="unknown notation"):
    hlo.analyse(
      entry("%p = f32[8]{0} parameter(0)", "%r = f32[8]{0} all-reduce(%p), replica_groups=[8]<=odd")
    )


def test_forms_of_collectives():
  program = hlo.analyse(
    entry(
      "%p = f32[8,4]{1,0:T(8,128)} parameter(0)",
      "%q = bf16[3]{0:T(256)(128)(2,1)S(1)} parameter(1)",
      "%both = (f32[8,4]{1,0:T(8,128)}, /*index=1*/bf16[3]{0}) all-reduce(%p, %q), replica_groups={}",
      "%s = (f32[8,4]{1,0}, f32[64,4]{1,0}) all-gather-start(%p), replica_groups={}, dimensions={0}",
      "%d = f32[64,4]{1,0} all-gather-done(%s)",
      "%c = (f32[8,4]{1,0}, f32[8,4]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%p), "
      "source_target_pairs={{0,1},{1,2}}",
      "%e = f32[8,4]{1,0} collective-permute-done(%c)",
      "%t = f32[8,4]{1,0} all-to-all(%p), replica_groups=[2,4]<=[8], dimensions={0}",
      "%r = f32[1,4]{1,0} reduce-scatter(%p), replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%add",
    )
  )
  sizes = {kind: collective.bytes for kind, collective in program.collectives.items()}
  assert sizes == {
    "all-reduce": 128 + 6,
    "all-gather": 8 * 128,
    "reduce-scatter": 128,
    "all-to-all": 128,
    "collective-permute": 128,
  }
  assert all(collective.count == 1 for collective in program.collectives.values())
  # S(1) is on the chip; a start reads, its end writes.
  assert program.traffic == (128 + 128 + 6) + (128 + 1024) + 2 * 128 + 2 * 128 + (128 + 16)


PIECES = """
%start (a: f32[8,4]) -> (f32[8,4], f32[64,4], u32[]) {
  %a = f32[8,4]{1,0} parameter(0)
  %g1 = f32[64,4]{1,0} all-gather(%a), replica_groups={}, frontend_attributes={chain_id="0"}
  ROOT %c = (f32[8,4]{1,0}, f32[64,4]{1,0}, u32[]{:S(2)}) custom-call(%g1), \
custom_call_target="AsyncCollectiveStart"
}
%progress (a: f32[8,4], b: f32[64,4], n: u32[], x: f32[4]) -> (f32[4], f32[8,4], f32[64,4], u32[]) {
  %a = f32[8,4]{1,0} parameter(0)
  %b = f32[64,4]{1,0} parameter(1)
  %n = u32[]{:S(2)} parameter(2)
  %x = f32[4]{0} parameter(3)
  %y = f32[4]{0} tanh(%x)
  %g2 = f32[64,4]{1,0} all-gather(%a), channel_id=3, replica_groups={}, frontend_attributes={chain_id="0"}
  ROOT %t = (f32[4]{0}, f32[8,4]{1,0}, f32[64,4]{1,0}, u32[]{:S(2)}) tuple(%y, %a, %g2, %n)
}
%done (a: f32[8,4], b: f32[64,4], n: u32[]) -> f32[64,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %b = f32[64,4]{1,0} parameter(1)
  %n = u32[]{:S(2)} parameter(2)
  %g3 = f32[64,4]{1,0} all-gather(%a), channel_id=3, replica_groups={}, frontend_attributes={chain_id="0"}
  ROOT %c = f32[64,4]{1,0} custom-call(%a, %b, %g3, %n), custom_call_target="AsyncCollectiveDone"
}
"""


def test_a_collective_in_pieces_is_one():
  text = PIECES + entry(
    "%p = f32[8,4]{1,0} parameter(0)",
    "%x = f32[4]{0} parameter(1)",
    "%s = (f32[8,4]{1,0}, f32[64,4]{1,0}, u32[]{:S(2)}) fusion(%p), kind=kCustom, calls=%start",
    "%s0 = f32[8,4]{1,0} get-tuple-element(%s), index=0",
    "%s1 = f32[64,4]{1,0} get-tuple-element(%s), index=1",
    "%s2 = u32[]{:S(2)} get-tuple-element(%s), index=2",
    "%f = (f32[4]{0}, f32[8,4]{1,0}, f32[64,4]{1,0}, u32[]{:S(2)}) fusion(%s0, %s1, %s2, %x), "
    "calls=%progress",
    "%f1 = f32[8,4]{1,0} get-tuple-element(%f), index=1",
    "%f2 = f32[64,4]{1,0} get-tuple-element(%f), index=2",
    "%f3 = u32[]{:S(2)} get-tuple-element(%f), index=3",
    "%e = f32[64,4]{1,0} fusion(%f1, %f2, %f3), kind=kCustom, calls=%done",
  )
  program = hlo.analyse(text)
  (use,) = program.collectives["all-gather"].uses
  assert (use.bytes, use.count) == (64 * 4 * 4, 1)
  assert program.traffic == (128 + 1024) + (16 + 16)


def test_a_fused_reduction_and_slice_is_a_reduce_scatter():
  text = (
    "%all-reduce-scatter (a: f32[8,4]) -> f32[1,4] {\n"
    "  %a = f32[8,4]{1,0} parameter(0)\n"
    "  %r = f32[8,4]{1,0} all-reduce(%a), replica_groups={}, to_apply=%add\n"
    "  %i = u32[] partition-id()\n"
    "  %z = u32[] constant(0)\n"
    "  ROOT %s = f32[1,4]{1,0} dynamic-slice(%r, %i, %z), dynamic_slice_sizes={1,4}\n"
    "}\n"
  ) + entry("%p = f32[8,4]{1,0} parameter(0)", "%f = f32[1,4]{1,0} fusion(%p), calls=%all-reduce-scatter")
  program = hlo.analyse(text)
  assert program.collectives == {"reduce-scatter": hlo.Collective((hlo.Use((tuple(range(8)),), 128, 1),))}
  assert program.traffic == 128 + 16


def test_between_slices_a_collective_is_a_message():
  between = (
    "is_host_transfer=true, "
    'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="%s"}'
  )
  text = entry(
    "%p = f32[8,4]{1,0} parameter(0)",
    "%token = token[] after-all()",
    f"%s = (f32[8,4]{{1,0}}, u32[], token[]) send(%p, %token), {between % 'ALL_REDUCE'}",
    f"%r = (f32[8,4]{{1,0}}, u32[], token[]) recv(%token), {between % 'ALL_REDUCE'}",
    "%e = token[] send-done(%s)",
    "%d = (f32[8,4]{1,0}, token[]) recv-done(%r)",
    f"%s2 = (f32[8,4]{{1,0}}, u32[], token[]) send(%p, %token), {between % 'ALL_GATHER'}",
    f"%r2 = (f32[16,4]{{1,0}}, u32[], token[]) recv(%token), {between % 'ALL_GATHER'}",
    "%d2 = (f32[16,4]{1,0}, token[]) recv-done(%r2)",
  )
  program = hlo.analyse(text)
  assert not program.collectives
  assert {kind: found.bytes for kind, found in program.network.items()} == {
    "all-reduce": 128,
    "all-gather": 256,
  }
  assert program.traffic == 2 * 128 + 128 + 256


def loop(start, step, limit, direction="LT", operation="add"):
  """A loop in a loop of 3, whose limit is carried through both; each iteration slices and reduces."""
  state = "(s32[], f32[6,4], s32[])"
  return (
    f"%condition (s: {state}) -> pred[] {{\n"
    f"  %s = {state} parameter(0)\n"
    "  %i = s32[] get-tuple-element(%s), index=0\n"
    "  %n = s32[] get-tuple-element(%s), index=2\n"
    f"  ROOT %less = pred[] compare(%i, %n), direction={direction}\n"
    "}\n"
    f"%body (s: {state}) -> {state} {{\n"
    f"  %step = s32[] constant({step})\n"
    f"  %s = {state} parameter(0)\n"
    "  %i = s32[] get-tuple-element(%s), index=0\n"
    "  %j = s32[]{:S(6)} copy(%i)\n"
    "  %x = f32[6,4]{1,0} get-tuple-element(%s), index=1\n"
    "  %n = s32[] get-tuple-element(%s), index=2\n"
    f"  %next = s32[] {operation}(%j, %step)\n"
    "  %zero = s32[] constant(0)\n"
    "  %row = f32[1,4]{1,0} dynamic-slice(%x, %j, %zero), dynamic_slice_sizes={1,4}\n"
    "  %sum = f32[1,4]{1,0} all-reduce(%row), replica_groups={}, to_apply=%add\n"
    f"  ROOT %t = {state} tuple(%next, %x, %n)\n"
    "}\n"
    f"%outer_condition (s: {state}) -> pred[] {{\n"
    f"  %s = {state} parameter(0)\n"
    "  %i = s32[] get-tuple-element(%s), index=0\n"
    "  %three = s32[] constant(3)\n"
    "  ROOT %less = pred[] compare(%three, %i), direction=GT\n"
    "}\n"
    f"%outer_body (s: {state}) -> {state} {{\n"
    f"  %s = {state} parameter(0)\n"
    "  %i = s32[] get-tuple-element(%s), index=0\n"
    "  %x = f32[6,4]{1,0} get-tuple-element(%s), index=1\n"
    "  %n = s32[] get-tuple-element(%s), index=2\n"
    "  %one = s32[] constant(1)\n"
    "  %next = s32[] add(%one, %i)\n"
    f"  %start = s32[] constant({start})\n"
    f"  %u = {state} tuple(%start, %x, %n)\n"
    f"  %inner = {state} while(%u), condition=%condition, body=%body\n"
    f"  ROOT %t = {state} tuple(%next, %x, %n)\n"
    "}\n"
  ) + entry(
    "%x = f32[6,4]{1,0} parameter(0)",
    "%zero = s32[] constant(0)",
    f"%limit = s32[] constant({limit})",
    "%begin = s32[] copy(%zero)",
    f"%t = {state} tuple(%begin, %x, %limit)",
    f"%outer = {state} while(%t), condition=%outer_condition, body=%outer_body",
  )


@pytest.mark.parametrize(
  "counting,trips",
  [
    ((0, 1, 6), 6),
    ((2, 1, 6), 4),
    ((0, 4, 6), 2),
    ((0, 2, 8, "LE"), 5),
    ((5, -1, 0, "GT"), 5),
    ((5, 1, 0, "GE", "subtract"), 6),
    ((6, 1, 6), 0),
  ],
)
def test_iterations_of_nested_loops_that_count(counting, trips):
  program = hlo.analyse(loop(*counting))
  assert program.collectives["all-reduce"].count == 3 * trips
  assert program.collectives["all-reduce"].bytes == 3 * trips * 16
  scalars = 3 * trips * (4 + 3 * 4 + 2 * 4) + 3 * 3 * 4 + 2 * 4
  assert abs(program.traffic - 3 * trips * (16 + 16 + 2 * 16)) <= 2 * scalars


def test_a_constant_is_not_a_counter():
  with pytest.raises(ValueError, match="the loop inner has an unknown trip count"):
    hlo.analyse(loop(0, 0, 6))


# The TPU compiler itself

TPU_SCRIPT = """
import sys
import jax
from jax.experimental import topologies
from maskgen import sharding
from maskgen.config import Mesh
from test_costs import WEIGHTS, WIDTH, scan_layers, shape, train, unrolled_layers
for name in ("v5e:2x2", "v5p:2x2x1", "v6e:2x2"):
  devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
  print(devices[0].device_kind)
mesh = sharding.make_mesh(Mesh(), devices)
for loss in (unrolled_layers, scan_layers):
  step = jax.jit(lambda w, x: train(loss, 1, w, x), out_shardings=sharding.replicated(mesh),
                 in_shardings=(sharding.replicated(mesh), sharding.batch_sharding(mesh)))
  text = step.lower(WEIGHTS, shape(32, WIDTH)).compile().as_text()
  open(f"{sys.argv[1]}/{loss.__name__}", "w").write(text)
"""


def test_the_tpu_compilers_programs(tmp_path):
  pytest.importorskip("libtpu")
  folder = os.path.dirname(__file__)
  environment = os.environ | {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "PYTHONPATH": os.pathsep.join([folder, os.path.dirname(folder)]),
  }
  done = subprocess.run(
    [sys.executable, "-c", TPU_SCRIPT, str(tmp_path)], env=environment, capture_output=True, text=True
  )
  assert not done.returncode, done.stderr[-2000:]
  found = [chips.chip_of(types.SimpleNamespace(device_kind=kind)) for kind in done.stdout.splitlines()]
  assert [chip.name for chip in found] == ["TPU v5e", "TPU v5p", "TPU v6e"]
  for name in ("unrolled_layers", "scan_layers"):
    program = hlo.analyse((tmp_path / name).read_text())
    assert program.collectives["all-reduce"].bytes == WEIGHT_BYTES
    assert program.cycles > 0


# Chips

CHIP = chips.Chip("a chip", flops=1e12, memory=1e9, bandwidth=1e11, interconnect=1e10, network=1e9)


def program_of(kind, ways, size, count=1):
  return hlo.Program(
    {kind: hlo.Collective((hlo.Use((tuple(range(ways)),), size, count),))}, {}, traffic=3 * 10**11
  )


def test_bounds():
  program = program_of("all-reduce", 4, 10**9, count=2)
  found = chips.bounds(CHIP, 8, 4e12, program)
  assert found == pytest.approx({"compute": 0.5, "memory": 3.0, "interconnect": 0.3})


def test_the_compiler_estimates_everything_but_kernels_and_communication():
  kernel = 'custom_call_target="tpu_custom_call"'
  estimated = 'kind=kLoop, calls=%add, backend_config={"estimated_cycles":"500"}'
  add = "%add (a: f32[8,4]) -> f32[8,4] {\n  ROOT %a = f32[8,4]{1,0} parameter(0)\n}\n"
  program = hlo.analyse(
    add
    + entry(
      "%p = f32[8,4]{1,0} parameter(0)",
      f"%f = f32[8,4]{{1,0}} fusion(%p), {estimated}",
      f"%k = f32[8,4]{{1,0}} custom-call(%f), {kernel}",
    )
  )
  assert (program.cycles, program.kernel_traffic) == (500, 256)
  chip = dataclasses.replace(CHIP, clock=1e3)
  bounds = {"interconnect": 0.25, "network": 0.5}
  work = (8 * 10**12, 0)
  found = chips.expected(chip, 8, program, work, bounds)
  assert found == pytest.approx({"compiler": 0.5, "kernels": 1.4, "communication": 0.75})
  # A kernel that moves more than it computes.
  found = chips.expected(chip, 8, dataclasses.replace(program, kernel_traffic=2 * 10**11), work, bounds)
  assert found["kernels"] == pytest.approx(2.8)
  # A kernel whose vector operations take longer than its products.
  found = chips.expected(chip, 8, program, (8, 8 * 3 * 4096 * 1000), bounds)
  assert found["kernels"] == pytest.approx(4.2)
  assert chips.expected(CHIP, 8, program, work, bounds) is None


def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather():
  seconds = {kind: chips.bounds(CHIP, 8, 0, program_of(kind, 8, 800))["interconnect"] for kind in hlo.KINDS}
  assert seconds["all-reduce"] == seconds["reduce-scatter"] + seconds["all-gather"]
  assert seconds["collective-permute"] == pytest.approx(800 / 1e10)
  assert seconds["all-to-all"] == pytest.approx(700 / 1e10)
  alone = program_of("all-gather", 1, 800)
  assert chips.bounds(CHIP, 1, 0, alone)["interconnect"] == 0


def test_bounds_between_slices():
  message = hlo.Collective((hlo.Use((), 4 * 10**9, 1),))
  program = hlo.Program({}, {"all-reduce": message}, 0)
  assert chips.bounds(CHIP, 8, 0, program, slices=4)["network"] == pytest.approx(6.0)
  assert "network" not in chips.bounds(CHIP, 8, 0, program)
  assert "network" not in chips.bounds(chips.Chip("", 1, 1, 1, 1), 8, 0, program, slices=4)


def test_a_cpu_is_not_a_known_chip():
  assert chips.chip_of(jax.devices()[0]) is None


def test_chips_are_plausible():
  for kind in ("TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "NVIDIA H100 80GB HBM3"):
    chip = chips.chip_of(types.SimpleNamespace(device_kind=kind))
    assert 1e14 < chip.flops < 1e16
    assert 15 * 2**30 < chip.memory < 2e11
    # Compute outruns memory, memory the interconnect, and that the network.
    assert chip.flops > chip.bandwidth > chip.interconnect > (chip.network or 0)
    assert np.log10(chip.flops / chip.bandwidth) == pytest.approx(2.4, abs=0.4)
