"""GPU kernels with the names and signatures of their eager twins in lxt.rules."""

if __name__ != "lxt.triton_kernels":
    raise ImportError("these are lxt's kernels: import them as lxt.triton_kernels")
