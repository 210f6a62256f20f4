"""GPU kernels for the memory-bound part of a step, between its matrix products.

Each module holds the kernels of one op of `megacoder.ops` and the plain functions that launch them, with the arguments
and results of the op's halves. Importing a module needs triton; a launch needs a GPU, or TRITON_INTERPRET=1 set before
triton is imported, which runs the same kernels on a CPU, slowly. This folder, csrc/triton, appears as
`megacoder.ops.triton_kernels` through a symbolic link, so that the kernels of all languages are side by side.

Rules that all kernels follow:
- every byte is read and written once, if a program's registers can hold what it needs twice;
- threads move 16 bytes at a time, with tens of kilobytes in flight on each multiprocessor;
- arithmetic is fp32, whatever the storage, rounded once when stored;
- products and sums are fused only where a kernel says `tl.fma`. The compiler would choose one of two products to fuse,
  and the other one in a variant of the kernel that also finds the largest magnitude: results would differ by a bit;
- no atomics except maxima, which do not depend on order: the same inputs on the same device give the same bits;
- row widths may be compile-time constants (a model has a few of them), numbers of rows never are;
- block sizes follow from shapes by rules that state their reasons. Nothing is autotuned at run time, so the first step
  is like all others, and kernels can be compiled and inspected without a GPU (tests/test_triton_aot.py).
"""
