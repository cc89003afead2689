"""The formula in Triton kernels. Importing this package imports no Triton."""
