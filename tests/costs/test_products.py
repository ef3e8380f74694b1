"""FLOPs of compiled programs, compared with those of the traced ones."""

import jax
import jax.numpy as jnp
import pytest

from vmoe.costs.flops import count_flops, flops_by_scope
from vmoe.costs.hlo import Program
from vmoe.costs.products import part_of, products


def test_products_in_loops_and_strided_convolutions_have_the_flops_of_the_traced_program() -> None:
    @jax.named_scope("experts")
    def looped(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ x), None), x, length=5)[0]

    def function(x: jax.Array, images: jax.Array, kernel: jax.Array) -> jax.Array:
        with jax.named_scope("embed"):
            out = jax.lax.conv_general_dilated(
                images, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        return jax.grad(lambda x: looped(x).sum())(x).sum() + out.sum()

    arguments = jnp.ones((64, 64)), jnp.ones((2, 9, 9, 3)), jnp.ones((3, 3, 3, 4))
    traced = jax.make_jaxpr(function)(*arguments).jaxpr
    text = jax.jit(function).lower(*arguments).compile().as_text()
    assert text is not None
    found: dict[str, float] = {}
    for product in products(Program(text)):
        found[product.part] = found.get(product.part, 0.0) + product.flops
    counted: dict[str, int] = {}
    for scope, flops in flops_by_scope(traced).items():
        counted[part_of(scope)] = counted.get(part_of(scope), 0) + flops
    assert found == counted == {"experts": 15 * 2 * 64**3, "embed": 2 * 16 * 2 * 27 * 4}
    assert count_flops(traced) == sum(counted.values())


BIASED = """
ENTRY %main (a: bf16[16,32], b: bf16[32,8], c: f32[8]) -> bf16[16,8] {
  %a = bf16[16,32]{1,0} parameter(0)
  %b = bf16[32,8]{1,0} parameter(1)
  %c = f32[8]{0} parameter(2)
  ROOT %d = bf16[16,8]{1,0} custom-call(%a, %b, %c), custom_call_target="__cublas$lt$matmul", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
}
"""
KERNEL = """
ENTRY %main (n: s32[9], a: bf16[256,32], b: f32[8,32,16]) -> bf16[256,16] {
  %n = s32[9]{0} parameter(0)
  %a = bf16[256,32]{1,0} parameter(1)
  %b = f32[8,32,16]{2,1,0} parameter(2)
  ROOT %d = bf16[256,16]{1,0} custom-call(%n, %a, %b), custom_call_target="tpu_custom_call", \
metadata={op_name="jit(f)/moe/experts/jit(gmm)/pallas_call"}, \
backend_config={"custom_call_config":{"cost_estimate":{"flops":"262144"}}}
}
"""
TPU = """
ENTRY %main (a: bf16[128,17,4,16], b: f32[8,4]) -> f32[128,4,17,17] {
  %a = bf16[128,17,4,16]{1,3,2,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[128,17,4,16]{1,3,2,0:T(8,128)(2,1)} parameter(1)
  ROOT %c = f32[128,4,17,17]{2,3,1,0:T(8,128)S(1)} convolution(%a, %b), \
window={size=128x4 stride=127x3 lhs_dilate=128x4}, dim_labels=0b1f_0o1i->01bf
}
"""
CUBLAS = """
ENTRY %main (a: f32[2048,48], b: f32[48,64]) -> f32[2048,64] {
  %a = f32[2048,48]{1,0} parameter(0)
  %b = bf16[48,64]{1,0} parameter(1)
  %c = (f32[2048,64]{1,0}, s8[4194304]{0}) custom-call(%a, %b), \
custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(f)/jvp(block0)/mlp/dot_general"}, \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
}
"""


@pytest.mark.parametrize(
    ("text", "part", "flops", "float32"),
    [
        (TPU, "rest", 2 * 128 * 4 * 17 * 17 * 16, False),  # a product for each image and head
        (CUBLAS, "mlp", 2 * 2048 * 48 * 64, True),
        (BIASED, "rest", 2 * 16 * 32 * 8, False),
        (KERNEL, "experts", 2 * 256 * 32 * 16, True),
    ],
)
def test_products_are_read_as_the_compilers_of_tpus_and_gpus_write_them(
    text: str, part: str, flops: int, float32: bool
) -> None:
    assert list(products(Program(text.replace("\\\n", "")))) == [(part, flops, float32)]
