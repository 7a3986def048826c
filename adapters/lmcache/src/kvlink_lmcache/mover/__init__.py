"""Paged KV to and from LMCache's memory objects, in plain torch.

LMCache moves KV between vLLM's paged cache and its own memory with kernels that exist for some accelerators only. This
package does the same with tensor operations, for CPU tensors and for any device whose kernels are absent:

- ``planes``: what a cache tensor looks like, as dense blocks and as addressable tokens inside a block;
- ``packing``: where a packing that is not written down (vLLM's CPU backend) puts a token, found by
  writing coded values;
- ``transfer``: the copies;
- ``connector``: LMCache's ``GPUConnectorInterface`` over them.
"""
