"""GPU kernels for what a step does between its matrix products, which only memory bandwidth can slow down.

Each module holds the kernels of one op of `megacoder.ops` and the plain functions that launch them; those take and
return what the op's own halves do. Importing a module needs triton; a launch needs a GPU, or TRITON_INTERPRET=1 set
before triton is imported, which runs the same kernels on a CPU, slowly. This folder, csrc/triton, is seen as
`megacoder.ops.triton_kernels` through a symbolic link: kernels of all languages stay side by side.

What all kernels keep to:
- every byte is read and written once where a program's registers hold what it needs twice;
- threads move 16 bytes at a time, and a program has tens of kilobytes under way on each multiprocessor;
- arithmetic is fp32, whatever the storage, rounded once when stored;
- products and sums are fused only where a kernel says `tl.fma`. The compiler would choose one product of two to fuse,
  and another one in a variant of the kernel that also finds the largest magnitude: results would differ by a bit;
- no atomics but maxima, for which order is nothing: the same inputs on the same device give the same bits;
- row widths may be compile-time constants (a model has a few of them), numbers of rows never are;
- block sizes follow from shapes by rules that state their reasons. Nothing is tuned by trial at run time, so the first
  step is like all others, and kernels can be compiled and inspected without a GPU (tests/test_triton_aot.py).
"""
