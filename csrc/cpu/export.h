// Symbols of the library's C interface.
#pragma once

#define DSFT_EXPORT extern "C" __attribute__((visibility("default")))

// Builds a function for several instruction sets and picks one when the library is loaded: one build serves every host
// that shares a cache folder. Sanitizers do not go with it (the choice runs before they are ready).
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12 && !defined(DSFT_NO_CLONES)
#define DSFT_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define DSFT_CLONES
#endif
