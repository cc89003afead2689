// Loops that are compiled once for each vector width the processor may have.
#pragma once

// One source, one clone a vector width. The sanitizers are left out because their runtime is not
// up yet when the dynamic linker picks a clone.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && \
    __GNUC__ >= 12 && !defined(__SANITIZE_ADDRESS__)
#define ADAMAL_MULTIVERSIONED \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define ADAMAL_MULTIVERSIONED
#endif

// A part of such a loop: inlined always, for by itself it would be compiled for the baseline only.
#if defined(__GNUC__)
#define ADAMAL_FLATTENED __attribute__((always_inline)) inline
#else
#define ADAMAL_FLATTENED inline
#endif
